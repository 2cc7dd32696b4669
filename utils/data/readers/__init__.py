"""The data sets: a file here for each, whose `read` makes a `Catalogue` of its folder.

The folder's listing is the list of data sets; a new one needs its row in config.py's table, too.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from pathlib import Path

from utils.data.catalogue import (
    Catalogue,
    Source,
    check_complete,
    check_on_disk,
    drop_repeated,
    keep_classes,
    refuse_equal_names,
)
from utils.data.errors import DataError, describe

READERS = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def read_catalogue(
    dataset: str, root: str | Path | None, *, classes: Sequence[str] | None = None, **choices: object
) -> Catalogue:
    """List a data set.

    Args:
        dataset: one of `READERS`.
        root: the data set's folder in a layout that its reader knows, or one that holds it; unused for "demo".
        classes: patterns over class names as in a shell ("*_Gull"); keeps the classes that match any of them, in the
            data set's own order, and numbers them anew.
        choices: what a reader may have to decide, such as seed and test_fraction, see `Source`.

    Raises:
        DataError: unknown data set, missing or malformed files, a picture listed twice in different ways, two
            classes of one name, a class without pictures, a pattern without a class.
    """
    if dataset not in READERS:
        raise DataError(f"unknown data set {dataset!r}: expected one of {', '.join(READERS)}")
    try:
        catalogue = _read(Source(dataset, root, **choices))
        if classes:
            catalogue = keep_classes(catalogue, classes)
        refuse_equal_names(dataset, catalogue.class_names)
        check_complete(dataset, catalogue)
    except OSError as error:
        raise DataError(
            f"{error.filename or root} cannot be read ({describe(error)}): expected files of data set {dataset!r} there"
        ) from None
    return catalogue


def read_labelled(source: Source) -> Catalogue:
    """List every labelled picture of a data set, whatever its parts and where some are empty, too. Raises DataError."""
    try:
        catalogue = _read(source)
    except OSError as error:
        raise DataError(
            f"{error.filename or source.root} cannot be read ({describe(error)}): expected pictures"
        ) from None
    refuse_equal_names(source.dataset, catalogue.class_names)
    check_on_disk(catalogue)
    return catalogue


def _read(source: Source) -> Catalogue:
    """What a reader lists, each picture once. Raises DataError where a reader of one's own has a slip."""
    module = importlib.import_module(f"{__name__}.{source.dataset}")
    if not hasattr(module, "read"):
        raise DataError(f"{module.__file__} has no function read: it makes a Catalogue of a Source")
    return drop_repeated(module.read(source))
