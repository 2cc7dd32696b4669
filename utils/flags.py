"""Fields of a dataclass as flags of the command line, each with its comment in the source as help."""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import inspect
import re
import types
import typing
from collections.abc import Callable
from typing import Annotated

from utils.options import NAMES, hints, shown


@functools.cache
def comments(record: type) -> dict[str, str]:
    """Return the comment behind each field, as it stands in the source."""
    found = re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(record), flags=re.MULTILINE)
    return {name: comment for name, comment in found if name in hints(record)}


def add_flags(parser: argparse._ActionsContainer, defaults: object, names: typing.Iterable[str]) -> None:
    """Add a flag for each of these fields of a dataclass, with its comment and default as help."""
    record = type(defaults)
    explained = comments(record)
    for name in names:
        hint = hints(record)[name]
        text = f"{explained.get(name, '')} (default: {shown(getattr(defaults, name))})".strip()
        options: dict[str, typing.Any] = {"help": text.replace("%", "%%")}
        if bool in _members(hint):
            options["action"] = argparse.BooleanOptionalAction
        else:
            options |= {"type": _converter(hint), "metavar": _choices(hint) or "VALUE"}
            if any(typing.get_origin(member) in (tuple, dict) for member in _members(hint)) and not _is_nested(hint):
                options["nargs"] = "*"
        parser.add_argument(f"--{name}", **options)


def from_words(record: type, name: str, value: typing.Any) -> object:
    """Return what the words behind a flag stand for: names with numbers are a dict, and one may stand for a list."""
    members = _members(hints(record)[name])
    if any(typing.get_origin(member) is dict for member in members):
        return dict(value)
    alone = isinstance(value, list) and len(value) == 1 and isinstance(value[0], str) and str in members
    return value[0] if alone else value


def _members(hint: typing.Any) -> list[typing.Any]:
    """The plain types of a union, or the type itself; of choices, the type of the first."""
    kind, parts = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind in (types.UnionType, typing.Union):
        return [member for part in parts for member in _members(part)]
    if kind is Annotated:
        return _members(parts[0])
    return [type(parts[0])] if kind is typing.Literal else [hint]


def _choices(hint: typing.Any) -> str:
    """The choices of a field that takes nothing else (but None), as help shows them; else ""."""
    parts = typing.get_args(hint)
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        (hint, *others) = [part for part in parts if part is not types.NoneType]
        return "" if others else _choices(hint)
    return f"{{{','.join(map(str, parts))}}}" if typing.get_origin(hint) is typing.Literal else ""


def _is_nested(hint: object) -> bool:
    """Whether tuples of tuples belong to it, which one word holds as Python writes them."""
    tuples = [member for member in _members(hint) if typing.get_origin(member) is tuple]
    return any(typing.get_origin(part) is tuple for member in tuples for part in typing.get_args(member))


def _converter(hint: object) -> Callable[[str], object]:
    """Return what turns a command-line word into a value of the annotated type."""
    members = _members(hint)
    if _is_nested(hint):
        return _name_or_tuple
    if float in members and str in members:
        return _name_or_number
    if str in members and any(typing.get_origin(member) is tuple for member in members):
        return _name_or_number
    member = members[0]
    if typing.get_origin(member) is dict:
        return _name_and_number
    if typing.get_origin(member) is tuple:  # the words of a list come one by one
        (member, *_) = _members(typing.get_args(member)[0])

    def convert(word: str) -> object:
        try:
            return member(word)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{shown(word)}; expected {NAMES[member]}") from None

    return convert


def _name_or_tuple(word: str) -> object:
    """A name, or a tuple written as in Python."""
    if not word.startswith("("):
        return word
    try:
        return ast.literal_eval(word)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        raise argparse.ArgumentTypeError(f"{shown(word)}; expected a name, or a tuple as in config.py") from None


def _name_or_number(word: str) -> str | float:
    with contextlib.suppress(ValueError):
        return float(word)
    return word


def _name_and_number(word: str) -> tuple[str, float]:
    """`name=number`."""
    name, _, number = word.partition("=")
    try:
        return name, float(number)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{shown(word)}; expected name=number, such as object=0.5") from None
