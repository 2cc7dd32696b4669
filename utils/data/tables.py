"""Reading and checking the lists of data sets: tables of text, MATLAB files, annotations in XML.

Boxes are (x0, y0, x1, y1), continuous edges in pixels. Whatever is wrong is a `DataError` that names the place.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar
from xml.etree import ElementTree

import numpy as np

from utils.data.decoding import Box
from utils.data.errors import DataError, describe

Value = TypeVar("Value")


def _quote(value: object) -> str:
    """What is there, for a message: a line of a file that is no list may be megabytes long."""
    text = str(value)
    return repr(text if len(text) <= 80 else text[:77] + "...")


def _check_list(path: Path) -> None:
    """Raise DataError unless `path` is a file with something in it."""
    if not path.exists():
        raise DataError(f"{path} does not exist: expected the data set's official list there")
    if not path.is_file():  # to open a pipe would wait for ever
        raise DataError(f"{path} is not a file: expected the data set's official list there")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty: restore the data set's official list")


def read_table(path: Path, columns: int) -> Iterator[tuple[str, list[str]]]:
    """Yield (place, fields) for every line that is not blank; the last field is the rest of the line, with its spaces.

    place: "<file> line <number>", for messages.
    """
    place = ""
    try:
        _check_list(path)
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                # Spaces of other scripts belong to the names.
                line = line.strip(" \t\n")
                if not line:
                    continue
                if not place and line.startswith("<"):
                    raise DataError(f"{path} is a web page ({_quote(line)}): restore the data set's official list")
                place = f"{path} line {number}"
                fields = re.split("[ \t]+", line, maxsplit=columns - 1) if columns > 1 else [line]
                if len(fields) != columns:
                    raise DataError(f"{place}: expected {columns} fields, got {len(fields)} in {_quote(line)}")
                yield place, fields
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason}): restore the data set's official list") from None
    if not place:
        raise DataError(f"{path} holds blank lines only: restore the data set's official list")


def read_keyed(path: Path, columns: int) -> Iterator[tuple[str, list[str]]]:
    """`read_table` for tables whose first field is a key: a line said again is left out, a contradiction refused."""
    known: dict[str, tuple[str, list[str]]] = {}
    for place, fields in read_table(path, columns):
        if fields[0] not in known:
            known[fields[0]] = place, fields
            yield place, fields
        elif known[fields[0]][1] != fields:
            first_place, first = known[fields[0]]
            raise DataError(
                f"{place} gives {_quote(fields[0])} as {_quote(' '.join(fields[1:]))}, and {first_place} as"
                f" {_quote(' '.join(first[1:]))}: take one of them out"
            )


def read_matlab(path: Path, variable: str, fields: Sequence[str] = ()) -> np.ndarray:
    """Read a vector (of records with at least `fields`, if given) from a MATLAB file."""
    from scipy.io import loadmat  # here: it takes a while, and only two data sets need it

    try:
        _check_list(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong is said below
            values = np.atleast_1d(loadmat(path, squeeze_me=True)[variable])
    except DataError:
        raise
    except Exception as error:  # on a broken file scipy raises whatever it stumbles over
        reason = "it lacks that" if isinstance(error, KeyError) else describe(error)
        raise DataError(f"{path} cannot be read as a MATLAB list of {variable!r} ({reason}): fetch it again") from None
    absent = [field for field in fields if field not in (values.dtype.names or ())]
    if absent:
        raise DataError(f"{path} lacks the field {absent[0]!r} in {variable!r}: expected the list with labels")
    if not len(values):
        raise DataError(f"{path} has nothing in {variable!r}: restore the data set's official list")
    return values


def picture_path(place: str, folder: Path, name: object) -> Path:
    """Where a listed picture lies: inside `folder`, whatever the list says."""
    if not isinstance(name, str) or not name.strip():
        raise DataError(f"{place}: expected a picture's name, got {_quote(name)}")
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise DataError(f"{place}: {_quote(name)} lies outside {folder}, expected a picture in there")
    return folder / name


def look_up(place: str, key: str, table: Mapping[str, Value], table_name: str) -> Value:
    """What `table`, read from the list `table_name`, has for a key that another list names at `place`."""
    if key not in table:
        raise DataError(f"{place}: {_quote(key)} is not in {table_name}, expected an entry there")
    return table[key]


def read_label(place: str, number: object, count: int) -> int:
    """A label from 0 of a class number from 1."""
    value = read_class(place, number)
    if not 1 <= value <= count:
        raise DataError(f"{place}: class {value} is not in 1..{count}, the classes that have names")
    return value - 1


def read_class(place: str, number: object) -> int:
    """A class number, whole but perhaps stored as a float."""
    (value,) = read_numbers(place, [number])
    if not value.is_integer():
        raise DataError(f"{place}: class {value} is not a whole number")
    return int(value)


def read_numbers(place: str, fields: Sequence[object]) -> tuple[float, ...]:
    """Finite numbers of text or of MATLAB's types."""
    try:
        numbers = tuple(float(field) for field in fields)
    except (TypeError, ValueError, OverflowError):
        raise DataError(f"{place}: expected numbers, got {_quote(' '.join(map(str, fields)))}") from None
    if not all(map(math.isfinite, numbers)):
        raise DataError(f"{place}: expected finite numbers, got {_quote(' '.join(map(str, fields)))}")
    return numbers


def box_from_edges(place: str, x0: float, y0: float, x1: float, y1: float) -> Box:
    """The box, if its edges are in order."""
    if x1 < x0 or y1 < y0:
        raise DataError(f"{place}: the box from ({x0:g}, {y0:g}) to ({x1:g}, {y1:g}) ends before it begins")
    return x0, y0, x1, y1


def box_from_matlab(place: str, x0: float, y0: float, x1: float, y1: float) -> Box:
    """From first and last pixel, both inside the box and counted from 1."""
    return box_from_edges(place, x0 - 1, y0 - 1, x1, y1)


def read_xml_box(path: Path) -> Box:
    """The box of the first object in an annotation in the XML of Pascal VOC."""
    try:
        box = ElementTree.parse(path).find("object/bndbox")
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: unpack the data set's annotations there") from None
    except (ElementTree.ParseError, LookupError, ValueError) as error:  # the latter two: unknown encodings
        raise DataError(f"{path} is not XML ({error}): unpack the data set's annotations again") from None
    corners = [None if box is None else box.findtext(corner) for corner in ("xmin", "ymin", "xmax", "ymax")]
    # Taken as edges: nothing says whether the last pixel counts.
    return box_from_edges(str(path), *read_numbers(str(path), corners))
