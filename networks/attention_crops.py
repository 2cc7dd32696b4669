"""Pictures changed by where the network looks: cut down to what it sees, or without it.

Attention-guided cropping and dropping of Hu et al., "See Better Before Looking Closer" (WS-DAN), 2019, section 3.2.
Nothing here has a gradient.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from networks.localization import bounding_boxes
from networks.precision import at_least_float32


def draw_maps(attention: Tensor, count: int) -> Tensor:
    """Draw `count` of each image's maps [B, M, g, g] for it, with replacement: [B, count, g, g].

    The probability of a map is proportional to the square root of its sum. None is certain to have one, so all-zero
    maps are drawn as well where there are no others.
    """
    attention = at_least_float32(attention.detach())
    weights = (attention.sum(dim=(2, 3)) + 1e-6).sqrt()  # [B, M]
    # The first of M bells, each ringing at its rate, is the one of rate r with probability r / sum of all.
    waits = torch.empty(len(weights), count, weights.shape[1], device=weights.device).exponential_()
    drawn = (waits / weights[:, None]).argmin(dim=2)  # [B, count]
    return attention.gather(1, drawn[:, :, None, None].expand(-1, -1, *attention.shape[2:]))


def uniform(count: int, low: float, high: float, device: torch.device) -> Tensor:
    """Return [count] float32: numbers between `low` and `high`."""
    return low + (high - low) * torch.rand(count, device=device)


def attended_pixels(maps: Tensor, share: Tensor | float, size: int) -> Tensor:
    """Return the pixels [B, size, size] bool where maps [B, g, g] reach a `share` ([B], or one) of their maximum.

    The maps are enlarged bilinearly with aligned corners. Of an all-zero map that is every pixel.
    """
    maps = at_least_float32(maps.detach())
    enlarged = F.interpolate(maps[:, None], size=(size, size), mode="bilinear", align_corners=True)[:, 0]
    return enlarged >= (share * maps.amax(dim=(1, 2)))[:, None, None]


def padded_boxes(pixels: Tensor, padding: float) -> Tensor:
    """Return pixel boxes [B, 4] float32 (ends inclusive) round the set pixels [B, S, S], `padding` * S wider all round.

    They stay inside the picture, and are the whole of it where no pixel is set. Ends are rounded as published: the last
    row of a box is the last set one and `padding` * S - 1 rows more.
    """
    size = pixels.shape[-1]
    boxes = bounding_boxes(pixels)  # ends exclusive
    starts = (boxes[:, :2] - math.ceil(padding * size)).clamp(min=0)
    ends = (boxes[:, 2:] - 1 + math.floor(padding * size)).clamp(max=size) - 1
    return torch.cat([starts, ends], dim=1).float()
