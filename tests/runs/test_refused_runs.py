"""Runs that are refused before anything is written, and how programs end."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from launching import run_script

import datasets
import train
from config import SettingsError
from utils.errors import Stopped, exit_with_one_sentence
from utils.training.nonfinite import NonFiniteLossError


@pytest.mark.parametrize(
    ("flag", "values", "word"),
    [
        ("backbone", ["resnet9"], "resnet9"),
        ("spatial_weights", ["tangled"], "tangled"),
        ("graph_scope", ["batch"], "graph_scope"),
        ("windows", ["fish"], "fish"),
        ("windows", ["((((14, 14),), 5),)"], "5"),
        ("windows", ["(1, 2)"], "windows"),
        ("prediction", ["raw", "tail"], "tail"),
        ("pretrained", ["missing.pth"], "missing.pth"),
        ("pretrained", ["IMAGENET"], "IMAGENET"),
        ("stride_on_first_conv", [], "stride_on_first_conv"),
        ("data_root", ["nowhere"], "nowhere"),
        ("classes", ["pur*"], "pur*"),
        ("loss_weights", ["crown=1"], "crown"),
        ("class_weights", ["1", "2"], "class_weights has 2 numbers and the data 3 classes"),
        ("mixup", ["0.2"], "mixup"),
        ("loss_weights", ["raw=0", "fused=0", "object=0", "window=0", "graph=0"], "loss_weights"),
    ],
)
def test_what_cannot_be_built_is_refused_before_anything_is_written(tiny_run, tmp_path, flag, values, word):
    with pytest.raises((ValueError, OSError)) as refusal:
        train.main(tiny_run(tmp_path, f"--{flag}", *values, model="sgkrl"))
    sentence = str(refusal.value)
    assert word in sentence
    assert len(sentence.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_an_impossible_value_ends_with_one_line(tiny_run, tmp_path):
    result = run_script("train.py", *tiny_run(tmp_path), "--input_size", "100")
    assert result.returncode == 2
    assert re.fullmatch(r"error: input_size is 100; .*multiple of 32.*\n", result.stderr)
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_flag_ends_with_its_name(tiny_run, tmp_path):
    result = run_script("train.py", *tiny_run(tmp_path), "--imput_size", "96")
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "--imput_size" in result.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_a_broken_picture_met_by_a_worker_ends_with_one_line(tiny_run, picture_tree, tmp_path, capsys, monkeypatch):
    """One that was whole when the run began."""
    monkeypatch.setattr(datasets, "find_bad_pictures", lambda entries, **options: {})
    tree = Path(shutil.copytree(picture_tree, tmp_path / "tree"))
    for path in tree.glob("red/*.png"):
        path.write_bytes(b"not a picture")
    with pytest.raises(SystemExit) as ending, exit_with_one_sentence():
        train.main(tiny_run(tmp_path / "runs", "--data_root", str(tree), "--workers", "1"))
    assert ending.value.code == 2
    assert re.fullmatch(r"error: \S*tree/red/\d\.png cannot be read as a picture.*\n", capsys.readouterr().err)


def test_evaluation_of_an_absent_checkpoint_ends_with_one_line(tmp_path, capsys, evaluation_script):
    with pytest.raises(SystemExit) as ending, exit_with_one_sentence():
        evaluation_script.main([str(tmp_path / "best.pth")])
    assert ending.value.code == 2
    assert re.fullmatch(r"error: .*best\.pth.*\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("error", "code", "word"),
    [
        (SettingsError("epochs is 0"), 2, "error: epochs is 0"),
        (OSError(28, "No space left on device"), 2, "No space left"),
        (NonFiniteLossError("no longer finite"), 1, "error: no longer finite"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_errors_that_a_user_can_mend_end_with_one_line(error, code, word, capsys):
    with pytest.raises(SystemExit) as ending, exit_with_one_sentence():
        raise error
    assert ending.value.code == code
    (line,) = capsys.readouterr().err.splitlines()
    assert word in line


def test_of_several_processes_each_tells_its_own_error_and_one_what_all_agreed_on(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setattr(sys, "argv", ["train.py", "--fresh"])
    for error in (SettingsError("no GPU of its own"), Stopped(), NonFiniteLossError("no longer finite")):
        with pytest.raises(SystemExit), exit_with_one_sentence():
            raise error
    assert capsys.readouterr().err == "[process 2] error: no GPU of its own\n"
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit), exit_with_one_sentence(training=True):
        raise Stopped
    assert capsys.readouterr().err.endswith("with the same command, without --fresh\n")


def test_faults_keep_their_traceback():
    with pytest.raises(KeyError), exit_with_one_sentence():
        {}["a"]
    with pytest.raises(json.JSONDecodeError), exit_with_one_sentence():
        json.loads("{")  # raised inside a library, by nothing that the user gave
    with pytest.raises(ValueError, match="invalid literal"), exit_with_one_sentence():
        int("a slip on a line of ours")
    with pytest.raises(OSError, match="descriptor"), exit_with_one_sentence():
        os.close(10**6)
