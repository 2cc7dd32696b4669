"""Pictures cut into blocks and put together in another order, so that only local detail is left to look at.

The "delicate learning" of FLRDF (Liang & Qu); the idea is known from Chen et al., "Destruction and Construction
Learning for Fine-Grained Image Recognition", CVPR 2019.
"""

from __future__ import annotations

import torch
from torch import Tensor


def random_permutations(batch: int, count: int, device: torch.device) -> Tensor:
    """Return [batch, count] int64: a uniformly random order of 0 .. count - 1 for each image."""
    return torch.rand(batch, count, device=device).argsort(dim=1)


def permute_blocks(images: Tensor, permutations: Tensor, blocks: int) -> Tensor:
    """Cut images [B, C, H, W] into blocks x blocks equal blocks and rearrange those of each image.

    Blocks are counted row by row; block k of the result is block `permutations[b, k]` of image b. Pixels at the right
    and the lower border that fill no whole block are cropped away: [B, C, H - H % blocks, W - W % blocks].
    """
    B, C, H, W = images.shape
    height, width = H // blocks, W // blocks
    tiles = (
        images[:, :, : blocks * height, : blocks * width].unflatten(3, (blocks, width)).unflatten(2, (blocks, height))
    )
    tiles = tiles.permute(0, 2, 4, 1, 3, 5)  # [B, blocks, blocks, C, height, width]
    image = torch.arange(B, device=images.device)[:, None]
    tiles = tiles[image, permutations // blocks, permutations % blocks]  # [B, blocks * blocks, C, height, width]
    tiles = tiles.reshape(B, blocks, blocks, C, height, width).permute(0, 3, 1, 4, 2, 5)
    return tiles.reshape(B, C, blocks * height, blocks * width)
