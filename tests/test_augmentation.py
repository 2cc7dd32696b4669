"""What is drawn for a picture and its box; batched augmentation and normalisation against torchvision's functions."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from made_pictures import bright_box
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms.v2 import ColorJitter, RandomErasing, RandomResizedCrop, RandomRotation, functional

from datasets import Entry, Pictures, Sample
from utils.data.augmentation import (
    ANGLE,
    ERASED,
    FACTORS,
    MIRRORED,
    ORDER,
    PART,
    Augmentation,
    carry_into_part,
    carry_round,
)
from utils.data.image_batches import GRAY, NORMALIZATIONS, augmented, normalised
from utils.training.engine import Execution


def drawn(rows: object) -> torch.Tensor:
    """Rows of (mirrored, brightness, contrast, contrast first, edges of the part) as they are drawn today."""
    rows = torch.as_tensor(rows, dtype=torch.float32)
    whole = torch.zeros(len(rows), 16)
    whole[:, MIRRORED], whole[:, 1:3], whole[:, 3] = rows[:, 0], rows[:, 1:3], 1
    whole[:, ORDER] = torch.stack([rows[:, 3], 1 - rows[:, 3], torch.full((len(rows),), 2)], dim=1)
    whole[:, PART] = rows[:, 4:] if rows.shape[1] > 4 else torch.tensor([0.0, 0, 1, 1])
    return whole


ROWS = drawn(
    [
        [0, 1.0, 1.0, 0],
        [1, 1.0, 1.0, 1],
        [0, 1.2, 0.8, 0],
        [0, 1.2, 0.8, 1],
        [1, 0.8, 1.2, 0],
        [1, 0.8, 1.2, 1],
        [1, 1.9, 1.9, 0],
        [0, 1.9, 1.9, 1],
        [0, 0.1, 0.1, 1],
    ]
)

# Parts in whole pixels of a picture of 17 x 14 pixels, after mirroring: x0, y0, x1, y1.
PARTS = torch.tensor(
    [
        [0, 0, 17, 14],
        [0, 0, 12, 9],
        [5, 5, 17, 14],
        [3, 2, 16, 12],
        [0, 4, 17, 11],
        [6, 0, 13, 14],
        [7, 6, 10, 10],
        [8, 6, 9, 7],
        [2, 1, 17, 13],
    ]
)
CROPPED = ROWS.clone()
CROPPED[:, PART] = PARTS / torch.tensor([17, 14, 17, 14])

# All there is: the six orders of brightness, contrast and saturation, angles, what is erased.
EVERYTHING = CROPPED.clone()
EVERYTHING[:, 3] = torch.tensor([1.3, 0.0, 0.5, 1.9, 1.2, 0.8, 1.0, 1.6, 0.4])
ORDERS = torch.tensor([*itertools.permutations(range(3)), (2, 0, 1), (1, 2, 0), (0, 1, 2)])
EVERYTHING[:, ORDER] = ORDERS.float()
EVERYTHING[:, ANGLE] = torch.tensor([0.0, 15, -15, 90, 180, -37.5, 1, 5, -170])
EVERYTHING[:-2, ERASED] = torch.tensor([[3, 2, 9, 11], [0, 0, 1, 14], [16, 13, 17, 14]]).repeat(3, 1)[
    :-2
] / torch.tensor([17.0, 14, 17, 14])


@pytest.fixture
def images() -> torch.Tensor:
    """Black, white, gray and noise, brighter from image to image."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (len(ROWS), 3, 14, 17), generator=generator)
    images = images * torch.linspace(0.3, 1, len(ROWS))[:, None, None, None]
    images[:, :, :3], images[:, :, 3:6] = 0, 255
    return images.to(torch.uint8)


def one_by_one(image: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    if row[MIRRORED]:
        image = functional.horizontal_flip(image)
    height, width = image.shape[-2:]
    x0, y0, x1, y1 = (row[PART] * torch.tensor([width, height, width, height])).round().int().tolist()
    if (x1 - x0, y1 - y0) != (width, height):
        image = functional.resized_crop(image, y0, x0, y1 - y0, x1 - x0, [height, width], antialias=False)
    if row[ANGLE]:
        image = functional.rotate(image, float(row[ANGLE]), functional.InterpolationMode.BILINEAR)
    adjust = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation)
    for position in row[ORDER].int().tolist():
        image = adjust[position](image, float(row[FACTORS][position]))
    return image


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_augmentation_equals_torchvisions(images: torch.Tensor, layout: torch.memory_format) -> None:
    ours = augmented(images.contiguous(memory_format=layout), ROWS)
    assert ours.dtype == torch.float32 and ours.is_contiguous(memory_format=layout)
    expected = [one_by_one(image.float() / 255, row) * 255 for image, row in zip(images, ROWS, strict=True)]
    assert torch.allclose(ours, torch.stack(expected), atol=1e-3)
    # On uint8 torchvision cuts the fraction off after every step, which the second step may double.
    rounded = torch.stack([one_by_one(image, row) for image, row in zip(images, ROWS, strict=True)]).float()
    assert (ours - rounded).abs().max() < 3.1
    # Neither order, nor mirroring, is lost.
    for one, other in ((2, 3), (4, 5), (6, 7)):
        same = augmented(images[[one, one]], ROWS[[one, other]])
        assert (same[0] - same[1]).abs().max() > 1


def test_parts_are_enlarged_as_torchvision_does(images: torch.Tensor) -> None:
    """Alone, and with mirroring before and jitter after it."""
    plain = ROWS[:1].repeat(len(ROWS), 1)
    plain[:, PART] = CROPPED[:, PART]
    for rows in (plain, CROPPED, CROPPED.roll(1, dims=0)):
        expected = [one_by_one(image.float() / 255, row) * 255 for image, row in zip(images, rows, strict=True)]
        assert torch.allclose(augmented(images, rows), torch.stack(expected), atol=0.01)


def test_everything_together_equals_torchvisions(images: torch.Tensor) -> None:
    """Parts, angles and jitter in any order; then normalised, and erased as its own functional does it."""
    expected = torch.stack(
        [one_by_one(image.float() / 255, row) for image, row in zip(images, EVERYTHING, strict=True)]
    )
    ours = augmented(images, EVERYTHING)
    assert torch.allclose(ours, expected * 255, atol=0.05)
    finished = normalised(images, EVERYTHING)
    for image, values, row in zip(finished, expected, EVERYTHING, strict=True):
        x0, y0, x1, y1 = (row[ERASED] * torch.tensor([17, 14, 17, 14])).round().int().tolist()
        values = functional.normalize(values, *NORMALIZATIONS["imagenet"])
        if row[ERASED].any():
            values = functional.erase(values, y0, x0, y1 - y0, x1 - x0, torch.zeros(3, 1, 1))
        assert torch.allclose(image, values, atol=1e-3)


@pytest.mark.parametrize("column", [3, ANGLE, ERASED], ids=["saturation", "rotation", "erasing"])
def test_each_alone_equals_torchvisions(images: torch.Tensor, column: int | slice) -> None:
    rows = ROWS[:1].repeat(len(ROWS), 1)
    rows[:, column] = EVERYTHING[:, column]
    expected = torch.stack([one_by_one(image.float() / 255, row) for image, row in zip(images, rows, strict=True)])
    assert torch.allclose(augmented(images, rows), expected * 255, atol=0.02)
    assert (normalised(images, rows) == 0).any() == (column is ERASED)


def test_pixels_stay_as_they_were(images: torch.Tensor) -> None:
    """Bit for bit what runs before saturation, rotation and erasing were trained on."""
    expected = torch.where(ROWS[:, MIRRORED, None, None, None].bool(), images.flip(-1), images).float()
    brightness, contrast = ROWS[:, 1, None, None, None], ROWS[:, 2, None, None, None]
    contrast_first = ROWS[:, ORDER][:, 0, None, None, None].bool()
    for contrast_now in (contrast_first, ~contrast_first):
        gray = (expected.mean(dim=(2, 3), keepdim=True) * torch.tensor(GRAY).reshape(3, 1, 1)).sum(dim=1, keepdim=True)
        shift = torch.where(contrast_now, (1 - contrast) * gray, 0)
        expected.mul_(torch.where(contrast_now, contrast, brightness)).add_(shift).clamp_(0, 255)
    assert torch.equal(augmented(images, ROWS), expected)


def test_parts_lie_in_the_mirrored_picture(images: torch.Tensor) -> None:
    left = drawn([[mirrored, 1.0, 1.0, 0, 0, 0, 0.5, 1] for mirrored in (0, 1)])
    images = torch.cat([images[:1], images[:1].flip(-1)])
    plain, mirrored = augmented(images, left)
    assert torch.equal(plain, mirrored)


def test_parts_may_lie_between_pixels() -> None:
    ramp = (10 + 2 * torch.arange(100.0)).expand(1, 3, 100, 100).to(torch.uint8)
    part = drawn([[0, 1.0, 1.0, 0, 0.203, 0.1, 0.709, 0.9]])
    centres = 20.3 + 50.6 * (torch.arange(100) + 0.5) / 100 - 0.5
    # Half a pixel at either edge goes on with the value of the last place where the part holds a whole pixel.
    expected = 10 + 2 * centres.clamp(20.3, 69.9)
    assert torch.allclose(augmented(ramp, part), expected.expand(1, 3, 100, 100), atol=1e-3)


def test_a_whole_picture_stays_the_same_beside_parts() -> None:
    images = torch.randint(0, 256, (2, 3, 448, 448), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    rows = drawn([[0, 1.0, 1.0, 0, 0, 0, 1, 1], [0, 1.0, 1.0, 0, 0.1, 0.2, 0.8, 0.9]])
    whole = augmented(images, rows)[0]
    assert torch.allclose(whole, images[0].float(), atol=0.1)
    assert torch.equal(augmented(images[:1], rows[:1])[0], images[0].float())  # nothing is resampled


@pytest.mark.parametrize("rows", [ROWS, CROPPED, EVERYTHING], ids=["whole", "cropped", "everything"])
def test_augmentation_does_not_depend_on_the_rest_of_the_batch(images: torch.Tensor, rows: torch.Tensor) -> None:
    whole = augmented(images, rows)
    alone = torch.cat([augmented(images[i : i + 1], rows[i : i + 1]) for i in range(len(rows))])
    assert torch.allclose(whole, alone, atol=1e-4 if rows is ROWS else 0.01)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_normalisation_equals_torchvisions(images: torch.Tensor, normalization: str) -> None:
    scaled = functional.to_dtype(images, torch.float32, scale=True)
    expected = functional.normalize(scaled, *NORMALIZATIONS[normalization])
    assert torch.allclose(normalised(images, normalization=normalization), expected, atol=1e-6)
    execution = Execution(torch.device("cpu"), normalization=normalization)
    assert torch.equal(execution.images(images), normalised(images, normalization=normalization))


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("rows", [ROWS, CROPPED, EVERYTHING], ids=["whole", "cropped", "everything"])
def test_pictures_reach_the_network_augmented_and_normalised(
    images: torch.Tensor, rows: torch.Tensor, channels_last: bool
) -> None:
    execution = Execution(torch.device("cpu"), precision="bf16", channels_last=channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    with execution.autocast():
        plain, changed = execution.images(images), execution.images(images, rows)
    assert torch.equal(plain, normalised(images))
    assert torch.equal(changed, normalised(images, rows))
    assert plain.dtype == changed.dtype == torch.float32
    assert plain.is_contiguous(memory_format=layout) and changed.is_contiguous(memory_format=layout)
    assert torch.equal(execution.images(plain, rows), plain)  # such images are finished


def test_the_normalisation_is_that_of_torchvisions_weights() -> None:
    transform = torchvision.models.ResNet18_Weights.DEFAULT.transforms()
    assert NORMALIZATIONS["imagenet"] == (tuple(transform.mean), tuple(transform.std))


# ---------------------------------------------------------------------------------------------------------------------
# What is drawn
# ---------------------------------------------------------------------------------------------------------------------


def as_trained_on(sample: Sample) -> torch.Tensor:
    """The image [3, S, S] in 0..255, augmented as the device does it."""
    if sample.augmentation is None:
        return sample.image.float()
    return augmented(sample.image[None], sample.augmentation[None])[0]


def test_flip_takes_the_box_along(rectangle: Entry) -> None:
    plain = Pictures([rectangle], image_size=96)[0]
    flipped = Pictures([rectangle], image_size=96, augment=Augmentation(flip=1, brightness=0, contrast=0))[0]
    assert torch.equal(as_trained_on(flipped), plain.image.flip(-1).float())
    assert flipped.box.tolist() == pytest.approx([48, 24, 86.4, 72])
    assert bright_box(as_trained_on(flipped)) == pytest.approx(flipped.box.tolist(), abs=1)


def test_box_found_again_under_augmentation(rectangle: Entry) -> None:
    pictures = Pictures([rectangle], image_size=64, augment=Augmentation())
    samples = [pictures[0, seed] for seed in range(40)]
    for sample in samples:
        assert bright_box(as_trained_on(sample)) == pytest.approx(sample.box.tolist(), abs=1)
    assert 8 <= sum(sample.box[0] > 10 for sample in samples) <= 32
    assert len({float(as_trained_on(sample).mean()) for sample in samples}) > 30


@pytest.mark.parametrize("flip", [0, 1])
def test_box_found_again_in_a_random_part(rectangle: Entry, flip: float) -> None:
    pictures = Pictures([rectangle], image_size=96, augment=Augmentation(flip, 0, 0, crop_scale=0.4))
    plain = Pictures([rectangle], image_size=96, augment=Augmentation(flip, 0, 0))
    boxes = []
    for seed in range(40):
        sample = pictures[0, seed]
        box = sample.box.tolist()
        x0, y0, x1, y1 = (sample.augmentation[PART] * 96).tolist()
        original = plain[0, seed].box.tolist()
        starts_inside = [original[0] >= x0 + 1, original[1] >= y0 + 1]
        ends_inside = [original[2] <= x1 - 1, original[3] <= y1 - 1]
        assert all(value > 0 for value, inside in zip(box[:2], starts_inside, strict=True) if inside)
        assert all(value < 96 for value, inside in zip(box[2:], ends_inside, strict=True) if inside)
        if min(box[2] - box[0], box[3] - box[1]) > 3:  # less than that is blurred away
            assert bright_box(as_trained_on(sample)) == pytest.approx(box, abs=2)
        boxes.append(tuple(box))
    assert len(set(boxes)) > 30


def test_box_of_an_object_beyond_the_part_is_empty() -> None:
    box = torch.tensor([10.0, 20, 40, 60])
    for part, expected in (
        ([0.5, 0, 1, 1], [0, 20, 0, 60]),
        ([0, 0, 0.05, 0.1], [100, 100, 100, 100]),
        ([0.1, 0.2, 0.4, 0.6], [0, 0, 100, 100]),
        ([0, 0.1, 0.5, 0.5], [20, 25, 80, 100]),
        ([0, 0, 1, 1], [10, 20, 40, 60]),
    ):
        carried = carry_into_part(box, torch.tensor(part), 100)
        assert carried.tolist() == pytest.approx(expected, abs=1e-4)
        assert (carried[:2] <= carried[2:]).all()


def test_jitter_is_distributed_as_torchvisions(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(60, 190, size=(16, 16, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    pictures = Pictures([Entry(tmp_path / "noise.png", 0)], image_size=16, augment=Augmentation(0, 0.3, 0.4))
    ours = torch.stack([as_trained_on(pictures[0, seed]) for seed in range(400)])
    torch.manual_seed(0)
    jitter, image = ColorJitter(brightness=0.3, contrast=0.4), torch.from_numpy(noise).permute(2, 0, 1)
    theirs = torch.stack([jitter(image).float() for _ in range(400)])
    for statistic in (lambda x: x.mean(dim=(1, 2, 3)), lambda x: x.std(dim=(1, 2, 3))):
        first, second = statistic(ours).sort().values, statistic(theirs).sort().values
        assert (first - second).abs().mean() < 0.15 * (second[-1] - second[0])


def test_augmentation_depends_on_the_seed_alone(rectangle: Entry) -> None:
    pictures = Pictures([rectangle] * 3, image_size=32, augment=Augmentation())
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    first = pictures[1, 77]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]
    torch.manual_seed(2)
    assert torch.equal(first.augmentation, pictures[2, 77].augmentation)
    assert not torch.equal(first.augmentation, pictures[1, 78].augmentation)


def test_draws_stay_as_they_were() -> None:
    """They decide what a continued run trains on: another order of draws would make it another run."""
    draws = [Augmentation(0.5, 0.2, 0.4).draw(np.random.default_rng(seed)).tolist() for seed in (7, 2**62)]
    expected = []
    for seed in (7, 2**62):
        generator = np.random.default_rng(seed)
        mirrored, order, factors = generator.random() < 0.5, generator.permutation(2).tolist(), {}
        for position in order:
            factors[position] = generator.uniform(*((0.8, 1.2), (0.6, 1.4))[position])
        row = drawn([[float(mirrored), factors[0], factors[1], float(order == [1, 0])]])
        expected.append(row[0].tolist())
    assert draws == [pytest.approx(values, rel=1e-6) for values in expected]
    assert Augmentation(0, 0, 0).draw(np.random.default_rng(0)).tolist()[:3] == [0, 1, 1]


def test_what_is_drawn_later_changes_nothing_before() -> None:
    plain = Augmentation(0.5, 0.2, 0.4, crop_scale=0.5)
    for changed in (plain._replace(rotation=10.0), plain._replace(erasing=1.0), plain._replace(padding=3)):
        for seed in range(5):
            rows = [augment.draw(np.random.default_rng(seed)) for augment in (plain, changed)]
            assert torch.equal(rows[0][:ANGLE], rows[1][:ANGLE])


def test_nothing_more_is_drawn_for_whole_pictures() -> None:
    generator, ours = np.random.default_rng(3), np.random.default_rng(3)
    Augmentation(0.5, 0.2, 0.4, crop_scale=1.0).draw(ours)
    generator.random(), generator.permutation(2), generator.uniform(size=2)
    assert ours.bit_generator.state == generator.bit_generator.state
    whole, part = (Augmentation(crop_scale=scale).draw(np.random.default_rng(3)) for scale in (1.0, 0.3))
    assert torch.equal(whole[:7], part[:7]) and not torch.equal(whole[PART], part[PART])


@pytest.mark.parametrize("scale", [0.08, 0.5, 0.9])
def test_parts_are_as_random_resized_crop_draws_them(scale: float) -> None:
    augment, generator = Augmentation(0, 0, 0, crop_scale=scale), np.random.default_rng(0)
    parts = torch.stack([augment.draw(generator)[PART] for _ in range(3000)]).double()
    x0, y0, x1, y1 = parts.unbind(dim=1)
    width, height = x1 - x0, y1 - y0
    assert (parts[:, :2] >= 0).all() and (parts[:, 2:] <= 1).all()
    assert (width * height).min() > scale - 1e-5 and (width * height).max() <= 1
    assert (width / height).min() > 3 / 4 - 1e-5 and (width / height).max() < 4 / 3 + 1e-5

    torch.manual_seed(0)
    size = 10000  # rounding to pixels is then lost in the statistics
    crop, picture = RandomResizedCrop(size, scale=(scale, 1)), torch.zeros(1).expand(1, size, size)
    draw = crop.make_params if hasattr(crop, "make_params") else crop._get_params  # torchvision < 0.20
    theirs = [draw([picture]) for _ in range(3000)]
    top, left, h, w = (torch.tensor([p[n] for p in theirs]) / size for n in ("top", "left", "height", "width"))
    for ours, expected in ((width * height, w * h), (width / height, w / h), (x0, left), (y0, top)):
        values = torch.linspace(expected.min(), expected.max(), 50)
        below, expected_below = ((samples[:, None] < values).double().mean(dim=0) for samples in (ours, expected))
        assert (below - expected_below).abs().max() < 0.05  # Kolmogorov-Smirnov, one in a thousand


def test_orders_of_three_and_saturation_are_drawn_evenly() -> None:
    augment, generator = Augmentation(0, 0.2, 0.3, saturation=0.4), np.random.default_rng(0)
    rows = torch.stack([augment.draw(generator) for _ in range(3000)])
    orders, counts = rows[:, ORDER].unique(dim=0, return_counts=True)
    assert orders.tolist() == [list(order) for order in itertools.permutations((0.0, 1.0, 2.0))]
    assert (counts / 3000 - 1 / 6).abs().max() < 0.03
    for factor, strength in zip(rows[:, FACTORS].unbind(dim=1), (0.2, 0.3, 0.4), strict=True):
        assert 1 - strength <= factor.min() < 1 - 0.95 * strength and 1 + 0.95 * strength < factor.max() <= 1 + strength


def test_saturation_is_distributed_as_torchvisions(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(60, 190, size=(16, 16, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    augment = Augmentation(0, 0.3, 0.4, saturation=0.5)
    pictures = Pictures([Entry(tmp_path / "noise.png", 0)], image_size=16, augment=augment)
    ours = torch.stack([as_trained_on(pictures[0, seed]) for seed in range(400)])
    torch.manual_seed(0)
    jitter, image = ColorJitter(0.3, 0.4, 0.5), torch.from_numpy(noise).permute(2, 0, 1)
    theirs = torch.stack([jitter(image).float() for _ in range(400)])
    for statistic in (lambda x: x.mean(dim=(1, 2, 3)), lambda x: x.std(dim=1).mean(dim=(1, 2))):
        first, second = statistic(ours).sort().values, statistic(theirs).sort().values
        assert (first - second).abs().mean() < 0.15 * (second[-1] - second[0])


def draws_of(transform: object, size: int, count: int) -> list[dict]:
    draw = transform.make_params if hasattr(transform, "make_params") else transform._get_params  # torchvision < 0.20
    image = torch.zeros(1).expand(3, size, size)
    return [draw([image]) for _ in range(count)]


def test_angles_and_rectangles_are_drawn_as_torchvision_draws_them() -> None:
    augment, generator = Augmentation(0, 0, 0, rotation=30.0, erasing=0.4), np.random.default_rng(0)
    rows = torch.stack([augment.draw(generator) for _ in range(6000)])
    erased = rows[:, ERASED][rows[:, ERASED].any(dim=1)].double()
    assert abs(len(erased) / 6000 - 0.4) < 0.03
    torch.manual_seed(0)
    size = 10000  # rounding to pixels is then lost in the statistics
    theirs = draws_of(RandomErasing(p=1), size, 2400)
    top, left, h, w = (torch.tensor([p[name] for p in theirs]).double() / size for name in ("i", "j", "h", "w"))
    x0, y0, x1, y1 = erased.unbind(dim=1)
    width, height = x1 - x0, y1 - y0
    angles = torch.tensor([p["angle"] for p in draws_of(RandomRotation(30), 8, 2400)]).double()
    pairs = [(width * height, w * h), (height / width, h / w), (x0, left), (y0, top), (rows[:, ANGLE].double(), angles)]
    for ours, expected in pairs:
        values = torch.linspace(expected.min(), expected.max(), 50)
        below, expected_below = ((samples[:, None] < values).double().mean(dim=0) for samples in (ours, expected))
        assert (below - expected_below).abs().max() < 0.05  # Kolmogorov-Smirnov, one in a thousand


@pytest.mark.parametrize("degrees", [0.0, 15.0, -15.0, 90.0, 133.0, 180.0])
def test_boxes_turn_as_torchvisions(degrees: float) -> None:
    for edges in ([10.0, 20, 40, 60], [0.0, 0, 100, 100], [70.0, 5, 99, 30]):
        box = tv_tensors.BoundingBoxes(torch.tensor([edges]), format="XYXY", canvas_size=(100, 100))
        expected = functional.clamp_bounding_boxes(functional.rotate(box, degrees))[0]
        assert carry_round(box[0].as_subclass(torch.Tensor), degrees, 100).tolist() == pytest.approx(
            expected.tolist(),
            abs=1.5,  # torchvision turns them about a pixel's corner beside the centre in some versions
        )
    empty = torch.tensor([0.0, 20, 0, 60])
    assert torch.equal(carry_round(empty, degrees, 100), empty)


@pytest.mark.parametrize("flip", [0, 1])
def test_box_found_again_in_turned_pictures(rectangle: Entry, flip: float) -> None:
    augment = Augmentation(flip, 0, 0, rotation=40.0)
    pictures = Pictures([rectangle], image_size=96, augment=augment)
    boxes = set()
    for seed in range(30):
        sample = pictures[0, seed]
        found = bright_box(as_trained_on(sample).clamp(min=40))
        assert found == pytest.approx(sample.box.tolist(), abs=2)
        boxes.add(tuple(sample.box.tolist()))
    assert len(boxes) == 30
    area = (sample.box[2] - sample.box[0]) * (sample.box[3] - sample.box[1])
    assert area > 1.02 * 38.4 * 48  # the box round a turned box is larger


def test_boxes_follow_everything_at_once(rectangle: Entry) -> None:
    augment = Augmentation(0.5, 0.2, 0.2, 0.6, padding=8, rotation=20.0, saturation=0.3, erasing=0.0)
    pictures = Pictures([rectangle], image_size=96, resize_size=112, augment=augment)
    seen = 0
    for seed in range(60):
        sample = pictures[0, seed]
        x0, y0, x1, y1 = sample.box.tolist()
        if min(x1 - x0, y1 - y0) < 20:
            continue
        image = as_trained_on(sample)
        bright = (image.mean(dim=0) > 0.7 * image.max()).float()
        outside = bright.clone()
        outside[max(math.floor(y0) - 1, 0) : math.ceil(y1) + 1, max(math.floor(x0) - 1, 0) : math.ceil(x1) + 1] = 0
        assert outside.sum() == 0  # a box round what a box held may be larger than the object, never smaller
        assert bright.sum() > 0.25 * (x1 - x0) * (y1 - y0)
        seen += 1
    assert seen > 40
