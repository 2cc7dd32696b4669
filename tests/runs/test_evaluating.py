"""test.py: its report, data that lie elsewhere, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from whole_runs import BRANCHES, put_together

import config
from config import SettingsError
from datasets import DataError, Pictures, read_catalogue
from utils.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from utils.data.image_batches import normalised


def test_report_equals_an_independent_evaluation(finished, picture_tree, tmp_path, evaluation_script, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    os.link(
        finished / "last.pth", folder / "last.pth"
    )  # its epoch masks the background, which test.py has to do as well
    evaluation_script.main([str(folder / "last.pth")])
    printed = capsys.readouterr().out
    report = json.loads((folder / "report-last.json").read_text(encoding="utf-8"))
    assert (folder / "pictures" / "test-last.png").is_file()

    saved = load_checkpoint(folder / "last.pth")
    network = put_together(saved)
    catalogue = read_catalogue("folder", picture_tree, seed=0, test_fraction=0.25)
    correct = dict.fromkeys(("prediction", *BRANCHES), 0)
    per_class = {label: [] for label in range(3)}
    for sample in Pictures(catalogue.test, image_size=96):
        with torch.no_grad():
            logits = network(normalised(sample.image[None]), mask_background=True).logits
        scores = {name: value[0].mean(dim=0) if name == "window" else value[0] for name, value in logits.items()}
        ensembled = zip(network.ensemble_weights, ("raw", "fused", "object", "graph"), strict=True)
        scores["prediction"] = sum(weight * scores[name].log_softmax(dim=0) for weight, name in ensembled)
        for name, values in scores.items():
            correct[name] += (values.argmax() == sample.label).item()
        per_class[sample.label].append((scores["prediction"].argmax() == sample.label).item())

    assert report["images"] == 6
    assert report["branches"].keys() == correct.keys()
    for name, count in correct.items():
        branch = report["branches"][name]
        assert branch["top1"] == pytest.approx(count / 6)
        assert branch["top5"] == 1  # of three classes
        low, high = branch["top1_interval_95"]
        assert low <= branch["top1"] <= high
        assert name in printed
    recalls = [sum(hits) / len(hits) for hits in per_class.values()]
    assert report["mean_per_class_accuracy"] == pytest.approx(sum(recalls) / 3)
    assert sum(c["count"] for c in report["worst_confusions"]) == 6 - correct["prediction"]
    assert report["boxes"] is None
    assert report["images_per_second"] > 0
    assert report["epoch"] == 4
    assert report["selected_on"] == saved["selected_on"]
    assert report["selected_on"] in printed
    assert report["settings"] == json.loads(json.dumps(saved["settings"]))


def test_report_does_not_depend_on_config_py(short_copy, evaluation_script, monkeypatch):
    monkeypatch.setitem(config.DATASETS, "folder", {})
    evaluation_script.main([str(short_copy / "best.pth"), "--evaluation_batch_size", "5"])
    report = json.loads((short_copy / "report.json").read_text(encoding="utf-8"))
    assert report["settings"]["evaluation_batch_size"] == 5
    assert report["settings"]["input_size"] == 96


def with_settings(path: Path, **changes: object) -> None:
    saved = load_checkpoint(path)
    saved["settings"] |= changes
    save_checkpoint(path, saved)


def test_data_that_lie_elsewhere(short_copy, picture_tree, tmp_path, evaluation_script):
    path = short_copy / "best.pth"
    evaluation_script.main([str(path)])
    expected = json.loads((short_copy / "report.json").read_text(encoding="utf-8"))
    (short_copy / "report.json").unlink()

    with_settings(path, data_root=str(tmp_path / "gone"))
    with pytest.raises(DataError, match="gone"):
        evaluation_script.main([str(path)])
    assert not (short_copy / "report.json").exists()
    moved = tmp_path / "moved"
    shutil.copytree(picture_tree, moved)
    with_settings(path, checkpoint_dir=f"{path}/below/a/file")  # nor where the run was written
    evaluation_script.main([str(path), "--data_root", str(moved)])
    report = json.loads((short_copy / "report.json").read_text(encoding="utf-8"))
    assert report["branches"] == expected["branches"]
    assert report["worst_confusions"] == expected["worst_confusions"]

    for name in ("blue", "green", "red"):
        (moved / name).rename(moved / f"{name}ish")
    with pytest.raises(DataError, match="'blueish', 'greenish', 'redish'"):
        evaluation_script.main([str(path), "--data_root", str(moved)])


def test_only_pictures_that_are_evaluated_have_to_be_readable(short_copy, picture_tree, tmp_path, evaluation_script):
    tree = Path(shutil.copytree(picture_tree, tmp_path / "tree"))
    catalogue = read_catalogue("folder", tree, seed=0, test_fraction=0.25)
    catalogue.train[0].source.write_bytes(b"no picture")
    evaluation_script.main([str(short_copy / "best.pth"), "--data_root", str(tree)])
    catalogue.test[0].source.write_bytes(b"no picture")
    with pytest.raises(DataError, match="pictures cannot be read"):
        evaluation_script.main([str(short_copy / "best.pth"), "--data_root", str(tree)])


@pytest.mark.parametrize("content", [{"network": {}}, {"conv1.weight": torch.zeros(2)}, {}])
def test_a_file_without_settings_is_refused(tmp_path, evaluation_script, content):
    save_checkpoint(tmp_path / "weights.pth", content)
    with pytest.raises(CheckpointError) as refusal:
        evaluation_script.main([str(tmp_path / "weights.pth")])
    assert str(tmp_path / "weights.pth") in str(refusal.value)


@pytest.mark.parametrize("missing", ["settings", "class_names", "network", "epoch", "selected_on"])
def test_a_checkpoint_that_lacks_a_part_is_refused(short_copy, evaluation_script, missing):
    path = short_copy / "best.pth"
    saved = load_checkpoint(path)
    del saved[missing]
    save_checkpoint(path, saved)
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        evaluation_script.main([str(path)])


def test_settings_of_another_version_are_refused(short_copy, evaluation_script):
    with_settings(short_copy / "best.pth", colour="blue")
    with pytest.raises(CheckpointError, match="colour"):
        evaluation_script.main([str(short_copy / "best.pth")])


@pytest.mark.parametrize(("flag", "value"), [("evaluation_batch_size", "0"), ("workers", "-1"), ("device", "abacus")])
def test_impossible_options_of_the_evaluation_are_refused(short_copy, evaluation_script, flag, value):
    with pytest.raises(SettingsError) as refusal:
        evaluation_script.main([str(short_copy / "best.pth"), f"--{flag}", value])
    assert flag in str(refusal.value)


def test_figures_are_printed_even_where_nothing_can_be_written(short_copy, evaluation_script, capsys):
    (short_copy / "report.json").mkdir()  # stands in for a folder without write permission
    with pytest.raises(OSError, match="report.json"):
        evaluation_script.main([str(short_copy / "best.pth")])
    assert "top-1" in capsys.readouterr().out
