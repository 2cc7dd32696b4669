"""CAL against its description: the published network under its own names, its crops, drops, centres and training."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
import torchvision
from cases import slow_but_for
from launching import run_two_processes
from torch import Tensor, nn

import networks.systems.cal as cal
import train
from config import parse_settings
from networks import attention_crops, build_network, centres
from networks.attention_pooling import attention_pooling
from networks.centres import Centres
from networks.views import add_views
from utils.checkpoint import CheckpointError, load_checkpoint, load_published
from utils.options import SettingsError
from utils.reporting.metrics import EpochMeter
from utils.training.execution import Execution
from utils.training.learning import Learning, Objective
from utils.training.schedule import build_optimizer, plan_epoch

pytestmark = pytest.mark.usefixtures("thin_trunk")

CLASSES, SIZE, MAPS, CHANNELS = 5, 128, 4, 128
LABELS = torch.tensor([0, 3, 1, 3])


# ---- The published network, written out from its description --------------------------------------------------------


class PublishedAttention(nn.Module):
    def __init__(self, channels: int, maps: int):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(channels, maps, 1, bias=False), nn.BatchNorm2d(maps, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class PublishedCAL(nn.Module):
    """The published network on a trunk of torchvision's, with its parameter names."""

    def __init__(self, trunk: nn.Module, channels: int, maps: int, classes: int):
        super().__init__()
        layers = (trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4)
        self.features = nn.Sequential(trunk.conv1, trunk.bn1, trunk.relu, trunk.maxpool, *layers)
        for module in trunk.layer4[0].modules():  # stride 1, without dilation
            if isinstance(module, nn.Conv2d):
                module.stride = (1, 1)
        self.attentions = PublishedAttention(channels, maps)
        self.fc = nn.Linear(maps * channels, classes, bias=False)

    @staticmethod
    def pool(maps: Tensor, attention: Tensor) -> Tensor:
        vectors = []
        for image_maps, image_attention in zip(maps, attention, strict=True):
            rows = [(one * image_maps).sum(dim=(1, 2)) / one.numel() for one in image_attention]
            vector = torch.cat(rows)
            vector = vector.sign() * torch.sqrt(vector.abs() + 1e-6)
            vectors.append(F.normalize(vector, dim=0))
        return torch.stack(vectors)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The logits, their effect, the features, the attention."""
        maps = self.features(x)
        attention = self.attentions(maps)
        features, false = self.pool(maps, attention), self.pool(maps, fake_attention(attention, random=self.training))
        logits = self.fc(features * 100)
        return logits, logits - self.fc(false * 100), features, attention

    def predict(self, x: Tensor) -> tuple[Tensor, Tensor, list[tuple[int, int, int, int]]]:
        """The logits of pictures and of their crops, and the crops' rows and columns."""
        logits, *_, attention = self(x)
        crops = [crop(image, maps.mean(dim=0), 0.1, 0.05) for image, maps in zip(x, attention, strict=True)]
        return logits, self(torch.stack([cut for cut, _ in crops]))[0], [place for _, place in crops]


def enlarge(maps: Tensor, size: int) -> Tensor:
    return F.interpolate(maps, size=(size, size), mode="bilinear", align_corners=True)


def crop(image: Tensor, attention: Tensor, share: float, padding: float) -> tuple[Tensor, tuple[int, int, int, int]]:
    """An image [3, S, S] where its map [g, g] is high: cut out and enlarged."""
    size = image.shape[-1]
    found = (enlarge(attention[None, None], size)[0, 0] >= share * attention.max()).nonzero()
    (top, left), (bottom, right) = found.min(dim=0).values.tolist(), found.max(dim=0).values.tolist()
    top, left = (max(int(first - padding * size), 0) for first in (top, left))
    bottom, right = (min(int(last + padding * size), size) for last in (bottom, right))
    return enlarge(image[None, :, top:bottom, left:right], size)[0], (top, bottom, left, right)


def drop(image: Tensor, attention: Tensor, share: float) -> Tensor:
    return image * (enlarge(attention[None, None], image.shape[-1])[0] < share * attention.max())


def fake_attention(attention: Tensor, *, random: bool) -> Tensor:
    """In training something that is the same for both codes, from 0 to 2."""
    if not random:
        return torch.ones_like(attention)
    return (torch.arange(attention.numel()) * 0.37 % 2).reshape(attention.shape).to(attention)


def build_published(
    architecture: str = "resnet18", maps: int = MAPS, classes: int = CLASSES, size: int = SIZE
) -> PublishedCAL:
    torch.manual_seed(3)
    trunk = torchvision.models.get_model(architecture)
    last = "bn2.weight" if architecture == "resnet18" else "bn3.weight"
    for name, parameter in trunk.named_parameters():
        if name.endswith(last):
            nn.init.constant_(parameter, 0.3)  # or the residual sums of a new trunk grow without bound
    network = PublishedCAL(trunk, trunk.fc.in_features, maps, classes)
    for module in network.modules():  # statistics that are not those of a new network
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    with torch.no_grad():  # a map sees something in a tenth of the cells, and all maps much the same
        network.attentions.conv.weight += 3 * network.attentions.conv.weight[:1].clone()
        responses = network.attentions.conv(network.eval().features(make_images(3, size))).transpose(0, 1).flatten(1)
        network.attentions.bn.running_mean = responses.quantile(0.9, dim=1)
        network.attentions.bn.running_var = responses.var(dim=1)
    return network


@pytest.fixture
def published() -> PublishedCAL:
    return build_published()


def build(**settings: object) -> cal.CAL:
    settings = {"backbone": "resnet18", "input_size": SIZE, "attention_maps": MAPS, **settings}
    return build_network("cal", num_classes=CLASSES, **settings)


@pytest.fixture
def pair(published, tmp_path) -> tuple[cal.CAL, PublishedCAL]:
    """Our network with the published one's weights, and that one."""
    torch.save({"logs": {"epoch": 3}, "state_dict": published.state_dict()}, tmp_path / "model_bestacc.pth")
    network = build()
    load_published(network, tmp_path / "model_bestacc.pth")
    return network, copy.deepcopy(published)


def make_images(batch: int, size: int = SIZE) -> Tensor:
    """Blobs: what stands out in the maps is in one place."""
    generator = torch.Generator().manual_seed(1)
    blobs = F.interpolate(torch.randn(batch, 3, 4, 4, generator=generator), size=(size, size), mode="bicubic")
    return 1.5 * blobs + 0.2 * torch.randn(batch, 3, size, size, generator=generator)


def assert_predicts_as_published(network: cal.CAL, reference: PublishedCAL, images: Tensor, **tolerance: float) -> None:
    network, reference = network.eval(), reference.eval()
    with torch.no_grad():
        output, (raw, cropped, places) = network(images), reference.predict(images)
    assert tuple(output.logits) == ("raw", "crop")
    boxes = [[left, top, right - 1, bottom - 1] for top, bottom, left, right in places]
    assert output.object_boxes.tolist() == boxes
    for logits, expected in ((output.logits["raw"], raw), (output.logits["crop"], cropped)):
        torch.testing.assert_close(logits, expected, **tolerance)
    torch.testing.assert_close(network.predict_logits(output), (raw + cropped) / 2, **tolerance)
    assert len({tuple(box) for box in boxes}) > 1


@pytest.mark.parametrize("size", [SIZE, 160])
def test_logits_crops_and_prediction_are_the_published_ones(pair, size):
    pair[0].input_size = size
    assert_predicts_as_published(*pair, make_images(3, size), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_published_network_at_its_own_size(tmp_path):
    reference = build_published("resnet50", maps=32, classes=36, size=448)
    torch.save(reference.state_dict(), tmp_path / "published.pth")
    network = build_network("cal", num_classes=36)
    load_published(network, tmp_path / "published.pth")
    assert_predicts_as_published(network, reference, make_images(3, 448), rtol=3e-4, atol=3e-4)


@pytest.mark.parametrize(("prediction", "views"), [(("raw", "crop"), 4), (("raw",), 1), (("crop",), 3)])
def test_views_are_those_that_the_prediction_looks_at(pair, prediction, views):
    network = copy.deepcopy(pair[0])
    network.prediction = prediction
    assert add_views(network, ("three_crops",)) == views


@torch.no_grad()
@pytest.mark.parametrize("ensembling", ["mean_logits", "mean_probability"])
def test_eight_views_are_the_published_ones(pair, ensembling):
    """Its infer.py: the picture, crops of three sizes by the mean of its maps, and the same of its mirror image."""
    network, reference = pair
    network, images = copy.deepcopy(network).eval(), make_images(3)
    network.ensembling = ensembling
    assert add_views(network, ("mirror", "three_crops")) == 8
    members = []
    for shown in (images, images.flip(-1)):
        logits, *_, attention = reference(shown)
        members.append(logits)
        for share, padding in ((0.3, 0.1), (0.2, 0.1), (0.1, 0.05)):
            crops = [crop(i, a.mean(dim=0), share, padding)[0] for i, a in zip(shown, attention, strict=True)]
            members.append(reference(torch.stack(crops))[0])
    output = network(images, branches=network.prediction)
    predicted = network.predict_logits(output)
    if ensembling == "mean_logits":
        torch.testing.assert_close(predicted, sum(members) / 8, atol=1e-4, rtol=1e-4)
    else:
        expected = sum(member.softmax(-1) for member in members) / 8
        torch.testing.assert_close(predicted.softmax(-1), expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(output.object_boxes, copy.deepcopy(pair[0]).eval()(images).object_boxes)


def test_a_checkpoint_with_centres_is_loaded_and_one_that_does_not_fit_is_refused(published, tmp_path):
    state = {f"module.{name}": value for name, value in published.state_dict().items()}
    found = torch.randn(CLASSES, MAPS * CHANNELS)
    torch.save({"logs": {}, "state_dict": state, "feature_center": found}, tmp_path / "model.ckpt")
    network = build()
    load_published(network, tmp_path / "model.ckpt")
    assert torch.equal(network.centres.vectors, found)
    del state["module.attentions.bn.bias"]
    state["module.fc.bias"] = torch.zeros(CLASSES)
    torch.save({"state_dict": state, "feature_center": found[:3]}, tmp_path / "model.ckpt")
    with pytest.raises(CheckpointError) as refusal:
        load_published(build(), tmp_path / "model.ckpt")
    for part in ("left over: fc.bias", "missing: attentions.bn.bias", f"feature_center (3, {MAPS * CHANNELS})"):
        assert part in str(refusal.value)


# ---- Training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lose_repeated_labels", slow_but_for([True], [True, False]))
def test_two_batches_equal_the_published_training(pair, lose_repeated_labels, monkeypatch):
    """In float64. With `lose_repeated_labels` the centres, too, are those of the published code."""
    network, reference = (module.double().train() for module in pair)
    network.centres.last_only, network.input_size = lose_repeated_labels, 96
    shares = {(0.4, 0.6): [0.41, 0.48, 0.53, 0.6], (0.2, 0.5): [0.2, 0.3, 0.35, 0.49]}
    monkeypatch.setattr(cal, "draw_maps", lambda attention, count: attention[:, :count].detach())
    monkeypatch.setattr(cal, "uniform", lambda count, low, high, device: torch.tensor(shares[low, high]).double())
    monkeypatch.setattr(cal, "counterfactual_attention", fake_attention)
    batches = [make_images(4, 96).double(), make_images(4, 96).double().flip(-1)]

    plan = plan_epoch(network, 1, network.loss_weights, warmup_epochs=0)
    rates = {"learning_rate": 1e-3, "head_learning_rate_factor": 1.0, "momentum": 0.9, "weight_decay": 1e-5}
    learning = Learning(
        network, build_optimizer(network, **rates), Objective(plan, Execution(torch.device("cpu")), 0.0), 0.0, None
    )
    meter = EpochMeter(torch.device("cpu"))
    for number, images in enumerate(batches, start=1):
        learning.learn_from(images, LABELS, number, ["a", "b", "c", "d"], meter)

    optimizer = torch.optim.SGD(reference.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-5)
    stored, totals = torch.zeros(CLASSES, MAPS * CHANNELS).double(), []
    for images in batches:
        raw, raw_effect, features, attention = reference(images)
        attention = attention.detach()
        crops = [crop(x, a[0], t, 0.1)[0] for x, a, t in zip(images, attention, shares[0.4, 0.6], strict=True)]
        drops = [drop(x, a[1], t) for x, a, t in zip(images, attention, shares[0.2, 0.5], strict=True)]
        logits, effect, *_ = reference(torch.stack(crops + drops))
        nearest = F.normalize(stored[LABELS], dim=1)
        loss = F.cross_entropy(raw, LABELS) / 3 + 2 / 3 * F.cross_entropy(logits, LABELS.repeat(2))
        loss = loss + F.cross_entropy(torch.cat([raw_effect, effect]), LABELS.repeat(3))
        loss = loss + (features - nearest).square().sum() / 4
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        totals.append(loss.item())
        moves = 0.05 * (features.detach() - nearest)
        if lose_repeated_labels:
            stored[LABELS] += moves  # on a CPU the last one stays
        else:
            for label, move in zip(LABELS.tolist(), moves, strict=True):
                stored[label] += move

    assert meter.compute()["loss/total"] == pytest.approx(sum(totals) / 2, rel=1e-9)
    torch.testing.assert_close(network.centres.vectors, stored, rtol=1e-9, atol=1e-11)
    expected = reference.state_dict()
    names = {ours: theirs for theirs, ours in network.published_names.items()}
    for name, value in network.state_dict().items():
        (start,) = (ours for ours in names if name.startswith(ours))
        if name != "centres.vectors":
            theirs = expected.pop(names[start] + name.removeprefix(start))
            torch.testing.assert_close(value, theirs, rtol=1e-8, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}")
    assert expected == {}


def test_only_the_passes_and_crops_that_are_trained_are_computed():
    network, shown = build(input_size=96).train(), []
    network.backbone.register_forward_pre_hook(lambda module, inputs: shown.append(len(inputs[0])))
    for branches, expected in ((("raw", "raw_effect"), [2]), (("crop",), [2, 2]), (("drop_effect", "crop"), [2, 4])):
        shown.clear()
        output = network(make_images(2, 96), branches=branches)
        assert (set(output.logits), shown) == (set(branches), expected)


def test_counterfactual_attention_is_random_in_training_alone():
    attention = torch.zeros(40, 5, 10, 10)
    drawn = cal.counterfactual_attention(attention, random=True)
    assert 0 <= drawn.min() < 0.01
    assert 1.99 < drawn.max() < 2
    assert drawn.mean() == pytest.approx(1, abs=0.02)
    assert drawn.std() == pytest.approx(2 / math.sqrt(12), abs=0.02)
    assert torch.equal(cal.counterfactual_attention(attention, random=False), torch.ones_like(attention))
    features = torch.randn(2, 6, 3, 3)
    averaged = features.mean(dim=(2, 3)).repeat(1, 5)
    averaged = averaged.sign() * (averaged.abs() + 1e-6).sqrt()
    found = attention_pooling(features, torch.ones(2, 5, 3, 3))
    torch.testing.assert_close(found, averaged / averaged.norm(dim=1, keepdim=True))


# ---- Maps that are drawn, crops and drops ---------------------------------------------------------------------------


def test_maps_are_drawn_by_the_root_of_their_sums():
    torch.manual_seed(0)
    sums = torch.tensor([1.0, 4.0, 0.0, 9.0])
    attention = (torch.arange(4.0)[:, None, None] + 1) * torch.ones(4, 2, 2)  # that tell them apart
    attention = torch.where(sums[:, None, None] > 0, attention / attention.sum((1, 2), True) * sums[:, None, None], 0.0)
    drawn = attention_crops.draw_maps(attention.expand(6000, -1, -1, -1), 2)
    assert drawn.shape == (6000, 2, 2, 2)
    found = drawn.sum(dim=(2, 3))
    for which in (found[:, 0], found[:, 1], found[(found[:, 0] - 4).abs() < 0.01, 1]):  # the second whatever the first
        shares = [float(((which - value).abs() < 0.01).float().mean()) for value in sums]
        assert shares == pytest.approx([1 / 6, 2 / 6, 0, 3 / 6], abs=0.04)
    nothing = attention_crops.draw_maps(torch.zeros(3, 4, 2, 2), 2)
    assert torch.equal(nothing, torch.zeros(3, 2, 2, 2))


@pytest.mark.parametrize("size", [96, 128, 320])
@pytest.mark.parametrize("padding", [0.1, 0.05])
def test_crops_and_drops_equal_those_one_by_one(size, padding):
    generator = torch.Generator().manual_seed(2)
    maps = torch.rand(12, 5, 5, generator=generator).pow(3).double()
    maps[0] = 0
    shares = torch.linspace(0.2, 0.9, 12).double()
    images = torch.randn(12, 3, size, size, generator=generator).double()
    pixels = attention_crops.attended_pixels(maps, shares, size)
    boxes = attention_crops.padded_boxes(pixels, padding)
    for index, (image, one, share) in enumerate(zip(images, maps, shares, strict=True)):
        _, (top, bottom, left, right) = crop(image, one, share, padding)
        assert boxes[index].tolist() == [left, top, right - 1, bottom - 1]
        assert torch.equal(image * ~pixels[index], drop(image, one, share))
    assert boxes[0].tolist() == [0, 0, size - 1, size - 1]  # the whole of a picture that nothing looks at
    assert len(boxes.unique(dim=0)) > 6


# ---- Centres --------------------------------------------------------------------------------------------------------


def centres_by_hand(start: Tensor, features: Tensor, labels: list[int], *, last_only: bool) -> Tensor:
    result = start.clone()
    for index, label in enumerate(labels):
        if not (last_only and label in labels[index + 1 :]):
            length = start[label].norm()
            result[label] += 0.05 * (features[index] - (start[label] / length if length > 0 else 0))
    return result


@pytest.mark.parametrize("last_only", [True, False])
def test_centres_move_with_all_images_or_with_the_last_of_a_class(last_only):
    generator, moving = torch.Generator().manual_seed(4), Centres(4, 6, last_only=last_only)
    for labels in ([2, 0, 2, 2, 1], [1, 1, 0, 2, 1]):
        features = F.normalize(torch.randn(5, 6, generator=generator), dim=1)
        expected = centres_by_hand(moving.vectors, features, labels, last_only=last_only)
        far = moving.distances(features, torch.tensor(labels))
        for value, feature, label in zip(far.tolist(), features, labels, strict=True):
            centre = moving.vectors[label] / max(moving.vectors[label].norm(), 1e-12)
            assert value == pytest.approx(float((feature - centre).square().sum()), rel=1e-5)
        moving.move(features, torch.tensor(labels))
        torch.testing.assert_close(moving.vectors, expected)
    assert torch.equal(moving.vectors[3], torch.zeros(6))


def test_processes_move_the_centres_by_the_batch_of_all(monkeypatch):
    """Two processes that share a batch, one after the other; what they send each other is in the slow test below."""
    generator = torch.Generator().manual_seed(5)
    features, labels = F.normalize(torch.randn(6, 8, generator=generator), dim=1), torch.tensor([2, 0, 2, 1, 2, 0])
    alone = Centres(3, 8)
    alone.move(features, labels)
    monkeypatch.setattr(centres, "of_all_processes", lambda values: features if values.is_floating_point() else labels)
    for part in (slice(0, 3), slice(3, 6)):
        together = Centres(3, 8)
        together.move(features[part], labels[part])
        assert torch.equal(together.vectors, alone.vectors)


@pytest.mark.slow
def test_two_processes_move_the_centres_as_one():
    result = run_two_processes("tests/gathered_centres.py")
    assert result.returncode == 0, result.stderr[-2000:]


def test_replicas_of_data_parallel_leave_the_centres_to_the_whole_batch():
    network = build(input_size=96).train()
    parts = [network(images) for images in make_images(4, 96).chunk(2)]
    assert not network.centres.vectors.any()
    features = torch.cat([part.extras["features"] for part in parts])
    gathered = parts[0]._replace(extras={"features": features})
    network.after_step(gathered, LABELS)
    expected = centres_by_hand(torch.zeros_like(network.centres.vectors), features, LABELS.tolist(), last_only=False)
    torch.testing.assert_close(network.centres.vectors, expected.detach())


# ---- Settings and whole runs ----------------------------------------------------------------------------------------


def test_its_recipe_is_the_published_one_as_far_as_it_goes():
    settings = parse_settings(["--model", "cal", "--dataset", "cub", "--data_root", "x"])
    assert (settings.epochs, settings.batch_size, settings.learning_rate, settings.weight_decay) == (
        160,
        16,
        1e-3,
        1e-5,
    )
    assert (settings.schedule, settings.decay_rate**2) == ("exponential", pytest.approx(0.9))
    assert (settings.brightness, settings.contrast, settings.warmup_epochs) == (0.126, 0.0, 0)
    assert (settings.saturation, settings.resize_size, settings.image_size) == (0.5, 512, 448)
    assert (settings.last_stride, settings.ensembling) == (1, "mean_logits")
    assert settings.options == {"attention_maps": 32, "lose_repeated_labels": False}
    network = build()
    weights = dict.fromkeys(network.branches, 1 / 3) | {"centre": 1.0}
    assert network.loss_weights == pytest.approx(weights)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--attention_maps", "0"], "attention_maps is 0; expected a whole number of at least 1"),
        (["--warmup_epochs", "1"], "warmup_epochs is 1; expected 0"),
    ],
)
def test_what_cannot_be_is_refused(words, expected):
    with pytest.raises(SettingsError) as refusal:
        parse_settings(["--model", "cal", "--dataset", "cub", "--data_root", "x", *words])
    assert str(refusal.value).startswith(expected)


@pytest.mark.usefixtures("thin_trunk")
def test_a_run_goes_on_exactly_with_its_centres(tiny_run, tmp_path):
    arguments = {
        name: tiny_run(tmp_path / name, "--epochs", "2", "--save_every_steps", "1", model="cal")
        for name in ("whole", "stopped")
    }
    train.main(arguments["whole"])
    step, calls = cal.CAL.after_step, []

    def interrupted(self, output, targets):
        calls.append(1)
        if len(calls) == 5:  # 3 batches an epoch: in the second batch of epoch 2
            raise KeyboardInterrupt
        step(self, output, targets)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cal.CAL, "after_step", interrupted)
        train.main(arguments["stopped"])
    train.main(arguments["stopped"])
    whole, stopped = (load_checkpoint(tmp_path / name / "folder-cal" / "last.pth") for name in arguments)
    assert all(torch.equal(value, stopped["network"][name]) for name, value in whole["network"].items())
    assert whole["network"]["centres.vectors"].any()
