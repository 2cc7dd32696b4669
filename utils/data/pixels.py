"""From what a data set lists to the pixels that are kept and trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from utils.data import decoding, demo_birds, demo_drawing, demo_species
from utils.data.decoding import Box, load_picture
from utils.data.demo_birds import draw_demo_picture


class Listed(Protocol):
    """What is read of a `datasets.Entry`.

    source: the file, or the number of a drawn picture of the demo set.
    box: the object's edges (x0, y0, x1, y1) in the pixels as the file stores them, or None where there is none.
    """

    source: Path | int
    box: Box | None


def load_pixels(entry: Listed, size: int) -> tuple[Tensor, Tensor | None]:
    """Load an entry's picture, resized to size x size: [3, size, size] uint8, and its box [4] in these pixels.

    Large JPEGs are decoded at a fraction of their size, twice `size` at the least, see `load_picture`: pixels then
    differ by less than one of 255 levels on average. Raises DataError where the file cannot be read.
    """
    if isinstance(entry.source, int):
        picture, box = draw_demo_picture(entry.source), entry.box
    else:
        picture, box = load_picture(entry.source, entry.box, at_least=2 * size)
    if box is not None:
        scales = (size / picture.width, size / picture.height) * 2
        # Plain numbers: a few operations on so small a tensor would take as long as a tenth of the decoding.
        box = torch.tensor([min(max(edge * scale, 0.0), size) for edge, scale in zip(box, scales, strict=True)])
    # torchvision's resize is several times as fast as Pillow's on pixels in this order, and differs by rounding only.
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    return functional.resize(pixels, [size, size], antialias=True), box


def source_code(*, drawn: bool) -> bytes:
    """The code that `load_pixels` makes pixels with: decoding and resizing, and the drawing of the demo set's pictures
    if these are wanted. A change to any other file leaves pixels as they are.
    """
    drawing = (demo_birds, demo_drawing, demo_species) if drawn else ()
    files = [__file__, *(module.__file__ for module in (decoding, *drawing))]
    return b"".join(Path(file).read_bytes() for file in files)
