"""FLRDF against its description, step by step and one image at a time, and its boxes on real photographs."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import object_checks
import pytest
import reference
import small_systems
import system_checks
import torch
import torch.nn.functional as F
from cases import slow_but_for
from small_systems import Variant, flat, learners, run
from torch import Tensor, nn
from tracing import traced

from datasets import Pictures, read_catalogue
from networks import Shared, build_network, build_on_trunk
from networks.backbone import Backbone
from networks.outputs import Features, NetworkOutput
from networks.system import System
from networks.systems.flrdf import FLRDF
from utils.data.image_batches import normalised

pytestmark = pytest.mark.usefixtures("thin_trunk")

CLASSES, SIZE, CHANNELS = 5, 224, 8
# Learnable twice: as built, with shares near one half, and with weights that make them differ from each other.
CONTROLS: tuple[str | float, ...] = ("learnable", "learnable, spread", 0.1, 0.3, 0.7, 1.0)
LABELS = torch.tensor([0, 3, 1])


class ColourBackbone(nn.Module):
    """A trunk whose maps are mixtures of the colours of each cell of 32 pixels, rectified; nothing of it is random.

    `final` and `penultimate` mix them differently, and the channels have their peaks in different cells.
    """

    channels = {"stage2": CHANNELS, "stage3": CHANNELS, "final": CHANNELS}
    embedding_channels = CHANNELS
    stride = 32

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.final = nn.Parameter(torch.randn(CHANNELS, 3, 1, 1, generator=generator))
        self.penultimate = nn.Parameter(torch.randn(CHANNELS, 3, 1, 1, generator=generator))

    def forward(self, images: Tensor, *, kind: str = "picture", dense: bool = False) -> Features:
        colours = F.avg_pool2d(images, 32)
        final, penultimate = (F.conv2d(colours, mixture).relu() for mixture in (self.final, self.penultimate))
        return Features(final, final, penultimate, final.square(), final.square().mean(dim=(2, 3)))


class GivenBackbone(nn.Module):
    """A trunk that looks its first pass up; every other picture gives zeros."""

    channels = {"stage2": 1, "stage3": 1, "final": 1}
    stride = 32

    def __init__(self, images: Tensor, penultimate: Tensor, final: Tensor) -> None:
        super().__init__()
        self.images, self.penultimate, self.final = images, penultimate, final
        self.embedding_channels = final.shape[1]

    def forward(self, images: Tensor, *, kind: str = "picture", dense: bool = False) -> Features:
        known = torch.equal(images, self.images)
        final, penultimate = ((each if known else 0 * each) for each in (self.final, self.penultimate))
        return Features(final, final, penultimate, final, final.mean(dim=(2, 3)))


def build(
    control: str | float = "learnable", *, input_size: int = SIZE, dropout: float = 0.5, **options: object
) -> FLRDF:
    torch.manual_seed(0)
    suppression = "learnable" if isinstance(control, str) else control
    shared = Shared(input_size=input_size, dropout=dropout)
    network = build_on_trunk("flrdf", ColourBackbone(), CLASSES, shared=shared, suppression=suppression, **options)
    if control == "learnable, spread":
        nn.init.normal_(controller(network), std=1.0)
    return network


def on_trunk(name: str, trunk: nn.Module, *, classes: int = CLASSES, size: int = SIZE, **options: object) -> System:
    return build_on_trunk(name, trunk, classes, shared=Shared(input_size=size), **options)


def controller(network: FLRDF) -> Tensor:
    (weights,) = network.suppression.parameters()
    return weights


def make_images(batch: int, size: int = SIZE, *, seed: int = 1) -> Tensor:
    """Blobs with some noise: maps with several peaks."""
    generator = torch.Generator().manual_seed(seed)
    blobs = F.interpolate(torch.randn(batch, 3, 5, 5, generator=generator), size=(size, size), mode="bicubic")
    return 1.5 * blobs + 0.3 * torch.randn(batch, 3, size, size, generator=generator)


# ---- the description, one image at a time -------------------------------------------------------------------------


def suppressed_by_hand(network: FLRDF, final: Tensor, control: str | float) -> np.ndarray:
    """`[C, g, g]` of one image: every channel capped at its share of its maximum."""
    features = final.detach().double().numpy()
    if isinstance(control, str):
        totals = controller(network).detach().double().numpy() @ features.mean(axis=(1, 2))
        shares = 1 / (1 + np.exp(-totals))
    else:
        shares = np.full(len(features), control)
    return np.stack(
        [np.minimum(channel, channel.max() * share) for channel, share in zip(features, shares, strict=True)]
    )


def box_by_hand(map_: np.ndarray, penultimate: np.ndarray | None = None) -> tuple[int, int, int, int]:
    """MMAL-Net's rule on `[C, g, g]`, with or without the agreement of the map before: inclusive pixels."""
    mask = reference.mask_above_mean(map_.sum(axis=0))
    agreed = np.ones_like(mask) if penultimate is None else reference.mask_above_mean(penultimate.sum(axis=0))
    _, box = reference.localize(mask, agreed)
    return reference.cell_box_to_pixels(box, 32)


def crop_by_hand(image: Tensor, box: tuple[int, int, int, int], input_size: int) -> Tensor:
    """The box cut from `[3, S, S]` at its own resolution, enlarged to S x S, then brought to the input size."""
    size = image.shape[-1]
    assert size % input_size == 0
    factor = size // input_size
    x0, y0, x1, y1 = box
    crop = reference.crop_and_resize(
        image, (factor * x0, factor * y0, factor * x1 + factor - 1, factor * y1 + factor - 1), size
    )
    if factor == 1:
        return crop
    return F.interpolate(crop[None], size=(input_size, input_size), mode="bilinear", antialias=True)[0]


def classify(network: FLRDF, embedding: Tensor) -> Tensor:
    return network.classifier.weight @ embedding.to(network.classifier.weight.dtype) + network.classifier.bias


@pytest.mark.parametrize("factor", slow_but_for([2], [1, 2]))
@pytest.mark.parametrize("box_agreement", (False, True))
@pytest.mark.parametrize("control", CONTROLS)
@torch.no_grad()
def test_evaluation_step_by_step(control: str | float, box_agreement: bool, factor: int) -> None:
    network = build(control, box_agreement=box_agreement).eval()
    images = make_images(8, factor * SIZE)
    with reference.recorded_passes(network) as given:
        output = network(images)
    assert len(given) == 2
    assert tuple(output.logits) == ("raw", "object")
    assert output == NetworkOutput(output.logits, output.object_boxes)  # and nothing else
    small = images if factor == 1 else F.interpolate(images, size=(SIZE, SIZE), mode="bilinear", antialias=True)
    torch.testing.assert_close(given[0], small)
    for index, image in enumerate(images):
        seen = network.backbone(small[index : index + 1])
        suppressed = suppressed_by_hand(network, seen.final[0], control)
        raw = classify(network, torch.from_numpy(suppressed.mean(axis=(1, 2))))
        torch.testing.assert_close(output.logits["raw"][index], raw, rtol=1e-4, atol=1e-5)
        penultimate = seen.penultimate[0].double().numpy() if box_agreement else None
        box = box_by_hand(suppressed, penultimate)
        assert tuple(output.object_boxes[index].tolist()) == box
        crop = crop_by_hand(image, box, SIZE)
        torch.testing.assert_close(given[1][index], crop, rtol=1e-3, atol=1e-3)
        embedding = network.backbone(crop[None]).final[0].mean(dim=(1, 2))  # nothing of the object is suppressed
        torch.testing.assert_close(output.logits["object"][index], classify(network, embedding), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_images_of_these_tests_tell_something() -> None:
    """Suppression and agreement change many boxes, and boxes cut something away: else the above would prove little."""
    images = make_images(40)
    boxes = {
        (control, agreement): build(control, box_agreement=agreement).eval()(images).object_boxes
        for control in CONTROLS
        for agreement in (False, True)
    }

    def changed(first: tuple, second: tuple) -> int:
        return int((boxes[first] != boxes[second]).any(dim=1).sum())

    for control in CONTROLS[:4]:
        assert changed((control, False), (1.0, False)) >= 5, control
    for control in CONTROLS:
        assert changed((control, False), (control, True)) >= 5, control
    extents = boxes["learnable", False][:, 2:] - boxes["learnable", False][:, :2] + 1
    assert (extents.prod(dim=1) < 0.7 * SIZE**2).sum() >= 10
    output = build("learnable").eval()(images)
    plain = build(1.0).eval()(images)
    assert (output.logits["raw"] - plain.logits["raw"]).abs().max() > 0.1


def given_maps(final: Tensor, penultimate: Tensor | None = None, **settings: object) -> NetworkOutput:
    """FLRDF on `[C, g, g]` maps of one image: what its first pass is to have seen."""
    final = final[None]
    penultimate = final if penultimate is None else penultimate[None]
    size = 32 * final.shape[-1]
    images = make_images(1, size)
    torch.manual_seed(0)
    network = on_trunk("flrdf", GivenBackbone(images, penultimate, final), size=size, **settings).eval()
    with torch.no_grad():
        return network(images)


def head_and_body() -> Tensor:
    """`[1, 4, 4]`: a head of 40 at the left, and a body of five cells of 2 next to it."""
    map_ = torch.zeros(1, 4, 4)
    map_[0, 0, 1] = 40
    map_[0, 1, 1:3] = 2
    map_[0, 2, 1:4] = 2
    return map_


def test_the_body_joins_the_head() -> None:
    """The head alone lifts the mean to 50 / 16, above the body; capped at 4 it leaves a mean of 14 / 16."""
    assert given_maps(head_and_body(), suppression=1.0).object_boxes.tolist() == [[31, 0, 63, 31]]
    assert given_maps(head_and_body(), suppression=0.7).object_boxes.tolist() == [[31, 0, 63, 31]]
    assert given_maps(head_and_body(), suppression=0.1).object_boxes.tolist() == [[31, 0, 127, 95]]


def test_channels_are_capped_before_they_are_added() -> None:
    """10 + 10 + 0.8 leave the weak channel's cell below a mean of 1.3; a capped sum, 10 + 10 + 8, would show it."""
    maps = torch.zeros(2, 4, 4)
    maps[0, 0, 0] = 100
    maps[0, 0, 1] = 30
    maps[1, 1, 1] = 8
    assert given_maps(maps, suppression=0.1).object_boxes.tolist() == [[0, 0, 63, 31]]


def test_the_largest_component_counts_and_not_the_strongest() -> None:
    map_ = torch.zeros(1, 5, 5)
    map_[0, 0, 0] = 50
    map_[0, 2:5, 3] = 20
    map_[0, 4, 4] = 20
    assert given_maps(map_, suppression=0.5).object_boxes.tolist() == [[95, 63, 159, 159]]


def test_cells_at_the_mean_are_background() -> None:
    """Four cells of 2, eight of 1 and four of 0: their mean is 1."""
    map_ = torch.ones(1, 4, 4)
    map_[0, 0] = 0
    map_[0, 1:3, 1:3] = 2
    assert given_maps(map_, suppression=1.0).object_boxes.tolist() == [[31, 31, 95, 95]]
    map_[0, 1, 1] = 100
    assert given_maps(map_, suppression=0.02).object_boxes.tolist() == [[31, 31, 95, 95]]


def test_agreement_keeps_what_both_maps_show() -> None:
    """The map before the last one is taken as it is, not suppressed, and only where it is asked for."""
    final, penultimate = torch.zeros(1, 4, 4), torch.zeros(1, 4, 4)
    final[0, 1:3, 0:3] = 5
    penultimate[0, 2, 1] = 50
    penultimate[0, 2, 0] = 1  # above the mean only if the peak were capped
    assert given_maps(final, penultimate, suppression=0.1).object_boxes.tolist() == [[0, 31, 95, 95]]
    agreed = given_maps(final, penultimate, suppression=0.1, box_agreement=True)
    assert agreed.object_boxes.tolist() == [[31, 63, 63, 95]]
    mirrored = given_maps(final, penultimate.flip(1), suppression=0.1, box_agreement=True)
    assert mirrored.object_boxes.tolist() == [[31, 31, 63, 63]]
    elsewhere = given_maps(final, penultimate.roll(2, dims=2), suppression=0.1, box_agreement=True)
    assert elsewhere.object_boxes.tolist() == [[0, 0, 127, 127]]


@pytest.mark.parametrize("suppression", ("learnable", 0.3))
@pytest.mark.parametrize("value", (0.0, 0.7))
def test_a_map_without_peaks_gives_the_whole_image(value: float, suppression: str | float) -> None:
    output = given_maps(torch.full((6, 5, 5), value), suppression=suppression)
    assert output.object_boxes.tolist() == [[0, 0, 159, 159]]
    assert all(logits.isfinite().all() for logits in output.logits.values())


# ---- what `raw` classifies ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("control", (0.1, 0.7))
@torch.no_grad()
def test_raw_of_the_plain_map(control: float) -> None:
    """The boxes stay those of the suppressed map, and the other branch its own."""
    images = make_images(6)
    plain, suppressed = (build(control, classify_suppressed=choice).eval() for choice in (False, True))
    first, second = plain(images), suppressed(images)
    embeddings = plain.backbone(images).final.mean(dim=(2, 3))
    expected = torch.stack([classify(plain, embedding) for embedding in embeddings])
    torch.testing.assert_close(first.logits["raw"], expected)
    assert (first.logits["raw"] - second.logits["raw"]).abs().max() > 1e-2
    assert torch.equal(first.object_boxes, second.object_boxes)
    assert torch.equal(first.logits["object"], second.logits["object"])


@torch.no_grad()
def test_share_of_one_is_a_plain_network() -> None:
    images, whole = make_images(6), build(1.0).eval()
    output, plain = whole(images), build(1.0, classify_suppressed=False).eval()(images)
    for name in ("raw", "object"):
        torch.testing.assert_close(output.logits[name], plain.logits[name])
    agreed = build(1.0, box_agreement=True).eval()(images)
    mmal = on_trunk("mmal", ColourBackbone()).eval()
    assert torch.equal(agreed.object_boxes, mmal(images).object_boxes)


# ---- jigsaw -------------------------------------------------------------------------------------------------------


def tiles_of(image: Tensor, blocks: int) -> list[Tensor]:
    """The whole blocks of `[3, H, W]`, row by row."""
    height, width = image.shape[1] // blocks, image.shape[2] // blocks
    return [
        image[:, row * height : (row + 1) * height, column * width : (column + 1) * width]
        for row in range(blocks)
        for column in range(blocks)
    ]


def order_of(shuffled: Tensor, whole: Tensor, blocks: int) -> list[int]:
    """Which block of `whole` each block of `shuffled` is, the nearest if not the same."""
    originals = tiles_of(whole, blocks)
    order = []
    for tile in tiles_of(shuffled, blocks):
        distances = [(tile - original).abs().max().item() for original in originals]
        assert min(distances) < 1e-3
        order.append(int(np.argmin(distances)))
    return order


@pytest.mark.parametrize(("input_size", "blocks"), ((128, 1), (128, 2), (128, 3), (224, 3), (96, 3)))
@pytest.mark.parametrize("factor", (1, 2))
def test_jigsaw_sees_the_object_with_its_blocks_shuffled(input_size: int, blocks: int, factor: int) -> None:
    network = build("learnable", input_size=input_size, jigsaw_blocks=blocks, dropout=0.0).train()
    images = make_images(6, factor * input_size, seed=input_size)
    torch.manual_seed(0)
    with reference.recorded_passes(network) as given:
        output = network(images)
    assert tuple(output.logits) == ("raw", "object", "jigsaw")
    assert len(given) == 3
    side = input_size - input_size % blocks
    assert given[2].shape == (6, 3, side, side)
    embeddings = network.backbone(given[2]).final.mean(dim=(2, 3))  # plain, as that of the object
    expected = torch.stack([classify(network, embedding) for embedding in embeddings])
    torch.testing.assert_close(output.logits["jigsaw"], expected)
    found = []
    for index, image in enumerate(images):
        box = tuple(int(edge) for edge in output.object_boxes[index].tolist())
        crop = crop_by_hand(image, box, input_size)
        torch.testing.assert_close(given[1][index], crop, rtol=1e-3, atol=1e-3)
        order = order_of(given[2][index], crop, blocks)
        assert sorted(order) == list(range(blocks**2))
        originals = tiles_of(given[1][index], blocks)  # the very pixels that the object branch is given
        shuffled = tiles_of(given[2][index], blocks)
        assert all(torch.equal(shuffled[place], originals[block]) for place, block in enumerate(order))
        found.append(tuple(order))
    if blocks == 1:
        assert torch.equal(given[2], given[1])
    else:
        assert len(set(found)) > 1


def test_each_image_and_each_step_has_its_own_order() -> None:
    network = build("learnable", input_size=128, jigsaw_blocks=3).train()
    images = make_images(1, 128).expand(12, -1, -1, -1)
    shuffled = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        with reference.recorded_passes(network) as given:
            network(images)
            network(images)
        shuffled.append((given[2], given[5]))
    (first, later), again, other = shuffled
    assert torch.equal(again[0], first)
    assert torch.equal(again[1], later)
    assert not torch.equal(later, first)
    assert not torch.equal(other[0], first)
    assert len(first.flatten(1).unique(dim=0)) >= 11
    assert len({tuple(order_of(one, given[1][0], 3)) for one in first}) >= 11


@pytest.mark.parametrize("control", ("learnable", 0.3))
def test_evaluation_shuffles_nothing(control: str | float) -> None:
    """No third pass, no random number taken, and the branch refused."""
    network, images = build(control, input_size=128).eval(), make_images(3, 128)
    state = torch.get_rng_state()
    with reference.recorded_passes(network) as given, torch.no_grad():
        output = network(images)
    assert len(given) == 2
    assert torch.equal(torch.get_rng_state(), state)
    assert set(output.logits) == {"raw", "object"}
    for branches in (("jigsaw",), ("raw", "jigsaw"), ("raw", "object", "jigsaw")):
        with pytest.raises(ValueError, match="jigsaw"):
            network(images, branches=branches)


@pytest.mark.parametrize(
    ("branches", "expected"),
    (
        (("raw",), {"raw"}),
        (("object",), {"raw", "object"}),
        (("jigsaw",), {"raw", "jigsaw"}),
        (("jigsaw", "object"), {"raw", "object", "jigsaw"}),
        (None, {"raw", "object", "jigsaw"}),
    ),
    ids=("raw", "object", "jigsaw", "both", "all"),
)
def test_training_computes_what_it_is_asked_for(branches: tuple[str, ...] | None, expected: set[str]) -> None:
    network, images = build("learnable", input_size=128).train(), make_images(3, 128)
    with reference.recorded_passes(network) as given:
        output = network(images, branches=branches)
    assert set(output.logits) == expected
    assert len(given) == len(expected)
    assert (output.object_boxes is None) == (expected == {"raw"})


@pytest.mark.parametrize("training", (False, True))
@pytest.mark.parametrize("branches", ((), ("window",), ("raw", "graph")), ids=str)
def test_unknown_branches_are_refused(branches: tuple[str, ...], training: bool) -> None:
    with pytest.raises(ValueError, match="branches"):
        build("learnable", input_size=128).train(training)(make_images(1, 128), branches=branches)


# ---- as a whole, in both kinds of suppression ---------------------------------------------------------------------

FIXED = Variant("flrdf", suppression=0.9, box_agreement=True, jigsaw_blocks=3)
ALL = {"learnable": Variant("flrdf"), "fixed": FIXED}


@pytest.mark.parametrize("check", system_checks.CHECKS, ids=lambda check: check.__name__)
def test_fixed_suppression(check: system_checks.Check) -> None:
    check(FIXED)


@pytest.mark.parametrize("variant", ALL)
@torch.no_grad()
def test_output(variant: str) -> None:
    for images in (small_systems.make_images(), small_systems.make_images(2 * small_systems.SIZE)):
        output, given = run(ALL[variant].evaluated, images)
        assert list(flat(output)) == ["logits.raw", "logits.object", "object_boxes"]
        assert [tuple(x.shape) for x in given] == [(2, 3, small_systems.SIZE, small_systems.SIZE)] * 2


@pytest.mark.parametrize("variant", ALL)
def test_contract_at_other_input_sizes(variant: str) -> None:
    system_checks.output_keeps_the_contract_at_other_input_sizes(ALL[variant], (224, 448))


@pytest.mark.parametrize("variant", ALL)
def test_who_learns_from_a_branch(variant: str) -> None:
    """Nothing flows through boxes and crops; all branches reach the trunk."""
    found = learners(ALL[variant].build_scripted(dropout=0.0), small_systems.make_images())
    controller = {"suppression"} if variant == "learnable" else set()
    both = {"backbone", "classifier"}
    assert found == {"raw": both | controller, "object": both, "jigsaw": both}


@pytest.mark.parametrize("variant", ALL)
def test_no_gradient_flows_through_the_crops(variant: str) -> None:
    object_checks.no_gradient_flows_through_the_crops(ALL[variant])


@pytest.mark.parametrize("variant", ALL)
def test_crops_of_larger_images_have_more_detail(variant: str) -> None:
    object_checks.crops_of_larger_images_have_more_detail(ALL[variant])


@pytest.mark.parametrize("factor", (1, 2))
def test_background_is_never_blanked(factor: int) -> None:
    cut = object_checks.object_is_cut_out(FIXED, factor)
    assert torch.equal(cut.plain[1], cut.masked[1])


@pytest.mark.parametrize(
    ("variant", "maps"),
    [
        (variant, maps)
        for variant in ALL
        for maps in object_checks.ODD_MAPS
        if (variant, maps) != ("learnable", "disjoint")  # its box asks the last map alone, where there is an object
    ],
)
def test_maps_without_an_object_give_the_whole_image(variant: str, maps: str) -> None:
    object_checks.maps_without_an_object_give_the_whole_image(ALL[variant], maps)


@pytest.mark.parametrize("variant", ALL)
def test_dropout_acts_on_every_branch(variant: str) -> None:
    system_checks.dropout_acts_on_every_branch(ALL[variant])


# ---- losses, prediction, gradients ----------------------------------------------------------------------------------


def test_declared_branches_losses_and_prediction() -> None:
    network = build("learnable")
    assert network.branches == ("raw", "object", "jigsaw")
    assert network.evaluated == ("raw", "object")
    assert network.prediction == ("raw", "object")
    assert network.loss_weights == {"raw": 1.0, "object": 1.0, "jigsaw": 1.0}
    assert network.input_size == SIZE


def test_loss_is_the_sum_of_three_cross_entropies() -> None:
    network = build("learnable", input_size=128, dropout=0.0).train()
    output = network(make_images(3, 128))
    terms = network.losses(output, LABELS)
    assert terms.keys() == {"raw", "object", "jigsaw"}
    total = sum(network.loss_weights[name] * term for name, term in terms.items())
    expected = 0.0
    for name in ("raw", "object", "jigsaw"):
        logits = output.logits[name].double()
        expected += sum(-logits[i, LABELS[i]] + logits[i].exp().sum().log() for i in range(3)).item() / 3
    assert total.item() == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_prediction_is_the_mean_probability_of_raw_and_object() -> None:
    network = build("learnable", input_size=128).eval()
    output = network(make_images(4, 128))
    mean = (output.logits["raw"].exp() / output.logits["raw"].exp().sum(dim=1, keepdim=True)) / 2
    mean += (output.logits["object"].exp() / output.logits["object"].exp().sum(dim=1, keepdim=True)) / 2
    torch.testing.assert_close(network.predict_logits(output).softmax(dim=1), mean)
    network.train()
    output = network(make_images(4, 128))
    changed = output._replace(logits=output.logits | {"jigsaw": 100 * output.logits["jigsaw"]})
    assert torch.equal(network.predict_logits(changed), network.predict_logits(output))


def test_one_classifier_for_all_branches() -> None:
    network = build("learnable", input_size=128, dropout=0.0).train()
    linear = [module for module in network.modules() if isinstance(module, nn.Linear)]
    assert sorted(tuple(module.weight.shape) for module in linear) == [(CLASSES, CHANNELS), (CHANNELS, CHANNELS)]
    assert network.heads() == [network.classifier]
    for name in network.branches:
        network.zero_grad()
        network.losses(network(make_images(3, 128)), LABELS)[name].backward()
        assert network.classifier.weight.grad.abs().max() > 1e-4
        assert any(
            parameter.grad.abs().max() > 1e-6
            for parameter in network.backbone.parameters()
            if parameter.grad is not None
        )


def controller_gradient(network: FLRDF, term: str) -> Tensor | None:
    network.zero_grad()
    network.losses(network(make_images(3, 128)), LABELS)[term].backward()
    return controller(network).grad


def test_controller_learns_from_raw_alone() -> None:
    """Through what `raw` classifies; nothing comes back through the box."""
    network = build("learnable", input_size=128, dropout=0.0).train()
    gradient = controller_gradient(network, "raw")
    assert gradient is not None
    assert (gradient.abs() > 1e-6).double().mean() > 0.5
    for term in ("object", "jigsaw"):
        gradient = controller_gradient(network, term)
        assert gradient is None or not gradient.any()


def test_gradient_of_the_controller_by_finite_differences() -> None:
    network = build("learnable, spread", input_size=128, dropout=0.0).double().train()
    images = make_images(3, 128).double()

    def loss() -> Tensor:
        return network.losses(network(images, branches=("raw",)), LABELS)["raw"]

    weights = controller(network)
    loss().backward()
    gradient, step = weights.grad.clone(), 1e-3  # the loss itself is float32
    for row, column in ((0, 0), (2, 5), (7, 3), (4, 4)):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                weights[row, column] += sign * step
                values.append(loss().item())
                weights[row, column] -= sign * step
        difference = (values[0] - values[1]) / (2 * step)
        assert gradient[row, column].item() == pytest.approx(difference, rel=2e-2, abs=3e-4)


@pytest.mark.parametrize("classify_suppressed", (False, True))
def test_fixed_suppression_has_nothing_to_learn(classify_suppressed: bool) -> None:
    network = build(0.7, input_size=128, classify_suppressed=classify_suppressed).train()
    assert not list(network.suppression.parameters())
    sum(network.losses(network(make_images(3, 128)), LABELS).values()).backward()
    assert network.backbone.final.grad.abs().max() > 1e-6


# ---- a real trunk, tracing, precision -----------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", (2, 3))
def test_with_a_real_trunk(blocks: int) -> None:
    torch.manual_seed(0)
    network = build_network(
        "flrdf", num_classes=CLASSES, backbone="resnet18", input_size=96, jigsaw_blocks=blocks, dropout=0.0
    )
    output = network.train()(make_images(3, 192))
    assert {name: tuple(logits.shape) for name, logits in output.logits.items()} == dict.fromkeys(
        ("raw", "object", "jigsaw"), (3, CLASSES)
    )
    sum(network.losses(output, LABELS).values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in network.parameters())
    images = make_images(2, 96)
    with torch.no_grad():
        together = network.eval()(images)
        final = network.backbone(images).final
    for index in range(2):
        suppressed = suppressed_by_hand(network, final[index], "learnable")
        assert tuple(together.object_boxes[index].tolist()) == box_by_hand(suppressed)
        raw = classify(network, torch.from_numpy(suppressed.mean(axis=(1, 2))).float())
        torch.testing.assert_close(together.logits["raw"][index], raw, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("control", slow_but_for(["learnable"], ["learnable", 0.3]))
@torch.no_grad()
def test_training_without_host_synchronisation_or_graph_break(control: str | float) -> None:
    network, images = build(control, input_size=128, jigsaw_blocks=3).train(), make_images(2, 256)
    torch.manual_seed(0)
    expected = network(images)
    torch.manual_seed(0)
    with reference.ForbidHostReads():
        result = network(images)
    torch.manual_seed(0)
    compiled = traced(network)(images)
    for got in (result, compiled):
        assert got.logits.keys() == expected.logits.keys()
        assert torch.equal(got.object_boxes, expected.object_boxes)
        for name, logits in expected.logits.items():
            torch.testing.assert_close(got.logits[name], logits)


@pytest.mark.parametrize("control", ("learnable", 0.3))
def test_mixed_precision(control: str | float) -> None:
    network, images = build(control, input_size=128, dropout=0.0).train(), make_images(3, 128)
    expected = network(images, branches=("raw",)).logits["raw"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = network(images)
    torch.testing.assert_close(output.logits["raw"].float(), expected, rtol=0.1, atol=0.1)
    terms = network.losses(output, LABELS)
    sum(terms.values()).backward()
    assert all(term.isfinite() for term in terms.values())
    learnt = [parameter for name, parameter in network.named_parameters() if name != "backbone.penultimate"]
    assert all(parameter.grad.isfinite().all() and parameter.grad.any() for parameter in learnt)


# ---- what cannot be built -----------------------------------------------------------------------------------------


def test_a_controller_without_a_teacher_is_refused() -> None:
    with pytest.raises(ValueError, match="classify_suppressed.*learnable"):
        build("learnable", classify_suppressed=False)
    build(0.7, classify_suppressed=False)


@pytest.mark.parametrize("suppression", (0, 0.0, -0.5, 1.5, True, None, "fixed", float("nan")), ids=repr)
def test_other_suppressions_are_refused(suppression: object) -> None:
    for classify_suppressed in (True, False):
        with pytest.raises(ValueError, match="suppression"):
            on_trunk("flrdf", ColourBackbone(), suppression=suppression, classify_suppressed=classify_suppressed)


@pytest.mark.parametrize(("input_size", "blocks"), ((128, 0), (128, -2), (128, 5), (448, 15), (96, 4)))
def test_numbers_of_blocks_that_make_no_sense_are_refused(input_size: int, blocks: int) -> None:
    with pytest.raises(ValueError, match=f"jigsaw_blocks is {blocks}"):
        build("learnable", input_size=input_size, jigsaw_blocks=blocks)


@pytest.mark.parametrize(("input_size", "blocks"), ((128, 4), (128, 1)))
def test_largest_and_smallest_number_of_blocks(input_size: int, blocks: int) -> None:
    network = build("learnable", input_size=input_size, jigsaw_blocks=blocks).train()
    assert network(make_images(2, input_size)).logits["jigsaw"].isfinite().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    (
        ({"suppression": 1.2}, "suppression.*1.2.*learnable"),
        ({"suppression": "strong"}, "strong.*learnable"),
        ({"suppression": 0.0}, "0.0.*learnable"),
        ({"classify_suppressed": False}, "classify_suppressed.*suppression.*learnable"),
        ({"jigsaw_blocks": 4}, "jigsaw_blocks.*4.*3"),
        ({"prediction": ("jigsaw",)}, "prediction.*jigsaw.*raw, object"),
        ({"prediction": ("raw", "window")}, "prediction"),
        ({"num_classes": 1}, "classes"),
        ({"input_size": 100}, "input_size"),
    ),
    ids=str,
)
def test_build_network_refuses(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_network("flrdf", **{"num_classes": CLASSES, "backbone": "resnet18", "input_size": 96, **settings})


# ---- real photographs ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def birds() -> tuple[GivenBackbone, Tensor]:
    """What a ResNet-50 trained on ImageNet sees in 59 photographs of all classes, and their true boxes."""
    shared = Path(os.environ.get("FINEGRAINED_SHARED", Path(__file__).resolve().parents[3] / "shared"))
    root, weights = shared / "data" / "cub36", shared / "weights" / "resnet50_imagenet_v1.pth"
    for needed in (root, weights):
        if not needed.exists():
            pytest.skip(f"{needed} is missing: set FINEGRAINED_SHARED to the folder that holds data and weights")
    pictures = Pictures(read_catalogue("cub", root).test, image_size=SIZE)
    samples = [pictures[index] for index in range(0, len(pictures), 18)]
    assert len(samples) == 59
    images = normalised(torch.stack([sample.image for sample in samples]))
    boxes = torch.stack([sample.box for sample in samples])
    trunk = Backbone("resnet50", pretrained=str(weights), stride_on_first_conv=True).eval()
    with torch.no_grad():
        seen = [trunk(part) for part in images.split(8)]
    penultimate, final = (torch.cat([getattr(each, name) for each in seen]) for name in ("penultimate", "final"))
    return GivenBackbone(images, penultimate, final), boxes


def covered(predicted: Tensor, true: Tensor) -> float:
    """Mean share of the true boxes (edges) that lies in the predicted ones (inclusive pixels)."""
    shares = []
    for (x0, y0, x1, y1), (left, top, right, bottom) in zip(predicted.tolist(), true.tolist(), strict=True):
        width = max(min(x1 + 1, right) - max(x0, left), 0)
        height = max(min(y1 + 1, bottom) - max(y0, top), 0)
        shares.append(width * height / ((right - left) * (bottom - top)))
    return float(np.mean(shares))


@pytest.mark.slow
@torch.no_grad()
def test_boxes_cover_more_of_real_birds(birds: tuple[GivenBackbone, Tensor]) -> None:
    """Than MMAL-Net's on the same maps, and than boxes of the last map alone, for which nothing is suppressed."""
    backbone, true = birds
    mmal = on_trunk("mmal", backbone, classes=36).eval()(backbone.images, branches=("object",))

    def flrdf(suppression: str | float) -> float:
        torch.manual_seed(0)
        network = on_trunk("flrdf", backbone, classes=36, suppression=suppression).eval()
        return covered(network(backbone.images).object_boxes, true)

    by_mmal, unsuppressed, at_start, fixed = (
        covered(mmal.object_boxes, true),
        flrdf(1.0),
        flrdf("learnable"),
        flrdf(0.3),
    )
    assert 0.8 < by_mmal < unsuppressed < min(at_start, fixed)
    assert at_start > by_mmal + 0.005
    assert fixed > by_mmal + 0.01
