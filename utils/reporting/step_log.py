"""What training shows within an epoch: curves by the step for TensorBoard, and lines where no bar is seen."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from torch.utils.tensorboard import SummaryWriter

from utils.files import show
from utils.reporting.metrics import EpochMeter
from utils.reporting.report_text import figures_line
from utils.reporting.runlog import add_scalars, naming_folder


class StepLog:
    """Curves `step/loss/total`, `step/accuracy/raw`, `step/learning_rate` ..., a point every so many steps of a run.

    A point is the mean over the steps since the one before, from the beginning of the epoch, or of what goes on, at
    the earliest, and over the images of this process. Their axis counts steps, not epochs: they are a run of their own
    to TensorBoard, beside the log of the run.

        step_log.begin(meter, "epoch 1/30", len(batches))  # at the beginning of each epoch
        step_log.after_step(step, learning_rate)           # after each step that is in the meter

    Args:
        folder: made at the first point, for the events.
        every: how many steps from point to point; 0: none is written.
        steps_done: steps of the run before; later points may be there, of a run that was killed: they are hidden.
        enabled: False: nothing is ever written (every process but the main one).
        of_losses: what to say of loss terms, by name, see `System.loss_descriptions`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        every: int,
        steps_done: int = 0,
        enabled: bool = True,
        of_losses: Mapping[str, str] | None = None,
    ) -> None:
        self.folder, self.every, self.of_losses = folder, every if enabled else 0, of_losses or {}
        self.begun_at = self.steps_done = steps_done
        self.writer: SummaryWriter | None = None

    def begin(self, meter: EpochMeter, description: str, steps: int) -> None:
        """Begin an epoch of so many steps, or go on in it, whose sums so far are in the meter."""
        self.meter, self.description, self.steps = meter, description, steps
        self._look_back_from_here()

    def _look_back_from_here(self) -> None:
        self.before, self.since = self.meter.copy(), time.perf_counter()

    def after_step(self, step: int, learning_rate: float, *, as_line: bool = False) -> None:
        """Write a point, if it is time, after a step of the epoch, from 1; `as_line`: print it, too.

        That waits for the device. A step that was skipped counts and is not in the figures.
        """
        self.steps_done += 1
        if self.every == 0 or self.steps_done % self.every != 0:
            return
        averages = self.meter.since(self.before).compute()
        images, seconds = averages.pop("images"), time.perf_counter() - self.since
        self._look_back_from_here()
        if images == 0:
            return
        figures = {**averages, "learning_rate": learning_rate, "images_per_second": images / seconds}
        with naming_folder(self.folder):
            if self.writer is None:
                self.writer = SummaryWriter(str(self.folder), purge_step=self.begun_at + 1)
            numbers = {f"step/{name}": value for name, value in figures.items()}
            add_scalars(self.writer, numbers, self.steps_done, self.of_losses)
        if as_line:
            show(self._line(step, figures))

    def _line(self, step: int, figures: Mapping[str, float]) -> str:
        parts = [f"{self.description}, step {step} of {self.steps}", f"loss {figures['loss/total']:.3f}"]
        return "  ".join([*parts, f"{figures['images_per_second']:.1f} images/s", figures_line(figures, "train")])

    def __enter__(self) -> StepLog:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.writer is not None:
            with contextlib.suppress(OSError) if error else naming_folder(self.folder):  # that error is the one to tell
                self.writer.close()
