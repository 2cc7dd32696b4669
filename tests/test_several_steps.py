"""Systems that take several steps per batch, against loops written out by hand."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from toy_system import (
    CPU,
    EVERYTHING,
    WARM_UP,
    Toy,
    assert_same_state,
    make_loader,
    make_network,
    make_samples,
    make_stepping,
    sgd,
)

from networks.losses import classification_losses
from networks.system import Step
from utils.errors import UserError
from utils.training import learning, nonfinite
from utils.training.engine import evaluate, train_one_epoch
from utils.training.nonfinite import NonFiniteLossError, SkipBudget, StepLosses, check_losses, check_weights


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
