"""Batched augmentation and normalisation against torchvision's functions, image by image."""

from __future__ import annotations

import pytest
import torch
from torchvision.transforms.v2 import functional

from utils.data.augmentation import MEAN, STD, augmented, normalised
from utils.training.engine import Execution

ROWS = torch.tensor(
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
ROWS = torch.cat([ROWS, torch.tensor([0.0, 0, 1, 1]).expand(len(ROWS), 4)], dim=1)

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
CROPPED = torch.cat([ROWS[:, :4], PARTS / torch.tensor([17, 14, 17, 14])], dim=1)


@pytest.fixture
def images() -> torch.Tensor:
    """Black, white, gray and noise, brighter from image to image."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (len(ROWS), 3, 14, 17), generator=generator)
    images = images * torch.linspace(0.3, 1, len(ROWS))[:, None, None, None]
    images[:, :, :3], images[:, :, 3:6] = 0, 255
    return images.to(torch.uint8)


def one_by_one(image: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    mirrored, brightness, contrast, contrast_first = row[:4].tolist()
    if mirrored:
        image = functional.horizontal_flip(image)
    height, width = image.shape[-2:]
    x0, y0, x1, y1 = (row[4:] * torch.tensor([width, height, width, height])).round().int().tolist()
    if (x1 - x0, y1 - y0) != (width, height):
        image = functional.resized_crop(image, y0, x0, y1 - y0, x1 - x0, [height, width], antialias=False)
    steps = [(functional.adjust_brightness, brightness), (functional.adjust_contrast, contrast)]
    for adjust, factor in steps[::-1] if contrast_first else steps:
        image = adjust(image, factor)
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
    plain = torch.cat([ROWS[:1, :4].expand(len(ROWS), 4), CROPPED[:, 4:]], dim=1)
    for rows in (plain, CROPPED, CROPPED.roll(1, dims=0)):
        expected = [one_by_one(image.float() / 255, row) * 255 for image, row in zip(images, rows, strict=True)]
        assert torch.allclose(augmented(images, rows), torch.stack(expected), atol=0.01)


def test_parts_lie_in_the_mirrored_picture(images: torch.Tensor) -> None:
    left = torch.tensor([[mirrored, 1.0, 1.0, 0, 0, 0, 0.5, 1] for mirrored in (0, 1)])
    images = torch.cat([images[:1], images[:1].flip(-1)])
    plain, mirrored = augmented(images, left)
    assert torch.equal(plain, mirrored)


def test_parts_may_lie_between_pixels() -> None:
    ramp = (10 + 2 * torch.arange(100.0)).expand(1, 3, 100, 100).to(torch.uint8)
    part = torch.tensor([[0, 1.0, 1.0, 0, 0.203, 0.1, 0.709, 0.9]])
    centres = 20.3 + 50.6 * (torch.arange(100) + 0.5) / 100 - 0.5
    # Half a pixel at either edge goes on with the value of the last place where the part holds a whole pixel.
    expected = 10 + 2 * centres.clamp(20.3, 69.9)
    assert torch.allclose(augmented(ramp, part), expected.expand(1, 3, 100, 100), atol=1e-3)


def test_a_whole_picture_stays_the_same_beside_parts() -> None:
    images = torch.randint(0, 256, (2, 3, 448, 448), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    rows = torch.tensor([[0, 1.0, 1.0, 0, 0, 0, 1, 1], [0, 1.0, 1.0, 0, 0.1, 0.2, 0.8, 0.9]])
    whole = augmented(images, rows)[0]
    assert torch.allclose(whole, images[0].float(), atol=0.1)
    assert torch.equal(augmented(images[:1], rows[:1])[0], images[0].float())  # nothing is resampled


@pytest.mark.parametrize("rows", [ROWS, CROPPED], ids=["whole", "cropped"])
def test_augmentation_does_not_depend_on_the_rest_of_the_batch(images: torch.Tensor, rows: torch.Tensor) -> None:
    whole = augmented(images, rows)
    alone = torch.cat([augmented(images[i : i + 1], rows[i : i + 1]) for i in range(len(rows))])
    assert torch.allclose(whole, alone, atol=1e-4 if rows is ROWS else 0.01)


def test_normalisation_equals_torchvisions(images: torch.Tensor) -> None:
    expected = functional.normalize(functional.to_dtype(images, torch.float32, scale=True), MEAN, STD)
    assert torch.allclose(normalised(images), expected, atol=1e-6)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("rows", [ROWS, CROPPED], ids=["whole", "cropped"])
def test_pictures_reach_the_network_augmented_and_normalised(
    images: torch.Tensor, rows: torch.Tensor, channels_last: bool
) -> None:
    execution = Execution(torch.device("cpu"), precision="bf16", channels_last=channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    with execution.autocast():
        plain, changed = execution.images(images), execution.images(images, rows)
    assert torch.equal(plain, normalised(images))
    assert torch.equal(changed, normalised(augmented(images, rows)))
    assert plain.dtype == changed.dtype == torch.float32
    assert plain.is_contiguous(memory_format=layout) and changed.is_contiguous(memory_format=layout)
    assert torch.equal(execution.images(plain, rows), plain)  # such images are finished
