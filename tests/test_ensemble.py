"""The ensembling `learned`: its solver against a grid search, and what a system predicts with the weights."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from test_system import LABELS, Toy, make_images
from torch import Tensor

from networks import build_network
from networks.outputs import NetworkOutput, combine_logits, early_prediction
from utils.reporting.report_text import ensembled_text, weights_of_branches
from utils.training import ensemble, kept_logits
from utils.training.averaging import Average
from utils.training.ensemble import EnsembleLearning, fit_weights

pytestmark = pytest.mark.usefixtures("thin_trunk")


def made_up(seed: int, branches: int, images: int = 40, classes: int = 4) -> tuple[Tensor, Tensor]:
    """Log-probabilities [K, n, classes] of branches that know less and less of the labels [n], and are ever surer."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (images,), generator=generator)
    shared = torch.randn(images, classes, generator=generator)  # in which all are wrong together
    logits = []
    for number in range(branches):
        noise = torch.randn(images, classes, generator=generator)
        logits.append((2 / (number + 1) * F.one_hot(labels, classes) + shared + noise) * (1 + number))
    return torch.stack(logits).log_softmax(-1), labels


def slow_objective(weights: list[float], log_probabilities: list, labels: list[int]) -> float:
    """Cross-entropies image by image and the prior, in plain Python."""
    total = sum((weight - 1 / len(weights)) ** 2 for weight in weights) / 2
    for image, label in enumerate(labels):
        classes = range(len(log_probabilities[0][image]))
        logits = [
            sum(w * branch[image][c] for w, branch in zip(weights, log_probabilities, strict=True)) for c in classes
        ]
        total += math.log(sum(math.exp(logit) for logit in logits)) - logits[label]
    return total


def objective_of_many(weights: Tensor, log_probabilities: Tensor, labels: Tensor) -> Tensor:
    """The same of weights [m, K] at once -> [m]."""
    logits = torch.einsum("mk,knc->mcn", weights, log_probabilities.double())
    prior = (weights - 1 / weights.shape[1]).square().sum(1) / 2
    return F.cross_entropy(logits, labels.expand(len(weights), -1), reduction="none").sum(1) + prior


def grid_search(log_probabilities: Tensor, labels: Tensor) -> Tensor:
    """The best of a grid of weights, again and again on a finer one round it."""
    best, side = torch.full((len(log_probabilities),), 4.0, dtype=torch.float64), 4.0
    steps = torch.linspace(-1, 1, 9, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(*[steps] * len(best), indexing="ij"), dim=-1).flatten(0, -2)
    while side > 1e-6:
        tried = (best + side * grid).clamp(min=0)
        best = tried[objective_of_many(tried, log_probabilities, labels).argmin()]
        side *= 0.7
    return best


# ---- The solver ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seed", "branches"), [*itertools.product(range(4), (1, 2, 3))])
def test_the_weights_are_those_of_a_grid_search(seed: int, branches: int) -> None:
    log_probabilities, labels = made_up(seed, branches)
    found = fit_weights(log_probabilities, labels)
    assert found.dtype == torch.float64
    assert (found >= 0).all()
    torch.testing.assert_close(found, grid_search(log_probabilities, labels), rtol=0, atol=1e-4)


def test_no_weights_nearby_are_better() -> None:
    log_probabilities, labels = made_up(7, 4, images=15)
    found = fit_weights(log_probabilities, labels)
    plain = (log_probabilities.double().tolist(), labels.tolist())
    lowest = slow_objective(found.tolist(), *plain)
    assert lowest == pytest.approx(objective_of_many(found[None], log_probabilities, labels).item(), rel=1e-12)
    for branch, change in itertools.product(range(4), (-0.01, 0.01)):
        weights = [max(w + change * (branch == b), 0.0) for b, w in enumerate(found.tolist())]
        assert slow_objective(weights, *plain) >= lowest


def test_the_order_of_images_does_not_matter_and_the_result_is_always_the_same() -> None:
    log_probabilities, labels = made_up(3, 4)
    found = fit_weights(log_probabilities, labels)
    assert torch.equal(found, fit_weights(log_probabilities, labels))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(fit_weights(log_probabilities[:, order], labels[order]), found, rtol=0, atol=1e-7)


def test_noise_has_no_weight_and_copies_share_theirs() -> None:
    (good, _, _), labels = made_up(0, 3, images=2000)
    noise = 3 * torch.randn(good.shape, generator=torch.Generator().manual_seed(1))
    found = fit_weights(torch.stack([good, noise.log_softmax(-1), good]), labels)
    assert found[1] < 0.02
    assert found[0] == pytest.approx(found[2].item(), abs=1e-6) and found[0] > 0.2
    wrong = fit_weights(torch.stack([good, (-good).log_softmax(-1)]), labels)
    assert wrong[1] == 0


def test_weights_stay_finite_where_all_images_are_right_or_a_branch_is_very_sure() -> None:
    labels = torch.tensor([0, 1, 2])
    right = 30 * F.one_hot(labels, 3).double()
    found = fit_weights(torch.stack([right, right / 20]).log_softmax(-1), labels)
    assert found.isfinite().all() and (found < 5).all()
    certain = 1000 * torch.eye(3)[[1, 2, 0]]  # of the wrong class
    found = fit_weights(torch.stack([certain, right.float()]).log_softmax(-1), labels)
    assert 0 <= found[0] < 0.01 and 0.3 < found[1] < 5


def test_branches_that_are_all_worse_than_a_guess_count_alike() -> None:
    labels = torch.tensor([0, 1, 2] * 50)
    wrong = (-9.0 * F.one_hot(labels, 3)).log_softmax(-1)
    assert fit_weights(torch.stack([wrong, wrong]), labels).tolist() == [0.5, 0.5]
    assert fit_weights(torch.empty(4, 0, 3), torch.empty(0, dtype=torch.long)).tolist() == [0.25] * 4


# ---- What is predicted --------------------------------------------------------------------------------------------


def test_equal_weights_are_the_mean_of_log_probabilities() -> None:
    system = Toy().eval()
    output = system(make_images(96))
    mean = (output.logits["raw"].log_softmax(-1) + output.logits["peak"].log_softmax(-1)) / 2
    system.ensembling = "learned"
    torch.testing.assert_close(system.predict_logits(output), mean)
    system.ensemble_weights = torch.tensor([0.5, 0.5])
    torch.testing.assert_close(system.predict_logits(output), mean)
    system.ensemble_weights = torch.tensor([0.0, 2.0])
    torch.testing.assert_close(system.predict_logits(output), 2 * output.logits["peak"].log_softmax(-1))


def test_built_networks_hold_equal_weights_where_several_branches_are_ensembled() -> None:
    with torch.device("meta"):
        shared = {"num_classes": 3, "backbone": "resnet18", "input_size": 96}
        network = build_network("sgkrl", ensembling="learned", **shared)
        assert network.state_dict()["ensemble_weights"].shape == (4,)
        for options in ({"prediction": ("object",), "ensembling": "learned"}, {"ensembling": "mean_logits"}):
            assert "ensemble_weights" not in build_network("sgkrl", **options, **shared).state_dict()
    network = build_network("mmal", ensembling="learned", prediction=("raw", "object"), **shared)
    assert weights_of_branches(network) == {"raw": 0.5, "object": 0.5}
    network.ensemble_weights = torch.tensor([0.25, 1.5])
    text = "weighted sum of the log-probabilities of raw (0.25), object (1.50)"
    assert ensembled_text(network, 1, None) == text
    assert ensembled_text(network, 2, ["mirror"]) == text + ", over 2 views (mirror)"


def test_three_crops_have_the_weight_of_one() -> None:
    network = build_network(
        "cal", num_classes=3, backbone="resnet18", input_size=96, ensembling="learned", prediction=("raw", "crop")
    ).eval()
    network.ensemble_weights.copy_(torch.tensor([0.3, 0.9]))
    network.use_own_view("three_crops")
    with torch.no_grad():
        output = network(make_images(96))
    raw, crop = (output.logits[name].log_softmax(-1) for name in ("raw", "crop"))
    torch.testing.assert_close(network.predict_logits(output), 0.3 * raw + 0.9 * crop)


WEIGHTS = torch.tensor([0.1, 0.0, 0.7, 1.2])
BRANCHES = ("raw", "fused", "object", "graph")


def test_without_windows_the_other_branches_predict_by_their_shares() -> None:
    logits = {name: torch.randn(5, 3, generator=torch.Generator().manual_seed(n)) for n, name in enumerate(BRANCHES)}
    found = early_prediction(logits, BRANCHES, "learned", WEIGHTS)
    expected = 0.125 * logits["raw"].log_softmax(-1) + 0.875 * logits["object"].log_softmax(-1)
    torch.testing.assert_close(found, expected)
    # `graph` repeats it where an image exits early: as sure as the sum of all weights
    total = combine_logits(torch.stack([logits["raw"], logits["fused"], logits["object"], found]), "learned", WEIGHTS)
    torch.testing.assert_close(total.softmax(-1), (2.0 * expected).softmax(-1))
    nothing = early_prediction(logits, BRANCHES, "learned", torch.tensor([0.0, 0.0, 0.0, 1.0]))
    torch.testing.assert_close(nothing, early_prediction(logits, BRANCHES, "learned"))
    assert torch.equal(early_prediction(logits, ("graph",), "learned"), logits["object"])


@torch.no_grad()
def test_images_that_exit_early_are_predicted_by_the_branches_before_the_windows() -> None:
    torch.manual_seed(3)
    network = build_network(
        "sgkrl", num_classes=4, backbone="resnet18", input_size=96, windows=((((6, 6),), 2),), ensembling="learned"
    ).eval()
    network.ensemble_weights.copy_(WEIGHTS)
    assert network.prediction == BRANCHES
    images = make_images(96)
    early = early_prediction(network(images).logits, BRANCHES, "learned", WEIGHTS)
    network.exit_threshold = 0.0  # all exit
    output = network(images)
    torch.testing.assert_close(output.logits["graph"], early)
    torch.testing.assert_close(network.predict_logits(output).softmax(-1), (2.0 * early).softmax(-1))


# ---- Where they are learnt ----------------------------------------------------------------------------------------


def test_weights_are_learnt_from_collected_batches() -> None:
    system = Toy().eval()
    system.ensembling, system.ensemble_weights = "learned", torch.tensor([0.5, 0.5])
    log_probabilities, labels = made_up(2, 2, classes=5)
    logits = log_probabilities + torch.randn(2, len(labels), 1, generator=torch.Generator().manual_seed(5))
    learning = EnsembleLearning(system)
    for part in (slice(0, 16), slice(16, 40)):
        learning.add(NetworkOutput({"raw": logits[0, part], "peak": logits[1, part]}), labels[part])
    figures = learning.finish()
    expected = fit_weights(log_probabilities, labels).float()
    torch.testing.assert_close(system.ensemble_weights, expected)
    right = (expected[:, None, None] * log_probabilities).sum(0).argmax(1) == labels
    assert figures == {
        "accuracy/prediction": pytest.approx(right.double().mean().item()),
        "ensemble_weight/raw": pytest.approx(expected[0].item()),
        "ensemble_weight/peak": pytest.approx(expected[1].item()),
    }


def test_of_very_many_images_evenly_spread_ones_teach_the_weights_and_all_are_counted(monkeypatch) -> None:
    system = Toy().eval()
    system.ensembling, system.ensemble_weights = "learned", torch.tensor([0.5, 0.5])
    log_probabilities, labels = made_up(2, 2, classes=5)
    monkeypatch.setattr(kept_logits, "PART", 2 * 5 * 16)
    monkeypatch.setattr(ensemble, "LEARNT_FROM", 2 * 5 * 40 / 2)
    learning = EnsembleLearning(system)
    for part in (slice(0, 16), slice(16, 30), slice(30, 40)):
        raw, peak = log_probabilities[:, part]
        learning.add(NetworkOutput({"raw": raw, "peak": peak}), labels[part])
    figures = learning.finish()
    expected = fit_weights(log_probabilities[:, ::2], labels[::2]).float()
    torch.testing.assert_close(system.ensemble_weights, expected)
    right = (expected[:, None, None] * log_probabilities).sum(0).argmax(1) == labels
    assert figures["accuracy/prediction"] == pytest.approx(right.double().mean().item())


def test_broken_logits_change_no_weights() -> None:
    system = Toy().eval()
    system.ensembling, system.ensemble_weights = "learned", torch.tensor([0.25, 0.5])
    learning = EnsembleLearning(system)
    learning.add(NetworkOutput({"raw": torch.full((2, 5), math.nan), "peak": torch.ones(2, 5)}), LABELS)
    learning.finish()
    assert system.ensemble_weights.tolist() == [0.25, 0.5]


def test_an_average_keeps_its_own_weights_of_branches() -> None:
    system = Toy()
    system.ensemble_weights = torch.tensor([0.5, 0.5])
    average = Average(system, 0.9)
    average.module.ensemble_weights.copy_(torch.tensor([0.1, 0.2]))
    system.ensemble_weights.copy_(torch.tensor([1.0, 2.0]))
    for _ in range(3):
        average.update_parameters(system)
    torch.testing.assert_close(average.module.ensemble_weights, torch.tensor([0.1, 0.2]))
    assert system.ensemble_weights.tolist() == [1.0, 2.0]
