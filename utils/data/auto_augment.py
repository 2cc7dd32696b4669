"""One or two operations out of fourteen, drawn for a training picture: TrivialAugment and RandAugment.

Müller & Hutter, "TrivialAugment: Tuning-free Yet State-of-the-Art Data Augmentation", ICCV 2021 (section 3, the wide
space); Cubuk et al., "RandAugment: Practical automated data augmentation with a reduced search space", 2019 (two
operations of magnitude 9). Operations and ranges are those of torchvision's classes, but that pictures are moved by a
share of their side, not by pixels; boxes, which those classes refuse, follow. Unlike other augmentation it happens
where pictures are loaded: by Pillow, as what is done differs from one to the next.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import BoundingBoxes

GEOMETRIC = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
SIGNED = (*GEOMETRIC, "brightness", "saturation", "contrast", "sharpness")
OPERATIONS = ("identity", *SIGNED, "posterize", "solarize", "autocontrast", "equalize")
BINS = 30  # a magnitude is a whole number up to this


class Policy(NamedTuple):
    """How many operations, of which magnitude (None: drawn for each), and what the largest magnitude does.

    shear: tangent of the angle. translation: share of the side. rotation: degrees. factor: by how much the factor of
    brightness, saturation, contrast and sharpness differs from 1. bits: so many fewer of each colour's eight.
    """

    operations: int
    magnitude: int | None
    shear: float
    translation: float
    rotation: float
    factor: float
    bits: int


POLICIES = {
    "trivialaugment": Policy(1, None, 0.99, 32 / 224, 135.0, 0.99, 6),
    "randaugment": Policy(2, 9, 0.3, 150 / 331, 30.0, 0.9, 4),
}


class Operation(NamedTuple):
    name: str  # of `OPERATIONS`
    amount: float  # in the unit of its `Policy`; of solarize the threshold, a share of white; 0 where it has none


def draw_operations(policy: str, generator: np.random.Generator) -> list[Operation]:
    """Draw what is done to a picture, one after the other, by a policy of `POLICIES`; "none": nothing, undrawn."""
    if policy == "none":
        return []
    chosen = POLICIES[policy]
    return [_draw(chosen, generator) for _ in range(chosen.operations)]


def _draw(policy: Policy, generator: np.random.Generator) -> Operation:
    name = OPERATIONS[generator.integers(len(OPERATIONS))]
    magnitude = generator.integers(BINS + 1) if policy.magnitude is None else policy.magnitude
    share = float(magnitude) / BINS
    sign = -1.0 if generator.random() < 0.5 else 1.0
    if name == "posterize":
        return Operation(name, float(round(policy.bits * share)))
    if name == "solarize":
        return Operation(name, 1 - share)
    if name not in SIGNED:
        return Operation(name, 0.0)
    kind = name.split("_")[0]
    kinds = {"shear": policy.shear, "translate": policy.translation, "rotate": policy.rotation}
    return Operation(name, sign * share * kinds.get(kind, policy.factor))


def transformed(image: Tensor, operations: Sequence[Operation]) -> Tensor:
    """The image [3, S, S] uint8, its values pixel by pixel in memory, after these operations; the same in memory.

    What comes in from outside the picture is black, as in torchvision.
    """
    operations = [operation for operation in operations if operation.name != "identity"]
    if not operations:
        return image
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    for name, amount in operations:
        picture = _apply(picture, name, amount)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _apply(picture: Image.Image, name: str, amount: float) -> Image.Image:
    if name in GEOMETRIC:
        geometry = _geometry(name, amount, picture.width)
        return F.affine(picture, **geometry, interpolation=InterpolationMode.BILINEAR)
    if name == "posterize":
        return F.posterize(picture, bits=8 - int(amount))
    if name == "solarize":
        return F.solarize(picture, threshold=255 * amount)
    if name in ("autocontrast", "equalize"):
        return getattr(F, name)(picture)
    return getattr(F, f"adjust_{name}")(picture, 1 + amount)


def carried(box: Tensor, operations: Sequence[Operation], size: int) -> Tensor:
    """The box [4] round the box [4], edges in pixels of the picture of size x size, after these operations.

    It is cut at the picture's edges, and has no area where none of it is left, or none was.
    """
    for name, amount in operations:
        if name in GEOMETRIC and (box[:2] < box[2:]).all():
            edges = BoundingBoxes(box[None], format="XYXY", canvas_size=(size, size))
            box = F.affine(edges, **_geometry(name, amount, size)).as_subclass(Tensor)[0].clamp(0, size)
    return box


def _geometry(name: str, amount: float, size: int) -> dict[str, object]:
    """Return what `affine` is called with."""
    kind, _, axis = name.partition("_")
    shift = int(amount * size) if kind == "translate" else 0
    lean = math.degrees(math.atan(amount)) if kind == "shear" else 0.0
    return {
        "angle": amount if kind == "rotate" else 0.0,
        "translate": [shift, 0] if axis == "x" else [0, shift],
        "scale": 1.0,
        "shear": [lean, 0.0] if axis == "x" else [0.0, lean],
        "center": [0, 0] if kind == "shear" else None,  # the corner stays, as in the published operation
    }
