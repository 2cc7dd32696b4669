"""Stanford Dogs; a picture of several dogs gives the box of the first. Without its lists it is split here.

Source: Khosla et al., "Novel Dataset for Fine-Grained Image Categorization" (FGVC 2011).
"""

from __future__ import annotations

from pathlib import Path

from utils.data.catalogue import Catalogue, Entry, Source, hold_back_test
from utils.data.decoding import Box
from utils.data.errors import DataError
from utils.data.folders import find_file, find_folder, find_pictures, find_root, subfolders
from utils.data.tables import picture_path, read_class, read_matlab, read_xml_box

IMAGES, ANNOTATIONS = ("images",), ("annotation", "annotations")


def read(source: Source) -> Catalogue:
    root = source.folder()
    images, annotations = find_folder(root, *IMAGES), find_folder(root, *ANNOTATIONS)
    if images is not None and not any(find_file(root, f"{split}_list.mat") for split in ("train", "test")):
        return read_without_lists(source, images, annotations)
    # The archive of the lists unpacks without a folder of its own.
    lists = find_root(root, "lists", "train_list.mat")
    images = images or root / "Images"
    folders: dict[int, str] = {}
    numbers: dict[str, int] = {}

    def read_list(path: Path) -> list[tuple[int, Path, Box | None]]:
        files, labels = (read_matlab(path, variable) for variable in ("file_list", "labels"))
        if len(files) != len(labels):
            raise DataError(f"{path} lists {len(files)} files and {len(labels)} labels: expected as many of each")
        found = []
        for record, (file, number) in enumerate(zip(files, labels, strict=True), start=1):
            place = f"{path} record {record}"
            picture = picture_path(place, images, file)
            number, folder = read_class(place, number), picture.parent.name
            if folders.setdefault(number, folder) != folder:
                raise DataError(f"{place}: class {number} is {folder!r} here and {folders[number]!r} before: keep one")
            if numbers.setdefault(folder, number) != number:
                raise DataError(f"{place}: {folder!r} is class {number} here and {numbers[folder]} before: keep one")
            found.append((number, picture, box_of(picture, images, annotations)))
        return found

    train, test = read_list(lists / "train_list.mat"), read_list(lists / "test_list.mat")
    labels = {number: label for label, number in enumerate(sorted(folders))}
    train, test = ([Entry(file, labels[number], box) for number, file, box in split] for split in (train, test))
    return Catalogue(train, test, [folders[number] for number in labels])


def read_without_lists(source: Source, images: Path, annotations: Path | None) -> Catalogue:
    folders = subfolders(images)
    entries = [
        Entry(picture, label, box_of(picture, images, annotations))
        for label, folder in enumerate(folders)
        for picture in find_pictures(images, folder)
    ]
    return hold_back_test(Catalogue(entries, [], [folder.name for folder in folders]), source)


def box_of(picture: Path, images: Path, annotations: Path | None) -> Box | None:
    """The box of the first dog; None where there are no annotations: boxes serve a figure, not training."""
    return annotations and read_xml_box(annotations / picture.relative_to(images).with_suffix(""))
