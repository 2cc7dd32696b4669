"""Batch-norm statistics: shared by the passes, kept for each, or frozen."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from networks import build_network
from networks.backbone import Backbone
from networks.batch_norm import KINDS, BatchNormPerPass, freeze_statistics, separate_statistics, use_statistics_of
from networks.folding import fold_batch_norm

pytestmark = pytest.mark.usefixtures("thin_trunk")

SIZE = 96


def pictures(seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)) + seed


def small_trunk() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Sequential(nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5))
    )


def test_each_kind_of_pass_has_the_statistics_of_a_network_of_its_own() -> None:
    """Three plain networks that share their weights, each of which sees one kind of picture, as the reference."""
    one = small_trunk()
    alone = {kind: copy.deepcopy(one) for kind in KINDS}
    separate_statistics(one)
    for step in range(3):
        for number, kind in enumerate(KINDS):
            if step == 0:
                alone[kind] = copy.deepcopy(alone["picture"])  # a kind starts from what pictures have by then
            images = pictures(10 * step + number, scale=1 + number)
            use_statistics_of(one, kind)
            torch.testing.assert_close(one(images), alone[kind](images))
    one.eval()
    outputs = []
    for kind in KINDS:
        use_statistics_of(one, kind)
        outputs.append(one(pictures(5)))
        torch.testing.assert_close(outputs[-1], alone[kind].eval()(pictures(5)))
    assert not torch.allclose(outputs[0], outputs[1]) and not torch.allclose(outputs[1], outputs[2])


def test_a_kind_that_was_not_trained_yet_has_the_statistics_of_pictures() -> None:
    one = small_trunk()
    separate_statistics(one)
    one(pictures(3))  # of the kind picture, as in a warm-up
    one.eval()
    outputs = []
    for kind in KINDS:
        use_statistics_of(one, kind)
        outputs.append(one(pictures(5)))
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    for name, statistics in one.named_buffers():  # an average of them begins there, too
        if "running" in name:
            assert torch.equal(statistics, statistics[:1].expand_as(statistics))


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown kind of pass 'raw'.*picture"):
        use_statistics_of(small_trunk(), "raw")


@pytest.mark.parametrize("model", ("sgkrl", "sgkrl_published"))
def test_a_system_tells_its_passes_apart(model: str) -> None:
    torch.manual_seed(0)
    network = build_network(model, num_classes=5, backbone="resnet18", input_size=SIZE, batch_norm="per_pass").train()
    start = copy.deepcopy(dict(network.backbone.named_buffers()))
    output = network(pictures(1))
    sum(logits.sum() for logits in output.logits.values()).backward()  # what it keeps is not changed by a later pass
    norms = [name for name in start if name.endswith("running_mean")]
    assert norms
    for name in norms:
        moved = (dict(network.backbone.named_buffers())[name] != start[name]).any(dim=1)
        assert moved.all(), name
        rows = dict(network.backbone.named_buffers())[name]
        assert not torch.equal(rows[0], rows[1]) and not torch.equal(rows[1], rows[2])


def test_pretrained_statistics_start_every_pass(tmp_path) -> None:
    torch.manual_seed(0)
    plain = Backbone("resnet18").trunk
    nn.init.uniform_(plain.bn1.running_mean)
    torch.save(plain.state_dict(), tmp_path / "weights.pth")
    backbone = Backbone("resnet18", pretrained=str(tmp_path / "weights.pth"), batch_norm="per_pass").eval()
    for row in backbone.trunk.bn1.running_mean:
        assert torch.equal(row, plain.bn1.running_mean)
    expected = plain.eval()(pictures(1))
    for kind in KINDS:
        torch.testing.assert_close(backbone(pictures(1), kind=kind).embedding, expected)


def test_folding_leaves_them_as_they_are() -> None:
    torch.manual_seed(0)
    network = build_network("mmal", num_classes=5, backbone="resnet18", input_size=SIZE, batch_norm="per_pass")
    network.train()(pictures(1))
    network.eval()
    folded = fold_batch_norm(network)
    assert any(isinstance(module, BatchNormPerPass) for module in folded.modules())
    with torch.no_grad():
        torch.testing.assert_close(folded(pictures(2)).logits, network(pictures(2)).logits)


def test_frozen_statistics_never_change_and_scales_still_learn() -> None:
    torch.manual_seed(0)
    network = build_network("mmal", num_classes=5, backbone="resnet18", input_size=SIZE, batch_norm="frozen", dropout=0)
    for norm in (module for module in network.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.normal_(norm.running_mean, std=0.1)
        nn.init.constant_(norm.weight, 0.5)
    before = copy.deepcopy(dict(network.named_buffers()))
    network(pictures(1))  # as it was built
    output = network.train()(pictures(1))
    assert network.training and network.backbone.training
    output.logits["object"].sum().backward()
    for name, buffer in network.named_buffers():
        assert torch.equal(buffer, before[name]), name
    assert network.backbone.trunk.bn1.weight.grad.abs().sum() > 0
    with torch.no_grad():
        torch.testing.assert_close(output.logits["raw"], network.eval()(pictures(1)).logits["raw"])


@pytest.mark.usefixtures("thin_trunk")
@pytest.mark.parametrize("dense", (False, True))
@pytest.mark.parametrize(("name", "first"), (("resnet18", False), ("wide_resnet50_2", True)))
def test_frozen_batch_norms_inside_the_convolutions_compute_and_learn_the_same(name, first, dense) -> None:
    torch.manual_seed(0)
    usual, frozen = (
        Backbone(name, stride_on_first_conv=first, batch_norm=batch_norm).double()
        for batch_norm in ("shared", "frozen")
    )
    for parameter_name, value in usual.state_dict().items():
        if ("bn" in parameter_name or "downsample.1" in parameter_name) and value.is_floating_point():
            value.uniform_(0.5, 1.0)  # means, variances, scales and shifts
    frozen.load_state_dict(usual.state_dict())
    usual.eval()
    maps = [backbone(pictures(1)[:1].double(), dense=dense, split=True) for backbone in (usual, frozen.train())]
    for expected, computed in zip(*maps, strict=True):
        torch.testing.assert_close(computed, expected)
    for features in maps:
        (features.stage2.square().mean() + features.final.square().mean()).backward()
    expected = {parameter_name: parameter.grad for parameter_name, parameter in usual.named_parameters()}
    for parameter_name, parameter in frozen.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[parameter_name], msg=parameter_name)


def test_frozen_batch_norms_keep_half_the_maps_for_backward() -> None:
    torch.manual_seed(0)
    usual, frozen = Backbone("resnet50").eval(), Backbone("resnet50", batch_norm="frozen").train()

    def kept(backbone: Backbone) -> int:
        sizes = {parameter.data_ptr(): 0 for parameter in backbone.parameters()}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.dim() == 4 and tensor.shape[0] == len(images):  # a map, not the weights of a convolution
                sizes[tensor.data_ptr()] = tensor.nbytes
            return tensor

        images = pictures(1)[:2]
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            features = backbone(images)  # lives until all is counted, so that no address comes twice
        assert features.final.requires_grad
        return sum(sizes.values())

    assert kept(frozen) < 0.6 * kept(usual)


def test_freezing_leaves_dropout_alone() -> None:
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5)).train()
    freeze_statistics(network)
    assert not network[0].training and network[1].training


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown batch_norm 'none'.*shared, per_pass, frozen"):
        Backbone("resnet18", batch_norm="none")
