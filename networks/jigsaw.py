"""Pictures cut into blocks and put together in another order, so that only local detail is left to look at.

The "delicate learning" of FLRDF (Liang & Qu). Orders in which blocks stay near: Chen et al., "Destruction and
Construction Learning for Fine-Grained Image Recognition" (DCL), CVPR 2019. Orders in which no block stays: Du et al.,
"Fine-Grained Visual Classification via Progressive Multi-Granularity Training of Jigsaw Patches" (PMG), ECCV 2020.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from networks.crops import crop_and_resize


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


def neighbour_permutations(batch: int, blocks: int, device: torch.device) -> Tensor:
    """Return [batch, blocks * blocks] int64: for each image an order in which most blocks stay near: DCL's.

    From left to right in each row, each block changes places with the one then to its left, or not, with probability
    1/2; then, from the second row down, each row as a whole with the one then above it. So a block moves by at most one
    place to the left or up, and seldom far to the right or down.
    """
    columns = _swap_neighbours(batch * blocks, blocks, device).view(batch, blocks, blocks)  # row by row
    rows = _swap_neighbours(batch, blocks, device)
    order = rows[:, :, None] * blocks + columns.gather(1, rows[:, :, None].expand(-1, -1, blocks))
    return order.flatten(1)


def _swap_neighbours(lines: int, length: int, device: torch.device) -> Tensor:
    """[lines, length] int64: 0 .. length - 1 after each number has changed places with the one before it, or not."""
    swapped = torch.rand(lines, length, device=device) < 0.5
    kept = torch.zeros(lines, dtype=torch.long, device=device)  # the number that the next one is compared with
    order = []
    for number in range(1, length):
        swap = swapped[:, number]
        order.append(torch.where(swap, number, kept))
        kept = torch.where(swap, kept, number)
    return torch.stack([*order, kept], dim=1)


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


def permute_resampled_blocks(images: Tensor, permutations: Tensor, blocks: int) -> Tensor:
    """Rearrange images [B, 3, S, S] as the published code of DCL does, which resamples them; B orders as above.

    A 45th of the side is cut off all round, the blocks in between are made equal by resizing them, and what they form
    is enlarged to S x S. Bilinear, where the published code takes what Pillow's version has.
    """
    size = images.shape[-1]
    margin = round(size * 10 / 448)
    inner = size - 2 * margin
    edges = margin + torch.arange(blocks + 1, device=images.device) * inner // blocks
    starts, ends = edges[:-1], edges[1:] - 1
    row, column = permutations // blocks, permutations % blocks
    boxes = torch.stack([starts[column], starts[row], ends[column], ends[row]], dim=2)  # [B, blocks * blocks, 4]
    side = inner // blocks
    tiles = crop_and_resize(images, boxes, side).view(len(images), blocks, blocks, -1, side, side)
    shuffled = tiles.permute(0, 3, 1, 4, 2, 5).reshape(len(images), -1, blocks * side, blocks * side)
    return F.interpolate(shuffled.float(), size=(size, size), mode="bilinear").to(images.dtype)


def guess_permutations(shuffled: Tensor, images: Tensor, blocks: int) -> Tensor:
    """Return [B, blocks * blocks] int64: for each block the one of the image [B, 3, S, S] that is nearest in colour.

    The published code of DCL compares the sums of the channels' means, and takes the first of equally near ones.
    """
    sums, of_image = (F.adaptive_avg_pool2d(x.float(), blocks).sum(dim=1).flatten(1) for x in (shuffled, images))
    return (sums[:, :, None] - of_image[:, None]).abs().argmin(dim=2)
