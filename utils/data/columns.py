"""Tables of labels in comma-separated text and the like: their columns and rows."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from utils.data.errors import DataError
from utils.data.naming import PictureIndex
from utils.data.parts import part_of

END = "the end of this table"  # a row behind the last one, unless a quote that is not closed takes it in
TABLES = (".csv", ".tsv")
# What people call the columns, the likeliest first
IMAGE = ("image", "image_id", "file_name", "filename", "file", "path", "image_path", "file_path", "filepath", "img")
IMAGE += ("image_name", "img_path", "relative_path", "images", "picture", "photo", "id", "name")
LABEL = ("label", "class", "class_name", "label_name", "category", "species", "breed", "target", "labels", "classes")
LABEL += ("class_id", "label_id", "category_id", "variety", "variant", "y")
LABELS = frozenset(LABEL)
SPLIT = ("split", "set", "subset", "part", "partition", "data_set", "dataset", "is_train", "is_training", "train")
OF_OTHER_THINGS = ("set", "subset", "part", "partition", "data_set", "dataset")  # are called so, too: of a collection
COLUMNS = {"image_column": IMAGE, "label_column": LABEL, "split_column": SPLIT}
TRAINING_FLAGS = {"1": "training", "true": "training", "yes": "training", "0": "test", "false": "test", "no": "test"}


def read_rows(path: Path, index: PictureIndex) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Return the header and the rows that are not blank, each with its place ("<file> line <number>").

    A table whose first row names a picture has no header: its columns are image, label and, as the third, split.
    Raises DataError where it is no such table.
    """
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty: expected a table with a column of pictures and one of classes")
    content = path.read_bytes()
    if b"\0" in content:
        raise DataError(f"{path} is no text in UTF-8: save it as CSV in UTF-8")
    text = content.decode("utf-8-sig", errors="surrogateescape")
    first_line = text.lstrip().partition("\n")[0]
    delimiter = max(",\t;|", key=first_line.count)
    reader = csv.reader(io.StringIO(f"{text}\n{END}", newline=""), delimiter=delimiter, skipinitialspace=True)
    rows, read = [], [0]
    try:
        for row in reader:
            read.append(reader.line_num)
            if any(cell.strip() for cell in row):
                rows.append((f"{path} line {reader.line_num}", row))
    except csv.Error as error:
        raise DataError(f"{path} line {reader.line_num} is no row of a table ({error}): repair it") from None
    if rows.pop()[1] != [END]:
        raise DataError(f"{path} line {read[-2] + 1}: a quote is opened and never closed: close it, or take it away")
    if not rows or len(rows[0][1]) < 2:
        raise DataError(f"{path} has no two columns: expected one of pictures and one of classes, with commas between")
    header = [name.strip() for name in rows[0][1]]
    if index.knows(path.parent, header[0]) and not _has_usual_names(header):
        header = ["image", "label", "split"][: len(header)] + header[3:]
    else:
        rows = rows[1:]
    for place, row in rows:
        if len(row) < len(header) or any(cell.strip() for cell in row[len(header) :]):
            raise DataError(
                f"{place}: expected {len(header)} fields ({', '.join(header)[:200]}), got {len(row)}: add what is "
                "missing, or put a name that holds a comma in quotes"
            )
    if not rows:
        raise DataError(f"{path} has a header and no rows: expected one for each picture")
    return header, rows


def _has_usual_names(header: Sequence[str]) -> bool:
    """Whether a first row, which may name a picture by chance, reads like a header: image, label."""
    first, *others = (name.lower() for name in header)
    return first in IMAGE and not LABELS.isdisjoint(others)


def find_column(
    path: Path, header: Sequence[str], setting: str, given: str | None, *, needed: bool = True
) -> int | None:
    """The number of a column: the one given, or the likeliest by its name; None where none is and none is needed."""
    if given is not None:
        if given not in header:
            raise DataError(f"{path} has no column {given!r}, only {', '.join(header)}: choose {setting} among them")
        return header.index(given)
    plain = [name.lower().replace(" ", "_").replace("-", "_") for name in header]
    for name in COLUMNS[setting]:
        if name in plain:
            return plain.index(name)
    if not needed:
        return None
    raise DataError(
        f"{path} has the columns {', '.join(header)}, and none has a usual name: say which it is with --{setting}"
    )


def part_in(column: str, value: str) -> str | None:
    """The part that a cell of a split column names, in a column like is_train also by 1 and 0; None: it names none."""
    word = value.strip().lower()
    return part_of(word) or (TRAINING_FLAGS.get(word) if "train" in column.lower() else None)
