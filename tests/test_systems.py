"""What holds for every system in `networks/systems/`, found by the folder's listing, and how systems are built."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import system_checks
import torch
from cases import slow_but_for
from small_systems import SIZE, Variant, make_images

import networks.systems
from config import Settings, complete
from networks import MODELS, build_network, build_options, find_system, name_of, owners_of
from networks.shared import Shared
from networks.system import System
from utils.errors import UserError
from utils.options import SettingsError
from utils.training.building import build_from_settings

pytestmark = pytest.mark.usefixtures("thin_trunk")

SYSTEMS = {model: Variant(model) for model in MODELS}


def owned(model: str) -> set[str]:
    return {field.name for field in dataclasses.fields(find_system(model).Options)}


@pytest.mark.parametrize("check", system_checks.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("model", MODELS)
def test_every_system(model: str, check: system_checks.Check) -> None:
    check(SYSTEMS[model])


@pytest.mark.parametrize("model", slow_but_for(("sgkrl",), MODELS))
def test_traces_without_graph_break(model: str) -> None:
    """On a scripted trunk; a real one is traced in `test_resnet.py`."""
    system_checks.forward_traces_without_graph_break(SYSTEMS[model].build_scripted(), make_images(2 * SIZE))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("model", MODELS)
def test_no_synchronisation_on_a_gpu(model: str) -> None:
    network, images = SYSTEMS[model].build().cuda(), make_images(2 * SIZE).cuda()
    for training in (False, True):
        network.train(training)
        network(images, mask_background=True)
        torch.cuda.set_sync_debug_mode("error")
        try:
            network(images, mask_background=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")


# ---- other trunks -------------------------------------------------------------------------------------------------

FINER = (system_checks.output_keeps_the_contract, system_checks.gradient_reaches_every_parameter)


@pytest.mark.parametrize("check", FINER, ids=lambda check: check.__name__)
@pytest.mark.parametrize("model", slow_but_for(("sgkrl", "scrim", "pmg"), MODELS))
def test_without_the_last_stride(model: str, check: system_checks.Check) -> None:
    own = {"localization_stride": 16} if "localization_stride" in owned(model) else {}
    check(Variant(model, last_stride=1, **own))


@pytest.mark.parametrize("model", [model for model in MODELS if "localization_stride" in owned(model)])
def test_the_map_of_the_object_cannot_be_coarser_than_the_trunk_s(model: str) -> None:
    settings = {"num_classes": 3, "backbone": "resnet18", "input_size": 96, "last_stride": 1}
    with torch.device("meta"):
        with pytest.raises(
            SettingsError, match="localization_stride is 32; expected 16 with resnet18 and last_stride 1"
        ):
            build_network(model, localization_stride=32, **settings)
        assert build_network(model, localization_stride=16, **settings).backbone.stride == 16


# ---- how systems are found ----------------------------------------------------------------------------------------


def test_systems_are_the_files_of_the_folder() -> None:
    folder = Path(networks.systems.__file__).parent
    assert sorted(MODELS) == sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("model", MODELS)
def test_a_system_has_a_file_a_title_and_tests_of_its_own(model: str) -> None:
    system = find_system(model)
    assert issubclass(system, System)
    assert name_of(system) == name_of(SYSTEMS[model].evaluated) == model
    assert system.__module__ == f"networks.systems.{model}"
    module = __import__(system.__module__, fromlist=["__doc__"])
    assert len(module.__doc__.split()) > 10
    assert (Path(__file__).parent / "systems" / f"test_{model}.py").is_file()


def test_options_belong_to_the_systems_that_have_them() -> None:
    assert owners_of("graph_scope") == ["sgkrl_published"]
    assert {"mmal", "sgkrl", "sgkrl_published"} <= set(owners_of("windows"))
    assert owners_of("epochs") == []


@pytest.mark.parametrize("model", MODELS)
def test_a_network_is_built_as_train_py_builds_it(model: str, tmp_path: Path) -> None:
    """The same settings give the same options, branches and weights from Python and from the command line."""
    shared = {"backbone": "resnet18", "input_size": 96}
    for pretrained in ("none", "IMAGENET1K_V1"):
        settings = complete(
            Settings(model=model, dataset="folder", data_root=str(tmp_path), pretrained=pretrained, **shared)
        )
        torch.manual_seed(0)
        trained = build_from_settings(settings, 5, load_weights=False)
        torch.manual_seed(0)
        built = build_network(model, num_classes=5, pretrained="none" if pretrained == "none" else None, **shared)
        assert type(trained) is type(built)
        assert trained.options == built.options
        assert trained.backbone.batch_norm == built.backbone.batch_norm
        assert trained.prediction == built.prediction
        weights = built.state_dict()
        assert trained.state_dict().keys() == weights.keys()
        assert all(torch.equal(value, weights[name]) for name, value in trained.state_dict().items())


# ---- what cannot be built -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("settings", "words"),
    (
        ({"num_classes": 1}, ("1", "2")),
        ({"num_classes": 0}, ("0", "2")),
        ({"num_classes": "five"}, ("num_classes", "five")),
        ({"num_classes": 5.0}, ("num_classes", "5.0")),
        ({"input_size": "128"}, ("input_size", "'128'")),
        ({"input_size": 128.0}, ("input_size", "128.0")),
        ({"dropout": 2}, ("dropout", "2")),
        ({"dropout": "much"}, ("dropout", "much")),
        ({"prediction": ("raw", "raw")}, ("raw", "once")),
        ({"input_size": 100}, ("100", "32")),
        ({"input_size": 64}, ("64", "96")),
        ({"input_size": 0}, ("0", "96")),
        ({"backbone": "vgg16"}, ("vgg16", "resnet50")),
        ({"batch_norm": "none"}, ("none", "shared", "frozen")),
        ({"prediction": ("crown",)}, ("crown",)),
        ({"prediction": ()}, ("()",)),
        ({"crown_jewels": 3}, ("crown_jewels", "setting of")),
    ),
    ids=str,
)
def test_what_cannot_be_built_is_refused(model: str, settings: dict, words: tuple[str, ...]) -> None:
    settings = {"num_classes": 5, "backbone": "resnet18", "input_size": SIZE, **settings}
    with pytest.raises(UserError) as caught, torch.device("meta"):
        build_network(model, **settings)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("name", ("sgkrI", "", "__init__", "system"))
def test_an_unknown_system_is_refused(name: str) -> None:
    with pytest.raises(SettingsError, match="unknown model") as caught:
        build_network(name, num_classes=5)
    assert all(word in str(caught.value) for word in (repr(name), *MODELS))


@pytest.mark.parametrize("model", MODELS)
def test_settings_of_other_systems_are_refused_by_name(model: str) -> None:
    system = find_system(model)
    own = set(system.Options.__dataclass_fields__)
    others = {name for other in MODELS for name in find_system(other).Options.__dataclass_fields__} - own
    for name in others:
        with pytest.raises(SettingsError) as caught:
            build_options(system, {name: 1}, Shared())
        sentence = str(caught.value)
        assert sentence.startswith(f"{name} is a setting of ")
        assert f"not of {model}" in sentence
        assert all(owner in sentence for owner in owners_of(name))
