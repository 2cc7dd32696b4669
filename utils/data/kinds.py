"""Which files are pictures: by how their names end or, where that says nothing, by how they begin."""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path

from PIL import Image

# What Pillow knows how to open, but which is no photograph: data of science, film, programs to be run, stubs.
NO_PHOTOGRAPHS = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "MPEG", "WMF"}
# Endings of what lies beside pictures in data sets, and is not worth a look inside.
NO_PICTURES = {
    *(".7z", ".arrow", ".bin", ".bz2", ".c", ".cfg", ".conf", ".cpp", ".csv", ".db", ".doc", ".docx", ".gz"),
    *(".h", ".h5", ".hdf5", ".htm", ".html", ".ini", ".ipynb", ".js", ".json", ".jsonl", ".lmdb", ".log", ".m"),
    *(".mat", ".md", ".mov", ".mp4", ".npy", ".npz", ".onnx", ".parquet", ".part", ".pdf", ".pickle"),
    *(".pictures", ".pkl", ".pt", ".pt2", ".pth", ".py", ".rar", ".rst", ".sh", ".tar", ".tfrecord", ".tgz"),
    *(".toml", ".tsv", ".txt", ".url", ".xls", ".xlsx", ".xml", ".yaml", ".yml", ".zip"),
}
# Kinds that cannot be mistaken for others by how a file begins
UNMISTAKABLE = ("JPEG", "MPO", "PNG", "GIF", "WEBP", "TIFF", "BMP", "AVIF", "HEIF", "JPEG2000", "QOI", "PSD")
# Photographs that Pillow does not read by itself
TO_BE_CONVERTED = {".heic", ".heif", ".hif", ".jxl", ".dng", ".arw", ".cr2", ".cr3", ".nef", ".orf", ".raf", ".rw2"}
CLUTTER = {"thumbs.db", "desktop.ini"}  # of file managers, not worth a word
WRITTEN_BY_US = "fine-grained visual classification"  # in the Software field of every PNG that our programs write


@functools.cache
def picture_endings() -> frozenset[str]:
    """Endings of the kinds of pictures that the installed Pillow reads, and of these packages that extend it."""
    Image.init()
    kinds = Image.registered_extensions().items()
    return frozenset(ending for ending, kind in kinds if kind in Image.OPEN and kind not in NO_PHOTOGRAPHS)


def is_picture(path: str | Path) -> bool:
    """Whether a file is to be read as a picture: it is named like one, or begins like one and has no other name."""
    path = Path(path)
    ending = path.suffix.lower()
    if ending == ".png" and Path(path.stem).suffix.lower() in {*picture_endings(), ".drawing"}:
        return not _is_drawing(path)
    if ending in picture_endings():
        return True
    return ending not in NO_PICTURES and path.is_file() and _begins_like_one(path)


def _begins_like_one(path: str | Path) -> bool:
    Image.init()
    try:
        with Image.open(path, formats=[kind for kind in UNMISTAKABLE if kind in Image.OPEN]):
            return True
    except Exception:  # whatever Pillow stumbles over: it reads no picture there
        return False


def _is_drawing(path: str | Path) -> bool:
    """Whether `predict.py` drew it: a.jpg.png or a.jpg.drawing.png of a.jpg, with our name inside."""
    try:
        with Image.open(path) as image:
            return image.info.get("Software") == WRITTEN_BY_US
    except Exception:  # a broken picture, which is reported as one
        return False


class LeftOut:
    """The files that a walk through folders has left out, by their endings, for one sentence about all of them."""

    def __init__(self) -> None:
        self.endings: Counter[str] = Counter()
        self.first: Path | None = None

    def add(self, path: Path) -> None:
        if path.name.lower() in CLUTTER:
            return
        self.first = self.first or path
        self.endings[path.suffix or "without ending"] += 1

    def sentences(self) -> list[str]:
        if self.first is None:
            return []
        kinds = ", ".join(f"{count} {ending}" for ending, count in self.endings.most_common(5))
        more = ", ..." if len(self.endings) > 5 else ""
        photographs = any(ending.lower() in TO_BE_CONVERTED for ending in self.endings)
        convert = ": convert the photographs among them, to JPEG for example" if photographs else ""
        return [
            f"{self.endings.total()} files beside the pictures are left out, as Pillow {Image.__version__} reads no "
            f"picture in them ({kinds}{more}; the first is {self.first}){convert}"
        ]
