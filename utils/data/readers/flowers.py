"""Oxford 102 Flowers, with its own validation part. Lists number the classes; cat_to_name.json, if there, names them.

Source: Nilsback and Zisserman, "Automated Flower Classification over a Large Number of Classes" (ICVGIP 2008).
"""

from __future__ import annotations

import json
from pathlib import Path

from utils.data.catalogue import Catalogue, Entry, Source
from utils.data.errors import DataError
from utils.data.folders import find_file, find_folder, find_root
from utils.data.tables import read_class, read_matlab

PARTS = {"training": "trnid", "validation": "valid", "test": "tstid"}


def read(source: Source) -> Catalogue:
    root = find_root(source.folder(), "flowers-102", "imagelabels.mat")
    lists = root / "imagelabels.mat", root / "setid.mat"
    images = find_folder(root, "jpg") or find_folder(source.folder(), "jpg") or root / "jpg"
    numbers = [read_class(f"{lists[0]} record {i}", n) for i, n in enumerate(read_matlab(lists[0], "labels"), start=1)]
    used = sorted(set(numbers))
    labels = {number: label for label, number in enumerate(used)}
    parts: dict[str, list[Entry]] = {}
    for part, variable in PARTS.items():
        place = f"{lists[1]} {variable}"
        images_of_part = [read_class(place, image) for image in read_matlab(lists[1], variable)]
        for image in images_of_part:
            if not 1 <= image <= len(numbers):
                raise DataError(f"{place}: image {image} is not in 1..{len(numbers)}, the images that have labels")
        parts[part] = [Entry(images / f"image_{i:05d}.jpg", labels[numbers[i - 1]]) for i in images_of_part]
    names = class_names(source.folder())
    return Catalogue(
        parts["training"], parts["test"], [names.get(str(n), f"{n:03d}") for n in used], parts["validation"]
    )


def class_names(root: Path) -> dict[str, str]:
    """The names by number in a file that goes round with the set; none where it is missing or is none."""
    path = find_file(root, "cat_to_name.json")
    try:
        names = {} if path is None else json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    is_table = isinstance(names, dict) and all(isinstance(name, str) for name in names.values())
    return names if is_table and len(set(names.values())) == len(names) else {}
