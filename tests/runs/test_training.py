"""What a run trains, and in which order."""

from __future__ import annotations

import math

import pytest
import torch
from whole_runs import TWO_EPOCHS, read_log

import train
from utils.checkpoint import load_checkpoint
from utils.training import run_folder
from utils.training.nonfinite import NonFiniteLossError


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
