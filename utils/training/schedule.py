"""What changes from epoch to epoch: loss weights, switches and the learning rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, MultiStepLR, OneCycleLR

from utils.errors import UserError


class EpochPlan(NamedTuple):
    """What the epoch number means for the network and the loss; the network itself never sees the number."""

    loss_weights: dict[str, float]  # loss term -> weight, above 0; terms without one are not trained
    branches: tuple[str, ...]  # what training has to compute for them
    mask_background: bool  # cut the object from the picture with the background blanked


def plan_epoch(
    epoch: int,
    branches: Sequence[str],
    loss_weights: Mapping[str, float],
    *,
    warmup_epochs: int = 1,
    mask_from_epoch: int | None = None,
) -> EpochPlan:
    """Plan an epoch, counted from 1: during warm-up only `raw` is trained, then every term with its weight.

    A term that is not the loss of one branch may need any of them, so that all are computed.
    """
    weights = {"raw": 1.0} if epoch <= warmup_epochs else {name: w for name, w in loss_weights.items() if w > 0}
    needed = tuple(weights) if weights.keys() <= set(branches) else tuple(branches)
    masked = mask_from_epoch is not None and epoch >= mask_from_epoch
    return EpochPlan(weights, needed, masked)


def build_optimizer(
    network: nn.Module,
    heads: Sequence[nn.Module],
    *,
    learning_rate: float,
    head_learning_rate_factor: float,
    momentum: float,
    weight_decay: float,
) -> torch.optim.SGD:
    """Return SGD in which the parameters of `heads` learn at `head_learning_rate_factor` times the rate of the rest."""
    head_parameters = [p for head in heads for p in head.parameters() if p.requires_grad]
    head_ids = {id(p) for p in head_parameters}
    trunk_parameters = [p for p in network.parameters() if p.requires_grad and id(p) not in head_ids]
    groups = [
        {"params": trunk_parameters, "lr": learning_rate},
        {"params": head_parameters, "lr": learning_rate * head_learning_rate_factor},
    ]
    return torch.optim.SGD(groups, lr=learning_rate, momentum=momentum, weight_decay=weight_decay)


def build_schedule(
    optimizer: torch.optim.Optimizer, kind: str, *, epochs: int, steps_per_epoch: int, milestones: Sequence[int]
) -> LRScheduler:
    """Return a schedule to be stepped after every batch.

    "steps": a tenth of the rate after each epoch in `milestones`. "one_cycle": up to the optimizer's rate over the
    first 30 % of the steps, then down to nearly nothing, both along a cosine (Smith & Topin, "Super-Convergence", 2018;
    the momentum stays as it is).
    """
    if kind == "steps":
        return MultiStepLR(optimizer, [epoch * steps_per_epoch for epoch in milestones], gamma=0.1)
    if kind == "one_cycle":
        highest = [group["lr"] for group in optimizer.param_groups]
        return OneCycleLR(optimizer, highest, total_steps=epochs * steps_per_epoch, cycle_momentum=False)
    raise UserError(f"unknown schedule {kind!r}; choose 'steps' or 'one_cycle'")
