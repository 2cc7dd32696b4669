"""What throughput.py times: a training step, a prediction, and the backbone's share of either."""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from datasets import Batch
from networks.folding import cast_for_autocast, fold_batch_norm
from networks.system import System
from utils.training.engine import train_one_epoch
from utils.training.execution import Execution
from utils.training.loss_scale import build_loss_scale
from utils.training.schedule import build_optimizer, build_schedule, plan_epoch

CLIP = 10.0
SGD = {"learning_rate": 1e-6, "momentum": 0.9, "weight_decay": 1e-4}


class InMemory(list):
    """One batch as train_one_epoch wants its loader."""

    @property
    def batch_size(self) -> int:
        return len(self[0].labels)


def images_for(options: argparse.Namespace, batch_size: int) -> Tensor:
    return torch.randn(batch_size, 3, options.input_size, options.input_size)


class Inference:
    """The network's prediction for a batch that is on the device already; `floor()` is its backbone's share."""

    def __init__(self, network: System, images: Tensor, execution: Execution) -> None:
        self.network = network.eval()
        self.execution = execution
        self.images = execution.images(images)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        with self.execution.autocast():
            output = self.network(self.images, branches=self.network.evaluated)
        return self.network.predict_logits(output)

    def floor(self, shapes: Sequence[torch.Size]) -> Callable[[], None]:
        inputs = [self.execution.images(torch.randn(shape)) for shape in shapes]
        backbone = self.network.backbone

        @torch.no_grad()
        def passes() -> None:
            with self.execution.autocast():
                for images in inputs:
                    backbone(images)

        return passes


class TrainingStep:
    """One step as train_one_epoch takes it, its input from memory; `floor()` is its backbone's share."""

    def __init__(self, network: System, images: Tensor, labels: Tensor, execution: Execution) -> None:
        self.network = network
        self.execution = execution
        self.plan = plan_epoch(network, 2, network.loss_weights, warmup_epochs=1)
        self.batches = InMemory([Batch(images, labels, None, [""] * len(labels))])
        self.optimizer = build_optimizer(network, head_learning_rate_factor=1.0, **SGD)
        self.schedule = build_schedule(self.optimizer, "steps", epochs=1, steps_per_epoch=1, milestones=(10**6,))
        self.loss_scale = build_loss_scale(execution)

    def __call__(self) -> None:
        train_one_epoch(
            self.network,
            self.batches,
            self.optimizer,
            self.schedule,
            plan=self.plan,
            execution=self.execution,
            clip_gradient_norm=CLIP,
            loss_scale=self.loss_scale,
        )

    def floor(self, shapes: Sequence[torch.Size]) -> Callable[[], None]:
        inputs = [self.execution.images(torch.randn(shape)) for shape in shapes]
        backbone = copy.deepcopy(self.network.backbone).train()
        weights = [p for p in backbone.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(
            weights, SGD["learning_rate"], momentum=SGD["momentum"], weight_decay=SGD["weight_decay"]
        )

        def passes() -> None:
            with self.execution.autocast():
                embeddings = [backbone(images).embedding for images in inputs]
            optimizer.zero_grad(set_to_none=True)
            sum(embedding.float().mean() for embedding in embeddings).backward()
            optimizer.step()

        return passes


def in_layout(network: System, execution: Execution) -> System:
    layout = torch.channels_last if execution.channels_last else torch.contiguous_format
    return copy.deepcopy(network).to(memory_format=layout)


def inference_variants(
    network: System, images: Tensor, off: Execution, on: Execution, with_compiled: bool, other: System | None
) -> dict[str, Inference]:
    def folded(network: System) -> System:
        folded = fold_batch_norm(in_layout(network, on))
        if on.half is not None:
            cast_for_autocast(folded, on.half)
        return folded

    variants = {"off": Inference(in_layout(network, off), images, off), "on": Inference(folded(network), images, on)}
    if with_compiled:
        variants["compiled"] = Inference(with_compiled_backbone(folded(network)), images, on)
    if other is not None:
        variants["own"] = Inference(folded(other), images, on)
    return variants


def training_variants(
    network: System,
    images: Tensor,
    labels: Tensor,
    off: Execution,
    on: Execution,
    with_compiled: bool,
    other: System | None,
) -> dict[str, TrainingStep]:
    variants = {"off": TrainingStep(in_layout(network, off), images, labels, off)}
    variants["on"] = TrainingStep(in_layout(network, on), images, labels, on)
    if with_compiled:
        variants["compiled"] = TrainingStep(with_compiled_backbone(in_layout(network, on)), images, labels, on)
    if other is not None:
        variants["own"] = TrainingStep(in_layout(other, on), images, labels, on)
    return variants


def with_compiled_backbone(network: System) -> System:
    network.backbone.compile()
    return network


def pass_shapes(variant: Inference | TrainingStep) -> list[torch.Size]:
    """The shapes of the backbone passes of one call."""
    shapes: list[torch.Size] = []
    backbone = variant.network.backbone
    handle = backbone.register_forward_pre_hook(lambda module, inputs: shapes.append(inputs[0].shape))
    variant()
    handle.remove()
    return shapes


def backbone_flops(backbone: nn.Module, shapes: Sequence[torch.Size], training: bool) -> int:
    """Floating-point operations (a multiplication and an addition are two) of backbone passes of these shapes."""
    backbone = copy.deepcopy(backbone).to("meta")
    backbone.train(training).requires_grad_(training)
    with FlopCounterMode(display=False) as counter:
        for shape in shapes:
            embedding = backbone(torch.empty(shape, device="meta")).embedding
            if training:
                embedding.sum().backward()
    return counter.get_total_flops()


def host_synchronisations(call: Callable[[], object]) -> int:
    """How often the host waits for the GPU in one call."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def forward_only(variant: Inference | TrainingStep) -> Callable[[], object]:
    """One forward pass, in the mode of the variant, of a batch that is on the device already."""
    if isinstance(variant, Inference):
        return variant
    images = variant.execution.images(variant.batches[0].images)
    variant.network.train()

    def forward() -> None:
        with variant.execution.autocast():
            variant.network(images, branches=variant.plan.branches)

    return forward
