"""Suppression: each channel of each image capped at its own share of its own maximum, against loops in NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import reference
import torch
from torch import Tensor
from tracing import traced

from networks.suppression import RegionSuppression, suppress

SHAPES = ((1, 1, 1, 1), (3, 4, 7, 7), (2, 16, 3, 9), (5, 8, 1, 6), (2, 5, 14, 14))


def rectified(shape: tuple[int, ...], *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Half of the cells are zero, as after a ReLU; channels differ in their strength."""
    generator = torch.Generator().manual_seed(seed)
    strength = torch.rand(*shape[:2], 1, 1, generator=generator, dtype=torch.float64) * 5 + 0.1
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * strength).relu().to(dtype)


def share_by_hand(channel_means: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """`[C]` means of one image, `[C, C]` weights -> `[C]`: the sigmoid of a weighted sum of the means, no offset."""
    shares = np.zeros(len(channel_means))
    for channel in range(len(channel_means)):
        total = sum(weights[channel, other] * channel_means[other] for other in range(len(channel_means)))
        shares[channel] = 1 / (1 + math.exp(-total))
    return shares


def suppress_by_hand(features: np.ndarray, control: np.ndarray | float) -> np.ndarray:
    """`[B, C, H, W]` with `[C, C]` weights or one share: image by image, channel by channel, cell by cell."""
    result = features.copy()
    for image in range(len(features)):
        means = np.array([channel.sum() / channel.size for channel in features[image]])
        fixed = isinstance(control, float)
        shares = np.full(len(means), control) if fixed else share_by_hand(means, control)
        for channel in range(len(means)):
            limit = features[image, channel].max() * shares[channel]
            for cell in np.ndindex(features.shape[2:]):
                if features[image, channel][cell] > limit:
                    result[image, channel][cell] = limit
    return result


def learnable(channels: int, *, seed: int = 0, scale: float = 1.0) -> RegionSuppression:
    """In float64, with weights large enough for shares far from one half."""
    torch.manual_seed(seed)
    suppression = RegionSuppression(channels).double()
    with torch.no_grad():
        for parameter in suppression.parameters():
            parameter.normal_(std=scale)
    return suppression


def weights_of(suppression: RegionSuppression) -> Tensor:
    (weights,) = suppression.parameters()
    return weights.detach()


# ---- the rule -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("share", (0.05, 0.3, 0.7, 1.0))
def test_fixed_share_equals_loops(shape: tuple[int, ...], share: float) -> None:
    features = rectified(shape)
    result = RegionSuppression(shape[1], share)(features)
    expected = torch.from_numpy(suppress_by_hand(features.numpy(), share))
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", (0.0, 0.5, 3.0))
def test_learnable_share_equals_loops(shape: tuple[int, ...], scale: float) -> None:
    features, suppression = rectified(shape, seed=1), learnable(shape[1], scale=scale)
    expected = suppress_by_hand(features.numpy(), weights_of(suppression).numpy())
    torch.testing.assert_close(suppression(features).detach(), torch.from_numpy(expected), rtol=1e-10, atol=1e-13)


def test_by_hand() -> None:
    """Two images, two channels: every channel of every image has a limit of its own."""
    features = torch.tensor([[[[10.0, 4, 7.5, 0]], [[1, 2, 3, 4]]], [[[0, 0, 0, 0]], [[100, 50, 49, 51]]]])
    half = [[[[5, 4, 5, 0]], [[1, 2, 2, 2]]], [[[0, 0, 0, 0]], [[50, 50, 49, 50]]]]
    assert RegionSuppression(2, 0.5)(features).tolist() == half
    shares = torch.tensor([[0.5, 1.0], [0.25, 0.1]])[:, :, None, None]
    each = [[[[5, 4, 5, 0]], [[1, 2, 3, 4]]], [[[0, 0, 0, 0]], [[10, 10, 10, 10]]]]
    assert suppress(features, shares).tolist() == each


def test_seven_tenths_cap_at_seventy_per_cent() -> None:
    features = rectified((4, 6, 5, 5), seed=2)
    strongest = RegionSuppression(6, 0.7)(features).flatten(2).max(dim=2).values
    torch.testing.assert_close(strongest, 0.7 * features.flatten(2).max(dim=2).values, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16), ids=str)
@pytest.mark.parametrize("control", ("learnable", 0.3, 0.7))
def test_smaller_values_stay_bit_by_bit(control: str | float, dtype: torch.dtype) -> None:
    features = rectified((4, 8, 6, 6), seed=3, dtype=dtype)
    torch.manual_seed(0)
    result = RegionSuppression(8, control).to(dtype)(features).detach()
    limits = result.flatten(2).max(dim=2).values[:, :, None, None].expand_as(result)
    changed = result != features
    assert result.dtype == dtype
    assert 0.03 < changed.double().mean() < 0.5
    assert (result <= features).all()
    assert torch.equal(result[changed], limits[changed])  # all that changed has one value, the largest left
    assert (features[changed] > limits[changed]).all()


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("share", (1, 1.0))
def test_share_of_one_is_the_identity(share: float, dtype: torch.dtype) -> None:
    features = rectified((3, 8, 6, 6), seed=4, dtype=dtype)
    assert torch.equal(RegionSuppression(8, share)(features), features)


def test_share_of_one_hands_the_gradient_through() -> None:
    features = rectified((2, 3, 4, 4), seed=5).requires_grad_()
    RegionSuppression(3, 1.0)(features).mean(dim=(2, 3)).sum().backward()
    torch.testing.assert_close(features.grad, torch.full_like(features, 1 / 16), rtol=0, atol=1e-12)


@pytest.mark.parametrize("control", ("learnable", 0.3, 1.0))
def test_channels_of_zeros(control: str | float) -> None:
    torch.manual_seed(0)
    suppression = RegionSuppression(4, control).double()
    features = rectified((3, 4, 5, 5), seed=6)
    features[0] = 0
    features[1, 2] = 0
    features.requires_grad_()
    result = suppression(features)
    assert not result[0].any()
    assert not result[1, 2].any()
    assert result[1, [0, 1, 3]].any()
    result.square().sum().backward()
    assert features.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in suppression.parameters())


@pytest.mark.parametrize("control", ("learnable", 0.4))
def test_every_cell_equal_or_only_one(control: str | float) -> None:
    """A flat channel is lowered as a whole, and so is a map of one cell: there the maximum is everything."""
    suppression = learnable(3) if control == "learnable" else RegionSuppression(3, control)
    for features in (torch.full((2, 3, 4, 4), 6.0).double(), rectified((2, 3, 1, 1), seed=7)):
        result = suppression(features).detach()
        means = features.mean(dim=(2, 3)).numpy()
        weights = weights_of(suppression).numpy() if control == "learnable" else None
        shares = np.stack(
            [share_by_hand(one, weights) if weights is not None else np.full(3, control) for one in means]
        )
        torch.testing.assert_close(result, features * torch.from_numpy(shares)[:, :, None, None])


# ---- the controller -----------------------------------------------------------------------------------------------


def test_controller_is_one_square_matrix_without_offset() -> None:
    assert [tuple(parameter.shape) for parameter in RegionSuppression(7).parameters()] == [(7, 7)]
    assert [tuple(parameter.shape) for parameter in RegionSuppression(7, "learnable").parameters()] == [(7, 7)]
    assert not list(RegionSuppression(7, 0.5).parameters())
    assert not RegionSuppression(7, 0.5).state_dict()


def test_controller_sees_the_means_of_all_channels_of_its_image() -> None:
    """Weights that look at one channel only: its mean alone sets the share of the others, and its cells' order not."""
    suppression = learnable(3)
    with torch.no_grad():
        for parameter in suppression.parameters():
            parameter.zero_()[0, 2] = 1  # the share of channel 0 follows the mean of channel 2
    features = rectified((1, 3, 4, 4), seed=8)
    result = suppression(features)
    limits = result.flatten(2).max(dim=2).values[0] / features.flatten(2).max(dim=2).values[0]
    mean = features[0, 2].mean().item()
    torch.testing.assert_close(
        limits.detach(), torch.tensor([1 / (1 + math.exp(-mean)), 0.5, 0.5]).double(), rtol=1e-6, atol=0
    )
    reordered = features.clone()
    reordered[0, 2] = features[0, 2].flip(0).T
    torch.testing.assert_close(suppression(reordered)[0, :2], result[0, :2], rtol=1e-12, atol=0)


def test_shares_stay_between_zero_and_one() -> None:
    features = rectified((4, 6, 5, 5), seed=9) * 1000
    for scale in (-1.0, 1.0):
        suppression = learnable(6)
        with torch.no_grad():
            for parameter in suppression.parameters():
                parameter.fill_(scale)
        result = suppression(features).detach()
        expected = features if scale > 0 else torch.zeros_like(features)
        torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)


def objective(suppression: RegionSuppression, features: Tensor) -> Tensor:
    """Squares of the means, weighed: every channel of every image counts differently."""
    means = suppression(features).mean(dim=(2, 3))
    return (means.square() * torch.arange(1, means.numel() + 1, dtype=means.dtype).view_as(means)).sum()


def test_gradient_of_the_controller_by_finite_differences() -> None:
    suppression, features = learnable(4, scale=0.5), rectified((3, 4, 5, 6), seed=10)
    features[1, 1] = 0
    objective(suppression, features).backward()
    (weights,) = suppression.parameters()
    assert weights.grad.abs().min() > 1e-3
    step = 1e-6
    for row, column in np.ndindex(4, 4):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                weights[row, column] += sign * step
                values.append(objective(suppression, features).item())
                weights[row, column] -= sign * step
        difference = (values[0] - values[1]) / (2 * step)
        assert weights.grad[row, column].item() == pytest.approx(difference, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("control", ("learnable", 0.6))
def test_gradient_of_the_features_by_finite_differences(control: str | float) -> None:
    """Also through the maximum and, where it is learnt, through the share."""
    suppression = learnable(3, scale=0.5) if control == "learnable" else RegionSuppression(3, control)
    features = rectified((2, 3, 3, 4), seed=11) + 0.01 * torch.rand(2, 3, 3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(suppression, (features.requires_grad_(),))


def test_controller_learns_a_share() -> None:
    features, wanted = rectified((6, 3, 5, 5), seed=12, dtype=torch.float32), torch.tensor([0.2, 0.5, 0.8])
    torch.manual_seed(0)
    suppression = RegionSuppression(3)
    target = suppress(features, wanted[None, :, None, None].expand(6, -1, -1, -1))
    optimizer = torch.optim.Adam(suppression.parameters(), lr=0.05)
    losses = []
    for _ in range(60):
        loss = (suppression(features) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


# ---- one image, one precision, one device at a time ---------------------------------------------------------------


@pytest.mark.parametrize("control", ("learnable", 0.5))
def test_images_do_not_influence_each_other(control: str | float) -> None:
    suppression = learnable(5) if control == "learnable" else RegionSuppression(5, control)
    features = rectified((4, 5, 6, 6), seed=13)
    together = suppression(features).detach()
    for index in range(4):
        alone = suppression(features[index : index + 1]).detach()
        torch.testing.assert_close(together[index : index + 1], alone, rtol=1e-12, atol=0)
    features[1:] *= 1000
    torch.testing.assert_close(suppression(features)[:1].detach(), together[:1], rtol=1e-12, atol=0)


@pytest.mark.parametrize("control", ("learnable", 0.7))
def test_features_stay_as_they_are(control: str | float) -> None:
    features = rectified((2, 4, 5, 5), seed=14, dtype=torch.float32)
    copy = features.clone()
    RegionSuppression(4, control)(features)
    assert torch.equal(features, copy)
    last = features.to(memory_format=torch.channels_last)
    torch.manual_seed(0)
    suppression = RegionSuppression(4, control)
    torch.testing.assert_close(suppression(last), suppression(features))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("control", ("learnable", 0.3, 0.7))
def test_mixed_precision_still_caps(control: str | float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    suppression = RegionSuppression(16, control)
    with torch.no_grad():
        for parameter in suppression.parameters():
            parameter.normal_(std=0.5)
    features = rectified((4, 16, 7, 7), seed=15, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = suppression(features)
    if control == "learnable":
        result.float().sum().backward()
        (gradient,) = (parameter.grad for parameter in suppression.parameters())
        assert gradient.isfinite().all()
        assert gradient.any()
        weights = weights_of(suppression).double().numpy()
    result, wide = result.detach(), features.double()
    expected = suppress_by_hand(wide.numpy(), weights if control == "learnable" else control)
    assert result.dtype == dtype
    assert (result <= features).all()
    # bfloat16 has eight bits, and the shares come from a sum of sixteen products.
    torch.testing.assert_close(result.double(), torch.from_numpy(expected), rtol=0.06, atol=1e-6)
    limits = torch.from_numpy(expected).flatten(2).max(dim=2).values[:, :, None, None]
    below = wide < 0.9 * limits
    assert torch.equal(result[below], features[below])
    assert (wide > 1.1 * limits).double().mean() > 0.02


@pytest.mark.parametrize("control", ("learnable", 0.7))
@torch.no_grad()
def test_no_host_synchronisation_and_no_graph_break(control: str | float) -> None:
    torch.manual_seed(0)
    suppression, features = RegionSuppression(4, control), rectified((2, 4, 5, 5), seed=16, dtype=torch.float32)
    expected = suppression(features)
    with reference.ForbidHostReads():
        result = suppression(features)
    assert torch.equal(result, expected)
    compiled = traced(suppression)
    torch.testing.assert_close(compiled(features), expected)


# ---- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "control",
    (
        0,
        0.0,
        -0.1,
        1.01,
        2,
        70,
        math.inf,
        -math.inf,
        math.nan,
        True,
        False,
        None,
        "",
        "fixed",
        "0.7",
        "Learnable",
        (0.7,),
    ),
    ids=repr,
)
def test_other_controls_are_refused(control: object) -> None:
    with pytest.raises(ValueError, match="suppression is .*learnable.*number"):
        RegionSuppression(4, control)


@pytest.mark.parametrize("control", (1e-6, 0.5, 1, 1.0, "learnable", np.float64(0.7)), ids=repr)
def test_these_controls_are_accepted(control: str | float) -> None:
    features = rectified((1, 4, 3, 3), dtype=torch.float32)
    assert RegionSuppression(4, control)(features).shape == features.shape
