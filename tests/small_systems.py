"""Systems on small trunks, for tests of any of them: a system with settings of its own is a `Variant`.

Its trunk is a thin ResNet-18 (modules that build one use the fixture `thin_trunk`), or one that sees what a test tells
it to.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator

import reference
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks import Shared, build_network, build_on_trunk, find_system
from networks.outputs import Features, NetworkOutput
from networks.system import Step, System
from networks.trunks import Split
from utils.training.execution import Execution
from utils.training.learning import Objective
from utils.training.schedule import plan_epoch

CLASSES, SIZE = 5, 128
LABELS = torch.tensor([0, 0, 1, 1])  # of a batch to learn from: there are systems that compare images of one class


class Variant:
    """A system with some settings; without any, its default form, as it learns from random weights.

    `depends_on_batch` names branches that are known to depend on the other images of a batch.
    """

    def __init__(self, model: str, *, depends_on_batch: tuple[str, ...] = (), **settings: object) -> None:
        self.model, self.depends_on_batch = model, depends_on_batch
        self.settings = {"pretrained": "none", **settings}

    def build(self, *, input_size: int = SIZE, **settings: object) -> System:
        torch.manual_seed(0)
        settings = {"backbone": "resnet18", **self.settings, **settings}
        network = build_network(self.model, num_classes=CLASSES, input_size=input_size, **settings)
        for name, parameter in network.backbone.named_parameters():
            if name.endswith("bn2.weight"):
                nn.init.constant_(parameter, 0.3)  # or the residual sums of a new trunk grow without bound
        return network

    @functools.cached_property
    def evaluated(self) -> System:
        """One network for all tests that leave it as it is."""
        return self.build().eval()

    def build_scripted(
        self, look: Look | None = None, *, input_size: int = SIZE, dropout: float = 0.5, **settings: object
    ) -> System:
        """Build it on a `ScriptedBackbone`, without the settings of real trunks."""
        torch.manual_seed(0)
        shared = Shared(input_size=input_size, pretrained=self.settings["pretrained"], dropout=dropout)
        own = {field.name for field in dataclasses.fields(find_system(self.model).Options)}
        settings = {name: value for name, value in self.settings.items() if name in own} | settings
        return build_on_trunk(self.model, ScriptedBackbone(look), CLASSES, shared=shared, **settings)


def make_images(size: int = SIZE, batch: int = 2, seed: int = 1) -> Tensor:
    """Blobs with some noise: maps with several peaks, so that boxes, masks and windows all cut something away."""
    generator = torch.Generator().manual_seed(seed)
    blobs = F.interpolate(torch.randn(batch, 3, 5, 5, generator=generator), size=(size, size), mode="bicubic")
    return 1.5 * blobs + 0.3 * torch.randn(batch, 3, size, size, generator=generator)


# ---- a trunk that sees what it is told to -------------------------------------------------------------------------

Look = Callable[[Tensor], tuple[Tensor, Tensor]]  # brightness [B, 1, g, g] to what the last two blocks make of it


def brightness(images: Tensor, cell: int) -> Tensor:
    """`[B, 1, H / cell, W / cell]`: the mean of each cell."""
    return F.avg_pool2d(images.mean(dim=1, keepdim=True), cell)


class ScriptedBackbone(nn.Module):
    """A trunk whose deep maps are what `look` makes of the images' brightness `[B, 1, g, g]`: (penultimate, final)."""

    channels = {"stage2": 8, "stage3": 16, "final": 32}
    embedding_channels = 32
    stride = 32

    def __init__(self, look: Look | None = None) -> None:
        super().__init__()
        self.look = look or (lambda bright: (bright, bright))
        self.scale = nn.Parameter(torch.linspace(1, 2, 32)[:, None, None])

    def forward(
        self,
        images: Tensor,
        *,
        kind: str = "picture",
        dense: bool = False,
        split: bool = False,
        until: str = "final",
        start: str = "images",
    ) -> Features:
        if start == "stage3":
            bright = brightness(100 * images, 2)  # what its cells of 16 pixels were made of
            penultimate, final = (map_ * self.scale for map_ in self.look(bright))
            return Features(None, images, penultimate, final, final.mean(dim=(2, 3)))
        penultimate, final = (map_ * self.scale for map_ in self.look(brightness(images, 16 if dense else 32)))
        stage2, stage3 = (0.01 * brightness(images, cell) for cell in (8, 16))
        stage2, stage3 = stage2.expand(-1, 8, -1, -1), stage3.expand(-1, 16, -1, -1)
        if until != "final":
            return Features(stage2, stage3 if until == "stage3" else None, None, None, None)
        splits = [Split(0.6 * map_, 0.4 * map_) for map_ in (stage3, final)] if split else [None, None]
        return Features(stage2, stage3, penultimate, final, final.mean(dim=(2, 3)), *splits)


# ---- what a system makes of images --------------------------------------------------------------------------------


def training_steps(
    network: System, images: Tensor, labels: Tensor = LABELS, *, precision: str = "float32"
) -> Iterator[tuple[Step, NetworkOutput, dict[str, Tensor]]]:
    """Yield the steps of a batch in training with their outputs and loss terms, the weighted `total` among them."""
    plan = plan_epoch(network, 1, network.loss_weights, warmup_epochs=0)
    objective = Objective(plan, Execution(torch.device("cpu"), precision), 0.0)
    for step in network.train().steps(images, labels):
        yield step, *objective.compute(network, step)


def run(network: System, images: Tensor, **call: object) -> tuple[NetworkOutput, list[Tensor]]:
    """Return the output, and what the backbone was given in each pass."""
    with reference.recorded_passes(network) as given:
        output = network(images, **call)
    return output, given


def flat(output: NetworkOutput) -> dict[str, Tensor]:
    """Return all tensors of an output by name, such as `logits.raw`, `object_boxes` and `extras.part_scores`."""
    found: dict[str, Tensor] = {}
    for field, value in output._asdict().items():
        found |= (
            {f"{field}.{name}": item for name, item in value.items()} if isinstance(value, dict) else {field: value}
        )
    return {name: value for name, value in found.items() if value is not None}


def assert_same(got: NetworkOutput, expected: NetworkOutput, *, except_for: tuple[str, ...] = ()) -> None:
    """Boxes and masks must be equal; logits, but of the branches that are excepted, and extras must be close."""
    found, wanted = flat(got), flat(expected)
    assert list(found) == list(wanted)
    for name, value in found.items():
        if name.startswith(("logits.", "extras.")):
            if name.removeprefix("logits.") not in except_for:
                torch.testing.assert_close(
                    value, wanted[name], rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
                )
        else:
            assert torch.equal(value, wanted[name]), name


def learners(network: System, images: Tensor) -> dict[str, set[str]]:
    """Return, for each branch, the names of the network's children that its logits have a gradient for."""
    output = network.train()(images)
    reached: dict[str, set[str]] = {}
    for branch, logits in output.logits.items():
        loss = F.cross_entropy(logits.flatten(0, -2), torch.zeros(logits.shape[:-1].numel(), dtype=torch.int64))
        reached[branch] = set()
        for name, module in network.named_children():
            parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
            if parameters:
                gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
                reached[branch] |= {name} if any(gradient is not None for gradient in gradients) else set()
    return reached
