"""Lists of data sets that are damaged: each is refused in a sentence that names the place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from layouts import make_aircraft, make_cars, make_cub, make_dogs, replace_line
from scipy.io import savemat

from datasets import DataError, read_catalogue


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


@pytest.mark.parametrize("file", ["classes.txt", "image_class_labels.txt", "train_test_split.txt"])
def test_missing_list(tmp_path: Path, file: str) -> None:
    (make_cub(tmp_path) / file).unlink()
    with pytest.raises(DataError, match=f"{file} does not exist"):
        read_catalogue("cub", tmp_path)


def test_list_in_another_encoding(tmp_path: Path) -> None:
    (make_cub(tmp_path) / "classes.txt").write_bytes("1 Möwe".encode("latin-1"))
    with pytest.raises(DataError, match="classes.txt is not UTF-8"):
        read_catalogue("cub", tmp_path)


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


def test_aircraft_refuses_an_unknown_variant(tmp_path: Path) -> None:
    make_aircraft(tmp_path)
    replace_line(tmp_path / "data/images_variant_test.txt", 1, "0698580 Zeppelin NT")
    with pytest.raises(DataError, match="images_variant_test.txt line 1: 'Zeppelin NT' is not in variants.txt"):
        read_catalogue("aircraft", tmp_path)


def test_dogs_names_a_broken_annotation(tmp_path: Path) -> None:
    make_dogs(tmp_path)
    (tmp_path / "Annotation/n1-Pug/n1_1").write_text("<annotation></annotation>")
    with pytest.raises(DataError, match="n1_1: expected numbers"):
        read_catalogue("dogs", tmp_path)
    (tmp_path / "Annotation/n1-Pug/n1_1").write_text("<annotation>")
    with pytest.raises(DataError, match="n1_1 is not XML"):
        read_catalogue("dogs", tmp_path)
