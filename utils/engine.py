"""One epoch of training, and evaluation."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from tqdm import tqdm

from networks.outputs import NetworkOutput
from utils.distributed import any_process, evaluation_network, is_main, unwrap
from utils.metrics import EpochMeter, inclusive_to_edges
from utils.schedule import EpochPlan

STEPS_BETWEEN_READINGS = 10  # on a GPU, reading the running loss makes the host wait for the device

LossFunction = Callable[[NetworkOutput, Tensor], dict[str, Tensor]]


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite: `terms` names which, `paths` are the images of the step's batch."""

    def __init__(self, message: str, *, step: int = 0, terms: Sequence[str] = (), paths: Sequence[str] = ()):
        super().__init__(message)
        self.step, self.terms, self.paths = step, list(terms), list(paths)


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
    meter: EpochMeter | None = None,
    first_step: int = 1,
    before_step: Callable[[int], None] = lambda step: None,
    after_step: Callable[[int], None] = lambda step: None,
    clip_gradient_norm: float = 0.0,
    skip_nonfinite: SkipBudget | None = None,
    description: str = "train",
) -> dict[str, float]:
    """Train on all `batches` once and return the epoch's averages (see `utils.metrics.EpochMeter`) and images/s.

    An epoch begun before goes on with `meter`, which holds its sums, and `batches` that leave out what came before
    `first_step`. Steps count from 1; `before_step` and `after_step` are told each one.

    Raises NonFiniteLossError, with the terms, the step and its images, where the loss shows NaN or infinity: before
    the weights are touched on a CPU, at one of the readings every few steps on a GPU.
    """
    network.train()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    meter = EpochMeter(execution.device) if meter is None else meter
    seen_before, start = meter.images, time.perf_counter()
    unread: list[StepLosses] = []
    with tqdm(
        total=len(batches) * batches.batch_size,
        initial=(first_step - 1) * batches.batch_size,
        unit=" images",
        desc=description,
        disable=_bar_disabled(),
        leave=False,
    ) as bar:
        for step, batch in enumerate(batches, start=first_step):
            before_step(step)
            buffers = [buffer.clone() for buffer in network.buffers()] if skip_nonfinite is not None else []
            labels = batch.labels.to(execution.device, non_blocking=True)
            with execution.autocast():
                output = network(
                    execution.images(batch.images),
                    mask_background=plan.mask_background,
                    branches=plan.branches,
                )
            terms = loss_function(output, labels)
            loss = sum(weight * terms[name] for name, weight in plan.loss_weights.items())
            unread.append(
                StepLosses(step, [*terms, "total"], torch.stack([*terms.values(), loss]).detach(), batch.paths)
            )
            skipped = False
            if execution.device.type == "cpu" or skip_nonfinite is not None or step % STEPS_BETWEEN_READINGS == 0:
                skipped = _check_losses(unread, skip_nonfinite)
                unread.clear()
            optimizer.zero_grad(set_to_none=True)
            if skipped:  # the pass has left its mark in the batch-norm statistics
                for buffer, before in zip(network.buffers(), buffers, strict=True):
                    buffer.copy_(before)
            else:
                loss.backward()
                if clip_gradient_norm > 0:
                    nn.utils.clip_grad_norm_(parameters, clip_gradient_norm)
                optimizer.step()
                meter.update(labels, losses={"total": loss, **terms}, logits=output.logits)
            schedule.step()
            bar.update(len(labels))
            if not unread:
                _show(bar, meter)
            after_step(step)
    _check_losses(unread, None)
    meter.reduce()
    averages = meter.compute()
    seconds = time.perf_counter() - start
    return averages | {"images_per_second": (averages["images"] - seen_before) / seconds}


class StepLosses(NamedTuple):
    """The losses of one step, not read from the device yet, and what they were computed from."""

    step: int
    names: list[str]
    values: Tensor  # [terms]
    paths: list[str]


class SkipBudget:
    """How many more steps without a finite loss may be left out."""

    def __init__(self, steps: int) -> None:
        self.left = steps


def _check_losses(unread: Sequence[StepLosses], budget: SkipBudget | None) -> bool:
    """Wait for the losses. True where the last step is not finite and may be skipped; else such a step is an error."""
    if not unread:
        return False
    read = torch.stack([losses.values for losses in unread]).tolist()
    broken = [
        (losses, [name for name, value in zip(losses.names, values, strict=True) if not math.isfinite(value)])
        for losses, values in zip(unread, read, strict=True)
    ]
    losses, terms = next(((losses, terms) for losses, terms in broken if terms), (unread[-1], []))
    if budget is not None and any_process(bool(terms), losses.values.device) and budget.left > 0:
        budget.left -= 1
        tqdm.write(f"step {losses.step} is left out: its loss is not finite ({', '.join(terms) or 'elsewhere'})")
        return True
    if terms:
        raise NonFiniteLossError(
            f"the loss is no longer finite in step {losses.step} ({', '.join(terms)}): the last checkpoint is "
            "unharmed; try a lower learning_rate or set clip_gradient_norm",
            step=losses.step,
            terms=terms,
            paths=losses.paths,
        )
    return False


def _bar_disabled() -> bool | None:
    return None if is_main() else True  # None: shown on a terminal, not in a log file


def _show(bar: tqdm, meter: EpochMeter) -> None:
    if bar.disable or not meter.images:
        return
    averages = meter.compute()
    accuracies = {name.removeprefix("accuracy/"): f"{v:.1%}" for name, v in averages.items() if "accuracy/" in name}
    bar.set_postfix(loss=f"{averages['loss/total']:.3f}", **accuracies, refresh=False)


def check_finite(averages: dict[str, float]) -> None:
    """Raise NonFiniteLossError where an epoch's average loss is not finite."""
    broken = [name for name, value in averages.items() if name.startswith("loss/") and not math.isfinite(value)]
    if broken:
        raise NonFiniteLossError(
            f"the loss is no longer finite ({', '.join(broken)}): the last checkpoint is unharmed; "
            "try a lower learning_rate or set clip_gradient_norm",
            terms=broken,
        )


@torch.no_grad()
def check_weights(network: nn.Module, step: int) -> None:
    """Raise NonFiniteLossError where a weight or a batch-norm statistic is not finite; waits for the device."""
    values = [v for v in (*network.parameters(), *network.buffers()) if v.is_floating_point()]
    if not torch.stack([v.isfinite().all() for v in values]).all():
        raise NonFiniteLossError(
            f"weights are no longer finite after step {step}: the last checkpoint is unharmed; "
            "try a lower learning_rate or set clip_gradient_norm",
            step=step,
            terms=["weights"],
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
