"""A GPU without a GPU: what runs on the device, run on fake CUDA tensors, on any machine.

A fake tensor has a shape, a type and a device but no values (`torch._subclasses.FakeTensorMode`). An operator that gets
tensors of the host and of the device raises, and so does reading a value. Backward passes are left out: the autograd
engine asks the driver for its streams. They, and the values, are tested in test_gpu.py, on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from cases import slow_but_for
from reference import ForbidHostReads
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from datasets import Batch
from networks import MODELS, build_network, find_system
from networks.evidence import forward_with_evidence
from networks.jigsaw import cyclic_permutations, permute_blocks
from networks.outputs import NetworkOutput
from networks.system import Step
from utils.data import image_batches
from utils.reporting.confusions import confusion_matrix
from utils.reporting.metrics import EpochMeter, inclusive_to_edges
from utils.reporting.results import ResultCollector
from utils.training.execution import Execution
from utils.training.learning import given_boxes

BATCH, CLASSES, SIZE, LARGER = 4, 5, 96, 128
CUDA = torch.device("cuda")


def fake_tensors_need_a_driver() -> bool:
    """True for PyTorch 2.4 on a machine without a GPU: copies of fake CUDA tensors ask the driver for its devices."""
    with FakeTensorMode():
        try:
            torch.empty(1).to(CUDA).copy_(torch.empty(1, device=CUDA))
        except (RuntimeError, AssertionError):
            return True
    return False


pytestmark = [
    pytest.mark.skipif(fake_tensors_need_a_driver(), reason="this PyTorch needs a driver for fake tensors"),
    pytest.mark.usefixtures("thin_trunk"),
]

System = tuple[str, dict[str, object]]
SYSTEMS: tuple[System, ...] = (
    *((model, {}) for model in MODELS),
    ("sgkrl_published", {"graph_scope": "batch"}),
)
SOME: tuple[System, ...] = (("sgkrl", {}), ("scrim", {}), ("cal", {}))  # most of what there is between them
OPTIONS: tuple[System, ...] = (  # that compute something else on the device
    ("sgkrl", {"crop_gradient": True, "localization_stride": 16, "graph_edges": "overlap", "graph_residual": False}),
    ("sgkrl", {"graph_edges": "distance", "spatial_weights": "absolute", "without": ("fusion",)}),
    ("sgkrl", {"localization": "learned"}),
    ("sgkrl", {"window_source": "stage3", "batch_norm": "per_pass"}),
    ("mmal", {"window_source": "stage3", "batch_norm": "frozen"}),
    ("flrdf", {"suppression": 0.5, "box_agreement": True}),
    ("scrim", {"parts_of_every_level": False}),
    ("dcl", {"guessed_places": True, "swap_classes": "two"}),
)


# The backbone alone has statistics, and sgkrl sends pictures, objects and windows through it.
OTHER_STATISTICS = slow_but_for([("sgkrl", {})], SYSTEMS)


class ForbidTwoDevices(TorchDispatchMode):
    """Inside this, an operator raises whose tensors, its result among them, are on two devices, but for plain numbers.

    Fake tensors allow copies, for which the host waits where its memory is not pinned, and an index from elsewhere.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        name, result = func.overloadpacket.__name__, func(*args, **(kwargs or {}))
        tensors = [value for value in tree_leaves((args, kwargs, result)) if isinstance(value, Tensor)]
        devices = {value.device.type for value in tensors if value.ndim > 0 or name in ("_to_copy", "copy_")}
        assert len(devices) <= 1, f"{name} with tensors of {' and '.join(sorted(devices))}"
        return result


@contextmanager
def on_a_gpu(*, autocast: bool = False) -> Iterator[None]:
    """Compute as on a GPU, bf16 autocast included, and wait for it nowhere.

    `torch.autocast` refuses a GPU that is not there, so its switches are set. cuDNN's grid_sample, the one chosen for a
    border of zeros (scrim), has no fake version, unlike PyTorch's own.
    """
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", autocast)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        with torch.backends.cudnn.flags(enabled=False), ForbidHostReads(), ForbidTwoDevices():
            yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])
        torch.clear_autocast_cache()


@pytest.fixture
def fake() -> Iterator[None]:
    """No tensor that is made in the test has values."""
    image_batches._colours.cache_clear(), image_batches._scale_and_shift.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=False):
        yield
    (
        image_batches._colours.cache_clear(),
        image_batches._scale_and_shift.cache_clear(),
    )  # no other test can use fake ones


def build(system: System, **settings: object) -> nn.Module:
    model, options = system
    common = {"num_classes": CLASSES, "backbone": "resnet18", "input_size": SIZE, "batch_norm": "shared"}
    if "windows" in find_system(model).Options.__dataclass_fields__:
        common["windows"] = ((((2, 2), (1, 3)), 2), (((3, 3),), 1))
    with CUDA:
        return build_network(model, **{**common, **options, **settings})


def make_images() -> Tensor:
    return torch.empty(BATCH, 3, LARGER, LARGER, device=CUDA)


def make_labels() -> Tensor:
    return torch.zeros(BATCH, dtype=torch.long, device=CUDA)


def fields(output: NetworkOutput) -> list[Tensor]:
    return [value for value in tree_leaves(tuple(output)) if value is not None]


def assert_runs(network: nn.Module, *, training: bool, autocast: bool) -> None:
    """Forward pass, losses and prediction, in training those of every step."""
    images, labels = make_images(), make_labels()
    boxes = torch.empty(BATCH, 4, device=CUDA) if network.takes_boxes else None
    steps = iter(network.steps(images, labels, **given_boxes(boxes)) if training else [Step(images, labels)])
    while True:
        with on_a_gpu():
            step = next(steps, None)
        if step is None:
            return
        assert_step_runs(network.train(training), step, autocast=autocast)


def assert_step_runs(network: nn.Module, step: Step, *, autocast: bool) -> None:
    training, more = network.training, {"labels": step.targets} if network.needs_labels else {}
    more |= given_boxes(step.boxes)
    with torch.set_grad_enabled(training):
        with on_a_gpu(autocast=autocast):
            output = network(step.images, mask_background=True, branches=step.branches, **more)
        with on_a_gpu():
            terms = network.losses(output, step.targets)
            prediction = network.predict_logits(output)
            network.after_step(output, step.targets)
    assert output.logits.keys() >= set(network.branches if training else network.evaluated)
    assert all(value.device.type == "cuda" for value in (*fields(output), *terms.values(), prediction))
    assert all(value.dtype == torch.float32 for value in (*output.logits.values(), *terms.values()))
    assert prediction.shape == (len(step.targets), CLASSES)
    assert sum(terms.values()).requires_grad == training


# ---- systems ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", slow_but_for(SOME, SYSTEMS), ids=str)
def test_system_runs(fake: None, system: System) -> None:
    """With mixed precision; the two tests below run every system without it."""
    network = build(system)
    for training in (True, False):
        assert_runs(network, training=training, autocast=True)


@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS, ids=str)
def test_system_runs_without_mixed_precision(fake: None, system: System) -> None:
    network = build(system)
    for training in (True, False):
        assert_runs(network, training=training, autocast=False)


@pytest.mark.parametrize("system", OTHER_STATISTICS, ids=str)
def test_system_runs_with_statistics_per_pass(fake: None, system: System) -> None:
    network = build(system, batch_norm="per_pass")
    assert_runs(network, training=True, autocast=True)
    assert_runs(network, training=False, autocast=False)


@pytest.mark.parametrize("system", OTHER_STATISTICS, ids=str)
def test_system_runs_with_frozen_statistics(fake: None, system: System) -> None:
    assert_runs(build(system, batch_norm="frozen"), training=True, autocast=False)


@pytest.mark.parametrize("system", slow_but_for(OPTIONS[:3], OPTIONS), ids=str)
def test_system_runs_with_options(fake: None, system: System) -> None:
    assert_runs(build(system), training=True, autocast=True)


@pytest.mark.parametrize("system", slow_but_for(SOME, (*SYSTEMS, ("sgkrl", {"window_source": "stage3"}))), ids=str)
def test_evidence(fake: None, system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the gradients, which need the autograd engine. Here the host may wait: the maps are for people."""
    monkeypatch.setattr(torch.autograd, "grad", lambda scores, maps, **_: [torch.zeros_like(one) for one in maps])
    with torch.backends.cudnn.flags(enabled=False):
        output, evidence = forward_with_evidence(build(system).eval(), make_images(), size=32)
    assert evidence.shape == (BATCH, 32, 32)
    assert all(value.device.type == "cuda" for value in (*fields(output), evidence))


# ---- before and after the network ---------------------------------------------------------------------------------


@pytest.mark.parametrize("cropped", (False, True))
def test_augmentation(fake: None, cropped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only one value is looked at, on the host: whether any picture is cropped. A fake tensor has none to look at."""

    def look_at(value: Tensor) -> bool:
        assert value.device.type == "cpu"
        return cropped

    monkeypatch.setattr(FakeTensor, "__bool__", look_at, raising=False)
    images, rows = torch.empty(BATCH, 3, SIZE, SIZE, dtype=torch.uint8), torch.empty(BATCH, 16)
    for given in (rows, None):
        with ForbidHostReads():
            result = Execution(CUDA).images(images, given)
        assert result.device.type == "cuda"
        assert result.dtype == torch.float32
    images = images.to(CUDA)
    with on_a_gpu():  # no constant comes from the host again
        assert image_batches.normalised(images).device.type == "cuda"


@pytest.mark.parametrize("orders", (1, BATCH))
def test_jigsaw(fake: None, orders: int) -> None:
    with on_a_gpu():
        shuffled = permute_blocks(make_images(), cyclic_permutations(orders, 16, CUDA), 4)
    assert shuffled.shape == (BATCH, 3, LARGER, LARGER)
    assert shuffled.device.type == "cuda"


def test_meter(fake: None) -> None:
    meter, labels, boxes = EpochMeter(CUDA), make_labels(), torch.empty(BATCH, 4, device=CUDA)
    logits = {"raw": torch.empty(BATCH, CLASSES, device=CUDA), "window": torch.empty(BATCH, 3, CLASSES, device=CUDA)}
    with on_a_gpu():
        for _ in range(2):
            losses = {"total": torch.empty((), device=CUDA, dtype=torch.bfloat16)}
            meter.update(labels, losses=losses, logits=logits, boxes=inclusive_to_edges(boxes), true_boxes=boxes)
    assert {name.partition("/")[0] for name in meter.sums} == {"loss", "accuracy", "box_iou"}
    assert all(value.device.type == "cuda" for value in meter.sums.values())
    with on_a_gpu(), pytest.raises(AssertionError, match="wait"):
        meter.compute()


def test_results_of_a_batch(fake: None) -> None:
    """Labels and true boxes come from the host: the one copy that the batch needs."""
    images, boxes = torch.empty(BATCH, 3, LARGER, LARGER), torch.empty(BATCH, 4)
    batch = Batch(images, torch.zeros(BATCH, dtype=torch.long), boxes, [])
    network, collector = build(("mmal", {})).eval(), ResultCollector(SIZE)
    output = network(make_images())
    with ForbidHostReads():
        collector(batch, output, network.predict_logits(output))
    assert "box_iou" in collector._batches
    assert all(value.device.type == "cuda" for values in collector._batches.values() for value in values)


# ---- the check itself ---------------------------------------------------------------------------------------------


class Spoilt(nn.Module):
    """A layer and something that a GPU would wait for, or refuse."""

    def __init__(self, spoil: Callable[[Tensor], object]):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.spoil = spoil

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        self.spoil(x)
        return x


REAL = torch.ones(3)  # of the host, with values: made before any test
FAULTS: dict[str, tuple[Callable[[Tensor], object], str]] = {  # and what the error reports
    "nothing": (lambda x: None, ""),
    "a value is read": (lambda x: x.sum().item(), "wait"),
    "a condition": (lambda x: bool((x > 0).any()), "wait"),
    "a list": (lambda x: x.tolist(), "wait"),
    "the shape depends on values": (lambda x: (x > 0).nonzero(), "wait"),
    "a mask for an index": (lambda x: x[x > 0], "wait"),
    "a copy to the host": (lambda x: x.cpu(), "wait"),
    "a copy into memory of the host": (lambda x: torch.empty(2, 3).copy_(x), "wait"),
    "a copy from the host": (lambda x: x + torch.arange(3.0).to(x.device), "cpu and cuda"),
    "a tensor of the host": (lambda x: x * torch.arange(3.0), "device"),
    "an index into a tensor of the host": (lambda x: torch.arange(3.0)[x.argmax(dim=1)], "cpu and cuda"),
    "one of the host joins": (lambda x: torch.cat([x, torch.zeros(1, 3)]), "device"),
    "a constant with values": (lambda x: x + REAL, "FakeTensor"),
}


def run_spoilt(fault: str, *, weights_on: torch.device = CUDA) -> None:
    with weights_on:
        network = Spoilt(FAULTS[fault][0])
    with on_a_gpu():
        network(torch.empty(2, 3, device=CUDA))


@pytest.mark.parametrize("fault", [name for name in FAULTS if name != "nothing"])
def test_faults_are_caught(fake: None, fault: str) -> None:
    run_spoilt("nothing")
    with pytest.raises((AssertionError, RuntimeError), match=FAULTS[fault][1]):
        run_spoilt(fault)


def test_weights_left_on_the_host_are_caught(fake: None) -> None:
    with pytest.raises(RuntimeError, match="device"):
        run_spoilt("nothing", weights_on=torch.device("cpu"))


def test_early_exit_is_caught(fake: None) -> None:
    """It waits for the device, as its documentation says, to know which images are unsure."""
    network = build(("sgkrl", {}))
    network.exit_threshold = 0.5
    with pytest.raises(AssertionError, match="nonzero makes the host wait"):
        assert_runs(network, training=False, autocast=False)


def test_reading_predictions_is_caught(fake: None) -> None:
    with on_a_gpu(), pytest.raises(AssertionError, match="wait"):
        confusion_matrix(make_labels(), make_labels(), CLASSES)


def test_autocast_is_on(fake: None) -> None:
    layer, x = nn.Conv2d(3, 4, 1, device=CUDA), make_images()
    for autocast, expected in ((True, torch.bfloat16), (False, torch.float32)):
        with on_a_gpu(autocast=autocast):
            assert layer(x).dtype == expected
