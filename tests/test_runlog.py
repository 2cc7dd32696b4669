"""The run's log read back: TensorBoard's own reader, strict JSON, resuming."""

from __future__ import annotations

import json
import os

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2
from tensorboard.summary.writer import event_file_writer

from networks import MODELS, build_network, own_settings
from utils.errors import UserError
from utils.reporting.runlog import RunLog, describe, log_evaluation


@pytest.fixture(autouse=True)
def files_numbered_from_zero(monkeypatch):
    """TensorBoard reads files of one second in the order of their numbers as text, where 10 is before 9."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


def _events(folder):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    events.Reload()
    return events


def _lines(folder):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (folder / "log.jsonl").read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def _log(folder, epochs, shift=0.0, resume_epoch=None):
    with RunLog(folder, resume_epoch=resume_epoch) as log:
        for epoch in epochs:
            train = {"loss/total": 10.0 - epoch + shift, "images": 90}
            validation = {"accuracy/object": epoch / 10 + shift}
            groups = {"train": train, "validation": validation}
            groups |= {"schedule": {"learning_rate": 0.25}, "speed": {"images_per_second": 33}}
            log.log_epoch(epoch, groups)


def test_tensorboard_and_json_hold_the_same(tmp_path):
    _log(tmp_path, [1, 2])
    lines = _lines(tmp_path)
    assert lines[1] == {
        "epoch": 2,
        "train/loss/total": 8.0,
        "train/images": 90,
        "validation/accuracy/object": 0.2,
        "schedule/learning_rate": 0.25,
        "speed/images_per_second": 33,
    }
    events = _events(tmp_path)
    assert set(events.Tags()["scalars"]) == set(lines[0]) - {"epoch"}
    for tag in events.Tags()["scalars"]:
        points = [(point.step, point.value) for point in events.Scalars(tag)]
        assert points == [(line["epoch"], pytest.approx(line[tag])) for line in lines]


def test_a_line_is_on_the_disk_before_the_checkpoint_that_follows(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append((os.fstat(number).st_ino, os.fstat(number).st_size)))
    with RunLog(tmp_path) as log:
        log.log_epoch(1, {"train": {"loss/total": 0.5}})
        status = (tmp_path / "log.jsonl").stat()
        assert (status.st_ino, status.st_size) in synced


def test_each_epoch_is_on_disk_before_the_log_is_closed(tmp_path):
    log = RunLog(tmp_path / "deep" / "folder")
    log.log_epoch(1, {"train": {"loss/total": torch.tensor(0.5)}})
    assert _lines(tmp_path / "deep" / "folder") == [{"epoch": 1, "train/loss/total": 0.5}]
    assert _events(tmp_path / "deep" / "folder").Scalars("train/loss/total")[0].value == 0.5
    log.close()


def test_numbers_that_are_not_finite_stay_json(tmp_path):
    with RunLog(tmp_path) as log:
        losses = {"loss/total": float("nan"), "loss/raw": float("-inf"), "loss/object": 1.0}
        log.log_epoch(1, {"train": losses})
    expected = {"epoch": 1, "train/loss/total": None, "train/loss/raw": None, "train/loss/object": 1.0}
    assert _lines(tmp_path) == [expected]


def test_resume_drops_later_epochs_in_both(tmp_path):
    _log(tmp_path, [1, 2, 3])
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"epoch": 4, "train/lo')  # killed while writing
    _log(tmp_path, [2, 3], shift=0.5, resume_epoch=1)
    assert [(line["epoch"], line["train/loss/total"]) for line in _lines(tmp_path)] == [(1, 9.0), (2, 8.5), (3, 7.5)]
    points = [(point.step, point.value) for point in _events(tmp_path).Scalars("train/loss/total")]
    assert points == [(1, 9.0), (2, 8.5), (3, 7.5)]


def test_a_new_run_in_an_old_folder_starts_empty(tmp_path):
    _log(tmp_path, [0, 1, 2])
    _log(tmp_path, [0], shift=0.5)
    assert [line["train/loss/total"] for line in _lines(tmp_path)] == [10.5]
    points = [(point.step, point.value) for point in _events(tmp_path).Scalars("train/loss/total")]
    assert points == [(0, 10.5)]


def test_pictures_and_settings(tmp_path):
    with RunLog(tmp_path) as log:
        log.log_pictures("pictures/validation", torch.zeros(3, 20, 30, dtype=torch.uint8), epoch=4)
        log.log_settings({"model": "sgkrl", "classes": "a|b"})
    events = _events(tmp_path)
    picture = events.Images("pictures/validation")[0]
    assert (picture.step, picture.width, picture.height) == (4, 30, 20)
    text = events.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text.splitlines() == ["| setting | value |", "| --- | --- |", "| model | sgkrl |", "| classes | a\\|b |"]


def test_a_disabled_log_writes_nothing(tmp_path):
    with RunLog(tmp_path / "run", enabled=False) as log:
        log.log_epoch(1, {"train": {"loss/total": 1.0}})
        log.log_pictures("pictures/train", torch.zeros(3, 8, 8, dtype=torch.uint8), epoch=1)
        log.log_settings("text")
    assert list(tmp_path.iterdir()) == []


CURVES = [
    *("train/loss/total", "train/loss/raw", "train/loss/ranking", "validation/accuracy/prediction"),
    *(
        "train/accuracy/graph",
        "validation/box_iou/mean",
        "validation/box_iou/share_at_0.5",
        "schedule/learning_rate",
        "train/images",
    ),
    *("speed/train_images_per_second", "calibration_error"),
]


def test_every_curve_says_what_it_means(tmp_path):
    with RunLog(tmp_path, of_losses={"ranking": "Whether it is ranked as it classifies."}) as log:
        log.log_epoch(1, {"": dict.fromkeys(CURVES, 0.5)})
    events = _events(tmp_path)
    assert len(events.Tags()["scalars"]) == len(CURVES)
    descriptions = [events.SummaryMetadata(f"/{name}").summary_description for name in CURVES]
    assert all(len(text.splitlines()) == 1 for text in descriptions)
    assert len(set(descriptions)) == len(CURVES)
    assert describe("something/else", {}) == ""


@pytest.mark.usefixtures("thin_trunk")
@pytest.mark.parametrize("model", MODELS)
def test_terms_that_are_no_branch_are_not_described_as_one(model):
    learned = {"localization": "learned"} if "localization" in own_settings(model) and model != "resnet" else {}
    for own in ({}, learned):
        network = build_network(model, num_classes=3, backbone="resnet18", input_size=96, **own)
        terms = network.loss_weights.keys() - set(network.branches)
        assert network.loss_descriptions.keys() == terms
        described = {describe(f"train/loss/{name}", network.loss_descriptions) for name in (*terms, "raw")}
        assert len(described) == len(terms) + 1


def _row(folder):
    metadata = _events(folder).SummaryMetadata("_hparams_/session_start_info")
    return plugin_data_pb2.HParamsPluginData.FromString(metadata.plugin_data.content).session_start_info


def test_a_run_is_a_row_of_the_table_of_runs(tmp_path):
    settings = {"model": "sgkrl", "epochs": 3, "flip": 0.5, "fresh": False, "classes": None, "windows": ((4, 4), 2)}
    with RunLog(tmp_path / "demo-sgkrl") as log:
        log.log_settings(settings)
    row = _row(tmp_path / "demo-sgkrl")
    values = {name: getattr(value, value.WhichOneof("kind")) for name, value in row.hparams.items()}
    assert values == settings | {"classes": "None", "windows": "((4, 4), 2)"}
    metadata = _events(tmp_path / "demo-sgkrl").SummaryMetadata("_hparams_/experiment")
    experiment = plugin_data_pb2.HParamsPluginData.FromString(metadata.plugin_data.content).experiment
    columns = {(info.name.group, info.name.tag) for info in experiment.metric_infos}
    assert {("test", "accuracy/prediction"), ("", "validation_ema/accuracy/prediction")} <= columns
    assert all(describe(info.name.tag, {}) for info in experiment.metric_infos)


def test_an_evaluation_replaces_the_one_before_it(tmp_path):
    log_evaluation(tmp_path / "test", 4, {"accuracy/prediction": 0.25})
    pictures = torch.rand(3, 3, 8, 8)
    log_evaluation(
        tmp_path / "test",
        5,
        {"accuracy/prediction": 0.5, "box_iou/mean": 0.75},
        mat=torch.eye(3),
        metadata=["a", "b", "c"],
        label_img=pictures,
    )
    events = _events(tmp_path / "test")
    assert [(point.step, point.value) for point in events.Scalars("accuracy/prediction")] == [(5, 0.5)]
    (table,) = (tmp_path / "test").rglob("tensors.tsv")
    assert table.read_text().splitlines()[1].split() == ["0.0", "1.0", "0.0"]
    (names,) = (tmp_path / "test").rglob("metadata.tsv")
    assert names.read_text().splitlines() == ["a", "b", "c"]
    assert "tensors.tsv" in (tmp_path / "test" / "projector_config.pbtxt").read_text()
    log_evaluation(tmp_path / "test", 6, {"accuracy/prediction": 0.75})
    assert [path.name.split(".")[0] for path in (tmp_path / "test").iterdir()] == ["events"]
    pictures_of_a_class = tmp_path / "test" / "00005" / "1.jpg"  # of data that are evaluated into their own folder
    pictures_of_a_class.parent.mkdir()
    pictures_of_a_class.touch()
    log_evaluation(tmp_path / "test", 7, {"accuracy/prediction": 0.75})
    assert pictures_of_a_class.exists()


def test_a_log_that_is_no_text_is_refused_and_kept(tmp_path):
    (tmp_path / "log.jsonl").write_bytes(b'{"epoch": 1}\n\xff\xfe\n')
    with pytest.raises(UserError, match=r"log\.jsonl is not UTF-8 text"):
        RunLog(tmp_path, resume_epoch=1)
    assert (tmp_path / "log.jsonl").read_bytes().endswith(b"\xff\xfe\n")
    (tmp_path / "log.jsonl").write_text('{"epoch": "one"}\n{"epoch": 1}\n')
    RunLog(tmp_path, resume_epoch=1).close()
    assert (tmp_path / "log.jsonl").read_text() == '{"epoch": 1}\n'
