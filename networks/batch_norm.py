"""Which statistics the trunk's batch norms normalise with.

Whole pictures, enlarged objects and parts differ, so that one running mean fits none of the passes exactly. Separate
statistics for inputs of different kinds: Xie et al., "Adversarial Examples Improve Image Recognition", CVPR 2020
(auxiliary batch norm; here the scale and shift stay shared).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BATCH_NORMS = ("shared", "per_pass", "frozen")
KINDS = ("picture", "object", "part")  # what a backbone pass looks at


class BatchNormPerPass(nn.Module):
    """A BatchNorm2d that keeps running statistics for each of `KINDS`; `kind` says which pass is being computed.

    Until its first pass in training (after the warm-up) a kind has the statistics of whole pictures, and starts from
    them.
    """

    def __init__(self, norm: nn.BatchNorm2d):
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias
        self.momentum, self.eps = norm.momentum, norm.eps
        for name in ("running_mean", "running_var"):
            statistics = getattr(norm, name)
            self.register_buffer(name, statistics.repeat(len(KINDS), 1))  # [kinds, C]
        self.register_buffer("passes", torch.zeros(len(KINDS), dtype=torch.long))  # [kinds], of training
        self.kind = KINDS[0]

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, H, W] to [B, C, H, W]."""
        index = KINDS.index(self.kind)
        mean, variance = (self._statistics(running, index) for running in (self.running_mean, self.running_var))
        if self.training:
            self.passes[index] += 1
        return F.batch_norm(x, mean, variance, self.weight, self.bias, self.training, self.momentum, self.eps)

    def _statistics(self, running: Tensor, index: int) -> Tensor:
        """Return the kind's row [C] of [kinds, C]: in training the row itself, which batch_norm updates in place."""
        row = torch.where(self.passes[index] > 0, running[index], running[0])
        return running[index].copy_(row) if self.training else row


def separate_statistics(module: nn.Module) -> None:
    """Replace, in place, every BatchNorm2d below the module by one that starts with its statistics for every pass."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, BatchNormPerPass(child))
        else:
            separate_statistics(child)


def look_at(module: nn.Module, kind: str) -> None:
    """Choose the statistics of the next pass, for all batch norms per pass below the module."""
    if kind not in KINDS:
        raise ValueError(f"unknown kind of pass {kind!r}; choose one of {', '.join(KINDS)}")
    for child in module.modules():
        if isinstance(child, BatchNormPerPass):
            child.kind = kind


def freeze_statistics(module: nn.Module) -> None:
    """Let every batch norm below the module use its running statistics, and keep them, in training, too."""
    for child in module.modules():
        if isinstance(child, torch.nn.modules.batchnorm._BatchNorm):
            child.eval()
