"""The named data sets in layouts other than the official one, as copies of them go round."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from layouts import make_aircraft, make_cars, make_cub, make_dogs, write_lines
from made_pictures import write_picture
from scipy.io import savemat

from datasets import Catalogue, DataError, read_catalogue


def plain(catalogue: Catalogue) -> list[tuple[str, str, int, object]]:
    """Part, file name, label and box of every picture: what does not depend on where the folders lie."""
    return [(part, e.source.name, e.label, e.box) for part, entries in catalogue.parts.items() for e in entries]


def move(root: Path, *moves: tuple[str, str]) -> None:
    for old, new in moves:
        (root / new).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(root / old, root / new)


CAR_LISTS = ("cars_meta.mat", "cars_train_annos.mat")
COPIES = {
    "lists at the root": ("cars", [(f"devkit/{name}", name) for name in CAR_LISTS]),
    "everything twice": (
        "cars",
        [("cars_train", "t/cars_train"), ("t/cars_train", "cars_train/cars_train"), ("devkit", "car_devkit/devkit")]
        + [("cars_test", "t2/cars_test"), ("t2/cars_test", "cars_test/cars_test")],
    ),
    "a list downloaded twice": (
        "cars",
        [("cars_test_annos_withlabels.mat", "cars_test_annos_withlabels (1).mat")],
    ),
    "birds twice": ("cub", [("images", "CUB_200_2011/CUB_200_2011/images")]),
    "aircraft twice": ("aircraft", [("data", "fgvc-aircraft-2013b/fgvc-aircraft-2013b/data")]),
    "dogs twice": ("dogs", [("Images", "t/Images"), ("t", "images"), ("Annotation", "annotations/Annotation")]),
}
MAKERS = {"cub": make_cub, "cars": make_cars, "aircraft": make_aircraft, "dogs": make_dogs}


@pytest.mark.parametrize("copy", COPIES)
def test_a_copy_gives_the_same_pictures(tmp_path: Path, copy: str) -> None:
    dataset, moves = COPIES[copy]
    root = MAKERS[dataset](tmp_path)
    official = read_catalogue(dataset, root)
    move(root, *moves)
    if dataset == "cub":
        for path in root.glob("*.txt"):
            path.rename(root / "CUB_200_2011/CUB_200_2011" / path.name)
    found = read_catalogue(dataset, root)
    assert plain(found) == plain(official) and found.class_names == official.class_names


def test_cars_in_one_folder_with_one_list(tmp_path: Path) -> None:
    names = np.empty((1, 2), dtype=object)
    names[0, :] = ["Audi", "BMW"]
    fields = ["relative_im_path", "bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "test"]
    records = np.empty((1, 3), dtype=[(name, object) for name in fields])
    for index, (label, test) in enumerate(((1, 0), (2, 0), (2, 1))):
        records[0, index] = (np.array([f"car_ims/00000{index}.jpg"]), 1, 1, 8, 6, label, test)
        write_picture(tmp_path / f"car_ims/00000{index}.jpg")
    savemat(tmp_path / "cars_annos.mat", {"annotations": records, "class_names": names})
    catalogue = read_catalogue("cars", tmp_path)
    assert catalogue.class_names == ["Audi", "BMW"]
    assert [(part, name, label) for part, name, label, _ in plain(catalogue)] == [
        ("training", "000000.jpg", 0),
        ("training", "000001.jpg", 1),
        ("test", "000002.jpg", 1),
    ]
    assert catalogue.train[0].box == (0, 0, 8, 6)


def test_dogs_without_lists_or_boxes_are_split_here(tmp_path: Path) -> None:
    for breed in ("n1-Pug", "n2-Beagle"):
        for number in range(5):
            write_picture(tmp_path / f"images/Images/{breed}/{breed}_{number}.jpg")
    catalogue = read_catalogue("dogs", tmp_path)
    assert catalogue.class_names == ["n1-Pug", "n2-Beagle"] and not catalogue.has_boxes
    assert (len(catalogue.train), len(catalogue.test)) == (8, 2)
    assert "no test part is given" in catalogue.notes[0]


@pytest.mark.parametrize(("level", "file", "names"), [("family", "families", "AB"), ("manufacturer", "makers", "CD")])
def test_aircraft_by_other_levels(tmp_path: Path, level: str, file: str, names: str) -> None:
    make_aircraft(tmp_path)
    file = {"families": "families.txt", "makers": "manufacturers.txt"}[file]
    write_lines(tmp_path / f"data/{file}", [f"{name} x" for name in names])
    write_lines(tmp_path / f"data/images_{level}_trainval.txt", [f"0034309 {names[0]} x", f"0056978 {names[1]} x"])
    write_lines(tmp_path / f"data/images_{level}_test.txt", [f"0698580 {names[1]} x"])
    catalogue = read_catalogue("aircraft", tmp_path, aircraft_level=level)
    assert catalogue.class_names == [f"{name} x" for name in names]
    assert [entry.label for entry in catalogue.entries] == [0, 1, 1]


@pytest.mark.parametrize("folder", ["", "flowers-102"])
def test_flowers(tmp_path: Path, folder: str) -> None:
    root = tmp_path / folder
    for number in range(1, 7):
        write_picture(root / f"jpg/image_{number:05d}.jpg")
    savemat(root / "imagelabels.mat", {"labels": np.array([[1, 1, 1, 2, 2, 2]], dtype=np.uint8)})
    parts = {"trnid": [[1, 4]], "valid": [[2, 5]], "tstid": [[3, 6]]}
    savemat(root / "setid.mat", {name: np.array(ids, dtype=np.uint16) for name, ids in parts.items()})
    catalogue = read_catalogue("flowers", tmp_path)
    assert catalogue.class_names == ["001", "002"]
    assert [(part, int(name[6:11]), label) for part, name, label, _ in plain(catalogue)] == [
        *(("training", 1, 0), ("training", 4, 1), ("validation", 2, 0), ("validation", 5, 1)),
        *(("test", 3, 0), ("test", 6, 1)),
    ]
    (tmp_path / "cat_to_name.json").write_text(json.dumps({"1": "pink primrose", "2": "daisy"}))
    assert read_catalogue("flowers", tmp_path).class_names == ["pink primrose", "daisy"]


@pytest.mark.parametrize("prefix", ["", "oxford-iiit-pet/"])
@pytest.mark.parametrize("twice", [False, True])
def test_pets(tmp_path: Path, prefix: str, twice: bool) -> None:
    lists, images = ("annotations/annotations", "images/images") if twice else ("annotations", "images")
    write_lines(tmp_path / prefix / lists / "trainval.txt", ["great_pug_1 2 2 1", "Abyssinian_100 1 1 1"])
    write_lines(tmp_path / prefix / lists / "test.txt", ["great_pug_2 2 2 1"])
    for name in ("great_pug_1", "Abyssinian_100", "great_pug_2"):
        write_picture(tmp_path / prefix / images / f"{name}.jpg")
    catalogue = read_catalogue("pets", tmp_path)
    assert catalogue.class_names == ["Abyssinian", "great_pug"]
    assert [entry.label for entry in catalogue.entries] == [1, 0, 1]


def test_pets_refuses_two_numbers_of_one_breed(tmp_path: Path) -> None:
    write_lines(tmp_path / "annotations/trainval.txt", ["pug_1 1 2 1", "pug_2 2 2 1", "beagle_1 3 2 1"])
    write_lines(tmp_path / "annotations/test.txt", ["pug_3 1 2 1"])
    with pytest.raises(DataError, match="trainval.txt line 2: 'pug' is class 2 here and 1 before"):
        read_catalogue("pets", tmp_path)


def test_birds_of_one_name_are_told_apart_by_their_number(tmp_path: Path) -> None:
    make_cub(tmp_path)
    write_lines(tmp_path / "classes.txt", ["1 Gull", "2 Gull", "3 Wren", "4 Wren"])  # the last has no pictures
    assert read_catalogue("cub", tmp_path).class_names == ["Gull (1)", "Gull (2)", "Wren"]


def test_two_classes_of_one_name_are_refused(tmp_path: Path) -> None:
    make_cars(tmp_path)
    names = np.empty((1, 2), dtype=object)
    names[0, :] = ["Audi", "Audi"]
    savemat(tmp_path / "devkit/cars_meta.mat", {"class_names": names})
    with pytest.raises(DataError, match="'cars': 2 classes are called 'Audi'"):
        read_catalogue("cars", tmp_path)
