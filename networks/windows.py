"""Multi-scale window selection: where in the object crop to look closer.

Attention part proposal module of Zhang et al., "Multi-branch and Multi-scale Attention Learning for Fine-Grained Visual
Categorization" (MMAL-Net), MMM 2021, section 3.3. Boxes are inclusive pixel corners `(x0, y0, x1, y1)`.

A window set is a tuple of groups; a group is `(sizes, quota)`: sizes `(height, width)` in cells of a 14-cell grid and
how many windows to keep of the group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.errors import UserError
from utils.options import Limit, as_annotated

REFERENCE_GRID = 14  # cells; the published grid, 448 pixels at stride 32

Sizes = tuple[tuple[int, int], ...]
WindowSet = tuple[tuple[Sizes, int], ...]

WINDOW_SETS: dict[str, WindowSet] = {
    "birds": (
        (((4, 4), (3, 5), (5, 3)), 2),
        (((6, 6), (5, 7), (7, 5)), 3),
        (((8, 8), (6, 10), (10, 6), (7, 9), (9, 7), (7, 10), (10, 7)), 2),
    ),
    "vehicles": (
        (((6, 6), (5, 7), (7, 5)), 3),
        (((8, 8), (6, 10), (10, 6), (7, 9), (9, 7)), 2),
        (((10, 10), (9, 11), (11, 9), (8, 12), (12, 8)), 1),
    ),
}


def _is_window_set(groups: WindowSet) -> bool:
    numbers = [n for sizes, quota in groups for n in (quota, len(sizes), *(side for size in sizes for side in size))]
    return len(numbers) > 0 and min(numbers) >= 1


# As a setting: a set's name or one of one's own, such as ((((4, 4), (3, 5)), 2), (((8, 8),), 1)): the two best of small
# windows, the best one of the large.
Windows = (
    Annotated[str, Limit(lambda name: name in WINDOW_SETS, ", ".join(map(repr, WINDOW_SETS)))]
    | Annotated[WindowSet, Limit(_is_window_set, "groups such as ((((4, 4), (3, 5)), 2),), of numbers of at least 1")]
)


def resolve_window_set(windows: str | Sequence) -> WindowSet:
    """Return the window set of that name, or a user's own set checked and as tuples. Raises SettingsError."""
    found = as_annotated("windows", windows, Windows)
    return WINDOW_SETS[found] if isinstance(found, str) else found


def scale_window_set(window_set: WindowSet, grid_size: int) -> WindowSet:
    """Carry a window set, given for 14 x 14 cells, over to a grid of grid_size x grid_size cells.

    Sides are rounded to the nearest cell (halves up) and kept between 1 and the grid; sizes of a group that become
    equal are kept once.
    """

    def scale(side: int) -> int:
        return min(max(math.floor(side * grid_size / REFERENCE_GRID + 0.5), 1), grid_size)

    return tuple((tuple(dict.fromkeys((scale(h), scale(w)) for h, w in sizes)), quota) for sizes, quota in window_set)


def window_grid(sizes: Sizes, grid_size: int, stride: int) -> Tensor:
    """Pixel boxes [n, 4] float32 of every placement of every size: sizes in order, each row by row.

    As published, a window starts one pixel before its first cell (unless at the border) and ends with the last pixel
    of its last cell.
    """
    boxes = [
        (max(column * stride - 1, 0), max(row * stride - 1, 0), (column + w) * stride - 1, (row + h) * stride - 1)
        for h, w in sizes
        for row in range(grid_size - h + 1)
        for column in range(grid_size - w + 1)
    ]
    return torch.tensor(boxes, dtype=torch.float32)


def window_scores(activation: Tensor, sizes: Sizes) -> Tensor:
    """Mean activation [B, n] under each window, in the order of `window_grid`, of activation maps [B, H, W].

    Equals the channel sum of the average-pooled feature map, since the activation map is its channel sum.
    """
    maps = activation.float()[:, None]
    return torch.cat([F.avg_pool2d(maps, size, stride=1).flatten(1) for size in sizes], dim=1)


def pairwise_iou(boxes: Tensor) -> Tensor:
    """Intersection over union [..., n, n] of inclusive boxes [..., n, 4] with each other."""
    areas = (boxes[..., 2:] - boxes[..., :2] + 1).prod(dim=-1)
    starts = torch.maximum(boxes[..., :, None, :2], boxes[..., None, :, :2])
    ends = torch.minimum(boxes[..., :, None, 2:], boxes[..., None, :, 2:])
    overlap = (ends - starts + 1).clamp(min=0).prod(dim=-1)
    return overlap / (areas[..., :, None] + areas[..., None, :] - overlap)


def overlap_conflicts(boxes: Tensor, max_iou: float = 0.25, *, inclusive: bool = False) -> Tensor:
    """[n, n] bool: pairs of inclusive boxes [n, 4] with an IoU of more than `max_iou`, and each box with itself.

    `inclusive`: also with just `max_iou`, but for those that do not overlap at all.
    """
    iou = pairwise_iou(boxes.double())
    too_much = (iou >= max_iou) & (iou > 0) if inclusive else iou > max_iou
    return too_much | torch.eye(len(boxes), dtype=torch.bool, device=boxes.device)  # none is taken twice


def greedy_selection(
    scores: Tensor, conflicts: Tensor, quota: int, restrictions: Sequence[Tensor] | Tensor = ()
) -> Tensor:
    """Non-maximum suppression with a fixed number of results: indices [B, quota] int64 into scores [B, n].

    Takes the highest score (of equal ones the lowest index), drops all that conflict with it ([n, n] bool), and so on;
    once nothing remains the last one taken is repeated. `restrictions`, [n] bool each, say what the first, the second
    and so on are taken from, as long as any of it remains; those after them come from all.
    """
    available = torch.ones_like(scores, dtype=torch.bool)
    picks: list[Tensor] = []
    for step in range(quota):
        candidates = available
        if step < len(restrictions):
            restricted = available & restrictions[step]
            candidates = restricted | (available & ~restricted.any(dim=1, keepdim=True))
        best = torch.where(candidates, scores, -torch.inf).argmax(dim=1)
        if picks:
            best = torch.where(candidates.any(dim=1), best, picks[-1])
        picks.append(best)
        available = available & ~conflicts[best]
    return torch.stack(picks, dim=1)


class WindowSelector(nn.Module):
    """Chooses the windows of a window set with the highest mean activation, few of which overlap.

    Raises UserError where a group's quota is larger than the number of its placements on the grid, and for maps of
    another grid.
    """

    def __init__(self, window_set: str | Sequence, *, grid_size: int, stride: int, max_iou: float = 0.25):
        super().__init__()
        self.grid_size = grid_size
        self.window_set = scale_window_set(resolve_window_set(window_set), grid_size)
        self.count = sum(quota for _, quota in self.window_set)
        for index, (sizes, quota) in enumerate(self.window_set):
            boxes = window_grid(sizes, grid_size, stride)
            if quota > len(boxes):
                raise UserError(
                    f"window group {index + 1} asks for {quota} windows but its sizes {sizes} fit only {len(boxes)} "
                    f"times on a grid of {grid_size}x{grid_size} cells: lower its quota or choose smaller windows"
                )
            # Whole numbers, which stay exact when a network is cast to half precision.
            self.register_buffer(f"boxes{index}", boxes.long(), persistent=False)
            self.register_buffer(f"conflicts{index}", overlap_conflicts(boxes, max_iou), persistent=False)

    def forward(self, activation: Tensor) -> Tensor:
        """Return inclusive pixel boxes [B, N, 4] of the windows chosen on activation maps [B, g, g]."""
        if activation.shape[-2:] != (self.grid_size, self.grid_size):
            height, width = activation.shape[-2:]
            raise UserError(
                f"maps have {height}x{width} cells; expected {self.grid_size}x{self.grid_size}, those of the windows"
            )
        chosen = []
        for index, (sizes, quota) in enumerate(self.window_set):
            boxes, conflicts = getattr(self, f"boxes{index}"), getattr(self, f"conflicts{index}")
            picks = greedy_selection(window_scores(activation, sizes), conflicts, quota)
            chosen.append(boxes[picks].float())
        return torch.cat(chosen, dim=1)
