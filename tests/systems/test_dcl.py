"""DCL against its description: the published network under its own names, how it takes pictures apart, its losses."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from cases import slow_but_for
from small_systems import training_steps
from torch import Tensor, nn

import networks.systems.dcl as dcl
from config import parse_settings
from networks import build_network, jigsaw
from networks.jigsaw import guess_permutations, neighbour_permutations, permute_blocks, permute_resampled_blocks
from utils.checkpoint import CheckpointError, load_published
from utils.options import SettingsError
from utils.reporting.metrics import EpochMeter
from utils.training.execution import Execution
from utils.training.learning import Learning, Objective
from utils.training.schedule import build_optimizer, plan_epoch

pytestmark = pytest.mark.usefixtures("thin_trunk")

CLASSES, SIZE, REGIONS = 5, 128, 2  # at 128 pixels there are 4 x 4 cells, at 448 14 x 14 for 7 x 7 regions
LABELS = torch.tensor([0, 3, 1, 1])


# ---- The published network, written out from its description --------------------------------------------------------


class PublishedDCL(nn.Module):
    """The published network on a trunk of torchvision's, with its parameter names; `two`: its flag `cls_2`."""

    def __init__(self, trunk: nn.Module, classes: int, *, two: bool = False):
        super().__init__()
        layers = (trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4)
        self.model = nn.Sequential(trunk.conv1, trunk.bn1, trunk.relu, trunk.maxpool, *layers)
        channels = trunk.fc.in_features
        self.classifier = nn.Linear(channels, classes, bias=False)
        self.classifier_swap = nn.Linear(channels, 2 if two else 2 * classes, bias=False)
        self.Convmask = nn.Conv2d(channels, 1, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        maps = self.model(x)
        mask = torch.tanh(F.avg_pool2d(self.Convmask(maps), 2, stride=2)).flatten(1)
        embedding = maps.mean(dim=(2, 3))
        return self.classifier(embedding), self.classifier_swap(embedding), mask


def build_published(architecture: str = "resnet18", classes: int = CLASSES, *, two: bool = False) -> PublishedDCL:
    torch.manual_seed(3)
    trunk = torchvision.models.get_model(architecture)
    last = "bn2.weight" if architecture == "resnet18" else "bn3.weight"
    for name, parameter in trunk.named_parameters():
        if name.endswith(last):
            nn.init.constant_(parameter, 0.3)  # or the residual sums of a new trunk grow without bound
    network = PublishedDCL(trunk, classes, two=two)
    for module in network.modules():  # statistics that are not those of a new network
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network


def build(**settings: object) -> dcl.DCL:
    return build_network("dcl", num_classes=CLASSES, **{"backbone": "resnet18", "input_size": SIZE, **settings})


def build_pair(folder, *, two: bool = False) -> tuple[dcl.DCL, PublishedDCL]:
    """Our network with the published one's weights, and that one."""
    reference = build_published(two=two)
    torch.save({f"module.{name}": value for name, value in reference.state_dict().items()}, folder / "weights.pth")
    network = build(regions=REGIONS, swap_classes="two" if two else "each")
    load_published(network, folder / "weights.pth")
    return network, copy.deepcopy(reference)


def make_images(batch: int, size: int = SIZE) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def test_logits_and_prediction_are_the_published_ones(tmp_path):
    network, reference = (module.eval() for module in build_pair(tmp_path))
    images = make_images(3)
    with torch.no_grad():
        output, (classification, swap, _) = network(images), reference(images)
    assert tuple(output.logits) == ("raw", "swap")
    torch.testing.assert_close(output.logits["raw"], classification, rtol=1e-4, atol=1e-5)
    expected = classification + swap[:, :CLASSES] + swap[:, CLASSES:]
    torch.testing.assert_close(network.predict_logits(output), expected, rtol=1e-4, atol=1e-5)


def test_with_two_classes_of_swaps_the_prediction_is_raw(tmp_path):
    network, reference = (module.eval() for module in build_pair(tmp_path, two=True))
    with torch.no_grad():
        output, (classification, *_) = network(make_images(2)), reference(make_images(2))
    assert tuple(output.logits) == network.prediction == network.evaluated == ("raw",)
    torch.testing.assert_close(network.predict_logits(output), classification, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_published_network_at_its_own_size(tmp_path):
    reference = build_published("resnet50", classes=36).eval()
    torch.save(reference.state_dict(), tmp_path / "published.pth")
    network = build_network("dcl", num_classes=36).eval()
    load_published(network, tmp_path / "published.pth")
    assert network.regions == 7
    images = make_images(2, 448)
    with torch.no_grad():
        output, (classification, swap, _) = network(images), reference(images)
    torch.testing.assert_close(output.logits["raw"], classification, rtol=3e-4, atol=1e-5)
    expected = classification + swap[:, :36] + swap[:, 36:]
    torch.testing.assert_close(network.predict_logits(output), expected, rtol=3e-4, atol=1e-5)


def test_a_published_checkpoint_that_does_not_fit_is_refused(tmp_path):
    state = build_published(two=True).state_dict()
    del state["Convmask.bias"]
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError) as refusal:
        load_published(build(), tmp_path / "weights.pth")
    for part in ("missing: Convmask.bias", "classifier_swap.weight (2, 128) instead of (10, 128)"):
        assert part in str(refusal.value)


# ---- Training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("two", slow_but_for([False], [False, True]))
def test_two_batches_equal_the_published_training(two, tmp_path, monkeypatch):
    """In float64, with the same orders of blocks and true places."""
    network, reference = (module.double().train() for module in build_pair(tmp_path, two=two))
    orders = neighbour_permutations(4, REGIONS, torch.device("cpu"))
    monkeypatch.setattr(dcl, "neighbour_permutations", lambda batch, blocks, device: orders)
    batches = [make_images(4).double(), make_images(4).double().flip(-1)]

    plan = plan_epoch(network, 1, network.loss_weights, warmup_epochs=0)
    rates = {"learning_rate": 8e-4, "head_learning_rate_factor": 10.0, "momentum": 0.9, "weight_decay": 0.0}
    objective = Objective(plan, Execution(torch.device("cpu"), channels_last=False), 0.0)
    learning = Learning(network, build_optimizer(network, **rates), objective, 0.0, None)
    meter = EpochMeter(torch.device("cpu"))
    for number, images in enumerate(batches, start=1):
        learning.learn_from(images, LABELS, number, ["a", "b", "c", "d"], meter)

    trunk, heads = list(reference.model.parameters()), [p for n, p in reference.named_parameters() if n[:5] != "model"]
    optimizer = torch.optim.SGD([{"params": trunk}, {"params": heads, "lr": 8e-3}], lr=8e-4, momentum=0.9)
    totals = []
    for images in batches:
        shown, labels, swaps, places = [], [], [], []
        for image, label, order in zip(images, LABELS.tolist(), orders.tolist(), strict=True):
            shown += [image, permute_blocks(image[None], torch.tensor([order]), REGIONS)[0]]
            labels += [label, label]
            swaps += [1, 0] if two else [label, label + CLASSES]
            places += [[(i - 2) / 4 for i in range(4)], [(i - 2) / 4 for i in order]]
        classification, swap, mask = reference(torch.stack(shown))
        loss = F.cross_entropy(classification, torch.tensor(labels)) + F.cross_entropy(swap, torch.tensor(swaps))
        loss = loss + (mask - torch.tensor(places).double()).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        totals.append(loss.item())

    assert meter.compute()["loss/total"] == pytest.approx(sum(totals) / 2, rel=1e-6)  # the places' targets are float32
    expected = reference.state_dict()
    names = {ours: theirs for theirs, ours in network.published_names.items()}
    for name, value in network.state_dict().items():
        (start,) = (ours for ours in names if name.startswith(ours))
        theirs = expected.pop(names[start] + name.removeprefix(start))
        torch.testing.assert_close(value, theirs, rtol=1e-7, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
    assert expected == {}


def test_destroyed_pictures_are_left_out_where_nothing_needs_them():
    network, shown = build(input_size=96).train(), []
    network.backbone.register_forward_pre_hook(lambda module, inputs: shown.append(len(inputs[0])))
    for branches, expected in ((("raw",), 2), (("swap",), 4), (("raw", "destroyed"), 4), (None, 4)):
        output = network(make_images(2, 96), branches=branches)
        assert set(output.logits) == set(branches or network.branches)
        assert shown.pop() == expected


def test_guessed_places_are_what_the_loss_takes():
    network = build(input_size=96, guessed_places=True)
    for _, output, terms in training_steps(network, make_images(4, 96)):
        places = output.extras["places"]
        in_order = torch.arange(9).expand(4, -1)
        targets = (torch.stack([in_order, places], dim=1) - 4) / 9
        expected = (output.extras["locations"] - targets).abs().mean()
        torch.testing.assert_close(terms["location"], expected)


# ---- How pictures are taken apart -----------------------------------------------------------------------------------


def order_by_hand(coins: list[list[bool]], row_coins: list[bool]) -> list[int]:
    """Tile by tile, row by row; coin j of a row says whether tile j changes places with the one left of it."""
    rows: list[list[int]] = []
    for number, of_row in enumerate(coins):
        row: list[int] = []
        for column, coin in enumerate(of_row):
            row.append(number * len(of_row) + column)
            if column and coin:
                row[-1], row[-2] = row[-2], row[-1]
        rows.append(row)
        if number and row_coins[number]:
            rows[-1], rows[-2] = rows[-2], rows[-1]
    return [tile for row in rows for tile in row]


@pytest.mark.parametrize("blocks", [2, 3, 7])
def test_orders_equal_those_swap_by_swap(blocks, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    draws = [torch.rand(20 * blocks, blocks, generator=generator), torch.rand(20, blocks, generator=generator)]
    queue = list(draws)
    monkeypatch.setattr(jigsaw.torch, "rand", lambda *shape, device: queue.pop(0))
    found = neighbour_permutations(20, blocks, torch.device("cpu"))
    coins, row_coins = draws[0].view(20, blocks, blocks) < 0.5, draws[1] < 0.5
    expected = [order_by_hand(a, b) for a, b in zip(coins.tolist(), row_coins.tolist(), strict=True)]
    assert found.tolist() == expected


def test_blocks_move_as_the_published_ones_do():
    """The shares that the published shuffle was measured to have, along either axis."""
    torch.manual_seed(0)
    orders = neighbour_permutations(3000, 7, torch.device("cpu"))
    sources = torch.arange(49).expand_as(orders)
    places = torch.empty_like(orders).scatter(1, orders, sources)
    for moved in (places // 7 - sources // 7, places % 7 - sources % 7):
        shares = [float((moved == distance).float().mean()) for distance in (-2, -1, 0, 1, 2, 3)]
        assert shares == pytest.approx([0, 0.43, 0.32, 0.14, 0.06, 0.03], abs=0.01)
    assert float((orders == sources).float().mean()) == pytest.approx(0.10, abs=0.01)


def test_resampled_blocks_equal_those_one_by_one():
    size, blocks = 128, 4
    images, orders = make_images(2, size), neighbour_permutations(2, blocks, torch.device("cpu"))
    found = permute_resampled_blocks(images, orders, blocks)
    inner = size - 2 * 3  # 10 of 448 pixels on every side
    edges = [3 + int(inner * number / blocks) for number in range(blocks + 1)]
    for image, order, result in zip(images, orders.tolist(), found, strict=True):
        small = torch.empty(3, 4 * 30, 4 * 30)
        for place, source in enumerate(order):
            (row, column), (y, x) = divmod(place, blocks), divmod(source, blocks)
            tile = image[None, :, edges[y] : edges[y + 1], edges[x] : edges[x + 1]]
            tile = F.interpolate(tile, size=(30, 30), mode="bilinear", align_corners=True)[0]
            small[:, row * 30 : row * 30 + 30, column * 30 : column * 30 + 30] = tile
        expected = F.interpolate(small[None], size=(size, size), mode="bilinear")[0]
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


def test_places_are_guessed_by_the_nearest_colour():
    images, orders = make_images(3, 96), neighbour_permutations(3, 3, torch.device("cpu"))
    resampled = permute_resampled_blocks(images, orders, 3)
    for image, one, guess in zip(images, resampled, guess_permutations(resampled, images, 3).tolist(), strict=True):
        ours, theirs = (
            [float(x[:, y : y + 32, z : z + 32].mean(dim=(1, 2)).sum()) for y in (0, 32, 64) for z in (0, 32, 64)]
            for x in (one, image)
        )
        assert guess == [min(range(9), key=lambda j, a=value, t=theirs: abs(a - t[j])) for value in ours]
    clean = permute_blocks(images, orders, 3)  # would give them away
    assert torch.equal(guess_permutations(clean, images, 3), orders)


# ---- Settings -------------------------------------------------------------------------------------------------------


def parse(*words: str, dataset: str = "cub"):
    return parse_settings(["--model", "dcl", "--dataset", dataset, "--data_root", "x", *words])


def test_its_recipe_is_the_published_one_as_far_as_it_goes():
    settings = parse()
    recipe = (settings.epochs, settings.batch_size, settings.learning_rate, settings.head_learning_rate_factor)
    assert recipe == (180, 16, 8e-4, 10.0)
    assert (settings.weight_decay, settings.schedule, settings.milestones) == (0.0, "steps", (60, 120))
    assert (settings.brightness, settings.contrast, settings.warmup_epochs) == (0.0, 0.0, 0)
    assert (settings.rotation, settings.resize_size, settings.image_size) == (15.0, 512, 448)
    options = {"regions": 7, "swap_classes": "each", "location_weight": 1.0, "guessed_places": False}
    assert settings.options == options
    assert parse(dataset="cars").options == options | {"location_weight": 0.01}
    assert parse(dataset="aircraft").options == options | {"location_weight": 0.01, "regions": 2}


def test_there_are_as_many_regions_as_fit():
    sides = {96: 3, 128: 4, 160: 5, 192: 6, 224: 7, 256: 4, 288: 6, 448: 7}
    assert {side: parse("--input_size", str(side)).options["regions"] for side in sides} == sides


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--regions", "5"], "regions is 5; expected a number from 2 to 14 that divides input_size, 448"),
        (["--regions", "1"], "regions is 1; expected a number from 2 to 14"),
        (["--warmup_epochs", "1"], "warmup_epochs is 1; expected 0"),
    ],
)
def test_what_cannot_be_is_refused(words, expected):
    with pytest.raises(SettingsError) as refusal:
        parse(*words)
    assert str(refusal.value).startswith(expected)
