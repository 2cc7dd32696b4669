"""CUB-200-2011, and the layout that it shares with NABirds: tables of (image id, value).

Source: Wah et al., "The Caltech-UCSD Birds-200-2011 Dataset".
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from utils.data.catalogue import Catalogue, Entry, Source
from utils.data.decoding import Box
from utils.data.folders import find_root
from utils.data.tables import box_from_edges, look_up, picture_path, read_keyed, read_numbers


def read(source: Source) -> Catalogue:
    return read_birds(source.folder(), folder="CUB_200_2011")


def read_birds(root: Path, *, folder: str) -> Catalogue:
    """The layout of both: `folder` is the name that the archive's folder has."""
    root = find_root(root, folder, "images.txt")
    names = {class_id: name for _, (class_id, name) in read_keyed(root / "classes.txt", 2)}
    class_ids: dict[str, str] = {}
    for place, (image, class_id) in read_keyed(root / "image_class_labels.txt", 2):
        look_up(place, class_id, names, "classes.txt")
        class_ids[image] = class_id
    boxes: dict[str, Box] = {}
    has_boxes = (root / "bounding_boxes.txt").exists()  # they serve a figure, not training
    for place, (image, *fields) in read_keyed(root / "bounding_boxes.txt", 5) if has_boxes else ():
        x, y, width, height = read_numbers(place, fields)
        boxes[image] = box_from_edges(place, x, y, x + width, y + height)
    splits: dict[str, list[Entry]] = {"1": [], "0": []}
    split_of = {
        image: look_up(place, flag, splits, "the flags 1 (training) and 0 (test)")
        for place, (image, flag) in read_keyed(root / "train_test_split.txt", 2)
    }

    # The class ids of NABirds are nodes of a tree of which only some hold pictures: the classes are the ids in use.
    used = set(class_ids.values())
    labels = {class_id: label for label, class_id in enumerate(key for key in names if key in used)}
    for place, (image, file) in read_keyed(root / "images.txt", 2):
        label = labels[look_up(place, image, class_ids, "image_class_labels.txt")]
        box = look_up(place, image, boxes, "bounding_boxes.txt") if has_boxes else None
        split = look_up(place, image, split_of, "train_test_split.txt")
        split.append(Entry(picture_path(place, root / "images", file), label, box))
    uses = Counter(names[class_id] for class_id in labels)
    class_names = [
        names[i] if uses[names[i]] == 1 else f"{names[i]} ({i})" for i in labels
    ]  # by ids where names do not
    return Catalogue(splits["1"], splits["0"], class_names)
