"""Slips of the pen in config.py, which people edit: one sentence with the file, the line and the nearest name.

Python finds some when it reads the file, others show when a setting is looked up. Needs the standard library only.
"""

from __future__ import annotations

import builtins
import contextlib
import difflib
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path

from utils.options import SettingsError, hints, shown

CONFIG = Path(__file__).resolve().parent.parent / "config.py"


@contextlib.contextmanager
def config_as_edited(path: Path = CONFIG) -> Iterator[None]:
    """Import config.py in this block: where it cannot be read the program ends with one sentence and exit code 2."""
    sentence = None
    try:
        yield
        if (line := _line_that_is_not_utf8(path)) is not None:  # in a comment Python lets it pass
            sentence = _not_utf8(path, line)
    except Exception as error:
        sentence = slip_in(error, path)
        if sentence is None:
            raise
    if sentence is not None:
        print(f"error: {sentence}", file=sys.stderr)
        sys.exit(2)


def slip_in(error: Exception, path: Path) -> str | None:
    """Return what is wrong in the file that an import has failed in, None where it failed elsewhere."""
    if isinstance(error, SyntaxError):
        if error.filename is None or Path(error.filename) != path:
            return None
        undecodable = _line_that_is_not_utf8(path)
        if undecodable is not None:
            return _not_utf8(path, undecodable)
        line = "" if error.text is None else f", in: {error.text.strip()[:100]}"
        return f"{path.name} line {error.lineno}: {error.msg}{line}"
    frames = [(f, line) for f, line in traceback.walk_tb(error.__traceback__) if Path(f.f_code.co_filename) == path]
    if not frames:
        return None
    (frame, line), text = frames[-1], str(error)
    if isinstance(error, NameError):
        near = nearest(error.name, [*frame.f_globals, *dir(builtins)])
        return f'{path.name} line {line}: {error.name} is not defined{near}; a text stands in quotes: "{error.name}"'
    named = re.search(r"'(\w+)'|field (\w+)", text)  # a field that the dataclass refuses
    return f"{path.name} line {named and _line_of_field(path, named[1] or named[2]) or line}: {text}"


def _not_utf8(path: Path, line: int) -> str:
    return f"{path.name} line {line} is not UTF-8 text: save the file in that encoding"


def _line_that_is_not_utf8(path: Path) -> int | None:
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            line.decode()
        except UnicodeDecodeError:
            return number
    return None


def _line_of_field(path: Path, name: str) -> int | None:
    lines = path.read_text(encoding="utf-8").splitlines()
    return next((n for n, line in enumerate(lines, start=1) if re.match(_field(name), line)), None)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return " (did you mean NAME?)", or nothing where no known name is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.7)
    return f" (did you mean {near[0]}?)" if near else ""


# ---- What shows when settings are looked up -------------------------------------------------------------------------


def check_edited(
    settings: type,
    tables: Mapping[str, object],
    *,
    read: Iterable[str],
    path: str,
    options: Collection[str],
) -> None:
    """Refuse a settings class or tables of values with a slip in them. Raises SettingsError.

    `read`: the fields that a run needs, sooner or later. `tables`: values by setting, by the table's title; settings of
    systems, `options`, may stand there, too.
    """
    file, fields = Path(path), hints(settings)
    for name, value in vars(settings).items():
        if not name.startswith("_") and name not in fields and not callable(value):
            raise SettingsError(f"{_place(file, _field(name))}: {name} has no type; write {name}: type = value")
    for title, table in tables.items():
        if not isinstance(table, dict):
            raise SettingsError(f"{file.name}: {title} is {shown(table)}; expected values by setting")
        for name in table:
            if name not in fields and name not in options:
                place = _place(file, ".*[\"']" + re.escape(str(name)) + "[\"'] *:")
                raise SettingsError(f"{place}: {name} in {title} is no setting{nearest(str(name), fields)}")
    for name in read:
        if name not in fields:
            raise _absent(settings, name, file, read)


def names_what_is_absent(read: Iterable[str]) -> Callable[[type], type]:
    """Let a settings class say in a sentence that a field was renamed or removed: put it above the class.

    `read`: as for `check_edited`.
    """

    def refuse(settings: object, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)
        kind = type(settings)
        raise _absent(kind, name, Path(inspect.getsourcefile(kind) or "config.py"), read)

    def named(settings: type) -> type:
        settings.__getattr__ = refuse
        return settings

    return named


def _absent(kind: type, name: str, file: Path, read: Iterable[str]) -> SettingsError:
    unknown = [field for field in hints(kind) if field not in read]  # those that are read stand for themselves
    near = difflib.get_close_matches(name, unknown, n=1, cutoff=0.6)
    instead = f": {_place(file, _field(near[0]))} has {near[0]}, which may have been it" if near else ""
    return SettingsError(f"{file.name} has no setting {name} in {kind.__name__} any more{instead}; put it back")


def _field(name: str) -> str:
    """A pattern of the line of a dataclass's field."""
    return rf"    {re.escape(name)}\b"


def _place(file: Path, pattern: str) -> str:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            if re.match(pattern, line):
                return f"{file.name} line {number}"
    return file.name
