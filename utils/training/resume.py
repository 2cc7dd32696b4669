"""Going on with a run: what is in its folder, whether it is the same run, and making room for a new one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from utils.checkpoint import CheckpointError, has, load_checkpoint, load_last
from utils.older_runs import UnknownSettingsError
from utils.training.distributed import gather, is_main, world_size
from utils.training.schedule import spreads_over_epochs

# What is in last.pth only, and in every checkpoint
TRAINING_STATE = {"optimizer": dict, "schedule": dict, "progress": dict | None, "skipped_steps": int}
CONTENT = {
    **{"settings": dict, "class_names": list, "training_images": int, "steps_per_epoch": int},
    **{"epoch": int, "best": dict, "network": dict},
}
# These may differ when a run is continued: they change where and how it is computed, not what.
FREE_ON_RESUME = {
    *("data_root", "checkpoint_dir", "device", "data_parallel", "workers", "prefetch", "cache", "pictures_every"),
    *("save_every_steps", "keep_checkpoints", "on_bad_image", "skip_nonfinite", "fresh", "exit_threshold"),
    "patience",  # how far, not how: one that stopped goes on with more
}
CHECKPOINTS = ("last.pth", "next.pth", "previous.pth")


def load_resumable(
    folder: Path,
    settings: Mapping[str, object],
    *,
    restore: Callable[[Mapping], Mapping[str, object]],
    class_names: Sequence[str],
    training_images: int,
    steps_per_epoch: int,
) -> dict | None:
    """Return the run's last checkpoint, or None for a new run; every process has to ask.

    `settings`, and what `restore` makes of those that a checkpoint of any version holds, are by name. Raises
    CheckpointError for one of other settings (but `FREE_ON_RESUME`, and another number of epochs where the schedule
    does not look at it), classes or images, and where the processes would not go on from the same.
    """
    found = load_last(folder, set_aside=is_main())
    if found is None:
        saved = None
    else:
        path, saved = found
        _refuse_another_run(path, saved, settings, restore, class_names, training_images, steps_per_epoch)
    positions = gather(None if saved is None else (saved["epoch"], (saved["progress"] or {"step": 0})["step"]))
    if any(position != positions[0] for position in positions):
        raise CheckpointError(
            f"the processes find different checkpoints in {folder} (epoch and step: {positions}): checkpoint_dir has "
            "to be on a disk that all machines share"
        )
    return saved


def _refuse_another_run(
    path: Path,
    saved: Mapping,
    ours: Mapping[str, object],
    restore: Callable[[Mapping], Mapping[str, object]],
    class_names: Sequence[str],
    training_images: int,
    steps_per_epoch: int,
) -> None:
    if not has(saved, CONTENT | TRAINING_STATE):
        raise CheckpointError(f"{path} is no checkpoint to go on from: move it away, or start anew with --fresh")
    try:
        theirs = restore(saved["settings"])
    except UnknownSettingsError as error:
        raise CheckpointError(f"{path} has {error}: move it away, or start anew with --fresh") from None
    names = dict.fromkeys([*ours, *theirs])
    differing = [name for name in names if name not in FREE_ON_RESUME and ours.get(name) != theirs.get(name)]
    remedy = "give this one a --name of its own, or start anew with --fresh"
    if differing == ["epochs"]:
        _refuse_other_epochs(path, saved, theirs, ours, remedy)
    elif differing:
        values = ", ".join(f"{name} {theirs.get(name)!r} there and {ours.get(name)!r} here" for name in differing)
        raise CheckpointError(f"{path} is of a run with other settings ({values}): go on with those it has, {remedy}")
    if saved["class_names"] != list(class_names):
        raise CheckpointError(
            f"{path} was trained on {len(saved['class_names'])} classes and the data has {len(class_names)}, or "
            f"others: {remedy}"
        )
    if saved["training_images"] != training_images:
        raise CheckpointError(
            f"{path} was trained on {saved['training_images']} images and the data now has {training_images} for "
            f"training: {remedy}"
        )
    if saved["steps_per_epoch"] != steps_per_epoch:
        raise CheckpointError(
            f"{path} is of a run with {saved['steps_per_epoch']} steps in an epoch, and {world_size()} processes make "
            f"it {steps_per_epoch}: use as many processes as before, or {remedy}"
        )


def _refuse_other_epochs(
    path: Path, saved: Mapping, theirs: Mapping[str, object], ours: Mapping[str, object], remedy: str
) -> None:
    begun = saved["progress"]["epoch"] if saved["progress"] else saved["epoch"]
    if spreads_over_epochs(theirs["schedule"]):
        raise CheckpointError(
            f"{path} is of a run of {theirs['epochs']} epochs whose schedule {theirs['schedule']} spreads over all of "
            f"them, and {ours['epochs']} came (with steps or exponential it could go on): leave epochs as it was, "
            f"{remedy}"
        )
    if ours["epochs"] < begun:
        raise CheckpointError(f"{path} is in epoch {begun}, and epochs is {ours['epochs']} here: take more, {remedy}")


def holds_epoch(path: Path, epoch: int) -> bool:
    """Tell whether a file is a whole checkpoint of that epoch."""
    try:
        return load_checkpoint(path)["epoch"] == epoch
    except (CheckpointError, KeyError):
        return False


def move_aside(folder: Path) -> Path | None:
    """Move what is in a run's folder to a new one beside it, and return that; None where there was nothing."""
    # First what a run would go on from: if this is cut short, nobody takes what is left for a run.
    files = sorted(folder.iterdir(), key=lambda path: path.name not in CHECKPOINTS)
    if not files:
        return None
    number = 1
    while (kept := folder.with_name(f"{folder.name}.old{number}")).exists():
        number += 1
    kept.mkdir()
    for file in files:
        file.rename(kept / file.name)
    return kept


def drop_half_files(folder: Path) -> None:
    """Remove what a killed process had not finished writing."""
    for path in folder.glob("*.part"):
        path.unlink(missing_ok=True)


def drop_old_epochs(folder: Path, kept: int) -> None:
    """Keep the `epoch-*.pth` of the last so many epochs."""
    epochs = {int(path.stem.removeprefix("epoch-")): path for path in folder.glob("epoch-*.pth")}
    for epoch in sorted(epochs)[:-kept]:
        epochs[epoch].unlink()
