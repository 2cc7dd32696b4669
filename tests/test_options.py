"""Settings as dataclasses, from their annotations: what each type takes, refuses and says."""

from __future__ import annotations

import re
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
from setting_values import (
    FIELDS,
    IS_FLAG,
    RECORDS,
    TYPES,
    hint_of,
    is_of,
    junk,
    refused,
    settings_with,
    taken,
    value_in,
)

from config import Settings, complete
from networks import MODELS
from utils import options, shared_settings
from utils.options import Count, Limit, SettingsError, as_annotated, checked, hints, require, with_lists_as_defaults

CUB = ["--dataset", "cub", "--data_root", "somewhere"]


def refusal_of(name: str, value: object, hint: object) -> str:
    """The sentence with which a type refuses a value."""
    with pytest.raises(SettingsError) as refusal:
        as_annotated(name, value, hint)
    sentence = str(refusal.value)
    assert sentence.isprintable()  # and so a single line
    assert sentence.startswith(f"{name} is ")
    return sentence


def name_of_type(hint: object) -> str:
    """Without the addresses that its text holds, which differ from process to process."""
    return re.sub(r", Limit\(.*?\)(?=[],])", "", str(hint)).replace("typing.", "")


# ---- Types and limits -----------------------------------------------------------------------------------------------


def test_every_type_with_limits_has_its_values_in_this_test():
    named = {**vars(options), **vars(shared_settings)}
    limited = {name: hint for name, hint in named.items() if typing.get_origin(hint) is Annotated}
    assert len(limited) > 15
    assert not [name for name, hint in limited.items() if hint not in TYPES]


@pytest.mark.parametrize("hint", TYPES, ids=name_of_type)
def test_a_type_takes_its_outermost_values_and_refuses_the_next(hint):
    allowed, impossible = TYPES[hint]
    for value in allowed:
        result = as_annotated("field", value, hint)
        assert (result, type(result)) == (value, type(value))
        assert is_of(value, hint)
    for value in impossible:
        assert repr(value) in refusal_of("field", value, hint)
        assert not is_of(value, hint)


@pytest.mark.parametrize(("model", "name"), IS_FLAG)
def test_every_field_takes_and_refuses_what_its_type_does(model, name):
    """In the settings of a run, where limits come before contradictions."""
    for value in refused(hint_of(model, name)):
        with pytest.raises(SettingsError) as refusal:
            complete(settings_with(model, name, value))
        assert str(refusal.value).startswith(f"{name} is ")
        assert repr(value) in str(refusal.value)
    for value in taken(hint_of(model, name)):
        assert getattr(checked(RECORDS[model](**{name: value})), name) == value


@pytest.mark.parametrize(("model", "name"), FIELDS)
def test_whatever_a_field_holds_it_is_taken_with_its_type_or_refused_in_a_sentence(model, name):
    for value in junk():
        try:
            settings = complete(settings_with(model, name, value))
        except SettingsError as refusal:
            sentence = str(refusal)
            assert sentence.isprintable(), name
            assert len(sentence) < 800
            assert name in sentence or name == "options"  # its own names are refused by these
        else:
            assert is_of(value_in(settings, model, name), hint_of(model, name)), value


@pytest.mark.parametrize("model", MODELS)
def test_whatever_names_options_have_they_are_refused_in_a_sentence(model):
    for name in ("nonsense", "a\nb\x1b", "", "x" * 100_000, "epochs", "2"):
        with pytest.raises(SettingsError) as refusal:
            complete(Settings(model=model, options={name: 3}))
        sentence = str(refusal.value)
        assert sentence.isprintable()
        assert len(sentence) < 1000
        assert f"is no setting of {model}" in sentence


@pytest.mark.parametrize(
    ("hint", "value", "came", "expected"),
    [
        (Count | None, "3", "'3' (str)", "a whole number or None"),
        (Count | None, 2.5, "2.5 (float)", "a whole number or None"),
        (Count, 16.0, "16.0 (float)", "a whole number"),
        (options.CountOrZero, True, "True (bool)", "a whole number"),
        (int, None, "None (NoneType)", "a whole number"),
        (int, 2**63, f"{2**63} (int)", "64 bits"),
        (options.Share, "0.5", "'0.5' (str)", "a number"),
        (float, True, "True (bool)", "a number"),
        (options.Probability, 10**400, "1000", "64 bits"),
        (bool, 1, "1 (int)", "True or False"),
        (bool, "no", "'no' (str)", "True or False"),
        (shared_settings.Patterns | None, "*_Gull", "'*_Gull' (str)", "('one',)"),
        (tuple[str, ...], "raw", "'raw' (str)", "('one',)"),
        (shared_settings.Epochs, 60, "60 (int)", "(1,)"),
        (tuple[Count, ...], (60, 100.0), "(60, 100.0) (tuple)", "(1,)"),
        (tuple[Count, ...], (60, 0), "(60, 0)", "each to be a whole number of at least 1"),
        (tuple[Count, Count, Count], (48, 96), "(48, 96) (tuple)", "3 whole numbers"),
        (tuple[float, ...], "1.0", "'1.0' (str)", "(0.5,)"),
        (shared_settings.Weights | None, {"raw": "1"}, "{'raw': '1'} (dict)", "{'object': 2.0}"),
        (dict[str, options.Positive], {1: 1.0}, "{1: 1.0} (dict)", "{'object': 2.0}"),
        (dict[str, options.Positive], {"a": 0.0}, "{'a': 0.0}", "each to be a finite number above 0"),
        (Literal["a", "b", "c"], "d", "'d'", "'a', 'b' or 'c'"),
        (Literal["learnable"] | options.Positive, True, "True (bool)", "'learnable' or a number"),
        (Literal["learnable"] | options.Positive, "strong", "'strong'", "'learnable' or a finite number above 0"),
        (Literal["learnable"] | options.Positive | None, 0.0, "0.0", "'learnable' or a finite number above 0"),
        (str | None, Path("x"), f"{Path('x')!r}", "a text in quotes or None"),
        (shared_settings.RunName, "a\nb", "'a\\nb'", "letters"),
        (tuple[int, ...], [10**5000], "cannot be written out (list)", "64 bits"),
        (tuple[tuple[int, str], ...], 3, "3 (int)", "tuple[tuple[int, str], ...]"),
        (hint_of("sgkrl", "windows"), (4, 4), "(4, 4) (tuple)", "((((4, 4), (3, 5)), 2),)"),
        (hint_of("sgkrl", "windows"), ((((4, 4, 4),), 1),), "((((4, 4, 4),), 1),) (tuple)", "((((4, 4), (3, 5)), 2),)"),
        (hint_of("sgkrl", "windows"), "fish", "'fish'", "'birds', 'vehicles' or groups"),
        (hint_of("sgkrl", "without"), ("windows",), "('windows',)", "'fusion', 'weighting', both or nothing"),
        (hint_of("sgkrl", "without"), ("fusion", "fusion"), "('fusion', 'fusion')", "both or nothing"),
        (hint_of("flrdf", "suppression"), "strong", "'strong'", "'learnable' or a share above 0, at most 1"),
        (hint_of("flrdf", "suppression"), 0.0, "0.0", "'learnable' or a share above 0, at most 1"),
        (hint_of("scrim", "anchor_sizes"), (48, 96, 0), "(48, 96, 0)", "at least 1"),
    ],
)
def test_what_is_refused_is_told_with_what_came_and_what_was_expected(hint, value, came, expected):
    sentence = refusal_of("field", value, hint)
    assert came in sentence
    assert expected in sentence.split("; expected ")[1]


@pytest.mark.parametrize(
    ("hint", "value", "meant"),
    [
        (options.Probability, 1, 1.0),
        (hint_of("flrdf", "suppression"), 1, 1.0),
        (shared_settings.Patterns, ["a"], ("a",)),
        (tuple[Count, Count, Count], [1, 2, 3], (1, 2, 3)),
        (hint_of("mmal", "windows"), [[[[5, 5]], 1]], ((((5, 5),), 1),)),
        (shared_settings.Weights, {"object": 2}, {"object": 2.0}),
        (hint_of("sgkrl", "without"), ["weighting", "fusion"], ("weighting", "fusion")),
    ],
)
def test_what_is_meant_is_taken(hint, value, meant):
    result = as_annotated("field", value, hint)
    assert (result, repr(result)) == (meant, repr(meant))


Even = Annotated[Count, Limit(lambda n: n % 2 == 0, "an even number")]


@dataclass(frozen=True)
@with_lists_as_defaults
class Options:
    sides: tuple[int, ...] = [2, 4]
    side: Even = 2


def test_limits_may_follow_each_other_and_a_default_may_be_a_list():
    assert Options().sides is not Options().sides
    assert checked(Options()) == Options(sides=(2, 4))
    assert "an even number" in refusal_of("side", 3, hints(Options)["side"])
    assert "at least 1" in refusal_of("side", 0, hints(Options)["side"])


def test_a_contradiction_is_told_in_the_same_words():
    require(True, "side", 3, "even")
    with pytest.raises(SettingsError, match="^side is 3; expected an even number$"):
        require(False, "side", 3, "an even number")
