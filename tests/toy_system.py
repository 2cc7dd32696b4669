"""A system of two branches that learns within milliseconds, and what it learns from."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from datasets import Sample, collate
from networks.outputs import NetworkOutput
from networks.system import Step, System
from utils.training.execution import Execution
from utils.training.schedule import EpochPlan

SIZE = 8  # pixels that the toy network sees
CPU = Execution(torch.device("cpu"))
EVERYTHING = EpochPlan({"raw": 1.0, "object": 0.5}, ("raw", "object"), mask_background=True)
WARM_UP = EpochPlan({"raw": 1.0}, ("raw",), mask_background=False)


class Toy(System):
    """Two branches on a convolution with batch norm and dropout; a box that the picture's first pixels tell."""

    branches = evaluated = ("raw", "object")
    prediction = ("raw", "object")
    loss_weights = {"raw": 1.0, "object": 1.0}
    input_size = SIZE

    def __init__(self, *, boxes: bool = True) -> None:
        nn.Module.__init__(self)
        self.register_buffer("ensemble_weights", None)
        self.colocalization = self.learned_localization = None
        self.boxes = boxes
        self.convolution = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.dropout = nn.Dropout(0.5)
        self.raw = nn.Linear(6, 3)
        self.object = nn.Linear(6, 3)
        self.calls: list[dict] = []

    def forward(self, images, *, mask_background=False, branches=None):
        self.calls.append({"mask_background": mask_background, "branches": branches, "shape": tuple(images.shape)})
        features = self.dropout(F.relu(self.norm(self.convolution(images))).mean(dim=(2, 3)))
        logits = {"raw": self.raw(features)}
        if branches is None or "object" in branches:
            logits["object"] = self.object(features)
        start = (images[:, 0, 0, :2].abs() * 4).floor().clamp(0, 3)
        return NetworkOutput(logits, torch.cat([start, start + 3], dim=1) if self.boxes else None)


def make_network(**options) -> Toy:
    torch.manual_seed(0)
    return Toy(**options)


def make_samples(count: int, *, size: int = SIZE, boxes: bool = True) -> list[Sample]:
    generator = torch.Generator().manual_seed(1)
    samples = []
    for index in range(count):
        corners = torch.rand(2, 2, generator=generator).sort(dim=0).values.flatten() * size
        image = torch.randn(3, size, size, generator=generator)
        samples.append(Sample(image, index % 3, corners if boxes else None, str(index)))
    return samples


def make_loader(samples: list[Sample], batch_size: int) -> DataLoader:
    return DataLoader(samples, batch_size=batch_size, collate_fn=collate)


def sgd(network: nn.Module, momentum: float = 0.9):
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5, momentum=momentum, weight_decay=1e-3)
    return optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, [2], gamma=0.1)


def assert_same_state(one: nn.Module, other: nn.Module) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    differing = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert differing == []


class Stepping(Toy):
    """Learns `object` from mirrored images, then `raw` from the images, whose pass sees the changed weights."""

    needs_labels = True

    def __init__(self) -> None:
        super().__init__()
        self.dropout.p = 0.0
        self.taken: list[tuple[str, ...]] = []

    def forward(self, images, *, labels=None, **options):
        if self.training:
            assert labels.shape[0] == images.shape[0]
        return super().forward(images, **options)

    def steps(self, images, labels):
        yield Step(images.flip(-1), labels, ("object",))
        yield Step(torch.cat([images, images]), torch.cat([labels, labels]), ("raw",), ("raw",))

    def after_step(self, output, targets):
        assert not torch.is_grad_enabled()
        self.taken.append(tuple(output.logits))


def make_stepping() -> Stepping:
    torch.manual_seed(0)
    return Stepping()
