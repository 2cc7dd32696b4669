"""Readers on tiny trees in the official layouts, the split, samples and batches, and what settings make of them."""

from __future__ import annotations

import dataclasses
import pickle
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from layouts import BIRD_FILES, make_aircraft, make_cars, make_cub, make_dogs, write_lines
from made_pictures import write_picture
from PIL import Image
from torch.utils.data import DataLoader

import datasets
from config import Settings
from datasets import (
    Batch,
    DataError,
    Entry,
    Pictures,
    choose_split,
    evaluation_loader,
    load_catalogue,
    note_on_left_out,
    read_catalogue,
    split_validation,
    training_loader,
)
from utils.data.augmentation import Augmentation
from utils.data.decoded import build_cache
from utils.data.pixels import load_pixels
from utils.data.samplers import ShuffledSampler
from utils.data.settings import DataSettings
from utils.data.workers import start_loader
from utils.errors import UserError


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


@pytest.mark.parametrize("folder", ["", "fgvc-aircraft-2013b"])
def test_aircraft(tmp_path: Path, folder: str) -> None:
    root = make_aircraft(tmp_path / folder)
    catalogue = read_catalogue("aircraft", tmp_path)
    assert catalogue.class_names == ["707-320", "BAE 146-200", "F/A-18"]
    assert [entry.label for entry in catalogue.train] == [2, 1, 0]
    assert [entry.box for entry in catalogue.train] == [(0, 0, 8, 6), (1, 2, 4, 5), (0, 0, 1, 1)]
    assert catalogue.test == [Entry(root / "data/images/0698580.jpg", 1, (4, 0, 8, 2))]


@pytest.mark.parametrize("lists", ["lists", "."])
def test_dogs(tmp_path: Path, lists: str) -> None:
    catalogue = read_catalogue("dogs", make_dogs(tmp_path, lists))
    assert catalogue.class_names == ["n1-Pug", "n2-Beagle"]
    assert catalogue.train[0] == Entry(tmp_path / "Images/n2-Beagle/n2_1.jpg", 1, (2, 1, 7, 5))
    assert [entry.label for entry in catalogue.train + catalogue.test] == [1, 0, 1]


@pytest.mark.parametrize("test_name", ["test", "Testing"])
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
    with pytest.raises(DataError, match=r"has one class only, '002\.Möwe_Gull': expected two .* with --classes"):
        read_catalogue("cub", tmp_path, classes=("*_Gull",))
    write_lines(tmp_path / "classes.txt", ["1 Auk [big]", "2 Gull", "3 Wren"])
    assert read_catalogue("cub", tmp_path, classes=("Auk [big]", "W*")).class_names == ["Auk [big]", "Wren"]


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
    with pytest.raises(DataError, match="unknown data set 'fungi': expected one of aircraft, cars, csv, cub"):
        read_catalogue("fungi", None)


def test_validation_split() -> None:
    counts = {0: 40, 1: 30, 2: 4, 3: 2, 4: 1, 5: 16}
    entries = [Entry(number, label) for label, count in counts.items() for number in range(count)]
    random.Random(0).shuffle(entries)
    rest, validation = split_validation(entries, 0.1, seed=0)
    assert Counter(entry.label for entry in validation) == {0: 4, 1: 3, 2: 1, 3: 1, 5: 2}
    assert sorted(rest + validation) == sorted(entries)
    assert rest == [entry for entry in entries if entry in rest]  # in the order they came in
    assert (rest, validation) == split_validation(entries, 0.1, seed=0)
    assert validation != split_validation(entries, 0.1, seed=1)[1]
    assert split_validation(entries, 0, seed=0) == (entries, [])
    assert Counter(entry.label for entry in split_validation(entries, 0.99, seed=0)[0]) == dict.fromkeys(counts, 1)
    with pytest.raises(ValueError, match=r"got 1\.0"):
        split_validation(entries, 1.0, seed=0)


# ---------------------------------------------------------------------------------------------------------------------
# Samples and batches
# ---------------------------------------------------------------------------------------------------------------------


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
    assert datasets.collate([pictures[1], pictures[1]]).boxes is None
    mixed = datasets.collate([pictures[1], pictures[0]]).boxes
    assert mixed[0].isnan().all() and torch.equal(mixed[1], pictures[0].box)


# ---------------------------------------------------------------------------------------------------------------------
# What settings make of the data
# ---------------------------------------------------------------------------------------------------------------------


def made_settings(picture_tree: Path, **changes: object) -> SimpleNamespace:
    """No more than what `DataSettings` names, so that a field read beside these would be missed."""
    values = {
        **{"dataset": "folder", "data_root": str(picture_tree), "classes": None, "test_fraction": 0.25, "seed": 3},
        **dict.fromkeys(("class_level", "labels", "validation_labels", "test_labels")),
        **dict.fromkeys(("image_column", "label_column", "split_column"), None),
        "aircraft_level": "variant",
        **{"on_bad_image": "stop", "select_on": "validation", "validation": 0.34, "image_size": 32, "flip": 0.5},
        **{
            "resize_size": 32,
            "keep_aspect_ratio": False,
            "padding": 0,
            "saturation": 0.0,
            "rotation": 0.0,
            "erasing": 0.0,
            "auto_augment": "none",
        },
        **{"brightness": 0.2, "contrast": 0.2, "crop_scale": 0.5, "batch_size": 4, "evaluation_batch_size": 5},
        **{
            "images_per_class": 0,
            "workers": 0,
            "device": "cpu",
            "prefetch": 2,
            "picture_memory": 0.36,
            "cache": "none",
            "checkpoint_dir": "nowhere",
        },
    }
    assert values.keys() == DataSettings.__annotations__.keys()
    return SimpleNamespace(**values | changes)


@pytest.mark.parametrize("build_loader", [training_loader, evaluation_loader])
def test_a_loader_can_be_given_to_processes_that_are_not_forked(build_loader: Callable, picture_tree: Path) -> None:
    """All that they need goes through pickle: on Windows, on macOS, and from Python 3.14 on everywhere."""
    settings = made_settings(picture_tree, workers=1)
    loader = build_loader(settings, load_catalogue(settings)[0].train)
    needed = loader.dataset, loader.collate_fn, loader.worker_init_fn
    pictures, collate, start = pickle.loads(pickle.dumps(needed))
    assert start.func is start_loader and start.keywords == {"picture_memory": 0.36}
    keys = list(loader.sampler)[:3]
    batch, expected = (collate([source[key] for key in keys]) for source in (pictures, loader.dataset))
    assert torch.equal(batch.images, expected.images) and batch.paths == expected.paths


def test_the_settings_that_are_read_are_those_of_a_run() -> None:
    assert DataSettings.__annotations__.keys() <= {field.name for field in dataclasses.fields(Settings)}


def test_settings_choose_the_split(picture_tree: Path) -> None:
    settings = made_settings(picture_tree)
    catalogue, bad = load_catalogue(settings)
    assert bad == {}
    assert catalogue == read_catalogue("folder", picture_tree, seed=3, test_fraction=0.25)
    train, validation, words = choose_split(settings, catalogue)
    assert (train, validation) == split_validation(catalogue.train, 0.34, seed=3)
    assert words == "6 validation images (34% of the training images, by class, seed 3)"
    few = catalogue._replace(train=[entry for entry in catalogue.train if entry.label or entry.source.stem == "3"])
    _, _, words = choose_split(made_settings(picture_tree, validation=0.1), few)
    assert words == (
        "2 validation images (10% of the training images, by class, seed 3; as whole images, at least one, this is 15% "
        "of all; classes with one image, 1, keep it)"
    )
    train, selection, words = choose_split(made_settings(picture_tree, select_on="test"), catalogue)
    assert (train, selection) == (catalogue.train, catalogue.test)
    assert words == "the 6 TEST images: test figures are optimistic"
    given = catalogue._replace(train=catalogue.train[2:], validation=catalogue.train[:2])
    chosen = choose_split(made_settings(picture_tree, select_on="test"), given)
    assert chosen[:2] == ([*given.train, *given.validation], catalogue.test)
    singles = catalogue._replace(train=[entry for entry in catalogue.train if entry.source.stem == "3"])
    with pytest.raises(DataError, match="no class has an image to spare for validation: raise validation, or set"):
        choose_split(settings, singles)


@pytest.mark.parametrize("images_per_class", [0, 2])
@pytest.mark.parametrize("workers", [0, 1])
def test_processes_share_the_batches_of_a_run(picture_tree: Path, images_per_class: int, workers: int) -> None:
    settings = made_settings(picture_tree, images_per_class=images_per_class, workers=workers)
    entries = load_catalogue(settings)[0].train

    def batches(**process: int) -> list[Batch]:
        loader = training_loader(settings, entries, **process)
        loader.sampler.set_epoch(2)
        return list(loader)

    whole, first, second = batches(), batches(rank=0, world_size=2), batches(rank=1, world_size=2)
    assert len(whole) == len(first) == len(second) > 3
    seen = set()
    for batch, *parts in zip(whole, first, second, strict=True):
        assert [len(part.labels) for part in parts] == [2, 2]
        assert sorted(batch.paths) == sorted(parts[0].paths + parts[1].paths)
        rows = dict(zip(batch.paths, batch.augmentation, strict=True))
        for part in parts:
            assert all(rows[path].equal(row) for path, row in zip(part.paths, part.augmentation, strict=True))
        seen |= set(batch.paths)
    assert len(seen) > len(entries) - 4


@pytest.mark.parametrize(
    ("changes", "images", "processes", "sentence"),
    [
        ({"batch_size": 8}, 15, 1, "7 of 15 training images are left out of each epoch, .* fill no batch of 8: "),
        ({"batch_size": 8}, 12, 2, "4 of 12 training images are left out of each epoch, .* fill no batch of 8: "),
        ({"batch_size": 8}, 15, 2, None),  # one of them sees a picture again
        ({"batch_size": 8}, 16, 1, None),
        ({"batch_size": 8}, 7, 1, None),  # a batch of all
        ({"batch_size": 2}, 15, 1, None),  # less than a tenth
        ({"batch_size": 8, "images_per_class": 2}, 15, 1, None),  # drawn, not gone through
    ],
)
def test_it_is_said_how_many_images_an_epoch_leaves_out(
    picture_tree: Path, changes: dict, images: int, processes: int, sentence: str | None
) -> None:
    settings = made_settings(picture_tree, **changes)
    entries = load_catalogue(settings)[0].train[:images]
    loaders = [training_loader(settings, entries, rank=rank, world_size=processes) for rank in range(processes)]
    for loader in loaders:
        note = note_on_left_out(loader, images, world_size=processes)
        assert note is None if sentence is None else re.match(sentence, note)
    if sentence:
        seen = {path for loader in loaders for batch in loader for path in batch.paths}
        assert len(seen) == images - int(sentence.partition(" ")[0])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"batch_size": 6}, "6 cannot be shared equally by 4 processes"),
        ({"images_per_class": 2}, "4 cannot be shared equally by 4 processes in groups of images_per_class 2"),
    ],
)
def test_a_batch_that_processes_cannot_share_is_refused(picture_tree: Path, changes: dict, sentence: str) -> None:
    settings = made_settings(picture_tree, **changes)
    with pytest.raises(UserError) as refusal:
        training_loader(settings, load_catalogue(settings)[0].train, rank=1, world_size=4)
    assert str(refusal.value) == f"batch_size {sentence}"


def test_evaluation_reads_the_pictures_as_listed(picture_tree: Path) -> None:
    settings = made_settings(picture_tree)
    entries = load_catalogue(settings)[0].test
    batches = list(evaluation_loader(settings, entries))
    assert [len(batch.labels) for batch in batches] == [5, 1]
    assert [path for batch in batches for path in batch.paths] == [str(entry.source) for entry in entries]
    assert all(batch.augmentation is None for batch in batches)


@pytest.mark.parametrize("cache", ["none", "ram", "disk"])
def test_settings_choose_the_cache(picture_tree: Path, tmp_path: Path, cache: str) -> None:
    settings = made_settings(picture_tree, cache=cache, checkpoint_dir=str(tmp_path))
    entries = load_catalogue(settings)[0].test
    kept = build_cache(settings, entries)
    assert [path.name.split("-")[0] for path in tmp_path.glob("cache/*.pictures")] == ["folder"] * (cache == "disk")
    if cache == "none":
        assert kept is None
        return
    assert list(kept) == [entry.source for entry in entries]
    assert all(kept[entry.source][0].equal(load_pixels(entry, 32)[0]) for entry in entries)


def test_settings_decide_about_unreadable_pictures(picture_tree: Path, tmp_path: Path) -> None:
    tree = Path(shutil.copytree(picture_tree, tmp_path / "tree"))
    (tree / "red" / "3.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"1 of 24 pictures cannot be read, the first is .*red/3\.png .* on_bad_image"):
        load_catalogue(made_settings(tree))
    catalogue, bad = load_catalogue(made_settings(tree, on_bad_image="skip"))
    assert list(bad) == [str(tree / "red" / "3.png")]
    assert len(catalogue.train + catalogue.test) == 23


# ---------------------------------------------------------------------------------------------------------------------
# Real pictures
# ---------------------------------------------------------------------------------------------------------------------


def test_real_birds(real_birds: Path) -> None:
    catalogue = read_catalogue("cub", real_birds)
    assert (len(catalogue.train), len(catalogue.test), len(catalogue.class_names)) == (1078, 1054, 36)
    assert catalogue.has_boxes
    for entry in catalogue.train + catalogue.test:
        with Image.open(entry.source) as picture:
            width, height = picture.size
        x0, y0, x1, y1 = entry.box
        assert 0 <= x0 < x1 <= width + 2 and 0 <= y0 < y1 <= height + 2  # a few overhang by a pixel or two
    sample = Pictures(catalogue.test, image_size=224)[0]
    assert sample.image.shape == (3, 224, 224) and sample.image.float().std() > 10
