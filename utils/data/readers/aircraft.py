"""FGVC-Aircraft. The pictures keep their 20-pixel banner at the bottom, as in published results.

Source: Maji et al., "Fine-Grained Visual Classification of Aircraft" (2013).
"""

from __future__ import annotations

from utils.data.catalogue import Catalogue, Entry, Source
from utils.data.folders import find_root
from utils.data.tables import box_from_matlab, look_up, picture_path, read_keyed, read_numbers

# What the classes are -> the file with their names
NAMES = {"variant": "variants.txt", "family": "families.txt", "manufacturer": "manufacturers.txt"}


def read(source: Source) -> Catalogue:
    level, file = source.aircraft_level, NAMES[source.aircraft_level]
    data = find_root(source.folder(), "fgvc-aircraft-2013b", f"data/{file}") / "data"
    names = [name for _, (name,) in read_keyed(data / file, 1)]
    labels = {name: label for label, name in enumerate(names)}
    has_boxes = (data / "images_box.txt").exists()  # they serve a figure, not training
    boxes = {
        image: box_from_matlab(place, *read_numbers(place, fields))
        for place, (image, *fields) in (read_keyed(data / "images_box.txt", 5) if has_boxes else ())
    }

    def read_split(split: str) -> list[Entry]:
        return [
            Entry(
                picture_path(place, data / "images", f"{image}.jpg"),
                look_up(place, name, labels, file),
                look_up(place, image, boxes, "images_box.txt") if has_boxes else None,
            )
            for place, (image, name) in read_keyed(data / f"images_{level}_{split}.txt", 2)
        ]

    return Catalogue(read_split("trainval"), read_split("test"), names)
