"""Slips in config.py, one at a time, in a copy of it: a sentence with file, line and the nearest name."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import sys
from pathlib import Path

import pytest
from launching import PROJECT

from config import Settings
from utils.config_slips import check_edited, config_as_edited, names_what_is_absent
from utils.errors import exit_with_one_sentence
from utils.options import SettingsError, hints
from utils.shared_settings import READ

# what stands in config.py, what somebody makes of it -> words of the sentence, beside the line
SLIPS = {
    "a key in a table": ('    "batch_size": 40,', '    "batchsize": 40,', ["batchsize in PUBLISHED", "batch_size?"]),
    "a key in a data set's table": ('        "epochs": 11,', '        "epoch": 11,', ["table of demo", "epochs?"]),
    "a field renamed": ("    seed: CountOrZero", "    sed: CountOrZero", ["no setting seed", "has sed"]),
    "a field removed that is read late": (
        "    keep_checkpoints: ",
        "    # keep_checkpoints: ",
        ["keep_checkpoints in Set"],
    ),
    "a field of a table renamed": (
        "    dropout: Share",
        "    droput: Share",
        ["dropout in PUB", "droput?"],
    ),
    "a field without a type": ("    seed: CountOrZero = 0", "    seed = 0", ["seed has no type"]),
    "a value without quotes": (
        '    model: str = "sgkrl"',
        "    model: str = sgkrl",
        ["sgkrl is not defined", '"sgkrl"'],
    ),
    "a misspelt word": ("    fresh: bool = False", "    fresh: bool = Flase", ["Flase", "False?"]),
    "an unknown annotation": ("    seed: CountOrZero", "    seed: CuontOrZero", ["CuontOrZero", "CountOrZero?"]),
    "an annotation that is none": ("    seed: CountOrZero", "    seed: CountOrZero[3]", ["CountOrZero[3]", "seed"]),
    "a field without a value": ("    fresh: bool = False", "    fresh: bool", ["fresh", "default"]),
    "a bracket left open": ("    fresh: bool = False", "    fresh: bool = (False", ["was never closed"]),
    "a quote left open": ('    model: str = "sgkrl"', '    model: str = "sgkrl', ["unterminated"]),
    "a line moved in": ("    fresh: bool = False", "      fresh: bool = False", ["indent"]),
    "a module that is not there": ("import dataclasses", "import dataclases, dataclasses", ["dataclases"]),
    "a table that is none": ('    "cub": {},', '    "cub": None,', ["table of cub is None"]),
    "saved as Latin-1": ("    fresh: bool = False", "    fresh: bool = False  # M\xf6we", ["not UTF-8"]),
}


@pytest.mark.parametrize("case", SLIPS)
def test_a_slip_in_config_py_is_one_sentence_with_its_line(case, tmp_path, capsys):
    before, after, words = SLIPS[case]
    text = (PROJECT / "config.py").read_text(encoding="utf-8")
    assert text.count(f"\n{before}") == 1
    at = text[: text.index(f"\n{before}")].count("\n") + 2
    path = tmp_path / "config.py"
    path.write_bytes(text.replace(f"\n{before}", f"\n{after}").encode("latin-1" if "Latin" in case else "utf-8"))
    specification = importlib.util.spec_from_file_location("edited_config", path)
    module = importlib.util.module_from_spec(specification)
    sys.modules["edited_config"] = module
    try:
        with pytest.raises(SystemExit) as ending:
            with config_as_edited(path):
                specification.loader.exec_module(module)
            with exit_with_one_sentence():
                settings = module.parse_settings([])
                assert settings.seed == 0
    finally:
        del sys.modules["edited_config"]
    assert ending.value.code == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert sentence.startswith("error: config.py")
    assert all(word in sentence for word in words), sentence
    line = re.search(r"config\.py line (\d+)", sentence)
    if case not in ("a table that is none", "a field renamed", "a field of a table renamed") and "removed" not in case:
        assert int(line[1]) in (at, at - 1), sentence
    elif case == "a field renamed":
        assert f"line {at} has sed" in sentence


def test_every_field_that_is_no_longer_there_is_missed_before_anything_else():
    """Also those that nothing reads before the end of an epoch."""
    assert list(hints(Settings)) == list(READ)
    for name in READ:
        rest = dataclasses.make_dataclass("Settings", [(other, object) for other in READ if other != name])
        with pytest.raises(SettingsError, match=f"config.py has no setting {name} in Settings"):
            check_edited(rest, {}, read=READ, path="config.py", options=())


def test_a_removed_field_is_not_taken_for_another_that_is_there():
    kept = [(name, object, None) for name in READ if name != "keep_checkpoints"]  # checkpoint_dir is like it
    for fields, words in ((kept, r"any more; put it back"), ([*kept, ("keep_checkpoint", object, None)], "may have")):
        edited = names_what_is_absent(READ)(dataclasses.make_dataclass("Settings", fields))
        with pytest.raises(SettingsError, match=words):
            check_edited(edited, {}, read=READ, path="config.py", options=())
        with pytest.raises(SettingsError, match=words):
            _ = edited().keep_checkpoints


def test_faults_elsewhere_keep_their_traceback():
    with pytest.raises(ModuleNotFoundError), config_as_edited(Path("config.py")):
        import no_such_module  # noqa: F401
