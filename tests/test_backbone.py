"""The trunk: its maps, its files of weights, and where its strides are."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn

from networks.backbone import STRIDE, Backbone
from networks.pretrained import is_weights_file, load_trunk_weights
from utils.errors import UserError

IMAGENET_WEIGHTS = Path(__file__).resolve().parents[2] / "shared" / "weights" / "resnet50_imagenet_v1.pth"
BLOCKS = {"resnet18": 2, "resnet34": 3, "resnet50": 3, "resnet101": 3, "resnet152": 3}  # of the last stage


def make_images(size: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def torchvision_resnet18() -> nn.Module:
    """A ResNet-18 with statistics that are not those of a new one, so that forgetting to load them shows."""
    torch.manual_seed(0)
    network = torchvision.models.resnet18(num_classes=10).eval()
    for name, buffer in network.named_buffers():
        if name.endswith("running_mean"):
            nn.init.normal_(buffer, std=0.1)
        elif name.endswith("running_var"):
            nn.init.uniform_(buffer, 0.5, 1.5)
    return network


@pytest.fixture(scope="module")
def spare() -> Backbone:
    """A trunk for the tests that want to load something into it and are refused."""
    return Backbone("resnet18")


# ---- maps ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size"), (("resnet18", 96), ("resnet18", 160), *((name, 128) for name in list(BLOCKS)[1:]))
)
def test_shapes_and_channels(name: str, size: int) -> None:
    with torch.device("meta"):
        backbone = Backbone(name)
        features = backbone(torch.empty(2, 3, size, size))
    stage2, stage3, final = (128, 256, 512) if name in ("resnet18", "resnet34") else (512, 1024, 2048)
    assert backbone.channels == {"stage2": stage2, "stage3": stage3, "final": final}
    assert backbone.embedding_channels == final
    assert features.stage2.shape == (2, stage2, size // 8, size // 8)
    assert features.stage3.shape == (2, stage3, size // 16, size // 16)
    assert features.penultimate.shape == features.final.shape == (2, final, size // STRIDE, size // STRIDE)
    assert features.embedding.shape == (2, final)
    assert len(backbone.trunk.layer4) == BLOCKS[name]


def test_half_a_cell_is_a_whole_one() -> None:
    """Windows are half the input wide, and so need not be a multiple of the stride."""
    with torch.device("meta"):
        features = Backbone("resnet18")(torch.empty(1, 3, 48, 48))
    assert features.final.shape == (1, 512, 2, 2)


@pytest.mark.parametrize("name", ("resnet18", "resnet50"))
def test_maps_are_the_outputs_of_their_blocks(name: str) -> None:
    """As they were when the block returned: torchvision's activations work in place, on what nobody keeps."""
    torch.manual_seed(0)
    backbone, seen = Backbone(name).eval(), {}
    trunk = backbone.trunk
    watched = {"stage2": trunk.layer2[-1], "stage3": trunk.layer3[-1]}
    watched |= {"penultimate": trunk.layer4[-2], "final": trunk.layer4[-1]}
    for stage, module in watched.items():
        module.register_forward_hook(lambda module, inputs, output, stage=stage: seen.update({stage: output.clone()}))
    with torch.no_grad():
        features = backbone(make_images(96))
    assert not torch.equal(features.penultimate, features.final)
    torch.testing.assert_close(features.embedding, features.final.mean(dim=(2, 3)))
    for stage in watched:
        assert torch.equal(getattr(features, stage), seen[stage]), stage


@pytest.mark.parametrize(
    ("name", "first", "size"), [("resnet18", False, 96), ("resnet50", False, 128), ("resnet50", True, 96)]
)
def test_dense_maps_hold_the_others_at_every_second_cell(name: str, first: bool, size: int) -> None:
    torch.manual_seed(0)
    backbone = Backbone(name, stride_on_first_conv=first).double().eval()
    images = make_images(size).double()
    with torch.no_grad():
        features, dense = backbone(images), backbone(images, dense=True)
    for stage in ("penultimate", "final"):
        coarse, fine = getattr(features, stage), getattr(dense, stage)
        assert fine.shape[-2:] == (size // 16, size // 16)
        torch.testing.assert_close(fine[:, :, ::2, ::2], coarse)
        assert not torch.allclose(fine[:, :, 1::2, 1::2], coarse)
    torch.testing.assert_close(dense.embedding, dense.final.mean(dim=(2, 3)))
    assert torch.equal(dense.stage3, features.stage3)


@pytest.mark.parametrize(
    "options", ({}, {"batch_norm": "frozen"}, {"batch_norm": "per_pass"}, {"last_stride": 1}), ids=str
)
def test_split_maps_add_up_to_the_stages_and_change_nothing_else(options: dict) -> None:
    torch.manual_seed(0)
    backbone, images, normalised = Backbone("resnet18", **options).eval(), make_images(96), {}
    trunk = backbone.trunk
    for stage, block in (("stage3", trunk.layer3[-1]), ("final", trunk.layer4[-1])):
        block.bn2.register_forward_hook(lambda *call, stage=stage: normalised.update({stage: call[-1].clone()}))
    with torch.no_grad():
        plain = backbone(images)
        features = backbone(images, split=True)
    for expected, found in zip(plain[:5], features[:5], strict=True):
        assert torch.equal(found, expected)
    assert torch.equal(features.final_split.shortcut, features.penultimate)
    for stage, split in (("stage3", features.stage3_split), ("final", features.final_split)):
        assert torch.equal((split.residual + split.shortcut).relu(), getattr(features, stage))
        assert (split.shortcut >= 0).all()
        assert split.residual.min() < 0
        assert options.get("batch_norm") == "frozen" or torch.equal(split.residual, normalised[stage])
    with torch.no_grad():
        ended = backbone(images, split=True, until="stage3")
    assert torch.equal(ended.stage3_split.residual, features.stage3_split.residual)
    assert ended.final_split is None


def test_equals_torchvision_s_own_forward(torchvision_resnet18: nn.Module, tmp_path: Path) -> None:
    torch.save(torchvision_resnet18.state_dict(), tmp_path / "weights.pth")
    backbone = Backbone("resnet18", pretrained=str(tmp_path / "weights.pth")).eval()
    images = make_images(128)
    with torch.no_grad():
        logits = torchvision_resnet18.fc(backbone(images).embedding)
        torch.testing.assert_close(logits, torchvision_resnet18(images), rtol=1e-5, atol=1e-5)


def test_unknown_backbone_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"resnet20.*resnet18.*resnet152"):
        Backbone("resnet20")


# ---- strides ------------------------------------------------------------------------------------------------------


def strides(trunk: nn.Module, convolution: str) -> list[int]:
    return [getattr(stage[0], convolution).stride[0] for stage in (trunk.layer2, trunk.layer3, trunk.layer4)]


def test_stride_on_first_conv_moves_the_strides() -> None:
    with torch.device("meta"):
        usual, moved = Backbone("resnet50"), Backbone("resnet50", stride_on_first_conv=True)
        features = moved(torch.empty(1, 3, 96, 96))
    assert (strides(usual.trunk, "conv1"), strides(usual.trunk, "conv2")) == ([1, 1, 1], [2, 2, 2])
    assert (strides(moved.trunk, "conv1"), strides(moved.trunk, "conv2")) == ([2, 2, 2], [1, 1, 1])
    assert features.final.shape == (1, 2048, 3, 3)
    assert features.stage2.shape == (1, 512, 12, 12)
    for other in (moved.trunk.layer1[0], moved.trunk.layer2[1], moved.trunk.layer4[2]):
        assert other.conv1.stride == other.conv2.stride == (1, 1)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet18", {}),
        ("resnet50", {}),
        ("resnet50", {"stride_on_first_conv": True}),
        ("resnet18", {"batch_norm": "frozen"}),
    ],
)
def test_last_stride_leaves_out_one_stride_and_nothing_else(name: str, options: dict) -> None:
    """Against torchvision's own network with that stride set to 1; the later blocks are not dilated."""
    torch.manual_seed(0)
    backbone = Backbone(name, last_stride=1, **options).eval()
    torch.manual_seed(0)
    expected = Backbone(name, **options).eval()
    trunk = expected.trunk
    first = trunk.layer4[0]
    for convolution in (first.conv1, first.conv2, first.downsample[0]):
        convolution.stride = (1, 1)
    images = make_images(96, batch=1)
    with torch.no_grad():
        features = backbone(images)
        x = trunk.layer2(trunk.layer1(trunk.maxpool(trunk.relu(trunk.bn1(trunk.conv1(images))))))
        final = trunk.layer4(trunk.layer3(x))
        dense = backbone(images, dense=True)
    assert (backbone.stride, trunk.layer4[1].conv2.dilation) == (16, (1, 1))
    assert features.final.shape[-2:] == features.penultimate.shape[-2:] == features.stage3.shape[-2:] == (6, 6)
    torch.testing.assert_close(features.final, final, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(features.embedding, final.mean(dim=(2, 3)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dense.final, features.final, rtol=1e-4, atol=1e-4)
    assert Backbone("resnet18").stride == STRIDE
    assert backbone.state_dict().keys() == expected.state_dict().keys()


def test_last_stride_is_not_dense() -> None:
    torch.manual_seed(0)
    usual = Backbone("resnet18").eval()
    finer = Backbone("resnet18", last_stride=1).eval()
    finer.load_state_dict(usual.state_dict())
    images = make_images(96, batch=1)
    with torch.no_grad():
        dense, final = usual(images, dense=True).final, finer(images).final
    assert dense.shape == final.shape
    assert (dense - final).abs().max() > 0.02 * dense.abs().max()


@pytest.mark.parametrize("last_stride", (0, 3, 16))
def test_other_last_strides_are_refused(last_stride: int) -> None:
    with pytest.raises(UserError, match=f"last_stride is {last_stride}; expected 1 or 2"), torch.device("meta"):
        Backbone("resnet18", last_stride=last_stride)


@pytest.mark.parametrize("name", ("resnet18", "resnet34"))
def test_stride_on_first_conv_needs_bottlenecks(name: str) -> None:
    with pytest.raises(ValueError, match=f"stride_on_first_conv.*{name}"), torch.device("meta"):
        Backbone(name, stride_on_first_conv=True)


# ---- files of weights ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "with_classifier", "prefix", "wrapped"),
    (
        (torch.float32, True, "", False),
        (torch.float16, True, "", False),
        (torch.bfloat16, False, "", False),
        (torch.float64, False, "module.", False),
        (torch.float32, False, "", True),
        (torch.float16, True, "module.", True),
    ),
)
def test_files_of_weights(
    torchvision_resnet18: nn.Module,
    tmp_path: Path,
    dtype: torch.dtype,
    with_classifier: bool,
    prefix: str,
    wrapped: bool,
) -> None:
    original = torchvision_resnet18.state_dict()
    state = {
        prefix + name: value.to(dtype) if value.is_floating_point() else value
        for name, value in original.items()
        if with_classifier or not name.startswith("fc.")
    }
    torch.save({"epoch": 90, "state_dict": state} if wrapped else state, tmp_path / "weights.pth")
    loaded = Backbone("resnet18", pretrained=str(tmp_path / "weights.pth")).trunk.state_dict()
    assert loaded.keys() == {name for name in original if not name.startswith("fc.")}
    for name, value in loaded.items():
        if value.is_floating_point():
            assert value.dtype == torch.float32, name
            assert torch.equal(value, original[name].to(dtype).float()), name


@pytest.mark.parametrize(
    ("key", "prefix"),
    (
        ("model", "module."),
        ("model", ""),
        (None, "backbone."),
        ("state_dict", "module.backbone."),
        ("network", "backbone.trunk."),
    ),
)
def test_files_of_others_and_our_own_checkpoints(
    torchvision_resnet18: nn.Module, spare: Backbone, tmp_path: Path, key: str | None, prefix: str
) -> None:
    """The trunk's weights among those of what else the file has, and its own classifier or none."""
    original = {n: v for n, v in torchvision_resnet18.state_dict().items() if not n.startswith("fc.")}
    state = {prefix + name: value for name, value in original.items()}
    if "backbone." in prefix:
        state |= {"head.weight": torch.zeros(3, 512), "neck.0.bias": torch.zeros(4)}
    else:
        state[f"{prefix}fc.weight"] = torch.zeros(3, 512)
    torch.save({key: state, "epoch": 3, "model_name": "x"} if key else state, tmp_path / "weights.pth")
    load_trunk_weights(spare.trunk, tmp_path / "weights.pth")
    assert all(torch.equal(value, original[name]) for name, value in spare.trunk.state_dict().items())


def test_safetensors_are_read_where_the_package_is_there(
    torchvision_resnet18: nn.Module, spare: Backbone, tmp_path: Path
) -> None:
    state = torchvision_resnet18.state_dict()
    path = tmp_path / "weights.safetensors"
    assert is_weights_file(str(path))
    with pytest.raises(UserError, match=r"weights\.safetensors are not there"):
        load_trunk_weights(spare.trunk, path)
    package = pytest.importorskip("safetensors.torch", reason="the package safetensors is not installed")
    package.save_file(state, path)
    load_trunk_weights(spare.trunk, path)
    assert torch.equal(spare.trunk.layer4[1].conv2.weight, state["layer4.1.conv2.weight"])
    path.write_bytes(b"these are no weights")
    with pytest.raises(UserError, match=r"weights\.safetensors are not a plain file of tensors"):
        load_trunk_weights(spare.trunk, path)


def test_safetensors_without_the_package_are_refused_in_one_sentence(
    spare: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "weights.safetensors").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(UserError, match="need the package safetensors: pip install safetensors"):
        load_trunk_weights(spare.trunk, tmp_path / "weights.safetensors")


def test_counters_that_old_files_lack_may_be_missing(
    torchvision_resnet18: nn.Module, spare: Backbone, tmp_path: Path
) -> None:
    state = {k: v for k, v in torchvision_resnet18.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "old.pth")
    load_trunk_weights(spare.trunk, tmp_path / "old.pth")
    assert torch.equal(spare.trunk.conv1.weight, torchvision_resnet18.conv1.weight)


@pytest.mark.parametrize("wrong", ("missing", "surplus", "shape"))
def test_weights_that_do_not_fit_are_refused_by_name(
    torchvision_resnet18: nn.Module, spare: Backbone, tmp_path: Path, wrong: str
) -> None:
    state = dict(torchvision_resnet18.state_dict())
    name = "layer3.0.conv1.weight"
    if wrong == "missing":
        del state[name]
    elif wrong == "surplus":
        name = "layer5.0.conv1.weight"
        state[name] = torch.zeros(1)
    else:
        state[name] = torch.zeros(256, 128, 1, 1)
    torch.save(state, tmp_path / "misfit.pth")
    with pytest.raises(ValueError) as caught:
        load_trunk_weights(spare.trunk, tmp_path / "misfit.pth")
    assert "misfit.pth" in str(caught.value)
    assert name in str(caught.value)


def test_weights_of_another_depth_are_refused(torchvision_resnet18: nn.Module, tmp_path: Path) -> None:
    torch.save(torchvision_resnet18.state_dict(), tmp_path / "resnet18.pth")
    with pytest.raises(ValueError, match=r"resnet18\.pth"):
        Backbone("resnet34", pretrained=str(tmp_path / "resnet18.pth"))


class RunsCode:
    """Unpickling one of these would call a function."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("ran",)


@pytest.mark.parametrize(
    "content",
    (
        [1, 2],
        torch.zeros(3),
        {"a": 1},
        {"state_dict": {"a": "b"}},
        {},
        {1: torch.zeros(2)},
        {"conv1.weight": RunsCode()},
    ),
    ids=("list", "tensor", "number", "text", "empty", "numbered", "code"),
)
def test_files_of_something_else_are_refused(
    spare: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: object
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth"):
        load_trunk_weights(spare.trunk, tmp_path / "other.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content",
    (
        b"",
        b"these are no weights\n",
        b"hello world\n",
        b"tensor\n",
        b"version https://git-lfs.github.com/spec/v1\n",
        b"<!DOCTYPE html><html>404</html>",
        b"PK\x03\x04 broken off",
        b"\x80\x02}q\x00.",
    ),
    ids=("empty", "text", "greeting", "word", "pointer", "page", "archive", "old"),
)
def test_files_that_torch_did_not_write_are_refused(spare: Backbone, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "broken.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.pth"):
        load_trunk_weights(spare.trunk, tmp_path / "broken.pth")


def test_of_a_run_with_an_average_that_is_taken(spare: Backbone, tmp_path: Path) -> None:
    """Ours, of any statistics: `network` beside `ema`, and one set for each pass of which pictures' count."""
    torch.manual_seed(4)
    plain = Backbone("resnet18", batch_norm="per_pass")
    average = {f"module.backbone.{name}": value + 1 for name, value in plain.state_dict().items()}
    content = {"network": {f"backbone.{n}": v for n, v in plain.state_dict().items()}}
    content["ema"] = {"n_averaged": torch.tensor(3), "module.classifier.weight": torch.zeros(2, 2), **average}
    torch.save(content, tmp_path / "best.pth")
    load_trunk_weights(spare.trunk, tmp_path / "best.pth")
    assert torch.equal(spare.trunk.conv1.weight, plain.trunk.conv1.weight + 1)
    assert torch.equal(spare.trunk.bn1.running_var, plain.trunk.bn1.running_var[0] + 1)


@pytest.mark.parametrize("value", (torch.zeros(64, 3, 7, 7, dtype=torch.int8), torch.full((64, 3, 7, 7), torch.nan)))
def test_weights_that_are_none_are_refused(spare: Backbone, tmp_path: Path, value: Tensor) -> None:
    torch.save(spare.trunk.state_dict() | {"conv1.weight": value}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match="conv1.weight is not all finite numbers"):
        load_trunk_weights(spare.trunk, tmp_path / "weights.pth")


@pytest.mark.slow
def test_torchvision_s_swin_has_indices_among_its_weights(tmp_path: Path) -> None:
    torch.manual_seed(5)
    original = torchvision.models.swin_t().state_dict()
    torch.save(original, tmp_path / "swin.pth")
    trunk = Backbone("swin_t", pretrained=str(tmp_path / "swin.pth")).trunk
    assert torch.equal(trunk.state_dict()["features.0.0.weight"], original["features.0.0.weight"])


def test_weights_may_lie_at_home(spare: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.save(spare.trunk.state_dict(), tmp_path / "weights")
    assert is_weights_file("~/weights")
    load_trunk_weights(spare.trunk, "~/weights")
    with pytest.raises(UserError, match="~nobody-of-this-name/w.pth are not there"):
        load_trunk_weights(spare.trunk, "~nobody-of-this-name/w.pth")
    assert not is_weights_file("~nobody-of-this-name/w")


@pytest.mark.parametrize("name", ("absent.pth", "absent.pt"))
def test_absent_file_is_named(tmp_path: Path, name: str) -> None:
    assert is_weights_file(name)
    with pytest.raises(UserError, match=name), torch.device("meta"):
        Backbone("resnet18", pretrained=str(tmp_path / name))


@pytest.mark.skipif(not IMAGENET_WEIGHTS.is_file(), reason=f"{IMAGENET_WEIGHTS.name} is not beside the project")
def test_imagenet_weights_with_the_stride_on_the_first_convolution() -> None:
    backbone = Backbone("resnet50", pretrained=str(IMAGENET_WEIGHTS), stride_on_first_conv=True).eval()
    with torch.no_grad():
        features = backbone(make_images(96, batch=1))
    assert all(parameter.dtype == torch.float32 for parameter in backbone.parameters())
    assert all(map_.isfinite().all() for map_ in features if map_ is not None)
    assert 0.05 < features.embedding.mean() < 2  # what a trained trunk gives; a random one is far off


# ---- weights by name ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ("DEFAULT", "IMAGENET1K_V1", "ResNet18_Weights.IMAGENET1K_V1"))
def test_weights_by_name_come_from_torchvision(
    torchvision_resnet18: nn.Module, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    asked = []
    full = torchvision.models.resnet18().state_dict() | {
        key: value for key, value in torchvision_resnet18.state_dict().items() if not key.startswith("fc.")
    }

    def get_state_dict(self: object, *args: object, **kwargs: object) -> dict[str, Tensor]:
        asked.append(self)
        return full

    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", get_state_dict)
    backbone = Backbone("resnet18", pretrained=name)
    assert asked == [torchvision.models.ResNet18_Weights.IMAGENET1K_V1]
    assert torch.equal(backbone.trunk.layer4[1].conv2.weight, full["layer4.1.conv2.weight"])


@pytest.mark.parametrize("name", ("imagenet", "IMAGENET1K_V2", "", "weights/resnet18"))
def test_unknown_weights_name_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(ValueError, match=r"resnet18.*IMAGENET1K_V1") as caught:  # it has no V2
        Backbone("resnet18", pretrained=name)
    assert repr(name) in str(caught.value)
    assert ".pth" in str(caught.value)
