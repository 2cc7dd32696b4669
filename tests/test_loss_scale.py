"""Training in fp16, whose scaled loss changes no gradient, and what becomes of a gradient that overflows."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.amp import GradScaler
from whole_runs import assert_same_run, stop_after_step

import train
from networks.outputs import NetworkOutput
from networks.system import System
from utils.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from utils.errors import Stopped
from utils.options import SettingsError
from utils.reporting.metrics import EpochMeter
from utils.training import execution, precision
from utils.training.execution import Execution
from utils.training.learning import Learning, Objective
from utils.training.loss_scale import SMALLEST_SCALE, build_loss_scale, check_loss_scale
from utils.training.nonfinite import NonFiniteLossError, StepLosses
from utils.training.precision import agreed_precision, note_on_fp16, resolve_precision
from utils.training.schedule import EpochPlan

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
FP16 = Execution(CPU, "fp16")
PLAN = EpochPlan({"raw": 1.0}, ("raw",), mask_background=False)
LABELS = torch.tensor([0, 2])


class Linear(System):
    """Logits that are linear in the pixels."""

    branches = evaluated = prediction = ("raw",)
    loss_weights = {"raw": 1.0}

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.register_buffer("ensemble_weights", None)
        self.colocalization = self.learned_localization = None
        self.classifier = nn.Linear(12, 3)

    def forward(self, images, *, mask_background=False, branches=None):
        return NetworkOutput({"raw": self.classifier(images.flatten(1)).float()})


def build_learning(
    execution: Execution = FP16, *, scale: float = 2.0**16, clip: float = 0.0, weight: float = 1.0
) -> Learning:
    """`weight`: of the loss; the learning rate makes up for it."""
    torch.manual_seed(0)
    network = Linear()
    optimizer = torch.optim.SGD(network.parameters(), 0.5 / weight)
    loss_scale = GradScaler("cpu", init_scale=scale, enabled=execution.precision == "fp16")
    objective = Objective(PLAN._replace(loss_weights={"raw": weight}), execution, 0.0)
    return Learning(network, optimizer, objective, clip, None, loss_scale=loss_scale)


def learn(learning: Learning, *, number: int = 1) -> torch.Tensor:
    """How far the weights move in a step."""
    before = learning.network.classifier.weight.detach().clone()
    images = torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(number))
    learning.learn_from(images, LABELS, number, ["a", "b"], EpochMeter(CPU))
    return learning.network.classifier.weight.detach() - before


@pytest.mark.parametrize("clip", [0.0, 0.1])
@pytest.mark.parametrize("scale", [1.0, 2.0**14])
def test_the_scale_of_the_loss_changes_no_step(scale: float, clip: float) -> None:
    moved = learn(build_learning(scale=scale, clip=clip))
    expected = learn(build_learning(Execution(CPU), clip=clip))
    assert expected.norm() > 0.01
    torch.testing.assert_close(moved, expected, rtol=5e-3, atol=1e-4)


def test_a_small_gradient_vanishes_unless_the_loss_is_scaled() -> None:
    """That of a loss of a hundred-millionth lies below the smallest number of half precision, 6e-8."""
    tiny = {"weight": 1e-8}
    expected = learn(build_learning(Execution(CPU), **tiny))
    assert expected.norm() > 0.01
    assert torch.equal(learn(build_learning(scale=1.0, **tiny)), torch.zeros(3, 12))
    torch.testing.assert_close(learn(build_learning(scale=2.0**24, **tiny)), expected, rtol=5e-3, atol=1e-4)


def test_a_gradient_that_overflows_moves_nothing_and_halves_the_scale() -> None:
    learning = build_learning(scale=2.0**24)
    assert torch.equal(learn(learning), torch.zeros(3, 12))
    assert learning.loss_scale.get_scale() == 2.0**23
    assert any(learn(learning).norm() > 0 for _ in range(20))


def test_a_gradient_that_is_never_finite_is_an_error() -> None:
    """It would leave out every step, and say nothing."""
    learning = build_learning()
    learning.network.classifier.weight.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(
        NonFiniteLossError, match="the gradient was not finite in many steps before step 26: the last"
    ) as error:
        for number in range(1, 99):
            learn(learning, number=number)
    assert learning.loss_scale.get_scale() == SMALLEST_SCALE / 2
    assert (error.value.step, error.value.terms, error.value.paths) == (26, ["gradient"], ["a", "b"])


def test_other_precisions_scale_nothing() -> None:
    for name in ("float32", "bf16"):
        loss_scale = build_loss_scale(Execution(CPU, name))
        assert not loss_scale.is_enabled() and loss_scale.scale(torch.tensor(3.0)) == 3
        check_loss_scale(loss_scale, StepLosses(1, ["raw"], torch.zeros(1), []))
    assert build_loss_scale(FP16).is_enabled()


def test_it_is_for_gpus_and_what_was_trained_in_it_is_evaluated_anywhere(monkeypatch) -> None:
    assert resolve_precision("fp16", GPU) == "fp16" == agreed_precision("fp16", GPU)
    monkeypatch.setattr(precision, "cpu_flags", lambda: set())
    assert resolve_precision("fp16", CPU) == "float32"
    with pytest.raises(SettingsError, match="precision is 'fp16'; expected 'float32', 'bf16' or 'auto' on cpu"):
        agreed_precision("fp16", CPU)


@pytest.mark.parametrize(
    "given, settled, capability, told",
    [
        ("auto", "float32", (7, 5), True),
        ("auto", "float32", (7, 0), True),
        ("auto", "float32", (6, 1), False),
        ("auto", "bf16", (8, 0), False),
        ("auto", "float32", (8, 0), False),  # another process has no bf16
        ("float32", "float32", (7, 5), False),
    ],
)
def test_who_has_such_a_gpu_is_told(given: str, settled: str, capability: tuple, told: bool, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    assert (note_on_fp16(given, settled, GPU) is not None) == told
    assert note_on_fp16(given, settled, CPU) is None


@pytest.mark.usefixtures("thin_trunk")
def test_a_run_goes_on_with_the_scale_that_it_had(tiny_run, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(train, "agreed_precision", lambda name, device: name)
    monkeypatch.setattr(execution, "HALF_PRECISIONS", {})  # CPUs take seconds for a step of it
    monkeypatch.setattr(train, "build_loss_scale", lambda execution: GradScaler("cpu", growth_interval=2))
    flags = ("--precision", "fp16", "--epochs", "2", "--clip_gradient_norm", "1")
    whole, parts = (tiny_run(tmp_path / name, *flags) for name in ("whole", "parts"))
    train.main(whole)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after_step(patch, 2, 1)
        train.main(parts)
    folder = tmp_path / "parts" / "folder-resnet"
    saved = load_checkpoint(folder / "last.pth")
    assert saved["progress"]["step"] == 1 and saved["loss_scale"]["scale"] == 2.0**18  # doubled after every two steps
    assert "loss_scale" not in load_checkpoint(folder / "best.pth")
    (folder / "previous.pth").unlink()  # which it would go on from
    for content in ({**saved, "loss_scale": {"scale": 1.0}}, {n: v for n, v in saved.items() if n != "loss_scale"}):
        save_checkpoint(folder / "last.pth", content)
        with pytest.raises(CheckpointError, match="loss_scale"):
            train.main(parts)
    save_checkpoint(folder / "last.pth", saved)
    train.main(parts)
    assert_same_run(*(tmp_path / name / "folder-resnet" for name in ("whole", "parts")))
