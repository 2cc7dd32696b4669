"""One epoch of training, and evaluation."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader
from tqdm import tqdm

from networks.outputs import NetworkOutput
from utils.reporting.metrics import EpochMeter, inclusive_to_edges, of_known
from utils.reporting.step_log import StepLog
from utils.training.distributed import bar_disabled, evaluation_network, unwrap
from utils.training.ensemble import EnsembleLearning
from utils.training.execution import Execution
from utils.training.exit_learning import ExitLearning, has_passes_to_skip
from utils.training.found_boxes import boxes_to_look_at
from utils.training.learning import Learning, Objective, given_boxes
from utils.training.nonfinite import SkipBudget
from utils.training.schedule import EpochPlan
from utils.training.targets import Mixing


def train_one_epoch(
    network: nn.Module,
    batches: DataLoader,
    optimizer: torch.optim.Optimizer,
    schedule: LRScheduler,
    *,
    plan: EpochPlan,
    execution: Execution,
    label_smoothing: float = 0.0,
    meter: EpochMeter | None = None,
    first_step: int = 1,
    before_step: Callable[[int], None] = lambda step: None,
    save_after: Callable[[int], bool] = lambda step: False,
    save: Callable[[int], None] = lambda step: None,
    clip_gradient_norm: float = 0.0,
    skip_nonfinite: SkipBudget | None = None,
    average: AveragedModel | None = None,
    gradient_accumulation: int = 1,
    loss_scale: GradScaler | None = None,
    mix: Mixing | None = None,
    step_log: StepLog | None = None,
    description: str = "train",
) -> dict[str, float]:
    """Train on all `batches` once and return the epoch's averages (see `reporting.metrics.EpochMeter`) and images/s.

    A step of the epoch is a batch, for which the system may take several optimizer steps (see `System.steps`), each
    computed in `gradient_accumulation` parts. An epoch begun before goes on with `meter`, which holds its sums, and
    `batches` that leave out what came before `first_step`. Steps count from 1 and are told to `before_step`; where
    `save_after` asks for it, `save` is called once it is sure that the step has not broken the weights (after a skipped
    step it is not asked). `average` is updated after every optimizer step. `loss_scale` is that of fp16, which goes on
    from epoch to epoch (None: a new one). `mix` makes mixed pictures with shares of labels of a batch. `step_log` shows
    figures of the steps.

    Raises NonFiniteLossError, with the terms, the step and its images, where the loss shows NaN or infinity: before
    the weights are touched on a CPU, at one of the readings every few steps on a GPU.
    """
    network.train()
    meter = EpochMeter(execution.device) if meter is None else meter
    seen_before, start = meter.images, time.perf_counter()
    learning = Learning(
        network,
        optimizer,
        Objective(plan, execution, label_smoothing),
        clip_gradient_norm,
        skip_nonfinite,
        average,
        gradient_accumulation,
        loss_scale,
    )
    if step_log is not None:
        step_log.begin(meter, description, len(batches))
    with tqdm(
        total=len(batches) * batches.batch_size,
        initial=(first_step - 1) * batches.batch_size,
        unit=" images",
        desc=description,
        disable=bar_disabled(),
        leave=False,
    ) as bar:
        for step, batch in enumerate(batches, start=first_step):
            before_step(step)
            labels = batch.labels.to(execution.device, non_blocking=True)
            images = execution.images(batch.images, batch.augmentation)
            if mix is not None:
                images, labels = mix(images, labels)
            boxes = boxes_to_look_at(batch, unwrap(network), execution.device)
            skipped = learning.learn_from(images, labels, step, batch.paths, meter, boxes)
            if step_log is not None:
                step_log.after_step(step, optimizer.param_groups[0]["lr"], as_line=bar.disable)
            schedule.step()
            bar.update(len(labels))
            if not learning.unread:
                _show(bar, meter)
            if not skipped and save_after(step):  # skipped images would be computed again, and not be finite again
                learning.check_everything(images, labels, step, batch.paths, boxes)
                save(step)
    learning.read()
    meter.reduce()
    averages = meter.compute()
    seconds, seen = time.perf_counter() - start, averages["images"] - seen_before
    # none, where the run was stopped in the evaluation: then nothing says how fast it was
    return averages | {"images_per_second": seen / seconds if seen else math.nan}


def _show(bar: tqdm, meter: EpochMeter) -> None:
    if bar.disable or not meter.images:
        return
    averages = meter.compute()
    accuracies = {name.removeprefix("accuracy/"): f"{v:.1%}" for name, v in averages.items() if "accuracy/" in name}
    bar.set_postfix(loss=f"{averages['loss/total']:.3f}", **accuracies, refresh=False)


@torch.no_grad()
def evaluate(
    network: nn.Module,
    batches: DataLoader,
    *,
    plan: EpochPlan,
    execution: Execution,
    label_smoothing: float = 0.0,
    branches: tuple[str, ...] | None = None,
    on_batch: Callable[[object, NetworkOutput, Tensor], None] | None = None,
    learn_ensemble: bool = False,
    learn_exit: bool = False,
    description: str = "evaluate",
) -> dict[str, float]:
    """Evaluate on all `batches` and return the averages, `accuracy/prediction` among them, and images/s.

    `branches` and those of the prediction are computed (None: those that the network wants evaluated); the total loss
    is the weighted sum of the trained terms that come of them, and left out where none does. `on_batch(batch, output,
    prediction)` sees every batch with its output and the prediction's logits [B, classes]. The overlap of boxes is
    measured where the batches carry true ones. `learn_ensemble`: where the system's ensembling is learned, its weights
    are learnt from these images afterwards, and the accuracy of the prediction is that with them. `learn_exit`: where
    its images may exit early, `exit_threshold` comes as well, which the system does not take.
    """
    network = evaluation_network(network).eval()
    system = unwrap(network)
    branches = tuple(dict.fromkeys((*(system.evaluated if branches is None else branches), *system.prediction)))
    meter, start = EpochMeter(execution.device), time.perf_counter()
    learn_exit = learn_exit and has_passes_to_skip(system)
    learners: list[EnsembleLearning | ExitLearning] = []
    if learn_ensemble and system.ensemble_weights is not None:
        learners.append(EnsembleLearning(system, also=("object",) if learn_exit else ()))
    if learn_exit:
        learners.append(ExitLearning(system, *learners))  # what it learns depends on the ensemble
    for batch in tqdm(batches, desc=description, disable=bar_disabled(), leave=False):
        labels = batch.labels.to(execution.device, non_blocking=True)
        with execution.autocast():
            output = network(
                execution.images(batch.images),
                mask_background=plan.mask_background,
                branches=branches,
                **given_boxes(boxes_to_look_at(batch, system, execution.device)),
            )
        prediction = system.predict_logits(output)
        losses = plan.with_total(system.losses(output, labels, label_smoothing=label_smoothing))
        boxes = None if output.object_boxes is None else inclusive_to_edges(output.object_boxes)
        true_boxes = None
        if batch.boxes is not None and boxes is not None:
            # in pixels of the loaded picture; the network's boxes are in input_size pixels
            scale = system.input_size / batch.images.shape[-1]
            true_boxes, boxes = of_known(batch.boxes, boxes)
            true_boxes = true_boxes.to(execution.device, non_blocking=True) * scale
        meter.update(
            labels,
            losses=losses,
            logits={**output.logits, "prediction": prediction},
            boxes=boxes,
            true_boxes=true_boxes,
        )
        for learner in learners:
            learner.add(output, labels)
        if on_batch is not None:
            on_batch(batch, output, prediction)
    meter.reduce()
    averages = meter.compute()
    for learner in learners:
        averages |= learner.finish()
    return averages | {"images_per_second": averages["images"] / (time.perf_counter() - start)}
