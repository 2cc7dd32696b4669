"""Training and evaluation of one epoch, against loops written out by hand."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from datasets import Sample, collate
from networks.losses import classification_losses
from networks.outputs import NetworkOutput
from networks.system import Step, System
from utils.errors import UserError
from utils.reporting.metrics import EpochMeter
from utils.training import learning, nonfinite
from utils.training.engine import evaluate, train_one_epoch
from utils.training.execution import HALF_PRECISIONS, Execution
from utils.training.nonfinite import NonFiniteLossError, SkipBudget, StepLosses, check_losses, check_weights
from utils.training.schedule import EpochPlan

SIZE = 8  # pixels that the toy network sees
CPU = Execution(torch.device("cpu"))
EVERYTHING = EpochPlan({"raw": 1.0, "object": 0.5}, ("raw", "object"), mask_background=True)
WARM_UP = EpochPlan({"raw": 1.0}, ("raw",), mask_background=False)


class Toy(System):
    """Two branches on a convolution with batch norm and dropout; a box that the picture's first pixels tell."""

    branches = evaluated = ("raw", "object")
    prediction = ("raw", "object")
    loss_weights = {"raw": 1.0, "object": 1.0}
    input_size = SIZE

    def __init__(self, *, boxes: bool = True) -> None:
        nn.Module.__init__(self)
        self.register_buffer("ensemble_weights", None)
        self.colocalization = self.learned_localization = None
        self.boxes = boxes
        self.convolution = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.dropout = nn.Dropout(0.5)
        self.raw = nn.Linear(6, 3)
        self.object = nn.Linear(6, 3)
        self.calls: list[dict] = []

    def forward(self, images, *, mask_background=False, branches=None):
        self.calls.append({"mask_background": mask_background, "branches": branches, "shape": tuple(images.shape)})
        features = self.dropout(F.relu(self.norm(self.convolution(images))).mean(dim=(2, 3)))
        logits = {"raw": self.raw(features)}
        if branches is None or "object" in branches:
            logits["object"] = self.object(features)
        start = (images[:, 0, 0, :2].abs() * 4).floor().clamp(0, 3)
        return NetworkOutput(logits, torch.cat([start, start + 3], dim=1) if self.boxes else None)


def make_network(**options) -> Toy:
    torch.manual_seed(0)
    return Toy(**options)


def make_samples(count: int, *, size: int = SIZE, boxes: bool = True) -> list[Sample]:
    generator = torch.Generator().manual_seed(1)
    samples = []
    for index in range(count):
        corners = torch.rand(2, 2, generator=generator).sort(dim=0).values.flatten() * size
        image = torch.randn(3, size, size, generator=generator)
        samples.append(Sample(image, index % 3, corners if boxes else None, str(index)))
    return samples


def make_loader(samples: list[Sample], batch_size: int) -> DataLoader:
    return DataLoader(samples, batch_size=batch_size, collate_fn=collate)


def sgd(network: nn.Module, momentum: float = 0.9):
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5, momentum=momentum, weight_decay=1e-3)
    return optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, [2], gamma=0.1)


def assert_same_state(one: nn.Module, other: nn.Module) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    differing = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert differing == []


# ---- Training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize("plan", [EVERYTHING, WARM_UP], ids=["all", "warm-up"])
def test_an_epoch_equals_the_loop_written_out(plan, clip):
    loader = make_loader(make_samples(11), batch_size=4)
    network = make_network()
    optimizer, schedule = sgd(network)
    torch.manual_seed(5)
    averages = train_one_epoch(
        network,
        loader,
        optimizer,
        schedule,
        plan=plan,
        label_smoothing=0.1,
        execution=CPU,
        clip_gradient_norm=clip,
    )

    reference = make_network()
    optimizer, schedule = sgd(reference)
    torch.manual_seed(5)
    reference.train()
    losses = dict.fromkeys((*plan.loss_weights, "total"), 0.0)
    correct = dict.fromkeys(plan.loss_weights, 0)
    norms = []
    for batch in loader:
        output = reference(batch.images.to(memory_format=torch.channels_last), branches=tuple(plan.loss_weights))
        terms = {n: F.cross_entropy(output.logits[n], batch.labels, label_smoothing=0.1) for n in plan.loss_weights}
        loss = terms["raw"] * 1.0
        if "object" in terms:
            loss = loss + 0.5 * terms["object"]
        optimizer.zero_grad()
        loss.backward()
        gradients = [p.grad for p in reference.parameters() if p.grad is not None]
        norms.append(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients])))
        if clip:
            for gradient in gradients:
                gradient *= (clip / (norms[-1] + 1e-6)).clamp(max=1.0)
        optimizer.step()
        schedule.step()
        losses["total"] += loss.item() * len(batch.labels)
        for name, term in terms.items():
            losses[name] += term.item() * len(batch.labels)
            correct[name] += (output.logits[name].argmax(dim=1) == batch.labels).sum().item()

    assert_same_state(network, reference)
    if clip:
        assert min(norms) > clip  # every step was clipped
    speed = averages.pop("images_per_second")
    assert speed > 0
    expected = {f"loss/{name}": value / 11 for name, value in losses.items()}
    expected |= {f"accuracy/{name}": value / 11 for name, value in correct.items()}
    assert averages == pytest.approx({**expected, "images": 11}, rel=1e-6)
    assert network.training


def test_the_plan_reaches_the_network():
    network, loader = make_network(), make_loader(make_samples(5), batch_size=2)
    train_one_epoch(network, loader, *sgd(network), plan=EVERYTHING, execution=CPU)
    call = {"mask_background": True, "branches": ("raw", "object"), "shape": (2, 3, SIZE, SIZE)}
    assert network.calls == [call, call, {**call, "shape": (1, 3, SIZE, SIZE)}]


def test_a_branch_outside_the_plan_keeps_its_weights_even_from_weight_decay():
    network = make_network()
    before = copy.deepcopy(network)
    loader = make_loader(make_samples(8), batch_size=4)
    train_one_epoch(network, loader, *sgd(network), plan=WARM_UP, execution=CPU)
    assert torch.equal(network.object.weight, before.object.weight)
    assert not torch.equal(network.raw.weight, before.raw.weight)


def test_clipping_scales_down_and_never_up():
    states = {}
    for clip in (0.0, 0.05, 1e9):
        network = make_network()
        torch.manual_seed(5)
        train_one_epoch(
            network,
            make_loader(make_samples(8), batch_size=4),
            *sgd(network),
            plan=EVERYTHING,
            execution=CPU,
            clip_gradient_norm=clip,
        )
        states[clip] = network
    assert_same_state(states[0.0], states[1e9])
    assert not torch.equal(states[0.0].raw.weight, states[0.05].raw.weight)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("broken_step", [1, 2, 3])
def test_a_loss_that_is_not_finite_stops_the_epoch_by_name(value, broken_step):
    steps = 0

    def losses(output, labels, **options):
        nonlocal steps
        steps += 1
        terms = classification_losses(output, labels)
        return terms | {"object": terms["object"] * value} if steps == broken_step else terms

    network = make_network()
    network.losses = losses
    torch.manual_seed(5)
    with pytest.raises(NonFiniteLossError) as stop:
        train_one_epoch(
            network,
            make_loader(make_samples(12), batch_size=4),
            *sgd(network),
            plan=EVERYTHING,
            execution=CPU,
        )
    assert steps == broken_step
    message = str(stop.value)
    assert "object, total" in message
    assert "raw" not in message
    assert len(message.splitlines()) == 1
    error = stop.value
    assert (error.step, error.terms) == (broken_step, ["object", "total"])
    assert error.paths == [str(index) for index in range(4 * broken_step - 4, 4 * broken_step)]

    whole = make_network()
    samples = make_samples(12)[: 4 * (broken_step - 1)]
    if samples:
        options = {"plan": EVERYTHING, "execution": CPU}
        torch.manual_seed(5)
        train_one_epoch(whole, make_loader(samples, batch_size=4), *sgd(whole), **options)
    parameters = dict(whole.named_parameters())
    assert all(torch.equal(value, parameters[name]) for name, value in network.named_parameters())


def test_of_several_steps_read_at_once_the_first_broken_one_is_named():
    """As on a GPU, where the losses of some steps are read together."""
    unread = [
        StepLosses(step, ["raw", "total"], torch.tensor(values), [f"{step}.jpg"])
        for step, values in ((7, (1.0, 2.0)), (8, (1.0, math.inf)), (9, (math.nan, math.nan)))
    ]
    assert check_losses(unread[:1], None) is False
    with pytest.raises(NonFiniteLossError) as stop:
        check_losses(unread, None)
    assert (stop.value.step, stop.value.terms, stop.value.paths) == (8, ["total"], ["8.jpg"])


def test_an_epoch_begun_before_goes_on_where_it_stopped():
    loader = make_loader(make_samples(12), batch_size=4)
    options = {"plan": EVERYTHING, "execution": CPU}
    seeds = {"before_step": lambda step: torch.manual_seed(step)}
    whole = make_network()
    expected = train_one_epoch(whole, loader, *sgd(whole), **options, **seeds)

    network, meter, steps = make_network(), EpochMeter(CPU.device), []

    def stop_after_the_first(step):
        steps.append(step)
        if len(steps) == 1:
            raise InterruptedError

    training = sgd(network)
    saving = {"save_after": lambda step: True, "save": stop_after_the_first}
    with pytest.raises(InterruptedError):
        train_one_epoch(network, loader, *training, meter=meter, **saving, **options, **seeds)
    again = EpochMeter(CPU.device)
    again.load_state_dict(json.loads(json.dumps(meter.state_dict())))
    rest = make_loader(make_samples(12)[4:], batch_size=4)
    averages = train_one_epoch(network, rest, *training, meter=again, first_step=2, **saving, **options, **seeds)
    assert steps == [1, 2, 3]
    assert_same_state(network, whole)
    for figures in (averages, expected):
        assert figures.pop("images_per_second") > 0
    assert averages == expected


@pytest.mark.parametrize("precision", HALF_PRECISIONS)
def test_mixed_precision_keeps_weights_and_loss_in_float32(precision):
    network = make_network()
    seen = []
    network.raw.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))

    def losses(output, labels, **options):
        terms = classification_losses(output, labels)
        seen.append(terms["raw"].dtype)
        return terms

    network.losses = losses
    execution = Execution(torch.device("cpu"), precision=precision)
    loader = make_loader(make_samples(4), batch_size=4)
    train_one_epoch(network, loader, *sgd(network), plan=EVERYTHING, execution=execution)
    assert seen == [HALF_PRECISIONS[precision], torch.float32]
    assert {p.dtype for p in network.parameters()} == {torch.float32}


@pytest.mark.parametrize("channels_last", [True, False])
def test_images_come_in_the_chosen_layout(channels_last):
    execution = Execution(torch.device("cpu"), channels_last=channels_last)
    images = execution.images(torch.rand(2, 3, 4, 5))
    assert images.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


# ---- Systems with several steps per batch ---------------------------------------------------------------------------


class Stepping(Toy):
    """Learns `object` from mirrored images, then `raw` from the images, whose pass sees the changed weights."""

    needs_labels = True

    def __init__(self) -> None:
        super().__init__()
        self.dropout.p = 0.0
        self.taken: list[tuple[str, ...]] = []

    def forward(self, images, *, labels=None, **options):
        if self.training:
            assert labels.shape[0] == images.shape[0]
        return super().forward(images, **options)

    def steps(self, images, labels):
        yield Step(images.flip(-1), labels, ("object",))
        yield Step(torch.cat([images, images]), torch.cat([labels, labels]), ("raw",), ("raw",))

    def after_step(self, output, targets):
        assert not torch.is_grad_enabled()
        self.taken.append(tuple(output.logits))


def make_stepping() -> Stepping:
    torch.manual_seed(0)
    return Stepping()


class Watched(Toy):
    """Has a figure of its own beside its losses: how sure `raw` is."""

    loss_weights = {**Toy.loss_weights, "sureness": 0.0}

    def losses(self, output, targets, *, label_smoothing=0.0):
        sureness = output.logits["raw"].softmax(dim=1).amax(dim=1).mean()
        return {**super().losses(output, targets, label_smoothing=label_smoothing), "sureness": sureness}


@pytest.mark.parametrize("plan", [EVERYTHING, WARM_UP], ids=["all", "warm-up"])
def test_a_term_without_weight_is_averaged_and_not_trained(plan):
    torch.manual_seed(0)
    network, plain = Watched(), make_network()
    loader, options = make_loader(make_samples(11), batch_size=4), {"plan": plan, "execution": CPU}
    averages = []
    for learner in (network, plain):
        torch.manual_seed(5)
        averages.append(train_one_epoch(learner, loader, *sgd(learner), **options))
    assert_same_state(network, plain)
    for figures in averages:
        del figures["images_per_second"]
    assert 1 / 3 < averages[0].pop("loss/sureness") < 1
    assert averages[0] == averages[1]

    evaluated = evaluate(network, loader, **options)["loss/sureness"]
    with torch.no_grad():
        logits = [plain.eval()(batch.images.to(memory_format=torch.channels_last)).logits["raw"] for batch in loader]
    assert evaluated == pytest.approx(torch.cat(logits).softmax(dim=1).amax(dim=1).mean().item(), rel=1e-6)


@pytest.mark.parametrize("absent", [True, False])
def test_several_steps_equal_the_loop_written_out(absent):
    loader = make_loader(make_samples(10), batch_size=4)
    network, reference = make_stepping(), make_stepping()
    network.absent_gradients = absent
    averages = train_one_epoch(network, loader, *sgd(network), plan=EVERYTHING, execution=CPU)

    optimizer, schedule = sgd(reference)
    sums = {"loss/object": 0.0, "loss/raw": 0.0, "loss/total": 0.0, "accuracy/object": 0, "accuracy/raw": 0}
    for batch in loader:
        for name, weight, images, labels in (
            ("object", 0.5, batch.images.flip(-1), batch.labels),
            ("raw", 1.0, torch.cat([batch.images] * 2), torch.cat([batch.labels] * 2)),
        ):
            branches = ("raw", "object") if name == "object" else ("raw",)
            images = images.contiguous(memory_format=torch.channels_last)
            logits = Toy.forward(reference, images, branches=branches).logits[name]
            loss = F.cross_entropy(logits, labels)
            optimizer.zero_grad(set_to_none=absent)
            (weight * loss).backward()
            optimizer.step()
            sums[f"loss/{name}"] += loss.item() * len(batch.labels)
            sums["loss/total"] += weight * loss.item() * len(batch.labels)
            sums[f"accuracy/{name}"] += (logits.argmax(1) == labels).double().mean().item() * len(batch.labels)
        schedule.step()
    assert_same_state(network, reference)
    assert averages.pop("images_per_second") > 0
    assert averages == pytest.approx({name: value / 10 for name, value in sums.items()} | {"images": 10}, rel=1e-6)
    assert network.taken == [("raw", "object"), ("raw",)] * 3


@pytest.mark.parametrize("momentum", [0.9, 0.0])
@pytest.mark.parametrize("absent", [True, False])
def test_several_steps_go_on_bit_for_bit_after_a_stop(absent, momentum):
    """With gradients that are zero and not absent, what was reached before moves from the first step on."""
    samples, whole, stopped = make_samples(12), make_stepping(), make_stepping()
    whole.absent_gradients = stopped.absent_gradients = absent
    train_one_epoch(whole, make_loader(samples, 4), *sgd(whole, momentum), plan=EVERYTHING, execution=CPU)

    first, (optimizer, schedule) = make_loader(samples[:4], 4), sgd(stopped, momentum)
    train_one_epoch(stopped, first, optimizer, schedule, plan=EVERYTHING, execution=CPU)
    again = make_stepping()
    again.absent_gradients = absent
    again.load_state_dict(stopped.state_dict())
    rest = sgd(again, momentum)
    for new, old in zip(rest, (optimizer, schedule), strict=True):
        new.load_state_dict(copy.deepcopy(old.state_dict()))
    options = {"plan": EVERYTHING, "execution": CPU, "first_step": 2}
    train_one_epoch(again, make_loader(samples[4:], 4), *rest, **options)
    assert_same_state(again, whole)


def test_a_step_without_a_trained_term_is_not_taken():
    network = make_stepping()
    plan = EVERYTHING._replace(loss_weights={"raw": 1.0})
    averages = train_one_epoch(network, make_loader(make_samples(4), 4), *sgd(network), plan=plan, execution=CPU)
    assert network.taken == [("raw",)]
    assert averages["images"] == 4
    assert "loss/object" not in averages


def test_a_step_may_name_a_term_that_this_epoch_neither_trains_nor_computes():
    network = make_stepping()
    network.steps = lambda images, labels: iter([Step(images, labels, ("raw", "object"))])
    plan = EVERYTHING._replace(loss_weights={"raw": 1.0}, branches=("raw",))
    averages = train_one_epoch(network, make_loader(make_samples(4), 4), *sgd(network), plan=plan, execution=CPU)
    assert network.taken == [("raw",)]
    assert averages["loss/total"] == averages["loss/raw"]


def test_a_step_that_trains_a_term_which_its_losses_lack_is_a_fault():
    network = make_stepping()
    network.steps = lambda images, labels: iter([Step(images, labels, ("object",), ("raw",))])
    with pytest.raises(UserError, match="has a loss term object and only a weight of it"):
        train_one_epoch(network, make_loader(make_samples(4), 4), *sgd(network), plan=EVERYTHING, execution=CPU)


def test_of_several_steps_only_the_broken_one_is_skipped():
    network, reference = make_stepping(), make_stepping()
    losses = network.losses

    def broken(output, targets, **options):
        terms = losses(output, targets, **options)
        return {**terms, "object": terms["object"] * math.nan} if "object" in terms else terms

    network.losses = broken
    budget = SkipBudget(1)
    loader = make_loader(make_samples(4), 4)
    train_one_epoch(network, loader, *sgd(network), plan=EVERYTHING, execution=CPU, skip_nonfinite=budget)
    assert budget.used == 1
    plan = EVERYTHING._replace(loss_weights={"raw": 1.0})
    train_one_epoch(reference, loader, *sgd(reference), plan=plan, execution=CPU)
    assert_same_state(network, reference)


def test_of_several_processes_the_first_broken_step_is_told(monkeypatch):
    others = [(9, ["total"], ["c.jpg"]), (7, ["raw"], ["d.jpg"]), (8, [], [])]
    monkeypatch.setattr(nonfinite, "any_process", lambda flag, device: True)
    monkeypatch.setattr(nonfinite, "gather", lambda own: [own, *others])
    with pytest.raises(NonFiniteLossError) as stop:
        check_losses([StepLosses(8, ["raw", "total"], torch.tensor([math.nan, 1.0]), ["a.jpg"])], None)
    assert (stop.value.step, stop.value.terms, stop.value.paths) == (7, ["raw"], ["d.jpg"])


def test_a_statistic_that_is_not_finite_is_found():
    network = make_network()
    network.norm.running_var[0] = math.inf
    with pytest.raises(NonFiniteLossError, match="weights are no longer finite after step 3"):
        check_weights(network, 3)


def test_losses_not_read_yet_are_read_at_the_end_of_an_epoch(monkeypatch):
    """As on a GPU: the step is told, with its images, and not only that the weights are broken."""
    monkeypatch.setattr(learning, "steps_between_readings", lambda device: 10)
    network, calls = make_network(), []

    def losses(output, labels, **options):
        calls.append(1)
        terms = classification_losses(output, labels)
        return terms | {"object": terms["object"] * math.nan} if len(calls) == 2 else terms

    network.losses = losses
    loader = make_loader(make_samples(12), batch_size=4)
    with pytest.raises(NonFiniteLossError) as stop:
        train_one_epoch(network, loader, *sgd(network), plan=EVERYTHING, execution=CPU)
    assert (stop.value.step, stop.value.paths) == (2, ["4", "5", "6", "7"])


# ---- Evaluation -----------------------------------------------------------------------------------------------------


def _evaluate(network, loader, **options):
    shared = {"plan": EVERYTHING, "execution": CPU}
    return evaluate(network, loader, **shared | options)


def _overlap(a, b) -> float:
    width = max(min(a[2], b[2]) - max(a[0], b[0]), 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return width * height / (sum(areas) - width * height)


@pytest.mark.parametrize("image_size", [SIZE, 2 * SIZE, 3 * SIZE])
def test_figures_equal_direct_computation_over_uneven_batches(image_size):
    samples = make_samples(11, size=image_size)
    network = make_network()
    figures = _evaluate(network, make_loader(samples, batch_size=4))
    speed = figures.pop("images_per_second")
    assert speed > 0

    expected = {"loss/raw": 0.0, "loss/object": 0.0, "accuracy/raw": 0, "accuracy/object": 0, "accuracy/prediction": 0}
    overlaps = []
    network.eval()
    for sample in samples:  # one by one
        with torch.no_grad():
            output = network(sample.image[None])
        probabilities = []
        for name in ("raw", "object"):
            p = output.logits[name][0].softmax(dim=0)
            probabilities.append(p)
            expected[f"loss/{name}"] -= p[sample.label].log().item() / 11
            expected[f"accuracy/{name}"] += (p.argmax() == sample.label).item() / 11
        expected["accuracy/prediction"] += (sum(probabilities).argmax() == sample.label).item() / 11
        x0, y0, x1, y1 = output.object_boxes[0].tolist()
        true = [edge * SIZE / image_size for edge in sample.box.tolist()]
        overlaps.append(_overlap((x0, y0, x1 + 1, y1 + 1), true))
    expected["loss/total"] = expected["loss/raw"] + 0.5 * expected["loss/object"]
    expected["box_iou/mean"] = sum(overlaps) / 11
    expected["box_iou/share_at_0.5"] = sum(overlap >= 0.5 for overlap in overlaps) / 11
    assert figures == pytest.approx({**expected, "images": 11}, rel=1e-5)
    assert expected["box_iou/mean"] > 0


def test_without_a_trained_term_there_is_no_total():
    """Where only a branch is trained that evaluation leaves out."""
    plan = EVERYTHING._replace(loss_weights={"jigsaw": 1.0})
    figures = _evaluate(make_network(), make_loader(make_samples(4), batch_size=4), plan=plan)
    assert "loss/total" not in figures
    assert {"loss/raw", "loss/object", "accuracy/prediction"} <= figures.keys()


def test_evaluation_changes_nothing():
    network = make_network()
    before = copy.deepcopy(network.state_dict())
    _evaluate(network.train(), make_loader(make_samples(7), batch_size=3))
    assert not network.training
    assert not any(module.training for module in network.modules())
    assert all(p.grad is None and p.requires_grad for p in network.parameters())
    after = network.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    train_one_epoch(  # and training goes on after it
        network,
        make_loader(make_samples(4), batch_size=4),
        *sgd(network),
        plan=EVERYTHING,
        execution=CPU,
    )
    assert network.training


def test_evaluation_does_not_touch_the_random_numbers_of_training():
    network = make_network()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    loader = make_loader(make_samples(7), batch_size=3)
    loader.generator = torch.Generator()  # a loader draws a seed for its workers: from the global numbers, by default
    _evaluate(network, loader)
    assert torch.equal(torch.rand(4), expected)


def test_all_branches_are_evaluated_even_in_warm_up():
    network = make_network()
    plan = WARM_UP._replace(mask_background=True)
    figures = _evaluate(network, make_loader(make_samples(5), batch_size=5), plan=plan)
    call = {"mask_background": True, "branches": ("raw", "object"), "shape": (5, 3, SIZE, SIZE)}
    assert network.calls == [call]
    assert figures["loss/total"] == figures["loss/raw"]
    assert {"accuracy/raw", "accuracy/object", "accuracy/prediction", "loss/object"} <= figures.keys()


def test_branches_that_only_serve_training_are_not_evaluated_unless_asked_for():
    network = make_network()
    network.evaluated, network.prediction = ("raw",), ("raw",)
    loader = make_loader(make_samples(5), batch_size=5)
    figures = _evaluate(network, loader)
    assert network.calls[-1]["branches"] == ("raw",)
    assert figures["loss/total"] == figures["loss/raw"]
    assert not {"accuracy/object", "loss/object"} & figures.keys()
    figures = _evaluate(network, loader, branches=("object",))
    assert network.calls[-1]["branches"] == ("object", "raw")  # what the prediction needs is always among them
    assert figures["loss/total"] == pytest.approx(figures["loss/raw"] + 0.5 * figures["loss/object"])


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_the_overlap_is_that_of_images_with_a_true_box_however_they_are_batched(batch_size):
    samples = make_samples(8)
    some = [sample._replace(box=None) if index in (2, 3, 6) else sample for index, sample in enumerate(samples)]
    known = [sample for sample in some if sample.box is not None]
    figures, expected = (_evaluate(make_network(), make_loader(s, batch_size=batch_size)) for s in (some, known))
    assert figures["images"] == 8 and expected["images"] == 5
    for name in ("box_iou/mean", "box_iou/share_at_0.5"):
        assert figures[name] == pytest.approx(expected[name], rel=1e-6)
    assert expected["box_iou/mean"] > 0


@pytest.mark.parametrize(("network_boxes", "true_boxes"), [(False, True), (True, False), (False, False)])
def test_no_overlap_without_both_boxes(network_boxes, true_boxes):
    network = make_network(boxes=network_boxes)
    figures = _evaluate(network, make_loader(make_samples(5, boxes=true_boxes), batch_size=2))
    assert not [name for name in figures if name.startswith("box_iou")]


def test_on_batch_sees_every_batch_with_its_prediction():
    seen = []
    network = make_network()

    def collect(batch, output, prediction):
        assert torch.equal(prediction, network.predict_logits(output))
        assert prediction.shape == (len(batch.labels), 3)
        seen.extend(batch.paths)

    _evaluate(network, make_loader(make_samples(7), batch_size=3), on_batch=collect)
    assert seen == [str(index) for index in range(7)]


def test_evaluation_of_no_image_at_all_ends():
    """Under torchrun a process's share of a small validation set can be empty."""
    figures = _evaluate(make_network(), make_loader([], batch_size=3))
    assert figures["images"] == 0
