"""Convolutions that are one operation with what follows them, against the single steps."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import slow_but_for
from thin_trunk import get_thin_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from networks.backbone import Backbone
from networks.folding import cast_for_autocast, fold_batch_norm
from networks.trunks import convolution
from networks.trunks.convolution import convolve, fused_dtype, works_fused

DTYPES = (torch.float32, torch.bfloat16)
needs_fused = pytest.mark.skipif(not all(map(works_fused, DTYPES)), reason="oneDNN's fused operations do not work here")


@pytest.fixture
def single_steps(monkeypatch: pytest.MonkeyPatch):
    """A function that calls another one without fused operations."""

    def call(function, *arguments, **options):
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(convolution, "works_fused", lambda dtype: False)
            return function(*arguments, **options)

    return call


GEOMETRIES = [
    {"kernel_size": 1},
    {"kernel_size": 1, "stride": 2, "bias": False},
    {"kernel_size": 3, "padding": 1, "stride": 2},
    {"kernel_size": 3, "padding": 1, "groups": 4},
    {"kernel_size": 7, "padding": 3, "stride": 2},
]


@needs_fused
@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dilation", (None, 2))
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_one_operation_equals_the_steps(geometry, dilation, dtype, layout, single_steps) -> None:
    """To the last bit but for the sum in bfloat16, which the fused operation rounds once instead of twice."""
    torch.manual_seed(0)
    module = nn.Conv2d(8, 12, **geometry).requires_grad_(False).to(dtype).to(memory_format=layout)
    x = torch.randn(3, 8, 11, 14).to(dtype).to(memory_format=layout)
    shared = {"x": x, "dilation": dilation, "frozen": False}
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0, "atol": 0}
    for relu in (False, True):
        found = convolve(module, nn.Identity(), **shared, relu=relu)
        expected = single_steps(convolve, module, nn.Identity(), **shared, relu=relu)
        torch.testing.assert_close(found, expected, **tolerance)
        assert found.is_contiguous(memory_format=layout)
    summand = torch.randn_like(found)
    kept = summand.clone()
    for relu in (False, True):
        more = {**shared, "relu": relu, "summand": summand}
        found, expected = convolve(module, nn.Identity(), **more), single_steps(convolve, module, nn.Identity(), **more)
        rounding = 2**-7 if dtype == torch.bfloat16 else 1e-5  # of the convolution's result, and of the sum
        torch.testing.assert_close(found, expected, rtol=rounding, atol=rounding * expected.abs().max().item())
        assert torch.equal(summand, kept)
        overwritten = convolve(module, nn.Identity(), **{**more, "summand": summand.clone()}, overwrite_summand=True)
        assert torch.equal(overwritten, found)


@needs_fused
@pytest.mark.parametrize("dtype", DTYPES)
def test_frozen_batch_norms_are_part_of_the_operation(dtype, single_steps) -> None:
    torch.manual_seed(0)
    module = nn.Conv2d(8, 12, 3, padding=1, bias=False).to(memory_format=torch.channels_last)
    norm = nn.BatchNorm2d(12).eval()
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        nn.init.uniform_(tensor, 0.5, 1.5)
    x, summand = (torch.randn(2, channels, 9, 9).to(memory_format=torch.channels_last) for channels in (8, 12))
    shared = {"frozen": True, "relu": True, "summand": summand.to(dtype)}
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        found, expected = convolve(module, norm, x, **shared), single_steps(convolve, module, norm, x, **shared)
        unscaled = (norm(module(x)) + summand).relu()
    for right in (expected, unscaled.to(dtype)):
        torch.testing.assert_close(found, right, rtol=0, atol=0.1 if dtype == torch.bfloat16 else 1e-5)


@needs_fused
@pytest.mark.parametrize("summand", (False, True))
@pytest.mark.parametrize("overwrite", (False, True))
def test_operations_are_counted_as_those_of_convolutions(summand: bool, overwrite: bool) -> None:
    module, x = nn.Conv2d(8, 12, 3, padding=1), torch.randn(2, 8, 9, 7).to(memory_format=torch.channels_last)
    added = torch.randn(2, 12, 9, 7).to(memory_format=torch.channels_last) if summand else None
    with torch.no_grad(), FlopCounterMode(display=False) as plain:
        module(x)
    with torch.no_grad(), FlopCounterMode(display=False) as fused:
        convolve(module, nn.Identity(), x, frozen=False, summand=added, overwrite_summand=overwrite)
    assert "mkldnn" in str(fused.get_flop_counts())
    assert fused.get_total_flops() == plain.get_total_flops() == 2 * (2 * 12 * 9 * 7) * (8 * 3 * 3)


@needs_fused
@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_where_there_is_one_operation() -> None:
    x, weight = torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    assert fused_dtype(x, weight) == torch.float32
    assert fused_dtype(x, weight.bfloat16()) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert fused_dtype(x, weight.bfloat16()) == fused_dtype(x, weight) == torch.bfloat16
    assert fused_dtype(x.double(), weight.double()) is None
    assert fused_dtype(x.to("meta"), weight.to("meta")) is None
    with torch.backends.mkldnn.flags(enabled=False):
        assert fused_dtype(x, weight) is None
    for needing in ((x.clone().requires_grad_(), weight), (x, weight.clone().requires_grad_())):
        assert fused_dtype(*needing) is None
        with torch.no_grad():
            assert fused_dtype(*needing) == torch.float32


@pytest.mark.parametrize("error", (AttributeError, RuntimeError, TypeError, None))
def test_operations_that_are_missing_or_wrong_are_not_used(error, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(*arguments, **options):
        if error is not None:
            raise error("of another version")
        return torch.zeros(1, 1, 1, 1)

    monkeypatch.setattr(convolution, "_fused", other)
    assert not works_fused.__wrapped__(torch.float32)


@pytest.fixture(params=("resnet18", "resnet50", "resnext50_32x4d"))
def folded_trunk(request, monkeypatch: pytest.MonkeyPatch) -> Backbone:
    """A folded trunk with statistics of its own."""
    monkeypatch.setattr("torchvision.models.get_model", get_thin_model)
    torch.manual_seed(0)
    backbone = Backbone(request.param)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.2, 0.6)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)
    return fold_batch_norm(backbone.to(memory_format=torch.channels_last))


@needs_fused
def test_sums_of_another_dtype_are_steps_of_their_own() -> None:
    module = nn.Conv2d(2, 3, 1).requires_grad_(False)
    x, summand = (torch.randn(1, channels, 4, 4).to(memory_format=torch.channels_last) for channels in (2, 3))
    with torch.autocast("cpu", torch.bfloat16):
        found = convolve(module, nn.Identity(), x, frozen=False, summand=summand, overwrite_summand=True)
        assert torch.equal(found, module(x) + summand)
    assert found.dtype == torch.float32


WAYS = ({}, {"split": True}, {"dense": True}, {"start": "stage3"})  # to look through a trunk


@needs_fused
@pytest.mark.parametrize("how", slow_but_for(WAYS[:2], WAYS), ids=str)
@pytest.mark.parametrize("precision", DTYPES)
def test_all_maps_of_a_trunk_are_those_of_the_steps(folded_trunk, precision, how, single_steps) -> None:
    """No map that is returned, nor what comes in, is overwritten by a later one."""
    if precision == torch.bfloat16:
        cast_for_autocast(folded_trunk, precision)
    images = torch.randn(2, 3, 64, 96)
    if "start" in how:
        images = torch.randn(2, folded_trunk.channels["stage3"], 4, 6).relu()
    images = images.to(memory_format=torch.channels_last)
    before = images.clone()
    with torch.no_grad(), torch.autocast("cpu", precision, enabled=precision == torch.bfloat16):
        found, expected = folded_trunk(images, **how), single_steps(folded_trunk, images, **how)
    assert torch.equal(images, before)
    assert not torch.equal(found.penultimate, found.final)
    for map_, wanted in zip(_tensors(found), _tensors(expected), strict=True):
        tolerance = 0.05 * wanted.float().abs().max().item() if precision == torch.bfloat16 else 1e-4
        torch.testing.assert_close(map_, wanted, rtol=0, atol=tolerance)


def _tensors(features) -> list[torch.Tensor]:
    flat = []
    for field in features:
        flat += list(field) if isinstance(field, tuple) else [field]
    return [tensor for tensor in flat if tensor is not None]


class FinalMap(nn.Module):
    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.backbone(images).final


@pytest.mark.filterwarnings("ignore:.*trace:FutureWarning")
def test_exports_and_traces_hold_the_single_steps(folded_trunk) -> None:
    """Which other programs know, on other devices, too."""
    folded_trunk = FinalMap(folded_trunk)
    images = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)
    with torch.no_grad():
        program = torch.export.export(folded_trunk, (images,))
        trace = torch.jit.trace(folded_trunk, (images,), check_trace=False)
    for graph in (program.graph, trace.inlined_graph):
        assert "mkldnn" not in str(graph)
        assert "relu" in str(graph)


def test_gradients_reach_a_picture_through_a_folded_trunk(folded_trunk) -> None:
    """As what draws evidence by gradients wants it."""
    picture = torch.randn(1, 3, 64, 64, requires_grad=True)
    other = copy.deepcopy(folded_trunk)
    folded_trunk(picture).final.sum().backward()
    assert picture.grad.abs().sum() > 0
    with torch.no_grad():
        torch.testing.assert_close(other(picture).final, folded_trunk(picture).final)
