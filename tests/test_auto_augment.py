"""TrivialAugment and RandAugment against torchvision's classes, which refuse boxes; and where the boxes go."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from made_pictures import bright_box
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import RandAugment, TrivialAugmentWide

from datasets import Entry, Pictures
from utils.data.augmentation import Augmentation
from utils.data.auto_augment import (
    BINS,
    GEOMETRIC,
    OPERATIONS,
    POLICIES,
    SIGNED,
    Operation,
    carried,
    draw_operations,
    transformed,
)

SIDE = 224
# Our names -> torchvision's
THEIRS = {name: name.title().replace("_", "") for name in OPERATIONS} | {
    "saturation": "Color",
    "autocontrast": "AutoContrast",
}
CLASSES = {"trivialaugment": TrivialAugmentWide(), "randaugment": RandAugment()}


def drawn(policy: str, count: int) -> list[list[Operation]]:
    generator = np.random.default_rng(0)
    return [draw_operations(policy, generator) for _ in range(count)]


def as_torchvision_means(name: str, amount: float, side: int = SIDE) -> float:
    """The magnitude in torchvision's unit: pixels of a shift, the bits that are kept."""
    if name.startswith("translate"):
        return amount * side
    return 8 - amount if name == "posterize" else amount


@pytest.mark.parametrize("policy", POLICIES)
def test_operations_and_magnitudes_are_drawn_as_torchvision_draws_them(policy: str) -> None:
    lists = drawn(policy, 15_000)
    theirs, chosen = CLASSES[policy], POLICIES[policy]
    assert {len(operations) for operations in lists} == {getattr(theirs, "num_ops", 1)}
    assert {THEIRS[name] for name in OPERATIONS} == set(theirs._AUGMENTATION_SPACE)
    counts = Counter(operation.name for operations in lists for operation in operations)
    expected = 15_000 * chosen.operations / len(OPERATIONS)
    assert all(abs(counts[name] - expected) < 5 * expected**0.5 for name in OPERATIONS)
    for name in OPERATIONS:
        amounts = [o.amount for operations in lists for o in operations if o.name == name]
        magnitudes, signed = theirs._AUGMENTATION_SPACE[THEIRS[name]]
        magnitudes = magnitudes(BINS + 1, SIDE, SIDE)
        assert signed == (name in SIGNED)
        if magnitudes is None:
            assert set(amounts) == {0.0}
            continue
        if chosen.magnitude is not None:
            magnitudes = magnitudes[[theirs.magnitude]]
        given = {round(float(value), 4) for value in magnitudes}
        found = {round(as_torchvision_means(name, amount), 4) for amount in amounts}
        assert {abs(value) for value in found} == given  # all of them, and no other
        if signed:
            assert found == given | {-value if value else 0.0 for value in given}
            below = sum(amount < 0 for amount in amounts) / len(amounts)
            assert 0.4 < below < 0.6


def photograph(side: int = SIDE) -> torch.Tensor:
    """Something with edges, shades and colours, in memory as loaded pictures are."""
    y, x = np.mgrid[:side, :side] / side
    noise = np.random.default_rng(1).integers(0, 40, (side, side, 3))
    waves = [120 + 80 * np.sin(9 * x + k) * np.cos(7 * y - k) for k in range(3)]
    return torch.from_numpy((np.stack(waves, axis=-1) + noise).clip(20, 235).astype("uint8")).permute(2, 0, 1)


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_is_torchvisions(name: str) -> None:
    image = photograph()
    before, picture = image.clone(), Image.fromarray(image.permute(1, 2, 0).numpy())
    amounts = {"posterize": (0, 2, 6), "solarize": (0.0, 0.4, 1.0)}.get(name, (-0.9, -0.3, 0.0, 0.3, 0.9))
    amounts = {"rotate": (-135.0, -30.0, 4.5, 90.0)}.get(name, amounts)
    for amount in amounts:
        found = transformed(image, [Operation(name, amount)])
        magnitude = -amount if name == "rotate" else as_torchvision_means(name, amount)  # they turn the other way
        bilinear = {"interpolation": InterpolationMode.BILINEAR, "fill": {}}
        expected = TrivialAugmentWide()._apply_image_or_video_transform(picture, THEIRS[name], magnitude, **bilinear)
        difference = found.permute(1, 2, 0).numpy().astype(int) - np.asarray(expected)
        assert abs(difference).max() <= (name == "rotate"), amount  # Pillow's own function, which rounds otherwise
        assert found.dtype == torch.uint8 and found.permute(1, 2, 0).is_contiguous()
        assert torch.equal(image, before)


def test_operations_follow_one_another() -> None:
    image = photograph(64)
    first, second = Operation("rotate", 20.0), Operation("solarize", 0.5)
    assert torch.equal(transformed(image, [first, second]), transformed(transformed(image, [first]), [second]))
    assert transformed(image, []) is image


@pytest.mark.parametrize("side", [96, 160])
@pytest.mark.parametrize("name", GEOMETRIC)
def test_boxes_go_where_the_object_goes(name: str, side: int) -> None:
    """Also where a part of it is moved out of the picture."""
    x0, y0, x1, y1 = (round(side * edge) for edge in (0.5, 0.25, 0.8, 0.5))
    image = torch.full((3, side, side), 60, dtype=torch.uint8)
    image[:, y0:y1, x0:x1] = 250
    image = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    box = torch.tensor([x0, y0, x1, y1], dtype=torch.float32)
    for amount in (-100.0, -20.0, 35.0, 90.0) if name == "rotate" else (-0.45, -0.1, 0.1, 0.3):
        operations = [Operation("identity", 0.0), Operation(name, amount), Operation("equalize", 0.0)]
        found = transformed(image, operations[:2]).float().clamp(min=60)
        assert bright_box(found) == pytest.approx(carried(box, operations, side).tolist(), abs=2), amount


def test_boxes_of_what_is_gone_have_no_area() -> None:
    box, empty = torch.tensor([70.0, 10, 90, 40]), torch.tensor([0.0, 20, 0, 60])
    for shift in (0.4, -0.95):
        x0, y0, x1, y1 = carried(box, [Operation("translate_x", shift)], 100).tolist()
        assert x0 == x1 and (y0, y1) == (10, 40)
    for name in GEOMETRIC:  # without area it stays
        assert torch.equal(carried(empty, [Operation(name, 0.2)], 100), empty)
    assert torch.equal(carried(box, [Operation("posterize", 4)], 100), box)


def test_pictures_are_changed_as_their_seed_says(rectangle: Entry) -> None:
    still = Augmentation(flip=0, brightness=0, contrast=0)
    plain = Pictures([rectangle], image_size=96, augment=still)
    found = torch.tensor([[40.0, 20.0, 60.0, 50.0]])
    changed = Pictures(
        [rectangle], image_size=96, augment=still._replace(auto_augment="randaugment"), found_boxes=found
    )
    moved = 0
    for seed in range(40):
        generator = np.random.default_rng(seed)
        still.draw(generator)  # of a square picture, no place of a crop is drawn
        operations = draw_operations("randaugment", generator)
        one, other = plain[0, seed], changed[0, seed]
        assert torch.equal(one.augmentation, other.augmentation)
        assert torch.equal(other.image, transformed(one.image, operations))
        assert torch.equal(other.box, carried(one.box, operations, 96))
        assert torch.equal(other.found_box, carried(found[0], operations, 96))
        assert torch.equal(other.image, changed[0, seed].image)
        moved += not torch.equal(one.box, other.box)
    assert 15 < moved < 35  # five of fourteen operations move something, two are drawn


def test_nothing_is_drawn_where_it_is_not_asked() -> None:
    generator = np.random.default_rng(5)
    before = generator.bit_generator.state
    assert draw_operations("none", generator) == []
    assert generator.bit_generator.state == before
