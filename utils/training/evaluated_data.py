"""The data that a checkpoint is evaluated on, read as its settings say; `utils.data.evaluated` chooses among them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from utils.checkpoint import CheckpointError
from utils.data.catalogue import Catalogue, Entry
from utils.data.errors import DataError
from utils.data.evaluated import Evaluated, Labelled, choose_evaluated
from utils.data.folders import check_root
from utils.data.record import differing_names, unpack
from utils.options import SettingsError
from utils.training.building import Trained


class Readers(NamedTuple):
    """The functions of `datasets` of these names; each takes a run's settings."""

    load_catalogue: Callable[..., tuple[Catalogue, dict[str, str]]]
    load_labelled: Callable[[Any], Labelled]
    choose_split: Callable[[Any, Catalogue], tuple[list[Entry], list[Entry], str]]


def find_data(
    trained: Trained,
    checkpoint: Path,
    readers: Readers,
    *,
    asked: bool = False,
    with_labels: bool = False,
    include_trained: bool = False,
) -> Evaluated:
    """Return what to evaluate a run's checkpoint on: its own test images, or the data that were `asked` for.

    `with_labels`: the table of these was given, too; else it is one that lies with them.

    Raises DataError where these cannot be read, CheckpointError where they have other classes.
    """
    settings, saved = trained.settings, trained.saved
    try:
        record = unpack(saved["pictures"]) if "pictures" in saved else None
    except ValueError as error:
        raise CheckpointError(f"{checkpoint} is refused: there is {error} in it") from None
    own = None
    if not (asked and settings.dataset == "demo"):
        # unreadable pictures of all parts are left out where they may be, or where their number tells the run's data
        all_parts = record is None or settings.on_bad_image == "skip"
        try:
            own, _ = readers.load_catalogue(settings, parts=None if all_parts else ("test",))
        except DataError:
            if not asked:
                raise
    if record is None and not asked and list(own.class_names) != saved["class_names"]:
        raise CheckpointError(
            f"{checkpoint} knows {len(saved['class_names'])} classes and the data in {settings.data_root} has "
            f"{len(own.class_names)} ({differing_names(saved['class_names'], own.class_names)}): give the --data_root "
            "of the pictures to evaluate"
        )
    return choose_evaluated(
        saved["class_names"],
        record,
        own,
        lambda: readers.load_labelled(settings if with_labels or not asked else _for_other_pictures(settings)),
        selected_on_test=settings.select_on == "test",
        include_trained=include_trained,
        asked=asked,
        as_many=record is not None or own is None or _has_as_many(settings, saved, own, readers),
    )


def _for_other_pictures(settings: Any) -> Any:
    """Return the settings with those of the run's tables that lie among the pictures.

    Others would know pictures of the names of the run's. Raises DataError without the folder.
    """
    root, tables = check_root(settings.dataset, settings.data_root).resolve(), {}
    for name in ("labels", "validation_labels", "test_labels"):
        given = getattr(settings, name)
        if given is not None:
            below = (root / given).resolve()
            tables[name] = str(below) if below.is_file() and below.is_relative_to(root) else None
    return dataclasses.replace(settings, **tables)


def _has_as_many(settings: Any, saved: Mapping[str, Any], own: Catalogue, readers: Readers) -> bool:
    """Whether the data have as many images to train on and to select by as a run of an older version had."""
    try:
        training, selection, _ = readers.choose_split(settings, own)
    except DataError:
        return False
    selected = re.search(r"\d+", saved["selected_on"])
    known = (saved.get("training_images"), selected and int(selected[0]))
    return known == (len(training), len(selection))


def validation_images(settings: Any, data: Evaluated, readers: Readers, needed_for: str) -> tuple[list[Entry], str]:
    """Return the images that chose a run's best epoch, and which these are in words.

    Raises SettingsError, with the flag of test.py that they are `needed_for`, where there are none.
    """
    if settings.select_on == "test":
        raise SettingsError(
            f"{needed_for} needs validation images, and this run trained on all training images (select_on is test)"
        )
    if not data.own:
        raise SettingsError(
            f"{needed_for} needs the run's own validation images, and these are other data: leave it out"
        )
    if data.selection is None:  # of an older version, which did not keep them
        _, entries, name = readers.choose_split(settings, readers.load_catalogue(settings)[0])
        return entries, name
    entries = data.selection()
    if not entries:
        raise SettingsError(f"{needed_for} needs the run's validation images, and none of them is left in the data")
    return entries, f"{len(entries)} validation images of the run"
