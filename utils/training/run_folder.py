"""The files of a run's folder: written whole, made room for, and what a killed run has left mended."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from utils.checkpoint import CheckpointError, load_checkpoint, save_checkpoint, save_last
from utils.files import write_text
from utils.training.nonfinite import NonFiniteLossError

# What is in last.pth only
TRAINING_STATE = ("optimizer", "schedule", "progress", "skipped_steps", "found_boxes", "loss_scale")
CHECKPOINTS = ("last.pth", "next.pth", "previous.pth")
WRITTEN_BY_TRAINING = ("*.pth", "log.jsonl", "config.json", "bad_pictures.txt", "nonfinite.json")


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
    """Remove what a killed process had not finished writing; what test.py may be writing just now stays."""
    for pattern in WRITTEN_BY_TRAINING:
        for path in folder.glob(f"{pattern}*.part"):
            path.unlink(missing_ok=True)


def epoch_files(folder: Path) -> dict[int, Path]:
    """Return the `epoch-<number>.pth` of a run's folder by their numbers."""
    numbers = {path: path.stem.removeprefix("epoch-") for path in folder.glob("epoch-*.pth")}
    return {int(number): path for path, number in sorted(numbers.items()) if number.isascii() and number.isdigit()}


def drop_old_epochs(folder: Path, kept: int) -> None:
    """Keep the `epoch-<number>.pth` of the last so many epochs."""
    files = epoch_files(folder)
    for epoch in sorted(files)[:-kept]:
        files[epoch].unlink()


def save_epoch(folder: Path, content: Mapping, training_state: Mapping, *, is_best: bool, kept: int) -> None:
    """Write the checkpoints of an epoch that has ended, and keep that of each of the last `kept` epochs, too.

    last.pth comes before best.pth, which so is never ahead of what a continued run knows.
    """
    if kept:
        save_checkpoint(folder / f"epoch-{content['epoch']:03d}.pth", content)
    save_last(folder, {**content, **training_state})
    if is_best:
        save_checkpoint(folder / "best.pth", content)
    if kept:
        drop_old_epochs(folder, kept)


def complete_best(folder: Path, saved: Mapping, epoch: int) -> None:
    """Write the best.pth of an epoch anew from its last.pth, where the run was killed between the two."""
    if not _holds_epoch(folder / "best.pth", epoch):
        content = {name: value for name, value in saved.items() if name not in TRAINING_STATE}
        save_checkpoint(folder / "best.pth", content)


def _holds_epoch(path: Path, epoch: int) -> bool:
    """Tell whether a file is a whole checkpoint of that epoch."""
    try:
        return load_checkpoint(path)["epoch"] == epoch
    except (CheckpointError, KeyError):
        return False


def write_settings(folder: Path, settings: Mapping[str, object]) -> None:
    write_text(folder / "config.json", json.dumps(settings, indent=2) + "\n")


def list_bad_pictures(folder: Path, bad_pictures: Mapping[str, str]) -> Path:
    """Write which pictures are left out, and why, a line each, and return the file."""
    path = folder / "bad_pictures.txt"
    lines = [f"{picture}\t{reason}".replace("\n", "\\n") + "\n" for picture, reason in bad_pictures.items()]
    write_text(path, "".join(lines))
    return path


def recorded(folder: Path, epoch: int, error: NonFiniteLossError, *, write: bool) -> NonFiniteLossError:
    """Write what went wrong, with the images of the batch, and return an error that says so.

    `write` is False in all processes but one.
    """
    path = folder / "nonfinite.json"
    record = {"epoch": epoch, "step": error.step, "terms": error.terms, "images": error.paths}
    if write:
        write_text(path, json.dumps(record, indent=2) + "\n")
    where = f"; the images of the batch are listed in {path}" if error.paths else " (seen after its last step)"
    text = f"epoch {epoch}: {error}{where}"
    return NonFiniteLossError(text, step=error.step, terms=error.terms, paths=error.paths)
