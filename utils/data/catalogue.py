"""What a data set holds, whatever its layout, and what is checked, left out and split off."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping, Sequence
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
    """All pictures of a data set in its given split; labels count from 0 and index `class_names`.

    validation: the given validation part, or None where there is none.
    notes: what a user should know of how the data were read, a sentence each.
    """

    train: list[Entry]
    test: list[Entry]
    class_names: list[str]
    validation: list[Entry] | None = None
    notes: tuple[str, ...] = ()

    @property
    def parts(self) -> dict[str, list[Entry]]:
        """The given parts by name: training, validation (if there is one), test."""
        parts = {"training": self.train, "validation": self.validation, "test": self.test}
        return {part: entries for part, entries in parts.items() if entries is not None}

    @property
    def entries(self) -> list[Entry]:
        """The pictures of all parts."""
        return [entry for part in (self.train, self.test, self.validation or []) for entry in part]

    @property
    def has_boxes(self) -> bool:
        """Whether every picture has an object box."""
        return all(entry.box is not None for entry in self.entries)

    def with_parts(self, parts: Mapping[str, list[Entry]]) -> Catalogue:
        """Return the same with other entries in its parts."""
        return self._replace(train=parts["training"], test=parts["test"], validation=parts.get("validation"))


class Source(NamedTuple):
    """Where a data set is to be read from, and what its reader may have to decide.

    root: the folder that the user named; None for a data set that needs none.
    seed, test_fraction: how a data set that has no test part is split.
    The others are settings that some readers have; config.py says what each means.
    """

    dataset: str
    root: str | Path | None
    seed: int = 0
    test_fraction: float = 0.2
    class_level: int | None = None
    labels: str | None = None
    validation_labels: str | None = None
    test_labels: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    split_column: str | None = None
    aircraft_level: str = "variant"

    def folder(self) -> Path:
        """The folder that the user named, `~` resolved. Raises DataError where there is none."""
        return check_root(self.dataset, self.root)


CHOICES = Source._fields[2:]  # the settings that readers have a use for


def hold_back_test(catalogue: Catalogue, source: Source) -> Catalogue:
    """Return a catalogue without a test part with one, taken from the training part, and a note that says so."""
    catalogue = drop_repeated(catalogue)  # or a picture might come into both parts
    if not catalogue.train:
        return catalogue
    train, test = split_validation(catalogue.train, source.test_fraction, source.seed)
    note = (
        f"no test part is given: {len(test)} images are held back from training for it ({source.test_fraction:.0%} of "
        f"each class, seed {source.seed}{note_on_small_classes(train, test, source.test_fraction)})"
    )
    return catalogue._replace(train=train, test=test, notes=(*catalogue.notes, note))


def drop_repeated(catalogue: Catalogue) -> Catalogue:
    """Keep one of equal entries, which lists that were joined hold and which would only count a picture twice.

    Raises DataError where a picture is listed in two ways: nothing says which of them is right.
    """
    check_entries(catalogue)
    first: dict[Path | int, tuple[str, Entry]] = {}
    uses = {"training": "training", "validation": "validation", "test": "testing"}
    for part, entries in catalogue.parts.items():
        for entry in entries:
            first_part, known = first.setdefault(entry.source, (part, entry))
            names = [catalogue.class_names[label] for label in (known.label, entry.label)]
            if known.label != entry.label:
                ways = f"as {names[0]!r} and as {names[1]!r}"
            elif first_part != part:
                ways = f"for {uses[first_part]} and for {uses[part]}"
            elif known.box != entry.box:
                ways = f"with the box {known.box} and with {entry.box}"
            else:
                continue
            raise DataError(f"{entry.source} is listed twice, {ways}: take the wrong one off the data set's list")
    kept: dict[str, list[Entry]] = {part: [] for part in catalogue.parts}
    for part, entry in first.values():
        kept[part].append(entry)
    return catalogue.with_parts(kept)


def check_entries(catalogue: Catalogue) -> None:
    """Raise DataError where a reader has listed pictures in another form than `Entry` has."""
    classes = len(catalogue.class_names)
    for entry in catalogue.entries:
        if not isinstance(entry, Entry):
            raise DataError(f"the data set's reader lists {entry!r}: expected an Entry")
        if not isinstance(entry.source, Path | int):
            raise DataError(f"the data set's reader lists {entry.source!r}: expected a pathlib.Path")
        if type(entry.label) is not int or not 0 <= entry.label < classes:
            raise DataError(
                f"the data set's reader gives {entry.source} the label {entry.label!r}: expected an int from 0 to "
                f"{classes - 1}, the place of its class among the {classes} class names"
            )


def refuse_equal_names(dataset: str, class_names: Sequence[str]) -> None:
    """Raise DataError where two classes have one name, by which a checkpoint could not tell them apart."""
    name, count = Counter(class_names).most_common(1)[0] if class_names else ("", 0)
    if count > 1:
        raise DataError(f"data set {dataset!r}: {count} classes are called {name!r}: give each a name of its own")


def check_complete(dataset: str, catalogue: Catalogue) -> None:
    """Raise DataError if a class or a part has no pictures, or if listed files are not on disk.

    The sentence ends with the notes, which may name the reason, such as files that are no pictures.
    """
    notes = "".join(f"; {note}" for note in catalogue.notes)
    if not catalogue.train or not catalogue.test:
        raise DataError(
            f"data set {dataset!r} has {len(catalogue.train)} training and {len(catalogue.test)} test pictures:"
            f" expected some of each{notes}"
        )
    if catalogue.validation == []:
        raise DataError(f"data set {dataset!r} has a validation part without pictures: add some, or remove the part")
    if len(catalogue.class_names) == 1:
        raise DataError(
            f"data set {dataset!r} has one class only, {catalogue.class_names[0]!r}: expected two or more to tell"
            " apart; add pictures of another, or name more with --classes"
        )
    empty = set(range(len(catalogue.class_names))) - {entry.label for entry in catalogue.train}
    if empty:
        raise DataError(
            f"data set {dataset!r}: {len(empty)} of {len(catalogue.class_names)} classes have no training picture,"
            f" the first is {catalogue.class_names[min(empty)]!r}: add some, remove the class, or name those to train"
            f" with --classes{notes}"
        )
    check_on_disk(catalogue)


def check_on_disk(catalogue: Catalogue) -> None:
    """Raise DataError if listed files are not on disk."""
    files = [entry.source for entry in catalogue.entries if isinstance(entry.source, Path)]
    missing = find_missing(files)
    if missing:
        raise DataError(
            f"{len(missing)} of {len(files)} listed pictures are not on disk, the first is {missing[0]}:"
            " unpack the data set's pictures there"
        )


def keep_classes(catalogue: Catalogue, patterns: Sequence[str]) -> Catalogue:
    """Return the classes whose names match a pattern, numbered anew. Raises DataError for one that matches none."""
    names = catalogue.class_names
    matches = {
        pattern: [i for i, name in enumerate(names) if name == pattern or fnmatchcase(name, pattern)]
        for pattern in patterns
    }
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

    parts = {part: keep(entries) for part, entries in catalogue.parts.items()}
    return catalogue.with_parts(parts)._replace(class_names=[names[label] for label in kept])


def leave_out(catalogue: Catalogue, sources: Container[str]) -> Catalogue:
    """Return the catalogue without the pictures named. Raises DataError where a class or a part is left empty."""
    kept = {part: [e for e in entries if str(e.source) not in sources] for part, entries in catalogue.parts.items()}
    rest = catalogue.with_parts(kept)
    check_complete("without its unreadable pictures", rest)
    return rest


def note_on_small_classes(rest: Sequence[Entry], held_back: Sequence[Entry], fraction: float) -> str:
    """Say where `split_validation` made something else of its fraction, as classes are small; "" where it did not."""
    share = len(held_back) / max(len(rest) + len(held_back), 1)
    without = len({entry.label for entry in rest} - {entry.label for entry in held_back})
    note = f"; classes with one image, {without}, keep it" if without else ""
    if abs(share - fraction) > fraction / 5:
        return f"; as whole images, at least one, this is {share:.0%} of all{note}"
    return note


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
