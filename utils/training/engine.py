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
from utils.data.augmentation import normalised
from utils.errors import UserError
from utils.reporting.metrics import EpochMeter, inclusive_to_edges
from utils.training.distributed import any_process, evaluation_network, gather, is_main, unwrap, without_synchronisation
from utils.training.schedule import EpochPlan

STEPS_BETWEEN_READINGS = 10  # on a GPU, reading the running loss makes the host wait for the device
WHAT_TO_DO = "the last checkpoint is unharmed; try a lower learning_rate or set clip_gradient_norm"

LossFunction = Callable[[NetworkOutput, Tensor], dict[str, Tensor]]


class NonFiniteLossError(UserError):
    """The loss became NaN or infinite: `terms` names which, `paths` are the images of the step's batch.

    `step` is 0 where it showed in the evaluation that follows the last step.
    """

    exit_code = 1
    agreed = True

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

    def images(self, images: Tensor, augmentation: Tensor | None = None) -> Tensor:
        """Move a batch of images [B, 3, H, W] to the device, in the chosen layout, as the network wants them.

        uint8 is augmented there, if `augmentation` [B, 8], itself on the CPU, says how, and normalised; floating point
        is so already.
        """
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        images = images.to(self.device, non_blocking=True)
        if images.dtype == torch.uint8:
            images = normalised(images, augmentation)
        return images.contiguous(memory_format=layout)


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
    save_after: Callable[[int], bool] = lambda step: False,
    save: Callable[[int], None] = lambda step: None,
    clip_gradient_norm: float = 0.0,
    skip_nonfinite: SkipBudget | None = None,
    description: str = "train",
) -> dict[str, float]:
    """Train on all `batches` once and return the epoch's averages (see `reporting.metrics.EpochMeter`) and images/s.

    An epoch begun before goes on with `meter`, which holds its sums, and `batches` that leave out what came before
    `first_step`. Steps count from 1 and are told to `before_step`; where `save_after` asks for it, `save` is called
    once it is sure that the step has not broken the weights (after a skipped step it is not asked).

    Raises NonFiniteLossError, with the terms, the step and its images, where the loss shows NaN or infinity: before
    the weights are touched on a CPU, at one of the readings every few steps on a GPU.
    """
    network.train()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    meter = EpochMeter(execution.device) if meter is None else meter
    seen_before, start = meter.images, time.perf_counter()
    unread: list[StepLosses] = []

    def compute(module: nn.Module, images: Tensor, labels: Tensor) -> tuple[NetworkOutput, dict[str, Tensor]]:
        """Return the output and the losses, the total among them."""
        with execution.autocast():
            output = module(images, mask_background=plan.mask_background, branches=plan.branches)
        terms = loss_function(output, labels)
        total = sum(weight * terms[name] for name, weight in plan.loss_weights.items())
        return output, {**terms, "total": total}

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
            images = execution.images(batch.images, batch.augmentation)
            output, losses = compute(network, images, labels)
            unread.append(StepLosses.of(step, losses, batch.paths))
            skipped = False
            if skip_nonfinite is not None or step % steps_between_readings(execution.device) == 0:
                skipped = _check_losses(unread, skip_nonfinite)
                unread.clear()
            optimizer.zero_grad(set_to_none=True)
            if skipped:  # the pass has left its mark in the batch-norm statistics
                for buffer, before in zip(network.buffers(), buffers, strict=True):
                    buffer.copy_(before)
            else:
                losses["total"].backward()
                if clip_gradient_norm > 0:
                    nn.utils.clip_grad_norm_(parameters, clip_gradient_norm)
                optimizer.step()
                meter.update(labels, losses=losses, logits=output.logits)
            schedule.step()
            bar.update(len(labels))
            if not unread:
                _show(bar, meter)
            if not skipped and save_after(step):  # skipped images would be computed again, and not be finite again
                _check_losses(unread, None)
                unread.clear()
                with torch.no_grad():  # the same images again: the step's own loss was of the weights before it
                    module = without_synchronisation(network).eval()
                    _, losses = compute(module, images, labels)
                    network.train()
                _check_losses([StepLosses.of(step, losses, batch.paths)], None)
                check_weights(network, step)
                save(step)
    _check_losses(unread, None)
    meter.reduce()
    averages = meter.compute()
    seconds = time.perf_counter() - start
    return averages | {"images_per_second": (averages["images"] - seen_before) / seconds}


def steps_between_readings(device: torch.device) -> int:
    return 1 if device.type == "cpu" else STEPS_BETWEEN_READINGS


class StepLosses(NamedTuple):
    """The losses of one step, not read from the device yet, and what they were computed from."""

    step: int
    names: list[str]
    values: Tensor  # [terms]
    paths: list[str]

    @classmethod
    def of(cls, step: int, losses: dict[str, Tensor], paths: list[str]) -> StepLosses:
        return cls(step, list(losses), torch.stack(list(losses.values())).detach(), paths)


class SkipBudget:
    """How many steps without a finite loss may be left out in a run, and how many have been."""

    def __init__(self, allowed: int, used: int = 0) -> None:
        self.allowed, self.used = allowed, used


def _check_losses(unread: Sequence[StepLosses], budget: SkipBudget | None) -> bool:
    """Wait for the losses. True where the last step is not finite and may be skipped; else such a step is an error.

    Several processes agree: where one has such a step all skip it, or raise the same error.
    """
    if not unread:
        return False
    read = torch.stack([losses.values for losses in unread]).tolist()
    broken = [
        (losses.step, [name for name, value in zip(losses.names, values, strict=True) if not math.isfinite(value)])
        for losses, values in zip(unread, read, strict=True)
    ]
    step, terms = next(((step, terms) for step, terms in broken if terms), (unread[-1].step, []))
    if not any_process(bool(terms), unread[-1].values.device):
        return False
    paths = next(losses.paths for losses in unread if losses.step == step)
    found = [(s, t, p) for s, t, p in gather((step, terms, paths)) if t]
    first = min(step for step, _, _ in found)
    terms = list(dict.fromkeys(term for step, names, _ in found if step == first for term in names))
    if budget is not None and budget.used < budget.allowed:
        budget.used += 1
        if is_main():
            tqdm.write(f"step {first} is left out: its loss is not finite ({', '.join(terms)})")
        return True
    raise NonFiniteLossError(
        f"the loss is no longer finite in step {first} ({', '.join(terms)}): {WHAT_TO_DO}",
        step=first,
        terms=terms,
        paths=[path for step, _, paths in found if step == first for path in paths],
    )


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
            f"the loss is no longer finite ({', '.join(broken)}): {WHAT_TO_DO}",
            terms=broken,
        )


@torch.no_grad()
def check_weights(network: nn.Module, step: int) -> None:
    """Raise NonFiniteLossError where a weight or a batch-norm statistic is not finite, in any process.

    Waits for the device.
    """
    values = [v for v in (*network.parameters(), *network.buffers()) if v.is_floating_point()]
    finite = torch.stack([v.isfinite().all() for v in values]).all()
    if any_process(not finite, values[0].device):
        raise NonFiniteLossError(
            f"weights are no longer finite after step {step}: {WHAT_TO_DO}", step=step, terms=["weights"]
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
