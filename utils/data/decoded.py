"""Pictures kept decoded during a run, or from one to the next, and how it is known that they are still good."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path

import PIL
import torch
import torchvision
from torch import Tensor

from utils.data.catalogue import Entry
from utils.data.errors import DataError, describe
from utils.data.picture_cache import PictureCache, cache_in_memory, cache_on_disk
from utils.data.pixels import load_pixels, shapes_of, source_code
from utils.data.settings import DataSettings


def build_cache(settings: DataSettings, entries: list[Entry]) -> PictureCache | None:
    """Return the pictures decoded, if they are to be: in memory, or in a file below checkpoint_dir."""
    resizing = (settings.resize_size, settings.keep_aspect_ratio)

    def decode(row: int) -> tuple[Tensor, Tensor | None]:
        return load_pixels(entries[row], *resizing)

    sources = [entry.source for entry in entries]
    if settings.cache == "ram":
        return cache_in_memory(sources, shapes_of(entries, *resizing), decode)
    if settings.cache == "disk":
        name, digest = fingerprint(entries, *resizing)
        folder = Path(settings.checkpoint_dir).expanduser() / "cache"
        path = folder / f"{settings.dataset}-{name}.pictures"
        return cache_on_disk(path, digest, sources, partial(shapes_of, entries, *resizing), decode)
    return None


def fingerprint(entries: Sequence[Entry], size: int, keep_aspect_ratio: bool = False) -> tuple[str, bytes]:
    """A name for this list of pictures at this size, and the SHA-256 of all that their pixels and boxes depend on.

    The list, its boxes and the size decide the name. The SHA-256 is of these, the files' sizes and times, the versions
    of Pillow, PyTorch and torchvision, and the code that makes pixels, see `utils.data.pixels.source_code`. No other
    code counts: a reader of lists, a sampler or this file may change, and decoded pictures that were kept stay good.

    Raises DataError where a file has vanished.
    """
    versions = (PIL.__version__, torch.__version__, torchvision.__version__)
    resized = f"{size}aspect" if keep_aspect_ratio else f"{size}"
    name, content = sha256(resized.encode()), sha256(repr(versions).encode())
    content.update(source_code(drawn=any(isinstance(entry.source, int) for entry in entries)))
    for source, _, box in entries:
        name.update(repr((str(source), box)).encode())
        if isinstance(source, Path):
            try:
                status = source.stat()
            except OSError as error:
                raise DataError(f"{source} cannot be read as a picture ({describe(error)}): restore it") from None
            content.update(repr((status.st_size, status.st_mtime_ns)).encode())
    content.update(name.digest())
    return f"{resized}-{name.hexdigest()[:12]}", content.digest()
