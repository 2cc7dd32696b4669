"""Settings: edits, the table of data sets, the command line, and what is refused."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import subprocess
import sys
import typing
from pathlib import Path
from types import SimpleNamespace

import pytest

import config
from config import Settings, SettingsError, complete, parse_settings, run_name

CUB = ["--dataset", "cub", "--data_root", "somewhere"]

# field -> words after its flag, and the value they stand for
WORDS = {
    "model": ("mmal", "mmal"),
    "dataset": ("cars", "cars"),
    "data_root": ("a b/c", "a b/c"),
    "classes": (["*_Gull", "Crow"], ("*_Gull", "Crow")),
    "name": ("try-1", "try-1"),
    "checkpoint_dir": ("runs", "runs"),
    "fresh": (None, True),
    "seed": ("7", 7),
    "validation": ("0.25", 0.25),
    "select_on": ("test", "test"),
    "test_fraction": ("0.3", 0.3),
    "input_size": ("224", 224),
    "image_size": ("512", 512),
    "flip": ("0", 0.0),
    "brightness": ("0.1", 0.1),
    "contrast": ("0.4", 0.4),
    "crop_scale": ("0.5", 0.5),
    "backbone": ("resnet34", "resnet34"),
    "pretrained": ("weights.pth", "weights.pth"),
    "stride_on_first_conv": (None, True),
    "wiring": ("published", "published"),
    "batch_norm": ("per_pass", "per_pass"),
    "graph_scope": ("batch", "batch"),
    "graph_neighbours": ("2", 2),
    "graph_edges": ("overlap", "overlap"),
    "crop_gradient": (None, True),
    "graph_residual": (None, True),
    "spatial_weights": ("absolute", "absolute"),
    "without": (["fusion", "weighting"], ("fusion", "weighting")),
    "localization_stride": ("16", 16),
    "localization_threshold": ("1.2", 1.2),
    "windows": ("((((4, 4), (3, 5)), 2), (((8, 8),), 1))", ((((4, 4), (3, 5)), 2), (((8, 8),), 1))),
    "answer": (["raw", "object"], ("raw", "object")),
    "dropout": ("0.2", 0.2),
    "suppression": ("0.7", 0.7),
    "classify_suppressed": (None, True),
    "box_agreement": (None, True),
    "jigsaw_blocks": ("3", 3),
    "coarse_channels": ("256", 256),
    "part_proposals": ("8", 8),
    "parts_in_answer": ("2", 2),
    "part_max_iou": ("0.5", 0.5),
    "parts_of_every_level": (None, True),
    "anchor_sizes": (["32", "64", "128"], (32, 64, 128)),
    "epochs": ("3", 3),
    "batch_size": ("12", 12),
    "learning_rate": ("2e-2", 0.02),
    "head_learning_rate_factor": ("5", 5.0),
    "momentum": ("0.8", 0.8),
    "weight_decay": ("0", 0.0),
    "schedule": ("one_cycle", "one_cycle"),
    "milestones": (["3", "5"], (3, 5)),
    "clip_gradient_norm": ("10", 10.0),
    "label_smoothing": ("0.1", 0.1),
    "loss_weights": (["object=2", "window=0.5"], {"object": 2.0, "window": 0.5}),
    "images_per_class": ("4", 4),
    "warmup_epochs": ("0", 0),
    "mask_from_epoch": ("4", 4),
    "save_every_steps": ("100", 100),
    "keep_checkpoints": ("3", 3),
    "on_bad_image": ("skip", "skip"),
    "skip_nonfinite": ("5", 5),
    "device": ("cpu", "cpu"),
    "data_parallel": (None, True),
    "precision": ("bf16", "bf16"),
    "channels_last": (None, True),
    "compile": (None, True),
    "exit_threshold": ("0.9", 0.9),
    "workers": ("0", 0),
    "prefetch": ("4", 4),
    "sync_batch_norm": (None, True),
    "cache": ("disk", "disk"),
    "evaluation_batch_size": ("8", 8),
    "pictures_every": ("0", 0),
}

# what a field's words need beside them
COMPANIONS = {"graph_scope": ["--wiring", "published"]}

NAMES = [field.name for field in dataclasses.fields(Settings)]


def _is_of(value: object, hint: object) -> bool:
    """Does a value have the annotated type, the items of a tuple included?"""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, type(int | None)):
        return any(_is_of(value, part) for part in parts)
    if origin is tuple and parts[-1] is ...:
        return type(value) is tuple and all(_is_of(item, parts[0]) for item in value)
    if origin is tuple:
        return type(value) is tuple and len(value) == len(parts) and all(map(_is_of, value, parts))
    if origin is dict:
        return type(value) is dict and all(_is_of(k, parts[0]) and _is_of(v, parts[1]) for k, v in value.items())
    return type(value) is hint


def refusal_of(name: str, value: object, **others: object) -> str:
    """The sentence with which settings for CUB that hold the value are refused."""
    values = {"dataset": "cub", "data_root": "somewhere", **others, name: value}
    with pytest.raises(SettingsError) as refusal:
        complete(Settings(**values))
    sentence = str(refusal.value)
    assert sentence.isprintable()  # and so a single line
    assert name in sentence
    return sentence


def edited_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **values: object):
    """config.py as a user leaves it who wrote other values behind some of the fields."""
    text = Path(config.__file__).read_text(encoding="utf-8")
    for name, value in values.items():
        text, count = re.subn(
            rf"^(    {name}: [^=]+= )[^#\n]*?(  #.*)?$", rf"\g<1>{value!r}\g<2>", text, flags=re.MULTILINE
        )
        assert count == 1, name
    path = tmp_path / "edited_config.py"
    path.write_text(text, encoding="utf-8")
    specification = importlib.util.spec_from_file_location("edited_config", path)
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "edited_config", module)
    specification.loader.exec_module(module)
    return module


# ---- Flags ----------------------------------------------------------------------------------------------------------


def test_every_field_has_its_words_in_this_test():
    assert set(WORDS) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_field_is_a_flag_with_its_annotated_type(name):
    words, expected = WORDS[name]
    words = [] if words is None else [words] if isinstance(words, str) else words
    settings = parse_settings([*CUB, *COMPANIONS.get(name, ()), f"--{name}", *words])
    value = getattr(settings, name)
    assert value == expected
    assert _is_of(value, typing.get_type_hints(Settings)[name]), f"{value!r} is a {type(value).__name__}"


@pytest.mark.parametrize(
    "name", [name for name, hint in typing.get_type_hints(Settings).items() if hint in (bool, bool | None)], ids=str
)
def test_a_switch_can_be_turned_off(name):
    assert getattr(parse_settings([*CUB, f"--{name}"]), name) is True
    assert getattr(parse_settings([*CUB, f"--no-{name}"]), name) is False


def test_suppression_is_a_name_or_a_number():
    assert parse_settings([*CUB, "--suppression", "learnable"]).suppression == "learnable"
    assert parse_settings([*CUB, "--suppression", "1"]).suppression == 1.0


@pytest.mark.parametrize("word", ["object", "object=", "object=much"])
def test_malformed_weights_are_refused(word):
    with pytest.raises(SettingsError) as refusal:
        parse_settings([*CUB, "--loss_weights", "raw=1", word])
    assert repr(word) in str(refusal.value)
    assert "name=number" in str(refusal.value)


def test_a_name_for_windows_stays_a_name():
    assert parse_settings([*CUB, "--windows", "vehicles"]).windows == "vehicles"


@pytest.mark.parametrize(
    ("words", "guess"),
    [
        (["--epoch", "3"], "--epochs"),
        (["--learning-rate", "1"], "--learning_rate"),
        (["--learning-rate=1"], "--learning_rate"),
        (["--learning_rates", "1"], "--learning_rate"),
        (["--zzz"], None),
        (["stray"], None),
        (["line\nbreak\x1b[31m\udcff"], None),
    ],
)
def test_an_unknown_flag_is_refused(words, guess):
    with pytest.raises(SettingsError) as refusal:
        parse_settings([*CUB, *words])
    sentence = str(refusal.value)
    assert sentence.isprintable()
    assert words[0].split("\n")[0] in sentence
    assert (f"did you mean {guess}?" if guess else "unrecognized") in sentence
    assert "--help" in sentence


@pytest.mark.parametrize(
    "words",
    [
        *(["--epochs", "5.5"], ["--epochs", "many"], ["--learning_rate", "fast"], ["--milestones", "3", "x"]),
        *(["--epochs", "1" * 5000], ["--epochs", "3\n4"], ["--epochs"], ["--channels_last=3"]),
    ],
    ids=lambda words: " ".join(words)[:20],
)
def test_a_value_of_another_type_is_refused(words):
    with pytest.raises(SettingsError) as refusal:
        parse_settings([*CUB, *words])
    sentence = str(refusal.value)
    assert sentence.isprintable()
    assert len(sentence) < 600
    assert words[0].partition("=")[0] in sentence
    if len(words) > 1:
        assert repr(words[-1])[:300] in sentence
    assert "--help" in sentence


@pytest.mark.parametrize("words", [["--epochs", "many"], ["--epoch", "3"], ["--epochs", "0"]])
def test_what_is_refused_ends_the_program_with_one_line(words, capsys):
    from utils.errors import exit_with_one_sentence

    with pytest.raises(SystemExit) as ending, exit_with_one_sentence():
        parse_settings(words)
    assert ending.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    assert words[0].strip("-") in line


@pytest.mark.parametrize("word", ["(((", "((((5, 5),), 1),", "(five, five)", "(1 2)", "({[]},)", "(\0)", "(" * 300])
def test_malformed_windows_are_refused_in_one_sentence(word):
    with pytest.raises(SettingsError) as refusal:
        parse_settings([*CUB, "--windows", word])
    sentence = str(refusal.value)
    assert sentence.isprintable()
    assert "windows" in sentence
    assert f"{word!r}; expected" in sentence


def test_a_list_without_words_is_empty():
    settings = parse_settings([*CUB, "--milestones", "--loss_weights"])
    assert (settings.milestones, settings.loss_weights) == ((), {})


@pytest.mark.parametrize("flag", ["-h", "--help", "--help_all"])
def test_help_mentions_every_field_with_its_default_under_its_heading(flag, capsys):
    with pytest.raises(SystemExit) as ending:
        parse_settings([flag])
    assert ending.value.code == 0
    text = capsys.readouterr().out
    for name in NAMES:
        assert re.search(rf"--{name}\b", text), name
    assert "'sgkrl'" in text
    headings = re.findall(r"^    # ---- (.*?) -+$", Path(config.__file__).read_text("utf-8"), flags=re.MULTILINE)
    places = [text.index(f"\n{heading}:") for heading in headings]
    assert len(places) == 7
    assert places == sorted(places)
    assert places[-2] < text.index("--device") > places[-1]


def test_help_fits_a_screen(capsys):
    with pytest.raises(SystemExit):
        parse_settings(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 120


def test_every_field_is_commented_where_it_stands_and_in_the_help(capsys):
    text = Path(config.__file__).read_text(encoding="utf-8")
    uncommented = [name for name in NAMES if not re.search(rf"^    {name}: .*  # \S", text, flags=re.MULTILINE)]
    assert set(uncommented) <= {"epochs", "momentum", "weight_decay", "evaluation_batch_size"}  # these say it all
    with pytest.raises(SystemExit):
        parse_settings(["--help_all"])
    text = " ".join(capsys.readouterr().out.split())
    assert "what the backbone sees: a multiple of 32" in text  # input_size's comment


# ---- Edits, the tables, the command line: who wins ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], (32, 1.2, "frozen")),
        (["--input_size", "224"], (16, 1.2, "frozen")),
        (["--input_size", "224", "--wiring", "published"], (32, 1.0, "shared")),
        (["--input_size", "224", "--pretrained", "none"], (32, 1.0, "shared")),
        (["--input_size", "224", "--model", "mmal"], (32, 1.0, "shared")),
        (["--input_size", "224", "--localization_stride", "32"], (32, 1.2, "frozen")),
        (["--input_size", "224", "--model", "mmal", "--localization_threshold", "1.5"], (32, 1.5, "shared")),
        (["--batch_norm", "shared"], (32, 1.2, "shared")),
        (["--sync_batch_norm"], (32, 1.2, "shared")),
        (["--model", "resnet", "--batch_norm", "frozen"], (32, 1.0, "frozen")),
    ],
)
def test_localization_and_batch_norm_are_as_published_but_for_the_trained_wiring(words, expected):
    def of(settings):
        return settings.localization_stride, settings.localization_threshold, settings.batch_norm

    assert of(parse_settings([*CUB, *words])) == expected
    older = config.settings_of_older_runs()
    assert of(SimpleNamespace(**older)) == (32, 1.0, "shared")
    assert older.keys() == set(NAMES)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], (True, "relative")),
        (["--pretrained", "none"], (True, "relative")),
        (["--no-graph_residual"], (False, "relative")),
        (["--spatial_weights", "absolute"], (True, "absolute")),
        (["--wiring", "published"], (False, "absolute")),
        (["--model", "mmal"], (False, "absolute")),
    ],
)
def test_graph_and_weighting_are_as_published_but_for_the_trained_wiring(words, expected):
    settings = parse_settings([*CUB, *words])
    assert (settings.graph_residual, settings.spatial_weights) == expected
    older = config.settings_of_older_runs()
    assert (older["graph_residual"], older["spatial_weights"], older["without"]) == (False, "absolute", ())


def test_what_older_runs_had_does_not_follow_an_edit(tmp_path, monkeypatch):
    values = {"batch_norm": "per_pass", "graph_neighbours": 6, "crop_scale": 0.5, "graph_edges": "overlap"}
    edited = edited_config(tmp_path, monkeypatch, **values)
    older = edited.settings_of_older_runs()
    assert [older[name] for name in values] == ["shared", 3, 1.0, "equal"]
    assert None not in config.BEFORE.values()


def test_an_edit_wins_over_the_table_and_a_flag_over_both(tmp_path, monkeypatch):
    edited = edited_config(tmp_path, monkeypatch, epochs=7, learning_rate=0.125, flip=0.25)
    settings = edited.parse_settings(CUB)
    assert (settings.epochs, settings.learning_rate, settings.flip) == (7, 0.125, 0.25)
    assert settings.batch_size == 40  # not edited: the table's
    settings = edited.parse_settings([*CUB, "--epochs", "3", "--flip", "0.75"])
    assert (settings.epochs, settings.learning_rate, settings.flip) == (3, 0.125, 0.75)
    settings = edited.parse_settings([*CUB, "--model", "mmal"])
    assert (settings.epochs, settings.batch_size) == (7, 6)  # wins over a model's own value, too


def test_an_edited_tuple_survives_the_command_line(tmp_path, monkeypatch):
    edited = edited_config(tmp_path, monkeypatch, classes=("a*", "b"), windows=((((5, 5),), 1),), milestones=(2,))
    settings = edited.parse_settings(CUB)
    assert settings.classes == ("a*", "b")
    assert settings.windows == ((((5, 5),), 1),)
    assert settings.milestones == (2,)


def test_lists_and_names_may_be_edited_in(tmp_path, monkeypatch):
    windows = [[[[5, 5], [4, 4]], 1]]
    weights = {"object": 2}
    edited = edited_config(
        tmp_path, monkeypatch, classes=["a*"], windows=windows, milestones=[60, 100], loss_weights=weights
    )
    settings = edited.parse_settings(CUB)
    assert settings.classes == ("a*",)
    assert settings.windows == ((((5, 5), (4, 4)), 1),)
    assert settings.milestones == (60, 100)
    assert settings.loss_weights == {"object": 2.0}
    assert all(_is_of(getattr(settings, name), hint) for name, hint in typing.get_type_hints(edited.Settings).items())
    assert edited.Settings().milestones is not edited.Settings().milestones
    assert edited.parse_settings([*CUB, "--milestones", "2"]).milestones == (2,)


@pytest.mark.parametrize(("name", "value"), [("epochs", "3"), ("classes", "*_Gull"), ("windows", 7), ("flip", "0.5")])
def test_an_edit_of_another_type_is_refused_on_the_command_line_too(tmp_path, monkeypatch, name, value):
    """Not repaired on the way through the parser: test.py, which has none, would see something else."""
    edited = edited_config(tmp_path, monkeypatch, **{name: value})
    with pytest.raises(edited.SettingsError) as refusal:
        edited.parse_settings(CUB)
    assert f"{name} is {value!r}" in str(refusal.value)
    with pytest.raises(SystemExit) as ending:
        edited.parse_settings(["--help"])  # stays there for those who look for help
    assert ending.value.code == 0


def test_an_edit_of_the_tables_is_checked_too(monkeypatch):
    monkeypatch.setitem(config.DATASETS, "cub", {"epochs": "3", "windows": [[[[5, 5]], 1]]})
    with pytest.raises(SettingsError, match="epochs is '3'"):
        parse_settings(CUB)
    assert parse_settings([*CUB, "--epochs", "4"]).windows == ((((5, 5),), 1),)


@pytest.mark.parametrize(("epochs", "warmup_epochs"), [(1, 0), (2, 1), (6, 5), (7, 5)])
def test_warmup_leaves_an_epoch_for_the_other_branches(epochs, warmup_epochs):
    settings = parse_settings(["--epochs", str(epochs)])
    assert settings.warmup_epochs == warmup_epochs
    assert complete(settings) == settings


def test_complete_fills_only_what_is_none():
    given = dataclasses.replace(Settings(), dataset="cub", data_root="x", epochs=7, clip_gradient_norm=0.0)
    settings = complete(given)
    assert settings.epochs == 7
    assert settings.clip_gradient_norm == 0.0
    assert settings.input_size == 448
    for field in dataclasses.fields(Settings):
        if getattr(given, field.name) is not None:
            assert getattr(settings, field.name) == getattr(given, field.name)


@pytest.mark.parametrize("dataset", list(config.DATASETS))
@pytest.mark.parametrize("model", list(config.MODELS))
def test_every_data_set_and_model_gets_complete_settings(dataset, model):
    settings = complete(dataclasses.replace(Settings(), dataset=dataset, model=model, data_root="x"))
    unset = {name for name in NAMES if getattr(settings, name) is None}
    assert unset <= {"classes", "name", "answer", "loss_weights"}
    assert settings.images_per_class == (2 if model == "scrim" else 0)


@pytest.mark.parametrize(("dataset", "windows"), [("cub", "birds"), ("cars", "vehicles"), ("aircraft", "vehicles")])
def test_published_hyperparameters(dataset, windows):
    settings = parse_settings(["--dataset", dataset, "--data_root", "x"])
    assert settings.model == "sgkrl"
    assert settings.input_size == settings.image_size == 448
    assert settings.backbone == "resnet50"
    assert settings.windows == windows
    assert settings.epochs == 100
    assert settings.batch_size == 40
    assert settings.learning_rate == 1e-3
    assert settings.head_learning_rate_factor == 1
    assert settings.momentum == 0.9
    assert settings.weight_decay == 1e-4
    assert settings.schedule == "steps"
    assert settings.milestones == (60, 100)
    assert settings.clip_gradient_norm == 0
    assert settings.label_smoothing == 0
    assert settings.dropout == 0.5
    assert settings.warmup_epochs == 1
    assert settings.mask_from_epoch == 46
    assert settings.images_per_class == 0


@pytest.mark.parametrize("dataset", ["cub", "cars", "aircraft"])
def test_published_hyperparameters_of_mmal(dataset):
    settings = parse_settings(["--dataset", dataset, "--data_root", "x", "--model", "mmal"])
    assert (settings.epochs, settings.batch_size, settings.learning_rate) == (200, 6, 1e-3)
    assert settings.windows == ("birds" if dataset == "cub" else "vehicles")


def test_as_it_comes_the_demo_is_trained_without_data_or_download():
    settings = parse_settings([])
    assert (settings.dataset, settings.model, settings.data_root) == ("demo", "sgkrl", None)
    assert settings.pretrained == "none"
    demo_mmal = parse_settings(["--model", "mmal"])
    assert demo_mmal.epochs == settings.epochs  # the demo's own, not those published for real data


def test_image_size_follows_input_size():
    assert parse_settings([*CUB, "--input_size", "224"]).image_size == 224
    assert parse_settings([*CUB, "--input_size", "224", "--image_size", "448"]).image_size == 448


# ---- Impossible values ----------------------------------------------------------------------------------------------

IMPOSSIBLE = [
    ("dataset", "fish"),
    ("model", "vgg"),
    ("data_root", None),
    ("name", "a/b"),
    ("name", ""),
    ("name", ".. "),
    ("seed", -1),
    ("validation", 0.0),
    ("validation", 1.0),
    ("validation", -0.1),
    ("select_on", "train"),
    ("test_fraction", 0.0),
    ("test_fraction", 1.0),
    ("input_size", 100),
    ("input_size", 64),
    ("input_size", 0),
    ("input_size", -96),
    ("image_size", 447),
    ("flip", 1.5),
    ("flip", -0.5),
    ("flip", float("nan")),
    ("brightness", 1.0),
    ("contrast", -0.1),
    ("crop_scale", 0.001),
    ("crop_scale", -0.5),
    ("crop_scale", 1.1),
    ("crop_scale", float("nan")),
    ("dropout", 1.0),
    ("label_smoothing", 1.0),
    ("label_smoothing", float("nan")),
    ("epochs", 0),
    ("epochs", 2.5),
    ("batch_size", 0),
    ("evaluation_batch_size", 0),
    ("learning_rate", 0.0),
    ("learning_rate", -1e-3),
    ("learning_rate", float("nan")),
    ("learning_rate", float("inf")),
    ("head_learning_rate_factor", 0.0),
    ("momentum", -0.1),
    ("weight_decay", -1e-4),
    ("weight_decay", float("nan")),
    ("clip_gradient_norm", -1.0),
    ("schedule", "cosine"),
    ("suppression", "strong"),
    ("suppression", 0.0),
    ("suppression", 1.5),
    ("suppression", float("nan")),
    ("wiring", "tangled"),
    ("graph_scope", "world"),
    ("graph_edges", "all"),
    ("graph_neighbours", 0),
    ("spatial_weights", "none"),
    ("without", ("windows",)),
    ("without", ("fusion", "fusion")),
    ("batch_norm", "none"),
    ("localization_stride", 8),
    ("localization_threshold", 0.0),
    ("localization_threshold", float("inf")),
    ("jigsaw_blocks", 0),
    ("jigsaw_blocks", 15),  # of 448 pixels: 14 cells
    ("coarse_channels", 0),
    ("part_proposals", 0),
    ("parts_in_answer", 7),  # of 6
    ("part_max_iou", 1.0),
    ("part_max_iou", -0.1),
    ("anchor_sizes", (48, 96)),
    ("anchor_sizes", (48, 96, 0)),
    ("loss_weights", {"raw": -1.0}),
    ("loss_weights", {"raw": float("nan")}),
    ("images_per_class", -1),
    ("images_per_class", 3),  # of a batch of 40
    ("milestones", (0,)),
    ("milestones", (60, -5)),
    ("warmup_epochs", -1),
    ("mask_from_epoch", -3),
    ("device", "abacus"),
    ("precision", "float16"),
    ("exit_threshold", -0.1),
    ("exit_threshold", 1.5),
    ("workers", -1),
    ("pictures_every", -1),
    ("workers", 1025),
    ("prefetch", 0),
    ("cache", "memory"),
    ("device", "cuda:1234567890"),
    ("device", "cuda:\u0661"),  # a digit, but not one that PyTorch knows
    ("save_every_steps", -1),
    ("keep_checkpoints", -1),
    ("skip_nonfinite", -1),
    ("on_bad_image", "ignore"),
    ("classes", ()),
    ("classes", ("a*", "")),
    ("answer", ()),
    ("answer", ("raw", "raw")),
    ("data_root", ""),
    ("data_root", "a\0b"),
    ("data_root", "~nobody-of-that-name/x"),
    ("checkpoint_dir", ""),
    ("checkpoint_dir", "a" * 300),
    ("checkpoint_dir", "\ud800"),
    ("graph_scope", "batch"),  # with the trained wiring
    ("warmup_epochs", 100),
]


@pytest.mark.parametrize(("name", "value"), IMPOSSIBLE, ids=[f"{name}={value!a:.40}" for name, value in IMPOSSIBLE])
def test_impossible_values_are_refused_in_a_sentence(name, value):
    assert repr(value) in refusal_of(name, value)


JUNK = [
    *(None, True, 3, 2.5, 16.0, "3", "*_Gull", b"x", (), ("a",), (1,), [1, "a"], {}, {"a": "b"}, {1: 1.0}, {1}),
    *(float("nan"), float("inf"), -float("inf"), -1, 0, 2**63, 10**400, -(10**5000), [10**5000], "a\nb\x1b\u2028"),
    *("", "\0", "\ud800", "x" * 100_000, (((1, 2),),), [[[[5, 5]], 1]], [[]], object(), print, range(3), Ellipsis),
]
JUNK.append(JUNK[-5:])
JUNK.append([])
JUNK[-1].append(JUNK[-1])  # a list that holds itself


@pytest.mark.parametrize("name", NAMES)
def test_whatever_a_field_holds_it_is_taken_with_its_type_or_refused_in_a_sentence(name):
    hint = typing.get_type_hints(Settings)[name]
    for value in JUNK:
        try:
            settings = complete(Settings(**{"dataset": "cub", "data_root": "somewhere", name: value}))
        except SettingsError as refusal:
            sentence = str(refusal)
            assert sentence.isprintable(), name
            assert len(sentence) < 700
            assert name in sentence
        else:
            assert _is_of(getattr(settings, name), hint), value


def test_a_file_is_not_taken_for_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("data_root", "checkpoint_dir"):
        assert "folder" in refusal_of(name, str(tmp_path / "file"))
        assert "folder" in refusal_of(name, str(tmp_path / "file" / "below"))
        assert complete(Settings(dataset="cub", **({"data_root": "x"} | {name: str(tmp_path)})))
    assert complete(Settings(data_root=str(tmp_path / "file")))  # the demo does not look there


@pytest.mark.parametrize(
    ("name", "value", "came", "expected"),
    [
        ("epochs", "3", "'3' (str)", "a whole number or None"),
        ("epochs", 2.5, "2.5 (float)", "a whole number or None"),
        ("batch_size", 16.0, "16.0 (float)", "a whole number"),
        ("seed", True, "True (bool)", "a whole number"),
        ("seed", None, "None (NoneType)", "a whole number"),
        ("seed", 2**63, f"{2**63} (int)", "64 bits"),
        ("flip", "0.5", "'0.5' (str)", "a number"),
        ("flip", True, "True (bool)", "a number"),
        ("flip", 10**400, "1000", "64 bits"),
        ("fresh", 1, "1 (int)", "True or False"),
        ("fresh", "no", "'no' (str)", "True or False"),
        ("classes", "*_Gull", "'*_Gull' (str)", "('one',)"),
        ("answer", "raw", "'raw' (str)", "('one',)"),
        ("milestones", 60, "60 (int)", "(1,)"),
        ("milestones", (60, 100.0), "(60, 100.0) (tuple)", "(1,)"),
        ("windows", (4, 4), "(4, 4) (tuple)", "((((4, 4), (3, 5)), 2),)"),
        ("windows", ((((4, 4, 4),), 1),), "((((4, 4, 4),), 1),) (tuple)", "((((4, 4), (3, 5)), 2),)"),
        ("loss_weights", {"raw": "1"}, "{'raw': '1'} (dict)", "{'object': 2.0}"),
        ("loss_weights", {1: 1.0}, "{1: 1.0} (dict)", "{'object': 2.0}"),
        ("suppression", True, "True (bool)", "a text in quotes or a number"),
        ("data_root", Path("x"), f"{Path('x')!r}", "a text in quotes"),
        ("name", "a\nb", "'a\\nb'", "letters"),
        ("milestones", [10**5000], "cannot be written out (list)", "64 bits"),
    ],
)
def test_another_type_is_refused_with_what_came_and_what_was_expected(name, value, came, expected):
    sentence = refusal_of(name, value)
    assert sentence.startswith(f"{name} is ")
    assert came in sentence
    assert expected in sentence.split("; expected ")[1]


def test_types_come_before_anything_else():
    """A name that cannot be looked up must not be."""
    refusal_of("seed", "3", model="vgg")
    refusal_of("model", ["sgkrl"])
    refusal_of("dataset", {})


@pytest.mark.parametrize(
    ("name", "value", "taken"),
    [("flip", 1, 1.0), ("suppression", 1, 1.0), ("classes", ["a"], ("a",)), ("anchor_sizes", [1, 2, 3], (1, 2, 3))],
)
def test_what_is_meant_is_taken(name, value, taken):
    result = getattr(complete(Settings(dataset="cub", data_root="x", **{name: value})), name)
    assert (result, type(result)) == (taken, type(taken))


# settings that are possible one by one: name of the one that is refused, all of them, what makes it possible
CONTRADICTIONS = [
    ("graph_scope", {"graph_scope": "batch"}, {"wiring": "published"}),
    ("graph_scope", {"graph_scope": "batch"}, {"model": "mmal"}),  # which has no graph
    (
        "graph_edges",
        {"graph_edges": "overlap", "wiring": "published", "graph_scope": "batch"},
        {"graph_scope": "image"},
    ),
    ("crop_gradient", {"crop_gradient": True, "wiring": "published"}, {"wiring": "trained"}),
    ("graph_residual", {"graph_residual": True, "wiring": "published"}, {"wiring": "trained"}),
    ("spatial_weights", {"spatial_weights": "relative", "wiring": "published"}, {"model": "mmal"}),
    ("without", {"without": ("fusion",), "wiring": "published"}, {"wiring": "trained"}),
    ("without", {"without": ("weighting",), "spatial_weights": "absolute"}, {"without": ("fusion",)}),
    ("batch_norm", {"batch_norm": "frozen", "pretrained": "none"}, {"pretrained": "weights.pth"}),
    ("sync_batch_norm", {"sync_batch_norm": True, "batch_norm": "per_pass"}, {"batch_norm": "shared"}),
    ("classify_suppressed", {"model": "flrdf", "classify_suppressed": False}, {"suppression": 0.7}),
    ("stride_on_first_conv", {"stride_on_first_conv": True, "backbone": "resnet34"}, {"backbone": "resnet50"}),
    ("warmup_epochs", {"warmup_epochs": 3, "epochs": 3}, {"epochs": 4}),
    ("warmup_epochs", {"warmup_epochs": 3, "epochs": 3}, {"answer": ("raw",)}),
    ("warmup_epochs", {"warmup_epochs": 3, "epochs": 3}, {"model": "resnet"}),
    ("warmup_epochs", {"warmup_epochs": 3, "epochs": 3, "answer": ("raw", "object")}, {"warmup_epochs": 2}),
    ("images_per_class", {"model": "scrim", "images_per_class": 1}, {"loss_weights": {"contrastive": 0.0}}),
    ("images_per_class", {"model": "scrim", "images_per_class": 40}, {"images_per_class": 20}),
    ("images_per_class", {"images_per_class": 7}, {"batch_size": 42}),
    ("validation", {"validation": 0.0}, {"select_on": "test"}),
    ("image_size", {"image_size": 416}, {"input_size": 416}),
    ("jigsaw_blocks", {"jigsaw_blocks": 15}, {"input_size": 480}),
    ("parts_in_answer", {"parts_in_answer": 7}, {"part_proposals": 7}),
]


@pytest.mark.parametrize(("name", "values", "way_out"), CONTRADICTIONS, ids=str)
def test_contradictions_are_refused_and_only_those(name, values, way_out):
    refusal_of(name, values[name], **values)
    complete(Settings(**({"dataset": "cub", "data_root": "somewhere"} | values | way_out)))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("flip", 0.0),
        ("flip", 1.0),
        ("brightness", 0.0),
        ("dropout", 0.0),
        ("input_size", 96),
        ("weight_decay", 0.0),
        ("momentum", 0.0),
        ("clip_gradient_norm", 0.0),
        ("workers", 0),
        ("pictures_every", 0),
        ("warmup_epochs", 0),
        ("mask_from_epoch", 1),
        ("device", "cuda:1"),
        ("device", "auto"),
        ("milestones", ()),
        ("loss_weights", {}),
        ("images_per_class", 40),
        ("seed", 2**63 - 1),
        ("name", "ok_1.2+b-c"),
    ],
)
def test_the_outermost_possible_values_pass(name, value):
    settings = dataclasses.replace(Settings(), dataset="cub", data_root="somewhere", **{name: value})
    assert getattr(complete(settings), name) == value


@pytest.mark.parametrize("images_per_class", [0, 1])
def test_scrim_needs_images_to_compare(images_per_class):
    with pytest.raises(SettingsError, match="images_per_class.*scrim"):
        parse_settings([*CUB, "--model", "scrim", "--images_per_class", str(images_per_class)])


def test_no_validation_must_be_asked_for():
    settings = parse_settings([*CUB, "--validation", "0", "--select_on", "test"])
    assert (settings.validation, settings.select_on) == (0, "test")
    with pytest.raises(SettingsError, match="select_on"):
        parse_settings([*CUB, "--validation", "0"])


def test_settings_cannot_be_changed_later():
    with pytest.raises(dataclasses.FrozenInstanceError):
        parse_settings([]).epochs = 3


# ---- The rest -------------------------------------------------------------------------------------------------------


def test_run_name():
    assert run_name(parse_settings([])) == "demo-sgkrl"
    assert run_name(parse_settings([*CUB, "--model", "mmal", "--name", "try1"])) == "cub-mmal-try1"


def test_settings_need_the_standard_library_only():
    code = (
        "import sys; sys.path.insert(0, '.'); import config; config.parse_settings([]);"
        "print(sorted({'torch', 'numpy', 'PIL'} & sys.modules.keys()))"
    )
    folder = Path(config.__file__).parent
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
