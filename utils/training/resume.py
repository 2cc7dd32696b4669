"""Going on with a run: what it goes on from, and whether it is the same run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from utils.checkpoint import BEGIN_ANEW, CheckpointError, load_last, load_to_continue
from utils.data.record import difference, differing_names, unpack
from utils.older_runs import UnknownSettingsError
from utils.options import SettingsError, shown
from utils.shared_settings import OF_THE_MACHINE
from utils.training.distributed import gather, is_main, world_size
from utils.training.run_folder import epoch_files
from utils.training.schedule import spreads_over_epochs

# These may differ when a run is continued: they do not change what is computed
FREE_ON_RESUME = OF_THE_MACHINE | {
    *("save_every_steps", "on_bad_image", "skip_nonfinite", "fresh", "exit_threshold"),
    "patience",  # how far, not how: one that stopped goes on with more
    *("class_level", "labels", "validation_labels", "test_labels", "image_column", "label_column", "split_column"),
    # (what these make of the data is compared, not how it was asked for)
}
BEGUN_WITH = "begun_with_epochs"  # in checkpoints of a run that has gone on with another number of them


class Data(NamedTuple):
    """What a run is told of its data: it goes on only with the same."""

    class_names: Sequence[str]
    training_images: int
    steps_per_epoch: int
    pictures: Tensor | None = None  # `utils.data.record.pack` of them


def load_resumable(
    folder: Path,
    settings: Mapping[str, object],
    data: Data,
    *,
    restore: Callable[[Mapping], Mapping[str, object]],
    at_epochs: Callable[[int], Mapping[str, object]] | None = None,
) -> dict | None:
    """Return the run's last checkpoint, or None for a new run; every process has to ask.

    `settings`, and what `restore` makes of those that a checkpoint of any version holds, are by name. Raises
    CheckpointError for one of other settings (but `FREE_ON_RESUME`, another number of epochs where the schedule does
    not look at it, and with it what is `as_begun`), classes or images, where the folder holds a run that cannot be gone
    on with, and where the processes would not go on from the same.
    """
    found = load_last(folder, set_aside=is_main(), load=load_to_continue)
    if found is None:
        saved = None
        _refuse_remains(folder)
    else:
        path, saved = found
        _refuse_other_settings(path, saved, settings, restore, at_epochs)
        _refuse_other_data(path, saved, data)
    positions = gather(None if saved is None else (saved["epoch"], (saved["progress"] or {"step": 0})["step"]))
    if any(position != positions[0] for position in positions):
        raise CheckpointError(
            f"the processes find different checkpoints in {folder} (epoch and step: {positions}): checkpoint_dir has "
            "to be on a disk that all machines share"
        )
    return saved


REMEDY = "give this one a --name of its own, or start anew with --fresh"


def _refuse_remains(folder: Path) -> None:
    """A run without last.pth would begin anew and replace what is left of the former one."""
    left = [path for path in (folder / "best.pth", *epoch_files(folder).values()) if path.exists()]
    if left:
        raise CheckpointError(
            f"{folder} holds {left[0].name} of a run, but neither its last.pth nor its previous.pth to go on from: put "
            f"one back, {REMEDY}, which moves what is there aside"
        )


def _refuse_other_settings(
    path: Path,
    saved: Mapping,
    ours: Mapping[str, object],
    restore: Callable[[Mapping], Mapping[str, object]],
    at_epochs: Callable[[int], Mapping[str, object]] | None,
) -> None:
    try:
        theirs = restore(saved["settings"])
    except UnknownSettingsError as error:
        raise CheckpointError(f"{path} has {error}: {BEGIN_ANEW}") from None
    ours = {**ours, **as_begun(saved, ours, theirs, at_epochs)}
    differing = _differing(ours, theirs)
    if differing == ["epochs"]:
        _refuse_other_epochs(path, saved, theirs, ours)
    elif differing:
        values = ", ".join(f"{n} {shown(theirs.get(n))} there and {shown(ours.get(n))} here" for n in differing)
        raise CheckpointError(f"{path} is of a run with other settings ({values}): go on with those it has, {REMEDY}")


def _differing(ours: Mapping[str, object], theirs: Mapping[str, object]) -> list[str]:
    names = dict.fromkeys([*ours, *theirs])
    return [name for name in names if name not in FREE_ON_RESUME and ours.get(name) != theirs.get(name)]


def as_begun(
    saved: Mapping,
    ours: Mapping[str, object],
    theirs: Mapping[str, object],
    at_epochs: Callable[[int], Mapping[str, object]] | None,
) -> dict[str, object]:
    """Return what a run keeps of `theirs`: settings that follow from the number of epochs that it was begun with.

    `at_epochs` gives the settings of today's command with another number of epochs: what follows from that is equal.
    """
    differing = [name for name in _differing(ours, theirs) if name != "epochs"]
    epochs = begun_with(saved, theirs)
    if at_epochs is None or not differing or epochs == ours["epochs"]:
        return {}
    try:
        before = at_epochs(epochs)
    except SettingsError:  # one was given that only today's number allows
        return {}
    return {name: theirs[name] for name in differing if name in theirs and before.get(name) == theirs[name]}


def begun_with(saved: Mapping, theirs: Mapping[str, object]) -> object:
    """The number of epochs that a run was begun with."""
    return saved.get(BEGUN_WITH, theirs["epochs"])


def _refuse_other_data(path: Path, saved: Mapping, data: Data) -> None:
    if saved["class_names"] != list(data.class_names):
        raise CheckpointError(
            f"{path} was trained on {len(saved['class_names'])} classes and the data has {len(data.class_names)}"
            f" ({differing_names(saved['class_names'], data.class_names)}): restore the data, {REMEDY}"
        )
    if data.pictures is not None and "pictures" in saved and not torch.equal(saved["pictures"], data.pictures):
        try:
            differing = difference(unpack(saved["pictures"]), unpack(data.pictures))
        except ValueError as error:
            raise CheckpointError(f"{path} is no checkpoint to go on from ({error} in it): {REMEDY}") from None
        if differing is not None:
            raise CheckpointError(
                f"{path} was trained on other pictures than the data has now ({differing}): restore the data, {REMEDY}"
            )
    if saved["training_images"] != data.training_images:
        raise CheckpointError(
            f"{path} was trained on {saved['training_images']} images and the data now has {data.training_images} for "
            f"training: restore the data, {REMEDY}"
        )
    if saved["steps_per_epoch"] != data.steps_per_epoch:
        raise CheckpointError(
            f"{path} is of a run with {saved['steps_per_epoch']} steps in an epoch, and {world_size()} processes make "
            f"it {data.steps_per_epoch}: use as many processes as before, or {REMEDY}"
        )


def _refuse_other_epochs(path: Path, saved: Mapping, theirs: Mapping[str, object], ours: Mapping[str, object]) -> None:
    begun = saved["progress"]["epoch"] if saved["progress"] else saved["epoch"]
    if spreads_over_epochs(theirs["schedule"]):
        raise CheckpointError(
            f"{path} is of a run of {theirs['epochs']} epochs whose schedule {theirs['schedule']} spreads over all of "
            f"them, and epochs is {ours['epochs']} here (with steps or exponential it could go on): leave epochs as it "
            f"was, {REMEDY}"
        )
    if ours["epochs"] < begun:
        raise CheckpointError(f"{path} is in epoch {begun}, and epochs is {ours['epochs']} here: take more, {REMEDY}")
