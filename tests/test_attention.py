"""Semantic fusion and weighting against the formulas, cell by cell and head by head."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.attention import ChannelGate, CrossAttention, SemanticFusion, SemanticWeighting, SpatialGate
from networks.outputs import Features

CHANNELS = {"stage2": 32, "stage3": 64, "final": 96}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_features(grid_size: int, batch: int = 2) -> Features:
    """Maps like a trunk's: not negative."""
    final = normal(batch, CHANNELS["final"], grid_size, grid_size, seed=1).relu()
    return Features(
        stage2=normal(batch, CHANNELS["stage2"], 4 * grid_size, 4 * grid_size, seed=2).relu(),
        stage3=normal(batch, CHANNELS["stage3"], 2 * grid_size, 2 * grid_size, seed=3).relu(),
        penultimate=normal(*final.shape, seed=4).relu(),
        final=final,
        embedding=final.mean(dim=(2, 3)),
    )


# ---- cross-attention ----------------------------------------------------------------------------------------------


def standardise(cell: Tensor, norm: nn.Module) -> Tensor:
    if isinstance(norm, nn.Identity):
        return cell
    deviation = ((cell - cell.mean()) ** 2).mean()
    return (cell - cell.mean()) / torch.sqrt(deviation + norm.eps) * norm.weight + norm.bias


def pooled_cell(low: Tensor, row: int, column: int, rows: int, columns: int) -> Tensor:
    """One cell of a `[C, H, W]` map pooled to rows x columns: the mean of the cells it overlaps, in whole cells."""
    height, width = low.shape[1:]
    top, bottom = math.floor(row * height / rows), math.ceil((row + 1) * height / rows)
    left, right = math.floor(column * width / columns), math.ceil((column + 1) * width / columns)
    return low[:, top:bottom, left:right].mean(dim=(1, 2))


def attention_by_loops(module: CrossAttention, high: Tensor, low: Tensor) -> Tensor:
    """One `[C, g, g]` map and one `[c, h, w]` map -> `[out, g, g]`."""
    _, rows, columns = high.shape
    cells = [(row, column) for row in range(rows) for column in range(columns)]
    queries, keys, values = [], [], []
    for row, column in cells:
        from_high = standardise(high[:, row, column], module.high_norm)
        from_low = standardise(pooled_cell(low, row, column, rows, columns), module.low_norm)
        queries.append(module.query.weight @ from_high + module.query.bias)
        keys.append(module.key.weight @ from_low + (0 if module.key.bias is None else module.key.bias))
        values.append(module.value.weight @ from_low + module.value.bias)
    width = len(queries[0]) // module.heads
    result = torch.empty(module.out.out_features, rows, columns, dtype=high.dtype)
    for index, (row, column) in enumerate(cells):
        mixed = []
        for head in range(module.heads):
            own = slice(head * width, (head + 1) * width)
            scores = [float(queries[index][own] @ key[own]) / math.sqrt(width) for key in keys]
            weights = [math.exp(score - max(scores)) for score in scores]
            mixed.append(sum(w / sum(weights) * value[own] for w, value in zip(weights, values, strict=True)))
        result[:, row, column] = module.out.weight @ torch.cat(mixed) + module.out.bias
    return result


@pytest.mark.parametrize("normalise", (False, True))
@pytest.mark.parametrize("low_size", ((3, 4), (6, 8), (12, 16), (7, 10), (5, 4), (2, 3)), ids=str)
@torch.no_grad()
def test_cross_attention_equals_loops(normalise: bool, low_size: tuple[int, int]) -> None:
    torch.manual_seed(1)
    module = CrossAttention(24, 10, 14, heads=3, head_channels=8, normalise=normalise).double().eval()
    for norm in (module.high_norm, module.low_norm):
        for parameter in norm.parameters():
            nn.init.normal_(parameter, mean=1.0)
    high, low = 3 * normal(2, 24, 3, 4).double(), 5 * normal(2, 10, *low_size, seed=1).double()
    result = module(high, low)
    assert result.shape == (2, 14, 3, 4)
    expected = torch.stack([attention_by_loops(module, *pair) for pair in zip(high, low, strict=True)])
    torch.testing.assert_close(result, expected)


def test_normalised_attention_ignores_the_scale_of_the_maps() -> None:
    torch.manual_seed(1)
    module = CrossAttention(24, 10, 14, heads=3, head_channels=8, normalise=True).eval()
    high, low = normal(1, 24, 3, 3), normal(1, 10, 6, 6, seed=1)
    torch.testing.assert_close(module(high, low), module(100 * high, 100 * low), rtol=1e-2, atol=1e-3)


def test_attention_drops_out_in_training_only() -> None:
    torch.manual_seed(1)
    module = CrossAttention(24, 10, 14, heads=3, head_channels=8, dropout=0.5)
    high, low = normal(1, 24, 3, 3), normal(1, 10, 6, 6, seed=1)
    assert not torch.equal(module(high, low), module(high, low))
    module.eval()
    assert torch.equal(module(high, low), module(high, low))


# ---- fusion -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_published_fusion_puts_the_maps_side_by_side() -> None:
    torch.manual_seed(1)
    fusion, features = SemanticFusion(CHANNELS, residual=False).eval(), make_features(4)
    fused = fusion(features)
    assert fused.shape == (2, fusion.out_channels, 4, 4) == (2, 64 + 32 + 96, 4, 4)
    from_stage3, from_stage2, final = fused.split((64, 32, 96), dim=1)
    assert torch.equal(from_stage3, fusion.stage3(features.final, features.stage3))
    assert torch.equal(from_stage2, fusion.stage2(features.final, features.stage2))
    assert torch.equal(final, features.final)
    assert (fusion.stage3.heads, fusion.stage3.query.out_features) == (8, 8 * 64)
    assert (fusion.stage2.heads, fusion.stage2.query.out_features) == (8, 8 * 32)
    assert fusion.stage3.dropout == fusion.stage2.dropout == 0.2
    assert not any(isinstance(module, nn.LayerNorm) for module in fusion.modules())


@torch.no_grad()
def test_residual_fusion_starts_as_the_final_map() -> None:
    torch.manual_seed(1)
    fusion, features = SemanticFusion(CHANNELS, residual=True).eval(), make_features(4)
    fused = fusion(features)
    assert fused.shape == features.final.shape
    assert fusion.out_channels == CHANNELS["final"]
    assert (fused - features.final).norm() / features.final.norm() < 0.1
    assert not torch.equal(fused, features.final)


@torch.no_grad()
def test_residual_fusion_adds_both_maps_and_is_never_negative() -> None:
    torch.manual_seed(1)
    fusion, features = SemanticFusion(CHANNELS, residual=True).eval(), make_features(3)
    for attention in (fusion.stage3, fusion.stage2):
        nn.init.normal_(attention.out.weight)
        nn.init.normal_(attention.out.bias)
    fused = fusion(features)
    added = fusion.stage3(features.final, features.stage3) + fusion.stage2(features.final, features.stage2)
    torch.testing.assert_close(fused, (features.final + added).clamp(min=0))
    assert fused.min() == 0
    assert (fused == 0).float().mean() > 0.2


# ---- gates --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("identity_start", (False, True))
@torch.no_grad()
def test_channel_gate_equals_formula(identity_start: bool) -> None:
    torch.manual_seed(1)
    gate, maps = ChannelGate(32, identity_start=identity_start), normal(3, 32, 4, 5)
    nn.init.normal_(gate.mlp[2].weight)
    squeeze, expand = gate.mlp[0].weight[:, :, 0, 0], gate.mlp[2].weight[:, :, 0, 0]
    assert squeeze.shape == (2, 32)
    assert gate.mlp[0].bias is None
    assert gate.mlp[2].bias is None
    scale = 2 if identity_start else 1
    for one, result in zip(maps, gate(maps), strict=True):
        mean, maximum = one.flatten(1).mean(dim=1), one.flatten(1).max(dim=1).values
        argument = expand @ (squeeze @ mean).clamp(min=0) + expand @ (squeeze @ maximum).clamp(min=0)
        torch.testing.assert_close(result, one * (scale / (1 + torch.exp(-argument)))[:, None, None])


@pytest.mark.parametrize(("identity_start", "relative"), ((False, False), (True, False), (True, True)))
@torch.no_grad()
def test_spatial_gate_equals_formula(identity_start: bool, relative: bool) -> None:
    torch.manual_seed(1)
    gate, maps = SpatialGate(identity_start=identity_start, relative=relative), normal(3, 16, 4, 5)
    nn.init.normal_(gate.conv.weight)
    assert gate.conv.weight.shape == (1, 2, 3, 3)
    assert gate.conv.bias is None
    scale = 2 if identity_start else 1
    for one, result in zip(maps, gate(maps), strict=True):
        summary = torch.stack([one.mean(dim=0), one.max(dim=0).values])
        padded = F.pad(summary, (1, 1, 1, 1))
        if relative:  # standardised, the border repeated
            centred = summary - summary.mean(dim=(1, 2), keepdim=True)
            padded = centred / (centred.square().mean(dim=(1, 2), keepdim=True) + 1e-5).sqrt()
            padded = padded[:, [0, 0, 1, 2, 3, 3]][:, :, [0, 0, 1, 2, 3, 4, 4]]
        weights = torch.empty(4, 5)
        for row in range(4):
            for column in range(5):
                argument = (padded[:, row : row + 3, column : column + 3] * gate.conv.weight[0]).sum()
                weights[row, column] = 1 / (1 + torch.exp(-argument))
        weights = weights / (sum(weights.flatten().tolist()) / 20) if relative else scale * weights
        torch.testing.assert_close(result, one * weights)


def test_relative_weights_say_where_and_not_how_much() -> None:
    torch.manual_seed(1)
    maps = (normal(3, 16, 4, 5).relu() + 1).requires_grad_()
    for size in (-100.0, -10.0, -1.0, 0.0, 1.0, 100.0):
        weights = {}
        for relative in (False, True):
            gate = SpatialGate(identity_start=True, relative=relative)
            nn.init.constant_(gate.conv.weight, size)
            weighted = gate(maps)
            weights[relative] = (weighted / maps).mean(dim=1)
        torch.testing.assert_close(weights[True].mean(dim=(1, 2)), torch.ones(3))
        if abs(size) <= 1:  # else the rounding of the logits shows
            torch.testing.assert_close(gate(20 * maps), 20 * weighted, rtol=1e-2, atol=1e-2)
        for gradient in torch.autograd.grad(weighted.square().sum(), (maps, gate.conv.weight)):
            assert gradient.isfinite().all()
    assert (weights[False] == 2).all()  # the other form has learnt to double the map


@torch.no_grad()
def test_relative_weights_do_not_see_where_the_map_ends() -> None:
    """Rows that are alike get weights that are alike, at the border and inside, whatever the convolution has learnt."""
    by_column = normal(2, 16, 1, 5).relu().expand(2, 16, 4, 5)
    for seed in range(5):
        published, relative = SpatialGate(), SpatialGate(relative=True)
        for gate in (published, relative):
            gate.conv.weight.copy_(normal(1, 2, 3, 3, seed=seed))
        assert not torch.allclose(published(by_column)[:, :, 0], published(by_column)[:, :, 1])
        weighted = relative(by_column)
        torch.testing.assert_close(weighted, weighted[:, :, :1].expand_as(weighted))
        assert not torch.allclose(weighted, by_column, atol=1e-2)
        even = by_column[..., :1].expand(2, 16, 4, 5)
        torch.testing.assert_close(relative(even), even)


@pytest.mark.parametrize("size", ((1, 1), (1, 6), (2, 2)))
def test_relative_weights_on_the_smallest_grids(size: tuple[int, int]) -> None:
    torch.manual_seed(1)
    gate, maps = SpatialGate(relative=True), normal(2, 8, *size).relu().requires_grad_()
    weighted = gate(maps)
    assert weighted.isfinite().all()
    if size == (1, 1):
        assert torch.equal(weighted, maps)
    for gradient in torch.autograd.grad(weighted.square().sum(), (maps, gate.conv.weight)):
        assert gradient.isfinite().all()


@torch.no_grad()
def test_weighting_is_by_channel_and_then_by_cell() -> None:
    torch.manual_seed(1)
    weighting, maps = SemanticWeighting(32), normal(2, 32, 3, 3).relu()
    assert torch.equal(weighting(maps), weighting.spatial(weighting.channel(maps)))
    assert not torch.allclose(weighting(maps), weighting.channel(weighting.spatial(maps)), atol=1e-4)


@torch.no_grad()
def test_gates_start_as_the_identity_where_asked() -> None:
    torch.manual_seed(1)
    maps = 3 * normal(2, 512, 7, 7).relu()
    for relative in (False, True):
        gates = SemanticWeighting(512, identity_start=True, relative=relative)(maps) / maps.clamp(min=1e-6)
        assert (gates[maps > 0] - 1).abs().max() < 0.1
    published = SemanticWeighting(512)(maps) / maps.clamp(min=1e-6)
    assert published[maps > 0].max() < 1


# ---- gradients ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ("fusion", "weighting", "relative weighting"))
def test_gradient_reaches_every_parameter_from_the_start(kind: str) -> None:
    torch.manual_seed(1)
    features = make_features(4)
    if kind == "fusion":
        module = SemanticFusion(CHANNELS, residual=True)
        result = module(features)
    else:
        relative = kind == "relative weighting"
        module = SemanticWeighting(CHANNELS["final"], identity_start=True, relative=relative)
        result = module(features.final)
    (result * normal(*result.shape, seed=9)).sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 1e-6, name


@pytest.mark.parametrize("residual", (False, True))
@torch.no_grad()
def test_batch_equals_one_by_one(residual: bool) -> None:
    torch.manual_seed(1)
    fusion, features = SemanticFusion(CHANNELS, residual=residual).eval(), make_features(3, batch=4)
    singly = torch.cat([fusion(Features(*(map_[i : i + 1] for map_ in features[:5]))) for i in range(4)])
    torch.testing.assert_close(fusion(features), singly, rtol=1e-4, atol=1e-5)


def test_few_channels_are_weighted_too() -> None:
    assert ChannelGate(8)(torch.rand(2, 8, 3, 3)).shape == (2, 8, 3, 3)
