"""Which square of a picture that was loaded larger is seen: a random one in training, the central one otherwise.

Offsets are (top, left) in whole pixels; boxes are (x0, y0, x1, y1), continuous edges in pixels.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from utils.data.decoding import Box
from utils.data.pixels import loaded_shape

Offset = tuple[int, int]


def central_offset(height: int, width: int, size: int) -> Offset:
    """Where the central square of `size` begins, to the pixel that torchvision's CenterCrop takes."""
    return round((height - size) / 2), round((width - size) / 2)


def draw_offset(height: int, width: int, size: int, padding: int, generator: np.random.Generator) -> Offset:
    """Draw where a square of `size` begins, as torchvision's RandomCrop does with `padding` pixels round the picture.

    Below 0 it begins in the padding.
    """
    rooms = (side + 2 * padding - size for side in (height, width))
    top, left = (int(generator.integers(room + 1)) - padding for room in rooms)
    return top, left


def corner_offsets(height: int, width: int, size: int) -> list[Offset]:
    """Where the squares of `size` in the corners begin, in the order of torchvision's FiveCrop."""
    low, right = height - size, width - size
    return [(0, 0), (0, right), (low, 0), (low, right)]


def with_corners(image: Tensor, size: int) -> Tensor:
    """Return five squares out of an image [3, H, W], the central one and those in its corners, one below the other.

    [3, 5 * size, size], its values pixel by pixel in memory; `networks.views` takes them apart.
    """
    sides = image.shape[-2:]
    offsets = [central_offset(*sides, size), *corner_offsets(*sides, size)]
    squares = [cut_square(image, None, offset, size)[0].permute(1, 2, 0) for offset in offsets]
    return torch.cat(squares).permute(2, 0, 1)


def pictures_alone(images: Tensor) -> Tensor:
    """Return the central squares [..., S, S] of images that may come with their corners, [..., 5 * S, S]."""
    return images[..., : images.shape[-1], :]


def cut_square(image: Tensor, box: Tensor | None, offset: Offset, size: int) -> tuple[Tensor, Tensor | None]:
    """Cut [3, size, size] out of an image [3, H, W], zeros where it reaches beyond; the box [4] is cut there, too.

    A box beyond the square has no area. What is all inside is no copy.
    """
    (top, left), (H, W) = offset, image.shape[-2:]
    if (size, size) == (H, W) and offset == (0, 0):
        return image, box
    y0, y1, x0, x1 = max(top, 0), min(top + size, H), max(left, 0), min(left + size, W)
    inside = image[:, y0:y1, x0:x1]
    if inside.shape[-2:] != (size, size):
        square = image.new_zeros(size, size, 3).permute(2, 0, 1)
        square[:, y0 - top : y1 - top, x0 - left : x1 - left] = inside
        inside = square
    return inside, None if box is None else cut_box(box, offset, size)


def cut_box(box: Tensor, offset: Offset, size: int) -> Tensor:
    """The box [4] in a square of `size` that begins at an offset; without area beyond it."""
    starts = (offset[1], offset[0]) * 2
    # Plain numbers: on so few, operations of tensors take longer than the crop.
    return torch.tensor([min(max(edge - start, 0.0), size) for edge, start in zip(box.tolist(), starts, strict=True)])


def seen_part(width: int, height: int, *, image_size: int, resize_size: int, keep_aspect_ratio: bool = False) -> Box:
    """The edges of what evaluation sees of a picture of width x height, in its own pixels."""
    H, W = loaded_shape(width, height, resize_size, keep_aspect_ratio)
    top, left = central_offset(H, W, image_size)
    x0, x1 = (edge * width / W for edge in (left, left + image_size))  # so the whole picture is it without rounding
    y0, y1 = (edge * height / H for edge in (top, top + image_size))
    return x0, y0, x1, y1


def cut_out(picture: Image.Image, part: Box) -> Image.Image:
    """Return a part of a picture, as many pixels as it has there; the whole is the picture itself."""
    if part == (0, 0, *picture.size):
        return picture
    size = (max(round(part[2] - part[0]), 1), max(round(part[3] - part[1]), 1))
    return picture.resize(size, Image.Resampling.BICUBIC, box=part)
