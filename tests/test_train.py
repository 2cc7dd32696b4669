"""Whole runs: train.py and test.py from their command lines to the files they leave."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from launching import TORCHRUN, run_python, run_script, run_two_processes
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import config
import datasets
import export
import predict
import train
import utils.run
from config import Settings, SettingsError, rebuilt
from datasets import DataError, Pictures, read_catalogue
from networks import MODELS, build_network, find_system
from utils.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from utils.data import demo_birds
from utils.data.image_batches import normalised
from utils.errors import Stopped, UserError, exit_with_one_sentence
from utils.options import flat
from utils.run import Run
from utils.training import run_folder
from utils.training.building import build_from_settings, check_shares, load_trained, note_on_untrained
from utils.training.distributed import unwrap
from utils.training.nonfinite import NonFiniteLossError
from utils.training.resume import FREE_ON_RESUME

pytestmark = pytest.mark.usefixtures("thin_trunk")

BRANCHES = ("raw", "fused", "object", "window", "graph")

# Everything that a resumed run could get wrong: flips, jitter and dropout are on; warm-up ends, the mask begins and the
# learning rate changes at every step.
FOUR_EPOCHS = [
    *("--epochs", "4", "--warmup_epochs", "1", "--schedule", "one_cycle"),
    *("--learning_rate", "0.01", "--head_learning_rate_factor", "5", "--clip_gradient_norm", "1"),
    *("--label_smoothing", "0.1", "--dropout", "0.5", "--pictures_every", "3"),
]
MASKED = ["--mask_from_epoch", "3"]  # of sgkrl
TWO_EPOCHS = ["--epochs", "2", "--schedule", "steps", "--milestones", "1", "--learning_rate", "0.05"]


def read_log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def without_speeds(lines: list[dict]) -> list[dict]:
    return [{name: v for name, v in line.items() if not name.startswith("speed/")} for line in lines]


def read_events(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    events.Reload()
    return events


def assert_equal(one: object, other: object, place: str = "") -> None:
    """Two checkpoints hold the same, every tensor bit for bit."""
    assert type(one) is type(other), place
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, place
        assert torch.equal(one, other), place
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), place
        for name, value in one.items():
            assert_equal(value, other[name], f"{place}/{name}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), place
        for index, (ours, theirs) in enumerate(zip(one, other, strict=True)):
            assert_equal(ours, theirs, f"{place}/{index}")
    else:
        assert one == other, place


def interrupt_in_epoch(monkeypatch: pytest.MonkeyPatch, epoch: int) -> None:
    """Ctrl-C after the training of an epoch, before its evaluation."""
    evaluate = train.evaluate
    plan_epoch, planned = train.plan_epoch, []

    def plan(system, number, *arguments, **options):
        planned.append(number)
        return plan_epoch(system, number, *arguments, **options)

    def interrupted(*arguments, **options):
        if planned[-1] == epoch:
            raise KeyboardInterrupt
        return evaluate(*arguments, **options)

    monkeypatch.setattr(train, "plan_epoch", plan)
    monkeypatch.setattr(train, "evaluate", interrupted)


@pytest.fixture(scope="module", autouse=True)
def _no_wait_for_the_disk():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file_number: None)
        yield


@pytest.fixture
def tmp_path(tmp_path):
    """pytest's own, emptied after the test: checkpoints are large, and pytest would keep them for three sessions."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def finished(tiny_run, runs) -> Path:
    """The folder of an uninterrupted run of SG-KRL over four epochs; tests only read it."""
    train.main(tiny_run(runs, *FOUR_EPOCHS, *MASKED, model="sgkrl"))
    return runs / "folder-sgkrl"


@pytest.fixture(scope="module")
def short(tiny_run, runs) -> Path:
    """The folder of a ResNet's run over two epochs; tests only read it."""
    train.main(tiny_run(runs, *TWO_EPOCHS))
    return runs / "folder-resnet"


@pytest.fixture
def short_copy(short, tmp_path) -> Path:
    """A copy of that folder whose files may be replaced or removed, but not written into: they are hard links."""
    return Path(shutil.copytree(short, tmp_path / "runs" / short.name, copy_function=os.link))


# ---- What a run leaves ----------------------------------------------------------------------------------------------


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


@pytest.fixture(scope="module", params=["mmal", *(pytest.param(m, marks=pytest.mark.slow) for m in ("flrdf", "scrim"))])
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


# ---- Continuing -----------------------------------------------------------------------------------------------------


def assert_same_run(one: Path, other: Path, *, but: frozenset = frozenset()) -> None:
    """Logs and checkpoints are the same, but for settings that are free and those in `but`."""
    assert without_speeds(read_log(one)) == without_speeds(read_log(other))
    for name in ("last.pth", "best.pth"):
        contents = [load_checkpoint(folder / name) for folder in (one, other)]
        for content in contents:
            settings = content["settings"]
            content.pop("begun_with_epochs", None)
            content["settings"] = {name: v for name, v in settings.items() if name not in FREE_ON_RESUME | but}
        assert_equal(*contents, name)


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
    ("options", "more"), [(["--schedule", "steps", "--milestones"], "3"), (["--schedule", "exponential"], "4")]
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
    assert "is of a run of 4 epochs whose schedule one_cycle spreads over all of them, and 5 came" in sentence
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


@pytest.mark.parametrize("options", LEARNING.values(), ids=LEARNING)
def test_a_run_stopped_within_an_epoch_equals_an_uninterrupted_one(options, tiny_run, tmp_path, monkeypatch):
    """Each time after its second step of three."""
    arguments = ("--epochs", "3", *options)
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
    look_on = Run.after_evaluation_batch

    def stop(run, *arguments):
        run.stop.requested = True
        look_on(run, *arguments)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Run, "after_evaluation_batch", stop)
        train.main(tiny_run(tmp_path / "parts", *arguments, model="ntsnet"))
    assert load_checkpoint(tmp_path / "parts" / "folder-ntsnet" / "last.pth")["progress"]["step"] == 3
    train.main(tiny_run(tmp_path / "parts", *arguments, model="ntsnet"))
    assert_same_run(tmp_path / "whole" / "folder-ntsnet", tmp_path / "parts" / "folder-ntsnet")


@pytest.fixture(scope="module")
def averaged(tiny_run, runs) -> Path:
    """The folder of a run that keeps an average of its weights; tests only read it."""
    train.main(tiny_run(runs / "ema", "--epochs", "3", "--ema_decay", "0.9", "--learning_rate", "0.05"))
    return runs / "ema" / "folder-resnet"


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


def stop_after_step(monkeypatch: pytest.MonkeyPatch, epoch: int, step: int) -> None:
    """Ask the run to stop after a step of an epoch."""

    def save_after(self, number):
        if (self.current, number) == (epoch, step):
            self.stop.requested = True
            return self.stop.agree(self.device)
        return False

    monkeypatch.setattr(utils.run.Run, "save_after", save_after)


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


def test_a_finished_run_started_again_keeps_its_files(short, short_copy, tiny_run, capsys):
    train.main(tiny_run(short_copy.parent, *TWO_EPOCHS))
    assert "done" in capsys.readouterr().out
    for name in ("last.pth", "best.pth", "log.jsonl", "config.json"):
        assert (short_copy / name).read_bytes() == (short / name).read_bytes(), name
    loss = [(point.step, point.value) for point in read_events(short_copy).Scalars("train/loss/total")]
    assert [step for step, _ in loss] == [1, 2]
    assert loss == [(point.step, point.value) for point in read_events(short).Scalars("train/loss/total")]


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


def test_random_parts_of_the_pictures_are_trained_on(short, tiny_run, tmp_path):
    train.main(tiny_run(tmp_path, *TWO_EPOCHS, "--epochs", "1", "--crop_scale", "0.5"))
    (line,), first = read_log(tmp_path / short.name), read_log(short)[0]
    assert math.isfinite(line["train/loss/total"])
    assert line["train/loss/total"] != first["train/loss/total"]


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


# ---- What best.pth is chosen by -------------------------------------------------------------------------------------


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


# ---- Refused before anything is written -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "values", "word"),
    [
        ("backbone", ["resnet9"], "resnet9"),
        ("spatial_weights", ["tangled"], "tangled"),
        ("graph_scope", ["batch"], "graph_scope"),
        ("windows", ["fish"], "fish"),
        ("windows", ["((((14, 14),), 5),)"], "5"),
        ("windows", ["(1, 2)"], "windows"),
        ("prediction", ["raw", "tail"], "tail"),
        ("pretrained", ["missing.pth"], "missing.pth"),
        ("pretrained", ["IMAGENET"], "IMAGENET"),
        ("stride_on_first_conv", [], "stride_on_first_conv"),
        ("data_root", ["nowhere"], "nowhere"),
        ("classes", ["pur*"], "pur*"),
        ("loss_weights", ["crown=1"], "crown"),
        ("class_weights", ["1", "2"], "class_weights has 2 numbers and the data 3 classes"),
        ("mixup", ["0.2"], "mixup"),
        ("loss_weights", ["raw=0", "fused=0", "object=0", "window=0", "graph=0"], "loss_weights"),
    ],
)
def test_what_cannot_be_built_is_refused_before_anything_is_written(tiny_run, tmp_path, flag, values, word):
    with pytest.raises((ValueError, OSError)) as refusal:
        train.main(tiny_run(tmp_path, f"--{flag}", *values, model="sgkrl"))
    sentence = str(refusal.value)
    assert word in sentence
    assert len(sentence.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("model", ["pmg", "mcloss"])
def test_two_processes_that_get_one_image_each_are_refused_where_heads_normalise_over_images(
    tiny_run, tmp_path, monkeypatch, model
):
    monkeypatch.setattr(train, "world_size", lambda: 2)
    with pytest.raises(UserError, match="gets 1 training image and needs 2") as refusal:
        train.main(tiny_run(tmp_path, "--batch_size", "2", model=model))
    assert len(str(refusal.value).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("batch_size", "images", "gpus", "smallest"),
    [(2, 9, 1, 2), (1, 9, 1, 1), (4, 1, 1, 1), (8, 9, 4, 2), (4, 9, 4, 1), (5, 9, 3, 1), (9, 9, 4, 3), (6, 9, 2, 3)],
)
def test_the_smallest_share_of_a_batch_is_that_of_the_last_gpu(batch_size, images, gpus, smallest):
    """As torch's scatter cuts a batch; a training set below `batch_size` is one batch."""
    network = nn.Module() if gpus == 1 else nn.DataParallel(nn.Module())
    (network if gpus == 1 else network.module).smallest_batch = smallest
    network.device_ids = list(range(gpus))
    loader = SimpleNamespace(batch_size=batch_size, sampler=range(images))
    check_shares(network, loader)
    unwrap(network).smallest_batch = smallest + 1
    with pytest.raises(UserError, match=f"gets {smallest} training image"):
        check_shares(network, loader)
    unwrap(network).norm = nn.SyncBatchNorm(1)
    check_shares(network, loader)


# ---- test.py --------------------------------------------------------------------------------------------------------


def put_together(saved: dict) -> torch.nn.Module:
    """A checkpoint's network, put together here."""
    settings = {name: saved["settings"][name] for name in ("backbone", "input_size")} | saved["settings"]["options"]
    network = build_network(saved["settings"]["model"], num_classes=len(saved["class_names"]), **settings)
    network.load_state_dict(saved["network"])
    return network.eval()


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
        scores["prediction"] = sum(scores[name].softmax(dim=0) for name in ("raw", "fused", "object", "graph"))
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
    evaluation_script.main([str(path), "--data_root", str(moved)])
    report = json.loads((short_copy / "report.json").read_text(encoding="utf-8"))
    assert report["branches"] == expected["branches"]
    assert report["worst_confusions"] == expected["worst_confusions"]

    for name in ("blue", "green", "red"):
        (moved / name).rename(moved / f"{name}ish")
    with pytest.raises(DataError, match="'blueish', 'greenish', 'redish'"):
        evaluation_script.main([str(path), "--data_root", str(moved)])


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


# ---- From the command line ------------------------------------------------------------------------------------------


def test_an_impossible_value_ends_with_one_line(tiny_run, tmp_path):
    result = run_script("train.py", *tiny_run(tmp_path), "--input_size", "100")
    assert result.returncode == 2
    assert re.fullmatch(r"error: input_size is 100; .*multiple of 32.*\n", result.stderr)
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_flag_ends_with_its_name(tiny_run, tmp_path):
    result = run_script("train.py", *tiny_run(tmp_path), "--imput_size", "96")
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "--imput_size" in result.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("model", "launch"),
    [
        pytest.param("resnet", partial(run_python, *TORCHRUN), id="resnet by torchrun", marks=pytest.mark.slow),
        ("scrim", partial(run_two_processes, thin=True)),
        pytest.param("apinet", partial(run_two_processes, thin=True), marks=pytest.mark.slow),
        pytest.param("ntsnet", partial(run_two_processes, thin=True), marks=pytest.mark.slow),
    ],
)
def test_two_processes_train_and_evaluate_together(model, launch, tiny_run, picture_tree, tmp_path):
    """With a single image to select on: the second process has none, and must not keep the first one waiting."""
    tree = tmp_path / "tree"
    shutil.copytree(picture_tree, tree / "train")
    (tree / "test" / "red").mkdir(parents=True)
    shutil.copy(picture_tree / "red" / "0.png", tree / "test" / "red")
    options = ("--data_root", str(tree), "--select_on", "test", "--warmup_epochs", "0")
    arguments = tiny_run(tmp_path, *options, model=model)
    result = launch("train.py", *arguments)
    assert result.returncode == 0, result.stderr[-2000:]
    folder = tmp_path / f"folder-{model}"
    (line,) = read_log(folder)
    assert line["test/images"] == 1
    assert line["train/images"] == 24  # all of them: the test images choose, so none is held back
    assert result.stdout.count("epoch 1/1") == 1
    assert result.stdout.count("done") == 1
    weights = load_checkpoint(folder / "last.pth")["network"]
    assert not [name for name in weights if name.startswith("module.")]


def test_a_batch_that_processes_cannot_share_is_refused(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "world_size", lambda: 4)
    for options, words in (
        (("--batch_size", "6"), ["6", "4"]),
        (("--images_per_class", "2"), ["4", "images_per_class 2"]),
    ):
        with pytest.raises(UserError) as refusal:
            train.main(tiny_run(tmp_path, *options))
        assert all(word in str(refusal.value) for word in words)
    assert list(tmp_path.iterdir()) == []


def test_a_broken_picture_met_by_a_worker_ends_with_one_line(tiny_run, picture_tree, tmp_path, capsys, monkeypatch):
    """One that was whole when the run began."""
    monkeypatch.setattr(datasets, "find_bad_pictures", lambda entries, **options: {})
    tree = Path(shutil.copytree(picture_tree, tmp_path / "tree"))
    for path in tree.glob("red/*.png"):
        path.write_bytes(b"not a picture")
    with pytest.raises(SystemExit) as ending, exit_with_one_sentence():
        train.main(tiny_run(tmp_path / "runs", "--data_root", str(tree), "--workers", "1"))
    assert ending.value.code == 2
    assert re.fullmatch(r"error: \S*tree/red/\d\.png cannot be read as a picture.*\n", capsys.readouterr().err)


def test_evaluation_of_an_absent_checkpoint_ends_with_one_line(tmp_path, capsys, evaluation_script):
    with pytest.raises(SystemExit) as ending, exit_with_one_sentence():
        evaluation_script.main([str(tmp_path / "best.pth")])
    assert ending.value.code == 2
    assert re.fullmatch(r"error: .*best\.pth.*\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("error", "code", "word"),
    [
        (SettingsError("epochs is 0"), 2, "error: epochs is 0"),
        (OSError(28, "No space left on device"), 2, "No space left"),
        (NonFiniteLossError("no longer finite"), 1, "error: no longer finite"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_errors_that_a_user_can_mend_end_with_one_line(error, code, word, capsys):
    with pytest.raises(SystemExit) as ending, exit_with_one_sentence():
        raise error
    assert ending.value.code == code
    (line,) = capsys.readouterr().err.splitlines()
    assert word in line


def test_of_several_processes_each_tells_its_own_error_and_one_what_all_agreed_on(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setattr(sys, "argv", ["train.py", "--fresh"])
    for error in (SettingsError("no GPU of its own"), Stopped(), NonFiniteLossError("no longer finite")):
        with pytest.raises(SystemExit), exit_with_one_sentence():
            raise error
    assert capsys.readouterr().err == "[process 2] error: no GPU of its own\n"
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit), exit_with_one_sentence(training=True):
        raise Stopped
    assert capsys.readouterr().err.endswith("with the same command, without --fresh\n")


def test_faults_keep_their_traceback():
    with pytest.raises(KeyError), exit_with_one_sentence():
        {}["a"]
    with pytest.raises(json.JSONDecodeError), exit_with_one_sentence():
        json.loads("{")  # raised inside a library, by nothing that the user gave
    with pytest.raises(ValueError, match="invalid literal"), exit_with_one_sentence():
        int("a slip on a line of ours")
    with pytest.raises(OSError, match="descriptor"), exit_with_one_sentence():
        os.close(10**6)
