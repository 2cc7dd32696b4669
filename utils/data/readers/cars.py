"""Stanford Cars with its devkit; the list of the test set is the one with labels, which was published later.

Source: Krause et al., "3D Object Representations for Fine-Grained Categorization" (3dRR 2013).
"""

from __future__ import annotations

from pathlib import Path

from utils.data.catalogue import Catalogue, Entry, Source
from utils.data.folders import find_root
from utils.data.tables import box_from_matlab, picture_path, read_label, read_matlab, read_numbers


def read(source: Source) -> Catalogue:
    root = find_root(source.folder(), "stanford_cars", "devkit/cars_meta.mat")
    names = [str(name) for name in read_matlab(root / "devkit" / "cars_meta.mat", "class_names")]

    def read_list(path: Path, pictures: Path) -> list[Entry]:
        corners = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2")
        entries = []
        for number, record in enumerate(read_matlab(path, "annotations", (*corners, "class", "fname")), start=1):
            place = f"{path} record {number}"
            box = box_from_matlab(place, *read_numbers(place, [record[corner] for corner in corners]))
            label = read_label(place, record["class"], len(names))
            entries.append(Entry(picture_path(place, pictures, record["fname"]), label, box))
        return entries

    test = "cars_test_annos_withlabels.mat"
    test_list = root / test if (root / test).is_file() else root / "devkit" / test
    train = read_list(root / "devkit" / "cars_train_annos.mat", root / "cars_train")
    return Catalogue(train, read_list(test_list, root / "cars_test"), names)
