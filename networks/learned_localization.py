"""Localization that is learnt from boxes which colocalization has found without labels.

Ours, after Zhang, Cao & Wu, "Rethinking the Route Towards Weakly Supervised Object Localization", CVPR 2020 (PSOL):
deep descriptor transforming (`networks.colocalization`) finds the boxes of the training pictures once, and a network
learns from them. There a second network regresses boxes; here a 1x1 convolution on a map that is there anyway tells
the cells of the object from the others. So the boxes do not shrink to the detail that classification looks at, and a
new picture takes no pass of the frozen copy.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.backbone import Backbone
from networks.colocalization import Colocalization
from networks.localization import Localization, bounding_boxes, largest_component
from networks.system import System

FoundBy = Literal["channel_sum", "colocalization", "learned"]  # what finds objects in a system that has the choice


class Found(NamedTuple):
    """An object on a map: the teacher's box in training, otherwise what was predicted."""

    boxes: Tensor  # [B, 4] in pixels of the input, ends inclusive
    localization: Localization | None  # the cells that they are drawn round; None: they were given
    extras: dict[str, Tensor] | None  # for the loss, where boxes teach


class LearnedLocalization(nn.Module):
    """Tells on maps of so many channels, with cells of `stride` pixels, which cells lie in the object's box."""

    def __init__(self, channels: int, stride: float):
        super().__init__()
        self.stride = stride
        self.norm = nn.LayerNorm(channels)  # of each cell's vector: maps differ in scale by orders of magnitude
        self.inside = nn.Linear(channels, 1)
        self.teacher: tuple[Colocalization, ...] = ()  # in a tuple, as it is no part of the network's state

    def forward(self, features: Tensor) -> Tensor:
        """Return logits [B, H, W] float32 for features [B, C, H, W]: above 0 where a cell is the object's."""
        return self.inside(self.norm(features.movedim(1, -1))).squeeze(-1).float()

    def localize(self, logits: Tensor) -> tuple[Tensor, Localization]:
        """Find the object by logits [B, H, W]: the largest component of the cells that are its.

        Returns boxes [B, 4] in pixels of the input, ends inclusive, and the cells. As what is taught is the share of a
        cell that lies in a box, its edges lie within the outermost cells: see `edges_within_cells`.
        """
        shares = logits.detach().sigmoid()
        cells = largest_component(shares > 0.5)
        localization = Localization(cells, bounding_boxes(cells))
        found = cells.flatten(1).any(dim=1, keepdim=True)
        edges = torch.where(found, edges_within_cells(shares, localization.boxes), localization.boxes) * self.stride
        return torch.cat([edges[:, :2], edges[:, 2:] - 1], dim=1), localization

    def find(self, features: Tensor, boxes: Tensor | None, *, cells: bool = False) -> Found:
        """Find the object on features [B, C, H, W], where `boxes` [B, 4] may teach, which they do not in evaluation.

        Those that teach are the object's, unless its `cells` are wanted, too: then it is found all the same.
        """
        logits = self(features)
        taught = self.training and boxes is not None
        extras = {"inside": logits, "boxes": boxes} if taught else None
        if taught and not cells:
            return Found(boxes, None, extras)
        return Found(*self.localize(logits), extras)

    def loss(self, logits: Tensor, boxes: Tensor) -> Tensor:
        """Return the mean cross-entropy of logits [B, H, W] and the share of each cell that lies in its image's box.

        `boxes` [B, 4] in pixels of the input, ends inclusive.
        """
        return F.binary_cross_entropy_with_logits(logits, share_in_box(boxes, logits.shape[1:], self.stride))

    def take_teacher(self, backbone: Backbone, input_size: int, images: Iterable[Tensor]) -> None:
        """Keep a colocalization by a copy of the trunk as it is now, fitted to images [B, 3, S, S].

        It goes with `forget_teacher`, once it has found the boxes.
        """
        teacher = Colocalization(backbone, input_size).to(next(backbone.parameters()).device)
        teacher.fit(images)
        self.teacher = (teacher,)

    def forget_teacher(self) -> None:
        self.teacher = ()


def edges_within_cells(shares: Tensor, boxes: Tensor) -> Tensor:
    """Return boxes [B, 4] float32 in cells, edges (x0, y0, x1, y1), by the shares [B, H, W] of cells that are inside.

    `boxes` [B, 4] are the whole cells that they lie in, ends exclusive. From a box's middle to each side it is as far
    as the shares that way add up to: each column's, or row's, highest in the box, relative to the highest of all.
    """
    rows, columns = (torch.arange(size, device=shares.device) for size in shares.shape[1:])
    in_columns = (columns >= boxes[:, 0, None]) & (columns < boxes[:, 2, None])  # [B, W]
    in_rows = (rows >= boxes[:, 1, None]) & (rows < boxes[:, 3, None])  # [B, H]
    inside = shares * (in_rows[:, :, None] & in_columns[:, None, :])
    starts, ends = [], []
    for line, places, axis in ((inside.amax(dim=1), columns, 0), (inside.amax(dim=2), rows, 1)):  # along x, along y
        line = line / line.amax(dim=1, keepdim=True)
        middle = (boxes[:, axis, None] + boxes[:, axis + 2, None]) // 2
        starts.append(middle[:, 0] - (line * (places < middle)).sum(dim=1))
        ends.append(middle[:, 0] + (line * (places >= middle)).sum(dim=1))
    return torch.stack([*starts, *ends], dim=1)


def add_localization(system: System, found_by: FoundBy, channels: int, stride: float) -> None:
    """Give a system what finds its objects, if that is not the channel sum of its maps.

    A learned localization works on the picture's maps, of so many channels and with cells of `stride` pixels. Comes
    after the system's other parts and its `loss_weights`.
    """
    if found_by == "colocalization":
        system.colocalization = Colocalization(system.backbone, system.input_size)
    elif found_by == "learned":
        system.learned_localization = LearnedLocalization(channels, stride)
        system.loss_weights = {**system.loss_weights, "localization": 1.0}
        system.loss_descriptions = {
            **system.loss_descriptions,
            "localization": "Cross-entropy of the share of each cell that lies in the box that teaches.",
        }
        system.warmup_branches = ("raw", "localization")
        system.needed_for = {"localization": ("raw",)}


def share_in_box(boxes: Tensor, grid: tuple[int, int], stride: float) -> Tensor:
    """Return [B, H, W] float32: the share of each cell of stride x stride pixels that lies in a box, ends inclusive."""
    shares = []
    for start, end, cells in ((0, 2, grid[1]), (1, 3, grid[0])):  # along x, along y
        first = torch.arange(cells, device=boxes.device) * stride  # pixel of each cell
        ends = torch.minimum(boxes[:, end, None].float() + 1, first + stride)
        starts = torch.maximum(boxes[:, start, None].float(), first)
        shares.append((ends - starts).clamp(min=0) / stride)
    along_x, along_y = shares
    return along_y[:, :, None] * along_x[:, None, :]
