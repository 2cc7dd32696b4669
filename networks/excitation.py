"""Several excitations of one residual block, and what joins the maps of two stages.

Luo et al., "Cross-X Learning for Fine-Grained Visual Categorization", ICCV 2019, as the published code has them; the
excitations after Sun et al., "Multi-Attention Multi-Class Constraint for Fine-grained Image Recognition", ECCV 2018.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.trunks import Split

REDUCTION = 256  # channels for each unit between the two layers of an excitation, in a ResNet-50 4 and 8 units
FEWEST_UNITS = 4  # ours, for narrower trunks: a single ReLU that is 0 for every picture never learns


class MultiExcitation(nn.Module):
    """Weigh the channels of a block's residual once for each part, by what the picture has of all of them."""

    def __init__(self, channels: int, parts: int):
        super().__init__()
        units = max(FEWEST_UNITS, channels // REDUCTION)
        self.parts = nn.ModuleList(
            nn.Sequential(nn.Linear(channels, units), nn.ReLU(), nn.Linear(units, channels), nn.Sigmoid())
            for _ in range(parts)
        )

    def forward(self, split: Split) -> list[Tensor]:
        """Return the block's output [B, C, h, w] as each part weighs it, `relu(weights * residual + shortcut)`."""
        squeezed = split.residual.mean(dim=(2, 3))
        weights = [excite(squeezed)[:, :, None, None] for excite in self.parts]
        return [F.relu(torch.addcmul(split.shortcut, w, split.residual), inplace=True) for w in weights]


class CombinedMap(nn.Module):
    """Join a map of stage 3 and one of the last stage by convolutions, and average the result over the picture."""

    applies_in_order = True  # its batch norm gets what its convolution gives: see `networks.folding`

    def __init__(self, stage3_channels: int, final_channels: int):
        super().__init__()
        self.reduce = nn.Conv2d(final_channels, stage3_channels, 1, bias=False)
        self.conv = nn.Conv2d(stage3_channels, stage3_channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(stage3_channels)
        for convolution in (self.reduce, self.conv):
            nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, stage3: Tensor, final: Tensor) -> Tensor:
        """Map [B, C3, h, w] and [B, C, h', w'], whose cells are repeated to fill h x w, to [B, C3].

        In evaluation all of this is linear, so the maps are averaged first, over the cells that each weight of the 3x3
        convolution meets: h * w / 9 times less work, and the same up to rounding.
        """
        size = stage3.shape[-2:]
        if self.training:  # the batch norm has to see all cells
            joined = stage3 + F.interpolate(self.reduce(final), size=size, mode="nearest")
            return self.norm(self.conv(joined)).mean(dim=(2, 3))
        repeated = F.interpolate(final, size=size, mode="nearest")
        stage3, final = (F.avg_pool2d(map_, size, stride=1, padding=1) for map_ in (stage3, repeated))  # [B, C, 3, 3]
        joined = stage3 + self.reduce(final)
        return self.norm(F.conv2d(joined, self.conv.weight, self.conv.bias)).flatten(1)
