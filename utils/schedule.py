"""What changes from epoch to epoch: loss weights, switches and the learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, MultiStepLR, OneCycleLR


class EpochPlan(NamedTuple):
    """What the epoch number means for the network and the loss; the network itself never sees the number."""

    loss_weights: dict[str, float]  # branch -> weight; branches without one are not trained, nor computed in training
    mask_background: bool  # cut the object from the picture with the background blanked


def plan_epoch(
    epoch: int, branches: Sequence[str], *, warmup_epochs: int = 1, mask_from_epoch: int | None = None
) -> EpochPlan:
    """Plan an epoch, counted from 1: during warm-up only `raw` is trained, then every branch with weight 1."""
    trained = ("raw",) if epoch <= warmup_epochs else tuple(branches)
    masked = mask_from_epoch is not None and epoch >= mask_from_epoch
    return EpochPlan(loss_weights=dict.fromkeys(trained, 1.0), mask_background=masked)


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
    raise ValueError(f"unknown schedule {kind!r}; choose 'steps' or 'one_cycle'")
