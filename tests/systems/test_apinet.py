"""API-Net against its description: the published network, its pairs and losses picture by picture, and a run."""

from __future__ import annotations

import json

import pytest
import reference
import torch
import torch.nn.functional as F
import torchvision
from small_systems import LABELS, Variant, flat, make_images, run
from test_pairs import pairs_by_hand
from torch import Tensor, nn

import train
from config import parse_settings
from networks import build_network
from networks.shared import Shared
from networks.systems.apinet import APINet, images_per_class
from utils.checkpoint import CheckpointError, load_checkpoint, load_published
from utils.options import SettingsError

pytestmark = pytest.mark.usefixtures("thin_trunk")

CLASSES, SIZE, DEFAULT = 5, 96, Variant("apinet")


# ---- The published network, written out from its description ---------------------------------------------------------


class PublishedAPINet(nn.Module):
    """With its parameter names; a batch's pairs are looked at one after the other."""

    def __init__(self, trunk: nn.Module, classes: int):
        super().__init__()
        channels = trunk.layer4[-1].bn2.num_features * (4 if hasattr(trunk.layer4[-1], "conv3") else 1)
        self.conv = nn.Sequential(*list(trunk.children())[:-2])
        self.map1 = nn.Linear(2 * channels, 512)
        self.map2 = nn.Linear(512, channels)
        self.fc = nn.Linear(channels, classes)

    def embed(self, images: Tensor) -> Tensor:
        maps = self.conv(images)
        return F.avg_pool2d(maps, maps.shape[-1]).flatten(1)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.embed(images))

    def logits_of_pairs(self, images: Tensor, labels: Tensor) -> list[tuple[int, int, bool, list[Tensor]]]:
        """Every pair without dropout: its pictures, whether it is one, and the logits own by own gate, own by the
        other's, other's by its own, other's by the first one's."""
        embeddings, result = self.embed(images), []
        partners, found = pairs_by_hand(embeddings.detach(), labels.tolist())
        for i, of_picture in enumerate(partners):
            for kind, j in enumerate(of_picture):
                a, o = embeddings[i], embeddings[j]
                mutual = self.map2(self.map1(torch.cat([a, o])))
                gate_a, gate_o = torch.sigmoid(mutual * a), torch.sigmoid(mutual * o)
                attended = (a + a * gate_a, a + a * gate_o, o + o * gate_o, o + o * gate_a)
                result.append((i, j, found[i][kind], [self.fc(vector) for vector in attended]))
        return result

    def loss(self, images: Tensor, labels: Tensor, *, lone: bool) -> tuple[Tensor, Tensor]:
        """Cross-entropy over all logits, and the priority."""
        entropies, hinges = [], []
        for i, j, is_pair, (a_self, a_other, o_self, o_other) in self.logits_of_pairs(images, labels):
            if not is_pair and not lone:
                continue
            for own, other, label in ((a_self, a_other, labels[i]), (o_self, o_other, labels[j])):
                entropies += [-own.log_softmax(0)[label], -other.log_softmax(0)[label]]
                hinges.append((other.softmax(0)[label] - own.softmax(0)[label] + 0.05).clamp(min=0))
        return torch.stack(entropies).mean(), torch.stack(hinges).mean()


def build_published(backbone: str = "resnet18", classes: int = CLASSES) -> PublishedAPINet:
    torch.manual_seed(3)
    trunk = torchvision.models.get_model(backbone)
    for name, parameter in trunk.named_parameters():
        if name.endswith(("bn2.weight" if backbone == "resnet18" else "bn3.weight",)):
            nn.init.constant_(parameter, 0.3)  # or the residual sums of a new trunk grow without bound
    network = PublishedAPINet(trunk, classes)
    for module in network.modules():  # statistics that are not those of a new network
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network.eval()


@pytest.fixture
def pair(tmp_path) -> tuple[APINet, PublishedAPINet]:
    """Our network with the published one's weights, and that one."""
    published = build_published()
    state = {name.replace("conv.", "conv.module.", 1): value for name, value in published.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state, "best_prec1": 0.5}, tmp_path / "published.pth")
    network = build_network("apinet", num_classes=CLASSES, backbone="resnet18", input_size=SIZE)
    load_published(network, tmp_path / "published.pth")
    return network.eval(), published


@pytest.mark.parametrize("size", [SIZE, 160])
@torch.no_grad()
def test_the_prediction_is_the_published_one(pair, size):
    network, published = pair
    network.input_size = size
    images = make_images(size, batch=3)
    output, given = run(network, images)
    assert list(flat(output)) == ["logits.raw"]
    assert [tuple(passed.shape) for passed in given] == [(3, 3, size, size)]
    torch.testing.assert_close(network.predict_logits(output), published(images), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_the_prediction_is_the_published_one_at_full_size(tmp_path):
    published = build_published("resnet50", 36)
    torch.save(published.state_dict(), tmp_path / "published.pth")
    network = build_network("apinet", num_classes=36)
    load_published(network, tmp_path / "published.pth")
    assert sum(parameter.numel() for parameter in network.parameters()) == pytest.approx(26.7e6, rel=2e-3)
    images = make_images(448, batch=1)
    got, expected = network.eval()(images).logits["raw"], published(images)
    assert (got - expected).abs().max() <= 3e-4 * expected.abs().max()


def test_a_published_checkpoint_that_does_not_fit_is_refused(pair, tmp_path):
    state = pair[1].state_dict()
    state["conv.7.5.conv1.weight"] = torch.zeros(3)
    del state["map2.bias"]
    torch.save(state, tmp_path / "published.pth")
    with pytest.raises(CheckpointError) as refusal:
        load_published(pair[0], tmp_path / "published.pth")
    assert "left over: conv.7.5.conv1.weight" in str(refusal.value)
    assert "missing: map2.bias" in str(refusal.value)


@torch.no_grad()
def test_logits_of_pairs_are_the_published_ones(pair):
    network, published = pair
    images, labels = make_images(SIZE, batch=6), torch.tensor([2, 0, 2, 2, 0, 4])
    output = network(images, labels=labels)
    assert output.logits["self"].shape == output.logits["other"].shape == (6, 4, CLASSES)
    assert output.extras["pair_labels"].shape == output.extras["pair_weights"].shape == (6, 4)
    for number, (i, j, is_pair, logits) in enumerate(published.logits_of_pairs(images, labels)):
        kind = number % 2
        for row, (own, other), picture in ((2 * kind, logits[:2], i), (2 * kind + 1, logits[2:], j)):
            torch.testing.assert_close(output.logits["self"][i, row], own, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(output.logits["other"][i, row], other, rtol=1e-4, atol=1e-5)
            assert output.extras["pair_labels"][i, row] == labels[picture]
            assert output.extras["pair_weights"][i, row] == is_pair
    assert not output.extras["pair_weights"].all()  # the last picture is alone of its class
    for branch in network.branches:
        alone = network(images, labels=labels, branches=(branch,))
        assert list(alone.logits) == [branch]
        assert torch.equal(alone.logits[branch], output.logits[branch])


@pytest.mark.parametrize("labels", ([2, 0, 2, 0, 0, 2], [2, 0, 2, 2, 0, 4]), ids=str)
@pytest.mark.parametrize("lone", (False, True))
def test_losses_and_gradients_are_the_published_ones(pair, lone, labels):
    """But for pictures without a partner, unless told so."""
    network, published = (module.double() for module in pair)
    network.options = type(network.options)(pair_lone_pictures=lone)
    images, labels = make_images(SIZE, batch=6).double(), torch.tensor(labels)
    terms = network.losses(network(images, labels=labels), labels)
    assert list(terms) == ["raw", "self", "other", "priority"]
    entropy, priority = published.loss(images, labels, lone=lone)
    torch.testing.assert_close(terms["priority"], priority)
    torch.testing.assert_close(0.5 * terms["self"] + 0.5 * terms["other"], entropy)
    sum(network.loss_weights[name] * term for name, term in terms.items()).backward()
    (entropy + priority).backward()
    gradients = dict(published.named_parameters())
    names = network.published_names
    for theirs, parameter in gradients.items():
        (start,) = (start for start in names if theirs.startswith(start))
        ours = network.get_parameter(names[start] + theirs.removeprefix(start))
        torch.testing.assert_close(ours.grad, parameter.grad, rtol=1e-7, atol=1e-10)


# ---- Branches and terms ----------------------------------------------------------------------------------------------


def test_who_learns_from_a_term():
    network = DEFAULT.build_scripted(dropout=0.0).train()
    terms = network.losses(network(make_images(batch=4), labels=LABELS), LABELS)
    everything = {"backbone", "map1", "map2", "classifier"}
    expected = {"raw": {"backbone", "classifier"}, **dict.fromkeys(("self", "other", "priority"), everything)}
    for name, term in terms.items():
        network.zero_grad()
        term.backward(retain_graph=True)
        learning = {n.split(".")[0] for n, p in network.named_parameters() if p.grad is not None and p.grad.any()}
        assert learning == expected[name], name


@torch.no_grad()
def test_dropout_acts_on_pairs_alone():
    network, images = DEFAULT.build_scripted(dropout=0.5).train(), make_images(batch=4)
    first, second = (network(images, labels=LABELS).logits for _ in range(2))
    changed = {name: not torch.equal(first[name], second[name]) for name in first}
    assert changed == {"raw": False, "self": True, "other": True}


@torch.no_grad()
def test_a_batch_without_any_pair_teaches_nothing():
    network = DEFAULT.build_scripted().train()
    terms = network.losses(network(make_images(batch=1), labels=LABELS[:1]), LABELS[:1])
    assert [float(terms[name]) for name in ("self", "other", "priority")] == [0, 0, 0]


@torch.no_grad()
def test_without_labels_there_are_no_pairs():
    for training in (True, False):
        assert list(flat(DEFAULT.build_scripted().train(training)(make_images()))) == ["logits.raw"]


def test_smoothing_changes_only_what_classifies():
    network = DEFAULT.build_scripted(dropout=0.0).train()
    output = network(make_images(batch=4), labels=LABELS)
    plain, smoothed = (network.losses(output, LABELS, label_smoothing=share) for share in (0.0, 0.2))
    assert {name for name in plain if not torch.equal(plain[name], smoothed[name])} == {"raw", "self", "other"}
    logits, labels = output.logits["other"].flatten(0, 1), output.extras["pair_labels"].flatten()
    assert output.extras["pair_weights"].all()
    torch.testing.assert_close(smoothed["other"], F.cross_entropy(logits, labels, label_smoothing=0.2))


def test_training_makes_the_host_wait_nowhere():
    network = DEFAULT.build_scripted().train()
    with reference.ForbidHostReads():
        network.losses(network(make_images(batch=4), labels=LABELS), LABELS)


# ---- Settings and whole runs ----------------------------------------------------------------------------------------

CUB = ["--model", "apinet", "--dataset", "cub", "--data_root", "x"]


def test_its_recipe_is_the_published_one():
    settings = parse_settings(CUB)
    recipe = (settings.epochs, settings.batch_size, settings.images_per_class, settings.learning_rate)
    assert recipe == (100, 120, 4, 0.01)
    assert (settings.weight_decay, settings.momentum, settings.warmup_epochs) == (5e-4, 0.9, 0)
    assert (settings.schedule, settings.frozen_trunk_epochs, settings.resize_size) == ("cosine_per_step", 8, 512)
    assert (settings.flip, settings.brightness, settings.contrast, settings.dropout) == (0.5, 0.0, 0.0, 0.5)


def test_it_follows_other_settings():
    short = parse_settings([*CUB, "--input_size", "224", "--epochs", "30"])
    assert (short.frozen_trunk_epochs, short.resize_size) == (2, 256)
    assert parse_settings([*CUB, "--pretrained", "none"]).frozen_trunk_epochs == 0


@pytest.mark.parametrize(
    ("batch_size", "expected"), [(0, 4), (120, 4), (16, 4), (8, 4), (6, 3), (9, 3), (10, 2), (4, 2), (3, 0), (7, 0)]
)
def test_small_batches_hold_two_classes(batch_size, expected):
    assert images_per_class(Shared(batch_size=batch_size)) == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--batch_size", "7"], "images_per_class is 0; expected at least 2 for apinet"),
        (["--images_per_class", "0"], "images_per_class is 0; expected at least 2 for apinet"),
        (["--batch_size", "4", "--images_per_class", "4"], "images_per_class is 4; expected at least 2 for apinet"),
        (["--graph_neighbours", "2"], "graph_neighbours is a setting of sgkrl and sgkrl_published, not of apinet"),
    ],
)
def test_what_cannot_be_is_refused(words, expected):
    with pytest.raises(SettingsError) as refusal:
        parse_settings([*CUB, *words])
    assert str(refusal.value).startswith(expected)


def test_pictures_alone_can_be_trained_without_pairs():
    words = ["--images_per_class", "0", "--loss_weights", "raw=1", "self=0", "other=0", "priority=0"]
    assert parse_settings([*CUB, *words]).images_per_class == 0


@pytest.mark.slow
def test_a_run_goes_on_exactly_and_is_evaluated(tiny_run, tmp_path, evaluation_script):
    arguments = {
        name: tiny_run(tmp_path / name, "--epochs", "2", "--save_every_steps", "1", model="apinet")
        for name in ("whole", "stopped")
    }
    train.main(arguments["whole"])
    after_step, calls = APINet.after_step, []

    def stop(*given: object) -> None:
        calls.append(given)
        if len(calls) == 5:  # the second step of the second epoch
            raise KeyboardInterrupt
        after_step(*given)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(APINet, "after_step", stop)
        train.main(arguments["stopped"])
    train.main(arguments["stopped"])
    whole, stopped = (load_checkpoint(tmp_path / name / "folder-apinet" / "last.pth") for name in arguments)
    assert all(torch.equal(value, stopped["network"][name]) for name, value in whole["network"].items())

    folder = tmp_path / "whole" / "folder-apinet"
    line = json.loads((folder / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    terms = {name: line[f"train/loss/{name}"] for name in ("self", "other", "priority")}
    total = 0.5 * terms["self"] + 0.5 * terms["other"] + terms["priority"]
    assert line["train/loss/total"] == pytest.approx(total, rel=1e-6)
    evaluation_script.main([str(folder / "best.pth")])
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert report["prediction"] == "raw"
    assert report["branches"].keys() == {"prediction", "raw"}
    assert report["boxes"] is None
