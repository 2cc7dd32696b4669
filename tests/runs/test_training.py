"""What a run trains, and in which order."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from whole_runs import TWO_EPOCHS, read_log

import train
from config import parse_settings
from utils.checkpoint import load_checkpoint
from utils.data.augmentation import Augmentation
from utils.training import current_epoch, run_folder
from utils.training.building import build_from_settings
from utils.training.current_epoch import CurrentEpoch
from utils.training.nonfinite import NonFiniteLossError
from utils.training.seeding import seed_everything


def test_a_trunk_that_is_frozen_for_good_is_a_linear_probe(tiny_run, tmp_path):
    train.main(tiny_run(tmp_path, "--epochs", "2", "--frozen_trunk_epochs", "2", "--keep_checkpoints", "2"))
    first, second = (load_checkpoint(tmp_path / "folder-resnet" / f"epoch-00{n}.pth")["network"] for n in (1, 2))
    changed = {name for name, value in second.items() if not torch.equal(value, first[name])}
    assert {name for name in changed if "running" not in name and "num_batches" not in name} == {
        "classifier.weight",
        "classifier.bias",
    }
    assert "backbone.trunk.bn1.running_mean" in changed


def test_another_seed_makes_another_run(short, tiny_run, tmp_path):
    train.main(tiny_run(tmp_path, *TWO_EPOCHS, "--epochs", "1", "--seed", "1"))
    assert read_log(tmp_path / short.name)[0]["train/loss/total"] != read_log(short)[0]["train/loss/total"]


def test_every_epoch_has_an_order_and_random_numbers_of_its_own(tiny_run, tmp_path, monkeypatch):
    seen = []

    def record(network, batches, *arguments, **options):
        seen.append((list(batches.sampler), torch.rand(3).tolist()))
        return {"loss/total": 1.0, "images_per_second": 1.0}

    monkeypatch.setattr(train, "train_one_epoch", record)
    monkeypatch.setattr(run_folder, "save_checkpoint", lambda path, content: None)
    train.main(tiny_run(tmp_path, *TWO_EPOCHS))
    (first_order, first_numbers), (second_order, second_numbers) = seen
    assert {index for index, _ in first_order} == {index for index, _ in second_order} == set(range(12))
    assert [index for index, _ in first_order] != [index for index, _ in second_order]
    assert not {seed for _, seed in first_order} & {seed for _, seed in second_order}
    assert first_numbers != second_numbers


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_what_is_set_reaches_what_learns(kind, tiny_run, tmp_path, monkeypatch):
    """Runs that are compared with each other would all go without it."""
    words = (
        *("--optimizer", kind, "--learning_rate", "0.1", "--head_learning_rate_factor", "3", "--momentum", "0.7"),
        *("--weight_decay", "0.02", "--no-decay_norms_and_biases", "--schedule", "exponential", "--decay_rate", "0.5"),
        *("--linear_warmup_epochs", "1", "--clip_gradient_norm", "7", "--label_smoothing", "0.3", "--mixup", "0.4"),
        *("--gradient_accumulation", "2", "--class_weights", "1", "2", "1", "--ema_decay", "0.9", "--seed", "7"),
        *("--normalization", "half", "--flip", "0.25", "--rotation", "9", "--erasing", "0.5", "--epochs", "2"),
        *("--auto_augment", "trivialaugment"),
    )
    seen = {}

    def record(network, batches, optimizer, schedule, **options):
        seen.update(options, network=network, batches=batches, groups=optimizer.param_groups, schedule=schedule)
        return {"loss/total": 1.0, "images_per_second": 1.0}

    def stop(*arguments, **options):
        seen["evaluation"] = options
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train_one_epoch", record)
    monkeypatch.setattr(train, "evaluate", stop)
    with pytest.raises(KeyboardInterrupt):
        train.main(tiny_run(tmp_path, *words))
    assert (seen["clip_gradient_norm"], seen["label_smoothing"], seen["gradient_accumulation"]) == (7, 0.3, 2)
    assert (seen["average"].decay, seen["execution"].normalization) == (0.9, "half")
    assert seen["mix"] is not None
    assert seen["evaluation"]["label_smoothing"] == 0.3
    assert seen["network"].class_weights.tolist() == pytest.approx([0.75, 1.5, 0.75])
    assert seen["batches"].dataset.augment == Augmentation(
        flip=0.25, rotation=9.0, erasing=0.5, auto_augment="trivialaugment"
    )
    assert seen["batches"].sampler.seed == 7
    assert [group["weight_decay"] for group in seen["groups"]] == [0.02, 0, 0.02, 0]
    assert [group["initial_lr"] for group in seen["groups"]] == pytest.approx([0.1, 0.1, 0.3, 0.3])
    assert seen["groups"][0].get("momentum") == (0.7 if kind == "sgd" else None)
    # by step, three an epoch: a linear warm-up, then halved in the course of an epoch
    factors = [seen["schedule"].lr_lambdas[0](step) for step in (0, 2, 3, 6)]
    assert factors == pytest.approx([1 / 3, 1, 1, 0.5])
    seed_everything(7)
    begun = build_from_settings(parse_settings(tiny_run(tmp_path, *words)), 3, load_weights=True)
    assert torch.equal(seen["network"].classifier.weight, begun.classifier.weight)


def test_random_numbers_are_of_a_step_an_epoch_and_a_process(monkeypatch):
    drawn = set()
    for seed, epoch, step, rank in itertools.product((3, 4), (1, 2), (1, 2), (0, 1)):
        monkeypatch.setattr(current_epoch, "rank", lambda rank=rank: rank)
        CurrentEpoch.before_step(SimpleNamespace(settings=SimpleNamespace(seed=seed), number=epoch), step)
        drawn.add(torch.rand(()).item())
    assert len(drawn) == 16


def test_random_parts_of_the_pictures_are_trained_on(short, tiny_run, tmp_path):
    train.main(tiny_run(tmp_path, *TWO_EPOCHS, "--epochs", "1", "--crop_scale", "0.5"))
    (line,), first = read_log(tmp_path / short.name), read_log(short)[0]
    assert math.isfinite(line["train/loss/total"])
    assert line["train/loss/total"] != first["train/loss/total"]


def test_broken_weights_never_become_the_last_checkpoint(tiny_run, tmp_path, monkeypatch):
    """The last step of an epoch breaks the weights: its loss was still finite."""
    train_one_epoch, epochs = train.train_one_epoch, []

    def breaking(network, *arguments, **options):
        averages = train_one_epoch(network, *arguments, **options)
        epochs.append(1)
        if len(epochs) == 2:
            with torch.no_grad():
                network.classifier.weight.fill_(math.nan)
        return averages

    monkeypatch.setattr(train, "train_one_epoch", breaking)
    with pytest.raises(NonFiniteLossError):
        train.main(tiny_run(tmp_path, "--epochs", "3"))
    weights = load_checkpoint(tmp_path / "folder-resnet" / "last.pth")["network"]
    assert all(torch.isfinite(weight).all() for weight in weights.values())
