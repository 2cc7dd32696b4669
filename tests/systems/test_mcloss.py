"""MC-Loss against its description: the public network under its own names, its two terms image by image, its masks."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import networks.systems.mcloss as mcloss
import train
from config import parse_settings
from networks import build_network
from networks.channel_groups import channel_groups, channel_overlap, draw_masks, logits_of_groups
from utils.checkpoint import CheckpointError, load_checkpoint, load_published
from utils.errors import UserError
from utils.options import SettingsError

pytestmark = pytest.mark.usefixtures("thin_trunk")

CLASSES, SIZE = 5, 96


# ---- The public network, written out from its description ------------------------------------------------------------


class PublishedTrunk(nn.Module):
    def __init__(self, trunk: nn.Module):
        super().__init__()
        stages = (trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4)
        self.backbone = nn.Sequential(trunk.conv1, trunk.bn1, trunk.relu, trunk.maxpool, *stages)


class PublishedHead(nn.Module):
    def __init__(self, channels: int, classes: int):
        super().__init__()
        layers = (nn.Linear(channels, 512), nn.BatchNorm1d(512), nn.ELU(), nn.Linear(512, classes))
        self.dense = nn.Sequential(nn.BatchNorm1d(channels), *layers)


class Published(nn.Module):
    """Trunk and head, which the public code saves apart."""

    def __init__(self, trunk: nn.Module, classes: int):
        super().__init__()
        torch.manual_seed(3)
        self.net, self.metric = PublishedTrunk(trunk), PublishedHead(trunk.fc.in_features, classes)
        for name, module in self.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):  # statistics that are not those of a new network
                nn.init.uniform_(module.running_mean, -0.1, 0.1)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
                if name.endswith(("bn2", "bn3")):
                    nn.init.constant_(module.weight, 0.3)  # or the sums of a new trunk grow without bound

    def save(self, path) -> str:
        torch.save({"net": self.net.state_dict(), "metric": self.metric.state_dict(), "acc": 86.9, "epoch": 3}, path)
        return str(path)

    def forward(self, x: Tensor) -> Tensor:
        return self.metric.dense(F.adaptive_max_pool2d(self.net.backbone(x), 1)[:, :, 0, 0])


def published_overlap(feature_map: Tensor, sizes: list[int]) -> list[list[float]]:
    """1 - covered / size of every class of every image, class by class."""
    values = []
    for image in feature_map:
        first, of_image = 0, []
        for size in sizes:
            shares = torch.stack([channel.flatten().softmax(0) for channel in image[first : first + size]])
            covered = sum(column.max().item() for column in shares.unbind(1))
            of_image.append(1 - covered / size)
            first += size
        values.append(of_image)
    return values


def sizes_of(channels: int, classes: int) -> list[int]:
    quotient, rest = divmod(channels, classes)
    return [quotient] * (classes - rest) + [quotient + 1] * rest


def make_map(channels: int, batch: int = 3) -> Tensor:
    return 3 * torch.randn(batch, channels, 4, 5, generator=torch.Generator().manual_seed(0)).relu()


def make_images(batch: int, size: int = SIZE) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def build(**settings: object) -> mcloss.MCLoss:
    torch.manual_seed(0)
    given = {"num_classes": CLASSES, "backbone": "resnet18", "input_size": SIZE}
    return build_network("mcloss", **(given | settings))


def assert_evaluates_alike(network: mcloss.MCLoss, published: Published, images: Tensor) -> None:
    with torch.no_grad():
        output, expected = network.eval()(images), published.eval()(images)
    assert tuple(output.logits) == ("raw",)
    for logits in (output.logits["raw"], network.predict_logits(output)):
        assert (logits - expected).norm() / expected.norm() < 3e-4
    assert expected.std() > 1e-3


@pytest.mark.parametrize("size", (SIZE, 128))
def test_logits_are_the_published_ones(tmp_path, size):
    network, published = build(input_size=size), Published(torchvision.models.get_model("resnet18"), CLASSES)
    load_published(network, published.save(tmp_path / "published.pth"))
    assert_evaluates_alike(network, published, make_images(3, size))


@pytest.mark.slow
def test_logits_are_the_published_ones_with_resnet50_at_448_pixels(tmp_path):
    network, published = build_network("mcloss", num_classes=36), Published(torchvision.models.resnet50(), 36)
    load_published(network, published.save(tmp_path / "published.pth"))
    assert_evaluates_alike(network, published, make_images(2, 448))


def test_a_published_checkpoint_that_does_not_fit_is_refused(tmp_path):
    published = Published(torchvision.models.get_model("resnet18"), CLASSES)
    published.metric.dense.add_module("5", nn.Linear(2, 2, bias=False))
    del published.metric.dense[1]
    with pytest.raises(CheckpointError, match="does not fit"):
        load_published(build(), published.save(tmp_path / "other.pth"))


# ---- The two terms ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "classes"), ((15, 5), (17, 5), (11, 5), (2048, 36)))
def test_channels_are_dealt_to_classes(channels, classes):
    groups = channel_groups(torch.arange(channels)[None], classes)
    dealt = [class_.tolist() for group in groups for class_ in group[0]]
    assert [len(class_) for class_ in dealt] == sizes_of(channels, classes)
    assert [channel for class_ in dealt for channel in class_] == list(range(channels))


@pytest.mark.parametrize(("channels", "share"), ((15, 0.5), (50, 0.4), (53, 0.4), (12, 0.0)))
def test_masks_leave_out_the_published_number_of_each_class(channels, share):
    torch.manual_seed(0)
    masks = draw_masks(200, channels, 5, share, torch.device("cpu"))
    first = 0
    for size in sizes_of(channels, 5):
        of_class = masks[:, first : first + size]
        assert (of_class.sum(dim=1) == size - math.floor(share * size)).all()
        if share:
            assert 0 < of_class.float().mean(dim=0).min() <= of_class.float().mean(dim=0).max() < 1  # at random
        first += size
    torch.manual_seed(0)
    assert torch.equal(draw_masks(200, channels, 5, share, torch.device("cpu")), masks)


@pytest.mark.parametrize("masks", (1, 3))
@pytest.mark.parametrize("channels", (15, 17))
def test_logits_of_the_groups_are_those_of_a_loop(channels, masks):
    map_, mask = make_map(channels), draw_masks(masks, channels, 5, 0.5, torch.device("cpu"))
    logits = logits_of_groups(map_, 5, mask)
    for image, found in enumerate(logits):
        first = 0
        for class_, size in enumerate(sizes_of(channels, 5)):
            kept = [map_[image, c] * mask[image if masks > 1 else 0, c] for c in range(first, first + size)]
            expected = sum(max(channel[y, x] for channel in kept) for y in range(4) for x in range(5)) / 20
            assert found[class_] == pytest.approx(expected.item(), rel=1e-5)
            first += size


@pytest.mark.parametrize("channels", (15, 17))
def test_the_overlap_is_that_of_a_loop(channels):
    """With two sizes of groups, the means over the classes of each are added, as in the public code."""
    map_, sizes = make_map(channels), sizes_of(channels, 5)
    for found, expected in zip(channel_overlap(map_, 5), published_overlap(map_, sizes), strict=True):
        means = []
        for size in sorted(set(sizes)):
            of_size = [value for value, own in zip(expected, sizes, strict=True) if own == size]
            means.append(sum(of_size) / len(of_size))
        assert found.item() == pytest.approx(sum(means), rel=1e-5)


def test_the_overlap_is_least_where_channels_share_no_cell():
    apart, alike = torch.zeros(1, 6, 2, 3), torch.zeros(1, 6, 2, 3)
    apart[0, torch.arange(6), torch.arange(6) // 3, torch.arange(6) % 3] = 100.0
    alike[0, :, 0, 0] = 100.0
    assert channel_overlap(apart, 2).item() == pytest.approx(0, abs=1e-6)
    assert channel_overlap(alike, 2).item() == pytest.approx(2 / 3)


@pytest.mark.parametrize("mask_per_image", (False, True))
def test_the_loss_is_the_published_one(mask_per_image, monkeypatch):
    drawn, draw = [], mcloss.draw_masks

    def record(*arguments):
        drawn.append(draw(*arguments))
        return drawn[-1]

    monkeypatch.setattr(mcloss, "draw_masks", record)
    network, images = build(mask_per_image=mask_per_image, pretrained="none").double().train(), make_images(4).double()
    labels, maps = torch.tensor([0, 3, 1, 1]), []
    network.backbone.register_forward_hook(lambda module, given, features: maps.append(features.final))
    output = network(images)
    terms = network.losses(output, labels)
    (map_,), (masks,) = maps, drawn
    assert masks.shape == (4 if mask_per_image else 1, map_.shape[1])
    by_channels = F.cross_entropy(logits_of_groups(map_, CLASSES, masks), labels)
    raw = F.cross_entropy(network.classifier(map_.flatten(2).max(dim=2).values), labels)
    expected = raw + 1.5 * by_channels + 20 * channel_overlap(map_, CLASSES).mean()
    total = sum(network.loss_weights[name] * term for name, term in terms.items())
    assert terms.keys() == {"raw", "channels", "diversity"}
    torch.testing.assert_close(total, expected)
    assert build().loss_weights == {"raw": 1.0, "channels": 0.0005, "diversity": 0.005}
    assert network.losses(network.eval()(images), labels).keys() == {"raw"}


def test_gradients_are_right():
    """Against finite differences, at a map without equal values."""
    map_ = torch.randn(2, 7, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).abs()
    map_.requires_grad_()
    masks = draw_masks(1, 7, 3, 0.5, torch.device("cpu"))
    assert torch.autograd.gradcheck(lambda x: logits_of_groups(x, 3, masks), map_)
    assert torch.autograd.gradcheck(lambda x: channel_overlap(x, 3), map_)


# ---- Settings and whole runs -----------------------------------------------------------------------------------------


def test_its_recipes_are_the_published_ones():
    words = ["--model", "mcloss", "--dataset", "cub", "--data_root", "x", "--input_size", "448"]
    settings = parse_settings(words)
    assert (settings.epochs, settings.batch_size, settings.weight_decay) == (150, 32, 5e-4)
    assert (settings.learning_rate, settings.head_learning_rate_factor) == (0.005, 10.0)
    assert (settings.schedule, settings.resize_size, settings.padding) == ("exponential", 600, 0)
    assert settings.decay_rate**30 == pytest.approx(0.8)
    assert settings.options == {"masked_share": 0.4, "mask_per_image": False}
    settings = parse_settings([*words[:-1], "224", "--pretrained", "none"])
    assert (settings.epochs, settings.learning_rate, settings.head_learning_rate_factor) == (300, 0.1, 1.0)
    assert (settings.schedule, settings.milestones, settings.normalization) == ("steps", (149, 224), "half")
    assert (settings.resize_size, settings.padding, settings.options["masked_share"]) == (224, 4, 0.5)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--masked_share", "1"], "masked_share is 1.0; expected a number from 0 to less than 1"),
        (["--batch_size", "1"], "batch_size is 1; expected at least 2 for mcloss"),
    ],
)
def test_what_cannot_be_is_refused(words, expected):
    with pytest.raises(SettingsError) as refusal:
        parse_settings(["--model", "mcloss", "--dataset", "cub", "--data_root", "x", *words])
    assert str(refusal.value).startswith(expected)


def test_more_classes_than_pairs_of_channels_are_refused():
    with pytest.raises(UserError, match="128 channels to 65 classes"):
        build(num_classes=65)
    assert build(num_classes=64).num_classes == 64


@pytest.mark.slow
def test_a_run_goes_on_exactly_with_the_same_masks(tiny_run, tmp_path):
    more = ("--epochs", "2", "--save_every_steps", "1", "--learning_rate", "0.01")
    arguments = {name: tiny_run(tmp_path / name, *more, model="mcloss") for name in ("whole", "stopped")}
    train.main(arguments["whole"])
    step, calls = mcloss.MCLoss.after_step, []

    def interrupted(self, output, targets):
        calls.append(1)
        if len(calls) == 5:  # 3 batches an epoch
            raise KeyboardInterrupt
        step(self, output, targets)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(mcloss.MCLoss, "after_step", interrupted)
        train.main(arguments["stopped"])
    train.main(arguments["stopped"])
    whole, stopped = (load_checkpoint(tmp_path / name / "folder-mcloss" / "last.pth") for name in arguments)
    assert all(torch.equal(value, stopped["network"][name]) for name, value in whole["network"].items())
