"""Readers on tiny trees in the official layouts, pictures of every kind, transforms, sampler, demo set."""

from __future__ import annotations

import hashlib
import os
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import ColorJitter, RandomResizedCrop

import datasets
from datasets import Augmentation, DataError, Entry, Pictures, read_catalogue, split_validation
from utils.data import demo_birds
from utils.data.augmentation import augmented, carry_into_part
from utils.data.decoding import load_picture
from utils.data.samplers import ShuffledSampler


def write_picture(path: Path, size: tuple[int, int] = (8, 6), colour: tuple[int, int, int] = (200, 100, 50)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def write_lines(path: Path, lines: list[str], newline: str = "\n", final: bool = True) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((newline.join(lines) + (newline if final else "")).encode())


def replace_line(path: Path, number: int, line: str) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[number - 1] = line
    write_lines(path, lines)


# ---------------------------------------------------------------------------------------------------------------------
# Trees in the official layouts
# ---------------------------------------------------------------------------------------------------------------------

BIRD_FILES = ["001.Auk/a 1.jpg", "001.Auk/b.jpg", "002.Möwe_Gull/ç.jpg", "002.Möwe_Gull/d.jpg", "003.Wren/e.jpg"]


def make_cub(root: Path, newline: str = "\n", final: bool = True, extra: tuple[str, ...] = ()) -> Path:
    """Five pictures of three classes; picture 2 and 4 are for testing."""

    def write(name: str, values: list[str]) -> None:
        lines = [f"{number} {value}" for number, value in enumerate(values, start=1)]
        write_lines(root / name, [*lines, *extra], newline, final)

    write("images.txt", BIRD_FILES)
    write("image_class_labels.txt", ["1", "1", "2", "2", "3"])
    write("train_test_split.txt", ["1", "0", "1", "0", "1"])
    write("bounding_boxes.txt", ["1.0 2.0 3.0 4.0"] * 5)
    write("classes.txt", ["001.Auk", "002.Möwe_Gull", "003.Wren"])
    for file in BIRD_FILES:
        write_picture(root / "images" / file)
    return root


def check_cub(root: Path, base: Path) -> None:
    catalogue = read_catalogue("cub", root)
    assert catalogue.class_names == ["001.Auk", "002.Möwe_Gull", "003.Wren"]
    assert catalogue.train == [
        Entry(base / "images" / BIRD_FILES[index], label, (1, 2, 4, 6)) for index, label in ((0, 0), (2, 1), (4, 2))
    ]
    assert [(entry.source.name, entry.label) for entry in catalogue.test] == [("b.jpg", 0), ("d.jpg", 1)]
    assert catalogue.has_boxes


def test_cub(tmp_path: Path) -> None:
    check_cub(make_cub(tmp_path), tmp_path)


def test_cub_inside_data_root(tmp_path: Path) -> None:
    make_cub(tmp_path / "CUB_200_2011")
    check_cub(tmp_path, tmp_path / "CUB_200_2011")


@pytest.mark.parametrize(
    ("newline", "final", "extra"), [("\r\n", True, ()), ("\n", False, ()), ("\n", True, ("", " "))]
)
def test_line_ends_and_blank_lines(tmp_path: Path, newline: str, final: bool, extra: tuple[str, ...]) -> None:
    check_cub(make_cub(tmp_path, newline, final, extra), tmp_path)


def test_nabirds_renumbers_the_classes_in_use(tmp_path: Path) -> None:
    write_lines(
        tmp_path / "classes.txt", ["0 Birds", "2 Ducks, Geese, and Swans", "817 Oak Titmouse", "1010 Bushtit (Male)"]
    )
    write_lines(tmp_path / "images.txt", ["0a-1 1010/0a1.jpg", "0b-2 0817/0b2.jpg", "0c-3 1010/0c3.jpg"])
    write_lines(tmp_path / "image_class_labels.txt", ["0a-1 1010", "0b-2 817", "0c-3 1010"])
    write_lines(tmp_path / "train_test_split.txt", ["0a-1 1", "0b-2 1", "0c-3 0"])
    write_lines(tmp_path / "bounding_boxes.txt", ["0a-1 0 1 2 3", "0b-2 4 3 2 1", "0c-3 0 0 8 6"])
    for file in ("1010/0a1.jpg", "0817/0b2.jpg", "1010/0c3.jpg"):
        write_picture(tmp_path / "images" / file)
    catalogue = read_catalogue("nabirds", tmp_path)
    assert catalogue.class_names == ["Oak Titmouse", "Bushtit (Male)"]
    assert [(entry.label, entry.box) for entry in catalogue.train] == [(1, (0, 1, 2, 4)), (0, (4, 3, 6, 4))]
    assert catalogue.test == [Entry(tmp_path / "images/1010/0c3.jpg", 1, (0, 0, 8, 6))]


def make_cars(root: Path, test_folder: str = "") -> Path:
    """Two training pictures and one for testing, in the structures of the devkit."""
    fields = [(name, object) for name in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")]

    def write(path: Path, records: list[tuple]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        annotations = np.empty((1, len(records)), dtype=fields)
        for index, (x0, y0, x1, y1, number, file) in enumerate(records):
            boxed = [np.array([[value]], dtype=np.uint16) for value in (x0, y0, x1, y1)]
            annotations[0, index] = (*boxed, np.array([[number]], dtype=np.uint8), np.array([file]))
        savemat(path, {"annotations": annotations})

    names = np.empty((1, 2), dtype=object)
    names[0, :] = ["AM General Hummer SUV 2000", "Ram C/V Cargo Van Minivan 2012"]
    (root / "devkit").mkdir(parents=True)
    savemat(root / "devkit/cars_meta.mat", {"class_names": names})
    write(root / "devkit/cars_train_annos.mat", [(1, 1, 8, 6, 2, "00001.jpg"), (3, 2, 5, 4, 1, "00002.jpg")])
    write(root / test_folder / "cars_test_annos_withlabels.mat", [(2, 2, 7, 5, 1, "00001.jpg")])
    for file in ("cars_train/00001.jpg", "cars_train/00002.jpg", "cars_test/00001.jpg"):
        write_picture(root / file)
    return root


@pytest.mark.parametrize(("folder", "test_folder"), [("", ""), ("stanford_cars", ""), ("", "devkit")])
def test_cars(tmp_path: Path, folder: str, test_folder: str) -> None:
    root = make_cars(tmp_path / "data" / folder, test_folder)
    catalogue = read_catalogue("cars", tmp_path / "data")
    assert catalogue.class_names == ["AM General Hummer SUV 2000", "Ram C/V Cargo Van Minivan 2012"]
    assert catalogue.train == [
        Entry(root / "cars_train/00001.jpg", 1, (0, 0, 8, 6)),
        Entry(root / "cars_train/00002.jpg", 0, (2, 1, 5, 4)),
    ]
    assert catalogue.test == [Entry(root / "cars_test/00001.jpg", 0, (1, 1, 7, 5))]


def test_cars_refuses_the_test_list_without_labels(tmp_path: Path) -> None:
    make_cars(tmp_path)
    record = np.empty((1, 1), dtype=[(name, object) for name in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "fname")])
    record[0, 0] = (1, 1, 2, 2, "00001.jpg")
    savemat(tmp_path / "cars_test_annos_withlabels.mat", {"annotations": record})
    with pytest.raises(DataError, match="cars_test_annos_withlabels.mat lacks the field 'class'"):
        read_catalogue("cars", tmp_path)


def test_cars_refuses_a_class_without_a_name(tmp_path: Path) -> None:
    make_cars(tmp_path)
    savemat(tmp_path / "devkit/cars_meta.mat", {"class_names": np.array([["only one"]], dtype=object)})
    with pytest.raises(DataError, match=r"cars_train_annos.mat record 1: class 2 is not in 1\.\.1"):
        read_catalogue("cars", tmp_path)


def test_cars_refuses_a_broken_matlab_file(tmp_path: Path) -> None:
    make_cars(tmp_path)
    (tmp_path / "devkit/cars_train_annos.mat").write_text("<html>not found</html>")
    with pytest.raises(DataError, match="cars_train_annos.mat cannot be read as a MATLAB list"):
        read_catalogue("cars", tmp_path)


def make_aircraft(root: Path) -> Path:
    write_lines(root / "data/variants.txt", ["707-320", "BAE 146-200", "F/A-18"])
    write_lines(root / "data/images_variant_trainval.txt", ["0034309 F/A-18", "0056978 BAE 146-200", "0000001 707-320"])
    write_lines(root / "data/images_variant_test.txt", ["0698580 BAE 146-200"])
    write_lines(
        root / "data/images_box.txt", ["0034309 1 1 8 6", "0056978 2 3 4 5", "0698580 5 1 8 2", "0000001 1 1 1 1"]
    )
    for image in ("0034309", "0056978", "0698580", "0000001"):
        write_picture(root / f"data/images/{image}.jpg")
    return root


@pytest.mark.parametrize("folder", ["", "fgvc-aircraft-2013b"])
def test_aircraft(tmp_path: Path, folder: str) -> None:
    root = make_aircraft(tmp_path / folder)
    catalogue = read_catalogue("aircraft", tmp_path)
    assert catalogue.class_names == ["707-320", "BAE 146-200", "F/A-18"]
    assert [entry.label for entry in catalogue.train] == [2, 1, 0]
    assert [entry.box for entry in catalogue.train] == [(0, 0, 8, 6), (1, 2, 4, 5), (0, 0, 1, 1)]
    assert catalogue.test == [Entry(root / "data/images/0698580.jpg", 1, (4, 0, 8, 2))]


def test_aircraft_refuses_an_unknown_variant(tmp_path: Path) -> None:
    make_aircraft(tmp_path)
    replace_line(tmp_path / "data/images_variant_test.txt", 1, "0698580 Zeppelin NT")
    with pytest.raises(DataError, match="images_variant_test.txt line 1: 'Zeppelin NT' is not in variants.txt"):
        read_catalogue("aircraft", tmp_path)


def make_dogs(root: Path, lists: str = "lists") -> Path:
    def write(name: str, files: list[str], labels: list[int]) -> None:
        cells = {key: np.empty((len(files), 1), dtype=object) for key in ("file_list", "annotation_list")}
        for index, file in enumerate(files):
            cells["file_list"][index, 0], cells["annotation_list"][index, 0] = file, file.removesuffix(".jpg")
            write_picture(root / "Images" / file)
            annotation = root / "Annotation" / file.removesuffix(".jpg")
            annotation.parent.mkdir(parents=True, exist_ok=True)
            boxes = "".join(
                f"<object><name>dog</name><bndbox><xmin>{x}</xmin><ymin>1</ymin><xmax>7</xmax><ymax>5</ymax></bndbox>"
                "</object>"
                for x in (2, 3)
            )
            annotation.write_text(f"<annotation><filename>%s</filename>{boxes}</annotation>")
        (root / lists).mkdir(parents=True, exist_ok=True)
        savemat(root / lists / name, {**cells, "labels": np.array(labels, dtype=np.uint8)[:, None]})

    write("train_list.mat", ["n2-Beagle/n2_1.jpg", "n1-Pug/n1_1.jpg"], [2, 1])
    write("test_list.mat", ["n2-Beagle/n2_2.jpg"], [2])
    return root


@pytest.mark.parametrize("lists", ["lists", "."])
def test_dogs(tmp_path: Path, lists: str) -> None:
    catalogue = read_catalogue("dogs", make_dogs(tmp_path, lists))
    assert catalogue.class_names == ["n1-Pug", "n2-Beagle"]
    assert catalogue.train[0] == Entry(tmp_path / "Images/n2-Beagle/n2_1.jpg", 1, (2, 1, 7, 5))
    assert [entry.label for entry in catalogue.train + catalogue.test] == [1, 0, 1]


def test_dogs_names_a_broken_annotation(tmp_path: Path) -> None:
    make_dogs(tmp_path)
    (tmp_path / "Annotation/n1-Pug/n1_1").write_text("<annotation></annotation>")
    with pytest.raises(DataError, match="n1_1: expected numbers"):
        read_catalogue("dogs", tmp_path)
    (tmp_path / "Annotation/n1-Pug/n1_1").write_text("<annotation>")
    with pytest.raises(DataError, match="n1_1 is not XML"):
        read_catalogue("dogs", tmp_path)


@pytest.mark.parametrize("test_name", ["test", "val"])
def test_folder_with_a_split(tmp_path: Path, test_name: str) -> None:
    for file in ("train/b b/1.PNG", "train/a/2.jpg", "train/a/deep/3.jpg", f"{test_name}/a/4.jpg"):
        write_picture(tmp_path / file)
    (tmp_path / "train/a/notes.txt").write_text("not a picture")
    write_picture(tmp_path / "train/.thumbnails/5.jpg")
    write_picture(tmp_path / "train/a/._2.jpg")
    catalogue = read_catalogue("folder", tmp_path)
    assert catalogue.class_names == ["a", "b b"]
    assert [(entry.source.name, entry.label) for entry in catalogue.train] == [("2.jpg", 0), ("3.jpg", 0), ("1.PNG", 1)]
    assert catalogue.test == [Entry(tmp_path / test_name / "a/4.jpg", 0, None)]
    assert not catalogue.has_boxes


def test_folder_without_a_split(tmp_path: Path) -> None:
    for name, count in (("a", 10), ("b", 5)):
        for number in range(count):
            write_picture(tmp_path / name / f"{number}.png")
    catalogue = read_catalogue("folder", tmp_path, seed=3, test_fraction=0.2)
    assert Counter(entry.label for entry in catalogue.test) == {0: 2, 1: 1}
    assert len(catalogue.train) == 12
    assert catalogue == read_catalogue("folder", tmp_path, seed=3, test_fraction=0.2)
    assert catalogue != read_catalogue("folder", tmp_path, seed=4, test_fraction=0.2)


def test_folder_refuses_a_class_that_is_only_tested(tmp_path: Path) -> None:
    for file in ("train/a/1.png", "test/a/2.png", "test/b/3.png"):
        write_picture(tmp_path / file)
    with pytest.raises(DataError, match="1 of 2 classes have no training picture, the first is 'b'"):
        read_catalogue("folder", tmp_path)


def test_classes_keep_order_and_are_renumbered(tmp_path: Path) -> None:
    catalogue = read_catalogue("cub", make_cub(tmp_path), classes=("*Wren", "*_Gull"))
    assert catalogue.class_names == ["002.Möwe_Gull", "003.Wren"]
    assert [(entry.source.name, entry.label) for entry in catalogue.train] == [("ç.jpg", 0), ("e.jpg", 1)]
    assert [(entry.source.name, entry.label) for entry in catalogue.test] == [("d.jpg", 0)]
    with pytest.raises(DataError, match=r"'\*_Tern' matches none of the 3 class names"):
        read_catalogue("cub", tmp_path, classes=("*_Gull", "*_Tern"))


# ---------------------------------------------------------------------------------------------------------------------
# What is wrong on disk
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dataset", "missing"),
    [("cub", "images.txt"), ("nabirds", "images.txt"), ("cars", "cars_meta.mat"), ("aircraft", "variants.txt")]
    + [("dogs", "train_list.mat"), ("folder", "holds no folder")],
)
def test_empty_root(tmp_path: Path, dataset: str, missing: str) -> None:
    with pytest.raises(DataError, match=missing):
        read_catalogue(dataset, tmp_path)
    with pytest.raises(DataError, match="nowhere is not a folder"):
        read_catalogue(dataset, tmp_path / "nowhere")
    with pytest.raises(DataError, match="set data_root"):
        read_catalogue(dataset, None)


def test_unknown_data_set() -> None:
    with pytest.raises(DataError, match="unknown data set 'flowers': expected one of demo, folder, cub"):
        read_catalogue("flowers", None)


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("bounding_boxes.txt", "2 1 2 3", "bounding_boxes.txt line 2: expected 5 fields, got 4"),
        ("bounding_boxes.txt", "2 1 2 x 4", "bounding_boxes.txt line 2: expected numbers, got '1 2 x 4'"),
        ("bounding_boxes.txt", "2 1 2 nan 4", "bounding_boxes.txt line 2: expected finite numbers"),
        ("bounding_boxes.txt", "2 1 2 -3 4", "bounding_boxes.txt line 2: the box .* ends before it begins"),
        ("bounding_boxes.txt", "9 1 2 3 4", "images.txt line 2: '2' is not in bounding_boxes.txt"),
        ("image_class_labels.txt", "2 4", "image_class_labels.txt line 2: '4' is not in classes.txt"),
        ("image_class_labels.txt", "9 1", "images.txt line 2: '2' is not in image_class_labels.txt"),
        ("train_test_split.txt", "2 yes", "train_test_split.txt line 2: 'yes' is not in the flags"),
        ("images.txt", "2", "images.txt line 2: expected 2 fields, got 1"),
        ("images.txt", "2 001.Auk/gone.jpg", "1 of 5 listed pictures are not on disk, the first is .*gone.jpg"),
    ],
)
def test_malformed_lists(tmp_path: Path, file: str, line: str, message: str) -> None:
    make_cub(tmp_path)
    replace_line(tmp_path / file, 2, line)
    with pytest.raises(DataError, match=message):
        read_catalogue("cub", tmp_path)


@pytest.mark.parametrize(
    "file", ["classes.txt", "image_class_labels.txt", "bounding_boxes.txt", "train_test_split.txt"]
)
def test_missing_list(tmp_path: Path, file: str) -> None:
    (make_cub(tmp_path) / file).unlink()
    with pytest.raises(DataError, match=f"{file} does not exist"):
        read_catalogue("cub", tmp_path)


def test_list_in_another_encoding(tmp_path: Path) -> None:
    (make_cub(tmp_path) / "classes.txt").write_bytes("1 Möwe".encode("latin-1"))
    with pytest.raises(DataError, match="classes.txt is not UTF-8"):
        read_catalogue("cub", tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Picture files of every kind
# ---------------------------------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------------------------------
# Samples
# ---------------------------------------------------------------------------------------------------------------------


def as_trained_on(sample: datasets.Sample) -> torch.Tensor:
    """The image [3, S, S] in 0..255, augmented as the device does it."""
    if sample.augmentation is None:
        return sample.image.float()
    return augmented(sample.image[None], sample.augmentation[None])[0]


def bright_box(image: torch.Tensor) -> list[int]:
    """Edges of what is brighter than half-way between the darkest and the brightest pixel."""
    gray = image.float().mean(dim=0)
    rows, columns = torch.nonzero(gray > (gray.min() + gray.max()) / 2, as_tuple=True)
    return [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]


@pytest.fixture
def rectangle(tmp_path: Path) -> Entry:
    pixels = np.full((120, 200, 3), 40, dtype=np.uint8)
    pixels[30:90, 20:100] = 200
    Image.fromarray(pixels).save(tmp_path / "rectangle.png")
    return Entry(tmp_path / "rectangle.png", 3, (20, 30, 100, 90))


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
    image, scaled_box = datasets.load_pixels(Entry(tmp_path / "waves.jpg", 0, box), 32)
    assert scaled_box.tolist() == pytest.approx([3.2, 3.2, 25.6, 16], abs=0.2)
    expected = np.asarray(whole.resize((32, 32), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(image.permute(1, 2, 0).numpy() - expected).mean() < 2


def test_other_formats_are_decoded_whole(tmp_path: Path) -> None:
    write_picture(tmp_path / "large.png", (400, 300))
    assert load_picture(tmp_path / "large.png", at_least=32)[0].size == (400, 300)


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
        x0, y0, x1, y1 = (sample.augmentation[4:] * 96).tolist()
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


def test_box_is_cut_at_the_border(rectangle: Entry) -> None:
    sample = Pictures([rectangle._replace(box=(-5, 10, 300, 90))], image_size=100)[0]
    assert sample.box.tolist() == pytest.approx([0, 100 / 12, 100, 75])


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
        expected.append([float(mirrored), factors[0], factors[1], float(order == [1, 0]), 0, 0, 1, 1])
    assert draws == [pytest.approx(values, rel=1e-6) for values in expected]
    assert Augmentation(0, 0, 0).draw(np.random.default_rng(0)).tolist()[:3] == [0, 1, 1]


def test_nothing_more_is_drawn_for_whole_pictures() -> None:
    generator, ours = np.random.default_rng(3), np.random.default_rng(3)
    Augmentation(0.5, 0.2, 0.4, crop_scale=1.0).draw(ours)
    generator.random(), generator.permutation(2), generator.uniform(size=2)
    assert ours.bit_generator.state == generator.bit_generator.state
    whole, part = (Augmentation(crop_scale=scale).draw(np.random.default_rng(3)) for scale in (1.0, 0.3))
    assert torch.equal(whole[:4], part[:4]) and not torch.equal(whole[4:], part[4:])


@pytest.mark.parametrize("scale", [0.08, 0.5, 0.9])
def test_parts_are_as_random_resized_crop_draws_them(scale: float) -> None:
    augment, generator = Augmentation(0, 0, 0, crop_scale=scale), np.random.default_rng(0)
    parts = torch.stack([augment.draw(generator)[4:] for _ in range(3000)]).double()
    x0, y0, x1, y1 = parts.unbind(dim=1)
    width, height = x1 - x0, y1 - y0
    assert (parts[:, :2] >= 0).all() and (parts[:, 2:] <= 1).all()
    assert (width * height).min() > scale - 1e-5 and (width * height).max() <= 1
    assert (width / height).min() > 3 / 4 - 1e-5 and (width / height).max() < 4 / 3 + 1e-5

    torch.manual_seed(0)
    size = 10000  # rounding to pixels is then lost in the statistics
    crop, picture = RandomResizedCrop(size, scale=(scale, 1)), torch.zeros(1).expand(1, size, size)
    theirs = [crop.make_params([picture]) for _ in range(3000)]
    top, left, h, w = (torch.tensor([p[n] for p in theirs]) / size for n in ("top", "left", "height", "width"))
    for ours, expected in ((width * height, w * h), (width / height, w / h), (x0, left), (y0, top)):
        values = torch.linspace(expected.min(), expected.max(), 50)
        below, expected_below = ((samples[:, None] < values).double().mean(dim=0) for samples in (ours, expected))
        assert (below - expected_below).abs().max() < 0.05  # Kolmogorov-Smirnov, one in a thousand


@pytest.mark.parametrize("workers", [0, 2])
def test_loader(workers: int, rectangle: Entry) -> None:
    entries = [rectangle._replace(label=label) for label in range(7)]
    pictures = Pictures(entries, image_size=32, augment=Augmentation())
    sampler = ShuffledSampler(7, seed=5)
    sampler.set_epoch(2)
    loader = DataLoader(pictures, batch_size=3, sampler=sampler, num_workers=workers, collate_fn=datasets.collate)
    batches = list(loader)
    keys = list(sampler)
    assert [len(batch.labels) for batch in batches] == [3, 3, 1]
    assert torch.cat([batch.labels for batch in batches]).tolist() == [index for index, _ in keys]
    assert torch.equal(
        torch.cat([batch.images for batch in batches]), torch.stack([pictures[key].image for key in keys])
    )
    for name, field in (("boxes", "box"), ("augmentation", "augmentation")):
        expected = torch.stack([getattr(pictures[key], field) for key in keys])
        assert torch.equal(torch.cat([getattr(batch, name) for batch in batches]), expected)
    assert all(batch.images.is_contiguous(memory_format=torch.channels_last) for batch in batches)
    assert batches[0].labels.dtype == torch.int64 and batches[0].paths == [str(rectangle.source)] * 3


def test_collate_without_boxes(rectangle: Entry) -> None:
    pictures = Pictures([rectangle, rectangle._replace(box=None)], image_size=32)
    assert datasets.collate([pictures[0], pictures[0]]).boxes.shape == (2, 4)
    assert datasets.collate([pictures[0], pictures[1]]).boxes is None


# ---------------------------------------------------------------------------------------------------------------------
# Validation split and sampler
# ---------------------------------------------------------------------------------------------------------------------


def test_validation_split() -> None:
    counts = {0: 40, 1: 30, 2: 4, 3: 2, 4: 1}
    entries = [Entry(number, label) for label, count in counts.items() for number in range(count)]
    random.Random(0).shuffle(entries)
    rest, validation = split_validation(entries, 0.1, seed=0)
    assert Counter(entry.label for entry in validation) == {0: 4, 1: 3, 2: 1, 3: 1}
    assert sorted(rest + validation) == sorted(entries)
    assert rest == [entry for entry in entries if entry in rest]  # in the order they came in
    assert (rest, validation) == split_validation(entries, 0.1, seed=0)
    assert validation != split_validation(entries, 0.1, seed=1)[1]
    assert split_validation(entries, 0, seed=0) == (entries, [])
    assert Counter(entry.label for entry in split_validation(entries, 0.99, seed=0)[0]) == dict.fromkeys(counts, 1)
    with pytest.raises(ValueError, match=r"got 1\.0"):
        split_validation(entries, 1.0, seed=0)


def test_sampler_order() -> None:
    sampler = ShuffledSampler(100, seed=3)
    epochs = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
        assert sorted(index for index, _ in epochs[-1]) == list(range(100)) and len(sampler) == 100
    resumed = ShuffledSampler(100, seed=3)
    resumed.set_epoch(2)
    assert list(resumed) == epochs[2]
    seeds = [seed for epoch in epochs for _, seed in epoch] + [seed for _, seed in ShuffledSampler(100, seed=4)]
    assert len(set(seeds)) == 400 and all(0 <= seed < 2**63 for seed in seeds)
    assert epochs[0] != epochs[1]
    # Neither seeds and epochs that add up to the same, nor neighbours, share an order.
    other = ShuffledSampler(100, seed=4)
    assert list(other) != epochs[1]


@pytest.mark.parametrize(("length", "world_size"), [(12, 4), (10, 4), (1, 3), (2, 5), (7, 1), (0, 2)])
def test_sampler_shards(length: int, world_size: int) -> None:
    shards = [list(ShuffledSampler(length, seed=1, rank=rank, world_size=world_size)) for rank in range(world_size)]
    samplers = [ShuffledSampler(length, seed=1, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert {len(shard) for shard in shards} == {len(sampler) for sampler in samplers} == {-(-length // world_size)}
    whole = list(ShuffledSampler(length, seed=1))
    assert set().union(*shards) == set(whole)
    # Dealt out in turn: the batch of all ranks together is the batch of one.
    assert [key for step in zip(*shards, strict=True) for key in step][:length] == whole


def test_sampler_refuses_a_rank_outside_the_world() -> None:
    with pytest.raises(ValueError, match=r"0\.\.1 for a world of 2, got 2"):
        ShuffledSampler(4, seed=0, rank=2, world_size=2)


# ---------------------------------------------------------------------------------------------------------------------
# Demo set
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo() -> datasets.Catalogue:
    return read_catalogue("demo", None)


def test_demo_catalogue(demo: datasets.Catalogue) -> None:
    species = len(demo_birds.SPECIES)
    assert 8 <= species <= 12 and len(set(demo.class_names)) == species
    assert Counter(entry.label for entry in demo.train) == dict.fromkeys(range(species), demo_birds.DEMO_TRAIN)
    assert Counter(entry.label for entry in demo.test) == dict.fromkeys(range(species), demo_birds.DEMO_TEST)
    assert not {entry.source for entry in demo.train} & {entry.source for entry in demo.test}
    assert demo.has_boxes and demo == read_catalogue("demo", None, seed=9)
    boxes = np.array([entry.box for entry in demo.train + demo.test])
    sides = (boxes[:, 2:] - boxes[:, :2]).max(axis=1) / demo_birds.DEMO_SIZE
    assert boxes.min() >= 0 and boxes.max() <= demo_birds.DEMO_SIZE
    assert sides.min() > 0.55 and sides.max() <= 0.91


def test_demo_species_share_every_mark() -> None:
    """No single mark names a species, and no two species share all of them."""
    marks = [species[1:] for species in demo_birds.SPECIES]
    assert len(set(marks)) == len(marks)
    shared = [Counter(column) for column in zip(*marks, strict=True)]
    alone = [value for column in shared for value, count in column.items() if count == 1]
    assert alone == ["straight", "tipped"]


def test_demo_is_drawn_the_same_again(demo: datasets.Catalogue) -> None:
    def checksum() -> str:
        pictures = (
            demo_birds.draw_demo_picture(entry.source).tobytes() for entry in demo.train[::40] + demo.test[::40]
        )
        return hashlib.sha256(b"".join(pictures)).hexdigest()

    state = torch.get_rng_state()
    assert checksum() == checksum()
    assert torch.equal(torch.get_rng_state(), state)
    first, second = (demo_birds.draw_demo_picture(number) for number in (0, 1))
    assert first.tobytes() != second.tobytes() and first.size == (demo_birds.DEMO_SIZE,) * 2


def test_demo_boxes_are_the_birds_extents(demo: datasets.Catalogue, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same pictures without their birds differ from them nowhere but in the box, and up to its edges."""
    entries = (demo.train + demo.test)[::17]
    drawn = [demo_birds.draw_demo_picture(entry.source) for entry in entries]
    paint = demo_birds.paint
    monkeypatch.setattr(demo_birds, "paint", lambda *args, light=None: None if light is not None else paint(*args))
    for entry, picture in zip(entries, drawn, strict=True):
        bare = demo_birds.draw_demo_picture(entry.source)
        difference = np.abs(np.asarray(picture, dtype=int) - np.asarray(bare, dtype=int)).max(axis=2)
        rows, columns = np.nonzero(difference)
        extents = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        assert extents == pytest.approx(entry.box, abs=1.3)  # whole pixels, and a soft edge


def test_demo_mean_colour_says_little(demo: datasets.Catalogue) -> None:
    def colours(entries: list[Entry]) -> tuple[np.ndarray, np.ndarray]:
        means = [np.asarray(demo_birds.draw_demo_picture(entry.source)).mean(axis=(0, 1)) for entry in entries]
        return np.array(means), np.array([entry.label for entry in entries])

    train, train_labels = colours(demo.train[::4])
    test, test_labels = colours(demo.test[::2])
    classes = np.stack([train[train_labels == label].mean(axis=0) for label in range(len(demo.class_names))])
    answers = ((test[:, None] - classes) ** 2).sum(axis=2).argmin(axis=1)
    assert (answers == test_labels).mean() < 2 / len(demo.class_names)


def test_demo_samples(demo: datasets.Catalogue) -> None:
    sample = Pictures(demo.train, image_size=64, augment=Augmentation())[5, 1]
    assert sample.image.shape == (3, 64, 64) and sample.path == "demo/0005"
    assert (sample.box[2:] > sample.box[:2]).all()


# ---------------------------------------------------------------------------------------------------------------------
# Real pictures
# ---------------------------------------------------------------------------------------------------------------------


def test_real_birds() -> None:
    shared = Path(os.environ.get("FINEGRAINED_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    root = shared / "data" / "cub36"
    if not root.is_dir():
        pytest.skip(f"no real birds in {root}: set FINEGRAINED_SHARED to the folder that holds data/cub36")
    catalogue = read_catalogue("cub", root)
    assert (len(catalogue.train), len(catalogue.test), len(catalogue.class_names)) == (1078, 1054, 36)
    assert catalogue.has_boxes
    for entry in catalogue.train + catalogue.test:
        with Image.open(entry.source) as picture:
            width, height = picture.size
        x0, y0, x1, y1 = entry.box
        assert 0 <= x0 < x1 <= width + 2 and 0 <= y0 < y1 <= height + 2  # a few overhang by a pixel or two
    sample = Pictures(catalogue.test, image_size=224)[0]
    assert sample.image.shape == (3, 224, 224) and sample.image.float().std() > 10
