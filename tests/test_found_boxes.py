"""Boxes that are found once, before training: as the frozen trunk finds them, carried as true boxes are, kept."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from thin_trunk import get_thin_model
from whole_runs import assert_same_run, interrupt_in_epoch

import train
from config import parse_settings, rebuilt
from datasets import Entry, Pictures, choose_split, collate, evaluation_loader, load_catalogue, training_loader
from networks.colocalization import Colocalization
from networks.outputs import NetworkOutput
from utils.checkpoint import CheckpointError, load_checkpoint
from utils.checkpoint_content import NETWORK, TRAINING, problem_of
from utils.data.augmentation import Augmentation, whole_if_lost
from utils.training import found_boxes
from utils.training.building import build_from_settings
from utils.training.execution import Execution
from utils.training.found_boxes import boxes_to_look_at, find_boxes

pytestmark = pytest.mark.usefixtures("thin_trunk", "coarse_copy")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def coarse_copy():
    """Let the copy of the trunk see pictures as large as the network does: six cells a side."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("networks.colocalization.SMALLEST_SIDE", 192)
        yield


@pytest.fixture(scope="module")
def run_with_boxes(tiny_run, tmp_path_factory):
    """A function: the command line of a run whose trunk has weights that may be called pretrained."""
    torch.manual_seed(3)
    trunk = get_thin_model("resnet18", weights=None)
    weights = tmp_path_factory.mktemp("weights") / "thin.pth"
    torch.save(trunk.state_dict(), weights)

    def arguments(folder: Path, *more: str, model: str = "resnet") -> list[str]:
        return [*tiny_run(folder, model=model), "--pretrained", str(weights), "--localization", "colocalization", *more]

    return arguments


@pytest.fixture(scope="module")
def prepared(run_with_boxes, tmp_path_factory):
    """A system whose colocalization is fitted, its settings and its pictures."""
    settings = parse_settings(run_with_boxes(tmp_path_factory.mktemp("unused")))
    catalogue, _ = load_catalogue(settings)
    entries, _, _ = choose_split(settings, catalogue)
    system = build_from_settings(settings, len(catalogue.class_names), load_weights=True).train()
    system.prepare(Execution(CPU).batches(training_loader(settings, entries)))
    return system, settings, entries


# ---- Found and carried ----------------------------------------------------------------------------------------------


def test_they_are_those_of_the_frozen_trunk_on_pictures_without_augmentation(prepared) -> None:
    system, settings, entries = prepared
    found = find_boxes(system, evaluation_loader(settings, entries), Execution(CPU), len(entries))
    pictures = Pictures(entries, image_size=settings.image_size, found_boxes=found)
    still = Augmentation(flip=0, brightness=0, contrast=0)
    for index in range(len(entries)):
        for augment in (None, still):
            pictures.augment = augment
            batch = collate([pictures[index]])
            expected = system.find_objects(Execution(CPU).images(batch.images, batch.augmentation))
            assert torch.equal(boxes_to_look_at(batch, system, CPU), expected)
            assert torch.equal(batch.found_boxes[0], found[index])
    assert len(found.unique(dim=0)) > 3
    assert boxes_to_look_at(collate([Pictures(entries, image_size=96)[0]]), system, CPU) is None


def test_several_processes_find_them_together(prepared, monkeypatch) -> None:
    system, settings, entries = prepared
    whole = find_boxes(system, evaluation_loader(settings, entries), Execution(CPU), len(entries))
    parts = []
    monkeypatch.setattr(found_boxes, "world_size", lambda: 2)
    monkeypatch.setattr(found_boxes, "all_reduce_sum", lambda tensor: parts.append(tensor) or tensor)
    for rank in (0, 1):
        monkeypatch.setattr(found_boxes, "rank", lambda rank=rank: rank)
        find_boxes(system, evaluation_loader(settings, entries[rank::2]), Execution(CPU), len(entries))
    assert torch.equal(sum(parts), whole)
    assert all((part == 0).all(dim=1).sum() >= len(entries) // 2 for part in parts)


@pytest.mark.parametrize("keep_aspect_ratio", [False, True])
@pytest.mark.parametrize(
    "augment",
    [Augmentation(padding=6), Augmentation(crop_scale=0.3), Augmentation(rotation=30.0, crop_scale=0.5)],
    ids=["crop", "part", "turned"],
)
def test_they_are_carried_as_true_boxes_are(tmp_path: Path, augment: Augmentation, keep_aspect_ratio: bool) -> None:
    width, height, side = 90, 60, 120
    Image.fromarray(np.zeros((height, width, 3), dtype=np.uint8)).save(tmp_path / "picture.png")
    found = torch.tensor([[31.0, 40, 66, 58]])  # in the picture resized to 120 x 120
    true = (found[0] * torch.tensor([width, height] * 2) / side).tolist()
    entry = Entry(tmp_path / "picture.png", 0, tuple(true))
    loading = {"image_size": 96, "resize_size": side, "keep_aspect_ratio": keep_aspect_ratio}
    pictures = Pictures([entry], **loading, augment=augment, found_boxes=found)
    carried = lost = 0
    for seed in range(60):
        sample = pictures[0, seed]
        if (sample.box[2:] - sample.box[:2]).min() < 3:
            assert sample.found_box.tolist() == [0, 0, 96, 96]
            lost += 1
        else:
            torch.testing.assert_close(sample.found_box, sample.box, rtol=0, atol=1e-3)
            carried += 1
    assert carried > 30
    assert lost > 0 or augment.crop_scale > 0.3


def test_where_next_to_nothing_is_left_the_whole_picture_is_looked_at() -> None:
    for box, expected in (
        ([3.0, 4, 60, 70], [3, 4, 60, 70]),
        ([3.0, 4, 6.1, 7.1], [3, 4, 6.1, 7.1]),
        ([3.0, 4, 5.9, 70], [0, 0, 96, 96]),
        ([96.0, 4, 96, 70], [0, 0, 96, 96]),
    ):
        assert whole_if_lost(torch.tensor(box), 96).tolist() == pytest.approx(expected)


# ---- Runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def looked_at(monkeypatch) -> list[int]:
    """How many pictures the frozen trunk looked at, call by call."""
    counts: list[int] = []
    forward = Colocalization.forward

    def counted(self, images: torch.Tensor) -> NetworkOutput:
        counts.append(len(images))
        return forward(self, images)

    monkeypatch.setattr(Colocalization, "forward", counted)
    return counts


TWO_EPOCHS = ("--epochs", "2", "--crop_scale", "0.5", "--schedule", "one_cycle", "--resize_size", "112")


def test_a_run_finds_them_once_keeps_them_and_goes_on_bit_for_bit(
    run_with_boxes, tmp_path, monkeypatch, looked_at, picture_tree, capsys
) -> None:
    """Also with pictures loaded by another process; and not with other pictures."""
    train.main(run_with_boxes(tmp_path / "whole", *TWO_EPOCHS))
    assert "finding the objects in 18 pictures" in capsys.readouterr().out
    assert sum(looked_at) == 12 + 6
    folder = tmp_path / "whole" / "folder-resnet"
    saved = load_checkpoint(folder / "last.pth")
    assert [len(saved["found_boxes"][part]) for part in ("training", "selection")] == [12, 6]
    settings = rebuilt(saved["settings"])
    system = build_from_settings(settings, 3, load_weights=False)
    system.load_state_dict(saved["network"])
    training, selection, _ = choose_split(settings, load_catalogue(settings)[0])
    whole = dataclasses.replace(settings, image_size=112)
    for part, entries, seen in (("training", training, whole), ("selection", selection, settings)):
        again = find_boxes(system, evaluation_loader(seen, entries), Execution(CPU), len(entries))
        assert torch.equal(saved["found_boxes"][part], again), part
    assert "found_boxes" not in load_checkpoint(folder / "best.pth")

    looked_at.clear()
    tree = Path(shutil.copytree(picture_tree, tmp_path / "tree"))
    arguments = run_with_boxes(tmp_path / "parts", *TWO_EPOCHS, "--data_root", str(tree), "--workers", "1")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_in_epoch(patch, 2)
        train.main(arguments)
    assert sum(looked_at) == 12 + 6
    train.main(arguments)
    assert sum(looked_at) == 12 + 6  # none of them again
    assert_same_run(folder, tmp_path / "parts" / "folder-resnet")
    (tree / "red" / "1.png").write_bytes((tree / "blue" / "1.png").read_bytes())
    with pytest.raises(CheckpointError, match="other pictures"):
        train.main(arguments)


def test_a_run_from_before_goes_on_finding_them_in_every_pass(run_with_boxes, tmp_path, looked_at) -> None:
    arguments = run_with_boxes(tmp_path, "--schedule", "exponential", "--warmup_epochs", "0")
    train.main(arguments)
    path = tmp_path / "folder-resnet" / "last.pth"
    content = load_checkpoint(path)
    boxes = content.pop("found_boxes")
    assert problem_of(content | {"found_boxes": boxes}, NETWORK | TRAINING) is None
    for broken in ({}, boxes["training"], boxes | {"selection": boxes["selection"][0]}):
        assert "found_boxes" in problem_of(content | {"found_boxes": broken}, NETWORK | TRAINING)
    shorter = boxes | {"training": boxes["training"][1:]}
    assert "11 boxes for 12 images" in problem_of(content | {"found_boxes": shorter}, NETWORK | TRAINING)
    torch.save(content, path)
    looked_at.clear()
    train.main([*arguments, "--epochs", "2"])
    assert sum(looked_at) == 12 + 6


def test_a_run_that_is_asked_to_stop_while_it_looks_ends_at_once_and_begins_anew(
    run_with_boxes, tmp_path, monkeypatch
) -> None:
    forward, requests = Colocalization.forward, []

    def asked(self, images: torch.Tensor) -> NetworkOutput:
        requests.append(len(images))
        os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, images)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Colocalization, "forward", asked)
        train.main(run_with_boxes(tmp_path))
    assert len(requests) == 1
    assert not list(tmp_path.glob("*/*.pth"))
    train.main(run_with_boxes(tmp_path))
    assert (tmp_path / "folder-resnet" / "last.pth").exists()
