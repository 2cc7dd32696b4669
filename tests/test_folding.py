"""Batch norm folded into convolutions: the same function, nothing left of it, the original untouched."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import slow_but_for
from torch import nn

from networks import MODELS, build_network
from networks.classifier import Classifier
from networks.folding import cast_for_autocast, fold_batch_norm

pytestmark = pytest.mark.usefixtures("thin_trunk")

SIZE = 96


def trained_looking(model: str, backbone: str = "resnet18", **settings: object) -> nn.Module:
    """A network whose batch norms have statistics and scales of their own, in evaluation mode."""
    torch.manual_seed(0)
    network = build_network(model, num_classes=7, backbone=backbone, input_size=SIZE, **settings)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.2, 0.6)  # below 1: the residual sums stay of one size
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return network.eval()


@pytest.mark.parametrize(
    ("model", "backbone", "settings"),
    [(model, "resnet18", {}) for model in MODELS]
    + [("resnet", "resnet50", {"stride_on_first_conv": True}), ("sgkrl", "resnet18", {"window_source": "stage3"})],
)
def test_folded_networks_compute_the_same(model: str, backbone: str, settings: dict) -> None:
    """Logits within 1e-4 of their size in float32; boxes and windows the same."""
    network = trained_looking(model, backbone, **settings)
    folded = fold_batch_norm(network)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    images = torch.randn(3, 3, SIZE, SIZE)
    with torch.no_grad():
        expected, found = network(images, branches=network.evaluated), folded(images, branches=network.evaluated)
    for name, logits in expected.logits.items():
        torch.testing.assert_close(found.logits[name], logits, rtol=1e-4, atol=1e-4 * logits.abs().max().item())
    for field in ("object_boxes", "window_boxes", "object_masks", "part_boxes"):
        assert (
            torch.equal(getattr(found, field), getattr(expected, field)) if getattr(expected, field) is not None else 1
        )


def test_the_original_stays_as_it_was() -> None:
    network = trained_looking("resnet").train()
    before = copy.deepcopy(network.state_dict())
    folded = fold_batch_norm(network)
    assert network.training and not folded.training
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert not any(parameter.requires_grad for parameter in folded.parameters())
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_weights_keep_memory_layout_and_precision() -> None:
    network = trained_looking("resnet").to(torch.float64).to(memory_format=torch.channels_last)
    for module in fold_batch_norm(network).backbone.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.dtype == torch.float64
            assert module.weight.is_contiguous(memory_format=torch.channels_last)


def test_batch_norms_of_something_else_stay() -> None:
    """Neither before a convolution, nor after an activation, nor of another width is it the convolution's own."""
    network = nn.Sequential(
        *(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)),
        nn.ModuleList([nn.Conv2d(4, 5, 1), nn.BatchNorm2d(4)]),
    ).eval()
    assert sum(isinstance(module, nn.BatchNorm2d) for module in fold_batch_norm(network).modules()) == 3


class NormAfterReLU(nn.Module):
    """A batch norm that does not get what the convolution registered before it gives."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        nn.init.uniform_(self.norm.running_mean)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x).relu())


def test_modules_that_may_apply_what_they_hold_in_another_order_stay_as_they_are() -> None:
    module, images = NormAfterReLU().eval(), torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(fold_batch_norm(module)(images), module(images))


def test_heads_may_compute_in_float32_on_purpose() -> None:
    plain, precise = (nn.Sequential(nn.Linear(2, 2)) for _ in range(2))
    precise.computes_in_float32 = True
    cast = cast_for_autocast(nn.ModuleList([plain, precise]), torch.bfloat16)
    assert [head[0].weight.dtype for head in cast] == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("model", slow_but_for(("sgkrl", "cal", "pmg"), MODELS))
def test_weights_cast_in_advance_change_no_bit(model: str) -> None:
    folded = fold_batch_norm(trained_looking(model))
    cast = cast_for_autocast(copy.deepcopy(folded), torch.bfloat16)
    assert cast.backbone.trunk.conv1.weight.dtype == torch.bfloat16
    assert all(m.weight.dtype == torch.float32 for m in cast.modules() if isinstance(m, Classifier))
    images = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected, found = folded(images, branches=folded.evaluated), cast(images, branches=folded.evaluated)
    for name, logits in expected.logits.items():
        assert torch.equal(found.logits[name], logits), name
