"""The families of trunks: their maps against torchvision's own, what they have, and every system on each of them."""

from __future__ import annotations

import pytest
import system_checks
import torch
import torchvision
from cases import slow_but_for
from small_systems import CLASSES, Variant, make_images
from thin_trunk import THIN, get_thin_model
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.regnet import RegNet
from torchvision.models.resnet import Bottleneck
from tracing import traced

import train
from config import parse_settings
from networks import MODELS, build_network
from networks.backbone import Backbone
from networks.evidence import forward_with_evidence
from networks.folding import fold_batch_norm
from networks.trunks import BACKBONES, FAMILIES, family_of, traits_of
from utils.checkpoint import load_checkpoint
from utils.errors import UserError
from utils.options import SettingsError

pytestmark = pytest.mark.usefixtures("thin_trunk")

RESNETS = tuple(name for name in THIN if "res" in name)
NORMALISED = tuple(name for name in THIN if not traits_of(name).batch_norm)
OTHERS = tuple(name for name in THIN if name != "resnet18")
CUB = ["--dataset", "cub", "--data_root", "somewhere"]
# the modules whose outputs are stage 2, stage 3, the second-to-last block of the last stage, and that stage
NODES = {
    "resnets": ("layer2", "layer3", "layer4.0", "layer4"),
    "regnet_y_400mf": tuple(f"trunk_output.{n}" for n in ("block2", "block3", "block4.block4-0", "block4")),
} | dict.fromkeys(NORMALISED, ("features.3", "features.5", "features.7.0", "features.7"))


def settled(network: nn.Module) -> nn.Module:
    """Statistics and scales that are not those of a new network."""
    torch.manual_seed(7)
    for name, value in [*network.named_parameters(), *network.named_buffers()]:
        if name.endswith(("running_var", "norm.weight", "bn.weight", "bn3.weight")):
            nn.init.uniform_(value, 0.5, 1.5)
        elif name.endswith(("running_mean", "norm.bias", "bn3.bias")):
            nn.init.normal_(value, std=0.2)
    return network


def build_pair(name: str, **options: object) -> tuple[Backbone, nn.Module]:
    """A trunk and torchvision's whole network with the same weights."""
    whole = settled(get_thin_model(name)).eval()
    backbone = Backbone(name, **options).eval()
    backbone.trunk.load_state_dict(
        {key: value for key, value in whole.state_dict().items() if not key.startswith(family_of(name).classifier)}
    )
    return backbone, whole


def torchvision_maps(name: str, whole: nn.Module, images: Tensor) -> list[Tensor]:
    """The four maps as torchvision's own extractor of features has them, with what is said to come after."""
    nodes = NODES["resnets"] if name in RESNETS else NODES[name]
    if name in RESNETS or name == "regnet_y_400mf":
        found = {}
        for node in nodes:
            whole.get_submodule(node).register_forward_hook(lambda m, i, o, node=node: found.update({node: o.clone()}))
        whole(images)
        return [found[node] for node in nodes]
    found = create_feature_extractor(whole, {node: node for node in nodes})(images)
    stage2, stage3, *last = (found[node] for node in nodes)
    if name.startswith("swin"):
        return [x.permute(0, 3, 1, 2) for x in (stage2, stage3, *(whole.norm(x).relu() for x in last))]
    return [stage2, stage3, *(whole.classifier[0](x).relu() for x in last)]


@pytest.mark.parametrize("name", OTHERS)
def test_maps_are_torchvision_s(name: str) -> None:
    backbone, whole = build_pair(name)
    images = make_images(96)
    with torch.no_grad():
        features, expected = backbone(images), torchvision_maps(name, whole, images)
        if name in RESNETS or name == "regnet_y_400mf":
            torch.testing.assert_close(whole.fc(features.embedding), whole(images), rtol=1e-4, atol=1e-4)
    for map_, wanted, cells in zip(features, expected, (12, 6, 3, 3), strict=False):
        assert map_.shape[-2:] == (cells, cells)
        torch.testing.assert_close(map_, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.equal(features.penultimate, features.final)
    assert (features.final >= 0).all()
    assert 0.1 < (features.final > 0).float().mean() < 1
    torch.testing.assert_close(features.embedding, features.final.mean(dim=(2, 3)))
    channels = {"stage2": features.stage2, "stage3": features.stage3, "final": features.final}
    assert backbone.channels == {stage: map_.shape[1] for stage, map_ in channels.items()}
    assert backbone.embedding_channels == features.embedding.shape[1]


@pytest.mark.parametrize("name", ("resnext50_32x4d", "wide_resnet50_2"))
def test_dense_maps_of_grouped_and_wide_convolutions(name: str) -> None:
    backbone = build_pair(name)[0].double()
    images = make_images(96).double()
    with torch.no_grad():
        features, dense = backbone(images), backbone(images, dense=True)
    assert dense.final.shape[-2:] == (6, 6)
    torch.testing.assert_close(dense.final[:, :, ::2, ::2], features.final)


@pytest.mark.parametrize("name", [name for name in OTHERS if traits_of(name).batch_norm])
def test_statistics_can_be_frozen_folded_and_kept_per_pass(name: str) -> None:
    plain, _ = build_pair(name)
    images = make_images(96)
    with torch.no_grad():
        expected = plain(images)
        folded = fold_batch_norm(plain)(images)
        torch.testing.assert_close(folded.final, expected.final, rtol=1e-3, atol=1e-4)
    frozen = Backbone(name, batch_norm="frozen")
    frozen.load_state_dict(plain.state_dict())
    before = {key: value.clone() for key, value in frozen.named_buffers()}
    features = frozen.train()(images)
    torch.testing.assert_close(features.final, expected.final, rtol=1e-3, atol=1e-4)
    assert all(torch.equal(value, before[key]) for key, value in frozen.named_buffers())
    per_pass = Backbone(name, batch_norm="per_pass").train()
    per_pass(images, kind="object")
    counted = [value for key, value in per_pass.named_buffers() if key.endswith("passes")]
    assert len(counted) > 10
    assert all(passes.tolist() == [0, 1, 0] for passes in counted)


def test_a_regnet_without_squeeze_and_excitation() -> None:
    backbone, whole = build_pair("regnet_x_400mf")
    images = make_images(96)
    with torch.no_grad():
        features, expected = backbone(images), whole.trunk_output(whole.stem(images))
    torch.testing.assert_close(features.final, expected, rtol=1e-4, atol=1e-4)
    assert backbone.channels == {"stage2": 64, "stage3": 160, "final": 400}


def test_the_last_stride_of_a_regnet() -> None:
    backbone, whole = build_pair("regnet_y_400mf", last_stride=1)
    first = whole.trunk_output.block4[0]
    first.proj[0].stride = first.f.b[0].stride = (1, 1)
    images = make_images(96)
    with torch.no_grad():
        features, expected = backbone(images), whole.trunk_output(whole.stem(images))
    assert features.final.shape[-2:] == (6, 6)
    torch.testing.assert_close(features.final, expected, rtol=1e-4, atol=1e-4)


# ---- what they have -------------------------------------------------------------------------------------------------


def test_every_name_is_torchvision_s_and_of_one_family() -> None:
    assert len(set(BACKBONES)) == len(BACKBONES)
    assert set(BACKBONES) <= set(torchvision.models.list_models(torchvision.models))
    assert {family_of(name) for name in THIN} == set(FAMILIES)


def test_what_is_said_of_blocks_is_what_torchvision_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    depths, blocks = {}, {}
    # nothing is built but what says how
    monkeypatch.setattr(RegNet, "__init__", lambda self, params, **options: depths.update(found=params.depths))
    monkeypatch.setattr(
        torchvision.models.ResNet, "__init__", lambda self, block, layers, **options: blocks.update(found=block)
    )
    for name in BACKBONES:
        if name.startswith("regnet"):
            getattr(torchvision.models, name)()
            assert traits_of(name).penultimate == (depths["found"][-1] > 1), name
        elif "res" in name:
            getattr(torchvision.models, name)()
            assert traits_of(name).first_conv == (blocks["found"] is Bottleneck), name


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--backbone", "vgg16"], "unknown backbone 'vgg16'; choose one of resnet18, "),
        (["--backbone", "swin_t", "--batch_norm", "frozen"], "batch_norm is 'frozen'; expected 'shared' for swin_t"),
        (["--backbone", "convnext_tiny", "--batch_norm", "per_pass"], "batch_norm is 'per_pass'; expected 'shared'"),
        (["--backbone", "convnext_tiny", "--last_stride", "1"], "last_stride is 1; expected 2 for convnext_tiny"),
        (["--backbone", "regnet_y_400mf", "--stride_on_first_conv"], "stride_on_first_conv is True; expected False"),
        (["--backbone", "swin_t", "--localization_stride", "16"], "localization_stride is 16; expected 32 with swin_t"),
        (["--backbone", "regnet_y_8gf"], "backbone is 'regnet_y_8gf'; expected a trunk whose last stage has"),
        (
            ["--model", "flrdf", "--backbone", "regnet_y_8gf", "--box_agreement"],
            "backbone is 'regnet_y_8gf'; expected a trunk whose last stage has",
        ),
        *(
            (["--model", "crossx", "--backbone", name], f"backbone is '{name}'; expected a ResNet: other trunks")
            for name in ("regnet_y_400mf", "convnext_tiny", "swin_v2_b")
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_a_trunk_lacks_is_refused_in_one_sentence(words: list[str], expected: str) -> None:
    with pytest.raises(SettingsError) as refusal:
        parse_settings([*CUB, *words])
    assert str(refusal.value).startswith(expected)
    assert str(refusal.value).isprintable()


def test_dense_and_split_maps_are_refused_where_there_are_none() -> None:
    for name in ("regnet_y_400mf", "convnext_tiny", "swin_t"):
        with pytest.raises(UserError, match="dense maps"):
            Backbone(name)(make_images(96), dense=True)
        with pytest.raises(UserError, match="residuals and shortcuts"):
            Backbone(name)(make_images(96), split=True)


def test_defaults_follow_what_the_trunk_has() -> None:
    """SG-KRL's own, on pretrained weights: frozen statistics, a finer map to find the object on."""
    for name, expected in (("resnext50_32x4d", ("frozen", 16)), ("convnext_tiny", ("shared", 32))):
        settings = parse_settings([*CUB, "--backbone", name, "--input_size", "224"])
        assert (settings.batch_norm, settings.options["localization_stride"]) == expected
    for name, expected in (("regnet_y_400mf", 1), ("swin_t", 2)):
        assert parse_settings([*CUB, "--model", "cal", "--backbone", name]).last_stride == expected
        assert build_network("cal", num_classes=3, backbone=name, input_size=96).backbone.stride == 16 * expected
    assert parse_settings([*CUB, "--model", "resnet", "--backbone", "regnet_y_8gf"]).backbone == "regnet_y_8gf"


@pytest.mark.parametrize("name", OTHERS)
def test_files_of_torchvision_s_weights_are_loaded(name: str, tmp_path) -> None:
    whole = settled(get_thin_model(name))
    torch.save(whole.state_dict(), tmp_path / "weights.pth")
    backbone = Backbone(name, pretrained=str(tmp_path / "weights.pth"))
    for key, value in backbone.trunk.state_dict().items():
        assert torch.equal(value, whole.state_dict()[key]), key


# ---- systems on them ------------------------------------------------------------------------------------------------


ONLY_RESNETS = {"crossx"}
TRUNKS = {model: [n for n in OTHERS if model not in ONLY_RESNETS or n in RESNETS] for model in MODELS}
# Every system and every trunk; with the slow ones, every pair
PAIRS = [
    pytest.param(model, name, marks=[] if column == row % len(names) else pytest.mark.slow)
    for row, (model, names) in enumerate(TRUNKS.items())
    for column, name in enumerate(names)
]


@pytest.mark.parametrize(("model", "name"), PAIRS)
def test_every_system_learns_on_every_trunk(model: str, name: str) -> None:
    variant = Variant(model, backbone=name)
    system_checks.gradient_reaches_every_parameter(variant)
    network, images = variant.build(input_size=96).eval(), make_images(96)
    with torch.no_grad():
        system_checks.assert_contract(network(images), network, batch=2)


@pytest.mark.parametrize("name", slow_but_for(("convnext_tiny",), OTHERS))
def test_evidence_and_a_program_of_them(name: str) -> None:
    network = build_network("mmal", num_classes=CLASSES, backbone=name, input_size=96, pretrained="none").eval()
    images = make_images(96, batch=3)
    output, evidence = forward_with_evidence(network, images, size=24)
    assert evidence.shape == (3, 24, 24)
    assert evidence.isfinite().all()
    assert evidence.sum() > 0
    program = torch.export.export(network.backbone, (images,)).module()
    with torch.no_grad():
        torch.testing.assert_close(program(images).final, network.backbone(images).final)


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_they_are_traced_without_a_graph_break(name: str) -> None:
    backbone, images = Backbone(name).eval(), make_images(96)
    with torch.no_grad():
        compiled = traced(backbone)
        assert torch.equal(compiled(images).final, backbone(images).final)


def test_a_run_goes_on_exactly(tiny_run, tmp_path) -> None:
    """Blocks are left out at random in training (stochastic depth)."""
    more = ("--backbone", "swin_t", "--epochs", "2")
    train.main(tiny_run(tmp_path / "whole", *more))
    finish, calls = train.Run.finish_epoch, []

    def stopped(self, *arguments):
        finish(self, *arguments)
        calls.append(1)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train.Run, "finish_epoch", stopped)
        train.main(tiny_run(tmp_path / "stopped", *more))
    train.main(tiny_run(tmp_path / "stopped", *more))
    whole, stopped = (load_checkpoint(tmp_path / n / "folder-resnet" / "last.pth") for n in ("whole", "stopped"))
    assert (whole["epoch"], len(calls)) == (2, 1)
    assert all(torch.equal(value, stopped["network"][key]) for key, value in whole["network"].items())
