"""Decoded pictures kept in memory or in one file, so that an epoch reads no JPEG any more.

All are decoded once, before training, in threads; the processes that load pictures then only read. In memory they
share the pages of the process that made them. On disk there is a file that every process maps, those of other runs
on the same pictures, too:

    32 bytes        SHA-256 of all that the pixels depend on, see `utils.data.decoded.fingerprint`
    n x 8           heights and widths, int32
    n x 16          boxes, float32 (x0, y0, x1, y1); NaN where there is none
    n x 4           CRC-32 of each picture's pixels, uint32: looked at whenever a picture is read
    n x H x W x 3   pixels, uint8, picture by picture

It gets its name when it is whole and on the disk, so a builder that was killed leaves nothing that another would take
for a cache. Of several processes that want the same one, the first builds it and the others wait.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import warnings
import zlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, multiprocessing
from tqdm import tqdm

from utils.data.errors import LoadingError
from utils.data.threads import in_threads
from utils.files import sync_folder
from utils.training.distributed import bar_disabled

try:
    import fcntl
except ImportError:  # Windows: processes that start at the same time each build the file, and the last one's stays
    fcntl = None

DECODED_AT_ONCE = 256  # so many wait for the disk at most
DIGEST_BYTES, SHAPE_BYTES, BOX_BYTES, CHECKSUM_BYTES = 32, 8, 16, 4
Shape = tuple[int, int]  # height and width
Decode = Callable[[int], tuple[Tensor, Tensor | None]]


class CacheError(LoadingError):
    """The cache cannot be had, said in one sentence."""


class PictureCache(Mapping[Hashable, tuple[Tensor, Tensor | None]]):
    """key -> (image [3, H, W] uint8, box [4] float32 or None), out of all pixels in a row and boxes [n, 4].

    path: the file that the pixels are mapped from, or None: another process that gets this object maps it anew.
    checksums: CRC-32 of each picture's pixels in that file. Raises CacheError for a picture that is not as it says.
    """

    def __init__(
        self,
        keys: Sequence[Hashable],
        shapes: Sequence[Shape],
        pixels: Tensor,
        boxes: Tensor,
        path: Path | None = None,
        checksums: Sequence[int] | None = None,
    ) -> None:
        self.checksums = checksums
        self.rows = {key: row for row, key in enumerate(keys)}
        self.shapes, self.pixels, self.boxes, self.path = list(shapes), pixels, boxes, path
        self.starts = [0, *accumulate(3 * height * width for height, width in shapes)]

    def __getitem__(self, key: Hashable) -> tuple[Tensor, Tensor | None]:
        row = self.rows[key]
        box = self.boxes[row]
        if self.checksums is not None and zlib.crc32(self._pixels(row).numpy()) != self.checksums[row]:
            raise CacheError(f"{self.path} is damaged, it is not what was written there: remove it, and start again")
        return self.image(row), None if box[0].isnan() else box

    def image(self, row: int) -> Tensor:
        """Return a view of the pixels of a picture, [3, H, W]."""
        return self._pixels(row).view(*self.shapes[row], 3).permute(2, 0, 1)

    def _pixels(self, row: int) -> Tensor:
        return self.pixels[self.starts[row] : self.starts[row + 1]]

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __reduce__(self) -> tuple:
        keys = list(self.rows)
        if self.path is None:
            return PictureCache, (keys, self.shapes, self.pixels, self.boxes)
        return map_pictures, (self.path, keys)


def bytes_needed(shapes: Sequence[Shape]) -> int:
    """Return the bytes of pictures of these heights and widths, with what is kept beside the pixels."""
    return sum(3 * height * width + SHAPE_BYTES + BOX_BYTES + CHECKSUM_BYTES for height, width in shapes)


def cache_in_memory(keys: Sequence[Hashable], shapes: Sequence[Shape], decode: Decode) -> PictureCache:
    """Decode all pictures into memory; `decode(row)` gives the picture [3, *shapes[row]] of keys[row], and its box.

    Raises CacheError, before anything is decoded, where the memory that is free does not hold them, with those of the
    other processes that torchrun started on this machine.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    needed, free = bytes_needed(shapes) * processes, free_memory()
    if free is not None and needed > free:
        each = f" in {processes} processes" if processes > 1 else ""
        height, width = max(shapes)
        raise CacheError(
            f"{len(keys)} pictures of {'up to ' if len(set(shapes)) > 1 else ''}{height} x {width} pixels{each} need "
            f"{needed / 1e9:.1f} GB and {free / 1e9:.1f} GB of memory are free: set cache to disk or none"
        )
    pixels = torch.empty(sum(3 * height * width for height, width in shapes), dtype=torch.uint8)
    boxes = torch.empty((len(keys), 4))
    if multiprocessing.get_start_method() != "fork":  # otherwise the processes that load pictures see the same pages
        try:
            pixels.share_memory_(), boxes.share_memory_()
        except RuntimeError as error:
            raise CacheError(
                f"{len(keys)} pictures need {needed / 1e9:.1f} GB of memory that processes share (/dev/shm), and it is "
                f"not to be had ({str(error).splitlines()[0]}): set cache to disk or none"
            ) from None
    cache = PictureCache(keys, shapes, pixels, boxes)
    for row, (image, box) in enumerate(_decode_all(len(keys), decode)):
        cache.image(row).copy_(image)
        boxes[row] = float("nan") if box is None else box
    return cache


def cache_on_disk(
    path: Path, digest: bytes, keys: Sequence[Hashable], shapes: Callable[[], Sequence[Shape]], decode: Decode
) -> PictureCache:
    """Map the cache at `path`; build it first where it is missing, or was made from something else than `digest` says.

    `shapes` is asked only then. Raises CacheError where it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _turn_to_build(path):
            if not _is_whole(path, digest, len(keys)):
                wanted, free = shapes(), shutil.disk_usage(path.parent).free
                expected = DIGEST_BYTES + bytes_needed(wanted)
                if expected > free:
                    raise CacheError(
                        f"{path} needs {expected / 1e9:.1f} GB and {free / 1e9:.1f} GB of the disk are free: make "
                        "room, set cache to ram or none, or give another checkpoint_dir"
                    )
                _build(path, digest, wanted, decode)
    except OSError as error:
        raise CacheError(
            f"{path} could not be written ({error.strerror or error}): make room, set cache to ram or none, or give "
            "another checkpoint_dir"
        ) from error
    return map_pictures(path, keys)


def map_pictures(path: Path, keys: Sequence[Hashable]) -> PictureCache:
    """Open a cache that is whole, for reading."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tensors are meant to be written to; nobody does
        content = torch.from_numpy(np.memmap(path, mode="r"))
    beside = (DIGEST_BYTES, *(size * len(keys) for size in (SHAPE_BYTES, BOX_BYTES, CHECKSUM_BYTES)))
    _, shapes, boxes, checksums, pixels = content.split([*beside, len(content) - sum(beside)])
    shapes = [tuple(shape) for shape in shapes.view(torch.int32).view(-1, 2).tolist()]
    checksums = checksums.numpy().view(np.uint32).tolist()
    return PictureCache(keys, shapes, pixels, boxes.view(torch.float32).view(-1, 4), path, checksums)


def _is_whole(path: Path, digest: bytes, count: int) -> bool:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # to open a pipe would wait for ever
            raise CacheError(f"{path} is not a file: move it away, or give another checkpoint_dir")
        with path.open("rb") as file:
            if file.read(DIGEST_BYTES) != digest:
                return False
            shapes = np.frombuffer(file.read(SHAPE_BYTES * count), dtype=np.int32)
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        return False
    return len(shapes) == 2 * count and size == DIGEST_BYTES + bytes_needed(shapes.reshape(-1, 2).tolist())


@contextlib.contextmanager
def _turn_to_build(path: Path) -> Iterator[None]:
    """Wait until no other process builds the file, and clear away what killed ones have left of it."""
    if fcntl is None:
        yield
        return
    with path.with_name(path.name + ".lock").open("wb") as lock:  # it stays: to remove it would let two in
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:  # a network file system without locks
            yield
            return
        for left in path.parent.glob(f"{path.name}.*.part"):
            left.unlink()
        yield


def _build(path: Path, digest: bytes, shapes: Sequence[Shape], decode: Decode) -> None:
    count = len(shapes)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    boxes, checksums = torch.full((count, 4), float("nan")), np.zeros(count, dtype=np.uint32)
    try:
        with temporary.open("wb") as file:
            head = digest + np.array(shapes, dtype=np.int32).tobytes()
            file.write(head + bytes((BOX_BYTES + CHECKSUM_BYTES) * count))
            for row, (image, box) in enumerate(_decode_all(count, decode)):
                if tuple(image.shape[1:]) != tuple(shapes[row]):  # its header promised another
                    raise CacheError(f"picture {row} of {path} changed while it was decoded: start again")
                pixels = image.permute(1, 2, 0).contiguous().numpy()
                file.write(pixels)
                checksums[row] = zlib.crc32(pixels)
                if box is not None:
                    boxes[row] = box
            file.seek(len(head))
            file.write(boxes.numpy().tobytes() + checksums.tobytes())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _decode_all(count: int, decode: Decode) -> Iterable[tuple[Tensor, Tensor | None]]:
    decoded = in_threads(decode, range(count), threads=os.cpu_count(), waiting=DECODED_AT_ONCE)
    return tqdm(decoded, "decoding pictures", count, leave=False, disable=bar_disabled())


def free_memory() -> int | None:
    """Return the bytes of memory that can be had, within the limits of a container; None where the system hides it."""
    free = []
    with contextlib.suppress(OSError, StopIteration, ValueError):
        free.append(1024 * _number_after("MemAvailable:", Path("/proc/meminfo")))
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, StopIteration, ValueError):  # not the files in memory: they give way
        free.append(int((group / "memory.max").read_text()) - _number_after("anon ", group / "memory.stat"))
    return min(free, default=None)


def _number_after(word: str, path: Path) -> int:
    lines = path.read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(word)).split()[1])
