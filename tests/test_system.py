"""The base of all systems: what one inherits that states nothing but its branches, and what it may state otherwise."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from small_systems import ScriptedBackbone, make_images
from torch import Tensor, nn

from config import parse_settings
from networks import Shared, build_network, build_options, defaults_of
from networks.classifier import Classifier
from networks.losses import classification_losses
from networks.outputs import ENSEMBLINGS, NetworkOutput
from networks.system import NoOptions, Step, System
from utils.errors import UserError
from utils.options import Count, SettingsError, require
from utils.training.execution import Execution
from utils.training.learning import Objective
from utils.training.schedule import EpochPlan, plan_epoch

LABELS = torch.tensor([3, 1])
CPU = Execution(torch.device("cpu"))


class Toy(System):
    """Two classifiers of one map; keeps the labels that its passes were given."""

    branches = evaluated = prediction = ("raw", "peak")
    loss_weights = {"raw": 1.0, "peak": 0.5}

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(ScriptedBackbone(), NoOptions(), Shared(input_size=96, dropout=0.25))
        self.classifier, self.peak_classifier = Classifier(32, 5), Classifier(32, 5)
        self.seen: list[Tensor | None] = []

    def forward(self, images, *, labels=None, mask_background=False, branches=None) -> NetworkOutput:
        self.seen.append(labels)
        features = self.backbone(images)
        peak = features.final.amax(dim=(2, 3))
        return NetworkOutput({"raw": self.classifier(features.embedding), "peak": self.peak_classifier(peak)})


class Attentive(Toy):
    """Asks for its labels, and learns from every image twice."""

    needs_labels = True

    def steps(self, images: Tensor, labels: Tensor) -> Iterator[Step]:
        yield Step(torch.cat([images, images.flip(-1)]), torch.cat([labels, labels]))
        yield Step(images, labels, terms=("peak",))


def objective(system: System) -> Objective:
    return Objective(plan_epoch(system, 1, system.loss_weights, warmup_epochs=0), CPU, 0.1)


# ---- what is inherited --------------------------------------------------------------------------------------------


def test_a_batch_is_one_step_unless_said_otherwise() -> None:
    images = make_images(96)
    (step,) = Toy().steps(images, LABELS)
    assert step.images is images and step.targets is LABELS
    assert (step.terms, step.branches) == (None, None)


@pytest.mark.parametrize("label_smoothing", (0.0, 0.2))
def test_losses_are_the_cross_entropy_of_every_branch(label_smoothing: float) -> None:
    output = Toy()(make_images(96))
    terms = Toy().losses(output, LABELS, label_smoothing=label_smoothing)
    expected = classification_losses(output, LABELS, label_smoothing=label_smoothing)
    assert terms.keys() == expected.keys() == {"raw", "peak"}
    assert all(torch.equal(terms[name], expected[name]) for name in terms)


def test_the_prediction_is_the_mean_probability() -> None:
    system = Toy().eval()
    output = system(make_images(96))
    mean = (output.logits["raw"].softmax(-1) + output.logits["peak"].softmax(-1)) / 2
    torch.testing.assert_close(system.predict_logits(output).softmax(-1), mean)
    torch.testing.assert_close(system.predict_logits(output), mean.log())
    for ensembling in ENSEMBLINGS:
        system.ensembling, system.prediction = ensembling, ("peak",)
        assert torch.equal(system.predict_logits(output), output.logits["peak"])


def test_logits_can_be_ensembled_instead() -> None:
    system = Toy().eval()
    output = system(make_images(96))
    raw, peak = (output.logits[name].tolist() for name in ("raw", "peak"))
    system.ensembling = "sum_logits"
    total = [[a + b for a, b in zip(*rows, strict=True)] for rows in zip(raw, peak, strict=True)]
    torch.testing.assert_close(system.predict_logits(output), torch.tensor(total))
    system.ensembling = "mean_logits"
    torch.testing.assert_close(system.predict_logits(output), torch.tensor(total) / 2)
    low = NetworkOutput({name: logits.bfloat16() for name, logits in output.logits.items()})
    assert system.predict_logits(low).dtype == torch.float32


def test_ensembling_is_the_users_choice_or_the_systems_own(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        for model, own in (("mmal", "mean_probability"), ("pmg", "sum_logits")):
            network = build_network(model, num_classes=3, backbone="resnet18", input_size=96)
            assert network.ensembling == own
            network = build_network(model, num_classes=3, backbone="resnet18", input_size=96, ensembling="mean_logits")
            assert network.ensembling == "mean_logits"
        with pytest.raises(UserError, match="ensembling is 'median'.*mean_probability, mean_logits, sum_logits"):
            build_network("mmal", num_classes=3, backbone="resnet18", input_size=96, ensembling="median")
    words = ["--dataset", "cub", "--data_root", "x"]
    assert parse_settings([*words, "--model", "pmg"]).ensembling == "sum_logits"
    assert parse_settings([*words, "--model", "mmal"]).ensembling == "mean_probability"
    assert parse_settings([*words, "--model", "pmg", "--ensembling", "mean_logits"]).ensembling == "mean_logits"


def test_heads_are_the_classifier_and_all_else_is_trunk() -> None:
    system = Toy()
    system.backbone.fixed = nn.Parameter(torch.zeros(3), requires_grad=False)
    groups = system.parameter_groups()
    assert list(groups) == ["trunk", "heads"]
    ids = {name: [id(parameter) for parameter in group] for name, group in groups.items()}
    assert ids["heads"] == [id(parameter) for parameter in system.classifier.parameters()]
    others = [system.backbone.scale, *system.peak_classifier.parameters()]
    assert sorted(ids["trunk"]) == sorted(id(parameter) for parameter in others)


def test_what_is_inherited_changes_nothing() -> None:
    system = Toy()
    before = {name: value.clone() for name, value in system.state_dict().items()}
    output = system(make_images(96))

    def batches() -> Iterator[object]:
        raise AssertionError("a batch was loaded")
        yield

    assert system.prepare(batches()) is None
    assert system.after_step(output, LABELS) is None
    assert all(torch.equal(value, before[name]) for name, value in system.state_dict().items())
    assert not any(system.masks_background(epoch) for epoch in (1, 50, 1000))
    assert system.absent_gradients and not system.needs_labels and not system.can_exit_early
    assert (system.input_size, system.dropout.p) == (96, 0.25)
    assert system.warmup_branches == ("raw",)


def test_a_system_without_forward_is_none() -> None:
    with pytest.raises(NotImplementedError):
        System(ScriptedBackbone(), NoOptions(), Shared())(make_images(96))


# ---- labels -------------------------------------------------------------------------------------------------------


def test_labels_reach_forward_in_training_where_they_are_asked_for() -> None:
    """The step's own, which are not those of the batch."""
    system, images = Attentive(), make_images(96)
    for step in system.train().steps(images, LABELS):
        objective(system).compute(system, step)
    first, second = system.seen
    assert first.tolist() == [3, 1, 3, 1]
    assert second.tolist() == [3, 1]


def test_labels_do_not_reach_forward_otherwise() -> None:
    images = make_images(96)
    for system in (Toy().train(), Toy().eval(), Attentive().eval()):
        for step in system.steps(images, LABELS):
            objective(system).compute(system, step)
        assert system.seen and all(labels is None for labels in system.seen)


def test_a_step_trains_the_terms_that_it_names() -> None:
    system = Attentive()
    both, peak = (objective(system).compute(system, step)[1] for step in system.steps(make_images(96), LABELS))
    assert both.keys() == {"raw", "peak", "total"}
    torch.testing.assert_close(both["total"], both["raw"] + 0.5 * both["peak"])
    assert peak.keys() == {"peak", "total"}
    torch.testing.assert_close(peak["total"], 0.5 * peak["peak"])


# ---- the plan of an epoch -----------------------------------------------------------------------------------------


class Masking(Toy):
    warmup_branches = ("peak",)

    def masks_background(self, epoch: int) -> bool:
        return epoch >= 3


def test_the_system_decides_what_warms_up_and_when_the_background_is_masked() -> None:
    plans = [plan_epoch(Masking(), epoch, Masking.loss_weights, warmup_epochs=1) for epoch in (1, 2, 3)]
    assert plans == [
        EpochPlan({"peak": 1.0}, ("peak",), mask_background=False),
        EpochPlan({"raw": 1.0, "peak": 0.5}, ("raw", "peak"), mask_background=False),
        EpochPlan({"raw": 1.0, "peak": 0.5}, ("raw", "peak"), mask_background=True),
    ]


# ---- options ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    small: Count = 2  # of the two numbers
    large: Count | None = None  # at least as large; None: half of input_size

    def completed(self, shared: Shared) -> Options:
        return dataclasses.replace(self, large=self.large or shared.input_size // 2)

    def check(self, shared: Shared) -> None:
        require(self.small <= self.large, "small", self.small, f"at most large, {self.large}")


class WithOptions(Toy):
    Options = Options
    run_defaults = {"epochs": 7, "batch_norm": lambda shared: "frozen" if shared.has_pretrained_weights else "shared"}


def test_options_are_completed_then_checked() -> None:
    assert build_options(WithOptions, {}, Shared(input_size=96)) == Options(2, 48)
    assert build_options(WithOptions, {"large": 3}, Shared()) == Options(2, 3)
    with pytest.raises(SettingsError, match="small is 50; expected at most large, 48"):
        build_options(WithOptions, {"small": 50}, Shared(input_size=96))
    with pytest.raises(SettingsError, match="small is 0; expected a whole number of at least 1"):
        build_options(WithOptions, {"small": 0}, Shared())
    with pytest.raises(SettingsError, match="middle is no setting of test_system: its own are small, large"):
        build_options(WithOptions, {"middle": 1}, Shared())
    with pytest.raises(SettingsError, match="small is no setting of test_system: its own are none"):
        build_options(Toy, {"small": 1}, Shared())


def test_defaults_of_a_run_may_depend_on_other_settings() -> None:
    assert defaults_of(Toy, Shared()) == {}
    assert defaults_of(WithOptions, Shared(pretrained=None)) == {"epochs": 7, "batch_norm": "frozen"}
    assert defaults_of(WithOptions, Shared(pretrained="none")) == {"epochs": 7, "batch_norm": "shared"}
