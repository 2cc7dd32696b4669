"""Settings as dataclasses: every field says its type and limits in its annotation, and is checked by them here.

    epochs: Count | None = None          # how often every training image is seen
    schedule: Literal["steps", "one_cycle"] = "steps"

`config.Settings` and the `Options` of every system are such dataclasses; `utils.flags` makes flags of
their fields. Needs the standard library only.
"""

from __future__ import annotations

import builtins
import copy
import dataclasses
import difflib
import functools
import inspect
import math
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NamedTuple, TypeVar

from utils.errors import UserError

Record = TypeVar("Record")


class SettingsError(UserError):
    """A setting that cannot be, said in one sentence."""


class Limit(NamedTuple):
    """What a value of the annotated type must be, for a test and in words."""

    allows: Callable[[typing.Any], bool]
    expected: str


Count = Annotated[int, Limit(lambda n: n >= 1, "a whole number of at least 1")]
CountOrZero = Annotated[int, Limit(lambda n: n >= 0, "a whole number of at least 0")]
Share = Annotated[float, Limit(lambda x: 0 <= x < 1, "a number from 0 to less than 1")]
Probability = Annotated[float, Limit(lambda x: 0 <= x <= 1, "a probability from 0 to 1")]
Positive = Annotated[float, Limit(lambda x: 0 < x < math.inf, "a finite number above 0")]
PositiveOrZero = Annotated[float, Limit(lambda x: 0 <= x < math.inf, "a finite number of at least 0")]

# What types are called in a sentence
NAMES: dict[object, str] = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "a text in quotes",
    types.NoneType: "None",
    tuple[str, ...]: "texts such as ('one',) or ('one', 'two')",
    tuple[int, ...]: "whole numbers such as (1,) or (1, 2)",
    tuple[float, ...]: "numbers such as (0.5,) or (0.5, 2.0)",
    dict[str, float]: "numbers by name such as {'object': 2.0}",
    dict[str, typing.Any]: "values by name such as {'graph_neighbours': 2}",
}


def with_lists_as_defaults(settings: type) -> type:
    """Let [60, 100] and {"object": 2.0} stand behind a dataclass's field, which it would refuse: put it below."""
    for name in settings.__annotations__:
        default = getattr(settings, name, None)
        if isinstance(default, list | dict | set):
            setattr(settings, name, dataclasses.field(default_factory=functools.partial(copy.deepcopy, default)))
    return settings


# ---- What a field may hold ------------------------------------------------------------------------------------------


@functools.cache
def hints(record: type) -> dict[str, object]:
    """Return the annotation of every field of a dataclass. Raises SettingsError where one of them is no type."""
    try:
        return typing.get_type_hints(record, include_extras=True)
    except Exception as error:  # whatever the words in an annotation lead to
        raise SettingsError(_slip_in_annotations(record, error)) from error


def _slip_in_annotations(record: type, error: Exception) -> str:
    """Name the first annotation that is no type, with its file and line."""
    module = sys.modules[record.__module__]
    for name, annotation in record.__annotations__.items():
        try:
            typing.get_type_hints(types.SimpleNamespace(__annotations__={name: annotation}), vars(module))
        except Exception as slip:
            lines, start = inspect.getsourcelines(record)
            line = next((n for n, text in enumerate(lines, start) if text.startswith(f"    {name}:")), start)
            wrong = getattr(slip, "name", None)
            near = difflib.get_close_matches(wrong or "", [*vars(module), *dir(builtins)], n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            place = f"{Path(inspect.getfile(record)).name} line {line}"
            return f"{place}: {annotation!r} of {name} is no type: {slip}{hint}"
    return f"the types of {record.__name__}'s fields cannot be read: {error}"


def checked(record: Record) -> Record:
    """Return a dataclass with every value as its annotation says. Raises SettingsError, naming field and value.

    Lists become tuples, and whole numbers become floats where those are meant.
    """
    values = {name: as_annotated(name, getattr(record, name), hint) for name, hint in hints(type(record)).items()}
    return dataclasses.replace(record, **values)


def as_annotated(name: str, value: object, hint: object) -> typing.Any:
    """Return the value as a plain one of the annotated type and within its limits. Raises SettingsError."""
    try:
        return _converted(value, hint)
    except TypeError:
        sentence = f"{name} is {shown(value)} ({type(value).__name__}); expected {_expected(hint)}"
    except OverflowError:
        sentence = f"{name} is {shown(value)} ({type(value).__name__}); expected a smaller number, of 64 bits"
    except _BeyondLimit as error:
        sentence = f"{name} is {shown(value)}; expected {error}"
    raise SettingsError(sentence)


class _BeyondLimit(Exception):
    """A value of the right type that is not within its limits; the text is what was expected."""


def _converted(value: typing.Any, hint: typing.Any) -> object:
    kind, parts = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind is Annotated:
        value = _converted(value, parts[0])
        for limit in parts[1:]:
            if not limit.allows(value):
                raise _BeyondLimit(limit.expected)
        return value
    if kind in (types.UnionType, typing.Union):
        return _of_a_member(value, parts)
    if kind is typing.Literal:
        if not any(value == choice and type(value) is type(choice) for choice in parts):
            raise _BeyondLimit(_expected(hint)) if isinstance(value, type(parts[0])) else TypeError
        return value
    if kind is typing.Any:
        return value
    if kind is tuple and isinstance(value, tuple | list):
        parts = parts[:1] * len(value) if parts[-1] is ... else parts
        if len(value) != len(parts):
            raise TypeError
        return tuple(_of_several(item, part) for item, part in zip(value, parts, strict=True))
    if kind is dict and isinstance(value, dict):
        return {_of_several(name, parts[0]): _of_several(item, parts[1]) for name, item in value.items()}
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:  # not isinstance: True is no number
        raise TypeError
    if kind is int and not -(2**63) <= value < 2**63:
        raise OverflowError
    return value


def _of_a_member(value: object, members: tuple[object, ...]) -> object:
    """The value as the first type of a union that takes it. Raises what is known about it otherwise."""
    if value is None and types.NoneType in members:  # at once: most settings are left at None
        return None
    expected, beyond = [], False
    for member in members:
        try:
            return _converted(value, member)
        except TypeError:
            expected += [] if member is types.NoneType else [_expected(member, limits=True)]
        except _BeyondLimit as error:
            expected, beyond = [*expected, str(error)], True
    raise _BeyondLimit(" or ".join(expected)) if beyond else TypeError


def _of_several(item: object, hint: object) -> object:
    """One of the values in a tuple or dict."""
    try:
        return _converted(item, hint)
    except _BeyondLimit as error:
        raise _BeyondLimit(f"each to be {error}") from None


def _expected(hint: typing.Any, *, limits: bool = False) -> str:
    """What a type is called, with its limits or, where it has a name of its own, without."""
    kind, parts = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind in (types.UnionType, typing.Union):
        return " or ".join(_expected(part, limits=limits) for part in parts)
    if kind is typing.Literal:
        *most, last = map(repr, parts)
        return f"{', '.join(most)} or {last}" if most else last
    if kind is Annotated:
        return parts[1].expected if limits else NAMES.get(parts[0], parts[1].expected)
    plain = _without_limits(hint)
    if kind is tuple and len(set(plain.__args__)) == 1 and (several := NAMES.get(tuple[plain.__args__[0], ...])):
        return f"{len(parts)} {several.partition(' such as ')[0]}"
    return NAMES.get(plain, str(plain))


def _without_limits(hint: typing.Any) -> typing.Any:
    kind, parts = typing.get_origin(hint), typing.get_args(hint)
    if kind is Annotated:
        return _without_limits(parts[0])
    return kind[tuple(map(_without_limits, parts))] if kind in (tuple, dict) else hint


def require(condition: bool, name: str, value: object, expected: str) -> None:
    """Raise SettingsError, in the words of all of them, where a setting contradicts others."""
    if not condition:
        raise SettingsError(f"{name} is {shown(value)}; expected {expected}")


def flat(settings: typing.Any) -> dict[str, object]:
    """Return all settings of a run by name, the system's own `options` among the others."""
    values = dataclasses.asdict(settings)
    return values | values.pop("options")


def shown(value: object) -> str:
    """The value as Python writes it, in one line that is not too long."""
    try:
        return shortened(" ".join(repr(value).splitlines()))
    except Exception:  # more digits, or deeper nested, than Python writes
        return "a value that cannot be written out"


def shortened(text: str) -> str:
    return text if len(text) <= 400 else f"{text[:400]}..."
