"""Where a data set lies, and which pictures its folders hold."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from utils.data.errors import DataError
from utils.data.kinds import LeftOut, is_picture
from utils.files import is_output

MAX_DEPTH = 3  # levels of folders below data_root in which a data set is looked for
NOT_DATA = {"__macosx", "$recycle.bin", "lost+found", "system volume information", "@eadir"}


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


def subfolders(folder: Path, *, upward: bool = False) -> list[Path]:
    """The folders in a folder, by name, without hidden ones, those of systems, and what our programs wrote.

    upward: with links to folders that hold this one.
    """
    with os.scandir(folder) as items:
        visible = [item for item in items if item.name[0] != "." and item.name.lower() not in NOT_DATA]
    found = [
        folder / item.name
        for item in visible
        if (leads_down(folder / item.name, upward) if item.is_symlink() else item.is_dir())
    ]
    return sorted(path for path in found if not is_output(path))


def leads_down(link: Path, upward: bool = False) -> bool:
    """Whether a link leads to a folder, and (unless it may) to none that holds the link."""
    real = Path(os.path.realpath(link.parent))
    return link.is_dir() and (upward or Path(os.path.realpath(link)) not in (real, *real.parents))


def levels(root: Path, depth: int = MAX_DEPTH) -> Iterator[list[Path]]:
    """The folder itself, the folders in it, those in these, and so on, each real folder once."""
    level, seen = [root], set()
    for _ in range(depth + 1):
        fresh = {os.path.realpath(folder): folder for folder in level}
        level = [folder for real, folder in fresh.items() if real not in seen]
        if not level:
            return
        yield level
        seen |= fresh.keys()
        level = [inner for folder in level for inner in subfolders(folder)]


def find_file(root: Path, *patterns: str) -> Path | None:
    """The file of one of these names (as in a shell) that lies highest in a folder or below it; None where none is.

    Raises DataError where several do.
    """
    for level in levels(root):
        found = [path for folder in level for pattern in patterns for path in sorted(folder.glob(pattern))]
        found = [path for path in found if path.is_file()]
        if len(found) > 1:
            raise DataError(f"both {found[0]} and {found[1]} are there: set data_root to the folder of the one meant")
        if found:
            return found[0]
    return None


def find_folder(root: Path, *names: str) -> Path | None:
    """The folder of one of these names, in any case, that lies highest below a folder; if it holds such a folder in
    turn, as copies do, that one. None where none is."""
    for level in levels(root, MAX_DEPTH - 1):
        found = [inner for folder in level for inner in subfolders(folder) if inner.name.lower() in names]
        while found:
            deeper = [inner for inner in subfolders(found[0]) if inner.name.lower() in names]
            if not deeper:
                return found[0]
            found = deeper
    return None


def find_root(root: Path, folder: str, marker: str) -> Path:
    """The folder that holds the file `marker`: `root`, `root/folder`, or the only one some levels below."""
    for candidate in (root, root / folder):
        if (candidate / marker).is_file():
            return candidate
    for level in levels(root):
        found = [candidate for candidate in level if (candidate / marker).is_file()]
        if len(found) > 1:
            raise DataError(
                f"both {found[0]} and {found[1]} hold {marker}: set data_root to the one that is meant, such as "
                f"--data_root {found[0]}"
            )
        if found:
            return found[0]
    raise DataError(
        f"neither {root / marker} nor {root / folder / marker} exists: set data_root to the data set's folder"
    )


def holds_pictures(folder: Path) -> bool:
    """Whether pictures lie directly in a folder."""
    with os.scandir(folder) as items:
        files = (i for i in items if i.name[0] != "." and not i.is_dir(follow_symlinks=False))
        return any(is_picture(i.path) and not (i.is_symlink() and Path(i.path).is_dir()) for i in files)


def holds_pictures_below(folder: Path) -> bool:
    return any(holds_pictures(inner) for level in levels(folder, depth=100) for inner in level)


def find_missing(files: Sequence[Path]) -> list[Path]:
    """Those that are not on disk."""
    listings: dict[Path, set[str]] = {}  # to list each folder once is cheaper than to ask for every file
    for folder in dict.fromkeys(file.parent for file in files):
        listings[folder] = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
    # A file system may find a name that it lists in another spelling (case, composed letters): hence the second look.
    return [file for file in files if file.name not in listings[file.parent] and not file.exists()]


def find_pictures(
    tree: Path | None, class_folder: Path, owners: dict[str, Path] | None = None, left_out: LeftOut | None = None
) -> list[Path]:
    """The pictures in a class's folder and below it, by folder and name, without what is hidden, and without what our
    programs wrote.

    Links are followed, but each real folder is read once, and none that holds the class's folder: so loops end.

    tree: the folder of all classes, which a link shall not lead back into; None: there is only this one.
    owners: real folder -> the class's folder that it was read for, in all classes and splits; this adds to it.
    left_out: this adds the files that are no pictures.
    """
    if not class_folder.is_dir():
        return []
    owners = {} if owners is None else owners
    above = set(Path(os.path.realpath(class_folder)).parents)
    if tree is not None:
        real_tree = Path(os.path.realpath(tree))
        above |= {real_tree, *real_tree.parents}
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
        if is_output(folder):
            continue
        with os.scandir(folder) as items:
            for item in sorted(items, key=lambda item: item.name):
                path = folder / item.name
                if item.name.startswith("."):
                    continue
                if item.is_symlink() and path.is_dir():
                    linked.append(path)
                elif item.is_dir(follow_symlinks=False):
                    real.append(path)
                elif is_picture(path):
                    pictures.append(path)
                elif left_out is not None and path.is_file():
                    left_out.add(path)
    return sorted(pictures, key=lambda picture: (str(picture.parent), picture.name))
