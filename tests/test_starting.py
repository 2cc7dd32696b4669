"""New runs from the weights of others: what is loaded, what is left as it is, what is said and refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

import train
from config import Settings, parse_settings, restored
from networks.pretrained import read_weights
from networks.system import System
from utils.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from utils.errors import UserError
from utils.training.building import build_from_settings
from utils.training.starting import start_from

pytestmark = pytest.mark.usefixtures("thin_trunk")

BIRDS = ["crow", "gull", "wren"]
EQUAL = ("--ensembling", "mean_probability")  # the weights of branches, where learnt, are learnt anew


@pytest.fixture
def build(tiny_run, tmp_path):
    """A function: the settings and the new network of a run on three classes."""

    def network_of(model: str, *more: str, seed: int = 0) -> tuple[Settings, System]:
        torch.manual_seed(seed)
        settings = parse_settings(tiny_run(tmp_path, *more, model=model))
        return settings, build_from_settings(settings, 3, load_weights=False)

    return network_of


@pytest.fixture
def saved(build, tmp_path):
    """A function: the path of another run's checkpoint, and its weights."""

    def checkpoint_of(model: str, *more: str, **content: object) -> tuple[str, dict]:
        settings, network = build(model, *more, seed=1)
        state = {n: v + 1 if v.is_floating_point() else v for n, v in network.state_dict().items()}
        known = {"settings": dataclasses.asdict(settings), "class_names": BIRDS, "selected_on": "x", "epoch": 1}
        save_checkpoint(tmp_path / "other.pth", known | {"network": state} | content)
        return str(tmp_path / "other.pth"), state

    return checkpoint_of


def test_a_trunk_to_find_objects_by_has_to_be_there(build, saved):
    finding = ("--localization", "colocalization", "--pretrained", "IMAGENET1K_V1")
    for model, more, is_there in (("mmal", (), False), ("mmal", finding, True)):
        path, state = saved(model, *more)
        settings, network = build("resnet", *finding, "--initial_weights", path)
        if is_there:
            start_from(settings, network, BIRDS, restored)
            names = [name for name in state if name.startswith("colocalization.")]
            assert len(names) > 50
            assert all(torch.equal(network.state_dict()[name], state[name]) for name in names)
        else:
            with pytest.raises(CheckpointError, match=r"no frozen trunk.*pretrained weights instead$"):
                start_from(settings, network, BIRDS, restored)


@pytest.mark.parametrize(("theirs", "ours"), [("per_pass", "shared"), ("per_pass", "frozen"), ("shared", "per_pass")])
def test_statistics_of_the_trunk_that_finds_objects_are_carried_over_too(build, saved, theirs, ours):
    finding = ("--localization", "colocalization", "--pretrained", "IMAGENET1K_V1", "--batch_norm")
    path, state = saved("resnet", *finding, theirs)
    settings, network = build("resnet", *finding, ours, "--initial_weights", path)
    start_from(settings, network, BIRDS, restored)
    found = {name: value for name, value in network.state_dict().items() if "colocalization.trunk" in name}
    statistics = [name for name in found if name.endswith(("running_mean", "running_var"))]
    assert statistics
    for name in statistics:
        expected = state[name][0] if theirs == "per_pass" else state[name].expand_as(found[name])
        assert torch.equal(found[name], expected), name


def split(network: System, before: dict, state: dict) -> tuple[set[str], set[str]]:
    """The names of what was loaded, and of what is as it was; all must be one or the other."""
    now = network.state_dict()
    kept = {name for name, value in now.items() if torch.equal(value, before[name])}
    loaded = {name for name, value in now.items() if name in state and torch.equal(value, state[name])}
    assert kept | loaded == now.keys()
    return loaded, kept


def start(settings: Settings, network: System, path: str, names: list[str]) -> tuple[str, dict]:
    before = {name: value.clone() for name, value in network.state_dict().items()}
    return start_from(dataclasses.replace(settings, initial_weights=path), network, names, restored), before


def test_everything_of_the_same_system_on_the_same_classes(build, saved):
    (path, state), (settings, network) = saved("sgkrl", *EQUAL), build("sgkrl", *EQUAL)
    sentence, _ = start(settings, network, path, BIRDS)
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    count = len(state)
    assert sentence == (
        f"starting from {path} (sgkrl, the same classes): {count} of {count} tensors fit; new: none; not used: none"
    )


@pytest.mark.parametrize("names", [["crow", "gull", "tern"], ["gull", "crow", "wren"]], ids=["others", "order"])
def test_as_many_other_classes_are_learnt_anew(build, saved, names):
    (path, state), (settings, network) = saved("sgkrl", *EQUAL), build("sgkrl", *EQUAL)
    sentence, before = start(settings, network, path, names)
    loaded, kept = split(network, before, state)
    assert {"classifier.weight", "classifier.bias"} <= kept
    assert {name for name, value in state.items() if name.startswith("fusion.")} <= loaded
    assert all(len(state[name]) == 3 for name in kept - loaded)
    assert "3 other classes" in sentence
    assert "new: none; new as they belong to classes: classifier (2), graph (" in sentence


def test_several_rows_of_a_class_are_learnt_anew_for_other_classes(build, saved):
    """DFL-CNN's bank has ten filters for each class, and classifies by all of them."""
    (path, state), (settings, network) = saved("dflcnn"), build("dflcnn")
    sentence, before = start(settings, network, path, ["crow", "gull", "tern"])
    loaded, kept = split(network, before, state)
    assert {"bank.filters.weight", "bank.filters.bias", "part_classifier.weight"} <= kept - loaded
    assert all(name.startswith(("bank.", "cell_classifier.", "part_classifier.")) for name in kept - loaded)
    assert (
        "new as they belong to classes: bank (2), cell_classifier (6), part_classifier (2); not used: none" in sentence
    )
    start(settings, network, path, BIRDS)
    assert torch.equal(network.bank.filters.weight, state["bank.filters.weight"])


def test_what_has_as_many_rows_as_there_are_classes_by_chance_is_loaded(build, saved):
    """PMG's hidden layers, for 512 classes."""
    (path, state), (settings, _) = saved("pmg"), build("pmg")
    names = [f"class {number}" for number in range(len(state["classifiers.final.1.weight"]))]
    network = build_from_settings(settings, len(names), load_weights=False)
    start(settings, network, path, names)
    for name in ("classifiers.final.1.weight", "blocks.final.0.conv.weight"):
        assert torch.equal(network.state_dict()[name], state[name])


def test_images_normalised_otherwise_are_said(build, saved):
    (path, _), (settings, network) = saved("resnet"), build("resnet", "--normalization", "half", "--last_stride", "1")
    sentence, _ = start(settings, network, path, BIRDS)
    assert sentence.endswith("; normalization was 'imagenet' and is 'half'; last_stride was 2 and is 1")


def test_another_system_and_another_number_of_classes(build, saved):
    (path, state), (settings, _) = saved("sgkrl", *EQUAL), build("pmg")
    torch.manual_seed(0)
    network = build_from_settings(settings, 5, load_weights=False)
    sentence, before = start(settings, network, path, [*BIRDS, "jay", "tit"])
    loaded, _ = split(network, before, state)
    assert loaded >= {name for name in before if name.startswith("backbone.") and not name.endswith("_tracked")}
    assert all(name.startswith("backbone.") for name in loaded)
    assert "\n" not in sentence
    assert "(sgkrl, 3 other classes)" in sentence
    assert "new: blocks (" in sentence
    assert "not used: classifier (2), fusion (" in sentence


def test_statistics_become_those_of_each_pass_and_back(build, saved):
    name = "backbone.trunk.layer1.0.bn1.running_mean"
    (path, state), (settings, network) = saved("resnet"), build("resnet", "--batch_norm", "per_pass")
    start(settings, network, path, BIRDS)
    assert torch.equal(network.state_dict()[name], state[name].repeat(3, 1))
    _, state = saved("resnet", "--batch_norm", "per_pass")
    state[name][1:] += 5
    path, _ = saved("resnet", "--batch_norm", "per_pass", network=state)
    settings, network = build("resnet")
    start(settings, network, path, BIRDS)
    assert torch.equal(network.state_dict()[name], state[name][0])


def test_the_average_of_weights_is_taken(build, saved):
    _, state = saved("resnet")
    average = {f"module.{name}": value + 2 if value.is_floating_point() else value for name, value in state.items()}
    path, _ = saved("resnet", ema=average)
    settings, network = build("resnet")
    start(settings, network, path, BIRDS)
    assert torch.equal(network.classifier.weight, state["classifier.weight"] + 2)


def test_what_cannot_be_started_from_is_refused(build, saved, tmp_path):
    settings, network = build("resnet")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    other, _ = saved("resnet", "--backbone", "convnext_tiny")
    refusals = {
        other: "has backbone 'convnext_tiny', and here it is 'resnet18': its weights would mean",
        str(tmp_path / "absent.pth"): "there is no checkpoint",
        str(tmp_path / "weights.pth"): "is no whole checkpoint of train.py",
    }
    for path, expected in refusals.items():
        with pytest.raises(UserError, match=expected) as refusal:
            start(settings, network, path, BIRDS)
        assert Path(path).name in str(refusal.value)
    path, _ = saved("resnet", network={"classifier.weight": torch.zeros(3, 999)})
    with pytest.raises(CheckpointError, match="nothing in it fits"):
        start(settings, network, path, BIRDS)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_run_starts_from_another_and_goes_on_without_it(tiny_run, saved, tmp_path, capsys, monkeypatch):
    path, _ = saved("mmal")
    words = ("--epochs", "2", "--initial_weights", path)
    train.main(tiny_run(tmp_path / "whole", *words))
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("starting from"))
    assert "new as they belong to classes: classifier (2)" in line
    recorded = json.loads((tmp_path / "whole" / "folder-resnet" / "config.json").read_text("utf-8"))
    assert recorded["initial_weights"] == path

    finish = train.Run.finish_epoch

    def stopped(self, *arguments):
        finish(self, *arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train.Run, "finish_epoch", stopped)
        train.main(tiny_run(tmp_path / "stopped", *words))
    Path(path).unlink()
    capsys.readouterr()
    train.main(tiny_run(tmp_path / "stopped", *words))
    assert "starting from" not in capsys.readouterr().out
    whole, stopped = (load_checkpoint(tmp_path / n / "folder-resnet" / "last.pth") for n in ("whole", "stopped"))
    assert whole["epoch"] == stopped["epoch"] == 2
    assert all(torch.equal(value, stopped["network"][name]) for name, value in whole["network"].items())


def test_frozen_statistics_may_come_from_another_run():
    words = ["--dataset", "cub", "--data_root", "x", "--pretrained", "none", "--batch_norm", "frozen"]
    assert parse_settings([*words, "--initial_weights", "best.pth"]).batch_norm == "frozen"
    with pytest.raises(UserError, match="batch_norm is 'frozen'"):
        parse_settings(words)


def test_a_program_in_place_of_weights_is_refused_without_a_warning(tmp_path, recwarn):
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "model.pth"))
    recwarn.clear()
    with pytest.raises(UserError, match="not a plain file of tensors|hold no state dict"):  # the latter by PyTorch 2.4
        read_weights(tmp_path / "model.pth")
    assert not recwarn.list


def test_weights_of_a_trunk_with_its_strides_elsewhere_are_refused(build, saved):
    settings, network = build("resnet")
    path, _ = saved("resnet", settings=dataclasses.asdict(settings) | {"stride_on_first_conv": True})
    with pytest.raises(CheckpointError, match="has stride_on_first_conv True, and here it is False"):
        start(settings, network, path, BIRDS)
