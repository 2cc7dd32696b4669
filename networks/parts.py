"""Coarse and fine parts of an object: attention modules that each learn a part, and navigators that propose regions.

Coarse: Sun, Yuan, Zhou & Ding, "Multi-Attention Multi-Class Constraint for Fine-grained Image Recognition", ECCV 2018,
section 3.1. Fine: Yang, Luo, Wang, Hu, Gao & Wang, "Learning to Navigate for Fine-grained Classification" (NTS-Net),
ECCV 2018. Boxes are inclusive pixel corners `(x0, y0, x1, y1)`; those of parts may reach beyond the picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import SqueezeExcitation

from networks.shared import Shared
from networks.windows import greedy_selection, overlap_conflicts
from utils.errors import UserError
from utils.options import require

REFERENCE_SIZE = 448  # pixels; the input size that anchor sizes are given for, as published
ANCHOR_SIZES = (48, 96, 192)  # pixels, one for each level of the navigator
ANCHOR_SCALES = ((2 ** (1 / 3), 2 ** (2 / 3)), (2 ** (1 / 3), 2 ** (2 / 3)), (1.0, 2 ** (1 / 3), 2 ** (2 / 3)))
ASPECT_RATIOS = (2 / 3, 1.0, 3 / 2)  # width to height
LEVELS = len(ANCHOR_SCALES)

Scales = Sequence[Sequence[float]]  # by level; an anchor has its level's size times one of these


class CoarsePart(nn.Module):
    """A squeeze-and-excitation gate that picks a part's channels, and a feature of that part."""

    def __init__(self, channels: int, feature_channels: int = 1024, *, reduction: int = 16):
        super().__init__()
        self.gate = SqueezeExcitation(channels, channels // reduction)
        self.projection = nn.Linear(channels, feature_channels)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Map features [B, C, H, W] to the part's map [B, C, H, W] and its feature [B, feature_channels]."""
        part_map = self.gate(features)
        return part_map, self.projection(part_map.mean(dim=(2, 3)))


class Navigator(nn.Module):
    """Scores how informative every anchor is; it learns from the ranking loss alone, so the map comes in detached.

    PyTorch's own start, as published, shrinks the scores from level to level, so that the first level leads at first.
    With `levels_alike` none does.
    """

    def __init__(
        self, channels: int, *, hidden_channels: int = 128, scales: Scales = ANCHOR_SCALES, levels_alike: bool = True
    ):
        super().__init__()
        inputs = (channels, hidden_channels, hidden_channels)
        self.levels = nn.ModuleList(
            nn.Conv2d(count, hidden_channels, kernel_size=3, stride=1 if level == 0 else 2, padding=1)
            for level, count in enumerate(inputs)
        )
        self.scores = nn.ModuleList(
            nn.Conv2d(hidden_channels, count, kernel_size=1) for count in _anchors_per_cell(scales)
        )
        for convolution in (*self.levels, *self.scores) if levels_alike else ():
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")

    def forward(self, part_map: Tensor) -> Tensor:
        """Map a part's map [B, C, g, g] to scores [B, A] in the order of `anchor_boxes`."""
        x = part_map.detach()
        scores = []
        for level, score in zip(self.levels, self.scores, strict=True):
            x = F.relu(level(x))
            scores.append(score(x).flatten(1))
        return torch.cat(scores, dim=1)


def _anchors_per_cell(scales: Scales) -> list[int]:
    return [len(of_level) * len(ASPECT_RATIOS) for of_level in scales]


def anchor_boxes(
    grid_size: int, stride: int, sizes: Sequence[int] = ANCHOR_SIZES, scales: Scales = ANCHOR_SCALES
) -> Tensor:
    """Return the navigator's anchors [A, 4] int64 for a grid of grid_size x grid_size cells of `stride` pixels.

    Level by level (the grid halves, rounded up, from one to the next), scale by scale, ratio by ratio, each row by row.
    They are centred on the cells, never beyond the picture's edge, and their sizes are the same part of the picture at
    every input size.
    """
    input_size = grid_size * stride
    boxes = []
    for level, (size, of_level) in enumerate(zip(sizes, scales, strict=True)):
        step = stride * 2**level
        centres = [min((cell + 0.5) * step, input_size) for cell in range(math.ceil(grid_size / 2**level))]
        for scale in of_level:
            for ratio in ASPECT_RATIOS:
                side = size * input_size / REFERENCE_SIZE * scale
                width, height = side * math.sqrt(ratio), side / math.sqrt(ratio)
                boxes += [
                    (x - width / 2, y - height / 2, x + width / 2, y + height / 2) for y in centres for x in centres
                ]
    edges = torch.tensor(boxes, dtype=torch.float64).floor().long()
    return torch.cat([edges[:, :2], edges[:, 2:] - 1], dim=1)


def anchor_levels(grid_size: int, scales: Scales = ANCHOR_SCALES) -> Tensor:
    """Return the level [A] int64 of every anchor of `anchor_boxes`."""
    per_cell = _anchors_per_cell(scales)
    counts = [math.ceil(grid_size / 2**level) ** 2 * count for level, count in enumerate(per_cell)]
    return torch.cat([torch.full((count,), level) for level, count in enumerate(counts)])


def check_proposals(proposals: int, in_prediction: int, shared: Shared) -> None:
    """Refuse settings under which a prediction has more parts than are proposed, or nothing ranks them."""
    at_most = f"at most part_proposals, {proposals}"
    require(in_prediction <= proposals, "parts_in_prediction", in_prediction, at_most)
    if shared.batch_size and (shared.loss_weights or {}).get("ranking") != 0:
        expected = "at least 2, as what proposes parts learns from their ranking"
        require(proposals >= 2, "part_proposals", proposals, expected)


class PartProposals(nn.Module):
    """Keeps the `count` anchors with the highest scores, none of which overlaps a better one by `max_iou` or more.

    Without `inclusive` one that overlaps it by just `max_iou` is kept, too.

    `every_level` takes one of each level of the navigator first, the best that those taken leave, so that parts of
    every scale are found and every level learns: a level that is never proposed would never get a gradient. NTS-Net
    takes the best of all, and so does this for a `count` below the number of levels. Raises UserError for anchor sizes
    that are not one for each level and where there are fewer anchors than `count`.
    """

    def __init__(
        self,
        count: int,
        *,
        grid_size: int,
        stride: int,
        sizes: Sequence[int] = ANCHOR_SIZES,
        scales: Scales = ANCHOR_SCALES,
        max_iou: float = 0.25,
        inclusive: bool = True,
        every_level: bool = True,
    ):
        super().__init__()
        if len(sizes) != LEVELS or not all(size >= 1 for size in sizes):
            raise UserError(f"anchor_sizes is {tuple(sizes)!r}; expected {LEVELS} sizes of at least 1 pixel")
        boxes, levels = anchor_boxes(grid_size, stride, sizes, scales), anchor_levels(grid_size, scales)
        if not 1 <= count <= len(boxes):
            raise UserError(f"part_proposals is {count}; expected 1 to {len(boxes)}, the number of anchors")
        self.count = count
        self.register_buffer("boxes", boxes, persistent=False)
        self.register_buffer("conflicts", overlap_conflicts(boxes, max_iou, inclusive=inclusive), persistent=False)
        first = torch.arange(LEVELS if every_level and count >= LEVELS else 0)
        self.register_buffer("first", levels == first[:, None], persistent=False)  # [LEVELS or 0, A]

    def forward(self, scores: Tensor, *, best_of_all: bool = False) -> tuple[Tensor, Tensor]:
        """Return the boxes [G, count, 4] float32 of the anchors chosen by scores [G, A], the best first.

        Their scores [G, count] come with them and keep their gradient. `best_of_all`: not of every level this time.
        """
        first = self.first[:0] if best_of_all else self.first
        picks = greedy_selection(scores.detach(), self.conflicts, self.count, first)
        order = scores.detach().gather(1, picks).argsort(dim=1, descending=True, stable=True)
        picks = picks.gather(1, order)
        return self.boxes[picks].float(), scores.gather(1, picks)
