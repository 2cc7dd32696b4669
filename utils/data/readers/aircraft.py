"""FGVC-Aircraft, by variant. The pictures keep their 20-pixel banner at the bottom, as in published results.

Source: Maji et al., "Fine-Grained Visual Classification of Aircraft" (2013).
"""

from __future__ import annotations

from utils.data.catalogue import Catalogue, Entry, Source
from utils.data.folders import find_root
from utils.data.tables import box_from_matlab, look_up, picture_path, read_keyed, read_numbers


def read(source: Source) -> Catalogue:
    data = find_root(source.folder(), "fgvc-aircraft-2013b", "data/variants.txt") / "data"
    names = [name for _, (name,) in read_keyed(data / "variants.txt", 1)]
    labels = {name: label for label, name in enumerate(names)}
    boxes = {
        image: box_from_matlab(place, *read_numbers(place, fields))
        for place, (image, *fields) in read_keyed(data / "images_box.txt", 5)
    }

    def read_split(split: str) -> list[Entry]:
        return [
            Entry(
                picture_path(place, data / "images", f"{image}.jpg"),
                look_up(place, variant, labels, "variants.txt"),
                look_up(place, image, boxes, "images_box.txt"),
            )
            for place, (image, variant) in read_keyed(data / f"images_variant_{split}.txt", 2)
        ]

    return Catalogue(read_split("trainval"), read_split("test"), names)
