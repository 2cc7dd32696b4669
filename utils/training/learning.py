"""How a network learns from a batch: forward, losses, gradient and optimizer, step by step as its system asks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim.swa_utils import AveragedModel

from networks.outputs import NetworkOutput, detached
from networks.system import Step, System
from utils.errors import UserError
from utils.reporting.metrics import EpochMeter
from utils.training.accumulation import joined_outputs, joined_terms, parts_of
from utils.training.distributed import gradients_shared, unwrap, without_synchronisation
from utils.training.execution import Execution
from utils.training.loss_scale import build_loss_scale, check_loss_scale
from utils.training.nonfinite import SkipBudget, StepLosses, check_losses, check_weights, steps_between_readings
from utils.training.schedule import EpochPlan


class Objective(NamedTuple):
    """What is computed and minimised in an epoch."""

    plan: EpochPlan
    execution: Execution
    label_smoothing: float

    def compute(self, network: nn.Module, step: Step) -> tuple[NetworkOutput, dict[str, Tensor]]:
        """Return a step's output and its loss terms, the weighted `total` among them."""
        system, plan = unwrap(network), self.plan
        given = {"labels": step.targets} if system.needs_labels and network.training else {}
        given |= given_boxes(step.boxes)
        with self.execution.autocast():
            output = network(
                step.images,
                mask_background=plan.mask_background,
                branches=plan.branches if step.branches is None else step.branches,
                **given,
            )
        terms = system.losses(output, step.targets, label_smoothing=self.label_smoothing)
        weights = self.weights(step)
        _refuse_differing_names(system, terms, weights)
        if step.terms is not None:  # one without a weight may not have been computed
            terms = {name: terms[name] for name in step.terms if name in terms or name in weights}
        return output, {**terms, "total": sum(weight * terms[name] for name, weight in weights.items())}

    def compute_again(
        self, network: nn.Module, images: Tensor, labels: Tensor, boxes: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return the loss terms of a batch as evaluation computes them: some branches and terms are training's only."""
        system, plan = unwrap(network), self.plan
        branches = tuple(name for name in plan.branches if name in system.evaluated) or system.evaluated
        with self.execution.autocast():
            output = network(images, mask_background=plan.mask_background, branches=branches, **given_boxes(boxes))
        return plan.with_total(system.losses(output, labels, label_smoothing=self.label_smoothing))

    def weights(self, step: Step) -> dict[str, float]:
        """Return the weights of the loss terms that a step trains."""
        return {n: w for n, w in self.plan.loss_weights.items() if step.terms is None or n in step.terms}


def _refuse_differing_names(system: System, terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> None:
    """Raise UserError where a system computes a loss that has no weight, or gives a weight to one that is not there."""
    for names, others, words in (
        (terms, system.loss_weights, "no weight of it"),
        (weights, terms, "only a weight of it"),
    ):
        for name in names:
            if name not in others:
                raise UserError(
                    f"{type(system).__name__} has a loss term {name} and {words}: its losses() and its loss_weights "
                    "need the same names"
                )


class Learning:
    """A network that learns batch by batch, and the losses that have not been read from the device yet."""

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        objective: Objective,
        clip_gradient_norm: float,
        skip_nonfinite: SkipBudget | None,
        average: AveragedModel | None = None,
        accumulation: int = 1,
        loss_scale: GradScaler | None = None,
    ) -> None:
        self.average, self.accumulation = average, accumulation
        self.loss_scale = build_loss_scale(objective.execution) if loss_scale is None else loss_scale
        self.network, self.system = network, unwrap(network)
        self.optimizer, self.objective = optimizer, objective
        self.clip_gradient_norm, self.skip_nonfinite = clip_gradient_norm, skip_nonfinite
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.unread: list[StepLosses] = []

    def learn_from(
        self,
        images: Tensor,
        labels: Tensor,
        number: int,
        paths: list[str],
        meter: EpochMeter,
        boxes: Tensor | None = None,
    ) -> bool:
        """Take the optimizer steps of a batch, add it to the meter, and tell whether one of them was skipped."""
        taken: list[tuple[Step, NetworkOutput, dict[str, Tensor]]] = []
        skipped = False
        for step in self.system.steps(images, labels, **given_boxes(boxes)):
            if not self.objective.weights(step):
                continue
            buffers = [b.clone() for b in self.network.buffers()] if self.skip_nonfinite is not None else []
            self._clear_gradient()
            output, losses = self._add_gradient(step)
            self.unread.append(StepLosses.of(number, losses, paths))
            if self._is_broken(number):  # the pass has left its mark in the batch-norm statistics
                skipped = True
                self.optimizer.zero_grad(set_to_none=True)
                for buffer, before in zip(self.network.buffers(), buffers, strict=True):
                    buffer.copy_(before)
            else:
                self._move()
                with torch.no_grad():
                    self.system.after_step(output, step.targets)
                taken.append((step, output, losses))
        _count(meter, labels, taken)
        return skipped

    def _clear_gradient(self) -> None:
        """Forget the gradient of the step before."""
        self.optimizer.zero_grad(set_to_none=self.system.absent_gradients)
        if not self.system.absent_gradients:
            for parameter in self.optimizer.state:  # in a run that goes on they have been there before
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)

    def _add_gradient(self, step: Step) -> tuple[NetworkOutput, dict[str, Tensor]]:
        """Compute a step part by part; return its output and loss terms, as if it had been computed at once."""
        parts, outputs, terms = parts_of(step, self.accumulation), [], []
        for number, (part, share) in enumerate(parts, start=1):
            with gradients_shared(self.network, number == len(parts)):
                output, losses = self.objective.compute(self.network, part)
                self.loss_scale.scale(share * losses["total"]).backward()
            # logits that no loss is trained on hold what they were computed from
            outputs.append(detached(output))
            terms.append({name: value.detach() for name, value in losses.items()})
            del output, losses
        return joined_outputs(outputs), joined_terms(terms, [share for _, share in parts])

    def _move(self) -> None:
        """Take one optimizer step along the gradient; in fp16 none where the scaled loss was too large for it."""
        if self.clip_gradient_norm > 0:
            self.loss_scale.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.parameters, self.clip_gradient_norm)
        self.loss_scale.step(self.optimizer)
        self.loss_scale.update()
        if self.average is not None:
            self.average.update_parameters(self.system)
        if not self.system.absent_gradients:
            for parameter in self.parameters:
                if parameter.grad is not None:  # without a momentum it has no state that would tell it was reached
                    self.optimizer.state.setdefault(parameter, {})

    def _is_broken(self, number: int) -> bool:
        """Whether the last losses, if it is time to read them, are not finite and may be skipped; else that raises."""
        due = number % steps_between_readings(self.objective.execution.device) == 0
        return self.read(self.skip_nonfinite) if due or self.skip_nonfinite is not None else False

    def read(self, budget: SkipBudget | None = None) -> bool:
        """Wait for the losses not read yet and check them, see `check_losses`."""
        unread, self.unread = self.unread, []
        broken = check_losses(unread, budget)
        if unread:
            check_loss_scale(self.loss_scale, unread[-1])
        return broken

    def check_everything(
        self, images: Tensor, labels: Tensor, number: int, paths: list[str], boxes: Tensor | None = None
    ) -> None:
        """Raise NonFiniteLossError where the batch has broken the weights. Waits for the device."""
        self.read()
        with torch.no_grad():  # the same images again: the step's own loss was of the weights before it
            module = without_synchronisation(self.network).eval()
            parts = parts_of(Step(images, labels, boxes=boxes), self.accumulation)
            terms = [self.objective.compute_again(module, p.images, p.targets, p.boxes) for p, _ in parts]
            losses = joined_terms(terms, [share for _, share in parts])
            self.network.train()
        check_losses([StepLosses.of(number, losses, paths)], None)
        check_weights(self.network, number)


def given_boxes(boxes: Tensor | None) -> dict[str, Tensor]:
    """Boxes as an argument: only systems that take some have it."""
    return {} if boxes is None else {"boxes": boxes}


def _count(meter: EpochMeter, labels: Tensor, taken: list[tuple[Step, NetworkOutput, dict[str, Tensor]]]) -> None:
    """Add a batch to the meter: every image once, the total over its optimizer steps, each term where it is trained."""
    for index, (step, output, losses) in enumerate(taken):
        if index == 0:
            losses["total"] = sum(totals["total"] for *_, totals in taken)
        else:
            del losses["total"]
        logits = {name: v for name, v in output.logits.items() if step.terms is None or name in step.terms}
        meter.update(step.targets, losses=losses, logits=logits, images=len(labels) if index == 0 else 0)
