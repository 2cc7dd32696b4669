"""Tiny data sets in the official layouts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from made_pictures import write_picture
from scipy.io import savemat


def write_lines(path: Path, lines: list[str], newline: str = "\n", final: bool = True) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((newline.join(lines) + (newline if final else "")).encode())


def replace_line(path: Path, number: int, line: str) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[number - 1] = line
    write_lines(path, lines)


HTML = "<!DOCTYPE html>\n<html><body>404: not found</body></html>\n"  # what a server sends in place of a file
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
