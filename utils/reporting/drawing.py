"""What the pictures are drawn with: colours, boxes, masks, evidence and text."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Sequence

import numpy
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor

Colour = tuple[int, int, int]

PAPER: Colour = (255, 255, 255)
INK: Colour = (45, 45, 45)
SHADOW: Colour = (20, 20, 20)
PREDICTED_BOX: Colour = (255, 176, 0)
TRUE_BOX: Colour = (0, 210, 255)
MASK_OUTLINE: Colour = (235, 235, 235)
RIGHT: Colour = (0, 128, 60)
WRONG: Colour = (200, 30, 30)
# seven colours that stay apart for colour-blind readers (Okabe and Ito, "Color Universal Design", 2008, lightened)
WINDOWS: tuple[Colour, ...] = (
    (240, 228, 66),
    (86, 180, 233),
    (255, 130, 50),
    (60, 210, 150),
    (225, 140, 190),
    (170, 120, 255),
    (245, 245, 245),
)
TRACK: Colour = (232, 232, 232)  # the empty part of a bar
# from little evidence to much: dark red, orange, light yellow; brightness alone tells it, too
HEAT: tuple[tuple[float, Colour], ...] = (
    (0.0, (60, 0, 20)),
    (0.4, (190, 30, 20)),
    (0.7, (255, 150, 0)),
    (1.0, (255, 250, 170)),
)
LONGEST = 1000  # letters of a name that are looked at: no picture has room for more
DIMMED = 0.4  # brightness left outside the mask


def to_pillow(image: Tensor) -> Image.Image:
    return Image.fromarray(image.detach().cpu().permute(1, 2, 0).contiguous().numpy())


def fit_into(edges: Tensor, tile: Image.Image) -> tuple[int, int, int, int]:
    """A box with continuous edges in tile pixels -> its first and last pixels, inside the tile."""
    limits = (tile.width, tile.height)
    x0, y0, x1, y1 = edges.nan_to_num().round().long().tolist()
    left, top = (min(max(first, 0), limit - 1) for first, limit in zip((x0, y0), limits, strict=True))
    right, bottom = (min(last, limit) - 1 for last, limit in zip((x1, y1), limits, strict=True))
    return left, top, max(left, right), max(top, bottom)


def draw_box(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], colour: Colour) -> None:
    """A frame whose outer line is the box's own border pixels, with a dark line round it for bright backgrounds."""
    left, top, right, bottom = box
    draw.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline=SHADOW)
    draw.rectangle(box, outline=colour, width=3)


def draw_dashed_box(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], colour: Colour) -> None:
    left, top, right, bottom = box
    draw.rectangle(box, outline=SHADOW, width=2)
    dash, step = 9, 14
    for start in range(left, right + 1, step):
        end = min(start + dash - 1, right)
        draw.rectangle((start, top, end, min(top + 1, bottom)), fill=colour)
        draw.rectangle((start, max(bottom - 1, top), end, bottom), fill=colour)
    for start in range(top, bottom + 1, step):
        end = min(start + dash - 1, bottom)
        draw.rectangle((left, start, min(left + 1, right), end), fill=colour)
        draw.rectangle((max(right - 1, left), start, right, end), fill=colour)


def draw_numbered_boxes(tile: Image.Image, corners: Sequence[tuple[int, int, int, int]]) -> None:
    draw = ImageDraw.Draw(tile)
    # windows lie on a grid and share lines: no dark line may cross a coloured one, no large window cover a small one
    for left, top, right, bottom in corners:
        draw.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline=SHADOW)
    areas = [(right - left) * (bottom - top) for left, top, right, bottom in corners]
    for number in sorted(range(len(corners)), key=areas.__getitem__, reverse=True):
        draw.rectangle(corners[number], outline=WINDOWS[number % len(WINDOWS)], width=2)
    # numbers last, so that no box crosses them
    taken: set[tuple[int, int]] = set()
    for number, (left, top, _, _) in enumerate(corners):
        side = max(12, tile.height // 16)
        left, top = min(left, tile.width - side), min(top, tile.height - side)
        step = side if left < tile.width / 2 else -side  # windows with the same corner: one label beside the other
        while any(abs(left - x) < side and abs(top - y) < side for x, y in taken):
            left += step
        taken.add((left, top))
        square = (left, top, left + side - 1, top + side - 1)
        draw.rectangle(square, fill=WINDOWS[number % len(WINDOWS)], outline=SHADOW)
        centre = (left + side / 2, top + side / 2)
        draw.text(centre, str(number + 1), fill=SHADOW, font=load_font(side - 4), anchor="mm")


def dim_outside(tile: Image.Image, mask: Tensor) -> Image.Image:
    """Darken what the mask leaves out and draw its border there, so that every kept pixel stays as it is."""
    pixels = numpy.array(tile)
    rows = torch.arange(tile.height) * mask.shape[0] // tile.height
    columns = torch.arange(tile.width) * mask.shape[1] // tile.width
    kept = mask.bool()[rows][:, columns].numpy()
    pixels[~kept] = (pixels[~kept] * DIMMED).astype(numpy.uint8)
    border = numpy.pad(kept, 1)
    near = border[:-2, 1:-1] | border[2:, 1:-1] | border[1:-1, :-2] | border[1:-1, 2:]
    pixels[near & ~kept] = MASK_OUTLINE
    return Image.fromarray(pixels)


def heated(picture: Image.Image, evidence: Tensor) -> Image.Image:
    """The picture in grey, with the evidence [g, g] glowing over it; its highest value is the brightest."""
    strength = (evidence / evidence.amax().clamp(min=torch.finfo(torch.float32).tiny)).float()
    heat = Image.fromarray((strength * 255).round().to(torch.uint8).numpy())
    heat = heat.resize(picture.size, Image.Resampling.BICUBIC)
    # where two boxes end it jumps, which the eye would take for something in the picture
    heat = numpy.asarray(heat.filter(ImageFilter.GaussianBlur(picture.height / 50)), dtype=numpy.float32) / 255
    stops, colours = zip(*HEAT, strict=True)
    glow = numpy.stack([numpy.interp(heat, stops, channel) for channel in zip(*colours, strict=True)], axis=-1)
    grey = numpy.asarray(picture.convert("L"), dtype=numpy.float32)[..., None].repeat(3, axis=-1)
    share = numpy.clip(heat * 1.5, 0, 0.75)[..., None]
    return Image.fromarray((grey * (1 - share) + glow * share).round().clip(0, 255).astype(numpy.uint8))


def shortened(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """The text, or as much of its beginning as fits into a width in pixels, with an ellipsis."""
    text = text[:LONGEST]
    if font.getlength(text) <= width:
        return text
    length = bisect.bisect_right(range(len(text)), width, key=lambda n: font.getlength(text[:n] + "...")) - 1
    return text[: max(length, 0)].rstrip() + "..."


@functools.cache
def load_font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)
