"""What training pictures go through before the network sees them: mirrored, cropped, jittered, normalised.

Loader processes only draw the numbers (`Augmentation`), which a seed decides, and carry the box along. The device does
the arithmetic for the whole batch at once, where it costs next to nothing, and batches travel as uint8, a quarter of
the bytes.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Mean and deviation of red, green and blue, of 0..1
NORMALIZATIONS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # which published backbones were trained with
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
GRAY = (0.2989, 0.587, 0.114)  # what red, green and blue add to torchvision's gray


class Augmentation(NamedTuple):
    """What training pictures go through: mirrored with probability `flip`; jittered as torchvision's ColorJitter does.

    brightness, contrast: the factor is drawn evenly from 1 - value to 1 + value.
    crop_scale: the smallest share of the area of the part that is seen, as RandomResizedCrop draws it; 1: the whole.
    padding: zeros round the loaded picture, in pixels, before the square is cut out of it that all this happens to.
    """

    flip: float = 0.5
    brightness: float = 0.2
    contrast: float = 0.2
    crop_scale: float = 1.0
    padding: int = 0

    def draw(self, generator: np.random.Generator) -> Tensor:
        """Draw for one picture [8]: mirrored (0 or 1), factors of brightness and contrast, contrast first (0 or 1),
        and the edges (x0, y0, x1, y1) of the part that is seen, as shares of the sides of the picture after mirroring.
        """
        mirrored = generator.random() < self.flip
        factors, strengths = [1.0, 1.0], (self.brightness, self.contrast)
        order = generator.permutation(2)
        for position in order:
            if strengths[position]:
                factors[position] = generator.uniform(1 - strengths[position], 1 + strengths[position])
        part = _draw_part(self.crop_scale, generator) if self.crop_scale < 1 else (0.0, 0.0, 1.0, 1.0)
        return torch.tensor([mirrored, *factors, order[0], *part], dtype=torch.float32)

    def carry(self, box: Tensor, drawn: Tensor, size: int) -> Tensor:
        """The box [4], edges in pixels of the picture of size x size, after what was drawn [8] for that picture."""
        if drawn[0]:
            box = torch.stack((size - box[2], box[1], size - box[0], box[3]))
        return carry_into_part(box, drawn[4:], size) if self.crop_scale < 1 else box


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


def carry_into_part(box: Tensor, part: Tensor, size: int) -> Tensor:
    """The box [4] in pixels of the picture of size x size, cut at the part [4] and in pixels of it once enlarged."""
    starts, ends = part[:2], part[2:]
    # A box beyond the part is clamped to an edge of it, so has no area: an overlap with anything is then 0.
    return ((box - (starts * size).repeat(2)) / (ends - starts).repeat(2)).clamp(0, size)


def normalised(images: Tensor, augmentation: Tensor | None = None, normalization: str = "imagenet") -> Tensor:
    """Return images [B, 3, H, W] with values in 0..255, augmented if asked, as normalised float32."""
    images = images.to(torch.float32, copy=True) if augmentation is None else augmented(images, augmentation)
    scale, shift = _scale_and_shift(normalization, images.device)
    return images.mul_(scale).add_(shift)


def augmented(images: Tensor, augmentation: Tensor) -> Tensor:
    """Mirror, crop and jitter each image as its row says: float32 in 0..255; torchvision rounds uint8 at every step.

    The part is cut out of the mirrored image and enlarged, as torchvision's resized_crop does. Each image is then
    multiplied by its factor of brightness, and mixed with its mean gray by its factor of contrast, in either order and
    cut off at 0 and 255 after each, as torchvision's adjust_brightness and adjust_contrast do.

    Args:
        images: [B, 3, H, W], values in 0..255.
        augmentation: [B, 8], see `Augmentation.draw`; on the CPU, as it is looked at before it is moved.
    """
    starts, ends = augmentation[:, 4:6], augmentation[:, 6:8]
    cropped = bool((ends - starts < 1).any())  # on a GPU, this would wait for it
    augmentation = augmentation.to(images.device, non_blocking=True)
    columns = augmentation[:, :, None, None, None].unbind(dim=1)
    mirrored, contrast_first = (column.bool() for column in (columns[0], columns[3]))
    brightness, contrast = columns[1:3]
    images = torch.where(mirrored, images.flip(-1), images).float()
    if cropped:
        images = _enlarged(images, augmentation[:, 4:])
    for contrast_now in (contrast_first, ~contrast_first):
        factor = torch.where(contrast_now, contrast, brightness)
        shift = torch.where(contrast_now, (1 - contrast) * _mean_gray(images), 0)
        images.mul_(factor).add_(shift).clamp_(0, 255)  # in place: on a CPU, new memory costs more than arithmetic
    return images


def _enlarged(images: Tensor, parts: Tensor) -> Tensor:
    """Cut parts [B, 4], edges in shares of the sides, out of images [B, 3, H, W], and enlarge each to H x W.

    Bilinear is enough, without antialiasing: parts are never made smaller. A whole image stays, but for rounding.
    """
    H, W = images.shape[-2:]
    # Not by affine_grid, whose matrix product would be rounded to bfloat16 under autocast.
    x, y = (_centres(parts[:, axis, None], parts[:, axis + 2, None], count) for axis, count in ((0, W), (1, H)))
    grid = torch.stack([x[:, None, :].expand(-1, H, -1), y[:, :, None].expand(-1, -1, W)], dim=-1)  # [B, H, W, 2]
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _centres(starts: Tensor, ends: Tensor, count: int) -> Tensor:
    """Centres [B, count] of so many equal steps from starts to ends [B, 1], shares 0..1, as grid_sample's -1..1."""
    half = 0.5 / count
    centres = starts + (ends - starts) * (torch.arange(count, device=starts.device) / count + half)
    return 2 * centres.clamp(starts + half, ends - half) - 1  # nothing of the pixels around the part is mixed in


def _mean_gray(images: Tensor) -> Tensor:
    """Return [B, 1, 1, 1]."""
    return (images.mean(dim=(2, 3), keepdim=True) * _colours(GRAY, images.device)).sum(dim=1, keepdim=True)


@cache
def _scale_and_shift(normalization: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """What values in 0..255 are multiplied by, and what is added, [3, 1, 1] each."""
    mean, std = (_colours(values, device) for values in NORMALIZATIONS[normalization])
    return 1 / (255 * std), -mean / std


@cache
def _colours(values: tuple[float, float, float], device: torch.device) -> Tensor:
    """A number for each colour as a tensor [3, 1, 1]; kept, as a copy to a GPU waits."""
    return torch.tensor(values).reshape(3, 1, 1).to(device)
