"""Suppression of the most discriminative regions, so that a map shows the whole object and not only its head.

Kim, Han & Kim, "Discriminative Region Suppression for Weakly-Supervised Semantic Segmentation", AAAI 2021, as FLRDF
(Liang & Qu, formula 1) uses it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from utils.errors import UserError


def suppress(features: Tensor, share: Tensor | float) -> Tensor:
    """Cap every channel of rectified features [B, C, H, W] at a share of its own maximum over the cells.

    `share` in [0, 1] is one number or [B, C, 1, 1]; 1 changes nothing.
    """
    return torch.minimum(features, features.amax(dim=(2, 3), keepdim=True) * share)


class RegionSuppression(nn.Module):
    """Suppression with `control` "learnable", where each image's channel means decide the share of each channel, or a
    number in (0, 1], the same share for all. Raises UserError for anything else.
    """

    def __init__(self, channels: int, control: str | float = "learnable"):
        super().__init__()
        is_number = isinstance(control, int | float) and not isinstance(control, bool)
        if control != "learnable" and not (is_number and 0 < control <= 1):
            raise UserError(f"suppression is {control!r}; expected 'learnable' or a number above 0 and at most 1")
        self.share = None if control == "learnable" else float(control)
        self.controller = nn.Linear(channels, channels, bias=False) if control == "learnable" else None

    def forward(self, features: Tensor) -> Tensor:
        """Map rectified features [B, C, H, W] to [B, C, H, W]."""
        if self.controller is None:
            return suppress(features, self.share)
        share = torch.sigmoid(self.controller(features.mean(dim=(2, 3))))  # [B, C]
        return suppress(features, share[:, :, None, None])
