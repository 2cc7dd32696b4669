"""Pictures resized to what is trained on, and their boxes with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from made_pictures import bright_box
from PIL import Image

from datasets import Entry, Pictures
from utils.data.decoding import load_picture
from utils.data.pixels import load_pixels


def test_resize(rectangle: Entry) -> None:
    sample = Pictures([rectangle], image_size=96)[0]
    assert sample.image.shape == (3, 96, 96) and sample.image.dtype == torch.uint8
    assert sample.augmentation is None
    assert (sample.label, sample.path) == (3, str(rectangle.source))
    assert sample.box.tolist() == pytest.approx([9.6, 24, 48, 72])
    assert bright_box(sample.image) == pytest.approx(sample.box.tolist(), abs=1)
    assert sample.image[:, 48, 30].tolist() == [200] * 3
    assert sample.image[:, 5, 90].tolist() == [40] * 3


@pytest.mark.parametrize("size", [(31, 47), (64, 20), (5, 90), (33, 33)])
def test_resize_equals_pillows_but_for_rounding(tmp_path: Path, size: tuple[int, int]) -> None:
    """Enlarged, made smaller, and both."""
    noise = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    expected = np.asarray(Image.fromarray(noise).resize((33, 33), Image.Resampling.BILINEAR)).astype(int)
    ours = Pictures([Entry(tmp_path / "noise.png", 0)], image_size=33)[0].image.permute(1, 2, 0).numpy()
    assert np.abs(ours - expected).max() <= 1


@pytest.mark.parametrize(
    ("size", "decoded"),
    [((127, 400), (127, 400)), ((128, 200), (64, 100)), ((600, 256), (150, 64)), ((1024, 701), (128, 88))],
)
def test_large_jpegs_are_decoded_small_but_not_below_what_is_asked_for(
    tmp_path: Path, size: tuple[int, int], decoded: tuple[int, int]
) -> None:
    x, y = np.meshgrid(np.linspace(0, 20, size[0]), np.linspace(0, 15, size[1]))
    waves = np.stack([np.sin(x + y), np.cos(x - y), np.sin(x) * np.cos(y)], axis=-1) * 100 + 128
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.fromarray(waves.astype(np.uint8)).save(tmp_path / "waves.jpg", quality=90, exif=exif)
    box = (0.1 * size[0], 0.2 * size[1], 0.5 * size[0], 0.9 * size[1])  # turned: 0.1, 0.1, 0.8, 0.5
    whole, whole_box = load_picture(tmp_path / "waves.jpg", box)
    small, small_box = load_picture(tmp_path / "waves.jpg", box, at_least=64)
    assert (whole.size, small.size) == (size[::-1], decoded[::-1])
    assert [b / s for b, s in zip(small_box, small.size * 2, strict=True)] == pytest.approx(
        [0.1, 0.1, 0.8, 0.5], abs=0.01
    )
    assert [b / s for b, s in zip(whole_box, whole.size * 2, strict=True)] == pytest.approx([0.1, 0.1, 0.8, 0.5])
    image, scaled_box = load_pixels(Entry(tmp_path / "waves.jpg", 0, box), 32)
    assert scaled_box.tolist() == pytest.approx([3.2, 3.2, 25.6, 16], abs=0.2)
    expected = np.asarray(whole.resize((32, 32), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(image.permute(1, 2, 0).numpy() - expected).mean() < 2


def test_box_is_cut_at_the_border(rectangle: Entry) -> None:
    sample = Pictures([rectangle._replace(box=(-5, 10, 300, 90))], image_size=100)[0]
    assert sample.box.tolist() == pytest.approx([0, 100 / 12, 100, 75])
