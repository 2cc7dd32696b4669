"""What a data set holds, whatever its layout, and what is checked, left out and split off."""

from __future__ import annotations

from collections.abc import Container, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.data.decoding import Box
from utils.data.errors import DataError
from utils.data.folders import check_root, find_missing
from utils.errors import UserError


class Entry(NamedTuple):
    """One picture of a data set, not loaded yet.

    source: the file, or the number of a drawn picture of the demo set.
    box: the object's edges (x0, y0, x1, y1) in the pixels as the file stores them, or None where there is none.
    """

    source: Path | int
    label: int
    box: Box | None = None


class Catalogue(NamedTuple):
    """All pictures of a data set in its official split; labels count from 0 and index `class_names`."""

    train: list[Entry]
    test: list[Entry]
    class_names: list[str]

    @property
    def has_boxes(self) -> bool:
        """Whether every picture has an object box."""
        return all(entry.box is not None for entry in self.train + self.test)


class Source(NamedTuple):
    """Where a data set is to be read from, and what its reader may have to decide.

    root: the folder that the user named; None for a data set that needs none.
    seed, test_fraction: how a data set that is not split yet is split.
    """

    dataset: str
    root: str | Path | None
    seed: int = 0
    test_fraction: float = 0.2

    def folder(self) -> Path:
        """The folder that the user named, `~` resolved. Raises DataError where there is none."""
        return check_root(self.dataset, self.root)


def drop_repeated(catalogue: Catalogue) -> Catalogue:
    """Keep one of equal entries, which lists that were joined hold and which would only count a picture twice.

    Raises DataError where a picture is listed in two ways: nothing says which of them is right.
    """
    first: dict[Path | int, tuple[str, Entry]] = {}
    for split, entries in (("training", catalogue.train), ("testing", catalogue.test)):
        for entry in entries:
            first_split, known = first.setdefault(entry.source, (split, entry))
            names = [catalogue.class_names[label] for label in (known.label, entry.label)]
            if known.label != entry.label:
                ways = f"as {names[0]!r} and as {names[1]!r}"
            elif first_split != split:
                ways = "for training and for testing"
            elif known.box != entry.box:
                ways = f"with the box {known.box} and with {entry.box}"
            else:
                continue
            raise DataError(f"{entry.source} is listed twice, {ways}: take the wrong one off the data set's list")
    kept = {"training": [], "testing": []}
    for split, entry in first.values():
        kept[split].append(entry)
    return Catalogue(kept["training"], kept["testing"], catalogue.class_names)


def check_complete(dataset: str, catalogue: Catalogue) -> None:
    """Raise DataError if a class or a split has no pictures, or if listed files are not on disk."""
    if not catalogue.train or not catalogue.test:
        raise DataError(
            f"data set {dataset!r} has {len(catalogue.train)} training and {len(catalogue.test)} test pictures:"
            " expected some of each"
        )
    empty = set(range(len(catalogue.class_names))) - {entry.label for entry in catalogue.train}
    if empty:
        raise DataError(
            f"data set {dataset!r}: {len(empty)} of {len(catalogue.class_names)} classes have no training picture,"
            f" the first is {catalogue.class_names[min(empty)]!r}: add some, or leave the class out"
        )
    files = [entry.source for entry in catalogue.train + catalogue.test if isinstance(entry.source, Path)]
    missing = find_missing(files)
    if missing:
        raise DataError(
            f"{len(missing)} of {len(files)} listed pictures are not on disk, the first is {missing[0]}:"
            " unpack the data set's pictures there"
        )


def keep_classes(catalogue: Catalogue, patterns: Sequence[str]) -> Catalogue:
    """Return the classes whose names match a pattern, numbered anew. Raises DataError for one that matches none."""
    names = catalogue.class_names
    matches = {pattern: [i for i, name in enumerate(names) if fnmatchcase(name, pattern)] for pattern in patterns}
    for pattern, labels in matches.items():
        if not labels:
            raise DataError(
                f"classes: {pattern!r} matches none of the {len(names)} class names (such as {names[0]!r}):"
                " write '*' for any text"
            )
    kept = sorted({label for labels in matches.values() for label in labels})
    renumbered = {old: new for new, old in enumerate(kept)}

    def keep(entries: list[Entry]) -> list[Entry]:
        return [entry._replace(label=renumbered[entry.label]) for entry in entries if entry.label in renumbered]

    return Catalogue(keep(catalogue.train), keep(catalogue.test), [names[label] for label in kept])


def leave_out(catalogue: Catalogue, sources: Container[str]) -> Catalogue:
    """Return the catalogue without the pictures named. Raises DataError where a class or a split is left empty."""
    train, test = (
        [entry for entry in entries if str(entry.source) not in sources]
        for entries in (catalogue.train, catalogue.test)
    )
    rest = Catalogue(train, test, catalogue.class_names)
    check_complete("without its unreadable pictures", rest)
    return rest


def split_validation(entries: list[Entry], fraction: float, seed: int) -> tuple[list[Entry], list[Entry]]:
    """Split entries into (rest, validation), class by class, both in the order they came in.

    Every class gives `fraction` of its pictures (rounded), at least one if it has two or more, never its last one.
    """
    if not 0 <= fraction < 1:
        raise UserError(f"the fraction to split off must be at least 0 and below 1, got {fraction}")
    if fraction == 0:
        return list(entries), []
    members: dict[int, list[int]] = {}
    for position, entry in enumerate(entries):
        members.setdefault(entry.label, []).append(position)
    generator = np.random.default_rng(seed)
    chosen: set[int] = set()
    for label in sorted(members):
        positions = members[label]
        count = min(max(round(fraction * len(positions)), 1), len(positions) - 1)
        chosen.update(generator.permutation(positions)[:count].tolist())
    rest = [entry for position, entry in enumerate(entries) if position not in chosen]
    return rest, [entries[position] for position in sorted(chosen)]
