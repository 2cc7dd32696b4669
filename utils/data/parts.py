"""The parts that data sets are given in, and how people name the folders, files and values of each."""

from __future__ import annotations

import re
from pathlib import Path

from utils.data.errors import DataError
from utils.data.folders import subfolders

PARTS: dict[str, tuple[str, ...]] = {
    "training": ("train", "training", "trn", "tr"),
    "validation": ("val", "valid", "validation", "validate", "dev"),
    "test": ("test", "testing", "tst", "eval", "evaluation"),
}
# Words that say nothing about which part it is, as in train_images, TestSet, val-data
BESIDE = ("set", "data", "dataset", "images", "image", "imgs", "img", "pictures", "photos", "split", "list", "labels")


def part_of(name: str) -> str | None:
    """The part that a name says: "training" of train, Training, train_images, trainset, "2_Train"; else None."""
    words = [word for word in re.split(r"[^a-z]+", name.lower()) if word and word not in BESIDE]
    if len(words) != 1:
        return None
    for part, spellings in PARTS.items():
        if any(words[0] in (spelling, *(spelling + word for word in BESIDE)) for spelling in spellings):
            return part
    return None


def parts_in(folder: Path) -> dict[str, Path]:
    """The folders of parts in a folder, if there is one for training and another; else none.

    Raises DataError where two folders have the name of one part.
    """
    found: dict[str, Path] = {}
    for path in subfolders(folder):
        part = part_of(path.name)
        if part is None:
            continue
        if part in found:
            raise DataError(
                f"{found[part]} and {path} both have a name of the {part} part: move one of them out of {folder}"
            )
        found[part] = path
    return found if "training" in found and len(found) > 1 else {}
