"""From a picture file of any kind to upright RGB, with its box.

Boxes are (x0, y0, x1, y1), continuous edges in pixels. A change to this file has kept pictures decoded anew, see
`utils.data.decoded.fingerprint`: what does not change a pixel lives elsewhere.
"""

from __future__ import annotations

import stat
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image

from utils.data.errors import DataError, describe, is_shortage

Box = tuple[float, float, float, float]

# EXIF orientation -> what turns the stored picture upright
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

BYTES_PER_PIXEL = 4  # of Pillow's, whatever the mode is, roughly
MEMORY = 0.36  # GB that one decoded picture may take: Pillow's own limit, in memory
SMALLER = (2, 4, 8)  # times that a JPEG can be decoded smaller
DRAWN_AT_LEAST = 1024  # pixels of a side that a drawing has a use for
Image.MAX_IMAGE_PIXELS = None  # it would refuse what can be decoded smaller; `refuse_above` is in its place


_limit = MEMORY * 1e9


def limit_memory(gigabytes: float) -> None:
    """Set how much memory one decoded picture may take, in this process."""
    global _limit
    _limit = gigabytes * 1e9


class Decoded(NamedTuple):
    """picture: RGB. orientation: EXIF's. turned: it is upright already. shrunk: so many times smaller than stored."""

    picture: Image.Image
    orientation: int
    turned: bool
    shrunk: int


def load_picture(
    path: str | Path, box: Box | None = None, *, at_least: int | None = None, memory: float | None = None
) -> tuple[Image.Image, Box | None]:
    """Load a picture file of any mode as upright RGB, with its box.

    Published boxes were drawn on the pixels as stored, by tools that did not heed EXIF orientation. So a box is taken
    as one of stored pixels, and is turned together with the picture.

    Args:
        at_least: a large JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, which is several times faster, while its
            sides keep so many pixels; the box is in pixels of what is returned. None: as stored.
        memory: bytes that the decoded picture may take. A JPEG that would take more is decoded smaller. None: those
            that `limit_memory` has set.

    Raises:
        DataError: the file cannot be read as a picture.
    """
    try:
        picture, orientation, turned, shrunk = decode(path, at_least, memory)
    except Exception as error:  # on a broken file Pillow raises whatever it stumbles over
        raise _unreadable(path, error) from error
    if box is not None and shrunk > 1:
        box = tuple(edge / shrunk for edge in box)
    if orientation not in UPRIGHT:
        return picture, box
    if turned:
        stored = picture.size[::-1] if orientation in (5, 6, 7, 8) else picture.size
        return picture, box and _turn_box(box, stored, orientation)
    return picture.transpose(UPRIGHT[orientation]), box and _turn_box(box, picture.size, orientation)


def read_size(path: str | Path) -> tuple[int, int]:
    """Read a picture's upright width and height out of its header. Raises DataError where it cannot be read."""
    try:
        with open_picture(path) as image:
            (width, height), turned = stored_size(image), _orientation(image) in (5, 6, 7, 8)
    except Exception as error:
        raise _unreadable(path, error) from error
    return (height, width) if turned else (width, height)


def stored_size(image: Image.Image) -> tuple[int, int]:
    """Width and height as the file stores them; of a TIFF, Pillow may say those after its turn."""
    tags = getattr(image, "tag_v2", None) or {}
    return tags.get(256, image.width), tags.get(257, image.height)


def _unreadable(path: str | Path, error: Exception) -> DataError:
    if is_shortage(error):
        return DataError(f"{path} cannot be read now ({describe(error)}): lower workers, or free memory or open files")
    return DataError(f"{path} cannot be read as a picture ({describe(error)}): replace it, or leave it out")


def decode(path: str | Path, at_least: int | None = None, memory: float | None = None) -> Decoded:
    """The picture as RGB; a JPEG perhaps smaller, see `load_picture`. Raises anything."""
    with open_picture(path) as image:
        orientation = _orientation(image)
        shrunk = refuse_above(memory, image, at_least)
        picture = _to_rgb(image)
        return Decoded(picture, orientation, orientation in UPRIGHT and _orientation(image) == 1, shrunk)


def refuse_above(memory: float | None, image: Image.Image, at_least: int | None = None) -> int:
    """Let a JPEG be decoded as small as it may and has to be; return how many times smaller. Raises ValueError for a
    picture that takes more memory all the same.
    """
    memory, times = _limit if memory is None else memory, 1
    if at_least is not None and image.format == "JPEG":
        times = max((n for n in SMALLER if min(image.size) // n >= at_least), default=1)
    if image.format in ("JPEG", "MPO"):
        times = max(times, next((n for n in (1, *SMALLER) if bytes_of(image) <= memory * n * n), SMALLER[-1]))
    shrunk = 1
    if times > 1:  # said to Pillow once: it does not heed a second wish
        shrunk = _draft(image, (image.width // times, image.height // times))
    if bytes_of(image) > memory:
        pixels = image.width * image.height
        raise ValueError(
            f"{pixels} pixels, which take {bytes_of(image) / 1e9:.2g} GB, above the limit of {memory / 1e9:g} in "
            "picture_memory"
        )
    return shrunk


def _draft(image: Image.Image, size: tuple[int, int]) -> int:
    """Let a JPEG be decoded at 1/2, 1/4 or 1/8, with sides of `size` or more; return how many times smaller."""
    width, drafted = image.width, image.draft(None, size)
    return round(width / drafted[1][2]) if drafted else 1


def bytes_of(image: Image.Image) -> int:
    return image.width * image.height * BYTES_PER_PIXEL


def open_picture(path: str | Path) -> Image.Image:
    """Read a picture's header, and refuse what should not be decoded. Raises anything."""
    status = Path(path).stat()
    if not stat.S_ISREG(status.st_mode):  # to open a pipe would wait for ever
        raise ValueError("it is a folder" if stat.S_ISDIR(status.st_mode) else "it is not a file")
    if status.st_size == 0:
        raise ValueError("the file is empty")
    image = Image.open(path)
    try:
        _check_header(image)
    except ValueError:
        image.close()
        raise
    return image


def _check_header(image: Image.Image) -> None:
    if image.format == "EPS":
        raise ValueError("it is PostScript, which is a program to be run")
    if image.mode == "F":
        raise ValueError("pixels are floating-point numbers, of which nothing says what is white")


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # whatever is wrong with the tags, the picture can be read without them
        return 1


def _turn_box(box: Box, size: tuple[int, int], orientation: int) -> Box:
    """The box after the turn `UPRIGHT[orientation]` of a picture of `size` (width, height)."""
    (x0, y0, x1, y1), (width, height) = box, size
    if orientation in (5, 6, 7, 8):
        x0, y0, x1, y1, width, height = y0, x0, y1, x1, height, width
    if orientation in (2, 3, 6, 7):
        x0, x1 = width - x1, width - x0
    if orientation in (3, 4, 7, 8):
        y0, y1 = height - y1, height - y0
    return x0, y0, x1, y1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit gray: Pillow's own conversion clips it at 255
        gray = np.asarray(image).astype(np.float32).clip(0, 65535) / 257
        image = Image.fromarray(gray.round().astype(np.uint8))
    if image.has_transparency_data:
        # On white, as on the page that a cut-out is made for; the colours under transparent pixels are arbitrary.
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode != "RGB":
        return image.convert("RGB")
    image.load()
    return image
