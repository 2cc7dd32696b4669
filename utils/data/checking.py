"""Looking for pictures that cannot be read, before a run begins."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from utils.data.decoding import decode, open_picture, refuse_above
from utils.data.errors import describe, is_shortage
from utils.data.pixels import Listed
from utils.data.threads import in_threads

# How files end; cameras and editors may write a little more behind it. To open WebP already checks the length.
END_MARKS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82", "WEBP": b""}
TAIL = 1024  # bytes
NEVER_WRITTEN = "its end was never written: there are only zeros"


def find_bad_pictures(
    entries: Sequence[Listed],
    *,
    thorough: bool,
    silent: bool = False,
    at_least: int | None = None,
    memory: float | None = None,
) -> dict[str, str]:
    """Look for pictures that `load_picture` would refuse, and for two kinds that show nothing though it loads them:
    those with a side below 2 pixels, and files whose end is filled up with zeros.

    Args:
        thorough: decode every picture. If not, of JPEG, PNG and WebP only the header and the last bytes are read;
            what ends otherwise than it should, and other formats, are decoded. This finds what was cut off, not
            damage inside; if so, the check sum of every chunk of a PNG is compared, too.
        at_least, memory: as of `load_picture`: what would take more memory is bad.
        silent: never show a bar; otherwise there is one on a terminal.

    Returns:
        Path -> what is wrong with it, in a few words, in the order of `entries`.

    Raises:
        OSError: this machine is short of memory or open files, which is no picture's fault.
    """
    paths = list(dict.fromkeys(str(entry.source) for entry in entries if not isinstance(entry.source, int)))
    Image.init()  # here, as Pillow does not guard its first use against several threads
    find = partial(find_fault, thorough=thorough, at_least=at_least, memory=memory)
    with contextlib.closing(in_threads(find, paths)) as reasons:  # an interruption does not wait for the rest
        bar = tqdm(reasons, desc="checking pictures", total=len(paths), leave=False, disable=True if silent else None)
        return {path: reason for path, reason in zip(paths, bar, strict=True) if reason is not None}


def find_fault(
    path: str, *, thorough: bool = False, at_least: int | None = None, memory: float | None = None
) -> str | None:
    """What is wrong with one picture, in a few words, or None. Raises OSError as `find_bad_pictures` does."""
    try:
        with open_picture(path) as image:
            (width, height), kind = image.size, image.format
            refuse_above(memory, image, at_least)
        if min(width, height) < 2:
            return f"only {width} x {height} pixels"
        ended = _ends_as_it_should(path, kind)
        if thorough or not ended:
            decode(path, at_least, memory)
        if thorough and kind == "PNG":
            with open_picture(path) as image, contextlib.suppress(OSError):  # a missing end is no damage to the pixels
                image.verify()
        if not ended and kind in END_MARKS and _is_filled_up(path, END_MARKS[kind]):
            return NEVER_WRITTEN
    except Exception as error:
        if is_shortage(error):
            raise
        return describe(error)
    return None


def ends_in_zeros(path: str) -> bool:
    """Whether zeros stand for the end of a file that is there and has a picture's header."""
    try:
        with open_picture(path) as image:
            kind = image.format
        return not _ends_as_it_should(path, kind) and kind in END_MARKS and _is_filled_up(path, END_MARKS[kind])
    except Exception:  # whoever decodes it says what is wrong
        return False


def _is_filled_up(path: str, mark: bytes) -> bool:
    """Whether zeros stand for the end, as an interrupted copy leaves it: decoders may take them for picture data."""
    content = Path(path).read_bytes()
    return content.endswith(bytes(TAIL)) and not content.rstrip(b"\0").endswith(mark)


def _ends_as_it_should(path: str, kind: str | None) -> bool:
    mark = END_MARKS.get(kind)
    if mark is None:
        return False
    with Path(path).open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
        return mark in file.read()
