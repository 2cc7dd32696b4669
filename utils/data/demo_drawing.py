"""Filled outlines: the curves, strips and patches that the demo birds are drawn of, and how they are painted.

A part between two curves that run alongside is a strip, and marks are patches of a strip: a wing bar is the piece of
the wing from 48 to 60 % of its length. Points are (x, y), y points down.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SUPERSAMPLING = 3  # outlines are drawn this much larger and then averaged down

STEPS = np.linspace(0, 1, 21)
CIRCLE = np.stack((np.cos(2 * np.pi * np.arange(24) / 24), np.sin(2 * np.pi * np.arange(24) / 24)), axis=1)

Colour = tuple[int, int, int]
Part = tuple[np.ndarray, np.ndarray]  # an outline [n, 2] and its colour [3]


@cache
def _curve_weights(knots: int) -> np.ndarray:
    """What each knot adds to the points of a curve through them (Catmull-Rom), [25, knots]."""
    points = np.eye(knots)
    padded = np.concatenate((2 * points[:1] - points[1:2], points, 2 * points[-1:] - points[-2:-1]))
    place = np.linspace(0, knots - 1, 25)
    segment = np.minimum(place.astype(int), knots - 2)
    t = (place - segment)[:, None]
    a, b, c, d = (padded[segment + offset] for offset in range(4))
    return 0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)


def curve(knots: Sequence[Sequence[float]]) -> np.ndarray:
    """A smooth curve through the knots, [25, 2]."""
    return _curve_weights(len(knots)) @ np.asarray(knots, dtype=float)


def strip(upper: Sequence[Sequence[float]], lower: Sequence[Sequence[float]]) -> np.ndarray:
    """A part between two curves that run alongside, [2, 25, 2]."""
    return np.stack((curve(upper), curve(lower)))


def patch(strip: np.ndarray, along: tuple[float, float] = (0, 1), across: tuple[float, float] = (0, 1)) -> np.ndarray:
    """The outline of a piece of a strip: fractions of its length, and of its width from the upper curve on."""
    place = (along[0] + (along[1] - along[0]) * STEPS) * (strip.shape[1] - 1)
    before = np.minimum(place.astype(int), strip.shape[1] - 2)
    upper, lower = strip[:, before] + (place - before)[:, None] * (strip[:, before + 1] - strip[:, before])
    width = lower - upper
    return np.concatenate((upper + across[0] * width, (upper + across[1] * width)[::-1]))


def point(strip: np.ndarray, along: float, across: float) -> np.ndarray:
    """A point [2] of a strip: fractions of its length, and of its width from the upper curve on."""
    return patch(strip, (along, along), (across, across))[0]


def disc(centre: Sequence[float], radius: float) -> np.ndarray:
    """The outline [24, 2] of a disc."""
    return np.asarray(centre) + radius * CIRCLE


def bar(start: np.ndarray, end: np.ndarray, width: float) -> np.ndarray:
    """The outline [4, 2] of a straight bar."""
    across = (end - start)[::-1] * (-1, 1) * (width / 2 / np.hypot(*(end - start)))
    return np.stack((start - across, end - across, end + across, start + across))


def rotate(points: np.ndarray, degrees: float) -> np.ndarray:
    """Clockwise to the eye, as y points down."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return points @ np.array(((cos, sin), (-sin, cos)))


def mix(first: Sequence[float], second: Sequence[float], share: float) -> np.ndarray:
    """A colour [3] between two, with that share of the second."""
    return np.asarray(first) * (1 - share) + np.asarray(second) * share


def choose(colours: Sequence[Colour], generator: np.random.Generator, spread: float = 0.2) -> np.ndarray:
    """One of the colours [3], somewhat lighter or darker."""
    return np.asarray(colours[generator.integers(len(colours))]) * generator.uniform(1 - spread, 1 + spread)


def paint(picture: Image.Image, parts: Sequence[Part], light: np.ndarray | None = None) -> None:
    """Paint parts onto the picture without jagged edges; `light` [2]: where light comes from, to round them off."""
    points = np.concatenate([outline for outline, _ in parts])
    x0, y0 = np.clip(np.floor(points.min(axis=0)).astype(int) - 1, 0, picture.size).tolist()
    x1, y1 = np.clip(np.ceil(points.max(axis=0)).astype(int) + 1, 0, picture.size).tolist()
    size = ((x1 - x0) * SUPERSAMPLING, (y1 - y0) * SUPERSAMPLING)
    # The ground colour shows through at the edges.
    ground = tuple(np.mean([colour for _, colour in parts], axis=0).astype(int).tolist())
    layer, mask = Image.new("RGB", size, ground), Image.new("L", size)
    draw, draw_mask = ImageDraw.Draw(layer), ImageDraw.Draw(mask)
    for outline, colour in parts:
        flat = ((outline - (x0, y0)) * SUPERSAMPLING - 0.5).ravel().tolist()
        draw.polygon(flat, fill=tuple(np.clip(colour, 0, 255).astype(int).tolist()))
        draw_mask.polygon(flat, fill=255)
    layer, mask = layer.reduce(SUPERSAMPLING), mask.reduce(SUPERSAMPLING)
    if light is not None:
        layer = _round_off(layer, mask, light)
    picture.paste(layer, (x0, y0), mask)


def _round_off(layer: Image.Image, mask: Image.Image, light: np.ndarray) -> Image.Image:
    """Shade the masked figure as if it were round: bright where its blurred outline falls off towards the light."""
    coarse = mask.reduce(4).filter(ImageFilter.BoxBlur(4)).filter(ImageFilter.BoxBlur(4))
    slope_y, slope_x = np.gradient(np.asarray(coarse, dtype=np.float32) / 255)
    shade = Image.fromarray(1 - 5.0 * (slope_x * light[0] + slope_y * light[1]))
    shade = np.asarray(shade.resize(layer.size, Image.Resampling.BILINEAR)).clip(0.45, 1.5)
    return Image.fromarray((np.asarray(layer) * shade[..., None]).clip(0, 255).astype(np.uint8))
