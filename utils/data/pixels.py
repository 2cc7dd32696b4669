"""From what a data set lists to the pixels that are kept and trained on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from utils.data import decoding, demo_birds, demo_drawing, demo_species
from utils.data.decoding import Box, load_picture, read_size
from utils.data.demo_birds import DEMO_SIZE, draw_demo_picture
from utils.data.threads import in_threads

LONGEST = 4  # times the shorter side: a longer panorama is squeezed to it, as any length would not fit into memory


class Listed(Protocol):
    """What is read of a `utils.data.catalogue.Entry`.

    source: the file, or the number of a drawn picture of the demo set.
    box: the object's edges (x0, y0, x1, y1) in the pixels as the file stores them, or None where there is none.
    """

    source: Path | int
    box: Box | None


def loaded_shape(width: int, height: int, size: int, keep_aspect_ratio: bool = False) -> tuple[int, int]:
    """Height and width to which a picture is resized: size x size, or the shorter side to size as torchvision does."""
    if not keep_aspect_ratio:
        return size, size
    shorter, longer = sorted((width, height))
    longer = min(int(size * longer / shorter), LONGEST * size)
    return (longer, size) if height > width else (size, longer)


def shapes_of(entries: Sequence[Listed], size: int, keep_aspect_ratio: bool = False) -> list[tuple[int, int]]:
    """Heights and widths of what `load_pixels` gives. Raises DataError where a file's header cannot be read."""
    if not keep_aspect_ratio:
        return [(size, size)] * len(entries)
    return [loaded_shape(*stored, size, keep_aspect_ratio) for stored in in_threads(_stored_size, entries)]


def _stored_size(entry: Listed) -> tuple[int, int]:
    return (DEMO_SIZE, DEMO_SIZE) if isinstance(entry.source, int) else read_size(entry.source)


def load_pixels(entry: Listed, size: int, keep_aspect_ratio: bool = False) -> tuple[Tensor, Tensor | None]:
    """Load an entry's picture, resized as `loaded_shape` says: [3, H, W] uint8, and its box [4] in these pixels.

    Large JPEGs are decoded at a fraction of their size, twice `size` at the least, see `load_picture`: pixels then
    differ by less than one of 255 levels on average. Raises DataError where the file cannot be read.
    """
    if isinstance(entry.source, int):
        picture, box = draw_demo_picture(entry.source), entry.box
    else:
        picture, box = load_picture(entry.source, entry.box, at_least=2 * size)
    # What was decoded small has lost its exact shape.
    H, W = loaded_shape(*_stored_size(entry), size, keep_aspect_ratio) if keep_aspect_ratio else (size, size)
    if box is not None:
        scales, ends = (W / picture.width, H / picture.height) * 2, (W, H) * 2
        # Plain numbers: a few operations on so small a tensor would take as long as a tenth of the decoding.
        edges = zip(box, scales, ends, strict=True)
        box = torch.tensor([min(max(edge * scale, 0.0), end) for edge, scale, end in edges])
    # torchvision's resize is several times as fast as Pillow's on pixels in this order, and differs by rounding only.
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    return functional.resize(pixels, [H, W], antialias=True), box


def source_code(*, drawn: bool) -> bytes:
    """The code that `load_pixels` makes pixels with: decoding and resizing, and the drawing of the demo set's pictures
    if these are wanted. A change to any other file leaves pixels as they are.
    """
    drawing = (demo_birds, demo_drawing, demo_species) if drawn else ()
    files = [__file__, *(module.__file__ for module in (decoding, *drawing))]
    return b"".join(Path(file).read_bytes() for file in files)
