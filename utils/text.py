"""Text that goes out: names may hold bytes of no encoding, line ends, and what moves a terminal's cursor."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

PLAIN = "\n\t\u00a0\u202f"  # not printable to Python, and harmless
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what makes a table's cell a formula


def one_line(text: str) -> str:
    """The text with line ends, and what else would move a terminal's cursor, written out."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def visible(text: str) -> str:
    """The same, but of several lines."""
    return "".join(c if c.isprintable() or c in PLAIN else ascii(c)[1:-1] for c in text)


def cell(text: str) -> str:
    """A name as a cell of a table: on one line, and never a formula to a spreadsheet."""
    return f"'{one_line(text)}" if text.startswith(FORMULA) else one_line(text)


def first_few(names: Sequence[str], count: int = 3) -> str:
    """The first names in a row, and how many more there are: "a, b, c and 4 more"."""
    more = len(names) - count
    return ", ".join(names[:count]) + (f" and {more} more" if more > 0 else "")


def json_line(value: object) -> str:
    """A value as JSON on one line that any terminal may show: what is not printable is escaped."""
    text = json.dumps(value, ensure_ascii=False)
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


def let_every_name_pass() -> None:
    """Let the standard streams write out what their encoding has not, where they can (a notebook's cannot, and need
    not)."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
