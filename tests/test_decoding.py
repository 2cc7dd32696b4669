"""Picture files of every kind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from made_pictures import write_picture
from PIL import Image

from datasets import DataError, Entry, Pictures
from utils.data.decoding import load_picture


def loaded(path: Path) -> np.ndarray:
    picture, _ = load_picture(path)
    assert picture.mode == "RGB"
    return np.asarray(picture)


def ramp(size: tuple[int, int] = (16, 4)) -> np.ndarray:
    return np.tile(np.linspace(0, 255, size[0]).round().astype(np.uint8), (size[1], 1))


def test_gray_and_two_colours(tmp_path: Path) -> None:
    Image.fromarray(ramp()).save(tmp_path / "gray.png")
    assert np.array_equal(loaded(tmp_path / "gray.png"), np.repeat(ramp()[..., None], 3, axis=2))
    Image.fromarray(ramp() > 100).save(tmp_path / "bits.png")
    assert np.array_equal(loaded(tmp_path / "bits.png")[..., 0], np.where(ramp() > 100, 255, 0))


@pytest.mark.parametrize("name", ["deep.png", "deep.tif", "deep.pgm"])
def test_16_bit_gray_is_scaled(tmp_path: Path, name: str) -> None:
    deep = ramp().astype(np.uint16) * 257
    if name.endswith(".pgm"):  # which older versions of Pillow read but do not write
        (tmp_path / name).write_bytes(b"P5 16 4 65535\n" + deep.astype(">u2").tobytes())
    else:
        Image.fromarray(deep).save(tmp_path / name)
    assert np.array_equal(loaded(tmp_path / name), np.repeat(ramp()[..., None], 3, axis=2))


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    pixels = np.array([[[255, 0, 0, 255], [0, 255, 0, 0], [0, 0, 200, 128]]], dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "rgba.png")
    assert np.allclose(loaded(tmp_path / "rgba.png")[0], [[255, 0, 0], [255, 255, 255], [127, 127, 227]], atol=1)
    Image.fromarray(np.array([[[10, 255], [10, 0]]], dtype=np.uint8)).save(tmp_path / "la.png")
    assert loaded(tmp_path / "la.png")[0].tolist() == [[10] * 3, [255] * 3]


def test_palette(tmp_path: Path) -> None:
    picture = Image.fromarray(np.array([[0, 1, 2]], dtype=np.uint8), mode=None).convert("L")
    picture = Image.frombytes("P", (3, 1), picture.tobytes())
    picture.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    picture.save(tmp_path / "palette.png")
    assert loaded(tmp_path / "palette.png")[0].tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    for name, transparency in (("bytes.png", b"\xff\x00\xff"), ("index.png", 1), ("index.gif", 1)):
        picture.save(tmp_path / name, transparency=transparency)
        assert loaded(tmp_path / name)[0].tolist() == [[255, 0, 0], [255, 255, 255], [0, 0, 255]]


def test_cmyk(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg", quality=95)
    assert np.allclose(loaded(tmp_path / "cmyk.jpg"), (255, 0, 0), atol=8)


EXIF_CORNERS = {1: "tl", 2: "tr", 3: "br", 4: "bl", 5: "tl", 6: "tr", 7: "br", 8: "bl"}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_picture_and_box(tmp_path: Path, orientation: int) -> None:
    pixels = np.zeros((20, 40, 3), dtype=np.uint8)
    pixels[2:6, 3:13] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    picture, box = load_picture(tmp_path / "turned.png", (3, 2, 13, 6))
    assert picture.size == ((40, 20) if orientation < 5 else (20, 40))
    assert box == picture.convert("L").getbbox()
    middle = np.array([(box[0] + box[2]) / picture.width, (box[1] + box[3]) / picture.height]) / 2
    assert ("t" if middle[1] < 0.5 else "b") + ("l" if middle[0] < 0.5 else "r") == EXIF_CORNERS[orientation]


def test_broken_exif_does_not_matter(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), (9, 9, 9)).save(tmp_path / "odd.jpg", exif=b"Exif\x00\x00garbage")
    assert loaded(tmp_path / "odd.jpg").shape == (8, 8, 3)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("this is no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    whole = write_picture(tmp_path / "whole.jpg", (64, 64)).read_bytes()
    (tmp_path / "half.jpg").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(np.ones((2, 2), dtype=np.float32)).save(tmp_path / "float.tif")
    for name in ("text.jpg", "empty.png", "half.jpg", "float.tif", "gone.jpg"):
        with pytest.raises(DataError, match=f"{name} cannot be read as a picture"):
            Pictures([Entry(tmp_path / name, 0)], image_size=32)[0]


def test_other_formats_are_decoded_whole(tmp_path: Path) -> None:
    write_picture(tmp_path / "large.png", (400, 300))
    assert load_picture(tmp_path / "large.png", at_least=32)[0].size == (400, 300)
