"""Where a data set lies, and which pictures its folders hold."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

from utils.data.errors import DataError


def check_root(dataset: str, root: str | Path | None) -> Path:
    """The folder that a user named, `~` resolved."""
    if root is None:
        raise DataError(f"data set {dataset!r} needs the folder that it lies in: set data_root")
    try:
        root = Path(root).expanduser()
    except RuntimeError as error:  # ~somebody
        raise DataError(f"data_root {root} is not a folder ({error}): write it without ~") from None
    if not root.is_dir():
        raise DataError(f"data_root {root} is not a folder: expected the folder of data set {dataset!r}")
    return root


def find_root(root: Path, folder: str, marker: str) -> Path:
    """`root` or `root/folder`, whichever holds the file `marker`."""
    for candidate in (root, root / folder):
        if (candidate / marker).is_file():
            return candidate
    raise DataError(
        f"neither {root / marker} nor {root / folder / marker} exists: set data_root to the data set's folder"
    )


def find_missing(files: Sequence[Path]) -> list[Path]:
    """Those that are not on disk."""
    listings: dict[Path, set[str]] = {}  # to list each folder once is cheaper than to ask for every file
    for folder in dict.fromkeys(file.parent for file in files):
        listings[folder] = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
    # A file system may find a name that it lists in another spelling (case, composed letters): hence the second look.
    return [file for file in files if file.name not in listings[file.parent] and not file.exists()]


def find_pictures(tree: Path, class_folder: Path, owners: dict[str, Path]) -> list[Path]:
    """The pictures in a class's folder and below it, by folder and name, without what is hidden.

    Links are followed, but each real folder is read once, and none that holds the class's folder: so loops end.

    owners: real folder -> the class's folder that it was read for, in all classes and splits; this adds to it.
    """
    if not class_folder.is_dir():
        return []
    real_tree = Path(os.path.realpath(tree))
    above = {real_tree, *real_tree.parents, *Path(os.path.realpath(class_folder)).parents}
    pictures: list[Path] = []
    done: set[str] = set()
    real, linked = [class_folder], []
    while real or linked:
        folder = real.pop() if real else linked.pop(0)  # links last: what has a name of its own in the class keeps it
        target = os.path.realpath(folder)
        if target in done or Path(target) in above:
            continue
        done.add(target)
        if owners.setdefault(target, class_folder) != class_folder:
            raise DataError(f"{target} is linked into both {owners[target]} and {class_folder}: take one link away")
        with os.scandir(folder) as items:
            for item in sorted(items, key=lambda item: item.name):
                path = folder / item.name
                if item.name.startswith("."):
                    continue
                if item.is_symlink() and path.is_dir():
                    linked.append(path)
                elif item.is_dir(follow_symlinks=False):
                    real.append(path)
                elif item.name.lower().endswith(IMG_EXTENSIONS):
                    pictures.append(path)
    return sorted(pictures, key=lambda picture: (str(picture.parent), picture.name))
