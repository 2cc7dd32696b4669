"""Weights of classes and mixed pictures, against formulas, torch's and torchvision's own."""

from __future__ import annotations

import pytest
import torch
from small_systems import SIZE, Variant, make_images, training_steps
from torchvision.transforms import v2
from toy_system import CPU, make_loader, make_network, make_samples, sgd

from config import parse_settings
from networks import MODELS, find_system
from networks.losses import classification_losses
from utils.data.samplers import BalancedSampler, ShuffledSampler
from utils.options import SettingsError
from utils.training.engine import train_one_epoch
from utils.training.schedule import EpochPlan
from utils.training.targets import build_mixing, class_weights_of, images_shown

RAW = EpochPlan({"raw": 1.0}, ("raw",), mask_background=False)
NO_CROSS_ENTROPIES = {  # unweighted
    *("ranking", "contrastive", "centre", "priority", "location", "diversity"),
    *("semantic_final", "semantic_stage3", "semantic_combined", "agreement"),
}


# ---- Weights of classes ---------------------------------------------------------------------------------------------


def test_balanced_weights():
    labels = [0, 0, 0, 0, 1, 3, 3, 3]
    weights = class_weights_of("balanced", torch.tensor(labels).bincount())
    assert weights.tolist()[:2] + weights.tolist()[3:] == pytest.approx([8 / (3 * 4), 8 / (3 * 1), 8 / (3 * 3)])
    together = [weights[label].item() * labels.count(label) for label in (0, 1, 3)]
    assert together == pytest.approx([8 / 3] * 3)  # of the classes that have images; the mean of an image is 1
    assert weights[2] == weights[1]  # as if it had one


def test_given_weights_are_one_for_each_class():
    assert class_weights_of("none", torch.tensor([1, 1])) is None
    assert class_weights_of((1.0, 2.5), torch.tensor([2, 1])).tolist() == pytest.approx(
        [1 / 1.5, 2.5 / 1.5]
    )  # of mean 1
    with pytest.raises(SettingsError, match="class_weights has 2 numbers and the data 3 classes: give one for each"):
        class_weights_of((1.0, 2.5), torch.tensor([1, 1, 1]))


@pytest.mark.parametrize(
    ("counts", "images_per_class", "batch_size"),
    [([300, 10], 2, 16), ([60] * 5 + [5] * 25, 4, 120), ([60] * 100 + [5] * 100, 4, 120), ([7, 2, 5], 1, 2)],
    ids=str,
)
def test_balanced_weights_count_what_batches_by_class_show(counts, images_per_class, batch_size):
    """They have evened the classes out, most of all where all fit into a batch."""
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    sampler = BalancedSampler(labels, batch_size=batch_size, images_per_class=images_per_class, seed=3)
    shown, epochs = torch.zeros(len(counts), dtype=torch.int64), 5
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        shown += torch.tensor([labels[index] for index, _ in sampler]).bincount(minlength=len(counts))
    weights = class_weights_of("balanced", images_shown(sampler, labels, len(counts)))
    together = weights * shown / epochs
    assert together.sum().item() == pytest.approx(len(sampler), rel=0.05)  # the mean of an image is 1
    largest = [together[[n for n, c in enumerate(counts) if c == count]].mean() for count in sorted(set(counts))]
    assert max(largest) < 1.15 * min(largest)
    plain = ShuffledSampler(len(labels), seed=3)
    assert images_shown(plain, labels, len(counts)).tolist() == counts


@pytest.mark.parametrize(
    ("words", "expected"),
    [([], "none"), (["balanced"], "balanced"), (["2"], (2.0,)), (["1", "2.5", "3e-1"], (1.0, 2.5, 0.3))],
)
def test_class_weights_on_the_command_line(words, expected):
    flag = ["--class_weights", *words] if words else []
    assert parse_settings(["--model", "resnet", *flag]).class_weights == expected


@pytest.mark.parametrize("words", [["evenly"], ["1", "balanced"], ["0"], ["-1", "2"]])
def test_other_class_weights_are_refused(words):
    with pytest.raises(SettingsError, match="class_weights is .*; expected 'none' or 'balanced' or"):
        parse_settings(["--model", "resnet", "--class_weights", *words])


@pytest.mark.parametrize("model", MODELS)
def test_class_weights_reach_every_cross_entropy_and_nothing_else(model):
    network = Variant(model).build_scripted()
    for step, output, plain in training_steps(network, make_images(SIZE, batch=4)):
        terms = {}
        for weights in ((1.0,) * 5, (2.0,) * 5, (2.0, 0.5, 1.0, 1.0, 3.0)):
            network.class_weights = torch.tensor(weights)
            terms[weights] = network.losses(output, step.targets)
        network.class_weights = None
        even, doubled, uneven = terms.values()
        for name in even:  # how much they are in all counts, too: `class_weights_of` scales them
            factor = 1 if name in NO_CROSS_ENTROPIES else 2
            torch.testing.assert_close(doubled[name], factor * even[name])
        trained = {name: value for name, value in plain.items() if name != "total"}
        torch.testing.assert_close({name: even[name] for name in trained}, trained)
        for name in even:
            assert torch.allclose(even[name], uneven[name], rtol=1e-4) == (name in NO_CROSS_ENTROPIES), name


# ---- Mixed pictures -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alphas", "torchvisions"),
    [
        ({"mixup": 0.4, "cutmix": 0.0}, v2.MixUp(alpha=0.4, num_classes=5)),
        ({"mixup": 0.0, "cutmix": 1.0}, v2.CutMix(alpha=1.0, num_classes=5)),
        (
            {"mixup": 0.4, "cutmix": 1.0},
            v2.RandomChoice([v2.MixUp(alpha=0.4, num_classes=5), v2.CutMix(alpha=1.0, num_classes=5)]),
        ),
    ],
)
def test_mixing_is_torchvisions(alphas, torchvisions):
    mix = build_mixing(5, **alphas)
    images, labels = torch.rand(4, 3, 16, 16), torch.tensor([0, 4, 2, 2])
    for seed in range(4):
        torch.manual_seed(seed)
        got = mix(images.contiguous(memory_format=torch.channels_last), labels)
        torch.manual_seed(seed)
        expected = torchvisions(images, labels)
        torch.testing.assert_close(got, expected)
        assert got[0].is_contiguous(memory_format=torch.channels_last)
        assert got[1].sum(dim=1).tolist() == pytest.approx([1.0] * 4)
        assert not torch.equal(got[0], images)


def test_mixup_by_hand():
    """Every picture with the one before it in the batch, by one share for all."""
    mix = build_mixing(3, mixup=1.0, cutmix=0.0)
    images, labels = torch.rand(3, 3, 4, 4), torch.tensor([0, 1, 2])
    mixed, shares = mix(images, labels)
    own = float(shares[0, 0])
    assert 0 < own < 1
    torch.testing.assert_close(mixed, own * images + (1 - own) * images[[2, 0, 1]])
    torch.testing.assert_close(shares, own * torch.eye(3) + (1 - own) * torch.eye(3)[[2, 0, 1]])


def test_nothing_is_mixed_without_an_alpha():
    assert build_mixing(5, mixup=0.0, cutmix=0.0) is None


def test_an_epoch_learns_from_mixed_pictures():
    """Against the loop written out, seeded before every step as training does."""
    network, reference = make_network(), make_network()
    mix, loader = build_mixing(3, mixup=0.4, cutmix=0.0), make_loader(make_samples(8), batch_size=4)
    seeds = {"before_step": lambda step: torch.manual_seed(step)}
    averages = train_one_epoch(
        network, loader, *sgd(network), plan=RAW, execution=CPU, label_smoothing=0.1, mix=mix, **seeds
    )
    optimizer, schedule = sgd(reference)
    losses, right = [], 0.0
    for step, batch in enumerate(loader, start=1):
        torch.manual_seed(step)
        images, shares = mix(batch.images.to(memory_format=torch.channels_last), batch.labels)
        output = reference(images, branches=("raw",))
        loss = classification_losses(output, shares, label_smoothing=0.1)["raw"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        right += sum(row[logits.argmax()].item() for row, logits in zip(shares, output.logits["raw"], strict=True))
    assert all(torch.equal(value, reference.state_dict()[name]) for name, value in network.state_dict().items())
    assert averages["loss/raw"] == pytest.approx(sum(losses) / 2, rel=1e-6)
    assert averages["accuracy/raw"] == pytest.approx(right / 8, rel=1e-6)
    assert averages["images"] == 8


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_pictures_are_mixed_for_systems_of_one_branch_and_one_step_only(model, name):
    words = ["--model", model, "--dataset", "cub", "--data_root", "somewhere", f"--{name}", "0.2"]
    if find_system(model).takes_mixed_pictures():
        assert getattr(parse_settings(words), name) == 0.2
        assert len(find_system(model).branches) == 1
    else:
        with pytest.raises(SettingsError, match=f"{name} is 0.2; expected 0 for {model}: pictures are mixed for"):
            parse_settings(words)


def test_a_plain_resnet_takes_mixed_pictures_and_pmg_does_not():
    assert find_system("resnet").takes_mixed_pictures()
    assert not find_system("pmg").takes_mixed_pictures()
