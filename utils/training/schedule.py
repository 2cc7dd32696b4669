"""What changes from epoch to epoch: loss weights, switches and the learning rate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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

    A term that is not the loss of one branch may need any of them, so that all are computed.
    """
    if epoch <= warmup_epochs:
        weights = dict.fromkeys(system.warmup_branches, 1.0)
    else:
        weights = {name: weight for name, weight in loss_weights.items() if weight > 0}
    needed = tuple(weights) if weights.keys() <= set(system.branches) else tuple(system.branches)
    return EpochPlan(weights, needed, system.masks_background(epoch))


def build_optimizer(
    system: System,
    *,
    learning_rate: float,
    head_learning_rate_factor: float,
    momentum: float,
    weight_decay: float,
) -> torch.optim.SGD:
    """Return SGD with a learning rate for each of the system's parameter groups.

    `heads` learn at `head_learning_rate_factor` times the rate, others at their factor in `learning_rate_factors`.
    """
    factors = {"heads": head_learning_rate_factor, **system.learning_rate_factors}
    groups = [
        {"params": parameters, "lr": learning_rate * factors.get(name, 1.0)}
        for name, parameters in system.parameter_groups().items()
    ]
    return torch.optim.SGD(groups, lr=learning_rate, momentum=momentum, weight_decay=weight_decay)


def build_schedule(
    optimizer: torch.optim.Optimizer, kind: str, *, epochs: int, steps_per_epoch: int, milestones: Sequence[int]
) -> LRScheduler:
    """Return a schedule to be stepped after every batch.

    "steps": a tenth of the rate after each epoch in `milestones`. "one_cycle": up to the optimizer's rate over the
    first 30 % of the steps, then down to nearly nothing, both along a cosine (Smith & Topin, "Super-Convergence", 2018;
    the momentum stays as it is). "cosine": from the optimizer's rate down along half a cosine, constant within an epoch
    (Loshchilov & Hutter, "SGDR", ICLR 2017, without restarts).
    """
    if kind == "steps":
        return MultiStepLR(optimizer, [epoch * steps_per_epoch for epoch in milestones], gamma=0.1)
    if kind == "one_cycle":
        highest = [group["lr"] for group in optimizer.param_groups]
        return OneCycleLR(optimizer, highest, total_steps=epochs * steps_per_epoch, cycle_momentum=False)
    if kind == "cosine":
        return LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * (step // steps_per_epoch) / epochs)) / 2)
    raise UserError(f"unknown schedule {kind!r}; choose 'steps', 'one_cycle' or 'cosine'")
