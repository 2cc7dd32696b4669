"""Stanford Cars with its devkit, or all pictures in one folder with one list, as it is also published.

The list of the test set is the one with labels, which was published later.

Source: Krause et al., "3D Object Representations for Fine-Grained Categorization" (3dRR 2013).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from utils.data.catalogue import Catalogue, Entry, Source
from utils.data.errors import DataError
from utils.data.folders import find_file, find_folder
from utils.data.tables import box_from_matlab, picture_path, read_class, read_label, read_matlab, read_numbers

CORNERS = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2")


class Layout(NamedTuple):
    """A way in which the set is published; lists and folders are found wherever they lie.

    names: the list with the classes' names. lists: those of pictures, each with the folder of its pictures.
    field: what a list calls a picture. part: the part of a record in a list.
    """

    names: str
    lists: dict[str, str]
    field: str
    part: Callable[[str, str, object], str]


def part_by_list(_: str, name: str, __: object) -> str:
    return "test" if "test" in name else "training"


def part_by_flag(place: str, _: str, record: object) -> str:
    return "test" if read_class(place, record["test"]) else "training"


DEVKIT = Layout(
    "cars_meta.mat",
    {"cars_train_annos.mat": "cars_train", "cars_test_annos_withlabels*.mat": "cars_test"},
    "fname",
    part_by_list,
)
ONE_LIST = Layout("cars_annos.mat", {"cars_annos.mat": "car_ims"}, "relative_im_path", part_by_flag)


def read(source: Source) -> Catalogue:
    root = source.folder()
    layout = next((way for way in (DEVKIT, ONE_LIST) if all(find_file(root, name) for name in way.lists)), DEVKIT)
    names = [str(name) for name in read_matlab(find_list(root, layout.names), "class_names")]
    parts: dict[str, list[Entry]] = {"training": [], "test": []}
    for name, folder in layout.lists.items():
        path, pictures = find_list(root, name), find_folder(root, folder) or root / folder
        fields = (*CORNERS, "class", layout.field)
        for number, record in enumerate(read_matlab(path, "annotations", fields), start=1):
            place = f"{path} record {number}"
            box = box_from_matlab(place, *read_numbers(place, [record[corner] for corner in CORNERS]))
            label = read_label(place, record["class"], len(names))
            file = picture_path(place, pictures, record[layout.field])
            if layout is ONE_LIST:
                file = pictures / file.name  # the list names the folder, too
            parts[layout.part(place, name, record)].append(Entry(file, label, box))
    return Catalogue(parts["training"], parts["test"], names)


def find_list(root: Path, name: str) -> Path:
    path = find_file(root, name)
    if path is None:
        name = name.replace("*", "")
        raise DataError(
            f"{name} is not in {root} nor below it: set data_root to the folder of Stanford Cars, with its lists "
            "(cars_meta.mat, cars_train_annos.mat and cars_test_annos_withlabels.mat, or cars_annos.mat)"
        )
    return path
