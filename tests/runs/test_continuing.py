"""A run that was stopped, or has got more epochs, goes on as if it had never been."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from cases import slow_but_for
from whole_runs import (
    FOUR_EPOCHS,
    MASKED,
    TWO_EPOCHS,
    assert_same_run,
    interrupt_in_epoch,
    read_events,
    read_log,
    stop_after_step,
    without_speeds,
)

import train
from utils.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from utils.errors import Stopped
from utils.training import run_folder
from utils.training.current_epoch import CurrentEpoch


def test_a_continued_run_equals_an_uninterrupted_one(finished, tiny_run, picture_tree, tmp_path, monkeypatch):
    """Stopped in the middle of epoch 3, pictures loaded by two workers instead of the main process, and moved."""
    arguments = tiny_run(tmp_path, *FOUR_EPOCHS, *MASKED, "--workers", "2", model="sgkrl")
    folder = tmp_path / finished.name
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_in_epoch(patch, 3)
        train.main(arguments)
    assert load_checkpoint(folder / "last.pth")["epoch"] == 2
    assert len(read_log(folder)) == 2

    moved = shutil.copytree(picture_tree, tmp_path / "moved")
    train.main([*arguments, "--data_root", str(moved)])
    assert_same_run(finished, folder)
    momenta = load_checkpoint(folder / "last.pth")["optimizer"]["state"]
    assert len(momenta) > 60
    assert all(state["momentum_buffer"].abs().sum() > 0 for state in momenta.values())
    for tag in ("train/loss/total", "validation/accuracy/prediction", "schedule/learning_rate"):
        points, whole = read_events(folder).Scalars(tag), read_events(finished).Scalars(tag)
        assert [(p.step, p.value) for p in points] == [(p.step, p.value) for p in whole]


def test_curves_within_epochs_go_on_at_their_step(tiny_run, tmp_path, monkeypatch, capsys):
    """Three steps an epoch, a point every two; stopped after the second step of epoch 2, the fifth of all."""
    options = (*TWO_EPOCHS, "--log_every_steps", "2", "--cache", "ram")
    train.main(tiny_run(tmp_path / "whole", *options))
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after_step(patch, 2, 2)
        train.main(tiny_run(tmp_path / "parts", *options))
    train.main(tiny_run(tmp_path / "parts", *options))
    whole, parts = (read_events(tmp_path / name / "folder-resnet" / "steps") for name in ("whole", "parts"))
    for tag in ("step/loss/raw", "step/loss/total", "step/accuracy/raw", "step/learning_rate"):
        points = [(point.step, point.value) for point in whole.Scalars(tag)]
        assert [step for step, _ in points] == [2, 4, 6]
        gone_on = [(point.step, point.value) for point in parts.Scalars(tag)]
        assert gone_on[:2] == points[:2]
        assert gone_on[2][0] == 6  # of the sixth step, not of the fifth and sixth
    rates = [point.value for point in whole.Scalars("step/learning_rate")]
    assert rates == pytest.approx([0.05, 0.005, 0.005])
    assert capsys.readouterr().out.count("epoch 2/2, step 1 of 3  loss ") == 2


def test_a_run_stopped_in_every_epoch_equals_an_uninterrupted_one(short, tiny_run, tmp_path, monkeypatch):
    """The other schedule: the rate falls at an epoch's end, which is where the run is continued."""
    for epoch in (1, 2):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            interrupt_in_epoch(patch, epoch)
            train.main(tiny_run(tmp_path, *TWO_EPOCHS))
    train.main(tiny_run(tmp_path, *TWO_EPOCHS))
    assert_same_run(short, tmp_path / short.name)
    rates = [line["schedule/learning_rate"] for line in read_log(short)]
    assert rates == pytest.approx([0.05, 0.005])


@pytest.mark.parametrize(
    ("options", "more"),
    [
        (["--schedule", "steps", "--milestones"], "3"),
        pytest.param(["--schedule", "exponential"], "4", marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_with_more_epochs_as_if_it_had_had_them_from_the_start(options, more, tiny_run, tmp_path):
    options = (*options, "--warmup_epochs", "1", "--ema_decay", "0.5")
    train.main(tiny_run(tmp_path / "whole", *options, "--epochs", more))
    for epochs in ("2", more):
        train.main(tiny_run(tmp_path / "parts", *options, "--epochs", epochs))
        saved = json.loads((tmp_path / "parts" / "folder-resnet" / "config.json").read_text(encoding="utf-8"))
        assert saved["epochs"] == int(epochs)
    # best.pth may be from before there were more
    folders = (tmp_path / name / "folder-resnet" for name in ("whole", "parts"))
    assert_same_run(*folders, but=frozenset({"epochs"}))
    with pytest.raises(CheckpointError, match=f"last.pth is in epoch {more}, and epochs is 1 here"):
        train.main(tiny_run(tmp_path / "parts", *options, "--epochs", "1", "--warmup_epochs", "1"))


def test_more_epochs_keep_what_followed_from_the_first_number_of_them(tiny_run, tmp_path):
    """After one epoch, too short a run for a warm-up, it stays without one; a warm-up that is asked for is refused."""
    options, folder = ("--schedule", "steps", "--milestones"), tmp_path / "parts" / "folder-resnet"
    for epochs in ("1", "2", "2", "3"):
        train.main(tiny_run(tmp_path / "parts", *options, "--epochs", epochs))
        assert len(read_log(folder)) == int(epochs)
        assert load_checkpoint(folder / "last.pth")["settings"]["warmup_epochs"] == 0
    with pytest.raises(CheckpointError, match="warmup_epochs 0 there and 1 here"):
        train.main(tiny_run(tmp_path / "parts", *options, "--epochs", "4", "--warmup_epochs", "1"))
    train.main(tiny_run(tmp_path / "whole", *options, "--epochs", "3", "--warmup_epochs", "0"))
    assert without_speeds(read_log(folder)) == without_speeds(read_log(tmp_path / "whole" / "folder-resnet"))
    with pytest.raises(CheckpointError, match="warmup_epochs 0 there and 1 here"):  # it was given there
        train.main(tiny_run(tmp_path / "whole", *options, "--epochs", "4"))


def test_more_epochs_are_refused_where_the_schedule_spreads_over_them(finished, tiny_run):
    arguments = tiny_run(finished.parent, *FOUR_EPOCHS, *MASKED, model="sgkrl")
    with pytest.raises(CheckpointError) as refusal:
        train.main([*arguments, "--epochs", "5"])
    sentence = str(refusal.value)
    assert "is of a run of 4 epochs whose schedule one_cycle spreads over all of them, and epochs is 5 here" in sentence
    assert "--name" in sentence
    assert len(sentence.splitlines()) == 1


def with_accuracies(monkeypatch: pytest.MonkeyPatch, *accuracies: float) -> list[int]:
    """Let evaluations find these accuracies, by epoch; return the list of epochs that are trained."""
    evaluate, plan_epoch, planned = train.evaluate, train.plan_epoch, []

    def plan(system, number, *arguments, **options):
        planned.append(number)
        return plan_epoch(system, number, *arguments, **options)

    def pretend(*arguments, **options):
        return evaluate(*arguments, **options) | {"accuracy/prediction": accuracies[planned[-1] - 1]}

    monkeypatch.setattr(train, "plan_epoch", plan)
    monkeypatch.setattr(train, "evaluate", pretend)
    return planned


def test_a_run_stops_when_its_patience_ends_and_goes_on_with_more(tiny_run, tmp_path, monkeypatch, capsys):
    figures = (0.2, 0.5, 0.5, 0.4, 0.6, 0.1)
    options = ("--epochs", "6", "--schedule", "steps", "--milestones", "2")
    trained = with_accuracies(monkeypatch, *figures)
    train.main(tiny_run(tmp_path / "whole", *options))
    folder = tmp_path / "parts" / "folder-resnet"

    def train_parts(*more: str) -> list[int]:
        trained.clear()
        capsys.readouterr()
        train.main(tiny_run(tmp_path / "parts", *options, *more))
        return list(trained)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_in_epoch(patch, 4)
        train_parts("--patience", "2")
    assert train_parts("--patience", "2") == [4]
    sentence = "stopped after epoch 4, 2 after the best one on validation, as patience is 2"
    printed = capsys.readouterr().out
    assert sentence in printed
    assert "done: 50.0% on validation at epoch 2" in printed
    before = (folder / "last.pth").read_bytes()
    assert train_parts("--patience", "2") == []  # the same command again
    assert sentence in capsys.readouterr().out
    assert (folder / "last.pth").read_bytes() == before
    assert train_parts("--patience", "3") == [5, 6]
    assert "stopped" not in capsys.readouterr().out
    assert_same_run(tmp_path / "whole" / "folder-resnet", folder)


# What learns otherwise than in the runs above
LEARNING = {
    "adamw": (
        *("--optimizer", "adamw", "--learning_rate", "0.001", "--weight_decay", "0.1", "--no-decay_norms_and_biases"),
        *("--schedule", "exponential", "--decay_rate", "0.5", "--linear_warmup_epochs", "1.5"),
        *("--frozen_trunk_epochs", "1"),
    ),
    "ema": ("--ema_decay", "0.9", "--learning_rate", "0.05", "--gradient_accumulation", "2"),
    "mixed": ("--mixup", "0.4", "--cutmix", "1", "--label_smoothing", "0.1", "--class_weights", "1", "2", "0.5"),
}


@pytest.mark.parametrize("learning", slow_but_for(["ema"], LEARNING))
def test_a_run_stopped_within_an_epoch_equals_an_uninterrupted_one(learning, tiny_run, tmp_path, monkeypatch):
    """Each time after its second step of three."""
    arguments = ("--epochs", "3", *LEARNING[learning])
    train.main(tiny_run(tmp_path / "whole", *arguments))
    for epoch in (1, 2, 3):
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            stop_after_step(patch, epoch, 2)
            train.main(tiny_run(tmp_path / "parts", *arguments))
    train.main(tiny_run(tmp_path / "parts", *arguments))
    assert_same_run(tmp_path / "whole" / "folder-resnet", tmp_path / "parts" / "folder-resnet")


def test_an_evaluation_that_draws_random_numbers_is_the_same_where_a_run_stopped_in_it(tiny_run, tmp_path, monkeypatch):
    arguments = ("--dropout_in_evaluation", "--learning_rate", "0.01")
    train.main(tiny_run(tmp_path / "whole", *arguments, model="ntsnet"))
    look_on = CurrentEpoch.after_evaluation_batch

    def stop(current, *arguments):
        current.stop.requested = True
        look_on(current, *arguments)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(CurrentEpoch, "after_evaluation_batch", stop)
        train.main(tiny_run(tmp_path / "parts", *arguments, model="ntsnet"))
    assert load_checkpoint(tmp_path / "parts" / "folder-ntsnet" / "last.pth")["progress"]["step"] == 3
    train.main(tiny_run(tmp_path / "parts", *arguments, model="ntsnet"))
    assert_same_run(tmp_path / "whole" / "folder-ntsnet", tmp_path / "parts" / "folder-ntsnet")


def test_a_finished_run_started_again_keeps_its_files(short, short_copy, tiny_run, capsys):
    train.main(tiny_run(short_copy.parent, *TWO_EPOCHS))
    assert "done" in capsys.readouterr().out
    for name in ("last.pth", "best.pth", "log.jsonl", "config.json"):
        assert (short_copy / name).read_bytes() == (short / name).read_bytes(), name
    loss = [(point.step, point.value) for point in read_events(short_copy).Scalars("train/loss/total")]
    assert [step for step, _ in loss] == [1, 2]
    assert loss == [(point.step, point.value) for point in read_events(short).Scalars("train/loss/total")]


def test_a_run_killed_between_last_and_best_still_gets_its_best(tiny_run, tmp_path, monkeypatch):
    figures = iter((0.9, 0.1))
    evaluate = train.evaluate

    def evaluate_and_pretend(*arguments, **options):
        return evaluate(*arguments, **options) | {"accuracy/prediction": next(figures)}

    def kill_before_best(path, content):
        if Path(path).name == "best.pth":
            raise KeyboardInterrupt
        save_checkpoint(path, content)

    monkeypatch.setattr(train, "evaluate", evaluate_and_pretend)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run_folder, "save_checkpoint", kill_before_best)
        train.main(tiny_run(tmp_path, "--epochs", "2"))
    train.main(tiny_run(tmp_path, "--epochs", "2"))
    best, last = (load_checkpoint(tmp_path / "folder-resnet" / name) for name in ("best.pth", "last.pth"))
    assert best["epoch"] == last["best"]["epoch"]
    assert last["best"]["accuracy"] == 0.9
