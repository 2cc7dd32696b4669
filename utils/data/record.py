"""Which pictures a run was trained on: kept with its checkpoints, and compared with the data of today.

A picture is known by its path below the folder that all of them share, so that the data may be moved; by its label; and
by a hash of its content, so that one that was replaced is noticed and one that was renamed or copied is known again.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from utils.data.catalogue import Entry
from utils.data.errors import DataError, describe
from utils.data.threads import in_threads
from utils.text import one_line

SAMPLED = 4 * 1024  # bytes of a block; of a larger file, so many at its beginning, in its middle and at its end
UNPACKED_LIMIT = 1 << 30  # bytes; a record of a million pictures has a tenth


class Picture(NamedTuple):
    """A picture as a run knows it: its class, a hash of its content, and its path."""

    label: int
    content: str
    path: str


class Record(NamedTuple):
    """The pictures of a run, each list in its order."""

    training: list[Picture]
    selection: list[Picture]  # those that choose the best epoch
    test: list[Picture]

    def seen(self, *, selection: bool) -> set[str]:
        """Return the contents of what was trained on, and of what chose the best epoch if that counts as seen."""
        return {picture.content for picture in (self.training + self.selection if selection else self.training)}


def record_pictures(training: Sequence[Entry], selection: Sequence[Entry], test: Sequence[Entry]) -> Record:
    """Return what a run is to remember of its pictures. Raises DataError where one of them cannot be read."""
    sources = [entry.source for entry in (*training, *selection, *test)]
    names = below_shared_folder(sources)
    contents = content_hashes(sources)
    return Record(
        *(
            [Picture(entry.label, contents[entry.source], names[entry.source]) for entry in entries]
            for entries in (training, selection, test)
        )
    )


def below_shared_folder(sources: Sequence[Path | int]) -> dict[Path | int, str]:
    """Return each picture's path below the folder that all of them share."""
    here = Path.cwd()
    files = {source: os.path.normpath(here / source) for source in sources if isinstance(source, Path)}
    shared = os.path.commonpath([os.path.dirname(file) for file in files.values()]) if files else ""  # noqa: PTH120
    names = {source: Path(os.path.relpath(file, shared)).as_posix() for source, file in files.items()}
    return names | {source: f"demo/{source:04d}" for source in sources if isinstance(source, int)}


def content_hashes(sources: Collection[Path | int]) -> dict[Path | int, str]:
    """Return a hash of each file's size and of its first, middle and last bytes; of a drawn picture its number.

    That is the whole of a small file. To read large ones whole would take as long as an epoch's loading. Raises
    DataError.
    """
    unique = list(dict.fromkeys(sources))
    hashes = in_threads(_content_hash, unique, threads=min(16, 4 * (os.cpu_count() or 1)))
    return dict(zip(unique, hashes, strict=True))


def _content_hash(source: Path | int) -> str:
    if isinstance(source, int):
        return f"demo/{source:04d}"
    try:
        with source.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            content = hashlib.blake2b(str(size).encode(), digest_size=8)
            starts = [0, size // 2, size - SAMPLED] if size > 3 * SAMPLED else range(0, size, SAMPLED)
            for start in starts:
                file.seek(start)
                content.update(file.read(SAMPLED))
    except OSError as error:
        raise DataError(f"{source} cannot be read as a picture ({describe(error)}): restore it") from None
    return content.hexdigest()


def repeated_pictures(record: Record, *, selected_on_test: bool) -> list[str]:
    """Say how many pictures of one part have the same content as others: what is measured on them is optimistic."""
    trained = {picture.content for picture in record.training}
    looked_at = [("test", record.test, record.seen(selection=not selected_on_test))]
    if not selected_on_test:
        looked_at.append(("validation", record.selection, trained))
    said = []
    for part, pictures, seen in looked_at:
        again = [picture.path for picture in pictures if picture.content in seen]
        if again:
            said.append(
                f"{len(again)} of {len(pictures)} {part} images seem to be in training or validation, too (same size, "
                f"beginning, middle and end of the file), the first is {one_line(again[0])}: figures on them are "
                "optimistic"
            )
    return said


# ---- In a checkpoint ------------------------------------------------------------------------------------------------


def pack(record: Record) -> Tensor:
    """Return the record as a tensor of bytes, compressed: a checkpoint holds tensors and plain values only."""
    content = zlib.compress(json.dumps(record).encode())  # as \udc.. where a path is no text
    return torch.from_numpy(np.frombuffer(content, dtype=np.uint8).copy())


def unpack(packed: Tensor) -> Record:
    """Return what `pack` was given. Raises ValueError for anything else."""
    try:
        unpacking = zlib.decompressobj()
        content = unpacking.decompress(packed.numpy().tobytes(), UNPACKED_LIMIT)
        if not unpacking.eof:
            raise ValueError("it ends too early")
        lists = [[Picture(*picture) for picture in pictures] for pictures in json.loads(content)]
        record = Record(*lists)
    except (zlib.error, ValueError, TypeError, RuntimeError) as error:
        raise ValueError("no record of pictures") from error
    for label, content, path in (*record.training, *record.selection, *record.test):
        if type(label) is not int or type(content) is not str or type(path) is not str:
            raise ValueError("no record of pictures")
    return record


# ---- What differs ---------------------------------------------------------------------------------------------------


def difference(saved: Record, now: Record) -> str | None:
    """Say how the pictures to train on and to select by differ from those of a run, None where they do not."""
    if (saved.training, saved.selection) == (now.training, now.selection):
        return None
    before, after = (_by_path(record) for record in (saved, now))
    added = [path for path in after if path not in before]
    gone: dict[str, list[str]] = {}
    for path in (path for path in before if path not in after):
        gone.setdefault(before[path][0].content, []).append(path)
    moved = {path: gone[content].pop(0) for path in added if gone.get(content := after[path][0].content)}
    both = [(path, *before[path], *after[path]) for path in before if path in after]
    kinds = {
        "added": [path for path in added if path not in moved],
        "removed": [path for paths in gone.values() for path in paths],
        "moved": [f"{former}, now {path}" for path, former in moved.items()],
        "of another class": [path for path, old, _, new, _ in both if old.label != new.label],
        "replaced": [path for path, old, _, new, _ in both if old.content != new.content],
    }
    if not any(kinds.values()):  # otherwise these follow from the others
        kinds["held back for validation in one and not in the other"] = [p for p, _, old, _, new in both if old != new]
    found = [f"{len(paths)} {kind}, the first is {one_line(paths[0])}" for kind, paths in kinds.items() if paths]
    return "; ".join(found) or "they come in another order"


def _by_path(record: Record) -> dict[str, tuple[Picture, str]]:
    return {p.path: (p, part) for part in ("training", "selection") for p in getattr(record, part)}


def differing_names(saved: Sequence[str], now: Sequence[str]) -> str:
    """Say how two lists of class names differ."""
    before, after = set(saved), set(now)
    gone, new = [name for name in saved if name not in after], [name for name in now if name not in before]
    found = [
        f"{len(names)} {words}, the first is {one_line(names[0])!r}"
        for names, words in ((gone, "no longer there"), (new, "new"))
        if names
    ]
    return "; ".join(found) or "the same names in another order"
