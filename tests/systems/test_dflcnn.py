"""DFL-CNN against its description: the public network under its own names, its loss, and how its filters start."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import networks.systems.dflcnn as dflcnn
import train
from config import parse_settings
from networks import Shared, build_network, build_options
from networks.evidence import forward_with_evidence
from networks.filter_bank import FilterBank, find_peaks, gather_rows, k_means
from utils.checkpoint import CheckpointError, load_checkpoint, load_published
from utils.options import SettingsError

CLASSES, SIZE, FILTERS, BRANCHES = 5, 128, 3, ("global", "parts", "side")

pytestmark = pytest.mark.usefixtures("thin_trunk")


# ---- The public network, written out from its description ------------------------------------------------------------


class PublishedDFL(nn.Module):
    """The network of the public code for ResNets, with its parameter names, for pictures of 16 * `cells` pixels."""

    def __init__(self, trunk: nn.Module, classes: int, filters: int, cells: int):
        super().__init__()
        middle, last, self.classes, self.filters = (
            trunk.layer4[0].conv1.in_channels,
            trunk.fc.in_features,
            classes,
            filters,
        )
        stages = (trunk.layer1, trunk.layer2, trunk.layer3)
        self.conv1_conv4 = nn.Sequential(trunk.conv1, trunk.bn1, trunk.relu, trunk.maxpool, *stages)
        self.conv5 = nn.Sequential(trunk.layer4)
        self.conv6 = nn.Conv2d(middle, filters * classes, 1)
        self.pool6 = nn.MaxPool2d(cells)
        self.cls5 = nn.Sequential(nn.Conv2d(last, classes, 1), nn.BatchNorm2d(classes), nn.ReLU())
        self.cls6 = nn.Sequential(nn.Conv2d(filters * classes, classes, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        middle = self.conv1_conv4(x)
        cells = self.cls5(self.conv5(middle))
        responses = self.pool6(self.conv6(middle))
        groups = [responses[:, self.filters * c : self.filters * (c + 1), 0, 0] for c in range(self.classes)]
        side = torch.stack([sum(group.unbind(1)) / self.filters for group in groups], dim=1)
        return F.avg_pool2d(cells, cells.shape[-1])[:, :, 0, 0], self.cls6(responses)[:, :, 0, 0], side


def build_published(trunk: nn.Module, classes: int, filters: int, size: int) -> PublishedDFL:
    torch.manual_seed(3)
    network = PublishedDFL(trunk, classes, filters, size // 16)
    for name, module in network.named_modules():
        if isinstance(module, nn.BatchNorm2d):  # statistics that are not those of a new network
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            if name.endswith(("bn2", "bn3")):
                nn.init.constant_(module.weight, 0.3)  # or the residual sums of a new trunk grow without bound
    return network


def saved(published: nn.Module, path) -> str:  # as the public code saves it
    state = {f"module.{name}": value for name, value in published.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state, "best_prec1": torch.tensor(80.0), "prec1": torch.tensor(79.0)}, path)
    return str(path)


@pytest.fixture
def pair(tmp_path) -> tuple[dflcnn.DFLCNN, PublishedDFL]:
    """Our network with the published one's weights, and that one."""
    published = build_published(torchvision.models.get_model("resnet18"), CLASSES, FILTERS, SIZE)
    network = build()
    load_published(network, saved(published, tmp_path / "published.pth"))
    return network, published


def build(**settings: object) -> dflcnn.DFLCNN:
    torch.manual_seed(0)
    given = {"backbone": "resnet18", "input_size": SIZE, "filters_per_class": FILTERS}
    return build_network("dflcnn", num_classes=CLASSES, **(given | settings))


def make_images(batch: int, size: int = SIZE) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def assert_evaluates_alike(network: dflcnn.DFLCNN, published: PublishedDFL, images: Tensor) -> None:
    with torch.no_grad():
        output, expected = network.eval()(images), published.eval()(images)
    assert tuple(output.logits) == BRANCHES
    prediction = expected[0] + expected[1] + 0.1 * expected[2]
    for ours, theirs in zip(
        (*output.logits.values(), network.predict_logits(output)), (*expected, prediction), strict=True
    ):
        assert (ours - theirs).norm() / theirs.norm() < 3e-4
        assert theirs.std() > 1e-4


def test_logits_and_prediction_are_the_published_ones(pair):
    assert_evaluates_alike(*pair, make_images(3))


@pytest.mark.slow
def test_logits_are_the_published_ones_with_resnet50_at_448_pixels(tmp_path):
    published = build_published(torchvision.models.resnet50(), 36, 10, 448)
    network = build_network("dflcnn", num_classes=36)
    load_published(network, saved(published, tmp_path / "published.pth"))
    assert_evaluates_alike(network, published, make_images(2, 448))


def test_a_prediction_of_some_branches(pair):
    network = pair[0].eval()
    with torch.no_grad():
        output = network(make_images(2))
    network.prediction = ("parts", "side")
    expected = output.logits["parts"] + 0.1 * output.logits["side"]
    torch.testing.assert_close(network.predict_logits(output), expected)
    network.prediction = ("side",)
    assert torch.equal(network.predict_logits(output), output.logits["side"])
    network.prediction, network.ensembling = ("parts", "side"), "mean_probability"
    mean = (output.logits["parts"].softmax(-1) + output.logits["side"].softmax(-1)) / 2
    torch.testing.assert_close(network.predict_logits(output).softmax(-1), mean)


def test_evidence_is_of_both_maps(pair):
    """That of the parts lies where the filters respond most: of a sum over filters, each at its cell."""
    network, images = pair[0].eval(), make_images(2)
    network.prediction = ("side",)
    evidence = forward_with_evidence(network, images, size=SIZE // 16)[1]
    with torch.no_grad():
        output, map_ = network(images), network.backbone(images).stage3
        cells = network.bank(map_)[1]
    expected = torch.zeros(2, (SIZE // 16) ** 2)
    for image, class_ in enumerate(output.logits["side"].argmax(dim=1).tolist()):
        for number in range(class_ * FILTERS, (class_ + 1) * FILTERS):
            cell, filter_ = cells[image, number], network.bank.filters.weight[number, :, 0, 0]
            expected[image, cell] += (map_[image].flatten(1)[:, cell] @ filter_ / FILTERS).detach()
    expected = expected.unflatten(1, (SIZE // 16, SIZE // 16)) * (SIZE // 16) ** 2  # a density
    torch.testing.assert_close(evidence, expected.clamp(min=0), rtol=1e-3, atol=1e-4)


def test_a_published_checkpoint_that_does_not_fit_is_refused(pair, tmp_path):
    network, published = pair
    published.cls6[0].weight = nn.Parameter(torch.zeros(CLASSES, 4, 1, 1))
    published.extra = nn.Linear(2, 2, bias=False)
    del published.conv6
    with pytest.raises(CheckpointError) as refusal:
        load_published(network, saved(published, tmp_path / "other.pth"))
    sentence = str(refusal.value)
    assert all(words in sentence for words in ("left over: extra.weight", "missing: conv6", "cls6.0.weight (5, 4"))


def test_loss_and_gradients_are_the_published_ones(pair):
    """In float64, over a training step: the sum of two cross-entropies and a tenth of the third."""
    network, published = (module.double().train() for module in pair)
    images, labels = make_images(4).double(), torch.tensor([0, 3, 1, 1])
    terms = network.losses(network(images), labels)
    total = sum(network.loss_weights[name] * term for name, term in terms.items())
    by_cells, parts, side = (F.cross_entropy(logits, labels) for logits in published(images))
    expected = by_cells + parts + 0.1 * side
    torch.testing.assert_close(total, expected)
    total.backward(), expected.backward()
    theirs, names = dict(published.named_parameters()), network.published_names
    for name, parameter in network.named_parameters():
        (start,) = (their for their, ours in names.items() if name.startswith(ours))
        gradient = theirs.pop(start + name.removeprefix(names[start])).grad.reshape(parameter.shape)
        torch.testing.assert_close(parameter.grad, gradient, msg=lambda text, name=name: f"{name}: {text}")
    assert theirs == {}


# ---- Branches and patches --------------------------------------------------------------------------------------------


def test_patches_lie_where_the_filters_of_the_class_respond_most(pair):
    network = pair[0].eval()
    maps: list[Tensor] = []
    network.bank.filters.register_forward_hook(lambda module, given, response: maps.append(response))
    with torch.no_grad():
        output = network(make_images(3))
        assert network(make_images(3), branches=("global",)).part_boxes is None
    assert output.part_boxes.shape == (3, FILTERS, 4)
    for image, boxes in enumerate(output.part_boxes.tolist()):
        class_ = output.logits["side"][image].argmax().item()
        of_class = maps[0][image, class_ * FILTERS : (class_ + 1) * FILTERS]
        strongest_first = sorted(of_class, key=lambda responses: -responses.max())
        for responses, box in zip(strongest_first, boxes, strict=True):
            row, column = divmod(responses.argmax().item(), SIZE // 16)
            assert box == [16 * (column - 2), 16 * (row - 2), 16 * (column + 3) - 1, 16 * (row + 3) - 1]


# ---- The start of the filters ----------------------------------------------------------------------------------------


def peaks_by_hand(map_: Tensor, count: int) -> list[tuple[float, int]]:
    """(length, cell) of the highest peaks of one map [C, h, w]."""
    lengths = map_.pow(2).sum(dim=0).sqrt()
    h, w = lengths.shape
    found = []
    for y in range(h):
        for x in range(w):
            around = lengths[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2]
            if lengths[y, x] == around.max() and lengths[y, x] > lengths.mean():
                found.append((lengths[y, x].item(), y * w + x))
    return sorted(found, reverse=True)[:count]


@pytest.mark.parametrize("count", (3, 40))
def test_peaks_are_found(count):
    maps = torch.randn(4, 6, 9, 7, generator=torch.Generator().manual_seed(0)).relu()
    vectors, is_peak = find_peaks(maps, count)
    assert vectors.shape == (4, count, 6)
    for map_, found, kept in zip(maps, vectors, is_peak, strict=True):
        expected = peaks_by_hand(map_, count)
        assert kept.tolist() == [True] * len(expected) + [False] * (count - len(expected))
        assert torch.equal(found[kept], torch.stack([map_.flatten(1)[:, cell] for _, cell in expected]))
    assert not find_peaks(torch.ones(1, 6, 3, 3), 2)[1].any()  # no cell is above the mean


def test_k_means_finds_clusters():
    generator = torch.Generator().manual_seed(0)
    centres = 10 * torch.eye(4)[:3]
    vectors = torch.cat([centre + torch.randn(20, 4, generator=generator) for centre in centres])
    torch.manual_seed(1)
    found = k_means(vectors, 3)
    order = (found @ centres.T).argmax(dim=1)
    assert sorted(order.tolist()) == [0, 1, 2]
    for centre, cluster in zip(found, order, strict=True):
        torch.testing.assert_close(centre, vectors[20 * cluster : 20 * cluster + 20].mean(dim=0))
    few = k_means(vectors[:2], 5)  # centres without a vector of their own stay where they started
    assert {tuple(centre.tolist()) for centre in few} == {tuple(vector.tolist()) for vector in vectors[:2]}


def test_filters_start_as_centres_of_their_class_and_answer_with_mean_0_and_deviation_1():
    torch.manual_seed(0)
    bank = FilterBank(6, 3, 2)
    before = bank.filters.weight.detach().clone()
    vectors, labels = 3 + torch.randn(40, 6).abs(), torch.tensor([0, 2]).repeat(20)
    torch.manual_seed(4)
    bank.start_from(vectors, labels)
    torch.manual_seed(4)
    directions = F.normalize(vectors, dim=1)
    expected = {label: k_means(directions[labels == label], 2) for label in (0, 2)}
    filters = bank.filters.weight.detach().flatten(1)
    for label, centres in expected.items():
        for filter_, centre in zip(filters[2 * label : 2 * label + 2], centres, strict=True):
            assert F.cosine_similarity(filter_, centre, dim=0) > 1 - 1e-6
    assert F.cosine_similarity(filters[2:4], before.flatten(1)[2:4]).min() > 1 - 1e-6  # a class without pictures
    responses = bank.filters(vectors[:, :, None, None])[:, :, 0, 0]
    torch.testing.assert_close(responses.mean(dim=0), torch.zeros(6), atol=1e-4, rtol=0)
    torch.testing.assert_close(responses.std(dim=0, correction=0), torch.ones(6), atol=1e-4, rtol=0)
    bank.start_from(vectors[:0], labels[:0])
    assert torch.equal(bank.filters.weight.detach().flatten(1), filters)


def test_the_start_needs_little_more_memory_than_the_vectors():
    """Their responses to all filters would be five times as large here, and with 2000 classes far more."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            largest = max(largest, result.numel() if isinstance(result, torch.Tensor) else 0)
            return result

    bank, vectors = FilterBank(6, 15, 2), torch.rand(600, 6)
    with Watch():
        bank.start_from(vectors, torch.arange(600) % 15)
    assert largest <= vectors.numel()


def test_the_network_starts_its_filters_from_the_training_pictures():
    images, labels = make_images(6), torch.tensor([0, 1, 2, 3, 4, 0])
    filters = {}
    for batches in ([6], [2, 4]):
        network = build(filter_start="k_means").train()
        others = {name: value.clone() for name, value in network.state_dict().items() if not name.startswith("bank.")}
        network.prepare(zip(images.split(batches), labels.split(batches), strict=True))
        assert network.training
        assert all(torch.equal(value, network.state_dict()[name]) for name, value in others.items())
        filters[len(batches)] = network.bank.filters.weight.detach()
    torch.testing.assert_close(filters[1], filters[2], rtol=1e-3, atol=1e-4)
    network.eval()
    with torch.no_grad():
        vectors, is_peak = find_peaks(network.backbone(images).stage3, 10)
    responses = network.bank.filters(vectors[is_peak][:, :, None, None])
    torch.testing.assert_close(responses.std(dim=0, correction=0).flatten(), torch.ones(15), atol=1e-2, rtol=0)


def test_random_filters_look_at_no_picture():
    def batches():
        raise AssertionError("a batch was loaded")
        yield

    network = build(pretrained="none")
    assert network.options.filter_start == "random"
    network.prepare(batches())
    assert build_options(dflcnn.DFLCNN, {}, Shared(pretrained="IMAGENET1K_V1")).filter_start == "k_means"


def test_processes_share_what_they_found(monkeypatch):
    def all_gather_object(shares, rows):
        shares[:] = [rows, rows + 1]

    for name, value in {
        "is_initialized": lambda: True,
        "get_world_size": lambda: 2,
        "all_gather_object": all_gather_object,
    }.items():
        monkeypatch.setattr(torch.distributed, name, value)
    assert gather_rows(torch.tensor([[1], [5]])).flatten().tolist() == [1, 5, 2, 6]


def test_the_public_start_overwrites_all_norms():
    kept, random = (build(norm_start=start).state_dict() for start in ("pretrained", "random"))
    norms = {name.rpartition(".")[0] for name in kept if name.endswith("running_mean")}
    assert len(norms) == 16  # 15 in the thin trunk, which has a shortcut in its first stage too, and one in the head
    for name, value in random.items():
        module, _, parameter = name.rpartition(".")
        if module in norms and parameter == "weight":
            assert 0 < (value - 1).abs().max() < 0.2
            assert value.std() == pytest.approx(0.02, rel=0.5 if len(value) > 8 else 2)
        else:
            assert torch.equal(value, kept[name])


# ---- Settings and whole runs -----------------------------------------------------------------------------------------


def test_its_recipe_is_the_published_one_as_far_as_it_goes():
    settings = parse_settings(["--model", "dflcnn", "--dataset", "cub", "--data_root", "x"])
    assert (settings.epochs, settings.batch_size, settings.weight_decay) == (120, 56, 5e-6)
    assert (settings.learning_rate, settings.head_learning_rate_factor, settings.warmup_epochs) == (0.1, 1.0, 0)
    assert settings.schedule == "exponential"
    assert settings.decay_rate**10 == pytest.approx(0.9)
    assert settings.ensembling == "sum_logits"
    assert settings.keep_aspect_ratio
    assert not parse_settings(["--model", "dflcnn", "--no-keep_aspect_ratio"]).keep_aspect_ratio
    own = {"filters_per_class": 10, "filter_start": "k_means", "peaks_per_picture": 10, "norm_start": "pretrained"}
    assert settings.options == own


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--filters_per_class", "0"], "filters_per_class is 0; expected a whole number of at least 1"),
        (["--filter_start", "means"], "filter_start is 'means'; expected 'k_means' or 'random'"),
        (["--warmup_epochs", "1"], "warmup_epochs is 1; expected 0"),
    ],
)
def test_what_cannot_be_is_refused(words, expected):
    with pytest.raises(SettingsError) as refusal:
        parse_settings(["--model", "dflcnn", "--dataset", "cub", "--data_root", "x", *words])
    assert str(refusal.value).startswith(expected)


@pytest.mark.slow
def test_a_run_goes_on_exactly_and_is_evaluated(tiny_run, tmp_path, evaluation_script):
    """Stopped in its second epoch, after its filters were started from the pictures."""
    more = ("--epochs", "2", "--save_every_steps", "1", "--learning_rate", "0.01", "--filter_start", "k_means")
    arguments = {name: tiny_run(tmp_path / name, *more, model="dflcnn") for name in ("whole", "stopped")}
    started: list[Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        prepare = dflcnn.DFLCNN.prepare

        def recorded(self, batches):
            before = self.bank.filters.weight.detach().clone()
            prepare(self, batches)
            started.append((self.bank.filters.weight - before).abs().max())

        patch.setattr(dflcnn.DFLCNN, "prepare", recorded)
        train.main(arguments["whole"])
        step, calls = dflcnn.DFLCNN.after_step, []

        def interrupted(self, output, targets):
            calls.append(1)
            if len(calls) == 5:  # 3 batches an epoch
                raise KeyboardInterrupt
            step(self, output, targets)

        patch.setattr(dflcnn.DFLCNN, "after_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train.main(arguments["stopped"])
        patch.setattr(dflcnn.DFLCNN, "after_step", step)
        train.main(arguments["stopped"])
    assert len(started) == 2 and min(started) > 1e-3  # not again where a run goes on
    whole, stopped = (load_checkpoint(tmp_path / name / "folder-dflcnn" / "last.pth") for name in arguments)
    assert all(torch.equal(value, stopped["network"][name]) for name, value in whole["network"].items())
    folder = tmp_path / "whole" / "folder-dflcnn"
    line = json.loads((folder / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    total = sum(weight * line[f"train/loss/{name}"] for name, weight in zip(BRANCHES, (1, 1, 0.1), strict=True))
    assert line["train/loss/total"] == pytest.approx(total, rel=1e-6)
    evaluation_script.main([str(folder / "best.pth")])
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert report["branches"].keys() == {"prediction", *BRANCHES}
