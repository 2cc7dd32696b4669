"""The sentences with which folders are refused that hold no data set as it is expected."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from utils.data.columns import TABLES
from utils.data.errors import DataError
from utils.data.folders import holds_pictures, levels

# What pictures may be packed into, and what makes files of them
CONTAINERS = {
    **dict.fromkeys((".zip", ".tar", ".tgz", ".gz", ".7z", ".rar"), "unpack it first"),
    **dict.fromkeys((".parquet", ".arrow"), "write its pictures into a folder per class first (docs/settings.md)"),
    **dict.fromkeys((".tfrecord", ".lmdb", ".h5", ".hdf5", ".npz"), "write its pictures into a folder per class first"),
}


def without_classes(root: Path, tree: Path, class_names: Sequence[str]) -> DataError:
    """Of a folder that holds none or only one folder of pictures: with what lies there instead, and what to do."""
    seen = f"{tree} holds no folder" if not class_names else f"{tree} holds the pictures of one class only"
    if not class_names and holds_pictures(tree):
        seen = f"{tree} holds pictures and no folder"
    seen += f" ({class_names[0]})" if class_names else ""
    files = [path for level in levels(root, 2) for folder in level for path in sorted(folder.iterdir())]
    tables = [path for path in files if path.suffix.lower() in TABLES]
    if tables:
        labels = min(tables, key=lambda path: ("train" not in path.stem.lower(), "label" not in path.stem.lower()))
        return DataError(
            f"{seen}: expected one folder of pictures per class; if {labels.name} says what they are, give --dataset "
            f"csv --data_root {root} --labels {labels}"
        )
    packed = [path for path in files if path.suffix.lower() in CONTAINERS]
    if packed:
        return DataError(
            f"{seen}, but {packed[0].name}: expected one folder of pictures per class; "
            f"{CONTAINERS[packed[0].suffix.lower()]}"
        )
    return DataError(f"{seen}: expected one folder of pictures per class")


def several_trees(root: Path, found: Sequence[Path]) -> DataError:
    names = " and ".join(str(path.relative_to(root)) for path in found[:2])
    return DataError(
        f"{root} holds {len(found)} folders with parts for training and testing ({names}{' ...' * (len(found) > 2)}): "
        f"choose one, such as --data_root {found[0]}"
    )


def unclear_classes(tree: Path, deeper: Path) -> DataError:
    first, second = deeper.parent.name, f"{deeper.parent.name}/{deeper.name}"
    return DataError(
        f"{tree} holds folders of folders of pictures ({second}), and nothing says which are the classes: give "
        f"--class_level 1 for classes such as {first!r}, or --class_level 2 for such as {second!r}"
    )
