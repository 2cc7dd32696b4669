"""Losses and weights that are no longer finite."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
from launching import run_two_processes
from whole_runs import TROUBLED, read_log

import train
from networks.system import System
from utils import run
from utils.checkpoint import load_checkpoint, load_run
from utils.errors import Stopped
from utils.training import learning, run_folder
from utils.training.current_epoch import CurrentEpoch
from utils.training.execution import Execution
from utils.training.nonfinite import NonFiniteLossError


def break_the_loss(monkeypatch, *steps: int) -> None:
    """NaN in the loss of the raw branch in these steps, counted over the whole run."""
    calls, terms = [], System.losses

    def broken(self, output, labels, **options):
        losses = terms(self, output, labels, **options)
        if torch.is_grad_enabled():
            calls.append(1)
            if len(calls) in steps:
                losses["raw"] = losses["raw"] * math.nan
        return losses

    monkeypatch.setattr(System, "losses", broken)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_its_images(tiny_run, tmp_path, monkeypatch):
    break_the_loss(monkeypatch, 5)
    with pytest.raises(NonFiniteLossError) as stop:
        train.main(tiny_run(tmp_path, "--epochs", "3"))
    folder = tmp_path / "folder-resnet"
    record = json.loads((folder / "nonfinite.json").read_text(encoding="utf-8"))
    assert (record["epoch"], record["step"], record["terms"]) == (2, 2, ["raw", "total"])
    assert len(record["images"]) == 4
    assert all(Path(path).is_file() for path in record["images"])
    for word in ("epoch 2", "step 2", "raw", "total", str(folder / "nonfinite.json")):
        assert word in str(stop.value)
    saved = load_checkpoint(folder / "last.pth")
    assert saved["epoch"] == 1
    assert all(value.isfinite().all() for value in saved["network"].values())


def test_a_loss_that_is_not_finite_in_one_process_is_told_by_all(tiny_run, tmp_path):
    result = run_two_processes(TROUBLED, "nan", "2", *tiny_run(tmp_path))
    assert result.returncode == 2
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr[-2000:]
    assert "in step 2 (raw, total)" in errors[0]
    assert "Traceback" not in result.stderr
    record = json.loads((tmp_path / "folder-resnet" / "nonfinite.json").read_text(encoding="utf-8"))
    assert (record["step"], len(record["images"])) == (2, 2)  # half a batch of 4: the other half was in order
    assert not (tmp_path / "folder-resnet" / "last.pth").exists()


def test_broken_weights_are_not_saved_within_an_epoch(tiny_run, tmp_path, monkeypatch):
    """The loss of the step was finite; what it did to the weights is not seen before the next one."""
    check = learning.check_weights

    def broken(network, step):
        with torch.no_grad():
            if step == 2:
                network.classifier.weight[0, 0] = math.nan
        check(network, step)

    monkeypatch.setattr(learning, "check_weights", broken)
    with pytest.raises(NonFiniteLossError, match="weights"):
        train.main(tiny_run(tmp_path, "--save_every_steps", "1"))
    saved = load_checkpoint(tmp_path / "folder-resnet" / "last.pth")
    assert saved["progress"]["step"] == 1
    assert all(value.isfinite().all() for value in saved["network"].values())


@pytest.mark.parametrize("stopped", [False, True])
def test_broken_weights_that_evaluation_leaves_out_are_not_saved(tiny_run, tmp_path, monkeypatch, stopped):
    """DCL's location only serves training, so that no figure of the evaluation shows it."""
    before_evaluation = CurrentEpoch.before_evaluation

    def broken(self, loader):
        before_evaluation(self, loader)
        if self.number == 2:
            with torch.no_grad():
                self.system.location.weight[0, 0] = math.inf
            self.stop.requested |= stopped

    monkeypatch.setattr(CurrentEpoch, "before_evaluation", broken)
    with pytest.raises(NonFiniteLossError, match="weights are no longer finite after step 3"):
        train.main(tiny_run(tmp_path, "--epochs", "2", model="dcl"))
    for name in ("last.pth", "best.pth"):
        assert load_run(tmp_path / "folder-dcl" / name)["epoch"] == 1


def test_huge_weights_are_not_saved_within_an_epoch(tiny_run, tmp_path):
    """They are finite themselves, and so was the loss of the step that made them."""
    options = ["--learning_rate", "1e30", "--save_every_steps", "1", "--clip_gradient_norm", "1"]
    with pytest.raises(NonFiniteLossError, match="step 1") as stop:
        train.main(tiny_run(tmp_path, *options))
    assert len(stop.value.paths) == 4
    assert not (tmp_path / "folder-resnet" / "last.pth").exists()


def test_losses_not_read_yet_are_read_before_a_save(tiny_run, tmp_path, monkeypatch):
    """As on a GPU, where the losses of some steps are read together: the weights are whole, a loss was not."""
    monkeypatch.setattr(learning, "steps_between_readings", lambda device: 10)
    break_the_loss(monkeypatch, 2)
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: None)
    with pytest.raises(NonFiniteLossError, match="step 2"):
        train.main(tiny_run(tmp_path, "--save_every_steps", "2"))
    assert not (tmp_path / "folder-resnet" / "last.pth").exists()


def test_the_skipped_steps_of_a_run_are_counted_over_its_stops(tiny_run, tmp_path, monkeypatch):
    arguments = tiny_run(tmp_path, "--epochs", "2", "--skip_nonfinite", "1")
    evaluate = train.evaluate

    def interrupted(*positional, **options):
        os.kill(os.getpid(), signal.SIGINT)
        return evaluate(*positional, **options)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        break_the_loss(patch, 2)
        patch.setattr(train, "evaluate", interrupted)
        train.main(arguments)
    assert load_checkpoint(tmp_path / "folder-resnet" / "last.pth")["skipped_steps"] == 1
    break_the_loss(monkeypatch, 1)
    with pytest.raises(NonFiniteLossError):
        train.main(arguments)


def test_a_bounded_number_of_such_steps_may_be_skipped(tiny_run, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        break_the_loss(patch, 2, 5)
        train.main(tiny_run(tmp_path / "enough", "--epochs", "2", "--skip_nonfinite", "2"))
    lines = read_log(tmp_path / "enough" / "folder-resnet")
    assert [line["train/images"] for line in lines] == [8, 8]
    assert all(math.isfinite(line["train/loss/total"]) for line in lines)
    assert capsys.readouterr().out.count("left out") == 2
    with monkeypatch.context() as patch, pytest.raises(NonFiniteLossError):
        break_the_loss(patch, 2, 5)
        train.main(tiny_run(tmp_path / "short", "--epochs", "2", "--skip_nonfinite", "1"))


def test_a_skipped_step_changes_nothing_but_the_schedule(tiny_run, tmp_path, monkeypatch):
    """NaN pixels: the batch-norm statistics are met by them before the loss is."""
    arguments = tiny_run(tmp_path, "--skip_nonfinite", "1")
    execution = Execution.images
    calls = []

    def poisoned(self, images, augmentation=None):
        calls.append(1)
        images = execution(self, images, augmentation)
        return images * math.nan if len(calls) == 3 else images  # the last step of the epoch

    monkeypatch.setattr(Execution, "images", poisoned)
    train.main(arguments)
    network = load_checkpoint(tmp_path / "folder-resnet" / "last.pth")["network"]
    assert all(value.isfinite().all() for value in network.values())
    assert network["backbone.trunk.bn1.num_batches_tracked"] == 2


def test_a_save_that_falls_on_a_skipped_step_is_left_out(tiny_run, tmp_path, monkeypatch):
    """Its images are NaN for whole weights, too: that must not be taken for broken weights."""
    execution = Execution.images
    calls, saves = [], []

    def poisoned(self, images, augmentation=None):
        calls.append(1)
        images = execution(self, images, augmentation)
        return images * math.nan if len(calls) == 2 else images

    save_last = run.save_last

    def recorded(folder, content):
        saves.append((content["progress"] or {"step": "end"})["step"])
        save_last(folder, content)

    monkeypatch.setattr(Execution, "images", poisoned)
    monkeypatch.setattr(run, "save_last", recorded)  # within an epoch
    monkeypatch.setattr(run_folder, "save_last", recorded)  # at its end
    train.main(tiny_run(tmp_path, "--skip_nonfinite", "1", "--save_every_steps", "1"))
    assert saves == [1, "end"]
    assert load_checkpoint(tmp_path / "folder-resnet" / "last.pth")["skipped_steps"] == 1
