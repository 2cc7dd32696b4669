"""From a picture file of any kind to upright RGB, with its box.

Boxes are (x0, y0, x1, y1), continuous edges in pixels. A change to this file has kept pictures decoded anew, see
`datasets.fingerprint`: what does not change a pixel lives elsewhere.
"""

from __future__ import annotations

import stat
import warnings
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from utils.data.errors import DataError, describe

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

# Pillow warns of pictures that `load_picture` refuses in a sentence of its own.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def load_picture(
    path: str | Path, box: Box | None = None, *, at_least: int | None = None
) -> tuple[Image.Image, Box | None]:
    """Load a picture file of any mode as upright RGB, with its box.

    Published boxes were drawn on the pixels as stored, by tools that did not heed EXIF orientation. So a box is taken
    as one of stored pixels, and is turned together with the picture.

    Args:
        at_least: a large JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, which is several times faster, while its
            sides keep so many pixels; the box is in pixels of what is returned. None: as stored.

    Raises:
        DataError: the file cannot be read as a picture.
    """
    try:
        picture, orientation, shrunk = decode(path, at_least)
    except Exception as error:  # on a broken file Pillow raises whatever it stumbles over
        raise _unreadable(path, error) from error
    if box is not None and shrunk > 1:
        box = tuple(edge / shrunk for edge in box)
    if orientation not in UPRIGHT:
        return picture, box
    return picture.transpose(UPRIGHT[orientation]), box and _turn_box(box, picture.size, orientation)


def read_size(path: str | Path) -> tuple[int, int]:
    """Read a picture's upright width and height out of its header. Raises DataError where it cannot be read."""
    try:
        with open_picture(path) as image:
            size, turned = image.size, _orientation(image) in (5, 6, 7, 8)
    except Exception as error:
        raise _unreadable(path, error) from error
    return size[::-1] if turned else size


def _unreadable(path: str | Path, error: Exception) -> DataError:
    return DataError(f"{path} cannot be read as a picture ({describe(error)}): replace it, or take it off the list")


def decode(path: str | Path, at_least: int | None = None) -> tuple[Image.Image, int, int]:
    """The picture as RGB, its EXIF orientation, and how many times smaller than stored it is. Raises anything."""
    with open_picture(path) as image:
        orientation, shrunk = _orientation(image), 1
        if at_least is not None and image.format == "JPEG":
            width, drafted = image.width, image.draft(None, (at_least, at_least))
            shrunk = round(width / drafted[1][2]) if drafted else 1
        return _to_rgb(image), orientation, shrunk


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
    pixels, limit = image.width * image.height, Image.MAX_IMAGE_PIXELS
    if limit is not None and pixels > limit:
        raise ValueError(f"{pixels} pixels, above the limit of {limit} against decompression bombs")
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
