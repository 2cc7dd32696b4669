"""NTS-Net against its description: the published network, one image, part and pair of parts at a time, and a run."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from parts_by_hand import list_anchors, list_boxes, propose
from small_systems import SIZE, Variant, flat, learners, make_images, run
from torch import Tensor, nn

import train
from config import parse_settings
from networks import build_network
from networks.systems.ntsnet import NTSNet
from utils.checkpoint import CheckpointError, load_checkpoint, load_published
from utils.options import SettingsError

pytestmark = pytest.mark.usefixtures("thin_trunk")

CLASSES, PARTS, BEST, DEFAULT = 5, 6, 4, Variant("ntsnet")


# ---- The published network, written out from its description ---------------------------------------------------------


class ProposalNet(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.down1 = nn.Conv2d(channels, 128, 3, 1, 1)
        self.down2 = nn.Conv2d(128, 128, 3, 2, 1)
        self.down3 = nn.Conv2d(128, 128, 3, 2, 1)
        self.tidy1, self.tidy2, self.tidy3 = (nn.Conv2d(128, count, 1) for count in (6, 6, 9))

    def forward(self, maps: Tensor) -> Tensor:
        d1 = F.relu(self.down1(maps))
        d2 = F.relu(self.down2(d1))
        d3 = F.relu(self.down3(d2))
        return torch.cat([tidy(d).flatten(1) for tidy, d in ((self.tidy1, d1), (self.tidy2, d2), (self.tidy3, d3))], 1)


class PublishedNTSNet(nn.Module):
    """With its parameter names; sizes scale with the input. `dropout`: of embeddings, also in evaluation."""

    def __init__(self, trunk: nn.Module, classes: int):
        super().__init__()
        channels = trunk.fc.in_features
        self.pretrained_model, self.dropout = trunk, 0.0
        trunk.fc = nn.Linear(channels, classes)
        self.proposal_net = ProposalNet(channels)
        self.concat_net = nn.Linear(channels * (BEST + 1), classes)
        self.partcls_net = nn.Linear(channels, classes)

    def look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The final map, and the embedding with values dropped."""
        trunk = self.pretrained_model
        x = trunk.maxpool(trunk.relu(trunk.bn1(trunk.conv1(images))))
        x = trunk.layer4(trunk.layer3(trunk.layer2(trunk.layer1(x))))
        return x, F.dropout(x.mean(dim=(2, 3)), self.dropout, training=True)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        size = images.shape[-1]
        maps, embedding = self.look(images)
        scores = self.proposal_net(maps.detach())
        boxes = list_boxes(size)
        padded = F.pad(images, (size // 2,) * 4)
        crops, picks = [], []
        for image, of_image in zip(padded, scores.detach().numpy(), strict=True):
            picks.append(propose(of_image, boxes, PARTS))
            for x0, y0, x1, y1 in boxes[picks[-1]] + size // 2:
                part = image[None, :, y0 : y1 + 1, x0 : x1 + 1]
                crops.append(F.interpolate(part, size=(size // 2,) * 2, mode="bilinear", align_corners=True))
        of_parts = self.look(torch.cat(crops))[1].reshape(len(images), PARTS, -1)
        return {
            "raw": self.pretrained_model.fc(embedding),
            "concat": self.concat_net(torch.cat([of_parts[:, :BEST].flatten(1), embedding], dim=1)),
            "part": self.partcls_net(of_parts),
            "boxes": torch.from_numpy(boxes[picks]).float(),
            "scores": scores.gather(1, torch.tensor(picks)),
        }

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        output = self(images)
        total = F.cross_entropy(output["raw"], labels) + F.cross_entropy(output["concat"], labels)
        total = total + F.cross_entropy(output["part"].flatten(0, 1), labels.repeat_interleave(PARTS))
        for logits, scores, label in zip(output["part"], output["scores"], labels.tolist(), strict=True):
            losses = [-part.log_softmax(0)[label].item() for part in logits]
            for i in range(PARTS):
                for j in range(PARTS):
                    if losses[j] > losses[i]:
                        total = total + (1 - scores[i] + scores[j]).clamp(min=0) / len(images)
        return total


def build_published(backbone: str = "resnet18", classes: int = CLASSES) -> PublishedNTSNet:
    torch.manual_seed(3)
    trunk = torchvision.models.get_model(backbone)
    for name, parameter in trunk.named_parameters():
        if name.endswith("bn2.weight" if backbone == "resnet18" else "bn3.weight"):
            nn.init.constant_(parameter, 0.3)  # or the residual sums of a new trunk grow without bound
    network = PublishedNTSNet(trunk, classes)
    for module in network.modules():  # statistics that are not those of a new network
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network.eval()


@pytest.fixture
def pair(tmp_path) -> tuple[NTSNet, PublishedNTSNet]:
    """Our network with the published one's weights, and that one."""
    published = build_published()
    torch.save({"epoch": 3, "train_acc": 0.5, "net_state_dict": published.state_dict()}, tmp_path / "published.pth")
    network = build_network("ntsnet", num_classes=CLASSES, backbone="resnet18", input_size=SIZE)
    load_published(network, tmp_path / "published.pth")
    return network.eval(), published


@pytest.mark.parametrize("size", [SIZE, 160])
@torch.no_grad()
def test_logits_and_parts_are_the_published_ones(size, tmp_path):
    published = build_published()
    torch.save(published.state_dict(), tmp_path / "published.pth")
    network = build_network("ntsnet", num_classes=CLASSES, backbone="resnet18", input_size=size)
    load_published(network, tmp_path / "published.pth")
    images = make_images(size, batch=3)
    output, given = run(network.eval(), images)
    assert list(flat(output)) == ["logits.raw", "logits.concat", "logits.part", "part_boxes", "extras.part_scores"]
    assert [tuple(passed.shape) for passed in given] == [(3, 3, size, size), (18, 3, size // 2, size // 2)]
    expected = published(images)
    assert torch.equal(output.part_boxes, expected["boxes"])
    torch.testing.assert_close(output.extras["part_scores"], expected["scores"], rtol=1e-4, atol=1e-5)
    for name, logits in output.logits.items():
        torch.testing.assert_close(logits, expected[name], rtol=1e-4, atol=1e-4)
    assert torch.equal(network.predict_logits(output), output.logits["concat"])


@pytest.mark.slow
@torch.no_grad()
def test_logits_are_the_published_ones_at_full_size(tmp_path):
    published = build_published("resnet50", 36)
    torch.save({"net_state_dict": published.state_dict()}, tmp_path / "published.pth")
    network = build_network("ntsnet", num_classes=36)
    load_published(network, tmp_path / "published.pth")
    assert sum(parameter.numel() for parameter in network.parameters()) == pytest.approx(26.7e6, rel=3e-3)
    images = make_images(448, batch=1)
    output, expected = network.eval()(images), published(images)
    assert torch.equal(output.part_boxes, expected["boxes"])
    for name, logits in output.logits.items():
        assert (logits - expected[name]).abs().max() <= 3e-4 * expected[name].abs().max(), name


@torch.no_grad()
def test_evaluation_is_random_only_where_that_is_asked_for(pair):
    """As published: one draw for each embedding, of the picture first, then of its parts."""
    network, published = pair
    images = make_images(batch=2)
    network.options = type(network.options)(dropout_in_evaluation=True)
    published.dropout = 0.5
    torch.manual_seed(7)
    output = network(images)
    again = network(images)
    torch.manual_seed(7)
    expected = published(images)
    for name, logits in output.logits.items():
        torch.testing.assert_close(logits, expected[name], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(logits, again.logits[name], atol=1e-3)


@pytest.mark.parametrize("missing", ("pretrained_model.fc.bias", "proposal_net.tidy2.weight", "partcls_net.weight"))
def test_a_published_checkpoint_that_does_not_fit_is_refused(pair, missing, tmp_path):
    """The trunk's classifier is the raw one here, not a leftover."""
    state = pair[1].state_dict()
    del state[missing]
    state["proposal_net.down4.bias"] = torch.zeros(128)
    torch.save(state, tmp_path / "published.pth")
    with pytest.raises(CheckpointError) as refusal:
        load_published(pair[0], tmp_path / "published.pth")
    assert "left over: proposal_net.down4.bias" in str(refusal.value)
    assert f"missing: {missing}" in str(refusal.value)


def test_losses_and_gradients_are_the_published_ones(pair):
    network, published = (module.double() for module in pair)
    images, labels = make_images(batch=3).double(), torch.tensor([2, 0, 4])
    terms = network.losses(network(images), labels)
    assert terms.keys() == network.loss_weights.keys() == {"raw", "concat", "part", "ranking"}
    total = sum(network.loss_weights[name] * term for name, term in terms.items())
    expected = published.loss(images, labels)
    torch.testing.assert_close(total.double(), expected.double(), rtol=1e-6, atol=0)  # the ranking is in float32
    total.backward()
    expected.backward()
    for theirs, parameter in published.named_parameters():
        start = next(start for start in network.published_names if theirs.startswith(start))
        ours = network.get_parameter(network.published_names[start] + theirs.removeprefix(start))
        torch.testing.assert_close(ours.grad, parameter.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("every_level", (True, False))
@torch.no_grad()
def test_parts_in_training(every_level):
    """The best of all are the published ones; one of each level teaches all of the navigator."""
    network = DEFAULT.build(parts_of_every_level=every_level).train()
    images, boxes = make_images(batch=3), list_boxes(SIZE)
    levels = np.array([anchor["level"] for anchor in list_anchors(SIZE)])
    scores = []
    network.navigator.register_forward_hook(lambda module, inputs, found: scores.append(found.numpy()))
    for training in (True, False):
        found = network.train(training)(images).part_boxes
        rule = {"levels": levels if training and every_level else None}
        expected = [boxes[propose(of_image, boxes, PARTS, **rule)] for of_image in scores.pop()]
        np.testing.assert_array_equal(found.numpy(), expected)


# ---- Branches and terms ----------------------------------------------------------------------------------------------


def test_who_learns():
    network = DEFAULT.build_scripted(dropout=0.0)
    assert learners(network, make_images()) == {
        "raw": {"backbone", "classifier"},
        "concat": {"backbone", "concat_classifier"},
        "part": {"backbone", "part_classifier"},
    }
    labels = torch.tensor([0, 1])
    network.zero_grad()
    network.losses(network(make_images()), labels)["ranking"].backward()
    assert {name.split(".")[0] for name, p in network.named_parameters() if p.grad is not None} == {"navigator"}


@pytest.mark.parametrize(("branch", "looked_at"), (("raw", []), ("concat", [BEST]), ("part", [PARTS])))
@torch.no_grad()
def test_only_what_a_branch_needs_is_looked_at(branch, looked_at):
    network, images = DEFAULT.evaluated, make_images()
    everything, _ = run(network, images)
    output, given = run(network, images, branches=(branch,))
    assert [len(passed) // 2 for passed in given] == [1, *looked_at]
    torch.testing.assert_close(output.logits[branch], everything.logits[branch])


@torch.no_grad()
def test_parts_of_larger_images_are_cut_out_of_these():
    network, images = DEFAULT.evaluated, make_images(2 * SIZE)
    from_large = network(images)
    from_small = network(F.interpolate(images, size=(SIZE, SIZE), mode="bilinear", antialias=True))
    assert torch.equal(from_large.part_boxes, from_small.part_boxes)
    assert not torch.allclose(from_large.logits["part"], from_small.logits["part"], atol=1e-5)


@torch.no_grad()
def test_classifiers_see_the_same_dropped_values():
    network, images = DEFAULT.build_scripted(dropout=0.5).train(), make_images()
    seen = {}
    for name in ("classifier", "concat_classifier", "part_classifier"):
        module = getattr(network, name)
        module.register_forward_pre_hook(lambda module, inputs, name=name: seen.update({name: inputs[0]}))
    network(images)
    *best, picture = seen["concat_classifier"].unflatten(1, (BEST + 1, -1)).unbind(1)
    assert torch.equal(picture, seen["classifier"])
    assert torch.equal(torch.stack(best, dim=1), seen["part_classifier"][:, :BEST])
    assert 0.3 < (picture == 0).float().mean() < 0.7


def test_other_numbers_of_parts():
    network = DEFAULT.build_scripted(part_proposals=3, parts_in_prediction=2)
    output = network(make_images())
    assert output.logits["part"].shape == (2, 3, CLASSES)
    assert network.loss_weights["ranking"] == 3
    assert network.concat_classifier.in_features == 3 * network.backbone.embedding_channels


# ---- Settings and whole runs ----------------------------------------------------------------------------------------

CUB = ["--model", "ntsnet", "--dataset", "cub", "--data_root", "x"]


def test_its_recipe_is_the_published_one():
    settings = parse_settings(CUB)
    assert (settings.epochs, settings.batch_size, settings.learning_rate) == (499, 16, 1e-3)
    assert (settings.schedule, settings.milestones, settings.weight_decay) == ("steps", (59, 99), 1e-4)
    assert (settings.momentum, settings.warmup_epochs, settings.head_learning_rate_factor) == (0.9, 0, 1.0)
    assert (settings.flip, settings.brightness, settings.contrast, settings.dropout) == (0.5, 0.0, 0.0, 0.5)
    assert settings.resize_size == 600


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--parts_in_prediction", "7"], "parts_in_prediction is 7; expected at most part_proposals, 6"),
        (["--anchor_sizes", "48", "96"], "anchor_sizes is [48, 96] (list); expected 3 whole numbers"),
        (["--prediction", "part"], "prediction"),
        (["--coarse_channels", "2"], "coarse_channels is a setting of scrim, not of ntsnet"),
    ],
)
def test_what_cannot_be_is_refused(words, expected):
    with pytest.raises(ValueError) as refusal:
        settings = parse_settings([*CUB, *words])
        build_network("ntsnet", num_classes=3, backbone="resnet18", prediction=settings.prediction)
    sentence = str(refusal.value)
    assert sentence.startswith(expected)
    assert isinstance(refusal.value, SettingsError) or "choose from the branches of ntsnet, raw, concat" in sentence


@pytest.mark.slow
def test_a_run_goes_on_exactly_and_is_evaluated(tiny_run, tmp_path, evaluation_script):
    arguments = {
        name: tiny_run(tmp_path / name, "--epochs", "2", "--save_every_steps", "1", model="ntsnet")
        for name in ("whole", "stopped")
    }
    train.main(arguments["whole"])
    after_step, calls = NTSNet.after_step, []

    def stop(*given: object) -> None:
        calls.append(given)
        if len(calls) == 5:  # the second step of the second epoch
            raise KeyboardInterrupt
        after_step(*given)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(NTSNet, "after_step", stop)
        train.main(arguments["stopped"])
    train.main(arguments["stopped"])
    whole, stopped = (load_checkpoint(tmp_path / name / "folder-ntsnet" / "last.pth") for name in arguments)
    assert all(torch.equal(value, stopped["network"][name]) for name, value in whole["network"].items())

    folder = tmp_path / "whole" / "folder-ntsnet"
    line = json.loads((folder / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    weights = {"raw": 1, "concat": 1, "part": 1, "ranking": 15}
    total = sum(weight * line[f"train/loss/{name}"] for name, weight in weights.items())
    assert line["train/loss/total"] == pytest.approx(total, rel=1e-6)
    evaluation_script.main([str(folder / "best.pth")])
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert report["prediction"] == "concat"
    assert report["branches"].keys() == {"prediction", "raw", "concat", "part"}
