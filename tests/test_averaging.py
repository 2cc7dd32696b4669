"""The moving average of the weights, against formulas and torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from toy_system import CPU, EVERYTHING, make_loader, make_network, make_samples, make_stepping, sgd

from utils.training.averaging import Average, build_averaged_network
from utils.training.engine import train_one_epoch
from utils.training.replicas import Replicas


class Counting(nn.Module):
    """A weight, statistics, indices that never change and a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, -2.0]))
        self.register_buffer("statistics", torch.tensor([0.5]))
        self.register_buffer("indices", torch.arange(100))
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("counter", torch.tensor(0))

    def move(self, step: int) -> None:
        with torch.no_grad():
            self.weight += torch.tensor([1.0, -0.5]) / (step + 1)
            self.statistics *= 1.5
            self.counter += 1


@pytest.mark.parametrize("decay", [0.0, 0.6, 0.99])
def test_an_average_equals_the_formula(decay):
    module = Counting()
    average = Average(module, decay)
    weight, statistics = [], []
    for step in range(12):
        module.move(step)
        average.update_parameters(module)
        share = min(decay, (1 + step) / (10 + step)) if step else 0.0  # it begins with the weights of the first step
        last = (weight[-1], statistics[-1]) if step else (0, 0)
        weight.append(share * last[0] + (1 - share) * module.weight.detach())
        statistics.append(share * last[1] + (1 - share) * module.statistics)
        torch.testing.assert_close(average.module.weight.detach(), weight[-1])
        torch.testing.assert_close(average.module.statistics, statistics[-1])
        for name in ("indices", "flags", "counter"):
            assert torch.equal(getattr(average.module, name), getattr(module, name)), name
    assert average.n_averaged == 12


def test_a_small_decay_is_torchs_average():
    module = Counting()
    ours = Average(module, 0.15)  # less than 2 / 11, so that it never rises
    theirs = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.15), use_buffers=True)
    for step in range(5):
        module.move(step)
        for average in (ours, theirs):
            average.update_parameters(module)
    assert torch.equal(ours.module.weight, theirs.module.weight)
    assert torch.equal(ours.module.statistics, theirs.module.statistics)


def test_a_saved_average_goes_on_bit_for_bit():
    modules = Counting(), Counting()
    whole, begun = (Average(module, 0.9) for module in modules)
    for step in range(10):
        if step == 4:
            state = begun.state_dict()
            begun = Average(modules[1], 0.9)
            begun.load_state_dict(state)
        for module, average in zip(modules, (whole, begun), strict=True):
            module.move(step)
            average.update_parameters(module)
    assert torch.equal(whole.module.weight, begun.module.weight)
    assert torch.equal(whole.module.statistics, begun.module.statistics)


def test_every_optimizer_step_is_averaged_and_changes_nothing_else():
    """Two of each batch; the weights learn as without an average."""
    loader = make_loader(make_samples(10), batch_size=4)
    network, alone = make_stepping(), make_stepping()
    average = Average(network, 0.9)
    options = {"plan": EVERYTHING, "execution": CPU}
    train_one_epoch(network, loader, *sgd(network), average=average, **options)
    train_one_epoch(alone, loader, *sgd(alone), **options)
    assert average.n_averaged == 6
    assert all(torch.equal(value, alone.state_dict()[name]) for name, value in network.state_dict().items())
    assert not torch.equal(average.module.raw.weight, network.raw.weight)


def test_an_average_is_evaluated_on_the_gpus_of_its_network():
    network = make_network()
    average = Average(network, 0.9)
    assert build_averaged_network(average, network) is average.module
    assert build_averaged_network(average, Replicas(network)).module is average.module
