"""Settings of a run: edits, tables and flags and who of them wins."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import slow_but_for
from setting_values import edited_config, is_of, written_config

import config
from config import DATASETS, Settings, SettingsError, complete, parse_settings, run_name
from networks import MODELS, build_network, find_system
from networks.systems.resnet import ResNetClassifier
from utils.options import hints
from utils.shared_settings import NEEDED
from utils.training.building import build_from_settings

CUB = ["--dataset", "cub", "--data_root", "somewhere"]
SHARED = list(hints(Settings))


# ---- Who wins -------------------------------------------------------------------------------------------------------


def test_a_default_is_decided_in_one_order(tmp_path, monkeypatch):
    """Flag, edit, the data set's table, the system's run_defaults, what was published."""
    edited = edited_config(tmp_path, monkeypatch, epochs=7)
    unedited = edited_config(tmp_path, monkeypatch)
    words = [*CUB, "--model", "resnet"]
    for module in (edited, unedited):
        monkeypatch.setitem(module.DATASETS, "cub", {"epochs": 8})
    monkeypatch.setattr(ResNetClassifier, "run_defaults", {"epochs": 9})
    assert edited.parse_settings([*words, "--epochs", "6"]).epochs == 6
    assert edited.parse_settings(words).epochs == 7
    assert unedited.parse_settings(words).epochs == 8
    monkeypatch.setitem(unedited.DATASETS, "cub", {})
    assert unedited.parse_settings(words).epochs == 9
    monkeypatch.setattr(ResNetClassifier, "run_defaults", {})
    assert unedited.parse_settings(words).epochs == 100
    assert unedited.parse_settings([*words, "--model", "mmal"]).epochs == 200


def test_a_recipe_comes_before_the_data_set_and_the_system(tmp_path, monkeypatch):
    """Flag, edit, recipe, the data set's table, the system's run_defaults, what was published."""
    edited = edited_config(tmp_path, monkeypatch, weight_decay=0.3)
    unedited = edited_config(tmp_path, monkeypatch)
    words = [*CUB, "--model", "resnet", "--recipe", "modern"]
    for module in (edited, unedited):
        monkeypatch.setitem(module.RECIPES, "modern", {"weight_decay": 0.2, "epochs": 5})
        monkeypatch.setitem(module.DATASETS, "cub", {"weight_decay": 0.1, "epochs": 4, "batch_size": 3})
    monkeypatch.setattr(ResNetClassifier, "run_defaults", {"weight_decay": 0.05, "epochs": 3, "batch_size": 2})
    assert edited.parse_settings([*words, "--weight_decay", "0.4"]).weight_decay == 0.4
    assert edited.parse_settings(words).weight_decay == 0.3
    chosen = unedited.parse_settings(words)
    assert (chosen.weight_decay, chosen.epochs, chosen.batch_size) == (0.2, 5, 3)
    without = unedited.parse_settings([*CUB, "--model", "resnet"])
    assert (without.recipe, without.weight_decay, without.epochs) == ("none", 0.1, 4)
    # an edited recipe can be left out for one run
    always = edited_config(tmp_path, monkeypatch, recipe="modern")
    assert always.parse_settings(words[:-2]).optimizer == "adamw"
    assert always.parse_settings([*words[:-2], "--recipe", "none"]).optimizer == "sgd"


@pytest.mark.parametrize("dataset", ["demo", "cub"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("recipe", config.RECIPES)
def test_every_system_takes_every_recipe(model, recipe, dataset):
    for epochs in ("1", "30"):
        words = ["--dataset", dataset, "--data_root", "somewhere", "--model", model, "--epochs", epochs]
        settings = parse_settings([*words, "--recipe", recipe])
        for name, value in config.RECIPES[recipe].items():
            assert getattr(settings, name) == value
    decided = {name for name in SHARED if getattr(Settings(), name) is None}
    assert config.RECIPES[recipe].keys() <= decided


def test_a_run_keeps_the_values_of_its_recipe(monkeypatch):
    saved = dataclasses.asdict(parse_settings([*CUB, "--recipe", "modern"]))
    monkeypatch.setitem(config.RECIPES, "modern", {"optimizer": "sgd"})
    assert config.rebuilt(saved).optimizer == "adamw"


def test_a_default_of_a_systems_own_setting_is_decided_in_the_same_order(tmp_path, monkeypatch):
    """Flag, edit of `options`, the data set's table, the field of `Options`."""
    own, other, third = ((((5, 5),), 1),), ((((6, 6),), 1),), ((((4, 4),), 2),)
    edited = edited_config(tmp_path, monkeypatch, options={"windows": other})
    unedited = edited_config(tmp_path, monkeypatch)
    for module in (edited, unedited):
        monkeypatch.setitem(module.DATASETS, "cub", {"windows": third})
    assert edited.parse_settings([*CUB, "--windows", str(own)]).options["windows"] == own
    assert edited.parse_settings(CUB).options["windows"] == other
    assert unedited.parse_settings(CUB).options["windows"] == third
    assert unedited.parse_settings([*CUB, "--model", "mmal"]).options["windows"] == third
    assert "windows" not in unedited.parse_settings([*CUB, "--model", "resnet"]).options
    monkeypatch.setitem(unedited.DATASETS, "cub", {})
    assert unedited.parse_settings(CUB).options["windows"] == "birds"


def test_a_systems_default_may_follow_from_the_other_settings(monkeypatch):
    """From those of the user, of the data set and of the system itself."""
    defaults = {
        "batch_size": 10,
        "learning_rate": lambda shared: shared.batch_size / 1000,
        "batch_norm": lambda shared: "per_pass" if shared.input_size == 96 else "shared",
        "dropout": lambda shared: 0.25 if shared.has_pretrained_weights else 0.0,
    }
    monkeypatch.setattr(ResNetClassifier, "run_defaults", defaults)

    def of(*words: str) -> tuple:
        settings = parse_settings([*words, "--model", "resnet"])
        return settings.learning_rate, settings.batch_norm, settings.dropout

    assert of(*CUB) == (0.01, "shared", 0.25)
    assert of(*CUB, "--batch_size", "40", "--input_size", "96", "--pretrained", "none") == (0.04, "per_pass", 0.0)
    assert of(*CUB, "--batch_size", "40", "--learning_rate", "3", "--batch_norm", "frozen") == (3.0, "frozen", 0.25)
    assert of("--input_size", "96") == (0.01, "per_pass", 0.1)  # the demo's own learning rate and dropout win


def test_systems_may_set_how_they_are_trained_and_augmented(monkeypatch):
    defaults = {
        "weight_decay": 5e-4,
        "schedule": "one_cycle",
        "milestones": (10, 20),
        "flip": 0.0,
        "brightness": 0.0,
        "contrast": 0.1,
        "crop_scale": 0.5,
        "momentum": 0.8,
        "images_per_class": 4,
        "loss_weights": {"raw": 2.0},
    }
    monkeypatch.setattr(ResNetClassifier, "run_defaults", defaults)
    settings = parse_settings([*CUB, "--model", "resnet", "--contrast", "0.3"])
    assert {name: getattr(settings, name) for name in defaults} == defaults | {"contrast": 0.3}
    monkeypatch.setattr(ResNetClassifier, "run_defaults", {"weight_decay": -1.0})
    with pytest.raises(SettingsError, match="weight_decay is -1.0"):
        parse_settings([*CUB, "--model", "resnet"])


@pytest.mark.parametrize("model", MODELS)
def test_a_systems_run_defaults_are_settings_that_it_may_decide(model):
    """Those that are None unless somebody edits them."""
    decided = {name for name in SHARED if getattr(Settings(), name) is None}
    assert set(find_system(model).run_defaults) <= decided
    assert set(config.PUBLISHED) <= decided


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], (32, 1.2, "frozen")),
        (["--input_size", "224"], (16, 1.2, "frozen")),
        (["--input_size", "224", "--model", "sgkrl_published"], (32, 1.0, "shared")),
        (["--input_size", "224", "--pretrained", "none"], (32, 1.0, "shared")),
        (["--input_size", "224", "--model", "mmal"], (32, 1.0, "shared")),
        (["--input_size", "224", "--localization_stride", "32"], (32, 1.2, "frozen")),
        (["--input_size", "224", "--model", "mmal", "--localization_threshold", "1.5"], (32, 1.5, "shared")),
        (["--batch_norm", "shared"], (32, 1.2, "shared")),
        (["--sync_batch_norm"], (32, 1.2, "shared")),
        (["--model", "flrdf", "--batch_norm", "frozen"], (32, 1.0, "frozen")),
    ],
)
def test_localization_and_batch_norm_are_as_published_but_for_sgkrl(words, expected):
    settings = parse_settings([*CUB, *words])
    options = settings.options
    assert (options["localization_stride"], options["localization_threshold"], settings.batch_norm) == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], (True, "relative")),
        (["--pretrained", "none"], (True, "relative")),
        (["--no-graph_residual"], (False, "relative")),
        (["--spatial_weights", "absolute"], (True, "absolute")),
        (["--model", "sgkrl_published"], (None, None)),  # always as published
        (["--model", "mmal"], (None, None)),
    ],
)
def test_graph_and_weighting_are_as_published_but_for_sgkrl(words, expected):
    options = parse_settings([*CUB, *words]).options
    assert (options.get("graph_residual"), options.get("spatial_weights")) == expected


# ---- Edits and tables -----------------------------------------------------------------------------------------------


def test_an_edit_wins_over_the_table_and_a_flag_over_both(tmp_path, monkeypatch):
    edited = edited_config(tmp_path, monkeypatch, epochs=7, learning_rate=0.125, flip=0.25)
    settings = edited.parse_settings(CUB)
    assert (settings.epochs, settings.learning_rate, settings.flip) == (7, 0.125, 0.25)
    assert settings.batch_size == 40  # not edited: as published
    settings = edited.parse_settings([*CUB, "--epochs", "3", "--flip", "0.75"])
    assert (settings.epochs, settings.learning_rate, settings.flip) == (3, 0.125, 0.75)
    settings = edited.parse_settings([*CUB, "--model", "mmal"])
    assert (settings.epochs, settings.batch_size) == (7, 6)  # wins over a system's own value, too


def test_an_edited_tuple_survives_the_command_line(tmp_path, monkeypatch):
    options = {"windows": ((((5, 5),), 1),), "graph_neighbours": 2}
    edited = edited_config(tmp_path, monkeypatch, classes=("a*", "b"), options=options, milestones=(2,))
    settings = edited.parse_settings(CUB)
    assert settings.classes == ("a*", "b")
    assert settings.options["windows"] == ((((5, 5),), 1),)
    assert settings.milestones == (2,)
    options = edited.parse_settings([*CUB, "--graph_neighbours", "5"]).options
    assert (options["graph_neighbours"], options["windows"]) == (5, ((((5, 5),), 1),))


def test_lists_and_names_may_be_edited_in(tmp_path, monkeypatch):
    values = {
        "classes": ["a*"],
        "options": {"windows": [[[[5, 5], [4, 4]], 1]]},
        "milestones": [60, 100],
        "loss_weights": {"object": 2},
    }
    edited = edited_config(tmp_path, monkeypatch, **values)
    settings = edited.parse_settings(CUB)
    assert settings.classes == ("a*",)
    assert settings.options["windows"] == ((((5, 5), (4, 4)), 1),)
    assert settings.milestones == (60, 100)
    assert settings.loss_weights == {"object": 2.0}
    assert all(is_of(getattr(settings, name), hint) for name, hint in hints(edited.Settings).items())
    assert edited.Settings().milestones is not edited.Settings().milestones
    assert edited.parse_settings([*CUB, "--milestones", "2"]).milestones == (2,)


@pytest.mark.parametrize(
    ("name", "value", "named"),
    [
        ("epochs", "3", "epochs is '3'"),
        ("classes", "*_Gull", "classes is '*_Gull'"),
        ("options", {"windows": 7}, "windows is 7"),
        ("options", [3], "options is [3]"),
        ("flip", "0.5", "flip is '0.5'"),
    ],
)
def test_an_edit_of_another_type_is_refused_on_the_command_line_too(tmp_path, monkeypatch, name, value, named):
    """Not repaired on the way through the parser: test.py, which has none, would see something else."""
    edited = edited_config(tmp_path, monkeypatch, **{name: value})
    with pytest.raises(edited.SettingsError) as refusal:
        edited.parse_settings(CUB)
    assert named in str(refusal.value)
    with pytest.raises(SystemExit) as ending:
        edited.parse_settings(["--help"])  # stays there for those who look for help
    assert ending.value.code == 0


def test_an_edit_of_the_tables_is_checked_too(monkeypatch):
    monkeypatch.setitem(DATASETS, "cub", {"epochs": "3", "windows": [[[[5, 5]], 1]]})
    with pytest.raises(SettingsError, match="epochs is '3'"):
        parse_settings(CUB)
    assert parse_settings([*CUB, "--epochs", "4"]).options["windows"] == ((((5, 5),), 1),)
    monkeypatch.setitem(DATASETS, "cub", {"windows": 3})
    with pytest.raises(SettingsError, match="windows is 3"):
        parse_settings(CUB)
    parse_settings([*CUB, "--model", "resnet"])  # which has no windows
    monkeypatch.setitem(DATASETS, "cub", {"epoch": 3})
    with pytest.raises(SettingsError, match=r"epoch in the table of cub is no setting \(did you mean epochs\?\)"):
        parse_settings(CUB)


def test_tables_may_have_own_settings_of_systems(monkeypatch):
    """In the order of all values: recipe, data set, what was published."""
    for table, value in ((config.PUBLISHED, 1), (DATASETS["cub"], 5), (config.RECIPES["modern"], 6)):
        monkeypatch.setitem(table, "graph_neighbours", value)
    found = [
        parse_settings([*words, "--model", "sgkrl"]).options["graph_neighbours"]
        for words in (["--dataset", "pets", "--data_root", "x"], CUB, [*CUB, "--recipe", "modern"])
    ]
    assert found == [1, 5, 6]
    assert parse_settings([*CUB, "--recipe", "modern", "--graph_neighbours", "2"]).options["graph_neighbours"] == 2


@pytest.mark.parametrize("name", ["epochs", "momentum", "input_size"])
def test_what_is_deleted_from_the_tables_is_missed_in_a_sentence(monkeypatch, name):
    assert set(NEEDED) == set(config.PUBLISHED)
    monkeypatch.delitem(config.PUBLISHED, name)
    with pytest.raises(SettingsError, match=f"PUBLISHED has no value for {name}: put one there"):
        parse_settings(CUB)
    assert parse_settings([*CUB, f"--{name}", "0.5" if name == "momentum" else "224"])


def test_recipes_may_be_added_and_renamed(monkeypatch):
    monkeypatch.setitem(config.RECIPES, "mine", config.RECIPES["modern"] | {"epochs": 7})
    monkeypatch.delitem(config.RECIPES, "modern")
    settings = parse_settings([*CUB, "--recipe", "mine"])
    assert (settings.recipe, settings.epochs, settings.optimizer) == ("mine", 7, "adamw")
    with pytest.raises(SettingsError, match="unknown recipe 'modern'; choose one of none, mine"):
        parse_settings([*CUB, "--recipe", "modern"])


def test_help_shows_edited_settings_of_a_system(tmp_path, monkeypatch, capsys):
    edited = edited_config(tmp_path, monkeypatch, options={"graph_neighbours": 1})
    for flag, words in (("--help", " 1"), ("--help_all", "(default: 1)")):
        with pytest.raises(SystemExit):
            edited.parse_settings([flag])
        behind = capsys.readouterr().out.partition("--graph_neighbours")[2].partition("--")[0]
        assert words in " ".join(behind.split()) or behind.startswith(words)


def test_a_docstring_is_no_setting(tmp_path, monkeypatch):
    text = Path(config.__file__).read_text(encoding="utf-8")
    head, tail = text.split("class Settings:\n")
    text = f'{head}class Settings:\n    """Mine.\n\n    note: for the cluster\n    """\n{tail}'
    edited = written_config(text, tmp_path, monkeypatch)
    with pytest.raises(SystemExit) as ending:
        edited.parse_settings(["--help"])
    assert ending.value.code == 0


def test_a_table_may_say_where_the_data_lie(monkeypatch):
    monkeypatch.setitem(DATASETS, "cub", {"data_root": "somewhere"})
    assert parse_settings(["--dataset", "cub"]).data_root == "somewhere"
    assert parse_settings(["--dataset", "cub", "--data_root", "else"]).data_root == "else"


@pytest.mark.parametrize(("epochs", "warmup_epochs"), [(1, 0), (2, 1), (6, 5), (7, 5)])
def test_warmup_leaves_an_epoch_for_the_other_branches(epochs, warmup_epochs):
    settings = parse_settings(["--epochs", str(epochs)])
    assert settings.warmup_epochs == warmup_epochs
    assert complete(settings) == settings


def test_a_system_may_have_no_warmup(monkeypatch):
    monkeypatch.setattr(find_system("mmal"), "warmup_branches", ())
    assert parse_settings(["--model", "mmal"]).warmup_epochs == 0
    with pytest.raises(SettingsError, match="warmup_epochs is 2; expected 0 for this model"):
        parse_settings(["--model", "mmal", "--warmup_epochs", "2"])


def test_complete_fills_only_what_is_none():
    given = dataclasses.replace(Settings(), dataset="cub", data_root="x", epochs=7, clip_gradient_norm=0.0)
    settings = complete(given)
    assert settings.epochs == 7
    assert settings.clip_gradient_norm == 0.0
    assert settings.input_size == 448
    for name in SHARED:
        if getattr(given, name) is not None and name != "options":
            assert getattr(settings, name) == getattr(given, name)


@pytest.mark.parametrize("dataset", list(DATASETS))
@pytest.mark.parametrize("model", MODELS)
def test_every_data_set_and_model_gets_complete_settings(dataset, model):
    settings = complete(dataclasses.replace(Settings(), dataset=dataset, model=model, data_root="x"))
    unset = {name for name in SHARED if getattr(settings, name) is None}
    of_data = {"class_level", "labels", "validation_labels", "test_labels"}
    of_data |= {"image_column", "label_column", "split_column"}
    assert unset <= {"classes", "name", "prediction", "loss_weights", "initial_weights", *of_data}
    own = hints(find_system(model).Options)
    assert settings.options.keys() == own.keys()
    assert all(is_of(settings.options[name], hint) for name, hint in own.items())
    assert {name for name, value in settings.options.items() if value is None} <= {"raw_size"}  # None: input_size
    assert complete(settings) == settings
    assert settings.images_per_class == {"scrim": 2, "apinet": 4}.get(model, 0)


@pytest.mark.parametrize(("dataset", "windows"), [("cub", "birds"), ("cars", "vehicles"), ("aircraft", "vehicles")])
@pytest.mark.parametrize("model", ["sgkrl", "sgkrl_published"])
def test_published_hyperparameters(model, dataset, windows):
    settings = parse_settings(["--dataset", dataset, "--data_root", "x", "--model", model])
    assert parse_settings(["--dataset", dataset, "--data_root", "x"]).model == "sgkrl"
    assert settings.input_size == settings.image_size == 448
    assert settings.backbone == "resnet50"
    assert settings.options["windows"] == windows
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
    assert settings.options["mask_from_epoch"] == 46
    assert settings.images_per_class == 0
    assert (settings.flip, settings.brightness, settings.contrast, settings.crop_scale) == (0.5, 0.2, 0.2, 1.0)


@pytest.mark.parametrize("dataset", ["cub", "cars", "aircraft"])
def test_published_hyperparameters_of_mmal(dataset):
    settings = parse_settings(["--dataset", dataset, "--data_root", "x", "--model", "mmal"])
    assert (settings.epochs, settings.batch_size, settings.learning_rate) == (200, 6, 1e-3)
    assert settings.options["windows"] == ("birds" if dataset == "cub" else "vehicles")


def test_as_it_comes_the_demo_is_trained_without_data_or_download():
    settings = parse_settings([])
    assert (settings.dataset, settings.model, settings.data_root) == ("demo", "sgkrl", None)
    assert settings.pretrained == "none"
    demo_mmal = parse_settings(["--model", "mmal"])
    assert demo_mmal.epochs == settings.epochs  # the demo's own, not those published for real data


def test_image_size_follows_input_size():
    assert parse_settings([*CUB, "--input_size", "224"]).image_size == 224
    assert parse_settings([*CUB, "--input_size", "224", "--image_size", "448"]).image_size == 448


@pytest.mark.parametrize("name", slow_but_for(("sgkrl", "resnet", "pmg"), MODELS))
def test_called_without_more_build_network_builds_what_train_builds(name):
    with torch.device("meta"):
        ours = build_network(name, num_classes=200)
        settings = complete(Settings(model=name, dataset="cub", data_root="x"))
        theirs = build_from_settings(settings, 200, load_weights=False)
    assert type(ours) is type(theirs)
    assert ours.options == theirs.options
    assert ours.backbone.batch_norm == theirs.backbone.batch_norm == settings.batch_norm
    assert ours.backbone.channels == theirs.backbone.channels
    assert (ours.input_size, ours.dropout.p) == (theirs.input_size, theirs.dropout.p)
    assert (settings.input_size, settings.dropout) == (ours.input_size, ours.dropout.p)
    assert (ours.prediction, ours.evaluated) == (theirs.prediction, theirs.evaluated)
    shapes = [{key: value.shape for key, value in network.state_dict().items()} for network in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert [str(module) for module in ours.modules()] == [str(module) for module in theirs.modules()]


def test_build_network_keeps_to_a_systems_own_defaults(monkeypatch):
    defaults = {
        "backbone": "resnet18",
        "input_size": 224,
        "dropout": 0.0,
        "batch_norm": lambda shared: "per_pass" if shared.input_size == 224 else "shared",
    }
    monkeypatch.setattr(ResNetClassifier, "run_defaults", defaults)
    with torch.device("meta"):
        network = build_network("resnet", num_classes=200)
        other = build_network("resnet", num_classes=200, input_size=448, dropout=0.5)
    settings = complete(Settings(model="resnet", dataset="cub", data_root="x"))
    assert (network.input_size, network.dropout.p, network.backbone.batch_norm) == (224, 0.0, "per_pass")
    assert (settings.input_size, settings.dropout, settings.batch_norm) == (224, 0.0, "per_pass")
    assert network.backbone.embedding_channels == 512
    assert (other.input_size, other.dropout.p, other.backbone.batch_norm) == (448, 0.5, "shared")


# ---- The rest -------------------------------------------------------------------------------------------------------


def test_run_name():
    assert run_name(parse_settings([])) == "demo-sgkrl"
    assert run_name(parse_settings([*CUB, "--model", "mmal", "--name", "try1"])) == "cub-mmal-try1"


def test_settings_are_read_with_the_standard_library_only():
    code = (
        "import sys; sys.path.insert(0, '.'); import config; config.Settings(epochs=3);"
        "print(sorted({'torch', 'numpy', 'PIL', 'networks'} & sys.modules.keys()))"
    )
    folder = Path(config.__file__).parent
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_settings_cannot_be_changed_later():
    with pytest.raises(dataclasses.FrozenInstanceError):
        parse_settings([]).epochs = 3
