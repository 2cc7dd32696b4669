"""Stanford Dogs; a picture of several dogs gives the box of the first.

Source: Khosla et al., "Novel Dataset for Fine-Grained Image Categorization" (FGVC 2011).
"""

from __future__ import annotations

from pathlib import Path

from utils.data.catalogue import Catalogue, Entry, Source
from utils.data.decoding import Box
from utils.data.errors import DataError
from utils.data.folders import find_root
from utils.data.tables import picture_path, read_class, read_matlab, read_xml_box


def read(source: Source) -> Catalogue:
    root = source.folder()
    # The archive of the lists unpacks without a folder of its own.
    lists = find_root(root, "lists", "train_list.mat")
    folders: dict[int, str] = {}
    numbers: dict[str, int] = {}

    def read_list(path: Path) -> list[tuple[int, Path, Box]]:
        files, labels = (read_matlab(path, variable) for variable in ("file_list", "labels"))
        if len(files) != len(labels):
            raise DataError(f"{path} lists {len(files)} files and {len(labels)} labels: expected as many of each")
        found = []
        for record, (file, number) in enumerate(zip(files, labels, strict=True), start=1):
            place = f"{path} record {record}"
            picture = picture_path(place, root / "Images", file)
            number, folder = read_class(place, number), picture.parent.name
            if folders.setdefault(number, folder) != folder:
                raise DataError(f"{place}: class {number} is {folder!r} here and {folders[number]!r} before: keep one")
            if numbers.setdefault(folder, number) != number:
                raise DataError(f"{place}: {folder!r} is class {number} here and {numbers[folder]} before: keep one")
            found.append((number, picture, read_xml_box(root / "Annotation" / Path(file).with_suffix(""))))
        return found

    train, test = read_list(lists / "train_list.mat"), read_list(lists / "test_list.mat")
    labels = {number: label for label, number in enumerate(sorted(folders))}
    train, test = ([Entry(file, labels[number], box) for number, file, box in split] for split in (train, test))
    return Catalogue(train, test, [folders[number] for number in labels])
