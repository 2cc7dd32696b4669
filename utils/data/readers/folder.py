"""`train/` and `test/` (or `val/`) with one folder per class, or one tree of class folders, which is split here."""

from __future__ import annotations

from pathlib import Path

from utils.data.catalogue import Catalogue, Entry, Source, split_validation
from utils.data.errors import DataError
from utils.data.folders import find_pictures


def read(source: Source) -> Catalogue:
    root = source.folder()
    trees = [root]
    for name in ("test", "val"):
        if (root / "train").is_dir() and (root / name).is_dir():
            trees = [root / "train", root / name]
            break
    class_names = sorted(
        {path.name for tree in trees for path in tree.iterdir() if path.is_dir() and path.name[0] != "."}
    )
    if not class_names:
        raise DataError(f"{trees[0]} holds no folder: expected one folder of pictures per class")
    owners: dict[str, Path] = {}

    def read_tree(tree: Path) -> list[Entry]:
        return [
            Entry(picture, label)
            for label, name in enumerate(class_names)
            for picture in find_pictures(tree, tree / name, owners)
        ]

    if len(trees) == 2:
        train, test = map(read_tree, trees)
    else:
        train, test = split_validation(read_tree(root), source.test_fraction, source.seed)
    return Catalogue(train, test, class_names)
