"""Checkpoints that hold something else than what a run saves."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch

import export
import predict
import train
from utils.checkpoint import CheckpointError, load_checkpoint
from utils.errors import exit_with_one_sentence

BAD_CHECKPOINTS = {
    "absent": None,
    "empty": b"",
    "truncated": "truncated",
    "text": b"<html>",
    "a state dict": {"fc.weight": torch.zeros(2, 2)},
    "a list": [1, 2],
    "of another version": {
        "settings": {"colour": "blue"},
        "class_names": [],
        "network": {},
        "epoch": 1,
        "selected_on": "",
    },
}


@pytest.mark.parametrize("case", BAD_CHECKPOINTS)
def test_evaluating_a_bad_checkpoint_ends_with_one_sentence(case, single_epoch, tmp_path, capsys, evaluation_script):
    content, path = BAD_CHECKPOINTS[case], tmp_path / "best.pth"
    if content == "truncated":
        path.write_bytes((single_epoch / "best.pth").read_bytes()[:5000])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(SystemExit) as ending, exit_with_one_sentence():
        evaluation_script.main([str(path)])
    assert ending.value.code == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert sentence.startswith("error: ")
    assert str(path) in sentence
    assert not (tmp_path / "report.json").exists()


# what is in the place of an entry, by the path to it
DAMAGES = {
    "no settings": (("settings",), None),
    "settings that are a list": (("settings",), ["resnet"]),
    "a setting without a name": (("settings", 3), 4),
    "options that are a list": (("settings", "options"), [1, 2]),
    "a model that is a list": (("settings", "model"), ["resnet"]),
    "another backbone": (("settings", "backbone"), "resnet34"),
    "no class names": (("class_names",), None),
    "no epoch": (("epoch",), "one"),
    "no weights": (("network",), None),
    "weights of something else": (("network", "elsewhere.weight"), torch.zeros(2)),
    "no optimizer": (("optimizer",), {}),
    "no schedule": (("schedule",), None),
    "no place in the epoch": (("progress",), 3),
    "no best epoch": (("best",), None),
}

OF_TRAINING = {"optimizer", "schedule", "progress", "best"}  # test.py does not look at them


@pytest.mark.parametrize(
    ("script", "damage"),
    [("train", damage) for damage in DAMAGES]
    + [("test", damage) for damage, (way, _) in DAMAGES.items() if way[0] not in OF_TRAINING],
)
def test_a_checkpoint_with_something_else_in_it_is_refused(
    script, damage, single_epoch, tiny_run, tmp_path, capsys, evaluation_script
):
    (*way, name), value = DAMAGES[damage]
    path = tmp_path / single_epoch.name / "last.pth"
    path.parent.mkdir()
    content = load_checkpoint(single_epoch / "last.pth")
    place = content
    for step in way:
        place = place[step]
    place[name] = value
    torch.save(content, path)
    with pytest.raises(SystemExit) as ending, exit_with_one_sentence():
        evaluation_script.main([str(path)]) if script == "test" else train.main(tiny_run(tmp_path))
    assert ending.value.code == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert sentence.startswith("error: ")
    assert str(path) in sentence
    assert [file.name for file in path.parent.iterdir()] == ["last.pth"]


def test_a_checkpoint_of_other_classes_is_refused_naming_both(single_epoch, picture_tree, tmp_path, evaluation_script):
    """One of an older version, which does not say what it was trained on."""
    tree = Path(shutil.copytree(picture_tree, tmp_path / "tree"))
    shutil.copytree(tree / "red", tree / "yellow")
    content = load_checkpoint(single_epoch / "best.pth")
    del content["pictures"]
    content["settings"]["data_root"] = str(tree)
    torch.save(content, tmp_path / "best.pth")
    with pytest.raises(CheckpointError, match=r"knows 3 classes.*has 4 \(1 new, the first is 'yellow'\)"):
        evaluation_script.main([str(tmp_path / "best.pth")])


# what a checkpoint holds, changed in place -> a word of the one sentence
FORGED = {
    "a missing weight": (lambda c: c["network"].popitem(), "classifier"),
    "a weight of another shape": (
        lambda c: c["network"].update({"classifier.bias": torch.zeros(2)}),
        "classifier.bias",
    ),
    "a weight that is NaN": (lambda c: c["network"]["classifier.bias"].fill_(math.nan), "not finite"),
    "a weight that is a list": (lambda c: c["network"].update({"classifier.bias": [0.0, 0.0, 0.0]}), "network"),
    "a sparse weight": (
        lambda c: c["network"].update({"classifier.bias": c["network"]["classifier.bias"].to_sparse()}),
        "plain",
    ),
    "a huge weight of one number": (
        lambda c: c["network"].update({"classifier.bias": torch.zeros(1).expand(1 << 40)}),
        "shape",
    ),
    "more names than outputs": (lambda c: c["class_names"].append("yellow"), "names 4 classes, and has weights for 3"),
    "names that are numbers": (lambda c: c.update(class_names=[1, 2, 3]), "class_names"),
    "settings of another system": (lambda c: c["settings"].update(model="scrim", options={}), "scrim"),
    "settings as text": (lambda c: c.update(settings="resnet18"), "settings"),
    "a number as text": (lambda c: c["settings"].update(input_size="96"), "input_size"),
    "an impossible number": (lambda c: c["settings"].update(dropout=7.0), "dropout"),
    "an unknown backbone": (lambda c: c["settings"].update(backbone="vgg"), "vgg"),
    "no epoch": (lambda c: c.update(epoch=-1), "epoch"),
}


@pytest.mark.parametrize(
    ("script", "case"),
    [
        *(("test", case) for case in FORGED),
        *((script, case) for script in ("predict", "export") for case in ("a missing weight", "an unknown backbone")),
        *(("train", case) for case in list(FORGED)[::3]),  # it has a table of its own, below
    ],
)
def test_forged_checkpoints_are_refused_by_every_program(
    script, case, single_epoch, tiny_run, picture_tree, tmp_path, capsys, evaluation_script
):
    change, word = FORGED[case]
    path = tmp_path / single_epoch.name / "last.pth"
    path.parent.mkdir()
    content = load_checkpoint(single_epoch / "last.pth")
    change(content)
    torch.save(content, path)
    commands = {
        "test": (evaluation_script.main, [str(path)]),
        "predict": (predict.main, ["--checkpoint", str(path), str(picture_tree / "red"), "--out", str(tmp_path / "o")]),
        "export": (export.main, ["--checkpoint", str(path), "--out", str(tmp_path / "model.pt2")]),
        "train": (train.main, tiny_run(tmp_path)),
    }
    main, arguments = commands[script]
    with pytest.raises(SystemExit) as ending, exit_with_one_sentence():
        main(arguments)
    assert ending.value.code == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert sentence.startswith("error: ")
    assert str(path) in sentence
    assert word in sentence or script == "train"  # which compares settings and classes with its own first
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == ["last.pth"]


FORGED_TRAINING = {
    "momentum of another shape": lambda c: c["optimizer"]["state"][0].update(momentum_buffer=torch.zeros(3)),
    "momentum that is infinite": lambda c: c["optimizer"]["state"][0]["momentum_buffer"].fill_(math.inf),
    "a rate as text": lambda c: c["optimizer"]["param_groups"][0].update(lr="fast"),
    "an optimizer without state": lambda c: c["optimizer"].pop("state"),
    "state of another optimizer": lambda c: c["optimizer"].update(param_groups=[{"params": [0], "lr": 0.1}]),
    "an empty schedule": lambda c: c.update(schedule={}),
    "a schedule elsewhere": lambda c: c["schedule"].update(last_epoch=1),
    "a best epoch to come": lambda c: c["best"].update(epoch=5),
    "a best epoch as text": lambda c: c["best"].update(epoch="five"),
    "a step that is not there": lambda c: c.update(
        progress={"epoch": 2, "step": 99, "learning_rate": 0.1, "meter": {}}
    ),
    "sums that are texts": lambda c: c.update(
        progress={
            "epoch": 2,
            "step": 1,
            "learning_rate": 0.1,
            "meter": {"sums": {"a": "b"}, "counts": {"a": 1}, "images": 1},
        }
    ),
    "a record that is none": lambda c: c.update(pictures=torch.zeros(9, dtype=torch.uint8)),
    "a record that is text": lambda c: c.update(pictures="ant"),
}


@pytest.mark.parametrize("case", FORGED_TRAINING)
def test_forged_states_of_training_are_refused(case, single_epoch, tiny_run, tmp_path, capsys):
    path = tmp_path / single_epoch.name / "last.pth"
    path.parent.mkdir()
    content = load_checkpoint(single_epoch / "last.pth")
    FORGED_TRAINING[case](content)
    torch.save(content, path)
    with pytest.raises(SystemExit) as ending, exit_with_one_sentence():
        train.main(tiny_run(tmp_path))
    assert ending.value.code == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert sentence.startswith("error: ")
    assert str(path) in sentence
