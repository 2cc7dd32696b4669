"""What changes from epoch to epoch: loss weights, switches and the learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, MultiStepLR, OneCycleLR

from networks.system import System
from utils.errors import UserError


class EpochPlan(NamedTuple):
    """What the epoch number means for the network and the loss; the network itself never sees the number."""

    loss_weights: dict[str, float]  # loss term -> weight, above 0; terms without one are not trained
    branches: tuple[str, ...]  # what training has to compute for them
    mask_background: bool  # cut the object from the picture with the background blanked

    def with_total(self, terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return loss terms with the weighted `total` of those that are trained, if any of them is."""
        weighted = [weight * terms[name] for name, weight in self.loss_weights.items() if name in terms]
        return {"total": sum(weighted), **terms} if weighted else dict(terms)


def plan_epoch(system: System, epoch: int, loss_weights: Mapping[str, float], *, warmup_epochs: int = 1) -> EpochPlan:
    """Plan an epoch, counted from 1: in warm-up only the system's `warmup_branches` train, then every term.

    A term that is not the loss of one branch needs those that `needed_for` says; without a word, it may need any.
    """
    if epoch <= warmup_epochs:
        weights = dict.fromkeys(system.warmup_branches, 1.0)
    else:
        weights = {name: weight for name, weight in loss_weights.items() if weight > 0}
    own = {name: (name,) for name in system.branches}
    needed = {branch for term in weights for branch in (own | system.needed_for).get(term, system.branches)}
    branches = tuple(name for name in system.branches if name in needed)
    return EpochPlan(weights, branches, system.masks_background(epoch))


def freeze_trunk(system: System, optimizer: torch.optim.Optimizer, *, frozen: bool) -> None:
    """Let the optimizer leave the trunk's parameters as they are, or step them again.

    They have no gradient while they are frozen, so that nothing is computed backwards through the trunk for them.
    Its batch-norm statistics move all the same.
    """
    learnt = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for parameter in system.backbone.parameters():
        if id(parameter) in learnt:  # others are fixed for good
            parameter.requires_grad_(not frozen)
            if frozen:
                parameter.grad = None


def build_optimizer(
    system: System,
    *,
    learning_rate: float,
    head_learning_rate_factor: float,
    momentum: float,
    weight_decay: float,
    kind: str = "sgd",
    decay_norms_and_biases: bool = True,
) -> torch.optim.Optimizer:
    """Return the optimizer of the system's parameter groups, each with a learning rate of its own.

    `heads` learn at `head_learning_rate_factor` times the rate, others at their factor in `learning_rate_factors`.
    Without `decay_norms_and_biases` every group comes in two: what decays, then its vectors and scalars, which do not.
    AdamW (Loshchilov & Hutter, "Decoupled Weight Decay Regularization", ICLR 2019) has no use for `momentum`.
    """
    factors = {"heads": head_learning_rate_factor, **system.learning_rate_factors}
    groups = []
    for name, parameters in system.parameter_groups().items():
        rate = learning_rate * factors.get(name, 1.0)
        if decay_norms_and_biases:
            groups.append({"params": parameters, "lr": rate})
        else:
            groups.append({"params": [p for p in parameters if p.ndim > 1], "lr": rate})
            groups.append({"params": [p for p in parameters if p.ndim <= 1], "lr": rate, "weight_decay": 0.0})
    if kind == "sgd":
        return torch.optim.SGD(groups, lr=learning_rate, momentum=momentum, weight_decay=weight_decay)
    if kind == "adamw":
        return torch.optim.AdamW(groups, lr=learning_rate, weight_decay=weight_decay)
    raise UserError(f"unknown optimizer {kind!r}; choose 'sgd' or 'adamw'")


def build_schedule(
    optimizer: torch.optim.Optimizer,
    kind: str,
    *,
    epochs: int,
    steps_per_epoch: int,
    milestones: Sequence[int],
    decay_rate: float = 0.95,
    linear_warmup_epochs: float = 0.0,
) -> LRScheduler:
    """Return a schedule to be stepped after every batch.

    "steps": a tenth of the rate after each epoch in `milestones`. "one_cycle": up to the optimizer's rate over the
    first 30 % of the steps, then down to nearly nothing, both along a cosine (Smith & Topin, "Super-Convergence", 2018;
    the momentum stays as it is). "cosine": from the optimizer's rate down along half a cosine, constant within an epoch
    (Loshchilov & Hutter, "SGDR", ICLR 2017, without restarts; epochs are counted from the end of the warm-up);
    "cosine_per_step": the same without its stairs.
    "exponential": times `decay_rate` in the course of every epoch.

    `linear_warmup_epochs`: before that, the rate rises in equal steps to the optimizer's; cosines and the exponential
    begin after it, and milestones are counted from the start of the run all the same. Not with "one_cycle".
    """
    warmup_steps = round(linear_warmup_epochs * steps_per_epoch)
    if kind == "one_cycle" and warmup_steps == 0:
        if epochs * steps_per_epoch == 1:
            return LambdaLR(optimizer, lambda step: 1.0)  # its only step would have next to no rate
        highest = [group["lr"] for group in optimizer.param_groups]
        return OneCycleLR(optimizer, highest, total_steps=epochs * steps_per_epoch, cycle_momentum=False)
    if kind == "steps" and warmup_steps == 0:
        return MultiStepLR(optimizer, [epoch * steps_per_epoch for epoch in milestones], gamma=0.1)
    left = max(epochs * steps_per_epoch - warmup_steps, 1)  # steps after the warm-up
    factors: dict[str, Callable[[int], float]] = {  # of the step, counted from the end of the warm-up
        "steps": lambda step: 0.1 ** sum(step + warmup_steps >= epoch * steps_per_epoch for epoch in milestones),
        "cosine": lambda step: _half_cosine(step // steps_per_epoch, left / steps_per_epoch),
        "cosine_per_step": lambda step: _half_cosine(step, left),
        "exponential": lambda step: decay_rate ** (step / steps_per_epoch),
    }
    if kind not in factors:
        raise UserError(
            f"unknown schedule {kind!r}; choose 'steps', 'one_cycle' (without a linear warm-up), 'cosine', "
            "'cosine_per_step' or 'exponential'"
        )

    def factor(step: int) -> float:
        return (step + 1) / warmup_steps if step < warmup_steps else factors[kind](step - warmup_steps)

    return LambdaLR(optimizer, factor)


def spreads_over_epochs(kind: str) -> bool:
    """Whether a schedule looks at the last epoch, so that a run with more of them would learn differently throughout.

    The others are the same up to any epoch, however many follow.
    """
    return kind not in ("steps", "exponential")


def _half_cosine(done: float, whole: float) -> float:
    """From 1 where nothing is done down to 0 where the whole is."""
    return (1 + math.cos(math.pi * done / whole)) / 2
