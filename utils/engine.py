"""One epoch of training, and evaluation."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from tqdm import tqdm

from networks.outputs import NetworkOutput
from utils.distributed import evaluation_network, is_main, unwrap
from utils.metrics import EpochMeter, inclusive_to_edges
from utils.schedule import EpochPlan

STEPS_BETWEEN_READINGS = 10  # on a GPU, reading the running loss makes the host wait for the device

LossFunction = Callable[[NetworkOutput, Tensor], dict[str, Tensor]]


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite."""


class Execution(NamedTuple):
    """How to compute: the device, mixed precision and the memory layout."""

    device: torch.device
    precision: str = "float32"
    channels_last: bool = True

    def autocast(self) -> torch.autocast:
        """Return the context in which the network runs."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")

    def images(self, images: Tensor) -> Tensor:
        """Move a batch of images to the device, in the chosen layout."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return images.to(self.device, non_blocking=True, memory_format=layout)


def train_one_epoch(
    network: nn.Module,
    batches: DataLoader,
    optimizer: torch.optim.Optimizer,
    schedule: LRScheduler,
    *,
    plan: EpochPlan,
    loss_function: LossFunction,
    execution: Execution,
    clip_gradient_norm: float = 0.0,
    description: str = "train",
) -> dict[str, float]:
    """Train on all `batches` once and return the epoch's averages (see `utils.metrics.EpochMeter`) and images/s.

    Raises NonFiniteLossError, naming the terms, as soon as a reading of the running loss shows NaN or infinity.
    """
    network.train()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    readings = 1 if execution.device.type == "cpu" else STEPS_BETWEEN_READINGS
    meter, start = EpochMeter(execution.device), time.perf_counter()
    with tqdm(
        total=len(batches) * batches.batch_size, unit=" images", desc=description, disable=_bar_disabled(), leave=False
    ) as bar:
        for step, batch in enumerate(batches, start=1):
            labels = batch.labels.to(execution.device, non_blocking=True)
            with execution.autocast():
                output = network(
                    execution.images(batch.images),
                    mask_background=plan.mask_background,
                    branches=plan.branches,
                )
            terms = loss_function(output, labels)
            loss = sum(weight * terms[name] for name, weight in plan.loss_weights.items())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if clip_gradient_norm > 0:
                nn.utils.clip_grad_norm_(parameters, clip_gradient_norm)
            optimizer.step()
            schedule.step()
            meter.update(labels, losses={"total": loss, **terms}, logits=output.logits)
            bar.update(len(labels))
            if step % readings == 0:
                _show(bar, meter)
    check_finite(meter.compute())
    meter.reduce()
    averages = meter.compute()
    return averages | {"images_per_second": averages["images"] / (time.perf_counter() - start)}


def _bar_disabled() -> bool | None:
    return None if is_main() else True  # None: shown on a terminal, not in a log file


def _show(bar: tqdm, meter: EpochMeter) -> None:
    averages = meter.compute()
    check_finite(averages)
    accuracies = {name.removeprefix("accuracy/"): f"{v:.1%}" for name, v in averages.items() if "accuracy/" in name}
    bar.set_postfix(loss=f"{averages['loss/total']:.3f}", **accuracies, refresh=False)


def check_finite(averages: dict[str, float]) -> None:
    broken = [name for name, value in averages.items() if name.startswith("loss/") and not math.isfinite(value)]
    if broken:
        raise NonFiniteLossError(
            f"the loss is no longer finite ({', '.join(broken)}): the last checkpoint is unharmed; "
            "try a lower learning_rate or set clip_gradient_norm"
        )


@torch.no_grad()
def evaluate(
    network: nn.Module,
    batches: DataLoader,
    *,
    plan: EpochPlan,
    loss_function: LossFunction,
    execution: Execution,
    branches: tuple[str, ...] | None = None,
    on_batch: Callable[[object, NetworkOutput, Tensor], None] | None = None,
    description: str = "evaluate",
) -> dict[str, float]:
    """Evaluate on all `batches` and return the averages, `accuracy/answer` among them, and images/s.

    `branches` and those of the answer are computed (None: those that the network wants evaluated); the total loss is
    the weighted sum of the terms that come of them. `on_batch(batch, output, answer)` sees every batch with its output
    and the answer's logits [B, classes]. The overlap of boxes is measured where the batches carry true ones.
    """
    network = evaluation_network(network).eval()
    system = unwrap(network)
    branches = tuple(dict.fromkeys((*(system.evaluated if branches is None else branches), *system.answer)))
    meter, start = EpochMeter(execution.device), time.perf_counter()
    for batch in tqdm(batches, desc=description, disable=_bar_disabled(), leave=False):
        labels = batch.labels.to(execution.device, non_blocking=True)
        with execution.autocast():
            output = network(execution.images(batch.images), mask_background=plan.mask_background, branches=branches)
        answer = system.predict_logits(output)
        terms = loss_function(output, labels)
        total = sum(weight * terms[name] for name, weight in plan.loss_weights.items() if name in terms)
        boxes = None if output.object_boxes is None else inclusive_to_edges(output.object_boxes)
        true_boxes = None
        if batch.boxes is not None:  # in pixels of the loaded picture; the network's boxes are in input_size pixels
            true_boxes = batch.boxes.to(execution.device) * (system.input_size / batch.images.shape[-1])
        meter.update(
            labels,
            losses={"total": total, **terms},
            logits={**output.logits, "answer": answer},
            boxes=boxes,
            true_boxes=true_boxes,
        )
        if on_batch is not None:
            on_batch(batch, output, answer)
    meter.reduce()
    averages = meter.compute()
    return averages | {"images_per_second": averages["images"] / (time.perf_counter() - start)}
