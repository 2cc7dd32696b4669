"""What is drawn for a training picture: mirrored, cropped, turned, jittered, erased how; and where its box goes.

Loader processes only draw the numbers, which a seed decides, and carry the box along; the device does the arithmetic,
see `utils.data.image_batches`. The transforms are torchvision's, in the order RandomCrop, RandomHorizontalFlip,
RandomResizedCrop, RandomRotation, ColorJitter, Normalize, RandomErasing; what `auto_augment` draws comes after the
first, and is done where it is drawn, see `utils.data.auto_augment`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# Columns of what is drawn for a picture
MIRRORED, FACTORS, ORDER, PART, ANGLE, ERASED = 0, slice(1, 4), slice(4, 7), slice(7, 11), 11, slice(12, 16)
BRIGHTNESS, CONTRAST, SATURATION = range(3)  # in `FACTORS`, and as `ORDER` names them
LEAST = 1 / 32  # of a side: objects are found in cells that are no smaller


class Augmentation(NamedTuple):
    """What training pictures go through: mirrored with probability `flip`; jittered as torchvision's ColorJitter does.

    brightness, contrast, saturation: the factor is drawn evenly from 1 - value to 1 + value.
    crop_scale: the smallest share of the area of the part that is seen, as RandomResizedCrop draws it; 1: the whole.
    padding: zeros round the loaded picture, in pixels, before the square is cut out of it that all this happens to.
    rotation: the angle is drawn evenly up to so many degrees either way.
    erasing: the probability that a rectangle is erased, of the size and shape that RandomErasing draws.
    auto_augment: a policy of `auto_augment.POLICIES`, or none.
    """

    flip: float = 0.5
    brightness: float = 0.2
    contrast: float = 0.2
    crop_scale: float = 1.0
    padding: int = 0
    rotation: float = 0.0
    saturation: float = 0.0
    erasing: float = 0.0
    auto_augment: str = "none"

    def draw(self, generator: np.random.Generator) -> Tensor:
        """Draw for one picture [16]: mirrored (0 or 1); factors of brightness, contrast and saturation; which of these
        comes first, second and third; the edges (x0, y0, x1, y1) of the part that is seen, as shares of the sides of
        the picture after mirroring; the angle in degrees, counter-clockwise; the edges of what is erased, likewise.
        """
        mirrored = generator.random() < self.flip
        factors, strengths = [1.0, 1.0, 1.0], (self.brightness, self.contrast, self.saturation)
        # Runs resume exactly, those from before there was saturation, too: without it, two are drawn.
        order = [*generator.permutation(3)] if self.saturation else [*generator.permutation(2), SATURATION]
        for position in order:
            if strengths[position]:
                factors[position] = generator.uniform(1 - strengths[position], 1 + strengths[position])
        part = _draw_part(self.crop_scale, generator) if self.crop_scale < 1 else (0.0, 0.0, 1.0, 1.0)
        angle = generator.uniform(-self.rotation, self.rotation) if self.rotation else 0.0
        is_erased = self.erasing > 0 and generator.random() < self.erasing
        erased = _draw_erased(generator) if is_erased else (0.0, 0.0, 0.0, 0.0)
        return torch.tensor([mirrored, *factors, *order, *part, angle, *erased], dtype=torch.float32)

    def carry(self, box: Tensor, drawn: Tensor, size: int) -> Tensor:
        """The box [4], edges in pixels of the picture of size x size, after what was drawn [16] for that picture."""
        if drawn[MIRRORED]:
            box = torch.stack((size - box[2], box[1], size - box[0], box[3]))
        if self.crop_scale < 1:
            box = carry_into_part(box, drawn[PART], size)
        return carry_round(box, float(drawn[ANGLE]), size) if self.rotation else box


def whole_if_lost(box: Tensor, size: int) -> Tensor:
    """The box [4] of what is to be looked at in a picture of size x size: all of it where next to nothing is left."""
    x0, y0, x1, y1 = box.tolist()
    return torch.tensor([0.0, 0.0, size, size]) if min(x1 - x0, y1 - y0) < LEAST * size else box


def _draw_part(smallest: float, generator: np.random.Generator) -> tuple[float, float, float, float]:
    """A part as torchvision's RandomResizedCrop draws it on a square picture, but not in whole pixels: shares of sides.

    Ten tries at an area evenly from `smallest` to 1 and a ratio width / height from 3/4 to 4/3, even in its logarithm.
    """
    for _ in range(10):
        area, ratio = generator.uniform(smallest, 1), math.exp(generator.uniform(math.log(3 / 4), math.log(4 / 3)))
        width, height = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if width <= 1 and height <= 1:
            x, y = generator.uniform(0, 1 - width), generator.uniform(0, 1 - height)
            return x, y, x + width, y + height
    return 0.0, 0.0, 1.0, 1.0  # the central crop of a square, whose own ratio is possible


def _draw_erased(generator: np.random.Generator) -> tuple[float, float, float, float]:
    """A rectangle as torchvision's RandomErasing draws it in a square, but not in whole pixels: shares of sides.

    Ten tries at an area evenly from 0.02 to 0.33 and a ratio height / width from 0.3 to 3.3, even in its logarithm.
    """
    for _ in range(10):
        area, ratio = generator.uniform(0.02, 0.33), math.exp(generator.uniform(math.log(0.3), math.log(3.3)))
        height, width = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if width < 1 and height < 1:
            x, y = generator.uniform(0, 1 - width), generator.uniform(0, 1 - height)
            return x, y, x + width, y + height
    return 0.0, 0.0, 0.0, 0.0


def carry_into_part(box: Tensor, part: Tensor, size: int) -> Tensor:
    """The box [4] in pixels of the picture of size x size, cut at the part [4] and in pixels of it once enlarged."""
    starts, ends = part[:2], part[2:]
    # A box beyond the part is clamped to an edge of it, so has no area: an overlap with anything is then 0.
    return ((box - (starts * size).repeat(2)) / (ends - starts).repeat(2)).clamp(0, size)


def carry_round(box: Tensor, degrees: float, size: int) -> Tensor:
    """The box round the box [4], turned counter-clockwise with its picture of size x size, and cut at its edges."""
    x0, y0, x1, y1 = (edge - size / 2 for edge in box.tolist())
    if x0 >= x1 or y0 >= y1:
        return box  # without area it stays
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    corners = [(x, y) for x in (x0, x1) for y in (y0, y1)]
    xs, ys = [x * cosine + y * sine for x, y in corners], [y * cosine - x * sine for x, y in corners]
    edges = (min(xs), min(ys), max(xs), max(ys))
    return torch.tensor([min(max(edge + size / 2, 0.0), size) for edge in edges])
