"""From activation maps to object boxes and masks, without learnt parameters.

Attention object location module of Zhang, Li, Zhai & Liu, "Multi-branch and Multi-scale Attention Learning for
Fine-Grained Visual Categorization" (MMAL-Net), MMM 2021; adaptive mask of SG-KRL. The published code labels components
image by image with scikit-image on the host; here all images are done at once on their device, with equal results.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Localization(NamedTuple):
    """Where the object is, in cells of the grid."""

    cells: Tensor  # [B, H, W] bool: the object's cells
    boxes: Tensor  # [B, 4] int64, (x0, y0, x1, y1) round the cells, ends exclusive; the whole grid where there are none


def activation_map(features: Tensor) -> Tensor:
    """Sum the channels of features [B, C, H, W]: [B, H, W] float32, without gradient.

    Summed in float64, so that equal cells get equal sums: in float32 the order of adding can differ from cell to cell.
    """
    return features.detach().sum(dim=1, dtype=_widest(features)).float()


def _widest(x: Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "mps" else torch.float64  # MPS has no float64


def largest_component(mask: Tensor) -> Tensor:
    """Keep the largest 8-connected component of each mask [B, H, W] bool.

    Of components of equal area the one met first in row-major order is kept; an empty mask stays empty.
    """
    B, H, W = mask.shape
    # Set cells of one 2 x 2 block always touch, so blocks can stand for their cells: a quarter of the nodes.
    padded = F.pad(mask, (0, W % 2, 0, H % 2))
    rows, columns = padded.shape[1:]
    h, w = rows // 2, columns // 2
    occupied = padded.flatten(1)
    linked = _neighbours(rows, columns, mask.device) & occupied[:, :, None] & occupied[:, None, :]
    linked = linked.view(B, h, 2, w, 2, h, 2, w, 2).any(dim=8).any(dim=6).any(dim=4).any(dim=2).view(B, h * w, h * w)
    # Which block reaches which: the adjacency matrix squared until paths of any length are in it. The number of
    # squarings is fixed by the grid, so nothing is read back to the host, and a product of ones and zeros that is
    # compared with zero is exact in every float type.
    reach = linked.float()
    for _ in range(math.ceil(math.log2(h * w))):
        reach = (torch.bmm(reach, reach) > 0).float()
    cells_per_block = padded.view(B, h, 2, w, 2).sum(dim=(2, 4)).view(B, 1, h * w)
    block_area = (reach * cells_per_block).sum(dim=2).long()  # [B, hw], of the component that the block lies in
    area = _spread(block_area.view(B, h, w)) * padded
    order = torch.arange(rows * columns, device=mask.device)
    seed = (area.flatten(1) * (rows * columns) - order).argmax(dim=1)  # largest area first, then the first cell
    seed_block = (seed // columns // 2) * w + seed % columns // 2
    component = reach.gather(1, seed_block[:, None, None].expand(B, 1, h * w)).view(B, h, w) > 0
    return (_spread(component) & padded)[:, :H, :W]


def _spread(blocks: Tensor) -> Tensor:
    """[B, h, w] values of 2 x 2 blocks for each of their cells, [B, 2h, 2w]."""
    return blocks.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)


def _neighbours(rows: int, columns: int, device: torch.device) -> Tensor:
    """[HW, HW] bool: cells at most one step apart, diagonals and the cell itself included."""
    row = torch.arange(rows, device=device).repeat_interleave(columns)
    column = torch.arange(columns, device=device).repeat(rows)
    return ((row[:, None] - row[None, :]).abs() <= 1) & ((column[:, None] - column[None, :]).abs() <= 1)


def localize(activation: Tensor, penultimate_activation: Tensor, *, threshold: float = 1.0) -> Localization:
    """Find the object in activation maps [B, H, W] of the final (or fused) and the penultimate features.

    Both maps are thresholded at `threshold` times their mean (MMAL-Net section 3.2: at the mean).
    """
    component = largest_component(_above_mean(activation, threshold))
    cells = component & _above_mean(penultimate_activation, threshold)
    return Localization(cells, bounding_boxes(cells))


def _above_mean(activation: Tensor, threshold: float) -> Tensor:
    # In float64 the mean of equal values is exactly that value, so that no cell of a constant map is above it.
    return activation > threshold * activation.mean(dim=(1, 2), keepdim=True, dtype=_widest(activation))


def bounding_boxes(cells: Tensor) -> Tensor:
    """Boxes [B, 4] int64 round the cells [B, H, W], ends exclusive; the whole grid where no cell is set."""
    _, H, W = cells.shape
    x0, x1 = _extent(cells.any(dim=1), W)
    y0, y1 = _extent(cells.any(dim=2), H)
    return torch.stack([x0, y0, x1, y1], dim=1)


def _extent(line: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """First set position and one past the last of each line [B, length] bool; (0, length) for an empty line."""
    position = torch.arange(length, device=line.device)
    start = torch.where(line, position, length).amin(dim=-1)
    end = torch.where(line, position + 1, 0).amax(dim=-1)
    empty = end == 0
    return torch.where(empty, 0, start), torch.where(empty, length, end)


def cell_boxes_to_pixels(boxes: Tensor, stride: float) -> Tensor:
    """Turn boxes [B, 4] in cells (ends exclusive) into float32 pixel boxes (ends inclusive), as published.

    A box starts one pixel before its first cell (unless at the border) and ends with the last pixel of its last cell.
    """
    starts = (boxes[:, :2] * stride - 1).clamp(min=0)
    ends = boxes[:, 2:] * stride - 1
    return torch.cat([starts, ends], dim=1).float()


def soft_boxes(features: Tensor, stride: float) -> Tensor:
    """Return pixel boxes [B, 4] (ends inclusive) that move with features [B, C, H, W], cells of `stride` pixels.

    The mean position of what lies above the mean of the channel sum, and sqrt(3) standard deviations to either side:
    the bounding box itself where all cells of a rectangle are equally active and no other is.
    """
    activation = features.float().sum(dim=1)
    mean = activation.mean(dim=(1, 2), keepdim=True)
    # A constant map has a box, too, and the gradient of a nearly constant one does not explode.
    weights = F.relu(activation - mean) + 1e-4 * mean.abs() + 1e-6
    weights = weights / weights.sum(dim=(1, 2), keepdim=True)
    starts, ends = [], []
    for line in (weights.sum(dim=1), weights.sum(dim=2)):  # along x, along y
        position = torch.arange(line.shape[1], device=line.device) + 0.5
        centre = (line * position).sum(dim=1)
        variance = (line * (position - centre[:, None]).square()).sum(dim=1) + 1 / 12  # that within a cell
        half = (3 * variance).sqrt()
        starts.append(stride * (centre - half))
        ends.append(stride * (centre + half) - 1)
    return torch.stack([*starts, *ends], dim=1)


def with_gradient(boxes: Tensor, features: Tensor, stride: float) -> Tensor:
    """Return the boxes [B, 4] as they are, with the gradient of the features' `soft_boxes` (straight-through).

    Thresholds and components, which the boxes come from, have none.
    """
    soft = soft_boxes(features, stride)
    return boxes + (soft - soft.detach())


def adaptive_mask(localization: Localization) -> Tensor:
    """Object mask [B, H, W] bool of SG-KRL.

    In every row that holds a cell of the object, the cells from its first to its last one are filled and one more on
    either side, as far as it lies inside the box. Everything is kept where no object was found.
    """
    cells, boxes = localization
    _, _, W = cells.shape
    column = torch.arange(W, device=cells.device)
    first = torch.where(cells, column, W).amin(dim=2, keepdim=True)  # [B, H, 1]
    last = torch.where(cells, column, -1).amax(dim=2, keepdim=True)
    filled = (column >= first - 1) & (column <= last + 1) & (last >= 0)
    in_box = (column >= boxes[:, 0, None]) & (column < boxes[:, 2, None])  # [B, W]
    return (filled & in_box[:, None, :]) | ~cells.any(dim=2).any(dim=1)[:, None, None]
