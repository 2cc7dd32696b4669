"""Batched augmentation and normalisation against torchvision's functions, image by image."""

from __future__ import annotations

import pytest
import torch
from torchvision.transforms.v2 import functional

from utils.augmentation import MEAN, STD, augmented, normalised
from utils.engine import Execution

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


@pytest.fixture
def images() -> torch.Tensor:
    """Black, white, gray and noise, brighter from image to image."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (len(ROWS), 3, 14, 17), generator=generator)
    images = images * torch.linspace(0.3, 1, len(ROWS))[:, None, None, None]
    images[:, :, :3], images[:, :, 3:6] = 0, 255
    return images.to(torch.uint8)


def one_by_one(image: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    mirrored, brightness, contrast, contrast_first = row.tolist()
    if mirrored:
        image = functional.horizontal_flip(image)
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


def test_augmentation_does_not_depend_on_the_rest_of_the_batch(images: torch.Tensor) -> None:
    whole = augmented(images, ROWS)
    alone = torch.cat([augmented(images[i : i + 1], ROWS[i : i + 1]) for i in range(len(ROWS))])
    assert torch.allclose(whole, alone, atol=1e-4)


def test_normalisation_equals_torchvisions(images: torch.Tensor) -> None:
    expected = functional.normalize(functional.to_dtype(images, torch.float32, scale=True), MEAN, STD)
    assert torch.allclose(normalised(images), expected, atol=1e-6)


@pytest.mark.parametrize("channels_last", [True, False])
def test_pictures_reach_the_network_augmented_and_normalised(images: torch.Tensor, channels_last: bool) -> None:
    execution = Execution(torch.device("cpu"), precision="bf16", channels_last=channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    with execution.autocast():
        plain, changed = execution.images(images), execution.images(images, ROWS)
    assert torch.equal(plain, normalised(images))
    assert torch.equal(changed, normalised(augmented(images, ROWS)))
    assert plain.dtype == changed.dtype == torch.float32
    assert plain.is_contiguous(memory_format=layout) and changed.is_contiguous(memory_format=layout)
    assert torch.equal(execution.images(plain, ROWS), plain)  # such images are finished
