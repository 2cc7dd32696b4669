"""Oxford-IIIT Pets, by breed.

Source: Parkhi et al., "Cats and Dogs" (CVPR 2012).
"""

from __future__ import annotations

from utils.data.catalogue import Catalogue, Entry, Source
from utils.data.errors import DataError
from utils.data.folders import find_folder, find_root
from utils.data.tables import picture_path, read_class, read_keyed


def read(source: Source) -> Catalogue:
    root = source.folder()
    annotations = find_folder(root, "annotations") or root
    lists = find_root(annotations, "annotations", "trainval.txt")
    images = find_folder(root, "images") or lists.parent / "images"
    names: dict[int, str] = {}
    numbers: dict[str, int] = {}

    def read_list(name: str) -> list[tuple[int, Entry]]:
        found = []
        for place, (image, class_id, _, _) in read_keyed(lists / name, 4):
            number, breed = read_class(place, class_id), image.rpartition("_")[0]
            if names.setdefault(number, breed) != breed:
                raise DataError(f"{place}: class {number} is {breed!r} here and {names[number]!r} before: keep one")
            if numbers.setdefault(breed, number) != number:
                raise DataError(f"{place}: {breed!r} is class {number} here and {numbers[breed]} before: keep one")
            found.append((number, Entry(picture_path(place, images, f"{image}.jpg"), 0)))
        return found

    parts = read_list("trainval.txt"), read_list("test.txt")
    labels = {number: label for label, number in enumerate(sorted(names))}
    train, test = ([entry._replace(label=labels[number]) for number, entry in part] for part in parts)
    return Catalogue(train, test, [names[number] for number in labels])
