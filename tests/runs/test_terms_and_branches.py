"""Which terms of the loss a run trains and logs, and which branches it evaluates and reports."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from cases import slow_but_for
from whole_runs import TWO_EPOCHS, assert_same_run, interrupt_in_epoch, read_events, read_log

import train
from networks import MODELS, build_network
from utils.training.building import note_on_untrained

# What the other systems log: terms in training, terms in evaluation, branches in evaluation.
LOGGED = {
    "mmal": (("raw", "object", "window"), ("raw", "object"), ("raw", "object")),
    "flrdf": (("raw", "object", "jigsaw"), ("raw", "object"), ("raw", "object")),
    "scrim": (
        ("raw", "part", "concat", "ranking", "contrastive"),
        ("raw", "part", "concat", "ranking"),
        ("raw", "part", "concat"),
    ),
}


@pytest.fixture(scope="module", params=slow_but_for(["mmal"], ["mmal", "flrdf", "scrim"]))
def other_system(request, tiny_run, runs) -> tuple[str, Path]:
    """The name of a system and the folder of its run over two epochs, the first of which trains `raw` only."""
    train.main(tiny_run(runs, *TWO_EPOCHS, "--warmup_epochs", "1", "--pictures_every", "1", model=request.param))
    return request.param, runs / f"folder-{request.param}"


def test_every_system_logs_and_reports_its_terms_and_branches(other_system, tmp_path, evaluation_script):
    model, folder = other_system
    terms, evaluated_terms, branches = LOGGED[model]
    first, second = read_log(folder)
    for line, trained in ((first, ("raw",)), (second, terms)):
        for split, expected in (("train", trained), ("validation", evaluated_terms)):
            logged = {name.removeprefix(f"{split}/loss/") for name in line if name.startswith(f"{split}/loss/")}
            assert logged == {*expected, "total"}, split
        accuracies = {n.rpartition("/")[2] for n in line if n.startswith("validation/accuracy/")}
        assert accuracies == {*branches, "prediction"}
    assert set(read_events(folder).Tags()["scalars"]) == {name for name in second | first if name != "epoch"}
    weights = {"contrastive": 0.5}
    for split, expected in (("train", terms), ("validation", evaluated_terms)):
        total = sum(weights.get(name, 1.0) * second[f"{split}/loss/{name}"] for name in expected)
        assert second[f"{split}/loss/total"] == pytest.approx(total, rel=1e-6)
    assert (folder / "pictures" / "epoch-002.png").is_file()

    copy = Path(shutil.copytree(folder, tmp_path / folder.name))
    evaluation_script.main([str(copy / "last.pth")])
    report = json.loads((copy / "report-last.json").read_text(encoding="utf-8"))
    assert report["branches"].keys() == {*branches, "prediction"}
    prediction = {"mmal": "object", "flrdf": "mean probability of raw, object", "scrim": "concat"}
    assert report["prediction"] == prediction[model]


def test_every_system_continues_as_if_never_stopped(other_system, tiny_run, tmp_path, monkeypatch):
    model, folder = other_system
    options = ("--warmup_epochs", "1", "--pictures_every", "1", "--workers", "1")
    arguments = tiny_run(tmp_path, *TWO_EPOCHS, *options, model=model)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_in_epoch(patch, 2)
        train.main(arguments)
    train.main(arguments)
    assert_same_run(folder, tmp_path / folder.name)


def test_loss_weights_reach_the_loss(tiny_run, tmp_path):
    options = ("--warmup_epochs", "0", "--loss_weights", "object=0.25", "window=0")
    train.main(tiny_run(tmp_path, *options, model="mmal"))
    (line,) = read_log(tmp_path / "folder-mmal")
    assert "train/loss/window" not in line
    total = line["train/loss/raw"] + 0.25 * line["train/loss/object"]
    assert line["train/loss/total"] == pytest.approx(total, rel=1e-6)


# raw and fused train sgkrl, its other branches are not in the loss
FEW_LOSSES = ("--warmup_epochs", "0", "--loss_weights", "window=0", "graph=0", "object=0")


def test_branches_that_nothing_trains_are_evaluated_for_the_prediction_only(tiny_run, tmp_path, evaluation_script):
    options = (*FEW_LOSSES, "--prediction", "raw", "object")
    train.main(tiny_run(tmp_path, *options, model="sgkrl"))
    (line,) = read_log(tmp_path / "folder-sgkrl")
    evaluated = {name.rpartition("/")[2] for name in line if name.startswith("validation/accuracy/")}
    assert evaluated == {"raw", "fused", "object", "prediction"}
    evaluation_script.main([str(tmp_path / "folder-sgkrl" / "last.pth")])
    report = json.loads((tmp_path / "folder-sgkrl" / "report-last.json").read_text(encoding="utf-8"))
    assert report["branches"].keys() == evaluated


def test_the_exit_curve_asks_for_branches_that_evaluation_leaves_out(tiny_run, tmp_path, evaluation_script, capsys):
    options = (*FEW_LOSSES, "--prediction", "raw", "fused")
    train.main(tiny_run(tmp_path, *options, model="sgkrl"))
    evaluation_script.main([str(tmp_path / "folder-sgkrl" / "last.pth"), "--exit_curve"])
    assert "early exit, measured on" in capsys.readouterr().out


@pytest.mark.parametrize("model", MODELS)
def test_of_a_prediction_that_is_not_trained_a_note_is_made(model):
    with torch.device("meta"):
        network = build_network(model, num_classes=3, backbone="resnet18", input_size=96)
    assert note_on_untrained(network, network.loss_weights) is None
    without = {**network.loss_weights, **dict.fromkeys(network.prediction, 0.0)}
    lost = [name for name in network.prediction if network.loss_weights.get(name)]
    note = note_on_untrained(network, without)
    assert note is None if not lost else note.startswith(f"{', '.join(lost)} of the prediction is not trained")


def test_branches_to_report_may_be_chosen(other_system, tmp_path, evaluation_script):
    model, folder = other_system
    copy = Path(shutil.copytree(folder, tmp_path / folder.name))
    asked, reported = {
        "mmal": ("window", {"raw", "object", "window"}),
        "flrdf": ("raw", {"raw", "object"}),
        "scrim": ("raw", {"raw", "concat"}),
    }[model]
    evaluation_script.main([str(copy / "last.pth"), "--branches", asked])
    report = json.loads((copy / "report-last.json").read_text(encoding="utf-8"))
    assert report["branches"].keys() == {"prediction", *reported}
    with pytest.raises(ValueError, match="crown"):
        evaluation_script.main([str(copy / "last.pth"), "--branches", "crown"])
