"""Which statistics the trunk's batch norms normalise with.

Whole pictures, enlarged objects and parts differ, so that one running mean fits none of the passes exactly. Separate
statistics for inputs of different kinds: Xie et al., "Adversarial Examples Improve Image Recognition", CVPR 2020
(auxiliary batch norm; here the scale and shift stay shared).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.errors import UserError

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
        known = self.passes[index] > 0
        # Tensors of their own: backward keeps them, and the next pass changes the buffer.
        mean = torch.where(known, self.running_mean[index], self.running_mean[0])
        variance = torch.where(known, self.running_var[index], self.running_var[0])
        y = F.batch_norm(x, mean, variance, self.weight, self.bias, self.training, self.momentum, self.eps)
        if self.training:
            self.running_mean[index] = mean
            self.running_var[index] = variance
            self.passes[index] += 1
            if index == 0:  # so that an average of the weights, too, starts from them
                unknown = (self.passes == 0)[:, None]
                self.running_mean.copy_(torch.where(unknown, mean, self.running_mean))
                self.running_var.copy_(torch.where(unknown, variance, self.running_var))
        return y


def separate_statistics(module: nn.Module) -> None:
    """Replace, in place, every BatchNorm2d below the module by one that starts with its statistics for every pass."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, BatchNormPerPass(child))
        else:
            separate_statistics(child)


def use_statistics_of(module: nn.Module, kind: str) -> None:
    """Choose the statistics of the next pass, for all batch norms per pass below the module."""
    if kind not in KINDS:
        raise UserError(f"unknown kind of pass {kind!r}; choose one of {', '.join(KINDS)}")
    for child in module.modules():
        if isinstance(child, BatchNormPerPass):
            child.kind = kind


def freeze_statistics(module: nn.Module) -> None:
    """Let every batch norm below the module use its running statistics, and keep them, in training, too."""
    for child in module.modules():
        if isinstance(child, torch.nn.modules.batchnorm._BatchNorm):
            child.eval()
