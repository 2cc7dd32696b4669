"""Named loss terms: cross-entropy by hand, contrast and ranking against loops over single features and pairs."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from networks.losses import classification_losses, contrastive_loss, cross_entropies, cross_entropy, ranking_loss
from networks.outputs import NetworkOutput

LABELS = torch.tensor([0, 3, 4, 1])


def make_output(dtype: torch.dtype = torch.float32) -> NetworkOutput:
    generator = torch.Generator().manual_seed(0)
    raw, graph = (3 * torch.randn(4, 5, generator=generator) for _ in range(2))
    window = 3 * torch.randn(4, 7, 5, generator=generator)
    logits = {"raw": raw, "window": window, "graph": graph}
    return NetworkOutput({name: value.to(dtype) for name, value in logits.items()}, torch.zeros(4, 4))


def by_hand(logits: Tensor, label: int, label_smoothing: float) -> float:
    log_probabilities = (logits.double().exp() / logits.double().exp().sum()).log()
    return float(-(1 - label_smoothing) * log_probabilities[label] - label_smoothing * log_probabilities.mean())


@pytest.mark.parametrize("label_smoothing", (0.0, 0.1))
def test_terms_by_hand(label_smoothing: float) -> None:
    output = make_output()
    terms = classification_losses(output, LABELS, label_smoothing=label_smoothing)
    assert list(terms) == ["raw", "window", "graph"]
    for name in ("raw", "graph"):
        single = [
            by_hand(row, int(label), label_smoothing) for row, label in zip(output.logits[name], LABELS, strict=True)
        ]
        assert terms[name].item() == pytest.approx(sum(single) / 4, rel=1e-5)
        expected = F.cross_entropy(output.logits[name], LABELS, label_smoothing=label_smoothing)
        assert torch.equal(terms[name], expected)
    windows = output.logits["window"]
    single = [by_hand(windows[b, n], int(LABELS[b]), label_smoothing) for b in range(4) for n in range(7)]
    assert terms["window"].item() == pytest.approx(sum(single) / 28, rel=1e-5)


@pytest.mark.parametrize("label_smoothing", (0.0, 0.1))
def test_images_count_by_the_weight_of_their_class(label_smoothing: float) -> None:
    output, weights = make_output(), torch.tensor([0.5, 2.0, 9.0, 1.0, 0.25])
    terms = classification_losses(output, LABELS, label_smoothing=label_smoothing, class_weights=weights)
    for name, logits in output.logits.items():
        labels = LABELS.repeat_interleave(7) if name == "window" else LABELS
        rows = zip(logits.flatten(0, -2), labels, strict=True)
        single = [by_hand(row, int(label), label_smoothing) * weights[label] for row, label in rows]
        assert terms[name].item() == pytest.approx(float(sum(single) / len(single)), rel=1e-5)
    if not label_smoothing:  # with it, torch weights what the other classes get by theirs
        expected = torch.nn.CrossEntropyLoss(weight=weights, reduction="none")(output.logits["raw"], LABELS).mean()
        torch.testing.assert_close(terms["raw"], expected)


def test_a_common_class_stays_the_best_answer_under_class_weights_and_smoothing() -> None:
    """300 images of it and 10 of a rare one: what the loss of its images is lowest for."""
    weights, logits = torch.tensor([310 / 600, 310 / 20]), torch.zeros(1, 2, requires_grad=True)
    optimizer = torch.optim.SGD([logits], lr=0.5)
    for _ in range(400):
        optimizer.zero_grad()
        cross_entropy(logits, torch.tensor([0]), class_weights=weights, label_smoothing=0.1).backward()
        optimizer.step()
    assert logits.softmax(dim=1)[0, 0].item() == pytest.approx(0.95, abs=1e-3)


@pytest.mark.parametrize("label_smoothing", (0.0, 0.1))
def test_of_a_mixed_picture_classes_count_by_their_shares(label_smoothing: float) -> None:
    weights, logits = torch.tensor([0.5, 2.0, 9.0, 1.0, 0.25]), make_output().logits["raw"]
    given = {"class_weights": weights, "label_smoothing": label_smoothing}
    pure = F.one_hot(LABELS, 5).float()
    torch.testing.assert_close(cross_entropies(logits, pure, **given), cross_entropies(logits, LABELS, **given))
    other = LABELS.roll(1)
    mixed = cross_entropies(logits, 0.7 * pure + 0.3 * F.one_hot(other, 5), **given)
    expected = 0.7 * cross_entropies(logits, LABELS, **given) + 0.3 * cross_entropies(logits, other, **given)
    torch.testing.assert_close(mixed, expected)


@pytest.mark.parametrize("parts", (1, 2, 4))
def test_class_weights_do_the_same_in_parts_of_a_batch(parts: int) -> None:
    """As gradients are accumulated, or computed by several processes: each part counts by its images."""
    output, weights = make_output(), torch.tensor([0.5, 2.0, 9.0, 1.0, 0.25])
    whole = classification_losses(output, LABELS, class_weights=weights)
    sums = dict.fromkeys(whole, 0.0)
    for rows in torch.arange(4).chunk(parts):
        part = NetworkOutput({name: logits[rows] for name, logits in output.logits.items()})
        terms = classification_losses(part, LABELS[rows], class_weights=weights)
        sums = {name: value + terms[name] * len(rows) / 4 for name, value in sums.items()}
    torch.testing.assert_close(sums, whole)


def test_labels_may_be_shares_of_classes() -> None:
    output, shares = make_output(), torch.rand(4, 5, generator=torch.Generator().manual_seed(1)).softmax(dim=1)
    terms = classification_losses(output, shares)
    for name, logits in output.logits.items():
        log_probabilities = logits.log_softmax(dim=-1)
        each = -(log_probabilities * (shares[:, None] if name == "window" else shares)).sum(dim=-1)
        torch.testing.assert_close(terms[name], each.mean())
    whole = classification_losses(output, F.one_hot(LABELS, 5).float(), label_smoothing=0.1)
    for name, value in classification_losses(output, LABELS, label_smoothing=0.1).items():
        torch.testing.assert_close(whole[name], value)


def test_smoothing_is_off_by_default() -> None:
    output = make_output()
    assert classification_losses(output, LABELS) == classification_losses(output, LABELS, label_smoothing=0.0)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_terms_are_float32_whatever_the_logits(dtype: torch.dtype) -> None:
    low = classification_losses(make_output(dtype), LABELS)
    for name, logits in make_output(dtype).logits.items():
        assert low[name].dtype == torch.float32
        same = NetworkOutput({name: logits.float()})
        assert torch.equal(low[name], classification_losses(same, LABELS)[name])


def test_gradient_of_a_branch_comes_from_its_own_term() -> None:
    output = make_output()
    for logits in output.logits.values():
        logits.requires_grad_()
    terms = classification_losses(output, LABELS)
    terms["window"].backward()
    assert output.logits["raw"].grad is None
    gradient = output.logits["window"].grad
    expected = (output.logits["window"].softmax(-1) - F.one_hot(LABELS, 5)[:, None]) / 28
    torch.testing.assert_close(gradient, expected.detach())


def test_one_image_and_one_window() -> None:
    output = NetworkOutput({"raw": torch.zeros(1, 4), "window": torch.zeros(1, 1, 4)})
    terms = classification_losses(output, torch.tensor([2]))
    assert terms["raw"].item() == pytest.approx(torch.tensor(4.0).log().item())
    assert terms["window"].item() == pytest.approx(torch.tensor(4.0).log().item())


# ---- contrast of the coarse features ------------------------------------------------------------------------------

BATCHES = {
    "pairs": [0, 0, 1, 1, 2, 2],
    "one class": [3, 3, 3, 3],
    "all different": [4, 0, 2, 1],
    "unequal": [1, 0, 1, 1, 2, 0, 1],
    "one pair among strangers": [0, 1, 2, 0, 3],
    "two images, one class": [5, 5],
    "two images, two classes": [5, 6],
    "one image": [2],
}


def contrast_one_by_one(features: Tensor, labels: list[int]) -> Tensor:
    """Anchor by anchor, positive by positive, negative by negative, of features `[B, P, D]`."""
    anchors = [(image, module) for image in range(features.shape[0]) for module in range(features.shape[1])]
    vectors = {(i, p): features[i, p] / features[i, p].pow(2).sum().sqrt() for i, p in anchors}
    means: dict[str, list[Tensor]] = {"SASC": [], "SADC": [], "DASC": []}
    for anchor in anchors:
        sets: dict[str, list[tuple[int, int]]] = {"SASC": [], "SADC": [], "DASC": [], "DADC": []}
        for other in anchors:
            if other != anchor:
                attention = "SA" if other[1] == anchor[1] else "DA"
                sets[attention + ("SC" if labels[other[0]] == labels[anchor[0]] else "DC")].append(other)
        for name, against in (("SASC", ("SADC", "DASC", "DADC")), ("SADC", ("DADC",)), ("DASC", ("DADC",))):
            losses = []
            for positive in sets[name]:
                total = torch.ones((), dtype=features.dtype)
                for negative in [other for relation in against for other in sets[relation]]:
                    closer = vectors[anchor] @ vectors[negative] - vectors[anchor] @ vectors[positive]
                    total = total + closer.exp()
                losses.append(total.log())
            if losses:
                means[name].append(sum(losses) / len(losses))
    return sum((sum(values) / len(values) for values in means.values() if values), features.sum() * 0)


def random_features(batch: int, modules: int, *, seed: int = 0, length: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(batch, modules, length, generator=generator, dtype=torch.float64) + 0.3


@pytest.mark.parametrize("modules", (1, 2, 3))
@pytest.mark.parametrize("composition", BATCHES)
def test_contrast_equals_reference(composition: str, modules: int) -> None:
    labels = BATCHES[composition]
    features = random_features(len(labels), modules, seed=modules).requires_grad_()
    expected = contrast_one_by_one(features, labels)
    (expected_gradient,) = torch.autograd.grad(expected, features)
    result = contrastive_loss(features, torch.tensor(labels))
    assert result.shape == () and result.dtype == torch.float32
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(result, features)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6)


def test_contrast_has_the_slope_of_finite_differences() -> None:
    labels, step = [1, 0, 1, 2], 1e-6
    features = random_features(len(labels), 2, seed=3, length=3)
    slopes = torch.zeros_like(features)
    for index in range(features.numel()):
        shift = torch.zeros_like(features)
        shift.view(-1)[index] = step
        above, below = (contrast_one_by_one(features + sign * shift, labels) for sign in (1, -1))
        slopes.view(-1)[index] = (above - below) / (2 * step)
    features.requires_grad_()
    contrastive_loss(features, torch.tensor(labels)).backward()
    torch.testing.assert_close(features.grad, slopes, rtol=1e-4, atol=1e-6)


def test_contrast_by_hand() -> None:
    same = torch.ones(4, 2, 3)
    # Seen from each of eight features: one positive, six others; two of the same module, two of neither; two, two.
    expected = math.log(1 + 6) + math.log(1 + 2) + math.log(1 + 2)
    assert contrastive_loss(same, torch.tensor([0, 0, 1, 1])).item() == pytest.approx(expected, rel=1e-5)
    # One class, a direction of its own for each module: two negatives at cosine 0, a positive at 1; nothing else.
    modules = torch.eye(2).expand(2, 2, 2)
    assert contrastive_loss(modules, torch.tensor([1, 1])).item() == pytest.approx(math.log1p(2 / math.e), rel=1e-5)
    # Opposite classes in one module: a positive at 1 and two negatives at -1; without a second module no other term.
    classes = torch.tensor([1.0, 1, -1, -1]).view(4, 1, 1)
    expected = math.log1p(2 * math.exp(-2))
    assert contrastive_loss(classes, torch.tensor([0, 0, 1, 1])).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("labels", "modules"), (([2], 1), ([2], 2), ([2], 3), ([5, 5], 1), ([5, 6], 1), ([4, 0, 2, 1], 1)), ids=str
)
def test_contrast_without_anything_to_compare_is_zero(labels: list[int], modules: int) -> None:
    features = random_features(len(labels), modules).requires_grad_()
    loss = contrastive_loss(features, torch.tensor(labels))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(features.grad, torch.zeros_like(features))


def test_contrast_knows_neither_order_nor_names() -> None:
    labels, features = torch.tensor(BATCHES["unequal"]), random_features(7, 3)
    expected = contrastive_loss(features, labels)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(4))
    for same in (
        contrastive_loss(features[order], labels[order]),
        contrastive_loss(features[:, [2, 0, 1]], labels),
        contrastive_loss(features, torch.tensor([30, 7, 199])[labels]),
    ):
        torch.testing.assert_close(same, expected, rtol=1e-5, atol=1e-6)
    assert (contrastive_loss(features, labels[order]) - expected).abs() > 1e-3  # labels of other images


def test_contrast_compares_directions_only() -> None:
    labels, features = torch.tensor(BATCHES["pairs"]), random_features(6, 2)
    lengths = torch.logspace(-4, 4, 12, dtype=torch.float64).view(6, 2, 1)
    torch.testing.assert_close(contrastive_loss(lengths * features, labels), contrastive_loss(features, labels))
    assert not torch.isclose(contrastive_loss(-features.abs(), labels), contrastive_loss(features, labels), rtol=1e-3)


def test_contrast_of_zero_features_is_finite() -> None:
    labels = torch.tensor([0, 0, 1, 1])
    features = torch.zeros(4, 2, 3, requires_grad=True)
    loss = contrastive_loss(features, labels)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(7) + 2 * math.log(3), rel=1e-5)  # every similarity is 0
    assert features.grad.isfinite().all()
    features = random_features(4, 2).float()
    features[1, 0] = 0
    features.requires_grad_()
    loss = contrastive_loss(features, labels)
    loss.backward()
    assert loss.isfinite() and features.grad.isfinite().all()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_contrast_is_float32_whatever_the_features(dtype: torch.dtype) -> None:
    labels, features = torch.tensor(BATCHES["pairs"]), random_features(6, 2).to(dtype)
    result = contrastive_loss(features, labels)
    assert result.dtype == torch.float32
    assert torch.equal(result, contrastive_loss(features.float(), labels))


def test_contrast_falls_with_every_relation_that_comes_true() -> None:
    """Nearest of all the same part of the same class; a part or a class in common is nearer than nothing in common."""
    labels = torch.tensor([0, 0, 1, 1])
    class_axes, module_axes = torch.eye(4)[:2], torch.eye(4)[2:]
    shared = class_axes[labels][:, None] + module_axes[None]  # cosines 1, 0.5, 0.5 and 0
    scrambled = shared[[0, 2, 1, 3]]
    assert contrastive_loss(shared, labels) < contrastive_loss(torch.ones(4, 2, 4), labels)
    assert contrastive_loss(shared, labels) < contrastive_loss(scrambled, labels)


# ---- ranking of the fine parts ------------------------------------------------------------------------------------


def rank_one_by_one(scores: Tensor, part_logits: Tensor, labels: list[int]) -> Tensor:
    """Pair by pair; the mean over pairs and images, the sum over modules."""
    batch, modules, parts = scores.shape
    pairs = max(parts * (parts - 1) // 2, 1)
    total = scores.sum() * 0
    for image in range(batch):
        for module in range(modules):
            entropies = []
            for part in range(parts):
                logits = part_logits[image, module * parts + part].detach().double()
                entropies.append(float(logits.exp().sum().log() - logits[labels[image]]))
            for i in range(parts):
                for j in range(parts):
                    margin = 1 - scores[image, module, i] + scores[image, module, j]
                    if entropies[j] > entropies[i] and margin.item() > 0:
                        total = total + margin
    return total / pairs / batch


@pytest.mark.parametrize("shape", ((4, 2, 6), (1, 2, 3), (3, 1, 4), (2, 3, 2), (5, 1, 1), (2, 2, 1)), ids=str)
def test_ranking_equals_reference(shape: tuple[int, int, int]) -> None:
    generator = torch.Generator().manual_seed(5)
    batch, modules, parts = shape
    scores = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    part_logits = 2 * torch.randn(batch, modules * parts, 5, generator=generator)
    labels = [3, 0, 4, 1, 2][:batch]
    expected = rank_one_by_one(scores, part_logits, labels)
    (expected_gradient,) = torch.autograd.grad(expected, scores)
    result = ranking_loss(scores, part_logits, torch.tensor(labels))
    assert result.shape == () and result.dtype == torch.float32
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(result, scores)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-7)
    assert (parts == 1) == (result.item() == 0)


def confident(*amounts: float, label: int = 2) -> Tensor:
    """Logits `[1, parts, 4]` of parts that give the label the more, the larger the amount."""
    logits = torch.zeros(1, len(amounts), 4)
    logits[0, :, label] = torch.tensor(amounts)
    return logits


def test_ranking_by_hand() -> None:
    labels, logits = torch.tensor([2]), confident(3, 2, 1)
    for scores, expected in (
        ([5.0, 3, 1], 0.0),  # well apart, in the right order
        ([0.0, 0, 0], 3.0),  # three hinges of 1
        ([1.0, 0.5, 0], 0.5 + 0 + 0.5),
        ([0.0, 1, 2], 2.0 + 3 + 2),  # the wrong way round
    ):
        loss = ranking_loss(torch.tensor([[scores]]), logits, labels)
        assert loss.item() == pytest.approx(expected / 3), scores


def test_ranking_looks_at_the_true_label_alone() -> None:
    """The surest part leads only where it is sure of the right class."""
    logits = torch.tensor([[[9.0, 0, 0], [0, 2, 0]]])
    scores = torch.tensor([[[0.0, 4]]])
    assert ranking_loss(scores, logits, torch.tensor([1])).item() == 0
    assert ranking_loss(scores, logits, torch.tensor([0])).item() == pytest.approx(5)
    # A larger logit of the label is less when the other classes' are larger still.
    logits = torch.tensor([[[5.0, 5], [4, 1]]])
    assert ranking_loss(scores, logits, torch.tensor([0])).item() == 0


def test_parts_alike_are_not_ranked() -> None:
    scores = torch.tensor([[[1.0, -2, 5, 5]]], requires_grad=True)
    loss = ranking_loss(scores, confident(1, 1, 1, 1), torch.tensor([2]))
    loss.backward()
    assert loss.item() == 0 and torch.equal(scores.grad, torch.zeros_like(scores))
    # One of two alike leads over the third, so two of the three pairs count.
    loss = ranking_loss(torch.zeros(1, 1, 3), confident(1, 1, 0), torch.tensor([2]))
    assert loss.item() == pytest.approx(2 / 3)


def test_a_module_is_ranked_within_itself() -> None:
    labels = torch.tensor([2])
    logits = confident(9, 8, 1, 0)  # the second module's parts are worse, and score higher
    scores = torch.tensor([[[1.0, 0], [8, 7]]])
    assert ranking_loss(scores, logits, labels).item() == 0
    assert ranking_loss(scores.flip(2), logits, labels).item() == pytest.approx(2 + 2)  # the sum over the modules


def test_order_alike_costs_least() -> None:
    labels, logits = torch.tensor([2]), confident(4, 3, 2, 1)
    losses = {
        order: ranking_loss(torch.tensor([[order]]), logits, labels).item()
        for order in itertools.permutations((1.5, 1.0, 0.5, 0.0))
    }
    best, worst = min(losses, key=losses.get), max(losses, key=losses.get)
    assert best == (1.5, 1.0, 0.5, 0.0) and worst == best[::-1]
    assert sorted(losses.values())[1] > losses[best]


def test_only_the_scores_learn_to_rank() -> None:
    scores = torch.zeros(1, 1, 3, requires_grad=True)
    logits = confident(3, 2, 1).requires_grad_()
    ranking_loss(scores, logits, torch.tensor([2])).backward()
    assert logits.grad is None
    torch.testing.assert_close(scores.grad, torch.tensor([[[-2.0, 0, 2]]]) / 3)  # the best up, the worst down


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_ranking_is_float32_whatever_the_scores(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(8)
    scores = torch.randn(4, 2, 3, generator=generator).to(dtype)
    logits = torch.randn(4, 6, 5, generator=generator).to(dtype)
    result = ranking_loss(scores, logits, LABELS)
    assert result.dtype == torch.float32
    assert torch.equal(result, ranking_loss(scores.float(), logits.float(), LABELS))


def test_ranking_of_extreme_values_is_finite() -> None:
    scores = torch.tensor([[[1e4, -1e4, 0]]], requires_grad=True)
    logits = torch.tensor([[[-1e5, 1e5], [1e5, -1e5], [0, 0]]])
    loss = ranking_loss(scores, logits, torch.tensor([0]))
    loss.backward()
    assert loss.item() == pytest.approx((20001 + 10001 + 10001) / 3)
    assert scores.grad.isfinite().all()
