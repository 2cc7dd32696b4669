"""Bilinear attention pooling: what the trunk sees, read once for each of several learnt attention maps.

Hu, Qi, Huang & Lu, "See Better Before Looking Closer: Weakly Supervised Data Augmentation Network for Fine-Grained
Visual Classification" (WS-DAN), 2019, section 3.1. The counterfactual attention to compare with: Rao, Chen, Lu & Zhou,
"Counterfactual Attention Learning for Fine-Grained Visual Categorization and Re-identification" (CAL), ICCV 2021.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.precision import at_least_float32


class AttentionMaps(nn.Module):
    """Convolution, batch norm, ReLU: M maps of where to look."""

    applies_in_order = True  # its batch norm gets what its convolution gives: see `networks.folding`

    def __init__(self, channels: int, count: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, count, kernel_size=1, bias=False)
        self.bn = nn.BatchNorm2d(count, eps=1e-3)

    def forward(self, features: Tensor) -> Tensor:
        """Map [B, C, g, g] to attention maps [B, M, g, g], not negative."""
        return F.relu(self.bn(self.conv(features)))


def attention_pooling(features: Tensor, attention: Tensor) -> Tensor:
    """Return vectors [B, M * C] of length 1: features [B, C, g, g] weighted by each of the maps [B, M, g, g].

    Map by map the mean over the cells of map times features; of every number the square root with its sign; then
    divided by the length of all of them. At least float32.
    """
    pooled = torch.bmm(attention.flatten(2), features.flatten(2).transpose(1, 2))  # [B, M, C]
    pooled = at_least_float32(pooled) / attention[0, 0].numel()
    rooted = pooled.sign() * (pooled.abs() + 1e-6).sqrt()
    return F.normalize(rooted.flatten(1), dim=1)


def counterfactual_attention(attention: Tensor, *, random: bool) -> Tensor:
    """Return maps like the attention's [B, M, g, g] that know nothing: uniform in [0, 2), or 1 everywhere."""
    return 2 * torch.rand_like(attention) if random else torch.ones_like(attention)
