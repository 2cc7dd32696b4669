"""The pass over the whole picture, which may be smaller than the pass over the object that it finds."""

from __future__ import annotations

import math

import pytest
import reference
import system_checks
import torch
from cases import slow_but_for
from small_systems import SIZE, Variant, flat, make_images, run

from networks.crops import resize_images
from utils.options import SettingsError

pytestmark = pytest.mark.usefixtures("thin_trunk")

RAW = 96
SMALLER = {model: Variant(model, raw_size=RAW) for model in ("sgkrl", "mmal", "flrdf")}


OF_THE_FIRST_PASS = (
    system_checks.output_keeps_the_contract,
    system_checks.images_that_are_not_square_or_too_small_are_refused,
    system_checks.branch_by_branch_is_computed_as_all_together,
    system_checks.gradient_reaches_every_parameter,
    system_checks.batched_equals_one_by_one_and_shuffled,
    system_checks.larger_images_are_scaled_down_for_the_first_pass,
    system_checks.mixed_precision_keeps_logits_and_losses_in_float32,
    system_checks.host_waits_nowhere,
)


@pytest.mark.parametrize("check", OF_THE_FIRST_PASS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("model", slow_but_for(("sgkrl",), SMALLER))
def test_what_holds_for_every_system_holds_here(model: str, check: system_checks.Check) -> None:
    check(SMALLER[model])


@pytest.mark.parametrize("model", SMALLER)
@torch.no_grad()
def test_only_the_first_pass_is_smaller(model: str) -> None:
    network = SMALLER[model].evaluated
    for side in (SIZE, 2 * SIZE):
        _, given = run(network, make_images(side), branches=("raw", "object"))
        assert [tuple(images.shape) for images in given] == [(2, 3, RAW, RAW), (2, 3, SIZE, SIZE)]


@pytest.mark.parametrize("stride", (32, 16))
@pytest.mark.parametrize("model", SMALLER)
@torch.no_grad()
def test_what_it_sees_is_what_a_small_network_sees(model: str, stride: int) -> None:
    """The same cells of the object, each as much larger as the input is."""
    settings = {"localization_stride": stride} | ({} if model == "flrdf" else {"windows": ((((7, 7),), 1),)})
    large, small = (
        Variant(model, **settings, **own).build(input_size=size).eval()
        for size, own in ((2 * RAW, {"raw_size": RAW}), (RAW, {}))
    )
    images = make_images(2 * RAW, batch=4)
    seen, expected = large(images), small(resize_images(images, RAW))
    assert torch.equal(seen.logits["raw"], expected.logits["raw"])
    for box, found in zip(expected.object_boxes.tolist(), seen.object_boxes.tolist(), strict=True):
        cells = (*(math.ceil(start / stride) for start in box[:2]), *((end + 1) / stride for end in box[2:]))
        assert tuple(found) == reference.cell_box_to_pixels(cells, 2 * stride)
    assert model != "sgkrl" or torch.equal(seen.object_masks, expected.object_masks)


@pytest.mark.parametrize("model", SMALLER)
@torch.no_grad()
def test_the_size_of_the_input_is_the_default(model: str) -> None:
    images = make_images(batch=3)
    named, default = (flat(Variant(model, **own).evaluated(images)) for own in ({"raw_size": SIZE}, {}))
    assert list(named) == list(default)
    assert all(torch.equal(value, default[name]) for name, value in named.items())


@pytest.mark.parametrize("model", SMALLER)
def test_boxes_teach_the_cells_of_a_smaller_picture(model: str) -> None:
    """What is learnt is the share of each that lies in the box; what is found by it is in pixels of the input."""
    side = 2 * RAW
    network = Variant(model, pretrained=None, raw_size=RAW, localization="learned", localization_stride=32)
    network = network.build(input_size=side).train()
    boxes = torch.tensor([[64.0, 0, 127, 95], [0, 0, side - 1, side - 1]])  # in cells of 64 pixels
    output = network(make_images(side), branches=("raw",), boxes=boxes)
    logits = output.extras["inside"]
    assert logits.shape == (2, 3, 3)
    shares = torch.tensor([[[0, 1, 0], [0, 0.5, 0], [0, 0, 0]], [[1.0] * 3] * 3])
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, shares)
    torch.testing.assert_close(network.losses(output, torch.tensor([0, 1]))["localization"], expected)
    learned = network.learned_localization
    surely = torch.where(shares[:1] > 0.1, 20.0, -20.0)
    torch.testing.assert_close(learned.localize(surely)[0], torch.tensor([[64.0, 0, 127, 127]]), atol=1e-3, rtol=0)


@pytest.mark.parametrize("model", slow_but_for(("sgkrl",), SMALLER))
@torch.no_grad()
def test_a_frozen_trunk_finds_the_object_in_the_whole_picture(model: str) -> None:
    variant = Variant(model, pretrained=None, raw_size=RAW, localization="colocalization")
    network = variant.build().eval()
    expected = Variant(model, pretrained=None, localization="colocalization").build().eval()
    images = make_images(batch=4)
    network.colocalization.fit([images])
    expected.colocalization.load_state_dict(network.colocalization.state_dict())
    output, given = run(network, images, branches=("raw", "object"))
    assert [images.shape[-1] for images in given] == [RAW, SIZE]
    assert torch.equal(output.object_boxes, expected(images).object_boxes)
    assert len(output.object_boxes.unique(dim=0)) > 1


def test_sgkrl_s_finer_map_goes_by_the_size_of_the_first_pass() -> None:
    with torch.device("meta"):
        strides = [
            Variant("sgkrl", pretrained=None, **own).build(input_size=448).localization_stride
            for own in ({}, {"raw_size": 448}, {"raw_size": 224}, {"raw_size": 224, "localization_stride": 32})
        ]
    assert strides == [32, 32, 16, 32]


@pytest.mark.parametrize("raw_size", (64, 100, SIZE + 32, 0))
@pytest.mark.parametrize("model", SMALLER)
def test_sizes_that_do_not_fit_are_refused(model: str, raw_size: int) -> None:
    with pytest.raises(SettingsError, match=f"raw_size is {raw_size}; expected a"), torch.device("meta"):
        Variant(model, raw_size=raw_size).build()
