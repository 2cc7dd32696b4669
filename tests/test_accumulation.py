"""Gradient accumulation: batches in parts teach what whole batches teach, and count as these do."""

from __future__ import annotations

import copy
import math
import weakref
from types import SimpleNamespace

import pytest
import torch
from cases import slow_but_for
from torch import Tensor, nn
from toy_system import CPU, EVERYTHING, Toy, assert_same_state, make_loader, make_samples, make_stepping, sgd

from networks import build_network
from networks.outputs import NetworkOutput
from networks.system import Step
from utils.data.samplers import BalancedSampler
from utils.errors import UserError
from utils.training.accumulation import joined_outputs, parts_of
from utils.training.building import check_shares
from utils.training.engine import train_one_epoch
from utils.training.learning import Learning, Objective
from utils.training.nonfinite import SkipBudget

# Where an image's gradient depends on no other one, all random numbers of a step apart
BY_IMAGE = ("resnet", "sgkrl", "mmal", "flrdf", "pmg", "dflcnn", "ntsnet")


@pytest.mark.parametrize(
    ("images", "count", "sizes"),
    [(4, 1, [4]), (4, 2, [2, 2]), (5, 2, [3, 2]), (4, 3, [2, 1, 1]), (10, 4, [3, 3, 2, 2]), (2, 4, [1, 1])],
)
def test_parts_are_as_equal_as_can_be(images: int, count: int, sizes: list[int]) -> None:
    step = Step(torch.arange(images), torch.arange(images) + 10, ("raw",), ("raw",), torch.arange(images) + 20)
    parts = parts_of(step, count)
    assert [len(part.images) for part, _ in parts] == sizes
    assert [share for _, share in parts] == [size / images for size in sizes]
    for position in (0, 1, 4):
        assert torch.equal(torch.cat([part[position] for part, _ in parts]), step[position])
    assert all((part.terms, part.branches) == (("raw",), ("raw",)) for part, _ in parts)
    assert all(part.boxes is None for part, _ in parts_of(step._replace(boxes=None), count))


def test_outputs_are_joined_field_by_field() -> None:
    first = NetworkOutput({"raw": torch.ones(2, 3), "window": torch.ones(2, 4, 3)}, torch.zeros(2, 4), extras=None)
    second = NetworkOutput({"raw": torch.zeros(1, 3), "window": torch.zeros(1, 4, 3)}, torch.ones(1, 4), extras=None)
    joined = joined_outputs([first, second])
    assert {name: value.shape for name, value in joined.logits.items()} == {"raw": (3, 3), "window": (3, 4, 3)}
    assert torch.equal(joined.object_boxes[:, 0], torch.tensor([0.0, 0.0, 1.0]))
    assert joined.window_boxes is None and joined.extras is None


def without_chance(network: nn.Module) -> nn.Module:
    """A network that draws no random numbers, and whose batch norms do not look at the batch."""
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):  # of attention
            module.dropout = 0.0
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            module.train = lambda mode=True, module=module: nn.Module.train(module, False)
    return network


@pytest.mark.parametrize("parts", [2, 3, 4])
@pytest.mark.parametrize("make", [Toy, make_stepping])
def test_an_epoch_in_parts_equals_one_of_whole_batches(make, parts: int) -> None:
    """Batches of 5, and a last one of 2."""
    torch.manual_seed(0)
    whole = without_chance(make())
    torch.manual_seed(0)
    network = without_chance(make())
    options = {"plan": EVERYTHING, "execution": CPU, "clip_gradient_norm": 0.1, "label_smoothing": 0.1}
    loader = make_loader(make_samples(12), batch_size=5)
    expected = train_one_epoch(whole, loader, *sgd(whole), **options)
    network.calls.clear()
    averages = train_one_epoch(network, loader, *sgd(network), gradient_accumulation=parts, **options)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], value, rtol=1e-4, atol=1e-6, msg=name)
    del expected["images_per_second"], averages["images_per_second"]
    assert averages == pytest.approx(expected, rel=1e-5)
    assert max(call["shape"][0] for call in network.calls) < max(call["shape"][0] for call in whole.calls)
    assert getattr(network, "taken", None) == getattr(whole, "taken", None)  # once per optimizer step


@pytest.mark.usefixtures("thin_trunk")
@pytest.mark.parametrize("model", slow_but_for(("sgkrl", "dflcnn"), BY_IMAGE))
def test_systems_learn_from_parts_what_they_learn_from_whole_batches(model: str) -> None:
    states = []
    for accumulation in (1, 2):
        torch.manual_seed(1)
        options = {"windows": ((((2, 2),), 2),)} if model in ("sgkrl", "mmal") else {}
        network = build_network(model, num_classes=3, backbone="resnet18", input_size=96, dropout=0.0, **options)
        network = without_chance(network).train()
        images = torch.randn(4, 3, 96, 96, generator=torch.Generator().manual_seed(2))
        branches = tuple(name for name in network.branches if network.loss_weights.get(name, 0) > 0)
        plan = EVERYTHING._replace(loss_weights=network.loss_weights, branches=branches, mask_background=False)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
        learning = Learning(network, optimizer, Objective(plan, CPU, 0.0), 0.0, None, accumulation=accumulation)
        torch.manual_seed(3)
        meter = SimpleNamespace(update=lambda *_, **__: None)
        learning.learn_from(images, torch.tensor([0, 1, 2, 1]), 1, ["a", "b", "c", "d"], meter)
        states.append({name: value.clone() for name, value in network.state_dict().items()})
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.usefixtures("thin_trunk")
@pytest.mark.parametrize(("model", "weights"), [("pmg", {}), ("sgkrl", {"object": 0.0}), ("cal", {})])
def test_nothing_of_a_part_is_held_while_the_next_one_is_computed(model: str, weights: dict[str, float]) -> None:
    """PMG's steps compute all heads and train one; the pass over the object serves no loss in the second case."""
    options = {"windows": ((((2, 2),), 2),)} if model == "sgkrl" else {}
    network = build_network(model, num_classes=3, backbone="resnet18", input_size=96, **options).train()
    plan = EVERYTHING._replace(loss_weights=network.loss_weights | weights, branches=network.branches)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    learning = Learning(network, optimizer, Objective(plan, CPU, 0.0), 0.0, None, accumulation=2)
    parameters = {parameter.data_ptr() for parameter in network.parameters()}
    held: list[weakref.ref] = []
    alive: list[int] = []

    def pack(value: Tensor) -> Tensor:
        kept = value.detach()  # the tensor itself would be held by what it was computed from
        if value.data_ptr() not in parameters:
            held.append(weakref.ref(kept))
        return kept

    network.register_forward_pre_hook(lambda *_: alive.append(sum(reference() is not None for reference in held)))
    meter = SimpleNamespace(update=lambda *_, **__: None)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        images = torch.randn(4, 3, 96, 96, generator=torch.Generator().manual_seed(2))
        learning.learn_from(images, torch.tensor([0, 1, 2, 1]), 1, ["a", "b", "c", "d"], meter)
    assert len(held) > 50
    assert alive == [0] * (8 if model == "pmg" else 2)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_a_step_with_a_broken_part_is_skipped_whole() -> None:
    """The second part of the only batch; statistics of batch norms that the first has moved are as before."""
    torch.manual_seed(0)
    network = Toy()
    before, losses, calls = copy.deepcopy(network), network.losses, []

    def broken(output: NetworkOutput, targets: Tensor, **options) -> dict[str, Tensor]:
        calls.append(len(targets))
        terms = losses(output, targets, **options)
        return {**terms, "object": terms["object"] * math.nan} if len(calls) == 2 else terms

    network.losses = broken
    options = {"plan": EVERYTHING, "execution": CPU, "gradient_accumulation": 2, "skip_nonfinite": SkipBudget(1)}
    train_one_epoch(network, make_loader(make_samples(4), 4), *sgd(network), **options)
    assert calls == [2, 2]
    assert_same_state(network, before)


# ---- Refusals -----------------------------------------------------------------------------------------------------


def shares(batch_size: int, parts: int, *, smallest: int = 1, images_per_class: int = 0) -> None:
    labels = [0, 0, 0, 0, 1, 1, 1, 1]
    groups = {"batch_size": batch_size, "images_per_class": images_per_class, "seed": 0}
    sampler = BalancedSampler(labels, **groups) if images_per_class else range(100)
    network = nn.Module()
    network.smallest_batch = smallest
    check_shares(network, SimpleNamespace(batch_size=batch_size, sampler=sampler), parts)


def test_parts_that_a_system_can_learn_from_are_taken() -> None:
    shares(8, 4, smallest=2)
    shares(8, 8)
    shares(8, 2, images_per_class=2)
    shares(10, 4, smallest=2)


@pytest.mark.parametrize(
    ("batch_size", "parts", "options", "sentence"),
    [
        (4, 5, {}, "gradient_accumulation is 5, and a process has 4 images of a batch: lower it"),
        (8, 8, {"smallest": 2}, "gets 1 training image and needs 2.*fewer processes, GPUs or parts"),
        (
            8,
            4,
            {"images_per_class": 2},
            "has 8 images of a batch: each part needs whole groups of images_per_class 2, two",
        ),
        (
            8,
            4,
            {"images_per_class": 4},
            "is 4, and a process has 8 images .* groups of images_per_class 4, two or more",
        ),
    ],
)
def test_parts_that_it_cannot_are_refused(batch_size: int, parts: int, options: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        shares(batch_size, parts, **options)
