"""Settings that cannot be together, that are nowhere, or that nobody knows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from setting_values import edited_config

from config import DATASETS, Settings, SettingsError, complete, parse_settings
from networks import MODELS
from utils.data import readers
from utils.options import hints
from utils.shared_settings import DATA_SETS, OF_DATA_SET

CUB = ["--dataset", "cub", "--data_root", "somewhere"]
FOLDER = ["--dataset", "folder", "--data_root", "somewhere"]
SHARED = list(hints(Settings))


def refusal_of(name: str, **values: object) -> str:
    """The sentence with which settings for CUB are refused, which names one of them; options are keywords, too."""
    with pytest.raises(SettingsError) as refusal:
        complete(settings_of(**values))
    sentence = str(refusal.value)
    assert sentence.isprintable()  # and so a single line
    assert sentence.startswith(f"{name} is ")
    return sentence


def settings_of(**values: object) -> Settings:
    """Settings for CUB; what is none of the shared ones is put among the options."""
    options = {name: value for name, value in values.items() if name not in SHARED}
    shared = {name: value for name, value in values.items() if name in SHARED}
    return Settings(**({"dataset": "cub", "data_root": "somewhere", "options": options} | shared))


# settings that are possible one by one: name of the one that is refused, all of them, what makes it possible
CONTRADICTIONS = [
    (
        "graph_edges",
        {"model": "sgkrl_published", "graph_edges": "overlap", "graph_scope": "batch"},
        {"graph_scope": "image"},
    ),
    (
        "exit_threshold",
        {"model": "sgkrl_published", "exit_threshold": 0.5, "graph_scope": "batch"},
        {"exit_threshold": 1.0},
    ),
    ("without", {"without": ("weighting",), "spatial_weights": "absolute"}, {"without": ("fusion",)}),
    ("batch_norm", {"batch_norm": "frozen", "pretrained": "none"}, {"pretrained": "weights.pth"}),
    ("sync_batch_norm", {"sync_batch_norm": True, "batch_norm": "per_pass"}, {"batch_norm": "shared"}),
    ("sync_batch_norm", {"sync_batch_norm": True, "batch_norm": "frozen"}, {"sync_batch_norm": False}),
    ("classify_suppressed", {"model": "flrdf", "classify_suppressed": False}, {"suppression": 0.7}),
    ("stride_on_first_conv", {"stride_on_first_conv": True, "backbone": "resnet34"}, {"backbone": "resnet50"}),
    ("warmup_epochs", {"warmup_epochs": 100}, {"warmup_epochs": 99}),
    ("warmup_epochs", {"warmup_epochs": 3, "epochs": 3}, {"epochs": 4}),
    ("warmup_epochs", {"warmup_epochs": 3, "epochs": 3}, {"prediction": ("raw",)}),
    ("warmup_epochs", {"warmup_epochs": 3, "epochs": 3}, {"model": "resnet"}),
    ("warmup_epochs", {"warmup_epochs": 3, "epochs": 3, "prediction": ("raw", "object")}, {"warmup_epochs": 2}),
    ("images_per_class", {"model": "scrim", "images_per_class": 0}, {"images_per_class": 2}),
    ("images_per_class", {"model": "scrim", "images_per_class": 1}, {"loss_weights": {"contrastive": 0.0}}),
    ("images_per_class", {"model": "scrim", "images_per_class": 40}, {"images_per_class": 20}),
    ("images_per_class", {"images_per_class": 7}, {"batch_size": 42}),
    ("images_per_class", {"images_per_class": 3}, {"images_per_class": 40}),  # of a batch of 40
    ("validation", {"validation": 0.0}, {"select_on": "test"}),
    ("image_size", {"image_size": 416}, {"input_size": 416}),
    ("image_size", {"image_size": 447}, {"image_size": 448}),
    ("resize_size", {"resize_size": 447}, {"resize_size": 550}),
    ("resize_size", {"resize_size": 550, "image_size": 600}, {"image_size": 512}),
    ("padding", {"padding": 224}, {"padding": 223}),
    ("padding", {"model": "pmg", "padding": 112, "input_size": 224}, {"input_size": 256}),
    ("jigsaw_blocks", {"model": "flrdf", "jigsaw_blocks": 15}, {"input_size": 480}),  # 448 pixels are 14 cells
    ("parts_in_prediction", {"model": "scrim", "parts_in_prediction": 7}, {"part_proposals": 7}),
    ("part_proposals", {"model": "scrim", "part_proposals": 1, "parts_in_prediction": 1}, {"part_proposals": 2}),
    (
        "part_proposals",
        {"model": "ntsnet", "part_proposals": 1, "parts_in_prediction": 1},
        {"loss_weights": {"ranking": 0.0}},
    ),
    ("data_root", {"data_root": None}, {"dataset": "demo"}),
    ("data_root", {"data_root": ""}, {"dataset": "demo"}),
    ("data_root", {"data_root": "a\0b"}, {"data_root": "a"}),
    ("data_root", {"data_root": "~nobody-of-that-name/x"}, {"data_root": "~/x"}),
]


@pytest.mark.parametrize(("name", "values", "way_out"), CONTRADICTIONS, ids=str)
def test_contradictions_are_refused_and_only_those(name, values, way_out):
    came = values.get(name)
    assert repr(came) in refusal_of(name, **values)
    complete(settings_of(**(values | way_out)))


@pytest.mark.parametrize(("name", "known"), [("dataset", list(DATASETS)), ("model", MODELS)])
@pytest.mark.parametrize("value", ["fish", "x" * 100_000, "a\nb"])
def test_an_unknown_model_or_data_set_is_told_with_the_known_ones(name, known, value):
    for refuse in (lambda: complete(settings_of(**{name: value})), lambda: parse_settings([*CUB, f"--{name}", value])):
        with pytest.raises(SettingsError) as refusal:
            refuse()
        sentence = str(refusal.value)
        assert sentence.isprintable()
        assert sentence.startswith(f"unknown {name} '{value[0]}")
        assert sentence.endswith(f"choose one of {', '.join(known)}")
        assert len(sentence) < 600


def test_a_file_is_not_taken_for_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("data_root", "checkpoint_dir"):
        assert "folder" in refusal_of(name, **{name: str(tmp_path / "file")})
        assert "folder" in refusal_of(name, **{name: str(tmp_path / "file" / "below")})
        assert complete(settings_of(**{name: str(tmp_path)}))
    assert complete(Settings(data_root=str(tmp_path / "file")))  # the demo does not look there


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--data_root", "birds"], "data_root is 'birds'; expected none for data set demo, which is drawn in memory"),
        (["--data_root", "birds", "--labels", "train.csv"], "data_root is 'birds'; expected none for data set demo"),
        (["--labels", "train.csv"], "labels is a setting of data set csv, not of demo: give --dataset csv, or leave"),
        ([*CUB, "--test_labels", "test.csv"], "test_labels is a setting of data set csv, not of cub"),
        ([*FOLDER, "--split_column", "split"], "split_column is a setting of data set csv, not of folder"),
        ([*FOLDER, "--aircraft_level", "family"], "aircraft_level is a setting of data set aircraft, not of folder"),
        (
            [*FOLDER, "--dataset", "csv", "--class_level", "2"],
            "class_level is a setting of data set folder, not of csv",
        ),
    ],
    ids=str,
)
def test_settings_of_another_data_set_are_refused(words, sentence):
    with pytest.raises(SettingsError) as refusal:
        parse_settings(words)
    assert sentence in str(refusal.value)


def test_settings_of_a_data_set_may_stand_in_the_file_while_a_flag_chooses_another(tmp_path, monkeypatch):
    edited = edited_config(tmp_path, monkeypatch, dataset="csv", data_root="birds", labels="train.csv")
    assert edited.parse_settings([]).labels == "train.csv"
    for words in (["--dataset", "demo"], ["--dataset", "folder"], CUB, [*FOLDER, "--class_level", "1"]):
        edited.parse_settings(words)
    forgotten = edited_config(tmp_path, monkeypatch, data_root="birds")
    forgotten.parse_settings(["--dataset", "demo"])
    for words in ([], ["--epochs", "20"]):
        with pytest.raises(forgotten.SettingsError, match="data_root is 'birds'; expected none for data set demo"):
            forgotten.parse_settings(words)
    forgotten = edited_config(tmp_path, monkeypatch, dataset="folder", data_root="birds", label_column="species")
    with pytest.raises(forgotten.SettingsError, match="label_column is a setting of data set csv, not of folder"):
        forgotten.parse_settings([])


def test_each_reader_reads_the_settings_of_its_data_set():
    assert set(readers.READERS) >= DATA_SETS
    for name in sorted(DATA_SETS):
        source = Path(readers.__path__[0], f"{name}.py").read_text(encoding="utf-8")
        read = set(re.findall(r"\bsource\.(\w+)", source)) & set(OF_DATA_SET)
        assert read == {setting for setting, owner in OF_DATA_SET.items() if owner == name}, name


def test_types_come_before_anything_else():
    """A name that cannot be looked up must not be."""
    refusal_of("seed", seed="3", model="vgg")
    refusal_of("model", model=["sgkrl"])
    refusal_of("dataset", dataset={})


def test_no_validation_must_be_asked_for():
    settings = parse_settings([*CUB, "--validation", "0", "--select_on", "test"])
    assert (settings.validation, settings.select_on) == (0, "test")
    with pytest.raises(SettingsError, match="select_on"):
        parse_settings([*CUB, "--validation", "0"])
