"""Pictures that are broken, hostile or merely odd: one sentence each, or the picture."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from layouts import HTML
from PIL import Image, PngImagePlugin
from torch.utils.data import DataLoader, Dataset

import datasets
from config import parse_settings
from datasets import DataError, Entry, Pictures, evaluation_loader, load_catalogue, read_catalogue
from utils.data.checking import find_bad_pictures
from utils.data.decoding import limit_memory, load_picture, read_size

pytestmark = pytest.mark.usefixtures("no_hang")


def encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def noise(width: int = 60, height: int = 40) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


JPEG, PNG = encoded(noise(), "JPEG"), encoded(noise(), "PNG")


def png_of_size(width: int, height: int) -> bytes:
    """A valid header of a picture that is never there."""
    file = io.BytesIO(b"")
    file.write(b"\x89PNG\r\n\x1a\n")
    PngImagePlugin.putchunk(file, b"IHDR", width.to_bytes(4, "big"), height.to_bytes(4, "big"), bytes((8, 0, 0, 0, 0)))
    PngImagePlugin.putchunk(file, b"IDAT", b"\x78\x9c")
    PngImagePlugin.putchunk(file, b"IEND", b"")
    return file.getvalue()


# name -> content, words of the reason
BAD_FILES: dict[str, tuple[bytes, str]] = {
    "empty.jpg": (b"", "empty"),
    "text.jpg": (b"this is no picture", "no known picture format"),
    "page.jpg": (HTML.encode(), "no known picture format"),
    "zeros.jpg": (bytes(5000), "no known picture format"),
    "half.jpg": (JPEG[: len(JPEG) // 2], "truncated"),
    "nearly.jpg": (JPEG[:-2], "truncated"),
    "filled.jpg": (JPEG[: len(JPEG) // 2].ljust(len(JPEG), b"\0"), ""),
    "progressive.jpg": (encoded(noise(), "JPEG", progressive=True)[:-500], "truncated"),
    "half.png": (PNG[: len(PNG) // 2], "truncated"),
    "filled.png": (PNG[: len(PNG) // 2].ljust(len(PNG), b"\0"), ""),
    "half.webp": (encoded(noise(), "WEBP")[:-100], ""),
    "half.gif": (encoded(noise(), "GIF")[:-500], "truncated"),
    "half.bmp": (encoded(noise(), "BMP")[:-500], "truncated"),
    "half.tif": (encoded(noise(), "TIFF")[:4000], ""),
    "half.ppm": (encoded(noise(), "PPM")[:-500], "truncated"),
    "bomb.png": (png_of_size(10_000, 10_000), "100000000 pixels"),  # Pillow warns
    "big bomb.png": (png_of_size(50_000, 50_000), "2500000000 pixels"),  # Pillow refuses
    "program.jpg": (encoded(noise(), "EPS"), "PostScript"),
    "float.tif": (encoded(Image.new("F", (4, 4)), "TIFF"), "floating-point"),
    "new\nline.jpg": (b"this is no picture", "no known picture format"),
}
GOOD_FILES = {
    "plain.jpg": JPEG,
    "trailing.jpg": JPEG + b"\0" * 100 + b"camera",
    "padded.jpg": JPEG + bytes(5000),
    "long trailer.jpg": JPEG + np.random.default_rng(1).bytes(50_000).replace(b"\xff\xd9", b""),
    "plain.png": PNG,
    "no end.png": PNG[:-12],
    "trailing.png": PNG + b"more" * 2000,
    "png in truth.jpg": PNG,
    "small.jpg": encoded(noise(2, 2), "JPEG"),
    "wide.webp": encoded(noise(300, 2), "WEBP"),
    "palette.gif": encoded(noise(), "GIF"),
    "plain.bmp": encoded(noise(), "BMP"),
    "two views.mpo": encoded(noise(), "MPO", save_all=True, append_images=[noise(20, 20)]),
    "grey.pgm": encoded(noise().convert("L"), "PPM"),
}


@pytest.fixture
def bad_pictures(tmp_path: Path) -> dict[str, str]:
    """Path -> words of the reason, of everything that is no picture."""
    expected = {}
    for name, (content, words) in BAD_FILES.items():
        (tmp_path / name).write_bytes(content)
        expected[str(tmp_path / name)] = words
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "dangling.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "endless.jpg").symlink_to("/dev/zero")
    more = {"folder": "a folder", "pipe": "not a file", "loop": "symbolic links", "dangling": "No such file"}
    more |= {"endless": "not a file", "gone": "No such file"}
    return expected | {str(tmp_path / f"{name}.jpg"): words for name, words in more.items()}


@pytest.mark.parametrize("thorough", [False, True])
def test_bad_pictures_are_found(tmp_path: Path, bad_pictures: dict[str, str], thorough: bool, capfd) -> None:
    for name, content in GOOD_FILES.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "dot.png").write_bytes(encoded(noise(1, 1), "PNG"))
    (tmp_path / "line.png").write_bytes(encoded(noise(1, 500), "PNG"))
    expected = bad_pictures | {str(tmp_path / "dot.png"): "1 x 1", str(tmp_path / "line.png"): "1 x 500"}
    paths = [
        path for pair in zip(expected, (str(tmp_path / name) for name in GOOD_FILES), strict=False) for path in pair
    ]
    paths += [path for path in expected if path not in paths]
    entries = [Entry(Path(path), 0) for path in paths] + [Entry(7, 0)] + [Entry(Path(path), 0) for path in paths[:3]]
    found = find_bad_pictures(entries, thorough=thorough)
    assert list(found) == [path for path in paths if path in expected]
    for path, words in expected.items():
        assert words in found[path] and 0 < len(found[path]) < 120 and found[path].isprintable(), path
        assert str(tmp_path) not in found[path]
    assert capfd.readouterr() == ("", "")  # neither a bar nor a warning


@pytest.mark.parametrize("thorough", [False, True])
def test_good_pictures_pass(tmp_path: Path, thorough: bool) -> None:
    for name, content in GOOD_FILES.items():
        (tmp_path / name).write_bytes(content)
    entries = [Entry(tmp_path / name, 0) for name in GOOD_FILES]
    assert find_bad_pictures(entries, thorough=thorough) == {}
    assert find_bad_pictures([], thorough=thorough) == {}
    demo = read_catalogue("demo", None)
    assert find_bad_pictures(demo.train + demo.test, thorough=thorough) == {}
    for entry in entries:
        load_picture(entry.source)


def test_damage_inside_takes_a_thorough_look(tmp_path: Path) -> None:
    start = JPEG.index(b"\xff\xc4") + 4  # of a code table
    (tmp_path / "inside.jpg").write_bytes(JPEG[:start] + b"\xff" * 20 + JPEG[start + 20 :])
    entries = [Entry(tmp_path / "inside.jpg", 0)]
    assert find_bad_pictures(entries, thorough=False) == {}
    assert list(find_bad_pictures(entries, thorough=True)) == [str(tmp_path / "inside.jpg")]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF"])
def test_a_file_cut_anywhere_is_found_quickly(tmp_path: Path, kind: str) -> None:
    whole = encoded(noise(20, 20), kind)
    for length in range(0, int(0.95 * len(whole)), len(whole) // 40):
        (tmp_path / f"{length}.jpg").write_bytes(whole[:length])
    entries = [Entry(path, 0) for path in tmp_path.iterdir()]
    assert len(find_bad_pictures(entries, thorough=False)) == len(entries)


def test_a_picture_that_may_not_be_read_is_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jpg").write_bytes(JPEG)

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "a.jpg"))

    monkeypatch.setattr(Image, "open", refuse)
    found = find_bad_pictures([Entry(tmp_path / "a.jpg", 0)], thorough=False)
    assert found == {str(tmp_path / "a.jpg"): "Permission denied"}


def test_a_machine_short_of_files_is_no_picture_s_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jpg").write_bytes(JPEG)

    def fail(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(OSError, match="Too many open files"):
        find_bad_pictures([Entry(tmp_path / "a.jpg", 0)], thorough=False)
    with pytest.raises(DataError, match=r"a.jpg cannot be read now \(Too many open files\): lower workers"):
        load_picture(tmp_path / "a.jpg")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_is_for_terminals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jpg").write_bytes(JPEG)
    for stream, silent, shown in ((Terminal(), False, True), (Terminal(), True, False), (io.StringIO(), False, False)):
        monkeypatch.setattr(sys, "stderr", stream)
        find_bad_pictures([Entry(tmp_path / "a.jpg", 0)], thorough=False, silent=silent)
        assert ("checking pictures" in stream.getvalue()) == shown


def test_every_picture_that_cannot_be_loaded_is_one_sentence(bad_pictures: dict[str, str]) -> None:
    for path, words in bad_pictures.items():
        if "filled" in path:
            continue  # its first half is there
        with pytest.raises(DataError) as error:
            Pictures([Entry(Path(path), 0)], image_size=32)[0]
        sentence, name = str(error.value), path.replace("\n", "\\n")
        assert sentence.startswith(f"{name} cannot be read as a picture (") and words in sentence
        assert sentence.isprintable() and sentence.count(name) == 1


def test_the_limit_in_memory_is_heeded(tmp_path: Path) -> None:
    Image.new("RGB", (60, 40)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="2400 pixels"):
        load_picture(tmp_path / "a.png", memory=4 * 2399)
    load_picture(tmp_path / "a.png", memory=4 * 2400)
    load_picture(tmp_path / "a.png", memory=math.inf)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_limit_is_a_setting_that_loaders_heed(workers: int, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("utils.data.decoding._limit", 1e9)
    for name in ("red", "blue"):
        (tmp_path / name).mkdir()
        for number in range(4):
            Image.new("RGB", (60, 40), name).save(tmp_path / name / f"{number}.png")
    flags = ["--dataset", "folder", "--data_root", str(tmp_path), "--input_size", "96", "--workers", str(workers)]
    settings = parse_settings([*flags, "--picture_memory", "1e-5"])
    catalogue, bad = load_catalogue(settings)
    assert bad == {}
    for limit, refused in ((1e-5, False), (9e-6, True)):
        loader = evaluation_loader(dataclasses.replace(settings, picture_memory=limit), catalogue.train)
        limit_memory(1.0 if workers else limit)
        with pytest.raises(DataError, match="2400 pixels") if refused else contextlib.nullcontext():
            next(iter(loader))
    with pytest.raises(DataError, match="8 of 8 pictures"):
        load_catalogue(dataclasses.replace(settings, picture_memory=9e-6))


def test_a_jpeg_that_takes_too_much_memory_is_decoded_smaller(tmp_path: Path) -> None:
    Image.new("RGB", (640, 480), "red").save(tmp_path / "a.jpg")
    picture, box = load_picture(tmp_path / "a.jpg", (64, 48, 640, 480), memory=4 * 640 * 480 / 5)
    assert picture.size == (160, 120) and box == (16, 12, 160, 120)
    assert find_bad_pictures([Entry(tmp_path / "a.jpg", 0)], thorough=True, memory=4 * 640 * 480 / 60) == {}
    assert "307200 pixels" not in str(find_bad_pictures([Entry(tmp_path / "a.jpg", 0)], thorough=False, memory=4))
    assert find_bad_pictures([Entry(tmp_path / "a.jpg", 0)], thorough=False, memory=4)


def test_a_long_jpeg_is_decoded_as_small_as_it_has_to_be_not_only_as_it_may(tmp_path: Path) -> None:
    """Its short side does not allow for less, but the memory asks for it."""
    Image.new("RGB", (1600, 400), "red").save(tmp_path / "a.jpg")
    for at_least, memory, size in ((300, 1e9, (1600, 400)), (300, 8e5, (800, 200)), (100, 1e6, (400, 100))):
        picture, _ = load_picture(tmp_path / "a.jpg", at_least=at_least, memory=memory)
        assert picture.size == size
        assert find_bad_pictures([Entry(tmp_path / "a.jpg", 0)], thorough=True, at_least=at_least, memory=memory) == {}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiff_is_turned_once(tmp_path: Path, orientation: int) -> None:
    pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3) * 3
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    Image.fromarray(pixels).save(tmp_path / "a.tiff", exif=exif)
    (png, box), (tiff, same) = (load_picture(tmp_path / f"a.{kind}", (1, 0, 5, 2)) for kind in ("png", "tiff"))
    assert np.array_equal(np.asarray(tiff), np.asarray(png)) and box == same
    assert read_size(tmp_path / "a.tiff") == read_size(tmp_path / "a.png") == tiff.size


def test_a_changed_byte_in_a_png_is_found(tmp_path: Path) -> None:
    content = bytearray(encoded(noise(40, 40), "PNG"))
    content[content.index(b"IDAT") + 40] ^= 1
    (tmp_path / "a.png").write_bytes(content)
    assert list(find_bad_pictures([Entry(tmp_path / "a.png", 0)], thorough=True)) == [str(tmp_path / "a.png")]


def test_a_sentence_out_of_a_worker_stays_one(tmp_path: Path, bad_pictures: dict[str, str]) -> None:
    names = ["half.jpg", "bomb.png", "big bomb.png", "pipe.jpg", "gone.jpg", "new\nline.jpg"]
    pictures = Pictures([Entry(tmp_path / name, 0) for name in names], image_size=32)
    batches = iter(DataLoader(pictures, num_workers=1, collate_fn=datasets.collate))
    for name in names:
        with pytest.raises(DataError) as from_worker:
            next(batches)
        with pytest.raises(DataError) as from_here:
            load_picture(tmp_path / name)
        assert str(from_worker.value) == str(from_here.value)
        assert str(from_worker.value).isprintable()


class UnluckyError(DataError):
    """Lives in another module than DataError."""


class Unlucky(Dataset):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> None:
        raise UnluckyError("bad luck\nUnluckyError: with words of its own, DataError: too") from ValueError("no reason")


def test_a_sentence_out_of_a_worker_is_found_wherever_its_class_lives() -> None:
    with pytest.raises(UnluckyError) as error:
        next(iter(DataLoader(Unlucky(), num_workers=1)))
    assert str(error.value) == "bad luck\\nUnluckyError: with words of its own, DataError: too"


@pytest.mark.slow
def test_real_birds_are_good(real_birds: Path) -> None:
    catalogue = read_catalogue("cub", real_birds)
    entries = catalogue.train + catalogue.test
    assert find_bad_pictures(entries, thorough=False) == {} == find_bad_pictures(entries, thorough=True)
