"""Pictures in a folder per class: in folders of parts (training, validation, test), or in one tree, split here.

Where the tree lies a few levels deeper it is found, if there is one only.
"""

from __future__ import annotations

from pathlib import Path

from utils.data.catalogue import Catalogue, Entry, Source, hold_back_test
from utils.data.folders import find_pictures, holds_pictures, holds_pictures_below, leads_down, levels, subfolders
from utils.data.kinds import LeftOut
from utils.data.parts import parts_in
from utils.data.refusals import several_trees, unclear_classes, without_classes
from utils.files import is_output


def read(source: Source) -> Catalogue:
    root = source.folder()
    notes: list[str] = []
    tree, trees = find_trees(root)
    if tree != root:
        notes.append(f"the pictures are taken from {tree}")
    trees = {part: without_nesting(tree) for part, tree in trees.items()}
    for part in [part for part in trees if part != "training" and is_flat(trees[part])]:
        notes.append(
            f"{trees[part]} holds pictures and no folders of classes, so nothing says what they are: they are left out "
            "(predict.py names them)"
        )
        del trees[part]
    classes = {part: class_folders(tree, source.class_level) for part, tree in trees.items()}
    class_names = sorted({name for folders in classes.values() for name in folders})
    if len(class_names) < 2:
        raise without_classes(root, trees["training"], class_names)
    owners: dict[str, Path] = {}
    left_out = LeftOut()

    def read_part(part: str) -> list[Entry]:
        return [
            Entry(picture, label)
            for label, name in enumerate(class_names)
            if name in classes[part]
            for picture in find_pictures(trees[part], classes[part][name], owners, left_out)
        ]

    entries = {part: read_part(part) for part in trees}
    notes += left_out.sentences()
    catalogue = Catalogue(
        entries["training"], entries.get("test", []), class_names, entries.get("validation"), tuple(notes)
    )
    return catalogue if "test" in entries else hold_back_test(catalogue, source)


def find_trees(root: Path) -> tuple[Path, dict[str, Path]]:
    """The folder that holds the parts, and the folder of each part; of one tree, that for "training" only."""
    for level in levels(root):
        found = {folder: parts for folder in level if (parts := parts_in(folder))}
        if len(found) > 1:
            raise several_trees(root, list(found))
        for folder, parts in found.items():
            return folder, parts
    tree = without_nesting(root)
    return tree, {"training": tree}


def without_nesting(tree: Path) -> Path:
    """The folder itself or, while all its pictures lie in one folder of folders, that one."""
    while not holds_pictures(tree):
        inner = [folder for folder in subfolders(tree) if holds_pictures_below(folder)]
        if len(inner) != 1 or holds_pictures(inner[0]):
            break
        tree = inner[0]
    return tree


def is_flat(tree: Path) -> bool:
    return holds_pictures(tree) and not subfolders(tree)


def class_folders(tree: Path, level: int | None) -> dict[str, Path]:
    """The folder of each class by its name, which has all names of the path where classes lie deeper."""
    found = [tree]
    for _ in range(level or 1):
        found = [inner for folder in found for inner in subfolders(folder, upward=folder == tree)]
    if level is None and not any(map(holds_pictures, found)):
        down = [folder for folder in found if not folder.is_symlink() or leads_down(folder)]
        deeper = [inner for folder in down for inner in subfolders(folder) if holds_pictures_below(inner)]
        if deeper:
            raise unclear_classes(tree, deeper[0])
    return {folder.relative_to(tree).as_posix(): folder for folder in found if not is_folder_of_runs(folder)}


def is_folder_of_runs(folder: Path) -> bool:
    """Whether a folder holds no pictures, but folders of runs: it is a `checkpoint_dir`."""
    if folder.is_symlink() and not leads_down(folder):
        return False
    return not holds_pictures_below(folder) and any(map(is_output, folder.iterdir()))
