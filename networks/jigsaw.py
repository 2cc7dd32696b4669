"""Pictures cut into blocks and put together in another order, so that only local detail is left to look at.

The "delicate learning" of FLRDF (Liang & Qu); the idea is known from Chen et al., "Destruction and Construction
Learning for Fine-Grained Image Recognition", CVPR 2019. Orders in which no block stays: Du et al., "Fine-Grained Visual
Classification via Progressive Multi-Granularity Training of Jigsaw Patches" (PMG), ECCV 2020.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def random_permutations(batch: int, count: int, device: torch.device) -> Tensor:
    """Return [batch, count] int64: a uniformly random order of 0 .. count - 1 for each image."""
    return torch.rand(batch, count, device=device).argsort(dim=1)


def cyclic_permutations(batch: int, count: int, device: torch.device) -> Tensor:
    """Return [batch, count] int64: for each image a uniformly random one of the cycles through all of 0 .. count - 1.

    So no block stays (unless there is only one), and the image as it was never occurs. These are PMG's orders; one for
    the whole batch, as published, is `cyclic_permutations(1, count, device)` (see `permute_blocks`).
    """
    return exchange_with_corner(random_permutations(batch, count - 1, device) + 1)


def exchange_with_corner(visits: Tensor) -> Tensor:
    """Return the order [B, n] after each place visited has exchanged its block with the first place, place 0.

    `visits` [B, n - 1] int64 are the places 1 .. n - 1 in the order of the visits. The first one gets block 0, each
    other the block of the place visited before it, and place 0 is left with that of the last.
    """
    places = F.pad(visits, (1, 0))  # starts at place 0
    return torch.empty_like(places).scatter(1, places, places.roll(1, dims=1))


def permute_blocks(images: Tensor, permutations: Tensor, blocks: int) -> Tensor:
    """Cut images [B, C, H, W] into blocks x blocks equal blocks and rearrange those of each image.

    Blocks are counted row by row; block k of the result is block `permutations[b, k]` of image b; `permutations` is
    [B, blocks * blocks], or [1, blocks * blocks] for all images. Pixels at the right and the lower border that fill no
    whole block are cropped away: [B, C, H - H % blocks, W - W % blocks].
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
