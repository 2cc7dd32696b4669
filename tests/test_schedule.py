"""What changes from epoch to epoch, against formulas."""

from __future__ import annotations

import math

import pytest
import torch
from cases import slow_but_for
from torch.optim import lr_scheduler

from config import parse_settings
from networks import MODELS, build_network
from networks.system import System
from utils.training.schedule import build_optimizer, build_schedule, freeze_trunk, plan_epoch

BRANCHES = ("raw", "fused", "object", "window", "graph")
WEIGHTS = {"raw": 0.5, "fused": 1.0, "object": 2.0, "window": 1.0, "graph": 1.0}


class Toy(System):
    """A system of two layers, the second of which is a head."""

    def __init__(self, branches=BRANCHES, *, warmup_branches=("raw",), mask_from_epoch=None):
        torch.nn.Module.__init__(self)
        self.branches, self.warmup_branches, self.mask_from_epoch = branches, warmup_branches, mask_from_epoch
        self.trunk, self.head, self.learned_localization = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), None

    def heads(self):
        return [self.head]

    def masks_background(self, epoch):
        return self.mask_from_epoch is not None and epoch >= self.mask_from_epoch


class Decaying(Toy):
    """With a norm, whose weight is a vector as biases are."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__()
        self.trunk = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2, eps=0.1))


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


def test_a_term_may_name_the_branches_it_needs():
    system = Toy(("raw", "part", "concat"), warmup_branches=("raw", "ranking"))
    system.needed_for = {"ranking": ("part",)}
    assert plan_epoch(system, 1, {}).branches == ("raw", "part")
    assert plan_epoch(system, 2, {"concat": 1.0, "ranking": 1.0}).branches == ("part", "concat")
    assert plan_epoch(system, 2, {"ranking": 1.0, "location": 1.0}).branches == system.branches


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


@pytest.mark.parametrize("model", slow_but_for(("sgkrl", "resnet", "crossx", "dflcnn"), MODELS))
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


@pytest.mark.parametrize(("kind", "torchs"), [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
def test_norms_and_biases_need_not_decay(kind, torchs):
    """Three steps of a small network, against torch's optimizer told about every parameter by name."""
    systems = [Decaying(), Decaying()]
    options = {"learning_rate": 0.02, "head_learning_rate_factor": 5.0, "momentum": 0.9, "weight_decay": 0.5}
    ours = build_optimizer(systems[0], kind=kind, decay_norms_and_biases=False, **options)
    decaying = {"trunk.0.weight", "head.weight"}
    groups = [
        {
            "params": [parameter],
            "lr": 0.1 if name.startswith("head") else 0.02,
            "weight_decay": 0.5 if name in decaying else 0.0,
        }
        for name, parameter in systems[1].named_parameters()
    ]
    theirs = torchs(groups, **({"momentum": 0.9} if kind == "sgd" else {}))
    start = {name: parameter.clone() for name, parameter in systems[0].named_parameters()}
    for system, optimizer in zip(systems, (ours, theirs), strict=True):
        for step in range(3):
            optimizer.zero_grad()
            system.head(system.trunk(torch.arange(8.0).reshape(4, 2) + step)).square().mean().backward()
            optimizer.step()
    expected = dict(systems[1].named_parameters())
    for name, parameter in systems[0].named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-6, atol=0)
        assert not torch.equal(parameter, start[name]), name


@pytest.mark.parametrize("decay", [True, False])
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_saved_optimizer_fits_the_one_built_again(kind, decay):
    options = {"learning_rate": 0.02, "head_learning_rate_factor": 5.0, "momentum": 0.9, "weight_decay": 0.5}
    first, again = (build_optimizer(Toy(), kind=kind, decay_norms_and_biases=decay, **options) for _ in range(2))
    again.load_state_dict(first.state_dict())
    assert len(first.param_groups) == (2 if decay else 4)
    assert [g["weight_decay"] for g in again.param_groups] == ([0.5, 0.5] if decay else [0.5, 0.0, 0.5, 0.0])


def test_an_unknown_optimizer_is_refused():
    options = {"learning_rate": 0.02, "head_learning_rate_factor": 5.0, "momentum": 0.9, "weight_decay": 0.5}
    with pytest.raises(ValueError, match="adagrad"):
        build_optimizer(Toy(), kind="adagrad", **options)


@pytest.mark.parametrize("batch_norm", ["shared", "frozen"])
def test_a_frozen_trunk_keeps_its_weights_and_moves_its_statistics(batch_norm):
    torch.manual_seed(0)
    network = build_network("resnet", num_classes=3, backbone="resnet18", input_size=96, batch_norm=batch_norm)
    options = {"learning_rate": 0.02, "head_learning_rate_factor": 5.0, "momentum": 0.9, "weight_decay": 0.5}
    optimizer = build_optimizer(network, **options)
    fixed = network.backbone.trunk.conv1.weight.requires_grad_(False)  # as a system may fix what it likes
    optimizer.param_groups[0]["params"] = [p for p in optimizer.param_groups[0]["params"] if p is not fixed]
    images, labels = torch.randn(2, 3, 96, 96), torch.tensor([0, 2])
    for frozen in (True, False):
        freeze_trunk(network, optimizer, frozen=frozen)
        before = {name: value.clone() for name, value in network.state_dict().items()}
        optimizer.zero_grad()
        output = network.train()(images)
        if frozen:  # nothing of the trunk is kept for a backward pass
            assert not network.backbone(images).embedding.requires_grad
        sum(network.losses(output, labels).values()).backward()
        optimizer.step()
        parameters = {name for name, _ in network.named_parameters()}
        changed = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
        heads = {"classifier.weight", "classifier.bias"}
        statistics = {name for name in before if "running" in name or "num_batches" in name}
        learnt = heads if frozen else parameters - {"backbone.trunk.conv1.weight"}
        assert changed == learnt | (set() if batch_norm == "frozen" else statistics)
    assert not fixed.requires_grad


# ---- Learning rates -------------------------------------------------------------------------------------------------


def _rates(kind: str, *, epochs: int, steps: int, milestones=(), rate=0.02, factor=5.0, **others) -> tuple[list, list]:
    """Learning rates [epochs * steps] of the two groups, as the optimizer meets them at each step."""
    options = {"learning_rate": rate, "head_learning_rate_factor": factor, "momentum": 0.9, "weight_decay": 0.0}
    optimizer = build_optimizer(Toy(), **options)
    schedule = build_schedule(optimizer, kind, epochs=epochs, steps_per_epoch=steps, milestones=milestones, **others)
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
    assert max(trunk) > 0.005  # something is learnt


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


def _torchs_rates(build, steps: int) -> list[float]:
    """Learning rates of a schedule of torch's own, from 0.02."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.02)
    schedule, used = build(optimizer), []
    for _ in range(steps):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return used


@pytest.mark.parametrize(("epochs", "steps"), [(4, 10), (10, 1), (1, 3)])
def test_cosine_per_step_is_torchs(epochs, steps):
    trunk, head = _rates("cosine_per_step", epochs=epochs, steps=steps)
    expected = _torchs_rates(lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=epochs * steps), epochs * steps)
    assert trunk == pytest.approx(expected, rel=1e-9)
    assert head == pytest.approx([5 * value for value in expected], rel=1e-9)


def test_exponential_is_torchs_and_reaches_the_decay_rate_after_an_epoch():
    trunk, head = _rates("exponential", epochs=3, steps=4, decay_rate=0.81)
    assert trunk == pytest.approx(_torchs_rates(lambda o: lr_scheduler.ExponentialLR(o, 0.81 ** (1 / 4)), 12), rel=1e-9)
    assert trunk[::4] == pytest.approx([0.02, 0.02 * 0.81, 0.02 * 0.81**2], rel=1e-9)
    assert head == pytest.approx([5 * value for value in trunk], rel=1e-9)


# What comes after two epochs of 4 steps in a run of 6, as torch computes it
AFTER_WARM_UP = {
    "steps": lambda o: lr_scheduler.MultiStepLR(o, [1 * 4, 3 * 4], gamma=0.1),  # epochs 3 and 5 of the run
    "cosine": lambda o: lr_scheduler.LambdaLR(o, lambda step: (1 + math.cos(math.pi * (step // 4) / 4)) / 2),
    "cosine_per_step": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=16),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.5 ** (1 / 4)),
}


@pytest.mark.parametrize("kind", AFTER_WARM_UP)
def test_a_linear_warm_up_comes_before_a_schedule(kind):
    options = {"milestones": (3, 5), "decay_rate": 0.5, "linear_warmup_epochs": 2.0}
    trunk, head = _rates(kind, epochs=6, steps=4, **options)
    rising = _torchs_rates(lambda o: lr_scheduler.LinearLR(o, start_factor=1 / 8, total_iters=7), 8)
    assert trunk == pytest.approx(rising + _torchs_rates(AFTER_WARM_UP[kind], 16), rel=1e-9)
    assert head == pytest.approx([5 * value for value in trunk], rel=1e-9)


def test_a_warm_up_may_be_part_of_an_epoch():
    trunk, _ = _rates("steps", epochs=2, steps=4, linear_warmup_epochs=0.5)
    assert trunk == pytest.approx([0.01, *[0.02] * 7])
    assert _rates("steps", epochs=2, steps=4, linear_warmup_epochs=0.1)[0] == pytest.approx([0.02] * 8)
    assert _rates("steps", epochs=1, steps=3, linear_warmup_epochs=0.5)[0] == pytest.approx([0.01, 0.02, 0.02])


@pytest.mark.parametrize(
    ("kind", "warmup"), [*((kind, warmup) for kind in AFTER_WARM_UP for warmup in (0.0, 1.0)), ("one_cycle", 0.0)]
)
def test_a_saved_schedule_goes_on_bit_for_bit(kind, warmup, tmp_path):
    def build():
        options = {"learning_rate": 0.02, "head_learning_rate_factor": 5.0, "momentum": 0.9, "weight_decay": 0.0}
        optimizer = build_optimizer(Toy(), **options)
        sizes = {"epochs": 4, "steps_per_epoch": 3, "milestones": (1, 2)}
        return optimizer, build_schedule(optimizer, kind, **sizes, linear_warmup_epochs=warmup)

    def steps(optimizer, schedule, count):
        rates = []
        for _ in range(count):
            rates.append([group["lr"] for group in optimizer.param_groups])
            optimizer.step()
            schedule.step()
        return rates

    whole = steps(*build(), 12)
    first = build()
    begun = steps(*first, 5)
    torch.save([part.state_dict() for part in first], tmp_path / "saved")
    second = build()
    for part, state in zip(second, torch.load(tmp_path / "saved", weights_only=True), strict=True):
        part.load_state_dict(state)
    assert begun + steps(*second, 7) == whole


def test_an_unknown_schedule_is_refused():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(ValueError, match="sine"):
        build_schedule(optimizer, "sine", epochs=1, steps_per_epoch=1, milestones=())
