"""What a run is not continued with: other settings, classes, pictures, or a damaged checkpoint."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import pytest
import torch
from whole_runs import TWO_EPOCHS, interrupt_in_epoch

import config
import train
from config import rebuilt
from utils.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from utils.options import flat
from utils.training.agreement import MAY_DIFFER
from utils.training.building import build_from_settings, load_trained
from utils.training.resume import FREE_ON_RESUME


def test_other_settings_are_refused_with_both_values(short, short_copy, tiny_run):
    before = {path.name: path.read_bytes() for path in short_copy.iterdir() if path.is_file()}
    with pytest.raises(CheckpointError) as refusal:
        train.main(tiny_run(short_copy.parent, *TWO_EPOCHS, "--epochs", "3", "--learning_rate", "0.25"))
    sentence = str(refusal.value)
    assert len(sentence.splitlines()) == 1
    for word in ("epochs", "2", "3", "learning_rate", "0.25", "0.05", "--name", str(short_copy / "last.pth")):
        assert word in sentence
    assert "workers" not in sentence
    assert {path.name: path.read_bytes() for path in short_copy.iterdir() if path.is_file()} == before


LEARNS = {
    *("optimizer", "learning_rate", "head_learning_rate_factor", "momentum", "weight_decay", "decay_norms_and_biases"),
    *("schedule", "milestones", "decay_rate", "linear_warmup_epochs", "warmup_epochs", "frozen_trunk_epochs"),
    *("batch_size", "gradient_accumulation", "images_per_class", "clip_gradient_norm", "ema_decay", "seed"),
    *("label_smoothing", "class_weights", "mixup", "cutmix", "loss_weights", "dropout", "batch_norm", "backbone"),
    *("input_size", "image_size", "resize_size", "crop_scale", "flip", "normalization", "precision", "validation"),
}


def test_what_a_network_learns_by_is_free_nowhere():
    assert not LEARNS & (FREE_ON_RESUME | MAY_DIFFER)


def test_settings_younger_than_the_run_had_their_defaults(short, tiny_run, tmp_path):
    path = Path(shutil.copytree(short, tmp_path / short.name)) / "last.pth"
    saved = load_checkpoint(path)
    del saved["settings"]["crop_scale"]
    save_checkpoint(path, saved)
    train.main(tiny_run(tmp_path, *TWO_EPOCHS))
    with pytest.raises(CheckpointError, match=re.escape("crop_scale 1.0 there and 0.5 here")):
        train.main(tiny_run(tmp_path, *TWO_EPOCHS, "--crop_scale", "0.5"))
    assert load_trained(path, rebuilt).settings.crop_scale == 1


def test_a_graph_older_than_its_residual_predicts_as_it_did(tiny_run, tmp_path):
    """The weights fit either variant; only the settings tell which."""
    former = ("--no-graph_residual", "--spatial_weights", "absolute")
    settings = config.parse_settings(tiny_run(tmp_path, *former, model="sgkrl"))
    torch.manual_seed(1)
    network = build_from_settings(settings, 3, load_weights=False).eval()
    for layer in (network.graph.classifier, network.weighting.spatial.conv):  # which start next to zero
        torch.nn.init.normal_(layer.weight)
    saved = {"epoch": 1, "class_names": ["a", "b", "c"], "selected_on": "validation"}
    saved |= {"network": network.state_dict(), "settings": dataclasses.asdict(settings)}
    path, images = tmp_path / "last.pth", torch.randn(2, 3, 96, 96)
    outputs = []
    with torch.no_grad():
        expected = network(images).logits
        for younger in ((), ("graph_residual", "spatial_weights", "without")):
            younger = (*younger, "localization", "window_source", "raw_size")
            former = {name: value for name, value in flat(settings).items() if name not in younger}
            former |= {"wiring": "trained", "answer": former.pop("prediction")}
            save_checkpoint(path, saved | {"settings": former})
            outputs.append(load_trained(path, rebuilt).network(images).logits)
        saved["settings"]["options"] |= {"graph_residual": True, "spatial_weights": "relative"}
        save_checkpoint(path, saved)
        now = load_trained(path, rebuilt).network(images).logits
    for found in outputs:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for branch in ("object", "graph"):
        assert not torch.allclose(now[branch], expected[branch], rtol=1e-2, atol=1e-2)


def test_other_classes_are_refused(short_copy, tiny_run, picture_tree, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(picture_tree, other)
    (other / "red").rename(other / "yellow")
    with pytest.raises(CheckpointError) as refusal:
        train.main(tiny_run(short_copy.parent, *TWO_EPOCHS, "--data_root", str(other)))
    assert "classes" in str(refusal.value)
    assert str(short_copy / "last.pth") in str(refusal.value)


def test_other_pictures_are_refused(tiny_run, picture_tree, tmp_path, monkeypatch):
    """A run continued with more pictures than it began with would be neither the one nor the other."""
    tree = Path(shutil.copytree(picture_tree, tmp_path / "tree"))
    arguments = tiny_run(tmp_path / "runs", "--epochs", "2", "--data_root", str(tree), "--schedule", "one_cycle")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_in_epoch(patch, 2)
        train.main(arguments)
    for path in sorted(tree.glob("*/*.png")):
        shutil.copy(path, path.with_stem(path.stem + "-again"))
    with pytest.raises(CheckpointError) as refusal:
        train.main(arguments)
    assert "pictures" in str(refusal.value) or "images" in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1


def test_a_damaged_checkpoint_without_another_is_refused_and_kept(short_copy, tiny_run):
    path = short_copy / "last.pth"
    (short_copy / "previous.pth").unlink()
    start = path.read_bytes()[:1000]
    path.unlink()
    path.write_bytes(start)
    with pytest.raises(CheckpointError, match=re.escape(str(path)) + ".*start anew with --fresh, which moves"):
        train.main(tiny_run(short_copy.parent, *TWO_EPOCHS))
    assert path.stat().st_size == 1000
    assert (short_copy / "best.pth").exists()
