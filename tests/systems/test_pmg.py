"""PMG against its description: the published network under its own names, its jigsaws, and a batch of four steps."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import networks.systems.pmg as pmg
import train
from config import parse_settings, rebuilt
from networks import build_network
from networks.jigsaw import permute_blocks
from utils.checkpoint import CheckpointError, load_checkpoint, load_published
from utils.options import SettingsError
from utils.reporting.metrics import EpochMeter
from utils.training.execution import Execution
from utils.training.learning import Learning, Objective
from utils.training.schedule import build_optimizer, plan_epoch

pytestmark = pytest.mark.usefixtures("thin_trunk")

CLASSES, SIZE, BRANCHES = 5, 128, ("stage2", "stage3", "final", "concat")


# ---- The published network, written out from its description ---------------------------------------------------------


class PublishedConvolution(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel_size: int, padding: int):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel_size, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-5, momentum=0.01)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class PublishedPMG(nn.Module):
    """The published network on a trunk of torchvision's, with its parameter names, the unused `fc` among them."""

    def __init__(self, trunk: nn.Module, classes: int):
        super().__init__()
        channels = (trunk.layer3[0].conv1.in_channels, trunk.layer4[0].conv1.in_channels, trunk.fc.in_features)
        self.features, width = trunk, channels[-1] // 2
        for number, inputs in enumerate(channels, start=1):
            block = nn.Sequential(PublishedConvolution(inputs, 512, 1, 0), PublishedConvolution(512, width, 3, 1))
            self.add_module(f"conv_block{number}", block)
            self.add_module(f"classifier{number}", self.head(width, classes))
        self.classifier_concat = self.head(3 * width, classes)

    @staticmethod
    def head(inputs: int, classes: int) -> nn.Module:
        layers = (
            nn.BatchNorm1d(inputs),
            nn.Linear(inputs, 512),
            nn.BatchNorm1d(512),
            nn.ELU(),
            nn.Linear(512, classes),
        )
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        trunk = self.features
        x = trunk.layer1(trunk.maxpool(trunk.relu(trunk.bn1(trunk.conv1(x)))))
        maps = [x := trunk.layer2(x), x := trunk.layer3(x), trunk.layer4(x)]
        blocks = (self.conv_block1, self.conv_block2, self.conv_block3)
        vectors = [block(map_).flatten(2).max(dim=2).values for block, map_ in zip(blocks, maps, strict=True)]
        heads = (self.classifier1, self.classifier2, self.classifier3)
        logits = [head(vector) for head, vector in zip(heads, vectors, strict=True)]
        return [*logits, self.classifier_concat(torch.cat(vectors, dim=1))]


def build_published() -> PublishedPMG:
    torch.manual_seed(3)
    trunk = torchvision.models.get_model("resnet18")
    for name, parameter in trunk.named_parameters():
        if name.endswith("bn2.weight"):
            nn.init.constant_(parameter, 0.3)  # or the residual sums of a new trunk grow without bound
    network = PublishedPMG(trunk, CLASSES)
    for module in network.modules():  # statistics that are not those of a new network
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network


@pytest.fixture
def published() -> PublishedPMG:
    return build_published()


@pytest.fixture
def pair(published, tmp_path) -> tuple[pmg.PMG, PublishedPMG]:
    """Our network with the published one's weights, and that one."""
    torch.save(published.state_dict(), tmp_path / "published.pth")
    network = build_network("pmg", num_classes=CLASSES, backbone="resnet18", input_size=SIZE, order_per_image=False)
    load_published(network, tmp_path / "published.pth")
    return network, copy.deepcopy(published)


def make_images(batch: int, size: int = SIZE) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("size", [SIZE, 160])
def test_logits_and_prediction_are_the_published_ones(pair, size):
    network, reference = (module.eval() for module in pair)
    network.input_size = size
    images = make_images(3, size)
    with torch.no_grad():
        output, expected = network(images), reference(images)
    assert tuple(output.logits) == BRANCHES
    for name, logits in zip(BRANCHES, expected, strict=True):
        torch.testing.assert_close(output.logits[name], logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(network.predict_logits(output), sum(expected), rtol=1e-4, atol=1e-5)
    network.prediction = ("concat",)
    torch.testing.assert_close(network.predict_logits(output), expected[-1], rtol=1e-4, atol=1e-5)


def test_a_published_checkpoint_that_does_not_fit_is_refused(published, tmp_path):
    state = published.state_dict()
    state["conv_block1.0.conv.bias"] = torch.zeros(512)
    del state["classifier2.4.bias"]
    torch.save({f"module.{name}": value for name, value in state.items()}, tmp_path / "published.pth")
    network = build_network("pmg", num_classes=CLASSES, backbone="resnet18", input_size=SIZE)
    with pytest.raises(CheckpointError) as refusal:
        load_published(network, tmp_path / "published.pth")
    assert "left over: conv_block1.0.conv.bias" in str(refusal.value)
    assert "missing: classifier2.4.bias" in str(refusal.value)


# ---- Steps ----------------------------------------------------------------------------------------------------------


def jigsaw_by_hand(image: Tensor, permutation: list[int], blocks: int) -> Tensor:
    """Block k of the result is block permutation[k] of the image [3, S, S]."""
    side, result = image.shape[1] // blocks, torch.empty_like(image)
    for place, source in enumerate(permutation):
        (y, x), (v, u) = (divmod(number, blocks) for number in (place, source))
        cut = image[:, v * side : (v + 1) * side, u * side : (u + 1) * side]
        result[:, y * side : (y + 1) * side, x * side : (x + 1) * side] = cut
    return result


@pytest.mark.parametrize("order_per_image", [True, False])
def test_the_steps_of_a_batch(order_per_image, monkeypatch):
    drawn, draw = [], pmg.cyclic_permutations

    def record(*arguments):
        drawn.append(draw(*arguments))
        return drawn[-1]

    monkeypatch.setattr(pmg, "cyclic_permutations", record)
    network = build_network(
        "pmg", num_classes=CLASSES, backbone="resnet18", input_size=SIZE, order_per_image=order_per_image
    )
    images, labels = make_images(3), torch.tensor([0, 3, 1])
    steps = list(network.steps(images, labels))
    assert [step.terms for step in steps] == [(name,) for name in BRANCHES]
    assert all(step.branches == BRANCHES and torch.equal(step.targets, labels) for step in steps)
    for step, permutations, blocks in zip(steps, drawn, (8, 4, 2), strict=False):
        assert permutations.shape == (3 if order_per_image else 1, blocks**2)
        orders = permutations.expand(3, -1).tolist()
        expected = [jigsaw_by_hand(image, order, blocks) for image, order in zip(images, orders, strict=True)]
        assert torch.equal(step.images, torch.stack(expected))
        assert not torch.equal(step.images, images)
    assert torch.equal(steps[-1].images, images)
    larger = list(network.steps(make_images(3, 160), labels))
    assert {step.images.shape for step in larger} == {(3, 3, SIZE, SIZE)}


@pytest.mark.parametrize(
    ("zeroed_gradients", "whole_passes"),
    [
        (True, True),
        pytest.param(False, True, marks=pytest.mark.slow),
        pytest.param(True, False, marks=pytest.mark.slow),
    ],
)
def test_two_batches_equal_the_published_training(pair, zeroed_gradients, whole_passes, monkeypatch):
    """In float64: in float32 the published code itself does not repeat what it computes.

    Passes that end early leave all weights as they are with whole ones; only the batch norms' statistics differ.
    """
    network, reference = (module.double().train() for module in pair)
    network.absent_gradients, network.input_size = not zeroed_gradients, 96
    network.options = dataclasses.replace(network.options, whole_passes=whole_passes)
    orders = {n: torch.arange(n * n).roll(1)[None] for n in (8, 4, 2)}
    monkeypatch.setattr(pmg, "cyclic_permutations", lambda batch, count, device: orders[int(count**0.5)])
    labels = torch.tensor([0, 3, 1, 1])
    batches = [make_images(4, 96).double(), make_images(4, 96).double().flip(-1)]

    rates = {"learning_rate": 2e-3, "head_learning_rate_factor": 10.0, "momentum": 0.9, "weight_decay": 5e-4}
    execution = Execution(torch.device("cpu"), channels_last=False)
    plan = plan_epoch(network, 1, network.loss_weights, warmup_epochs=0)
    objective = Objective(plan, execution, 0.0)
    optimizer = build_optimizer(network, **rates)
    learning = Learning(network, optimizer, objective, clip_gradient_norm=0.0, skip_nonfinite=None)
    meter = EpochMeter(torch.device("cpu"))
    for number, images in enumerate(batches, start=1):
        learning.learn_from(images, labels, number, ["a", "b", "c", "d"], meter)

    trunk = [p for name, p in reference.named_parameters() if name.startswith("features.")]
    heads = [p for name, p in reference.named_parameters() if not name.startswith("features.")]
    groups = [{"params": trunk, "lr": 2e-3}, {"params": heads, "lr": 2e-2}]
    optimizer = torch.optim.SGD(groups, lr=2e-3, momentum=0.9, weight_decay=5e-4)
    losses = []
    for images in batches:
        for index, blocks in enumerate((8, 4, 2, None)):
            shown = images if blocks is None else permute_blocks(images, orders[blocks], blocks)
            optimizer.zero_grad(set_to_none=not zeroed_gradients)
            loss = F.cross_entropy(reference(shown)[index], labels) * (2 if blocks is None else 1)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())

    expected = {name: value for name, value in reference.state_dict().items() if not name.startswith("features.fc.")}
    names, unlike = {ours: theirs for theirs, ours in network.published_names.items()}, set()
    for name, value in network.state_dict().items():
        (start,) = (ours for ours in names if name.startswith(ours))
        theirs = expected.pop(names[start] + name.removeprefix(start))
        if not whole_passes and any(part in name for part in ("running", "num_batches")):
            unlike |= {name} if not torch.equal(value, theirs) else set()
            continue
        torch.testing.assert_close(value, theirs, rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")
    assert expected == {}
    assert bool(unlike) != whole_passes
    assert not any(".layer1." in name or ".layer2." in name for name in unlike)
    figures = meter.compute()
    assert figures["images"] == 8
    assert figures["loss/total"] == pytest.approx(sum(losses) / 2, rel=1e-9)
    assert figures["loss/concat"] == pytest.approx((losses[3] + losses[7]) / 4, rel=1e-9)
    assert {name for name in figures if name.startswith("accuracy/")} == {f"accuracy/{name}" for name in BRANCHES}


def test_steps_that_are_not_whole_end_with_their_stage():
    network = build_network("pmg", num_classes=CLASSES, backbone="resnet18", input_size=96, whole_passes=False).train()
    called = []
    parts = {f"layer{number}": getattr(network.backbone.trunk, f"layer{number}")[0] for number in (2, 3, 4)}
    for name, module in (*parts.items(), *network.blocks.items(), *network.classifiers.items()):
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    expected = {
        "stage2": {"layer2"},
        "stage3": {"layer2", "layer3"},
        "final": {"layer2", "layer3", "layer4"},
        "concat": {"layer2", "layer3", "layer4", "stage2", "stage3", "final"},
    }
    for step in network.steps(make_images(2, 96), torch.tensor([0, 1])):
        (term,) = step.terms
        called.clear()
        assert set(network(step.images, branches=step.branches).logits) == {term}
        assert set(called) == expected[term] | {term}
    network.eval()
    called.clear()
    network(make_images(2, 96), branches=("stage2",))
    assert "layer4" in called  # whose map evidence is read from


def test_zeroed_gradients_move_what_a_step_does_not_reach():
    """After the first batch; published. Absent ones leave it where it is."""
    moved = {}
    for zeroed in (True, False):
        torch.manual_seed(0)
        options = {"backbone": "resnet18", "input_size": 96, "zeroed_gradients": zeroed}
        network = build_network("pmg", num_classes=CLASSES, pretrained="none", **options).train()
        weight = network.classifiers["final"][1].weight  # the third step's
        optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)
        plan = plan_epoch(network, 1, network.loss_weights, warmup_epochs=0)
        learning = Learning(network, optimizer, Objective(plan, Execution(torch.device("cpu")), 0.0), 0.0, None)
        images, labels = make_images(2, 96), torch.tensor([0, 1])
        meter = EpochMeter(torch.device("cpu"))
        learning.learn_from(images, labels, 1, ["a", "b"], meter)
        before, seen = weight.detach().clone(), []
        after_step = network.after_step
        network.after_step = lambda *a, seen=seen, weight=weight, after=after_step: (
            seen.append(weight.clone()),
            after(*a),
        )
        learning.learn_from(images, labels, 2, ["a", "b"], meter)
        moved[zeroed] = [not torch.equal(before, value) for value in seen]
    assert moved == {True: [True] * 4, False: [False, False, True, True]}


# ---- Settings and whole runs ----------------------------------------------------------------------------------------


def test_its_recipe_is_the_published_one_as_far_as_it_goes():
    settings = parse_settings(["--model", "pmg", "--dataset", "cub", "--data_root", "x"])
    recipe = (settings.epochs, settings.batch_size, settings.learning_rate, settings.head_learning_rate_factor)
    assert recipe == (200, 16, 2e-4, 10.0)
    assert (settings.weight_decay, settings.schedule, settings.warmup_epochs) == (5e-4, "cosine", 0)
    assert settings.options == {
        "granularities": (8, 4, 2),
        "order_per_image": True,
        "whole_passes": True,
        "zeroed_gradients": True,
    }


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["--granularities", "8", "5", "2"],
            "granularities is (8, 5, 2); expected numbers that divide input_size, 448",
        ),
        (["--granularities", "8", "4"], "granularities is [8, 4] (list); expected 3 whole numbers"),
        (["--batch_size", "1"], "batch_size is 1; expected at least 2 for pmg"),
        (["--warmup_epochs", "1"], "warmup_epochs is 1; expected 0"),
        (["--graph_neighbours", "2"], "graph_neighbours is a setting of sgkrl and sgkrl_published, not of pmg"),
    ],
)
def test_what_cannot_be_is_refused(words, expected):
    with pytest.raises(SettingsError) as refusal:
        parse_settings(["--model", "pmg", "--dataset", "cub", "--data_root", "x", *words])
    assert str(refusal.value).startswith(expected)


@pytest.mark.slow
@pytest.mark.usefixtures("thin_trunk")
def test_a_run_goes_on_exactly_and_is_evaluated(tiny_run, tmp_path, evaluation_script):
    """Stopped within an epoch, where gradients that are zero and not absent have been there before."""
    arguments = {
        name: tiny_run(tmp_path / name, "--epochs", "2", "--save_every_steps", "1", model="pmg")
        for name in ("whole", "stopped")
    }
    train.main(arguments["whole"])
    step, calls = pmg.PMG.after_step, []

    def interrupted(self, output, targets):
        calls.append(1)
        if len(calls) == 4 * 4 + 2:  # 3 batches an epoch: in the second batch of epoch 2
            raise KeyboardInterrupt
        step(self, output, targets)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pmg.PMG, "after_step", interrupted)
        train.main(arguments["stopped"])
    train.main(arguments["stopped"])
    whole, stopped = (load_checkpoint(tmp_path / name / "folder-pmg" / "last.pth") for name in arguments)
    assert all(torch.equal(value, stopped["network"][name]) for name, value in whole["network"].items())
    folder = tmp_path / "whole" / "folder-pmg"
    line = json.loads((folder / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    total = sum(weight * line[f"train/loss/{name}"] for name, weight in zip(BRANCHES, (1, 1, 1, 2), strict=True))
    assert line["train/loss/total"] == pytest.approx(total, rel=1e-6)
    assert line["train/images"] == 12
    evaluation_script.main([str(folder / "best.pth")])
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert report["prediction"] == "sum of logits of stage2, stage3, final, concat"
    assert report["branches"].keys() == {"prediction", *BRANCHES}
    assert report["boxes"] is None


@pytest.mark.parametrize(
    ("words", "expected"),
    [([], (550, 8)), (["--input_size", "224"], (275, 4)), (["--image_size", "896"], (1100, 16))],
    ids=["448", "224", "detail"],
)
def test_pictures_are_loaded_as_published_at_any_size(words, expected):
    settings = parse_settings(["--dataset", "cub", "--data_root", "somewhere", "--model", "pmg", *words])
    assert (settings.resize_size, settings.padding, settings.normalization) == (*expected, "half")


def test_a_run_from_before_crops_keeps_to_whole_pictures():
    saved = dataclasses.asdict(parse_settings(["--dataset", "cub", "--data_root", "somewhere", "--model", "pmg"]))
    del saved["resize_size"], saved["padding"], saved["normalization"]
    settings = rebuilt(saved)
    assert (settings.resize_size, settings.padding, settings.normalization) == (448, 0, "imagenet")
