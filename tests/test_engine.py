"""Training of one epoch, against loops written out by hand."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from toy_system import CPU, EVERYTHING, SIZE, WARM_UP, assert_same_state, make_loader, make_network, make_samples, sgd

from networks.losses import classification_losses
from utils.reporting.metrics import EpochMeter
from utils.training.engine import train_one_epoch
from utils.training.execution import HALF_PRECISIONS, Execution
from utils.training.nonfinite import NonFiniteLossError, StepLosses, check_losses


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
