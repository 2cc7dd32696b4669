"""Published checkpoints, loaded under their names: SG-KRL and MMAL-Net against the loops in `reference`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import reference
import torch
import torch.nn.functional as F
from cases import slow_but_for
from torch import Tensor, nn

from networks import build_network
from utils.checkpoint import CheckpointError, load_published

CLASSES, BATCH, SIZE = 5, 3, 128
GRID = SIZE // 32


def make_images() -> Tensor:
    """Blobs with some noise: maps with several peaks, so that boxes, masks and windows all cut something away."""
    generator = torch.Generator().manual_seed(1)
    blobs = F.interpolate(torch.randn(BATCH, 3, 7, 7, generator=generator), size=(SIZE, SIZE), mode="bicubic")
    return 1.5 * blobs + 0.3 * torch.randn(BATCH, 3, SIZE, SIZE, generator=generator)


def save_checkpoint(path: Path, state_dict: dict[str, Tensor]) -> Path:
    torch.save({"epoch": 100, "model_state_dict": state_dict, "learning_rate": 1e-5}, path)
    return path


def build(system: str, **settings: object) -> nn.Module:
    """SG-KRL with the graph over the batch, as published, unless told otherwise."""
    model = "sgkrl_published" if system == "sgkrl" else system
    settings = ({"graph_scope": "batch"} if system == "sgkrl" else {}) | settings
    return build_network(model, num_classes=CLASSES, backbone="resnet50", input_size=SIZE, **settings)


class Published:
    """A system's random checkpoint and the network that holds it, made once."""

    def __init__(self, system: str, folder: Path) -> None:
        self.state_dict = reference.random_published_state_dict(CLASSES, seed=0, system=system)
        self.path = save_checkpoint(folder / f"{system}.pth", self.state_dict)
        self.network = build(system).eval()
        load_published(self.network, str(self.path))


@pytest.fixture(scope="module")
def sgkrl(tmp_path_factory: pytest.TempPathFactory) -> Published:
    return Published("sgkrl", tmp_path_factory.mktemp("sgkrl"))


@pytest.fixture(scope="module")
def mmal(tmp_path_factory: pytest.TempPathFactory) -> Published:
    return Published("mmal", tmp_path_factory.mktemp("mmal"))


def assert_equals_reference(network: nn.Module, expected: dict[str, Tensor], *, mask_background: bool = False) -> None:
    with torch.no_grad():
        output = network.eval()(make_images(), mask_background=mask_background)
    assert torch.equal(output.object_boxes, expected["object_boxes"])
    assert torch.equal(output.window_boxes, expected["window_boxes"])
    names = expected.keys() - {"object_boxes", "window_boxes"}
    assert output.logits.keys() == names
    for name in names:
        torch.testing.assert_close(
            output.logits[name], expected[name], rtol=1e-3, atol=1e-3, msg=lambda m, n=name: n + m
        )


@pytest.fixture(scope="module")
def expected_sgkrl(sgkrl: Published) -> dict[bool, dict[str, Tensor]]:
    """What the reference gives without and with the mask; the graph over the batch, as published."""
    settings = {"graph_scope": "batch", "window_set": reference.scale_window_set(reference.BIRDS, GRID)}
    return {
        mask: reference.published_sgkrl(
            sgkrl.state_dict, make_images(), mask_background=mask, input_size=SIZE, **settings
        )
        for mask in (False, True)
    }


@pytest.fixture(scope="module")
def spare() -> dict[str, nn.Module]:
    """Networks to load other files into; the SG-KRL differs from the one above in what no checkpoint holds."""
    return {"sgkrl": build("sgkrl", graph_scope="image", windows="vehicles"), "mmal": build("mmal")}


# ---- the same results ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask_background", (False, True))
def test_sgkrl_equals_reference(
    sgkrl: Published, expected_sgkrl: dict[bool, dict[str, Tensor]], mask_background: bool
) -> None:
    assert_equals_reference(sgkrl.network, expected_sgkrl[mask_background], mask_background=mask_background)


@pytest.mark.slow
def test_sgkrl_equals_reference_with_the_graph_inside_the_image_and_other_windows(
    sgkrl: Published, spare: dict[str, nn.Module]
) -> None:
    load_published(spare["sgkrl"], sgkrl.path)
    window_set = reference.scale_window_set(reference.VEHICLES, GRID)
    settings = {"mask_background": False, "graph_scope": "image", "input_size": SIZE, "window_set": window_set}
    assert_equals_reference(spare["sgkrl"], reference.published_sgkrl(sgkrl.state_dict, make_images(), **settings))


def test_mmal_equals_reference(mmal: Published) -> None:
    window_set = reference.scale_window_set(reference.BIRDS, GRID)
    expected = reference.published_mmal(mmal.state_dict, make_images(), input_size=SIZE, window_set=window_set)
    assert_equals_reference(mmal.network, expected)


def test_the_comparison_can_tell(sgkrl: Published, expected_sgkrl: dict[bool, dict[str, Tensor]]) -> None:
    """Boxes that cut something away, a mask and a batch that matter: none of these can be ignored unseen."""
    plain, masked = expected_sgkrl[False], expected_sgkrl[True]
    assert (plain["object_boxes"] != torch.tensor([0.0, 0.0, SIZE - 1, SIZE - 1])).any(dim=1).sum() >= 2
    assert torch.equal(plain["raw"], masked["raw"])
    assert (plain["object"] - masked["object"]).abs().amax(dim=1).min() > 0.05
    assert (plain["window"] - masked["window"]).abs().max() > 0.5
    with torch.no_grad():
        alone = sgkrl.network(make_images()[:1])
    assert (plain["graph"][:1] - alone.logits["graph"]).abs().max() > 0.05


def test_forward_makes_the_host_wait_nowhere(sgkrl: Published, mmal: Published) -> None:
    images = make_images()[:1]
    with torch.no_grad(), reference.ForbidHostReads():
        sgkrl.network(images, mask_background=True)
        mmal.network(images)


def test_prediction_has_one_row_per_image(sgkrl: Published) -> None:
    with torch.no_grad():
        output = sgkrl.network(make_images())
    assert sgkrl.network.predict_logits(output).shape == (BATCH, CLASSES)


# ---- loading ------------------------------------------------------------------------------------------------------


def light(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same names and shapes, each from one stored number: the files of the tests below stay small."""
    return {name: torch.zeros((), dtype=value.dtype).expand(value.shape) for name, value in state_dict.items()}


def assert_holds(network: nn.Module, published: Published) -> None:
    """The network has the same parameters as the one that was compared with the reference."""
    expected = published.network.state_dict()
    for name, value in network.state_dict().items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("system", slow_but_for(("mmal",), ("sgkrl", "mmal")))
def test_prefix_is_tolerated(
    system: str, spare: dict[str, nn.Module], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    published = request.getfixturevalue(system)
    prefixed = {f"module.{name}": value for name, value in published.state_dict.items()}
    load_published(spare[system], save_checkpoint(tmp_path / "prefixed.pth", prefixed))
    assert_holds(spare[system], published)


def test_unused_classifier_of_the_trunk_may_be_missing(
    mmal: Published, spare: dict[str, nn.Module], tmp_path: Path
) -> None:
    kept = {name: value for name, value in mmal.state_dict.items() if not name.startswith("pretrained_model.fc")}
    load_published(spare["mmal"], save_checkpoint(tmp_path / "without.pth", kept))
    assert_holds(spare["mmal"], mmal)


def test_counters_of_batch_norms_may_be_missing(mmal: Published, spare: dict[str, nn.Module], tmp_path: Path) -> None:
    kept = {name: value for name, value in mmal.state_dict.items() if not name.endswith("num_batches_tracked")}
    assert len(kept) < len(mmal.state_dict)
    torch.save({"net_state_dict": kept}, tmp_path / "old.pth")
    load_published(spare["mmal"], tmp_path / "old.pth")
    assert_holds(spare["mmal"], mmal)


Spoil = Callable[[dict[str, Tensor]], object]


def without(name: str) -> Spoil:
    return lambda weights: weights.pop(name)


def with_extra(name: str) -> Spoil:
    return lambda weights: weights.update({name: torch.zeros(3)})


def with_shape(name: str, *shape: int) -> Spoil:
    return lambda weights: weights.update({name: torch.zeros(()).expand(shape)})


WRONG = (
    ("sgkrl", "fusion4.q_proj.bias", without("fusion4.q_proj.bias")),
    ("sgkrl", "fusion3.out_proj.weight", without("fusion3.out_proj.weight")),
    ("sgkrl", "gcn_model.conv3.lin.weight", without("gcn_model.conv3.lin.weight")),
    ("sgkrl", "CBAM.spatialattention.conv1.weight", without("CBAM.spatialattention.conv1.weight")),
    ("sgkrl", "pretrained_model.layer3.2.bn1.running_var", without("pretrained_model.layer3.2.bn1.running_var")),
    ("sgkrl", "gcn_model.conv2.bias", with_extra("gcn_model.conv2.bias")),
    ("sgkrl", "CBAM.channelattention.fc.0.bias", with_extra("CBAM.channelattention.fc.0.bias")),
    ("sgkrl", "somewhere.else", with_extra("somewhere.else")),
    ("sgkrl", "fusion4.k_proj.weight", with_shape("fusion4.k_proj.weight", 512, 512)),
    ("sgkrl", "gcn_model.classifier.weight", with_shape("gcn_model.classifier.weight", CLASSES + 1, 256)),
    ("mmal", "rawcls_net.weight", with_shape("rawcls_net.weight", 200, 2048)),
    ("mmal", "rawcls_net.bias", without("rawcls_net.bias")),
    ("mmal", "pretrained_model.layer4.3.conv1.weight", with_extra("pretrained_model.layer4.3.conv1.weight")),
    ("mmal", "fusion4.q_proj.bias", with_extra("fusion4.q_proj.bias")),
)


@pytest.mark.parametrize(
    "content", [{0: torch.zeros(2)}, {"state_dict": {0: torch.zeros(2)}}, {"weight": 1.0}, {(): {}}]
)
def test_a_file_without_tensors_by_name_is_refused(content: dict, spare: dict[str, nn.Module], tmp_path: Path) -> None:
    torch.save(content, tmp_path / "wrong.pth")
    with pytest.raises(CheckpointError, match="is no published checkpoint: it holds no tensors by name"):
        load_published(spare["mmal"], tmp_path / "wrong.pth")


@pytest.mark.parametrize(("system", "name", "spoil"), WRONG, ids=[f"{case[0]}-{case[1]}" for case in WRONG])
def test_wrong_files_are_refused_by_name(
    system: str,
    name: str,
    spoil: Spoil,
    spare: dict[str, nn.Module],
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    weights = light(request.getfixturevalue(system).state_dict)
    spoil(weights)
    path = save_checkpoint(tmp_path / "wrong.pth", weights)
    with pytest.raises((ValueError, RuntimeError, KeyError)) as caught:
        load_published(spare[system], path)
    assert name in str(caught.value)
    if name == "rawcls_net.weight":
        assert "200" in str(caught.value)
        assert str(CLASSES) in str(caught.value)


def test_all_that_is_wrong_is_named_with_a_prefix_too(
    mmal: Published, spare: dict[str, nn.Module], tmp_path: Path
) -> None:
    weights = {f"module.{name}": value for name, value in light(mmal.state_dict).items()}
    weights["module.surplus"] = weights.pop("module.rawcls_net.bias")
    with pytest.raises((ValueError, RuntimeError, KeyError)) as caught:
        load_published(spare["mmal"], save_checkpoint(tmp_path / "wrong.pth", weights))
    assert "surplus" in str(caught.value)
    assert "rawcls_net.bias" in str(caught.value)


def test_refused_files_leave_the_network_as_it_was(
    mmal: Published, spare: dict[str, nn.Module], tmp_path: Path
) -> None:
    load_published(spare["mmal"], mmal.path)
    before = {name: value.clone() for name, value in spare["mmal"].state_dict().items()}
    weights = light(mmal.state_dict)
    weights["surplus"] = torch.zeros(3)
    with pytest.raises((ValueError, RuntimeError, KeyError)):
        load_published(spare["mmal"], save_checkpoint(tmp_path / "wrong.pth", weights))
    assert all(torch.equal(value, before[name]) for name, value in spare["mmal"].state_dict().items())


def test_light_files_are_right_but_for_what_is_spoilt(
    spare: dict[str, nn.Module], mmal: Published, tmp_path: Path
) -> None:
    load_published(spare["mmal"], save_checkpoint(tmp_path / "light.pth", light(mmal.state_dict)))


@pytest.mark.parametrize("content", ({"epoch": 3}, [1, 2], {"model_state_dict": {}}), ids=str)
def test_files_that_are_no_checkpoint_are_refused(content: object, spare: dict[str, nn.Module], tmp_path: Path) -> None:
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises((ValueError, RuntimeError, KeyError)):
        load_published(spare["mmal"], tmp_path / "other.pth")
