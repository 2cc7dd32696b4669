"""What changes from epoch to epoch, against formulas."""

from __future__ import annotations

import math

import pytest
import torch

from config import parse_settings
from networks import MODELS, build_network
from networks.system import System
from utils.training.schedule import build_optimizer, build_schedule, plan_epoch

BRANCHES = ("raw", "fused", "object", "window", "graph")
WEIGHTS = {"raw": 0.5, "fused": 1.0, "object": 2.0, "window": 1.0, "graph": 1.0}


class Toy(System):
    """A system of two layers, the second of which is a head."""

    def __init__(self, branches=BRANCHES, *, warmup_branches=("raw",), mask_from_epoch=None):
        torch.nn.Module.__init__(self)
        self.branches, self.warmup_branches, self.mask_from_epoch = branches, warmup_branches, mask_from_epoch
        self.trunk, self.head = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)

    def heads(self):
        return [self.head]

    def masks_background(self, epoch):
        return self.mask_from_epoch is not None and epoch >= self.mask_from_epoch


# ---- Plans ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("warmup_epochs", [0, 1, 3])
@pytest.mark.parametrize("mask_from_epoch", [None, 1, 2, 5])
def test_plan_of_every_epoch(warmup_epochs, mask_from_epoch):
    for epoch in range(1, 8):
        plan = plan_epoch(Toy(mask_from_epoch=mask_from_epoch), epoch, WEIGHTS, warmup_epochs=warmup_epochs)
        assert plan.loss_weights == ({"raw": 1.0} if epoch - 1 < warmup_epochs else WEIGHTS)
        assert plan.branches == (("raw",) if epoch - 1 < warmup_epochs else BRANCHES)
        assert plan.mask_background is (mask_from_epoch is not None and epoch + 1 > mask_from_epoch)


def test_terms_of_weight_zero_are_left_out_with_their_branches():
    plan = plan_epoch(Toy(), 2, WEIGHTS | {"window": 0.0, "graph": 0.0})
    assert plan.loss_weights == {"raw": 0.5, "fused": 1.0, "object": 2.0}
    assert set(plan.branches) == {"raw", "fused", "object"}


def test_a_term_of_several_branches_needs_them_all():
    weights = {"raw": 1.0, "part": 0.0, "concat": 1.0, "ranking": 1.0}
    system = Toy(("raw", "part", "concat"))
    assert plan_epoch(system, 2, weights).branches == ("raw", "part", "concat")
    assert plan_epoch(system, 1, weights).branches == ("raw",)
    assert set(plan_epoch(system, 2, weights | {"ranking": 0.0}).branches) == {"raw", "concat"}


def test_warm_up_trains_what_the_system_says():
    system = Toy(("stage", "final"), warmup_branches=("final",))
    plan = plan_epoch(system, 1, {"stage": 1.0, "final": 2.0})
    assert (plan.loss_weights, plan.branches) == ({"final": 1.0}, ("final",))


def test_published_plan():
    settings = parse_settings(["--dataset", "cub", "--data_root", "x", "--model", "sgkrl_published"])
    with torch.device("meta"):
        network = build_network("sgkrl_published", num_classes=3, backbone="resnet18", **settings.options)
    shared = {"loss_weights": network.loss_weights, "warmup_epochs": settings.warmup_epochs}
    plans = {epoch: plan_epoch(network, epoch, **shared) for epoch in range(1, settings.epochs + 1)}
    assert [epoch for epoch, plan in plans.items() if set(plan.loss_weights) == {"raw"}] == [1]
    assert [epoch for epoch, plan in plans.items() if plan.mask_background] == list(range(46, 101))


# ---- Optimizer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_every_trainable_parameter_is_optimized_once_and_heads_at_their_factor(model):
    network = build_network(model, num_classes=3, backbone="resnet18", input_size=128)
    optimizer = build_optimizer(
        network,
        learning_rate=0.01,
        head_learning_rate_factor=5.0,
        momentum=0.8,
        weight_decay=1e-3,
    )
    rates = [(id(p), group["lr"]) for group in optimizer.param_groups for p in group["params"]]
    assert len(rates) == len({identity for identity, _ in rates})
    heads = {id(p) for head in network.heads() for p in head.parameters()}
    expected = {id(p): 0.05 if id(p) in heads else 0.01 for p in network.parameters() if p.requires_grad}
    assert dict(rates) == pytest.approx(expected)
    assert heads <= expected.keys()
    assert len(heads) > 0
    assert id(network.backbone.trunk.conv1.weight) not in heads
    for group in optimizer.param_groups:
        assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.8, 1e-3, False)
    frozen = [name for name, p in network.named_parameters() if not p.requires_grad]
    if model == "sgkrl_published":  # never learn there; weight decay must not shrink them either
        assert {name.split(".")[0] for name in frozen} == {"fusion", "weighting"}
    else:
        assert frozen == []


def test_other_groups_have_a_factor_of_the_systems_own():
    system = Toy()
    system.learning_rate_factors = {"scores": 0.5}
    system.parameter_groups = lambda: {
        "trunk": [system.trunk.weight],
        "heads": [system.head.weight],
        "scores": [system.head.bias],
    }
    options = {"learning_rate": 0.02, "head_learning_rate_factor": 5.0, "momentum": 0.9, "weight_decay": 0.0}
    assert [group["lr"] for group in build_optimizer(system, **options).param_groups] == [0.02, 0.1, 0.01]


# ---- Learning rates -------------------------------------------------------------------------------------------------


def _rates(kind: str, *, epochs: int, steps: int, milestones=(), rate=0.02, factor=5.0) -> tuple[list, list]:
    """Learning rates [epochs * steps] of the two groups, as the optimizer meets them at each step."""
    options = {"learning_rate": rate, "head_learning_rate_factor": factor, "momentum": 0.9, "weight_decay": 0.0}
    optimizer = build_optimizer(Toy(), **options)
    schedule = build_schedule(optimizer, kind, epochs=epochs, steps_per_epoch=steps, milestones=milestones)
    used = []
    for _ in range(epochs * steps):
        used.append([group["lr"] for group in optimizer.param_groups])
        assert [group["momentum"] for group in optimizer.param_groups] == [0.9, 0.9]
        optimizer.step()
        schedule.step()
    return [pair[0] for pair in used], [pair[1] for pair in used]


@pytest.mark.parametrize("milestones", [(), (2,), (2, 4), (4, 2), (1, 2, 3), (3, 90)])
@pytest.mark.parametrize("steps", [1, 3])
def test_steps(milestones, steps):
    trunk, head = _rates("steps", epochs=5, steps=steps, milestones=milestones)
    expected = [0.02 * 0.1 ** sum(epoch >= m for m in milestones) for epoch in range(5) for _ in range(steps)]
    assert trunk == pytest.approx(expected, rel=1e-9)
    assert head == pytest.approx([5 * value for value in expected], rel=1e-9)


def _one_cycle(step: int, steps: int, highest: float) -> float:
    peak = 0.3 * steps - 1
    low, lowest = highest / 25, highest / 25e4
    start, end, part = (
        (low, highest, step / peak) if step <= peak else (highest, lowest, (step - peak) / (steps - 1 - peak))
    )
    return end + (start - end) * (1 + math.cos(math.pi * part)) / 2


@pytest.mark.parametrize(("epochs", "steps"), [(4, 10), (10, 1), (5, 7)])
def test_one_cycle(epochs, steps):
    trunk, head = _rates("one_cycle", epochs=epochs, steps=steps)
    expected = [_one_cycle(step, epochs * steps, 0.02) for step in range(epochs * steps)]
    assert trunk == pytest.approx(expected, rel=1e-6)
    assert head == pytest.approx([5 * value for value in expected], rel=1e-6)
    assert max(trunk) == pytest.approx(0.02, rel=0.1)
    assert trunk[-1] < 1e-4 * max(trunk)


@pytest.mark.parametrize(("epochs", "steps"), [(1, 1), (1, 2), (2, 1), (1, 4)])
def test_one_cycle_of_the_shortest_runs(epochs, steps):
    trunk, _ = _rates("one_cycle", epochs=epochs, steps=steps)
    assert all(0 < rate <= 0.02 + 1e-12 for rate in trunk)


@pytest.mark.parametrize(("model", "epochs"), [("sgkrl", 100), ("mmal", 200)])
def test_published_milestones(model, epochs):
    settings = parse_settings(["--dataset", "cub", "--data_root", "x", "--model", model])
    assert settings.epochs == epochs
    trunk, head = _rates(
        settings.schedule,
        epochs=settings.epochs,
        steps=2,
        milestones=settings.milestones,
        rate=settings.learning_rate,
        factor=settings.head_learning_rate_factor,
    )
    of_epoch = {epoch: trunk[2 * (epoch - 1)] for epoch in range(1, epochs + 1)}
    assert of_epoch[1] == of_epoch[60] == pytest.approx(1e-3)
    assert of_epoch[61] == of_epoch[100] == pytest.approx(1e-4)
    if epochs > 100:
        assert of_epoch[101] == of_epoch[200] == pytest.approx(1e-5)
    assert trunk == head


@pytest.mark.parametrize(("epochs", "steps"), [(4, 10), (10, 1), (1, 3)])
def test_cosine_is_constant_within_an_epoch(epochs, steps):
    trunk, head = _rates("cosine", epochs=epochs, steps=steps)
    by_epoch = [0.02 / 2 * (1 + math.cos(math.pi * t / epochs)) for t in range(epochs)]
    expected = [rate for rate in by_epoch for _ in range(steps)]
    assert trunk == pytest.approx(expected, rel=1e-9)
    assert head == pytest.approx([5 * value for value in expected], rel=1e-9)


def test_an_unknown_schedule_is_refused():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(ValueError, match="sine"):
        build_schedule(optimizer, "sine", epochs=1, steps_per_epoch=1, milestones=())
