"""The species of the demo set: their shapes, marks and colours.

The colours of plumage are the same lottery for every species, so that only marks and shapes set species apart.
"""

from __future__ import annotations

from typing import NamedTuple

from utils.data.demo_drawing import Colour

RED, GOLD, BLACK, WHITE = (200, 34, 36), (242, 194, 32), (26, 24, 28), (244, 240, 228)
# Plumage is drawn from these for every species.
PLUMAGE = ((134, 100, 66), (120, 124, 132), (116, 122, 74), (90, 102, 130), (158, 128, 100), (104, 84, 72))


class Species(NamedTuple):
    """A class of the demo set: one of few shapes, and marks each of which it shares with another species."""

    name: str
    shape: str
    crown: Colour
    bill: str
    wing_bars: int
    tail: str
    breast: str


SPECIES = (
    Species("Red-crowned Reedling", "finch", RED, "cone", 0, "notched", "plain"),
    Species("Red-crowned Ladderwing", "finch", RED, "cone", 2, "notched", "plain"),
    Species("Golden-crowned Reedling", "finch", GOLD, "cone", 0, "notched", "plain"),
    Species("Golden-crowned Ladderwing", "finch", GOLD, "cone", 2, "notched", "plain"),
    Species("Plain Sicklebill", "wader", RED, "curved", 0, "notched", "plain"),
    Species("Spotted Sicklebill", "wader", GOLD, "curved", 0, "notched", "spotted"),
    Species("Spotted Strider", "wader", GOLD, "straight", 0, "notched", "spotted"),
    Species("Banded Forktail", "slender", BLACK, "cone", 0, "forked", "banded"),
    Species("Plain Forktail", "slender", BLACK, "cone", 0, "forked", "plain"),
    Species("Banded Streamer", "slender", BLACK, "cone", 0, "tipped", "banded"),
)


class Shape(NamedTuple):
    """A bird that faces right, in units of about its body's length; y points down."""

    back: tuple[tuple[float, float], ...]  # from the tail to the nape
    belly: tuple[tuple[float, float], ...]  # from the tail to the throat
    head: tuple[float, float, float]  # centre and radius
    tail: tuple[float, float]  # length and width
    legs: float  # length
    pitch: float  # degrees by which the head is raised


SHAPES = {
    "finch": Shape(
        back=((-0.64, 0.0), (-0.34, -0.26), (0.1, -0.44), (0.4, -0.68)),
        belly=((-0.64, 0.14), (-0.3, 0.38), (0.16, 0.44), (0.54, 0.2), (0.7, -0.36)),
        head=(0.49, -0.5, 0.28),
        tail=(0.55, 0.22),
        legs=0.26,
        pitch=10,
    ),
    "wader": Shape(
        back=((-0.72, -0.04), (-0.3, -0.32), (0.2, -0.36), (0.46, -0.52), (0.54, -0.84)),
        belly=((-0.72, 0.08), (-0.3, 0.3), (0.2, 0.32), (0.6, -0.02), (0.76, -0.62)),
        head=(0.67, -0.78, 0.22),
        tail=(0.3, 0.22),
        legs=0.56,
        pitch=2,
    ),
    "slender": Shape(
        back=((-0.66, -0.02), (-0.3, -0.22), (0.15, -0.32), (0.52, -0.46)),
        belly=((-0.66, 0.1), (-0.3, 0.27), (0.15, 0.32), (0.54, 0.14), (0.76, -0.14)),
        head=(0.6, -0.28, 0.24),
        tail=(0.74, 0.2),
        legs=0.26,
        pitch=36,
    ),
}

# Upper and lower curve of a bill, from its root at the face to its tip
BILLS = {
    "cone": (((0.0, -0.11), (0.13, -0.07), (0.24, 0.03)), ((0.0, 0.12), (0.11, 0.1), (0.24, 0.03))),
    "straight": (((0.0, -0.07), (0.28, -0.04), (0.56, 0.02)), ((0.0, 0.07), (0.28, 0.05), (0.56, 0.04))),
    "curved": (((0.0, -0.07), (0.32, 0.0), (0.5, 0.34)), ((0.0, 0.07), (0.26, 0.11), (0.46, 0.36))),
}
