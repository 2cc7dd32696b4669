"""The systems as wholes: their output contract, gradients, independence of the batch, zoom, mask and odd inputs."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import reference
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import scatter_gather

from networks import MODELS, build_network
from networks.flrdf import FLRDF
from networks.losses import loss_terms
from networks.mmal import MMALNet
from networks.outputs import Features, NetworkOutput
from networks.resnet import ResNetClassifier
from networks.scrim import SCRIM
from networks.sgkrl import SGKRL

pytestmark = pytest.mark.usefixtures("thin_trunk")

CLASSES, SIZE = 5, 128
SYSTEMS: dict[str, tuple[str, dict]] = {
    "resnet": ("resnet", {}),
    "mmal": ("mmal", {}),
    "trained": ("sgkrl", {}),
    "trained variant": (
        "sgkrl",
        {
            **{"graph_residual": False, "spatial_weights": "absolute"},
            **{"localization_stride": 16, "localization_threshold": 1.2, "crop_gradient": True},
            **{"batch_norm": "per_pass", "graph_neighbours": 2, "graph_edges": "overlap"},
        },
    ),
    "without fusion": ("sgkrl", {"without": ("fusion",)}),
    "without weighting": ("sgkrl", {"without": ("weighting",)}),
    "without parts": ("sgkrl", {"without": ("fusion", "weighting")}),
    "published": ("sgkrl", {"wiring": "published"}),
    "published batch": ("sgkrl", {"wiring": "published", "graph_scope": "batch"}),
    "flrdf": ("flrdf", {}),
    "flrdf fixed": ("flrdf", {"suppression": 0.9, "box_agreement": True, "jigsaw_blocks": 3}),
    "scrim": ("scrim", {}),
}
BRANCHES = {
    "resnet": ("raw",),
    "mmal": ("raw", "object", "window"),
    "trained": ("raw", "fused", "object", "window", "graph"),
    "trained variant": ("raw", "fused", "object", "window", "graph"),
    "without fusion": ("raw", "object", "window", "graph"),
    "without weighting": ("raw", "fused", "object", "window", "graph"),
    "without parts": ("raw", "object", "window", "graph"),
    "published": ("raw", "object", "window", "graph"),
    "published batch": ("raw", "object", "window", "graph"),
    "flrdf": ("raw", "object"),
    "flrdf fixed": ("raw", "object"),
    "scrim": ("raw", "part", "concat"),
}
TRAINING_ONLY = {"flrdf": ("jigsaw",), "flrdf fixed": ("jigsaw",)}
WITH_BOXES = [system for system in SYSTEMS if system not in ("resnet", "scrim")]
WITH_WINDOWS = [system for system in WITH_BOXES if "window" in BRANCHES[system]]
PARTS = 12  # of SCRIM, six for each of its two modules
OWN_WINDOWS = ((((5, 7), (7, 5)), 2), (((9, 9),), 1))
ONE_WINDOW = ((((14, 14),), 1),)


def build(system: str, *, input_size: int = SIZE, **settings: object) -> nn.Module:
    model, fixed = SYSTEMS[system]
    torch.manual_seed(0)
    settings = {"backbone": "resnet18", **fixed, **settings}
    network = build_network(model, num_classes=CLASSES, input_size=input_size, **settings)
    for name, parameter in network.backbone.named_parameters():
        if name.endswith("bn2.weight"):
            nn.init.constant_(parameter, 0.3)  # or the residual sums of a new trunk grow without bound
    return network


@functools.cache
def evaluated(system: str) -> nn.Module:
    """One network per system for all tests that leave it as it is."""
    return build(system).eval()


def make_images(size: int, batch: int = 2, seed: int = 1) -> Tensor:
    """Blobs with some noise: maps with several peaks, so that boxes, masks and windows all cut something away."""
    generator = torch.Generator().manual_seed(seed)
    blobs = F.interpolate(torch.randn(batch, 3, 5, 5, generator=generator), size=(size, size), mode="bicubic")
    return 1.5 * blobs + 0.3 * torch.randn(batch, 3, size, size, generator=generator)


# ---- a trunk that sees what it is told to -------------------------------------------------------------------------


def brightness(images: Tensor, cell: int) -> Tensor:
    """`[B, 1, H / cell, W / cell]`: the mean of each cell."""
    return F.avg_pool2d(images.mean(dim=1, keepdim=True), cell)


class ScriptedBackbone(nn.Module):
    """A trunk whose deep maps are what `look` makes of the images' brightness `[B, 1, g, g]`: (penultimate, final)."""

    channels = {"stage2": 8, "stage3": 16, "final": 32}
    embedding_channels = 32

    def __init__(self, look: Callable[[Tensor], tuple[Tensor, Tensor]] = lambda bright: (bright, bright)) -> None:
        super().__init__()
        self.look = look
        self.scale = nn.Parameter(torch.linspace(1, 2, 32)[:, None, None])

    def forward(self, images: Tensor, *, kind: str = "picture", dense: bool = False) -> Features:
        penultimate, final = (map_ * self.scale for map_ in self.look(brightness(images, 16 if dense else 32)))
        stage2, stage3 = (0.01 * brightness(images, cell) for cell in (8, 16))
        return Features(
            stage2.expand(-1, 8, -1, -1), stage3.expand(-1, 16, -1, -1), penultimate, final, final.mean(dim=(2, 3))
        )


def build_scripted(system: str, *, input_size: int = SIZE, **settings: object) -> nn.Module:
    look = (settings.pop("look"),) if "look" in settings else ()
    torch.manual_seed(0)
    backbone = ScriptedBackbone(*look)
    if system == "resnet":
        return ResNetClassifier(backbone, CLASSES, input_size=input_size, **settings)
    if system == "mmal":
        return MMALNet(backbone, CLASSES, input_size=input_size, **settings)
    if system == "scrim":
        return SCRIM(backbone, CLASSES, input_size=input_size, **settings)
    if system.startswith("flrdf"):
        return FLRDF(backbone, CLASSES, input_size=input_size, **SYSTEMS[system][1], **settings)
    fixed = {name: value for name, value in SYSTEMS[system][1].items() if name != "batch_norm"}  # the trunk's own
    return SGKRL(backbone, CLASSES, input_size=input_size, **fixed, **settings)


# ---- the output contract ------------------------------------------------------------------------------------------


def assert_contract(
    output: NetworkOutput,
    system: str,
    *,
    batch: int,
    input_size: int,
    windows: tuple = reference.BIRDS,
    training: bool = False,
) -> None:
    assert isinstance(output, NetworkOutput)
    assert tuple(output.logits) == BRANCHES[system] + (TRAINING_ONLY.get(system, ()) if training else ())
    grid_size, groups = input_size // 32, reference.scale_window_set(windows, input_size // 32)
    count = sum(quota for _, quota in groups)
    for name, logits in output.logits.items():
        several = {"window": count, "part": PARTS}.get(name)
        assert logits.shape == ((batch, CLASSES) if several is None else (batch, several, CLASSES)), name
        assert logits.isfinite().all(), name
    if system == "scrim":
        assert output[1:4] == (None, None, None)
        assert output.part_boxes.shape == (batch, PARTS, 4)
        assert output.part_boxes.dtype == torch.float32
        assert not output.part_boxes.requires_grad
        assert (output.part_boxes[..., 2:] > output.part_boxes[..., :2]).all()
        assert (output.part_boxes.abs() < 1.5 * input_size).all()  # inside the zeros round the picture
        assert (output.part_boxes == output.part_boxes.round()).all()
        assert output.part_scores.shape == (batch, 2, PARTS // 2)
        assert (output.part_scores.diff(dim=2) <= 0).all()
        assert output.coarse_features.shape[:2] == (batch, 2) if training else output.coarse_features is None
        return
    assert output[4:] == (None, None, None)
    if system == "resnet":
        assert output[1:4] == (None, None, None)
        return

    boxes = output.object_boxes
    assert boxes.shape == (batch, 4)
    assert boxes.dtype == torch.float32
    stride = SYSTEMS[system][1].get("localization_stride", 32)
    assert ((boxes[:, :2] == 0) | ((boxes[:, :2] + 1) % stride == 0)).all()  # one pixel before a cell, or the border
    assert ((boxes[:, 2:] + 1) % stride == 0).all()  # the last pixel of a cell
    assert (boxes >= 0).all()
    assert (boxes < input_size).all()
    assert (boxes[:, 2:] - boxes[:, :2] + 1 >= stride).all()
    assert not boxes.requires_grad

    if system.startswith("flrdf"):
        assert output[2:] == (None,) * 5
        return
    assert output.window_boxes.shape == (batch, count, 4)
    assert output.window_boxes.dtype == torch.float32
    assert not output.window_boxes.requires_grad
    for one in output.window_boxes.tolist():
        remaining = list(one)
        for sizes, quota in groups:
            placements = reference.window_grid(sizes, grid_size, 32).tolist()
            assert all(window in placements for window in remaining[:quota])
            remaining = remaining[quota:]

    if system == "mmal":
        assert output.object_masks is None
        return
    assert output.object_masks.shape == (batch, input_size // stride, input_size // stride)
    assert output.object_masks.dtype == torch.bool
    for mask, box in zip(output.object_masks, boxes.tolist(), strict=True):
        rows, columns = (mask.any(dim=dim).nonzero().flatten().tolist() for dim in (1, 0))
        cells = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        assert tuple(box) == reference.cell_box_to_pixels(cells, stride)


@pytest.mark.parametrize("system", SYSTEMS)
@torch.no_grad()
def test_contract(system: str) -> None:
    output = evaluated(system)(make_images(SIZE))
    assert_contract(output, system, batch=2, input_size=SIZE)


@pytest.mark.parametrize(
    ("system", "input_size", "windows"),
    (
        ("resnet", 96, "birds"),
        ("mmal", 96, "birds"),
        ("trained", 96, "vehicles"),
        ("published", 96, ONE_WINDOW),
        ("mmal", 160, ONE_WINDOW),
        ("trained", 160, ONE_WINDOW),
        ("published batch", 160, "vehicles"),
        ("mmal", 224, "vehicles"),
        ("trained", 224, OWN_WINDOWS),
        ("published batch", 224, "birds"),
        ("trained", 448, "birds"),
        *((system, size, "birds") for system in ("flrdf", "flrdf fixed", "scrim") for size in (96, 160, 224, 448)),
    ),
    ids=str,
)
@torch.no_grad()
def test_contract_at_other_sizes_and_windows(system: str, input_size: int, windows: str | tuple) -> None:
    batch = 1 if input_size == 448 else 2
    network = build(system, input_size=input_size, windows=windows).eval()
    window_set = {"birds": reference.BIRDS, "vehicles": reference.VEHICLES}.get(windows, windows)
    output = network(make_images(input_size, batch), mask_background=input_size == 160)
    assert_contract(output, system, batch=batch, input_size=input_size, windows=window_set)
    assert network.predict_logits(output).shape == (batch, CLASSES)


@torch.no_grad()
def test_public_interface() -> None:
    """The calls as the documentation has them."""
    net = build_network(
        "sgkrl",
        num_classes=36,
        backbone="resnet50",
        input_size=448,
        windows="birds",
        wiring="published",
        graph_scope="batch",
    )
    images = make_images(448, batch=1)
    out = net.eval()(images, mask_background=False)
    assert {name: tuple(logits.shape) for name, logits in out.logits.items()} == {
        "raw": (1, 36),
        "object": (1, 36),
        "window": (1, 7, 36),
        "graph": (1, 36),
    }
    assert out.object_boxes.shape == (1, 4)
    assert out.window_boxes.shape == (1, 7, 4)
    assert net.predict_logits(out).shape == (1, 36)


@torch.no_grad()
def test_images_of_these_tests_tell_something() -> None:
    """Boxes that cut something away, differ among images, and masks with holes: else much below would prove nothing."""
    output = evaluated("trained")(make_images(SIZE, batch=8))
    areas = (output.object_boxes[:, 2:] - output.object_boxes[:, :2] + 1).prod(dim=1) / SIZE**2
    assert (areas < 0.8).sum() >= 3
    assert len(output.object_boxes.unique(dim=0)) >= 3
    assert len(output.window_boxes.flatten(1).unique(dim=0)) >= 3


# ---- passes and branches ------------------------------------------------------------------------------------------

PASSES = {"raw": 1, "fused": 1, "object": 2, "window": 3, "graph": 3, "part": 2, "concat": 2}


@pytest.mark.parametrize("system", SYSTEMS)
@torch.no_grad()
def test_only_the_passes_that_are_needed(system: str) -> None:
    network, images = evaluated(system), make_images(SIZE)
    with reference.recorded_passes(network) as given:
        everything = network(images)
    assert len(given) == max(PASSES[branch] for branch in BRANCHES[system])
    shapes = [(2, 3, SIZE, SIZE)]
    if everything.object_boxes is not None:
        shapes.append((2, 3, SIZE, SIZE))
    regions = everything.window_boxes if system != "scrim" else everything.part_boxes
    if regions is not None:
        shapes.append((2 * regions.shape[1], 3, SIZE // 2, SIZE // 2))
    assert [tuple(x.shape) for x in given] == shapes
    for branch in BRANCHES[system]:
        with reference.recorded_passes(network) as given:
            output = network(images, branches=(branch,))
        assert len(given) == PASSES[branch], branch
        assert branch in output.logits
        if system == "scrim" and branch == "concat":  # of the six parts of a module only four are looked at
            assert given[1].shape == (2 * 8, 3, SIZE // 2, SIZE // 2)
            torch.testing.assert_close(output.logits["concat"], everything.logits["concat"])
            continue
        for name, logits in output.logits.items():
            assert torch.equal(logits, everything.logits[name]), (branch, name)
        for got, expected in zip(output[1:], everything[1:], strict=True):
            assert got is None or torch.equal(got, expected)


@pytest.mark.parametrize("system", SYSTEMS)
@torch.no_grad()
def test_what_evaluation_computes(system: str) -> None:
    """All that is reported and the answer's own, and no pass that only serves training."""
    network = evaluated(system)
    assert set(network.answer) <= set(network.evaluated) <= set(network.branches)
    with reference.recorded_passes(network) as given:
        output = network(make_images(SIZE), branches=network.evaluated)
    expected = tuple(branch for branch in BRANCHES[system] if (system, branch) != ("mmal", "window"))
    assert network.evaluated == tuple(output.logits) == expected
    assert len(given) == max(PASSES[branch] for branch in expected)
    assert (output.window_boxes is None) == (system not in WITH_WINDOWS)  # MMAL-Net's cost no pass, and are drawn
    assert network.predict_logits(output).shape == (2, CLASSES)


@pytest.mark.parametrize("system", TRAINING_ONLY)
def test_branches_of_training_are_refused_in_evaluation(system: str) -> None:
    with pytest.raises(ValueError, match="jigsaw"):
        evaluated(system)(make_images(SIZE), branches=("jigsaw",))


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_loss_term_has_a_weight(system: str) -> None:
    network = build(system, input_size=96).train()
    terms = loss_terms(network(make_images(96, batch=4)), torch.tensor([0, 1, 1, 2]))
    assert network.loss_weights == {name: 0.5 if name == "contrastive" else 1.0 for name in terms}


@torch.no_grad()
def test_answer_is_the_mean_probability_of_its_branches() -> None:
    network = evaluated("trained")
    output = network(make_images(SIZE))
    assert network.answer == ("raw", "fused", "object", "graph")
    mean = torch.stack([output.logits[name].softmax(-1) for name in network.answer]).mean(dim=0)
    torch.testing.assert_close(network.predict_logits(output), mean.log())
    low = output._replace(logits={name: logits.bfloat16() for name, logits in output.logits.items()})
    assert network.predict_logits(low).dtype == torch.float32


@pytest.mark.parametrize(
    ("system", "answer"),
    (("resnet", ("raw",)), ("mmal", ("object",)), ("published", ("object",)), ("scrim", ("concat",))),
    ids=str,
)
@torch.no_grad()
def test_answer_of_one_branch(system: str, answer: tuple[str, ...]) -> None:
    network = evaluated(system)
    output = network(make_images(SIZE))
    assert network.answer == answer
    expected = output.logits[answer[0]].softmax(-1)
    torch.testing.assert_close(network.predict_logits(output).softmax(-1), expected)


@torch.no_grad()
def test_answer_of_flrdf_is_the_mean_of_two_branches() -> None:
    network = evaluated("flrdf")
    output = network(make_images(SIZE))
    mean = (output.logits["raw"].softmax(-1) + output.logits["object"].softmax(-1)) / 2
    torch.testing.assert_close(network.predict_logits(output), mean.log())


@torch.no_grad()
def test_answer_may_be_chosen() -> None:
    network = build("mmal", answer=("raw", "object")).eval()
    output = network(make_images(SIZE))
    mean = (output.logits["raw"].softmax(-1) + output.logits["object"].softmax(-1)) / 2
    torch.testing.assert_close(network.predict_logits(output), mean.log())


# ---- gradients ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", SYSTEMS)
def test_gradient_reaches_every_parameter(system: str) -> None:
    network = build(system, input_size=96).train()
    output = network(make_images(96, batch=4))
    terms = loss_terms(output, torch.arange(4))
    sum(network.loss_weights[name] * term for name, term in terms.items()).backward()
    frozen = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    expected = {name for name in dict(network.named_parameters()) if name.startswith(("fusion.", "weighting."))}
    assert frozen == (expected if system.startswith("published") else set())
    assert bool(expected) == (SYSTEMS[system][0] == "sgkrl" and system != "without parts")
    for name, parameter in network.named_parameters():
        if name in frozen:
            assert parameter.grad is None, name
            continue
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 1e-7, name


@pytest.mark.parametrize("system", SYSTEMS)
def test_each_part_learns_from_its_own_branch(system: str) -> None:
    """Nothing flows through boxes, masks and windows; all branches reach the trunk."""
    network = build_scripted(system, dropout=0.0).train()
    output = network(make_images(SIZE).requires_grad_(False))
    parts = {name: list(module.parameters()) for name, module in network.named_children()}
    through_the_crop = {"fusion"} if system == "trained variant" else set()
    reached = {
        "raw": {"backbone", "classifier"},
        "fused": {"backbone", "classifier", "fusion"},
        "object": {"backbone", "classifier", "weighting"} | through_the_crop,
        "window": {"backbone", "classifier"} | through_the_crop,
        "graph": {"backbone", "graph"} | through_the_crop,
        "jigsaw": {"backbone", "classifier"},
        "part": {"backbone", "part_classifier"},
        "concat": {"backbone", "concat_classifier"},
    }
    if system == "trained" or system.startswith("without"):  # the graph is added to what the windows say
        reached["graph"] = reached["graph"] | {"classifier"}
    if system == "flrdf":
        reached["raw"] = reached["raw"] | {"suppression"}
    for branch, logits in output.logits.items():
        expected = reached[branch] - set(SYSTEMS[system][1].get("without", ()))
        if system.startswith("published") or SYSTEMS[system][0] != "sgkrl":
            expected -= {"fusion", "weighting"}
        for name, parameters in parts.items():
            parameters = [parameter for parameter in parameters if parameter.requires_grad]
            if not parameters:
                assert name not in expected
                continue
            loss = F.cross_entropy(logits.flatten(0, -2), torch.zeros(logits.shape[:-1].numel(), dtype=torch.int64))
            gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            assert any(gradient is not None for gradient in gradients) == (name in expected), (branch, name)


@pytest.mark.parametrize("system", [system for system in SYSTEMS if system not in ("resnet", "trained variant")])
def test_no_gradient_flows_through_the_crops(system: str) -> None:
    """The images of the object and window passes are given, not made: they carry no graph."""
    network = build_scripted(system).train()
    with reference.recorded_passes(network) as given:
        output = network(make_images(SIZE))
    assert not any(images.requires_grad for images in given)
    assert not any(boxes.requires_grad for boxes in output[1:5] if boxes is not None)
    assert all(logits.requires_grad for logits in output.logits.values())


def test_crop_gradient_changes_nothing_but_the_gradient() -> None:
    """With it, the object's loss reaches the fusion, which only the box connects to it."""
    found = {}
    for crop_gradient in (False, True):
        network = build_scripted("trained", crop_gradient=crop_gradient)
        with torch.no_grad():  # so that boxes cut something away
            network.fusion.stage3.out.weight.normal_(std=0.01)
        output = network(make_images(SIZE))
        output.logits["object"].logsumexp(dim=1).sum().backward()
        found[crop_gradient] = output, [attention.out.weight.grad for attention in network.fusion.children()]
    for without, with_it in zip(found[False][0].logits.values(), found[True][0].logits.values(), strict=True):
        assert torch.equal(without, with_it)
    assert torch.equal(found[False][0].object_boxes, found[True][0].object_boxes)
    assert not any(gradient is not None and gradient.any() for gradient in found[False][1])
    assert all(gradient is not None and gradient.any() for gradient in found[True][1])
    assert not found[True][0].object_boxes.requires_grad


@pytest.mark.parametrize("system", SYSTEMS)
def test_dropout_acts_in_training_only(system: str) -> None:
    network, images = build_scripted(system, dropout=0.5).train(), make_images(SIZE)
    first, second = network(images).logits, network(images).logits
    assert all(not torch.equal(first[name], second[name]) for name in first)
    network.eval()
    first, second = network(images).logits, network(images).logits
    assert all(torch.equal(first[name], second[name]) for name in first)


# ---- independence of the batch ------------------------------------------------------------------------------------


def assert_same_output(got: NetworkOutput, expected: NetworkOutput, *, except_for: tuple[str, ...] = ()) -> None:
    assert got.logits.keys() == expected.logits.keys()
    for name in got.logits.keys() - set(except_for):
        torch.testing.assert_close(
            got.logits[name], expected.logits[name], rtol=1e-3, atol=1e-4, msg=lambda text, name=name: name + text
        )
    for got_boxes, expected_boxes in zip(got[1:], expected[1:], strict=True):
        assert (got_boxes is None) == (expected_boxes is None)
        if got_boxes is not None and got_boxes is got.part_scores:
            torch.testing.assert_close(got_boxes, expected_boxes, rtol=1e-3, atol=1e-4)
        else:
            assert got_boxes is None or torch.equal(got_boxes, expected_boxes)


def indexed(output: NetworkOutput, index: Tensor) -> NetworkOutput:
    logits = {name: value[index] for name, value in output.logits.items()}
    return NetworkOutput(logits, *(None if value is None else value[index] for value in output[1:]))


@pytest.mark.parametrize("system", SYSTEMS)
@torch.no_grad()
def test_batched_equals_one_by_one_and_shuffled(system: str) -> None:
    network, images = evaluated(system), make_images(SIZE, batch=5)
    depends = ("graph",) if system == "published batch" else ()
    together = network(images, mask_background=True)
    for i in range(5):
        alone = network(images[i : i + 1], mask_background=True)
        assert_same_output(alone, indexed(together, torch.tensor([i])), except_for=depends)
    order = torch.tensor([3, 0, 4, 2, 1])
    assert_same_output(network(images[order], mask_background=True), indexed(together, order), except_for=depends)


@torch.no_grad()
def test_graph_over_the_batch_depends_on_the_batch() -> None:
    """What is wrong in the published code, and only there: the graph links the windows of other images."""
    network, images = evaluated("published batch"), make_images(SIZE, batch=5)
    together, alone = network(images), network(images[:1])
    change = (together.logits["graph"][:1] - alone.logits["graph"]).abs().max()
    assert change > 100 * (together.logits["object"][:1] - alone.logits["object"]).abs().max()
    assert change > 1e-3


# ---- images larger than the input ---------------------------------------------------------------------------------


@pytest.mark.parametrize("image_size", (160, 192, 256))
@pytest.mark.parametrize("system", SYSTEMS)
@torch.no_grad()
def test_first_pass_sees_larger_images_scaled_down(system: str, image_size: int) -> None:
    network, images = evaluated(system), make_images(image_size)
    small = F.interpolate(images, size=(SIZE, SIZE), mode="bilinear", antialias=True)
    branches = ("part",) if system == "scrim" else ("raw",) if system == "resnet" else ("object",)
    with reference.recorded_passes(network) as given:
        output = network(images, branches=branches)
    assert torch.equal(given[0], small)
    expected = network(small, branches=branches)
    for name in output.logits.keys() - {"object", "part", "concat"}:
        assert torch.equal(output.logits[name], expected.logits[name])
    if system == "scrim":
        assert torch.equal(output.part_boxes, expected.part_boxes)
        assert not torch.allclose(output.logits["part"], expected.logits["part"], atol=1e-5)
    elif system != "resnet":
        assert torch.equal(output.object_boxes, expected.object_boxes)  # in input_size pixels, whatever came
        assert not torch.allclose(output.logits["object"], expected.logits["object"], atol=1e-5)
    if output.object_masks is not None:
        assert torch.equal(output.object_masks, expected.object_masks)


@pytest.mark.parametrize("system", [system for system in SYSTEMS if system != "resnet"])
@torch.no_grad()
def test_contract_with_larger_images(system: str) -> None:
    network = evaluated(system)
    with reference.recorded_passes(network) as given:
        output = network(make_images(2 * SIZE), mask_background=True)
    assert_contract(output, system, batch=2, input_size=SIZE)
    if system != "scrim":
        assert given.pop(1).shape == (2, 3, SIZE, SIZE)
    regions = output.part_boxes if system == "scrim" else output.window_boxes
    if regions is not None:
        assert given.pop(1).shape == (2 * regions.shape[1], 3, SIZE // 2, SIZE // 2)
    assert len(given) == 1


def object_picture(cells: Tensor, image_size: int) -> Tensor:
    """`[1, 3, S, S]`: bright where the bool `[g, g]` cells are, nowhere zero."""
    picture = F.interpolate(cells[None, None].float(), size=(image_size, image_size), mode="nearest")
    return 5 + 3 * picture.expand(-1, 3, -1, -1)


def checker(size: int) -> Tensor:
    """`[1, 1, S, S]`: +1 and -1 from pixel to pixel, which halving the size wipes out."""
    position = torch.arange(size)
    return (1.0 - 2 * ((position[:, None] + position[None, :]) % 2))[None, None]


@pytest.mark.parametrize("system", WITH_BOXES)
@torch.no_grad()
def test_crops_of_larger_images_have_more_detail(system: str) -> None:
    network = build_scripted(system, look=lambda bright: (bright, 100 * bright)).eval()
    cells = torch.zeros(4, 4, dtype=torch.bool)
    cells[1:3, 1:3] = True
    plain = object_picture(cells, 2 * SIZE)
    detailed = plain + checker(2 * SIZE)

    def detail_by_pass(shrink: bool) -> list[float]:
        """How far the fine pattern changes what the backbone is given in each pass, away from the border."""
        given = []
        for images in (plain, detailed):
            if shrink:
                images = F.interpolate(images, size=(SIZE, SIZE), mode="bilinear", antialias=True)
            with reference.recorded_passes(network) as passes:
                output = network(images)
            assert output.object_boxes.tolist() == [[31, 31, 95, 95]]
            given.append(passes)
        return [
            (with_detail - without)[..., 4:-4, 4:-4].std().item() for without, with_detail in zip(*given, strict=True)
        ]

    from_large, from_small = detail_by_pass(shrink=False), detail_by_pass(shrink=True)
    assert max(from_small) < 1e-4
    assert from_large[0] < 1e-4
    assert min(from_large[1:]) > 0.02


def cut(image: Tensor, box: list[float], factor: int, size: int) -> Tensor:
    """One inclusive box in small pixels, cut out of a `[C, H, W]` image `factor` times as large: `[C, size, size]`."""
    x0, y0, x1, y1 = (int(value) for value in box)
    crop = reference.crop_and_resize(
        image, (factor * x0, factor * y0, factor * (x1 + 1) - 1, factor * (y1 + 1) - 1), image.shape[-1]
    )
    return F.interpolate(crop[None], size=(size, size), mode="bilinear", antialias=factor > 1)[0]


@pytest.mark.parametrize("factor", (1, 2))
@pytest.mark.parametrize("system", ("trained", "published", "mmal", "flrdf fixed"))
@torch.no_grad()
def test_mask_background_blanks_what_is_outside_the_mask(system: str, factor: int) -> None:
    size = 224
    network = build_scripted(system, input_size=size, look=lambda bright: (bright, 100 * bright)).eval()
    row, column = torch.meshgrid(torch.arange(7), torch.arange(7), indexing="ij")
    cells = (row - 3).abs() + (column - 2).abs() <= 2  # a diamond: the corners of its box are background
    images = object_picture(cells, factor * size) + 0.1 * make_images(factor * size, batch=1).clamp(-9, 9)
    with reference.recorded_passes(network) as plain:
        output = network(images)
    with reference.recorded_passes(network) as masked:
        network(images, mask_background=True)
    assert output.object_boxes.tolist() == [[0, 31, 159, 191]]
    assert torch.equal(plain[0], masked[0])
    expected = cut(images[0], output.object_boxes[0].tolist(), factor, size)
    torch.testing.assert_close(plain[1][0], expected, rtol=1e-4, atol=1e-3)
    if system in ("mmal", "flrdf fixed"):
        assert torch.equal(plain[1], masked[1])
        return

    mask = reference.adaptive_mask(cells.numpy(), (0, 1, 5, 6))
    assert output.object_masks[0].tolist() == mask.tolist()
    kept = F.interpolate(torch.from_numpy(mask)[None, None].float(), size=images.shape[2:], mode="nearest")[0]
    kept = cut(kept, output.object_boxes[0].tolist(), factor, size)
    # A pixel beside the edge may take a hair of its neighbour, as coordinates are rounded: look one further in.
    outside = (F.max_pool2d(kept, 3, stride=1, padding=1) == 0).expand(3, -1, -1)
    inside = (-F.max_pool2d(-kept, 3, stride=1, padding=1) == 1).expand(3, -1, -1)
    assert outside.float().mean() > 0.1
    assert inside.float().mean() > 0.5
    assert (masked[1][0][outside] == 0).all()
    torch.testing.assert_close(masked[1][0][inside], plain[1][0][inside], rtol=1e-3, atol=1e-3)
    assert (plain[1] != 0).all()


# ---- the trained wiring, step by step -----------------------------------------------------------------------------


def step_by_step(network: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """What the trained wiring makes of one `[3, S, S]` image with the mask, from its parts and slow references."""
    factor = image.shape[-1] // SIZE
    small = F.interpolate(image[None], size=(SIZE, SIZE), mode="bilinear", antialias=True)
    features = network.backbone(small)
    fused = network.fusion(features)
    cells, cell_box = reference.localize(
        *(reference.mask_above_mean(maps[0].sum(dim=0).numpy()) for maps in (fused, features.penultimate))
    )
    box = reference.cell_box_to_pixels(cell_box, 32)
    mask = torch.from_numpy(reference.adaptive_mask(cells, cell_box))
    kept = mask.repeat_interleave(32 * factor, dim=0).repeat_interleave(32 * factor, dim=1)

    def enlarged(box: tuple[int, ...]) -> tuple[int, ...]:
        x0, y0, x1, y1 = (int(side) for side in box)
        return factor * x0, factor * y0, factor * (x1 + 1) - 1, factor * (y1 + 1) - 1

    crop = reference.crop_and_resize(image * kept, enlarged(box), factor * SIZE)
    seen = F.interpolate(crop[None], size=(SIZE, SIZE), mode="bilinear", antialias=True) if factor > 1 else crop[None]
    weighted = network.weighting(network.backbone(seen).final)
    windows = reference.select_windows(weighted[0], reference.scale_window_set(reference.BIRDS, SIZE // 32), 32)
    nodes = torch.cat(
        [
            network.backbone(reference.crop_and_resize(crop, enlarged(window), SIZE // 2)[None]).embedding
            for window in windows
        ]
    )
    edges = reference.neighbour_edges(windows[:, :2], 3)
    edges = sorted({*edges, *((target, source) for source, target in edges)})
    hidden = nodes
    for convolution in network.graph.convolutions:
        hidden = reference.graph_convolution(hidden, edges, convolution.lin.weight, convolution.bias).relu()
    _, cells_without_fusion = reference.localize(
        *(reference.mask_above_mean(maps[0].sum(dim=0).numpy()) for maps in (features.final, features.penultimate))
    )
    return {
        "raw": network.classifier(features.embedding)[0],
        "fused": network.classifier(fused.mean(dim=(2, 3)))[0],
        "object": network.classifier(weighted.mean(dim=(2, 3)))[0],
        "window": network.classifier(nodes),
        "graph": network.graph.classifier(hidden.mean(dim=0)) + network.classifier(nodes).mean(dim=0),
        "object_boxes": torch.tensor(box).float(),
        "window_boxes": torch.from_numpy(windows).float(),
        "object_masks": mask,
        "cells": torch.tensor(cell_box),
        "cells_without_fusion": torch.tensor(cells_without_fusion),
    }


@pytest.mark.parametrize("factor", (1, 2))
@torch.no_grad()
def test_trained_wiring_step_by_step(factor: int) -> None:
    network = build("trained").eval()
    for attention in (network.fusion.stage3, network.fusion.stage2):
        nn.init.normal_(attention.out.weight, std=1.0)  # far from the start, where the fused map is the final one
    for gate in (network.weighting.channel.mlp[2], network.weighting.spatial.conv):
        nn.init.normal_(gate.weight, std=0.5)
    nn.init.normal_(network.graph.classifier.weight)
    images = make_images(factor * SIZE, batch=4)
    output = network(images, mask_background=True)
    steps = [step_by_step(network, image) for image in images]
    expected = {name: torch.stack([one[name] for one in steps]) for name in steps[0]}
    assert (expected["cells"] != expected["cells_without_fusion"]).any()
    for name in ("object_boxes", "window_boxes", "object_masks"):
        assert torch.equal(getattr(output, name), expected[name]), name
    for name, logits in output.logits.items():
        torch.testing.assert_close(logits, expected[name], rtol=1e-3, atol=1e-3, msg=lambda text, n=name: n + text)


# ---- odd inputs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", (0.0, 1.0, -2.3), ids=str)
@pytest.mark.parametrize("system", SYSTEMS)
@torch.no_grad()
def test_constant_images(system: str, value: float) -> None:
    output = evaluated(system)(torch.full((2, 3, SIZE, SIZE), value), mask_background=True)
    assert_contract(output, system, batch=2, input_size=SIZE)
    assert all(torch.equal(logits[0], logits[1]) for name, logits in output.logits.items() if name != "graph")


def left_and_right(bright: Tensor) -> tuple[Tensor, Tensor]:
    """Two maps whose parts above the mean have no cell in common."""
    _, _, rows, columns = bright.shape
    left = (torch.arange(columns) < columns // 2).float().expand(rows, columns)
    return bright * 0 + left, bright * 0 + 1 - left


def constant(value: float) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    return lambda bright: (torch.full_like(bright, value), torch.full_like(bright, value))


def half_constant(value: float) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Only the last map is constant: nothing stands out of it, whatever the map before it shows."""
    return lambda bright: (left_and_right(bright)[0], torch.full_like(bright, value))


ODD_MAPS = {
    "zero": constant(0.0),
    "constant": constant(1.0),
    "constant that is no binary fraction": constant(0.1),
    "negative constant": constant(-3.7),
    "large constant": constant(1e6),
    "disjoint": left_and_right,
    "zero last map": half_constant(0.0),
}


@pytest.mark.parametrize("mask_background", (False, True))
@pytest.mark.parametrize("maps", ODD_MAPS)
@pytest.mark.parametrize("system", WITH_BOXES)
@torch.no_grad()
def test_maps_without_an_object_give_the_whole_image(system: str, maps: str, mask_background: bool) -> None:
    if (system, maps) == ("flrdf", "disjoint"):
        pytest.skip("its box asks the last map alone, where there is an object")
    for input_size in (96, 224):
        network = build_scripted(system, input_size=input_size, look=ODD_MAPS[maps]).eval()
        if getattr(network, "fusion", None) is not None:
            # what random attention adds is not constant, and is not what is tested here
            for attention in (network.fusion.stage3, network.fusion.stage2):
                nn.init.zeros_(attention.out.weight)
        output = network(make_images(input_size), mask_background=mask_background)
        assert_contract(output, system, batch=2, input_size=input_size)
        assert output.object_boxes.tolist() == [[0, 0, input_size - 1, input_size - 1]] * 2
        if output.object_masks is not None:
            assert output.object_masks.all()


@pytest.mark.parametrize("value", (0.1, 0.7, 3.3, 12.1, -0.3, 1.1), ids=str)
@torch.no_grad()
def test_constant_last_map_gives_the_whole_image(value: float) -> None:
    """Whatever rounding makes of its mean, and whatever the map before it shows."""
    for input_size in (96, 160, 224):
        network = build_scripted("mmal", input_size=input_size, look=half_constant(value)).eval()
        output = network(make_images(input_size))
        assert output.object_boxes.tolist() == [[0, 0, input_size - 1, input_size - 1]] * 2


@pytest.mark.parametrize("shape", ((128, 160), (160, 128), (96, 96), (64, 64), (128, 127)), ids=str)
@pytest.mark.parametrize("system", SYSTEMS)
def test_images_that_are_not_square_or_too_small_are_refused(system: str, shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"{shape[0]}x{shape[1]}.*{SIZE}x{SIZE}"):
        evaluated(system)(torch.zeros(1, 3, *shape))


# ---- precision, tracing, several devices --------------------------------------------------------------------------


@pytest.mark.parametrize("training", (False, True))
@pytest.mark.parametrize("system", SYSTEMS)
def test_mixed_precision(system: str, training: bool) -> None:
    """The real trunk in two systems; in the others a scripted one, cast (convolutions in bf16 can be very slow)."""
    if system in ("resnet", "trained"):
        network = build(system, input_size=96)
    else:
        network = build_scripted(system, input_size=96)
        network.backbone.register_forward_hook(lambda trunk, images, maps: Features(*(x.bfloat16() for x in maps)))
    network.train(training)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.set_grad_enabled(training):
        output = network(make_images(192), mask_background=True)
    assert all(value.isfinite().all() for value in output[1:] if value is not None)
    assert_contract(output, system, batch=2, input_size=96, training=training)
    for name, logits in output.logits.items():
        assert logits.dtype == torch.float32, name
        assert not torch.equal(logits, logits.bfloat16().float()), name  # not rounded to bfloat16 on the way either
    terms = loss_terms(output, torch.zeros(2, dtype=torch.int64))
    if training:
        assert terms.keys() == network.loss_weights.keys()
        sum(terms.values()).backward()
        gradients = [parameter.grad for parameter in network.parameters() if parameter.requires_grad]
        assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("system", ("resnet", "mmal", "trained", "published batch", "flrdf", "scrim"))
@torch.no_grad()
def test_traces_without_graph_break(system: str) -> None:
    """The real trunk is traced once, in the plain system; a scripted one stands for it in the others (faster)."""
    network = (build(system) if system == "resnet" else build_scripted(system)).eval()
    torch.compiler.reset()
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    images = make_images(SIZE if system == "mmal" else 2 * SIZE)
    assert_same_output(compiled(images, mask_background=True), network(images, mask_background=True))


@pytest.mark.parametrize("system", SYSTEMS)
@torch.no_grad()
def test_forward_makes_the_host_wait_nowhere(system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network, images = evaluated(system), make_images(2 * SIZE, batch=1)

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a tensor was read on the host")

    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__"):
            patch.setattr(Tensor, name, refuse)
        with reference.ForbidHostReads():
            network(images, mask_background=True)


def leaves(value: object) -> list[object]:
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in leaves(item)]
    return [leaf for item in value for leaf in leaves(item)] if isinstance(value, tuple) else [value]


@pytest.mark.parametrize("branches", (None, ("raw",)), ids=str)
@pytest.mark.parametrize("system", SYSTEMS)
@torch.no_grad()
def test_outputs_survive_the_gather_of_data_parallel(
    system: str, branches: tuple[str, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's own recursion over an output; only its copy between devices is replaced, which a CPU does not have."""

    class GatherOnTheHost:
        @staticmethod
        def apply(device: object, dim: int, *tensors: Tensor) -> Tensor:
            return torch.cat(tensors, dim=dim)

    monkeypatch.setattr(scatter_gather, "Gather", GatherOnTheHost)
    network, images = evaluated(system), make_images(SIZE, batch=5)
    whole = network(images, branches=branches)
    gathered = scatter_gather.gather([network(part, branches=branches) for part in (images[:3], images[3:])], "cpu")
    assert type(gathered) is NetworkOutput
    assert_same_output(gathered, whole, except_for=("graph",) if system == "published batch" else ())
    for leaf in leaves(whole):
        assert leaf is None or (isinstance(leaf, Tensor) and leaf.shape[0] == 5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("system", SYSTEMS)
def test_no_synchronisation_on_a_gpu(system: str) -> None:
    network, images = build(system).cuda(), make_images(2 * SIZE).cuda()
    for training in (False, True):
        network.train(training)
        network(images, mask_background=True)
        torch.cuda.set_sync_debug_mode("error")
        try:
            network(images, mask_background=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")


# ---- what cannot be built -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "settings", "words"),
    (
        ("sgkrI", {}, ("sgkrI", *MODELS)),
        ("sgkrl", {"num_classes": 1}, ("1", "2")),
        ("resnet", {"num_classes": 0}, ("0", "2")),
        ("sgkrl", {"input_size": 100}, ("100", "32")),
        ("resnet", {"input_size": 64}, ("64", "96")),
        ("mmal", {"input_size": 0}, ("0", "96")),
        ("sgkrl", {"wiring": "loose"}, ("loose", "trained", "published")),
        ("sgkrl", {"wiring": "published", "graph_scope": "world"}, ("world", "image", "batch")),
        ("sgkrl", {"graph_scope": "batch"}, ("batch", "trained", "published")),
        ("sgkrl", {"spatial_weights": "none"}, ("none", "relative", "absolute")),
        ("sgkrl", {"without": ("graph",)}, ("graph", "fusion", "weighting")),
        ("sgkrl", {"wiring": "published", "graph_residual": True}, ("graph_residual", "trained")),
        ("sgkrl", {"without": ("fusion",), "answer": ("fused",)}, ("fused", "raw, object, graph")),
        ("sgkrl", {"answer": ("raw", "crown")}, ("crown", "raw", "fused", "object", "graph")),
        ("sgkrl", {"wiring": "published", "answer": ("fused",)}, ("fused", "graph")),
        ("mmal", {"answer": ("window",)}, ("window", "object")),
        ("resnet", {"answer": ("object",)}, ("object", "raw")),
        ("resnet", {"answer": ()}, ("()", "raw")),
        ("mmal", {"windows": ((((14, 14),), 2),)}, ("2", "1", "4x4")),
        ("sgkrl", {"windows": ((((4, 4),), 1), (((13, 13),), 5))}, ("2", "5")),
        ("sgkrl", {"windows": "fish"}, ("fish", "birds", "vehicles")),
        ("sgkrl", {"windows": ((4, 4), 2)}, ("windows",)),
        ("mmal", {"windows": ()}, ("windows",)),
        ("mmal", {"backbone": "vgg16"}, ("vgg16", "resnet50")),
        ("flrdf", {"suppression": "strong"}, ("strong", "learnable")),
        ("flrdf", {"suppression": 0.0}, ("0.0", "learnable")),
        ("flrdf", {"classify_suppressed": False}, ("classify_suppressed", "suppression", "learnable")),
        ("flrdf", {"jigsaw_blocks": 5}, ("5", "4")),
        ("flrdf", {"answer": ("jigsaw",)}, ("jigsaw", "raw, object")),
        ("scrim", {"answer": ("part",)}, ("part", "raw, concat")),
        ("scrim", {"parts_in_answer": 7}, ("parts_in_answer", "7", "6")),
        ("scrim", {"part_proposals": 1000}, ("part_proposals", "1000", "129")),
        ("scrim", {"anchor_sizes": (48, 96)}, ("anchor_sizes", "48", "3")),
    ),
    ids=str,
)
def test_what_cannot_be_built_is_refused(model: str, settings: dict, words: tuple[str, ...]) -> None:
    settings = {"num_classes": CLASSES, "backbone": "resnet18", "input_size": SIZE, **settings}
    with pytest.raises(ValueError) as caught, torch.device("meta"):
        build_network(model, **settings)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("system", SYSTEMS)
def test_heads_are_parts_that_start_from_random_weights(system: str) -> None:
    network = build_scripted(system)
    trunk = {id(parameter) for parameter in network.backbone.parameters()}
    heads = [id(parameter) for head in network.heads() for parameter in head.parameters()]
    assert len(heads) == len(set(heads)) > 0
    assert not trunk & set(heads)
    assert {id(parameter) for parameter in network.classifier.parameters()} <= set(heads)
