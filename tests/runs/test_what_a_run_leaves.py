"""What train.py leaves in a run's folder, and what best.pth is chosen by."""

from __future__ import annotations

import json
import re

import pytest
import torch
from whole_runs import BRANCHES, put_together, read_events, read_log

import train
from config import Settings, SettingsError
from datasets import Pictures, read_catalogue
from networks import find_system
from utils.checkpoint import load_checkpoint
from utils.data import demo_birds
from utils.data.image_batches import normalised


def test_folder_of_a_run(finished):
    names = {re.sub(r"tfevents.*", "tfevents", path.name) for path in finished.iterdir()}
    files = {"config.json", "log.jsonl", "last.pth", "previous.pth", "best.pth", "events.out.tfevents", "pictures"}
    assert names == files
    assert sorted(path.name for path in (finished / "pictures").iterdir()) == [
        "epoch-001.png",
        "epoch-003.png",
        "epoch-004.png",
    ]
    saved = json.loads((finished / "config.json").read_text(encoding="utf-8"))
    in_checkpoint = load_checkpoint(finished / "last.pth")["settings"]
    assert saved == json.loads(json.dumps(in_checkpoint))
    assert in_checkpoint.keys() == Settings.__dataclass_fields__.keys()
    assert (saved["epochs"], saved["model"], saved["options"]["windows"]) == (4, "sgkrl", [[[[5, 5]], 1]])


def test_log_has_a_line_per_epoch(finished):
    lines = read_log(finished)
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        trained = ("raw",) if line["epoch"] == 1 else BRANCHES
        logged = {f"train/loss/{name}" for name in (*trained, "total")} | {f"train/accuracy/{name}" for name in trained}
        logged |= {f"validation/loss/{name}" for name in (*BRANCHES, "total")}
        logged |= {f"validation/accuracy/{name}" for name in (*BRANCHES, "prediction")}
        logged |= {f"validation/ensemble_weight/{name}" for name in ("raw", "fused", "object", "graph")}
        logged |= {"schedule/learning_rate", "speed/train_images_per_second", "speed/validation_images_per_second"}
        assert line.keys() == logged | {"validation/exit_threshold", "epoch", "train/images", "validation/images"}
        assert (line["train/images"], line["validation/images"]) == (12, 6)
        assert line["train/loss/total"] == pytest.approx(sum(line[f"train/loss/{name}"] for name in trained), rel=1e-6)
    assert lines[0]["schedule/learning_rate"] == pytest.approx(0.01 / 25)  # one_cycle begins at a 25th


def test_tensorboard_holds_the_log_pictures_and_settings(finished):
    events = read_events(finished)
    lines = read_log(finished)
    tags = {name for line in lines for name in line} - {"epoch"}
    assert set(events.Tags()["scalars"]) == tags
    for tag in tags:
        points = {point.step: point.value for point in events.Scalars(tag)}
        expected = {line["epoch"]: line[tag] for line in lines if tag in line}
        assert points == pytest.approx(expected, rel=1e-6)
    assert events.Tags()["images"] == ["validation/localization"]
    assert [image.step for image in events.Images("validation/localization")] == [1, 3, 4]
    (text_tag,) = (tag for tag in events.Tags()["tensors"] if tag.startswith("settings"))
    text = events.Tensors(text_tag)[0].tensor_proto.string_val[0].decode()
    shared = [name for name in Settings.__dataclass_fields__ if name != "options"]
    for name in (*shared, *find_system("sgkrl").Options.__dataclass_fields__, "selected_on"):
        assert re.search(rf"\b{name}\b", text), name


def test_best_is_the_epoch_of_the_highest_validation_accuracy(finished):
    accuracies = {line["epoch"]: line["validation/accuracy/prediction"] for line in read_log(finished)}
    best_epoch = max(accuracies, key=lambda epoch: (accuracies[epoch], -epoch))  # of equal ones the first
    best, last = load_checkpoint(finished / "best.pth"), load_checkpoint(finished / "last.pth")
    assert best["epoch"] == best_epoch
    assert best["best"] == last["best"] == {"accuracy": accuracies[best_epoch], "epoch": best_epoch}
    assert last["epoch"] == 4
    assert best["class_names"] == last["class_names"] == ["blue", "green", "red"]
    assert best["selected_on"].startswith("6 validation images")
    assert "optimizer" not in best


@pytest.mark.parametrize("accuracies", [(0.2, 0.6, 0.6), (0.0, 0.0)])
def test_best_follows_the_figures(tiny_run, tmp_path, monkeypatch, accuracies):
    """With made-up figures, and all other numbers pointing the other way."""
    calls = iter(accuracies)

    def evaluate(network, batches, **options):
        accuracy = next(calls)
        return {
            "loss/total": accuracy,
            "accuracy/raw": 1 - accuracy,
            "accuracy/prediction": accuracy,
            "images_per_second": 1.0,
        }

    monkeypatch.setattr(train, "evaluate", evaluate)
    monkeypatch.setattr(train, "train_one_epoch", lambda *a, **o: {"loss/total": 1.0, "images_per_second": 1.0})
    train.main(tiny_run(tmp_path, "--epochs", str(len(accuracies))))
    best_epoch = accuracies.index(max(accuracies)) + 1
    assert load_checkpoint(tmp_path / "folder-resnet" / "best.pth")["epoch"] == best_epoch


def test_demo_birds_have_boxes(tmp_path, monkeypatch, evaluation_script):
    """Drawn pictures, larger than the backbone's input, through MMAL-Net: overlap of boxes from end to end."""
    monkeypatch.setattr(demo_birds, "DEMO_TRAIN", 4)
    monkeypatch.setattr(demo_birds, "DEMO_TEST", 2)
    names = read_catalogue("demo", None).class_names[:3]
    train.main(
        [
            *("--dataset", "demo", "--model", "mmal", "--backbone", "resnet18", "--classes", *names),
            *("--input_size", "96", "--image_size", "128", "--windows", "((((5, 5),), 2),)", "--warmup_epochs", "0"),
            *("--epochs", "1", "--batch_size", "4", "--workers", "0", "--checkpoint_dir", str(tmp_path)),
            *("--precision", "float32"),  # as the boxes below, wherever the tests run
        ]
    )
    folder = tmp_path / "demo-mmal"
    (line,) = read_log(folder)
    assert 0 < line["validation/box_iou/mean"] < 1
    assert 0 <= line["validation/box_iou/share_at_0.5"] <= 1
    assert {"validation/box_iou/mean", "validation/box_iou/share_at_0.5"} <= set(read_events(folder).Tags()["scalars"])

    evaluation_script.main([str(folder / "best.pth")])
    boxes = json.loads((folder / "report.json").read_text(encoding="utf-8"))["boxes"]
    saved = load_checkpoint(folder / "best.pth")
    network = put_together(saved)
    catalogue = read_catalogue("demo", None, classes=names)
    overlaps = []
    for sample in Pictures(catalogue.test, image_size=128):
        with torch.no_grad():
            x0, y0, x1, y1 = network(normalised(sample.image[None])).object_boxes[0].tolist()
        predicted, true = (x0, y0, x1 + 1, y1 + 1), [edge * 96 / 128 for edge in sample.box.tolist()]
        width = max(min(predicted[2], true[2]) - max(predicted[0], true[0]), 0)
        height = max(min(predicted[3], true[3]) - max(predicted[1], true[1]), 0)
        areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (predicted, true)]
        overlaps.append(width * height / (sum(areas) - width * height))
    assert len(overlaps) == 6
    assert boxes["mean"] == pytest.approx(sum(overlaps) / 6, rel=1e-5)
    assert boxes["share_at_0.5"] == pytest.approx(sum(overlap >= 0.5 for overlap in overlaps) / 6)


def test_selection_on_test_images_is_said_everywhere(tiny_run, tmp_path, capsys, evaluation_script):
    train.main(tiny_run(tmp_path, "--select_on", "test", "--validation", "0"))
    folder = tmp_path / "folder-resnet"
    assert "TEST" in capsys.readouterr().out
    (line,) = read_log(folder)
    assert (line["train/images"], line["test/images"]) == (16, 6)  # of 18, the last batch of 2 is left out
    assert not [name for name in line if name.startswith("validation/")]
    assert "TEST" in load_checkpoint(folder / "best.pth")["selected_on"]
    evaluation_script.main([str(folder / "best.pth")])
    assert "TEST" in json.loads((folder / "report.json").read_text(encoding="utf-8"))["selected_on"]
    assert "TEST" in capsys.readouterr().out


def test_no_validation_has_to_be_asked_for(tiny_run, tmp_path):
    with pytest.raises(SettingsError, match="select_on"):
        train.main(tiny_run(tmp_path, "--validation", "0"))
    assert list(tmp_path.iterdir()) == []
