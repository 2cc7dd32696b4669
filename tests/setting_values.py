"""Values of settings by their annotations: what each type takes, what it refuses, and the words for it after a flag.

So tests reach every field of `config.Settings` and of every system's `Options` without a table of fields.
"""

from __future__ import annotations

import importlib.util
import math
import re
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import pytest

import config
from config import Settings
from networks import MODELS, find_system
from networks.windows import Windows
from utils import options, shared_settings
from utils.options import hints

CUB = {"dataset": "cub", "data_root": "somewhere"}
NAN, INF = math.nan, math.inf
BIGGEST = 2**63 - 1

# by type: values that are taken, the outermost ones among them, and the first that are refused
TYPES: dict[object, tuple[list, list]] = {
    options.Count: ([1, 3, 448, BIGGEST], [0, -1, -96]),
    options.CountOrZero: ([0, 1, 40, BIGGEST], [-1]),
    options.Share: ([0.0, 0.25, 0.999], [1.0, -0.1, NAN]),
    options.Probability: ([0.0, 0.9, 1.0], [1.5, -0.5, NAN]),
    options.Positive: ([1e-300, 0.02, 5.0], [0.0, -1e-3, NAN, INF]),
    options.PositiveOrZero: ([0.0, 10.0], [-1e-4, NAN, INF]),
    shared_settings.Folder: (["runs", "a b/c", "."], ["", "a" * 300, "a\0b", "\ud800", "~nobody-of-that-name/x"]),
    shared_settings.SideOfInput: ([96, 224, 448], [0, 64, 95, 100, -96]),
    shared_settings.Device: (
        ["auto", "cpu", "mps", "cuda", "cuda:1"],
        ["abacus", "cuda:", "cuda:123", "cuda:\u0661"],
    ),
    shared_settings.Patterns: ([("*_Gull", "Crow"), ("a",)], [(), ("a*", "")]),
    shared_settings.Branches: ([("raw", "object"), ("raw",)], [(), ("raw", "raw")]),
    shared_settings.RunName: (["ok_1.2+b-c", "try1"], ["a/b", "", ".. ", "a\nb"]),
    shared_settings.Fraction: ([0.001, 0.3], [0.0, 1.0, NAN]),
    shared_settings.Alpha: ([0.0, 0.01, 0.2, 100.0], [0.001, -0.2, 101.0, NAN]),
    shared_settings.PartOfArea: ([0.01, 0.5, 1.0], [0.001, -0.5, 1.1, NAN]),
    shared_settings.Degrees: ([0.0, 15.0, 180.0], [-1.0, 181.0, NAN]),
    shared_settings.Epochs: ([(), (3, 5), (1,)], [(0,), (60, -5)]),
    shared_settings.Weights: ([{}, {"object": 2.0, "raw": 0.0}], [{"raw": -1.0}, {"raw": NAN}, {"raw": INF}]),
    shared_settings.Processes: ([0, 4, 1024], [-1, 1025]),
    shared_settings.Batches: ([1, 4, 1024], [0, 1025]),
    Windows: (
        ["birds", "vehicles", ((((4, 4), (3, 5)), 2), (((8, 8),), 1))],
        ["fish", (), ((((4, 0),), 1),), (((), 1),)],
    ),
    int: ([0, -7, BIGGEST], []),
    float: ([0.5, -2.0], []),
    bool: ([True, False], []),
    str: (["a b/c", "*_Gull", "weights.pth"], []),
}
# where a type is new to this table, its own limits tell these apart
PROBES = {int: [-1, 0, 1, 2, 3, 4, 16, 32], float: [-0.5, 0.0, 0.25, 0.5, 1.0, 1.5, NAN], str: ["fish"], tuple: [()]}

RECORDS = {"": Settings} | {model: find_system(model).Options for model in MODELS}
# (model or "" for what all share, field)
FIELDS = [(model, name) for model, record in RECORDS.items() for name in hints(record)]
IS_FLAG = [(model, name) for model, name in FIELDS if (model, name) != ("", "options")]


def hint_of(model: str, name: str) -> Any:
    return hints(RECORDS[model])[name]


def members(hint: Any) -> tuple:
    """The types of a union but None, or the type itself."""
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union) and hint not in TYPES
    return tuple(part for part in typing.get_args(hint) if part is not type(None)) if is_union else (hint,)


def is_of(value: object, hint: Any) -> bool:
    """Does a value have the annotated type and keep its limits, the items of a tuple included?"""
    kind, parts = typing.get_origin(hint), typing.get_args(hint)
    if kind in (types.UnionType, typing.Union):
        return any(is_of(value, part) for part in parts)
    if kind is Annotated:
        return is_of(value, parts[0]) and all(limit.allows(value) for limit in parts[1:])
    if kind is Literal:
        return any(value == choice and type(value) is type(choice) for choice in parts)
    if kind is tuple and parts[-1] is ...:
        return type(value) is tuple and all(is_of(item, parts[0]) for item in value)
    if kind is tuple:
        return type(value) is tuple and len(value) == len(parts) and all(map(is_of, value, parts))
    if kind is dict:
        return type(value) is dict and all(is_of(k, parts[0]) and is_of(v, parts[1]) for k, v in value.items())
    return hint is Any or type(value) is hint


def taken(hint: Any) -> list:
    """Values that an annotation takes, its outermost ones among them."""
    return [value for member in members(hint) for value in _values(member, refused=False)]


def refused(hint: Any) -> list:
    """Values of the right types that an annotation refuses."""
    found = [value for member in members(hint) for value in _values(member, refused=True)]
    return [value for value in found if not is_of(value, hint)]


def _values(hint: Any, *, refused: bool) -> list:
    if hint in TYPES:
        return TYPES[hint][refused]
    kind, parts = typing.get_origin(hint), typing.get_args(hint)
    if kind is Literal:
        other = {str: "something else", int: 8, bool: None}[type(parts[0])]
        return [other] if refused else list(parts)
    if kind is Annotated:
        base = typing.get_origin(parts[0]) or parts[0]
        values = [*PROBES[base], *(_values(parts[0], refused=False) if base is tuple else ())]
        return [value for value in values if all(limit.allows(value) for limit in parts[1:]) != refused]
    if kind is tuple and parts[-1] is ...:
        return [(item,) for item in _values(parts[0], refused=refused)] + ([] if refused else [()])
    if kind is tuple:
        others = [_values(part, refused=False)[0] for part in parts[1:]]
        return [(item, *others) for item in _values(parts[0], refused=refused)]
    if kind is dict:
        return [{"object": item} for item in _values(parts[1], refused=refused)]
    raise AssertionError(f"there is no value of the type {hint} to try")


def default_of(model: str, name: str) -> object:
    return getattr(RECORDS[model](), name)


def words(value: object) -> list[str]:
    """The words behind a flag that stand for a value."""
    if isinstance(value, tuple) and not any(isinstance(item, tuple) for item in value):
        return [str(item) for item in value]
    if isinstance(value, dict):
        return [f"{name}={number}" for name, number in value.items()]
    return [str(value)]


def settings_with(model: str, name: str, value: object, **others: object) -> Settings:
    """Settings for CUB that hold a value, as their own or among the options of a system."""
    given = {"model": model, "options": {name: value}} if model else {name: value}
    return Settings(**(CUB | others | given))


def value_in(settings: Settings, model: str, name: str) -> object:
    return settings.options[name] if model else getattr(settings, name)


def junk() -> Iterator[object]:
    """Values as somebody may write them into config.py by mistake, and worse ones."""
    yield from (
        None,
        True,
        3,
        2.5,
        16.0,
        "3",
        "*_Gull",
        b"x",
        (),
        ("a",),
        (1,),
        [1, "a"],
        {},
        {"a": "b"},
        {1: 1.0},
        {1},
    )
    yield from (NAN, INF, -INF, -1, 0, 2**63, 10**400, -(10**5000), [10**5000], "a\nb\x1b\u2028", "", "\0", "\ud800")
    yield from ("x" * 100_000, (((1, 2),),), [[[[5, 5]], 1]], [[]], Path("x"))
    last = [object(), print, range(3), Ellipsis]
    yield from last
    yield last
    endless: list = []
    endless.append(endless)
    yield endless


def edited_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **values: object) -> ModuleType:
    """config.py as a user leaves it who wrote other values behind some of the fields."""
    text = Path(config.__file__).read_text(encoding="utf-8")
    for name, value in values.items():
        text, count = re.subn(
            rf"^(    {name}: [^=]+= )[^#\n]*?(  #.*)?$", rf"\g<1>{value!r}\g<2>", text, flags=re.MULTILINE
        )
        assert count == 1, name
    return written_config(text, tmp_path, monkeypatch)


def written_config(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """config.py with another text."""
    path = tmp_path / "edited_config.py"
    path.write_text(text, encoding="utf-8")
    specification = importlib.util.spec_from_file_location("edited_config", path)
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "edited_config", module)
    specification.loader.exec_module(module)
    return module
