"""The log of a run: TensorBoard events and `log.jsonl`, one line per epoch, under the same names.

`train/loss/total`, `validation/accuracy/object`, `schedule/learning_rate`, `speed/images_per_second`, ...
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from utils.files import SavingError, write_text


class RunLog:
    """Writes what happens in a run into its folder.

    Args:
        folder: the run's folder, made if missing; holds the TensorBoard events and `log.jsonl`.
        resume_epoch: the last epoch whose result is kept. Later ones may be in the log, of a run killed between its
            log line and its checkpoint: they are dropped here and hidden in TensorBoard. None: a new run, which
            starts with an empty log and hides what an earlier one left in the folder.
        enabled: False: nothing is ever written (every process but the main one).
    """

    def __init__(self, folder: str | Path, *, resume_epoch: int | None = None, enabled: bool = True) -> None:
        self.enabled = enabled
        if not enabled:
            return
        self.path = Path(folder) / "log.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            _drop_later_epochs(self.path, resume_epoch)
        self.first_epoch = 0 if resume_epoch is None else resume_epoch + 1
        with self._saying_where():
            self.writer = SummaryWriter(str(folder), purge_step=self.first_epoch)

    def log_epoch(self, epoch: int, groups: Mapping[str, Mapping[str, float]]) -> None:
        """Write an epoch's numbers: one point per curve and one JSON line.

        `groups` holds the numbers by group: {"train": {"loss/total": 1.5}} is the curve `train/loss/total`. Numbers
        that are not finite are null in the JSON line.
        """
        if not self.enabled:
            return
        numbers = {f"{group}/{name}": value for group, values in groups.items() for name, value in values.items()}
        line = json.dumps({"epoch": epoch} | {name: _strict(value) for name, value in numbers.items()}, allow_nan=False)
        with self._saying_where():
            for name, value in numbers.items():
                self.writer.add_scalar(name, value, epoch)
            self.writer.flush()
        # one write of the whole line, on disk before the checkpoint that follows
        with self._saying_where(), self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

    def log_pictures(self, tag: str, image: Tensor, epoch: int) -> None:
        """Show a picture, uint8 [3, H, W], under TensorBoard's Images."""
        if self.enabled:
            with self._saying_where():
                self.writer.add_image(tag, image, epoch)
                self.writer.flush()

    def log_settings(self, settings: str | Mapping[str, object]) -> None:
        """Show the run's settings under TensorBoard's Text: a mapping as a table, a text as Markdown."""
        if self.enabled:
            text = settings if isinstance(settings, str) else _markdown_table(settings)
            with self._saying_where():
                self.writer.add_text("settings", text, self.first_epoch)
                self.writer.flush()

    def close(self) -> None:
        """Write what is still waiting and close the events file."""
        if self.enabled:
            with self._saying_where():
                self.writer.close()

    @contextlib.contextmanager
    def _saying_where(self) -> Iterator[None]:
        """A full disk's own words name no file."""
        try:
            yield
        except OSError as error:
            raise SavingError(self.path.parent, error.strerror or str(error)) from error

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with contextlib.suppress(OSError) if error else contextlib.nullcontext():  # that error is the one to tell
            self.close()


def _drop_later_epochs(path: Path, last_epoch: int | None) -> None:
    """Rewrite a log with the lines up to `last_epoch` (None: no line) and without a line that was cut short."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            epoch = json.loads(line)["epoch"]
        except (ValueError, KeyError, TypeError):
            continue
        if last_epoch is not None and epoch <= last_epoch:
            kept.append(line + "\n")
    write_text(path, "".join(kept))


def _strict(value: float) -> float | int | None:
    """A number as strict JSON can hold it: JSON has neither NaN nor infinity."""
    value = value if isinstance(value, int) else float(value)
    return value if math.isfinite(value) else None


def _markdown_table(settings: Mapping[str, object]) -> str:
    rows = [f"| {name} | {str(value).replace('|', chr(92) + '|')} |" for name, value in settings.items()]
    return "\n".join(["| setting | value |", "| --- | --- |", *rows])
