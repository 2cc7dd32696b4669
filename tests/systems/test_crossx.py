"""Cross-X against its description: the published network under its own names, its loss, its steps of training."""

from __future__ import annotations

import copy
import itertools

import pytest
import system_checks
import torch
import torch.nn.functional as F
import torchvision
from small_systems import LABELS, Variant, learners, make_images, training_steps
from torch import Tensor, nn

from config import parse_settings
from networks import build_network
from networks.evidence import forward_with_evidence
from networks.excitation import CombinedMap, MultiExcitation
from networks.folding import fold_batch_norm
from networks.losses import agreement_loss, semantic_loss
from networks.system import System
from utils.checkpoint import CheckpointError, load_published
from utils.options import SettingsError
from utils.training.building import evaluated_branches

pytestmark = pytest.mark.usefixtures("thin_trunk")

CLASSES, SIZE = 5, 96
GAMMAS = {"final": 0.5, "stage3": 0.25, "combined": 0.5}
CUB = ["--model", "crossx", "--dataset", "cub", "--data_root", "x"]
FORMS = {
    "two levels": Variant("crossx", combine_maps=False),
    "three parts, means": Variant("crossx", parts=3, stage3_pooling="mean"),
}


# ---- The published network, written out from its description --------------------------------------------------------


class PublishedExcitation(nn.Module):
    def __init__(self, channels: int, units: int, parts: int):
        super().__init__()
        self.parts = nn.ModuleList(
            nn.Sequential(nn.Linear(channels, units), nn.ReLU(), nn.Linear(units, channels), nn.Sigmoid())
            for _ in range(parts)
        )


class PublishedCrossX(nn.Module):
    """The published network on a trunk of torchvision's, with its parameter names, part by part and cell by cell."""

    def __init__(
        self, architecture: str, classes: int = CLASSES, *, units: tuple[int, int] = (4, 4), pooling: str = "maximum"
    ):
        super().__init__()
        torch.manual_seed(3)
        trunk = torchvision.models.get_model(architecture)
        self.pooling = pooling
        channels = trunk.layer4[0].conv1.in_channels, trunk.fc.in_features
        trunk.layer3[-1].me = PublishedExcitation(channels[0], units[0], 2)
        trunk.layer4[-1].me = PublishedExcitation(channels[1], units[1], 2)
        for name in ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4"):
            setattr(self, name, getattr(trunk, name))
        for part in (1, 2):
            setattr(self, f"conv2_{part}", nn.Conv2d(channels[1], channels[0], 1, bias=False))
            setattr(self, f"conv3_{part}", nn.Conv2d(channels[0], channels[0], 3, padding=1, bias=False))
            setattr(self, f"bn3_{part}", nn.BatchNorm2d(channels[0]))
        self.fc_ulti = nn.Linear(2 * channels[1], classes)
        self.fc_plty, self.fc_cmbn = (nn.Linear(2 * channels[0], classes) for _ in range(2))
        for name, module in self.named_modules():
            if isinstance(module, nn.BatchNorm2d):  # statistics that are not those of a new network
                nn.init.uniform_(module.running_mean, -0.1, 0.1)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
                last = "bn2" if architecture == "resnet18" else "bn3"
                if name.endswith(last):
                    nn.init.constant_(module.weight, 0.3)  # or the sums of a new trunk grow without bound

    @staticmethod
    def excited(stage: nn.Sequential, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The output of a stage, and that of its last block as each part excites it."""
        block = stage[-1]
        x = stage[:-1](x)
        shortcut = x if block.downsample is None else block.downsample(x)
        residual = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x)))))
        if hasattr(block, "conv3"):
            residual = block.bn3(block.conv3(F.relu(residual)))
        squeezed, parts = residual.flatten(2).mean(dim=2), []
        for excite in block.me.parts:
            parts.append(F.relu(excite(squeezed).unsqueeze(2).unsqueeze(3) * residual + shortcut))
        return F.relu(residual + shortcut), parts

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[list[Tensor]]]:
        """Logits of the last stage, of stage 3 and of the combined maps, and each one's vectors, part by part."""
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        stage3, parts3 = self.excited(self.layer3, self.layer2(self.layer1(x)))
        _, parts4 = self.excited(self.layer4, stage3)
        highest = self.pooling == "maximum"
        vectors = [[map_.flatten(2).mean(2) for map_ in parts4]]
        vectors += [[map_.flatten(2).max(2).values if highest else map_.flatten(2).mean(2) for map_ in parts3]]
        vectors += [[]]
        for part, (map3, map4) in enumerate(zip(parts3, parts4, strict=True), start=1):
            reduce, conv, norm = (getattr(self, f"{name}_{part}") for name in ("conv2", "conv3", "bn3"))
            repeated = reduce(map4).repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            vectors[2].append(norm(conv(map3 + repeated)).flatten(2).mean(2))
        classifiers = (self.fc_ulti, self.fc_plty, self.fc_cmbn)
        logits = [classify(torch.cat(level, dim=1)) for classify, level in zip(classifiers, vectors, strict=True)]
        return logits, vectors

    def save(self, path) -> str:
        torch.save({f"module.{name}": value for name, value in self.state_dict().items()}, path)
        return str(path)


def published_semantic(parts: list[Tensor]) -> Tensor:
    """Entry by entry of the correlation matrix: every part with every part, every image with every image."""
    lengths = [[row / row.norm() for row in part] for part in parts]
    total = 0
    for p, q in itertools.product(range(len(parts)), repeat=2):
        entries = [x @ y for x in lengths[p] for y in lengths[q]]
        mean = sum(entries) / len(entries)
        total = total + (1 - mean if p == q else mean if p < q else 0)
    return total


def published_loss(logits: list[Tensor], vectors: list[list[Tensor]], labels: Tensor) -> Tensor:
    loss = F.cross_entropy(sum(logits), labels)
    for gamma, parts in zip(GAMMAS.values(), vectors, strict=True):
        loss = loss + gamma * published_semantic(parts)
    ulti, *others = logits
    for other in others:
        for image in range(len(labels)):
            p, q = ulti[image].softmax(0), other[image].softmax(0)
            loss = loss + (p * (p / q).log()).sum() / len(labels)
    return loss


def build(**settings: object) -> System:
    torch.manual_seed(0)
    given = {"num_classes": CLASSES, "backbone": "resnet18", "input_size": SIZE}
    return build_network("crossx", **(given | settings))


@pytest.fixture(params=("maximum", "mean"))
def pair(request, tmp_path) -> tuple[System, PublishedCrossX]:
    """Our network with the published one's weights, and that one."""
    published, network = PublishedCrossX("resnet18", pooling=request.param), build(stage3_pooling=request.param)
    load_published(network, published.save(tmp_path / "published.model"))
    return network, copy.deepcopy(published)


@torch.no_grad()
def assert_evaluates_alike(network: System, published: PublishedCrossX, images: Tensor) -> None:
    output, (expected, _) = network.eval()(images), published.eval()(images)
    assert tuple(output.logits) == ("final", "stage3", "combined", "sum")
    for logits, wanted in zip(output.logits.values(), [*expected, sum(expected)], strict=True):
        assert (logits - wanted).norm() / wanted.norm() < 3e-4
        assert wanted.std() > 1e-3
    assert torch.equal(network.predict_logits(output), output.logits["sum"])


@pytest.mark.parametrize("size", (SIZE, 160))
def test_logits_are_the_published_ones(pair, size):
    network, published = pair
    network.input_size = size
    assert_evaluates_alike(network, published, make_images(size, 3))
    assert_evaluates_alike(fold_batch_norm(network), published, make_images(size, 3))


@pytest.mark.slow
def test_logits_are_the_published_ones_with_resnet50_at_448_pixels(tmp_path):
    network, published = build_network("crossx", num_classes=36), PublishedCrossX("resnet50", 36, units=(4, 8))
    load_published(network, published.save(tmp_path / "published.model"))
    assert sum(parameter.numel() for parameter in network.parameters()) / 1e6 == pytest.approx(47.0, abs=0.05)
    assert_evaluates_alike(network, published, make_images(448, 2))


def test_a_published_checkpoint_that_does_not_fit_is_refused(tmp_path):
    published = PublishedCrossX("resnet18")
    state = published.state_dict()
    del state["layer3.0.me.parts.1.2.bias"], state["conv3_2.weight"]
    state["fc_ulti.weight"], state["conv2_3.weight"] = state["fc_ulti.weight"][:3], state["conv2_1.weight"]
    torch.save(state, tmp_path / "other.model")
    with pytest.raises(CheckpointError) as refusal:
        load_published(build(), tmp_path / "other.model")
    for part in ("left over: conv2_3.weight", "layer3.0.me.parts.1.2.bias", "conv3_2.weight", "fc_ulti.weight (3,"):
        assert part in str(refusal.value)


# ---- Training -------------------------------------------------------------------------------------------------------


def test_two_batches_equal_the_published_training(pair):
    """In float64, with its own optimizer on either side."""
    network, published = (module.double().train() for module in pair)
    ours, theirs = (torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9) for module in pair)
    for images in (make_images(SIZE, 4).double(), make_images(SIZE, 4, seed=2).double()):
        expected = published_loss(*published(images), LABELS)
        output = network(images)
        terms = network.losses(output, LABELS)
        total = sum(network.loss_weights[name] * term for name, term in terms.items())
        assert terms.keys() == network.loss_weights.keys()
        torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)  # float32 in the terms
        for optimizer, loss in ((ours, total), (theirs, expected)):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    names = network.published_names
    for name, value in published.state_dict().items():
        start = next(start for start in names if name.startswith(start))
        found = network.state_dict()[names[start] + name.removeprefix(start)]
        torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-7, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("parts", (1, 2, 3))
def test_the_semantic_loss_is_that_of_a_loop_over_all_pairs(parts):
    vectors = torch.randn(4, parts, 6, generator=torch.Generator().manual_seed(0))
    assert semantic_loss(vectors).item() == pytest.approx(published_semantic(list(vectors.unbind(1))).item(), rel=1e-5)
    same = torch.eye(parts, 6).expand(4, -1, -1)  # each part the same in all images, and unlike the others
    assert semantic_loss(same).item() == pytest.approx(0, abs=1e-6)


def test_the_agreement_is_the_divergence_by_images_and_teaches_both_sides():
    p, q = (torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(1)) * 3).requires_grad_().unbind()
    expected = F.kl_div(q.log_softmax(-1), p.softmax(-1), reduction="sum") / 3
    torch.testing.assert_close(agreement_loss(p, q), expected)
    gradients = [torch.autograd.grad(loss, (p, q), retain_graph=True) for loss in (agreement_loss(p, q), expected)]
    for found, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
        assert found.abs().max() > 1e-3


def test_who_learns():
    reached = learners(build(), make_images(SIZE))
    assert reached["final"] == reached["stage3"] == {"backbone", "excitations", "classifiers"}
    assert reached["combined"] == reached["sum"] == {"backbone", "excitations", "combined", "classifiers"}


def test_it_is_the_sum_that_is_classified():
    weights = build().loss_weights
    assert {name: weights[name] for name in ("final", "stage3", "combined", "sum")} == {
        "final": 0.0,
        "stage3": 0.0,
        "combined": 0.0,
        "sum": 1.0,
    }
    assert {name: weights[f"semantic_{name}"] for name in GAMMAS} == GAMMAS
    assert weights["agreement"] == 1.0
    network = build()
    assert evaluated_branches(network, network.loss_weights) == ("final", "stage3", "combined", "sum")


@pytest.mark.parametrize("form", FORMS)
def test_its_other_forms(form):
    variant = FORMS[form]
    for check in (
        system_checks.output_keeps_the_contract_in_training,
        system_checks.every_loss_term_has_a_weight,
        system_checks.gradient_reaches_every_parameter,
        system_checks.evaluation_computes_what_it_reports,
    ):
        check(variant)
    network = variant.build()
    if form == "two levels":
        assert network.branches == ("final", "stage3", "sum")
        assert set(network.loss_weights) == {*network.branches, "semantic_final", "semantic_stage3", "agreement"}
        with torch.no_grad():
            logits = network.eval()(make_images()).logits
        torch.testing.assert_close(logits["sum"], logits["final"] + logits["stage3"])


# ---- Its parts ------------------------------------------------------------------------------------------------------


def test_excitations_are_as_narrow_as_published_but_never_narrower_than_four_units():
    for channels, units in ((2048, 8), (1024, 4), (512, 4), (256, 4)):
        with torch.device("meta"):
            assert MultiExcitation(channels, 2).parts[1][0].out_features == units


@pytest.mark.parametrize(("size", "cells"), (((6, 6), 3), ((10, 8), (5, 4)), ((4, 4), 4)))
def test_maps_averaged_before_the_convolution_are_those_averaged_after_it(size, cells):
    torch.manual_seed(0)
    combine = CombinedMap(6, 9).double()
    nn.init.normal_(combine.norm.weight), nn.init.normal_(combine.norm.bias)
    nn.init.normal_(combine.norm.running_mean), nn.init.uniform_(combine.norm.running_var, 0.5, 2)
    rows, columns = (cells, cells) if isinstance(cells, int) else cells
    stage3, final = torch.randn(3, 6, *size).double(), torch.randn(3, 9, rows, columns).double()
    averaged = combine.eval()(stage3, final)
    combine.train()
    combine.norm.eval()  # the same statistics in the form of training
    torch.testing.assert_close(averaged, combine(stage3, final))


def test_new_convolutions_start_as_published():
    torch.manual_seed(0)
    combine = CombinedMap(256, 512)
    assert combine.reduce.weight.std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.02)
    assert combine.conv.weight.std().item() == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.02)


@torch.no_grad()
def test_only_the_levels_asked_for_are_computed():
    network, classified, combined = build().eval(), [], []
    for level, classifier in network.classifiers.items():
        classifier.register_forward_hook(lambda *_, level=level: classified.append(level))
    for combine in network.combined:
        combine.register_forward_hook(lambda *_: combined.append(1))
    for branches, levels, maps in (
        (("final",), ["final"], 0),
        (("stage3",), ["stage3"], 0),
        (("combined",), ["combined"], 2),
        (("sum",), ["final", "stage3", "combined"], 2),
    ):
        classified.clear(), combined.clear()
        assert tuple(network(make_images(SIZE), branches=branches).logits) == branches
        assert (classified, len(combined)) == (levels, maps)


def test_the_evidence_is_the_class_activation_map_of_the_part_maps():
    """Where the excitations do not depend on the picture, so that only the maps themselves speak."""
    network = build(prediction=("final",)).eval()
    for excite in network.excitations["final"].parts:
        nn.init.zeros_(excite[2].weight)
        nn.init.normal_(excite[2].bias)
    images = make_images(SIZE)
    output, evidence = forward_with_evidence(network, images, size=3)
    with torch.no_grad():
        maps = network.excitations["final"](network.backbone(images, split=True).final_split)
    joined = torch.cat(maps, dim=1)
    for index, label in enumerate(output.logits["final"].argmax(dim=1).tolist()):
        expected = torch.einsum("c,chw->hw", network.classifiers["final"].weight[label], joined[index]).clamp(min=0)
        torch.testing.assert_close(evidence[index], expected, rtol=1e-4, atol=1e-6)


def test_bf16_on_a_real_trunk():
    """The excitations and the convolutions that join maps."""
    network = build(input_size=SIZE, pretrained="none")
    for _, output, terms in training_steps(network, make_images(SIZE, 4), precision="bf16"):
        assert all(logits.dtype == torch.float32 for logits in output.logits.values())
        terms["total"].backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


@pytest.mark.slow
def test_a_real_trunk_traces_without_graph_break():
    """Also on a scripted one, in `test_systems.py`."""
    system_checks.forward_traces_without_graph_break(build(batch_norm="frozen"), make_images(SIZE))


# ---- Settings -------------------------------------------------------------------------------------------------------


def test_its_recipe_is_the_published_one():
    settings = parse_settings(CUB)
    assert (settings.epochs, settings.batch_size, settings.learning_rate, settings.weight_decay) == (30, 32, 0.01, 0.0)
    assert (settings.schedule, settings.milestones, settings.warmup_epochs) == ("steps", (15, 25), 0)
    assert (settings.head_learning_rate_factor, settings.momentum) == (1.0, 0.9)
    assert (settings.resize_size, settings.image_size, settings.flip) == (600, 448, 0.5)
    assert (settings.brightness, settings.contrast) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("dataset", "weights", "pooling", "combine_maps"),
    [
        ("cub", (0.5, 0.25, 0.5), "maximum", True),
        ("nabirds", (0.5, 0.25, 0.5), "maximum", True),
        ("cars", (1.0, 0.25, 1.0), "mean", True),
        ("aircraft", (0.5, 0.1, 0.5), "mean", True),
        ("dogs", (0.01, 0.01, 1.0), "mean", False),
    ],
)
def test_data_sets_have_their_published_variants(dataset, weights, pooling, combine_maps):
    options = parse_settings(["--model", "crossx", "--dataset", dataset, "--data_root", "x"]).options
    own = {"semantic_weights": weights, "stage3_pooling": pooling, "combine_maps": combine_maps, "parts": 2}
    assert options == own


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--parts", "0"], "parts is 0; expected a whole number of at least 1"),
        (["--semantic_weights", "1", "1", "-1"], "semantic_weights is [1.0, 1.0, -1.0]; expected each"),
        (["--warmup_epochs", "1"], "warmup_epochs is 1; expected 0"),
    ],
)
def test_what_cannot_be_is_refused(words, expected):
    with pytest.raises(SettingsError) as refusal:
        parse_settings([*CUB, *words])
    assert str(refusal.value).startswith(expected)
