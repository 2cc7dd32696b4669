"""Pictures with a table that says what they are: columns for the picture, its class, and perhaps its part."""

from __future__ import annotations

import contextlib
from pathlib import Path

from utils.data.catalogue import Catalogue, Entry, Source, hold_back_test
from utils.data.columns import LABEL, OF_OTHER_THINGS, TABLES, find_column, part_in, read_rows
from utils.data.errors import DataError
from utils.data.folders import levels
from utils.data.naming import PictureIndex


def read(source: Source) -> Catalogue:
    root = source.folder()
    files = {"training": find_table(root, source.labels)}
    for part, given in (("validation", source.validation_labels), ("test", source.test_labels)):
        if given is not None:
            files[part] = locate(root, given)
    index = PictureIndex(root)
    rows: dict[str, list[tuple[Path, str]]] = {}
    notes: list[str] = []
    for part, path in files.items():
        for own_part, picture, label in read_table(path, part, source, index, notes):
            rows.setdefault(own_part, []).append((picture, label))
    names = {label for several in rows.values() for _, label in several}
    class_names = sorted(names, key=_as_number if all(map(_is_number, names)) else None)
    labels = {name: label for label, name in enumerate(class_names)}
    parts = {part: [Entry(picture, labels[name]) for picture, name in several] for part, several in rows.items()}
    listed = {entry.source for entries in parts.values() for entry in entries}
    unlisted = [path for path in index.pictures if path not in listed]
    if unlisted:
        notes.append(
            f"{len(unlisted)} pictures in {root} are in none of the tables and left out (the first is {unlisted[0]})"
        )
    catalogue = Catalogue(
        parts.get("training", []), parts.get("test", []), class_names, parts.get("validation"), tuple(notes)
    )
    return catalogue if "test" in parts else hold_back_test(catalogue, source)


def read_table(
    path: Path, part: str, source: Source, index: PictureIndex, notes: list[str]
) -> list[tuple[str, Path, str]]:
    """Part, picture and class of every row; rows without a class are left out, and counted in `notes`."""
    header, rows = read_rows(path, index)
    image = find_column(path, header, "image_column", source.image_column)
    label = find_column(path, header, "label_column", source.label_column)
    split = find_column(path, header, "split_column", source.split_column, needed=False)
    others = [name for name in header if name.strip().lower() in LABEL and name != header[label]]
    if others and source.label_column is None:
        notes.append(f"{path.name}: classes are those of the column {header[label]!r} (--label_column chooses another)")
    perhaps = split is not None and source.split_column is None and header[split].strip().lower() in OF_OTHER_THINGS
    if perhaps and not any(part_in(header[split], row[split]) for _, row in rows):
        notes.append(f"{path.name}: no value of the column {header[split]!r} is a part, so it is ignored")
        split = None
    found, unlabelled = [], 0
    for place, row in rows:
        name, class_name = row[image].strip(), row[label].strip()
        if not class_name:
            unlabelled += 1
            continue
        if len((name + class_name).splitlines()) > 1:
            raise DataError(f"{place}: {name + class_name!r} goes over several lines: close the quote before it")
        own = part if split is None else part_in(header[split], row[split])
        if own is None:
            expected = "expected train, validation or test (or 1 and 0 of is_train)"
            raise DataError(f"{place}: {header[split]} is {row[split]!r}, {expected}")
        found.append((own, index.find(place, path.parent, name, own), class_name))
    if unlabelled:
        notes.append(f"{path.name}: {unlabelled} rows have no class and are left out")
    return found


def find_table(root: Path, given: str | None) -> Path:
    """The table that was given, or the only one that there is. Raises DataError with the command that works."""
    if given is not None:
        return locate(root, given)
    tables = [path for level in levels(root, 2) for folder in level for path in sorted(folder.iterdir())]
    tables = [path for path in tables if path.suffix.lower() in TABLES and not path.name.startswith(".")]
    if len(tables) == 1:
        return tables[0]
    seen = f"{len(tables)} tables ({', '.join(path.name for path in tables[:4])})" if tables else "no table"
    example = tables[0] if tables else "train.csv"
    raise DataError(f"{root} holds {seen}: say which one has the classes of the pictures, such as --labels {example}")


def locate(root: Path, given: str) -> Path:
    """A table by its path, below the data's folder or as it is. Raises DataError where that is none, or are two."""
    below, as_it_is = root / given, Path(given)
    with contextlib.suppress(RuntimeError):  # a home that nobody has
        as_it_is = as_it_is.expanduser()
    found = [path for path in (below, as_it_is) if path.is_file()]
    if not found:
        raise DataError(f"neither {as_it_is.absolute()} nor {below} is a file: expected a table of labels there")
    if not found[0].samefile(found[-1]):
        raise DataError(f"{given} may be {below} or {as_it_is.absolute()}: write the whole path of the one you mean")
    return found[0]


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdecimal()


def _as_number(name: str) -> tuple[int, str, str]:
    """What numbers of any length are sorted by; 1 and 01 are two names, always in the same order."""
    digits = name.lstrip("0")
    return len(digits), digits, name
