"""The demo set: drawn birds.

A picture is a function of its number. Everything in it is a filled outline; a bird is put together from strips, and its
marks are patches of them, see `demo_drawing`. The colours of plumage, light and surroundings are the same lottery for
every species.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image

from utils.data.decoding import Box
from utils.data.demo_drawing import CIRCLE, Part, bar, choose, disc, mix, paint, patch, point, rotate, strip
from utils.data.demo_species import BILLS, BLACK, GOLD, PLUMAGE, RED, SHAPES, SPECIES, WHITE, Species

DEMO_SIZE = 256  # pixels, width and height
DEMO_TRAIN, DEMO_TEST = 60, 20  # pictures per species

FOLIAGE = ((58, 92, 44), (98, 128, 58), (138, 146, 70), (40, 66, 52), (122, 98, 62), (164, 132, 70), (86, 70, 56))
SCENERY = (*FOLIAGE, (150, 176, 196), (188, 200, 200), (112, 140, 150), (196, 178, 140), (70, 78, 70))
BLOSSOM = (RED, GOLD, WHITE, BLACK, (120, 60, 130), (70, 110, 190))  # distractors: crown colours outside a bird


def _draw_tail(kind: str, length: float, width: float, root: np.ndarray, tilt: float, colour: np.ndarray) -> list[Part]:
    half = width / 2
    notch = {"notched": 0.86, "forked": 0.4, "tipped": 1.0}[kind]
    spread = {"notched": 1.3, "forked": 2.4, "tipped": 1.4}[kind]
    upper = np.array(((0.0, -half), (-length, -spread * half)))
    lower = np.array(((0.0, half), (-length, spread * half)))
    outline = np.array((upper[0], upper[1], (-length * notch, 0.0), lower[1], lower[0]))
    parts = [(rotate(outline, tilt) + root, colour)]
    if kind == "tipped":
        parts.append((rotate(patch(np.stack((upper, lower)), (0.68, 1)), tilt) + root, np.array(WHITE)))
    return parts


def _draw_body(body: np.ndarray, breast: str, base: np.ndarray) -> list[Part]:
    parts = [(patch(body), base), (patch(body, (0.02, 1), (0.55, 1)), mix(base, WHITE, 0.55))]
    mark = mix(base, BLACK, 0.75)
    if breast == "spotted":
        spots = [(along, across) for along in (0.5, 0.6, 0.7, 0.8, 0.9) for across in (0.64, 0.8, 0.94)]
        parts += [(disc(point(body, *spot), 0.048), mark) for spot in spots]
    elif breast == "banded":
        parts.append((patch(body, (0.7, 0.86), (0.2, 1)), mark))
    return parts


def _draw_head(centre: np.ndarray, radius: float, species: Species, base: np.ndarray) -> list[Part]:
    arc = CIRCLE[12::-1] * radius  # its lower half, from left to right
    head = np.stack((arc * (1, -1.04), arc)) + centre
    upper, lower = (np.array(curve) + centre + (0.82 * radius, 0.03) for curve in BILLS[species.bill])
    eye = centre + (0.4 * radius, -0.02)
    return [
        (patch(strip(upper, lower)), np.array((74, 62, 52))),
        (patch(strip((upper + lower) / 2, lower)), np.array((52, 44, 38))),
        (patch(head), base),
        (patch(head, (0.1, 0.92), (0.62, 1)), mix(base, WHITE, 0.4)),  # cheek
        (patch(head, (0.03, 0.92), (0, 0.4)), np.array(species.crown)),
        (disc(eye, 0.06), np.array(WHITE)),
        (disc(eye, 0.048), np.array(BLACK)),
        (disc(eye + (0.014, -0.016), 0.014), np.array(WHITE)),
    ]


def _draw_wing(body: np.ndarray, bars: int, base: np.ndarray) -> list[Part]:
    shoulder, tip = point(body, 0.72, 0.42), point(body, 0.0, 0.5) + (-0.12, 0.0)
    middle = (shoulder + tip) / 2
    wing = strip(
        (tip, middle + (0.0, -0.17), shoulder + (-0.06, -0.16), shoulder + (0.06, 0.0)),
        (tip + (0.02, 0.03), middle + (0.02, 0.19), shoulder + (-0.06, 0.17), shoulder + (0.06, 0.02)),
    )
    parts = [(patch(wing), mix(base, BLACK, 0.5)), (patch(wing, (0.55, 1)), mix(base, BLACK, 0.35))]
    parts += [(patch(wing, (0.04, 0.55), (edge, edge + 0.05)), mix(base, WHITE, 0.25)) for edge in (0.3, 0.62, 0.93)]
    parts += [(patch(wing, (start, start + 0.12)), np.array(WHITE)) for start in (0.48, 0.71)[:bars]]
    return parts


def _draw_bird(species: Species, generator: np.random.Generator) -> tuple[list[Part], np.ndarray]:
    """The bird's parts from back to front, in the units of `Shape`, and the point between its feet."""
    shape = SHAPES[species.shape]
    base = choose(PLUMAGE, generator)
    body = strip(shape.back, shape.belly)
    root, tilt = point(body, 0.0, 0.5) + (0.1, 0.0), generator.uniform(-10, 10)
    nod = generator.uniform(-0.03, 0.03, size=2)
    parts = [
        *_draw_tail(species.tail, *shape.tail, root, tilt, mix(base, BLACK, 0.5)),
        *_draw_body(body, species.breast, base),
        *_draw_head(np.array(shape.head[:2]) + nod, shape.head[2], species, base),
        *_draw_wing(body, species.wing_bars, base),
    ]
    pitch = -(shape.pitch + generator.uniform(-10, 10))
    parts = [(rotate(points, pitch), colour) for points, colour in parts]

    # The legs stand upright whatever the pitch, their upper ends hidden by the body.
    hips = rotate(np.stack((point(body, 0.42, 0.8), point(body, 0.54, 0.8))), pitch)
    ground = rotate(point(body, 0.48, 1.0), pitch) + (0.03, shape.legs)
    legs: list[Part] = []
    for hip, shift in zip(hips, (-0.07, 0.07), strict=True):
        foot = ground + (shift, 0.0)
        legs.append((bar(hip, foot, 0.05), np.array((84, 66, 52))))
        legs.append((bar(foot - (0.08, 0.0), foot + (0.12, 0.0), 0.05), np.array((84, 66, 52))))
    return legs + parts, ground


class Scene(NamedTuple):
    """A picture of the demo set before it is painted, in pixels."""

    bird: list[Part]
    feet: np.ndarray  # the point between them, [2]
    box: Box
    generator: np.random.Generator  # for everything but the bird


def demo_scene(number: int) -> Scene:
    """Put picture `number` together: all of it but what lies around the bird."""
    generator = np.random.default_rng((2011, number))
    bird, feet = _draw_bird(SPECIES[number // (DEMO_TRAIN + DEMO_TEST)], generator)
    # Pose: stretched a little, to either side, of any size and place at which all of it is in the picture
    stretch = generator.uniform(0.92, 1.08, size=2) * (generator.choice((-1, 1)), 1)
    outline = np.concatenate([points for points, _ in bird]) * stretch
    low, high = outline.min(axis=0), outline.max(axis=0)
    scale = generator.uniform(0.6, 0.9) * DEMO_SIZE / (high - low).max()
    corner = generator.uniform(2, DEMO_SIZE - 2 - scale * (high - low))
    bird = [((points * stretch - low) * scale + corner, colour) for points, colour in bird]
    feet = (feet * stretch - low) * scale + corner
    end = corner + scale * (high - low)
    return Scene(bird, feet, (*corner.tolist(), *end.tolist()), generator)


def _draw_surroundings(feet: np.ndarray, generator: np.random.Generator) -> list[Part]:
    """Leaves, berries, twigs, and the branch under the bird's feet."""
    parts: list[Part] = []
    for _ in range(generator.integers(2, 5)):
        start, end = generator.uniform(-0.1, 1.1, size=(2, 2)) * DEMO_SIZE
        parts.append((bar(start, end + 1, generator.uniform(2, 6)), choose(FOLIAGE[4:], generator, 0.3)))
    for _ in range(generator.integers(8, 17)):
        length = generator.uniform(20, 70)
        width = length * generator.uniform(0.12, 0.3)
        leaf = strip(((0, 0), (length / 2, -width), (length, 0)), ((0, 0), (length / 2, width), (length, 0)))
        angle, place = generator.uniform(0, 360), generator.uniform(0, DEMO_SIZE, size=2)
        colour = choose(FOLIAGE, generator, 0.35)
        parts.append((rotate(patch(leaf), angle) + place, colour))
        parts.append((rotate(patch(leaf, across=(0.5, 1)), angle) + place, colour * 0.84))
    for _ in range(generator.integers(0, 6)):
        place, radius = generator.uniform(0, DEMO_SIZE, size=2), generator.uniform(4, 11)
        colour = choose(BLOSSOM, generator, 0.1)
        parts.append((disc(place, radius), colour * 0.8))
        parts.append((disc(place - 0.2 * radius, 0.7 * radius), colour))
    thickness, slope = generator.uniform(5, 11), generator.uniform(-0.18, 0.18)
    x = np.array((-20, *np.sort(generator.uniform(20, DEMO_SIZE - 20, size=2)), DEMO_SIZE + 20))
    line = np.stack((x, feet[1] + slope * (x - feet[0]) + generator.uniform(-3, 3, size=4)), axis=1)
    line = np.insert(line, np.searchsorted(x, feet[0]), feet, axis=0)
    bark = choose(FOLIAGE[4:], generator, 0.3)
    branch = strip(line, line + (0, thickness))
    parts += [(patch(branch), bark), (patch(branch, across=(0.6, 1)), bark * 0.7)]
    return parts


def draw_demo_picture(number: int) -> Image.Image:
    """Draw picture `number` of the demo set, RGB, DEMO_SIZE x DEMO_SIZE."""
    scene = demo_scene(number)
    generator = scene.generator
    # Far behind, out of focus: a few colours in patches
    colours = np.array([choose(SCENERY, generator, 0.15) for _ in range(4)])
    patches = colours[generator.integers(4, size=(6, 6))] * generator.uniform(0.85, 1.15, size=(6, 6, 1))
    patches = Image.fromarray(patches.clip(0, 255).astype(np.uint8))
    picture = patches.resize((DEMO_SIZE, DEMO_SIZE), Image.Resampling.BICUBIC)
    paint(picture, _draw_surroundings(scene.feet, generator))
    paint(picture, scene.bird, light=np.array((generator.uniform(-0.7, 0.7), -1.0)))
    # Light of the day: brighter or darker, warmer or colder
    gains = generator.uniform(0.75, 1.1) * generator.uniform(0.92, 1.08, size=3)
    return picture.point(np.outer(gains, np.arange(256)).clip(0, 255).astype(int).ravel().tolist())
