"""Runs that keep an average of their weights."""

from __future__ import annotations

import dataclasses
import json
import os
import re

import pytest
import torch
from whole_runs import read_events, read_log

import datasets
import export
import predict
import train
from config import rebuilt
from datasets import read_catalogue
from utils.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from utils.training.building import load_trained


def test_averaged_weights_are_evaluated_saved_and_choose_the_best_epoch(averaged):
    lines = read_log(averaged)
    names = {name.removeprefix("validation/") for name in lines[0] if name.startswith("validation/")}
    assert names == {n.removeprefix("validation_ema/") for n in lines[0] if n.startswith("validation_ema/")}
    tags = set(read_events(averaged).Tags()["scalars"])
    assert {f"{group}/{name}" for group in ("validation", "validation_ema") for name in names} <= tags
    assert any(line["validation_ema/loss/total"] != line["validation/loss/total"] for line in lines)
    accuracies = {line["epoch"]: line["validation_ema/accuracy/prediction"] for line in lines}
    best_epoch = max(accuracies, key=lambda epoch: (accuracies[epoch], -epoch))
    best, last = (load_checkpoint(averaged / name) for name in ("best.pth", "last.pth"))
    assert best["best"] == {"accuracy": accuracies[best_epoch], "epoch": best["epoch"]}
    assert best["epoch"] == best_epoch
    assert last["ema"]["n_averaged"] == 9  # three epochs of three steps
    assert {f"module.{name}" for name in last["network"]} | {"n_averaged"} == last["ema"].keys() == best["ema"].keys()
    assert best["selected_on"].endswith("with the averaged weights")


def test_either_weights_of_a_run_are_evaluated(averaged, tmp_path, evaluation_script, capsys):
    """The validation images as test images, by the figures in the log."""
    last, line = load_checkpoint(averaged / "last.pth"), read_log(averaged)[-1]
    for weights, words, group in (
        (None, "averaged weights", "validation_ema"),
        ("ema", "averaged weights", "validation_ema"),
        ("plain", "weights that are not averaged", "validation"),
    ):
        trained = load_trained(averaged / "last.pth", rebuilt, weights=weights)
        evaluated = {n.removeprefix("module."): v for n, v in last["ema"].items()} if weights != "plain" else None
        expected = (evaluated or last["network"])["classifier.weight"]
        assert torch.equal(trained.network.classifier.weight, expected)
        settings = dataclasses.replace(trained.settings, select_on="validation")
        catalogue = read_catalogue("folder", settings.data_root, seed=0, test_fraction=0.25)
        _, entries, _ = datasets.choose_split(settings, catalogue)
        loader = datasets.evaluation_loader(settings, entries)
        figures = train.evaluate(trained.network, loader, plan=trained.plan, execution=trained.execution)
        for name in ("accuracy/prediction", "loss/total"):
            assert figures[name] == pytest.approx(line[f"{group}/{name}"], rel=1e-4), weights

        folder = tmp_path / str(weights)
        folder.mkdir()
        os.link(averaged / "last.pth", folder / "last.pth")
        evaluation_script.main([str(folder / "last.pth"), *(["--weights", weights] if weights else [])])
        assert f"epoch 3, {words}, chosen by" in capsys.readouterr().out
        ending = "-last-plain" if weights == "plain" else "-last"
        report = json.loads((folder / f"report{ending}.json").read_text(encoding="utf-8"))
        assert report["weights"] == (weights or "ema")
        assert (folder / f"predictions{ending}.csv").is_file()


def test_an_average_that_is_not_there_is_refused(short, averaged, picture_tree, tmp_path, evaluation_script):
    path = str(short / "best.pth")
    assert load_trained(path, rebuilt, weights="plain").saved["weights"] is None
    for use, words in (
        (evaluation_script.main, [path]),
        (predict.main, ["--checkpoint", path, str(picture_tree / "red" / "0.png")]),
        (export.main, ["--checkpoint", path, "--out", str(tmp_path / "model.pt2")]),
    ):
        with pytest.raises(CheckpointError, match="best.pth has no averaged weights, as its run had ema_decay 0"):
            use([*words, "--weights", "ema"])
    saved = load_checkpoint(averaged / "best.pth")
    for broken in ([1, 2], {"n_averaged": torch.tensor(3)}):
        save_checkpoint(tmp_path / "best.pth", saved | {"ema": broken})
        with pytest.raises(CheckpointError, match=re.escape(str(tmp_path / "best.pth"))):
            load_trained(tmp_path / "best.pth", rebuilt)
