"""How far an epoch of a run is, and what happens between its steps: random numbers, stopping, saving."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from networks.outputs import NetworkOutput
from networks.system import System
from utils.errors import Stopped
from utils.reporting.metrics import EpochMeter
from utils.training.distributed import any_process, gather, is_main, rank, world_size
from utils.training.interruption import StopRequest
from utils.training.nonfinite import check_weights, steps_between_readings
from utils.training.seeding import seed_everything


class CurrentEpoch:
    """An epoch that begins, or goes on where it was left; its methods are the callbacks of training and evaluation.

    Args:
        number: of the epoch, from 1.
        settings: `config.Settings` of the run.
        learning_rate: that of its first step, for the log.
        progress: what the epoch had done when the run was interrupted (see `progress_at`); None: it begins.
        save: writes a checkpoint with such a progress.

    `meter` has the figures so far, `steps_done` steps are in them, of `steps`.
    """

    def __init__(
        self,
        number: int,
        loader: DataLoader,
        settings: Any,
        system: System,
        device: torch.device,
        stop: StopRequest,
        *,
        learning_rate: float,
        progress: dict[str, Any] | None,
        save: Callable[[dict[str, Any]], None],
    ) -> None:
        self.number, self.settings, self.system, self.device, self.stop = number, settings, system, device, stop
        self.steps, self.learning_rate, self.write = len(loader), learning_rate, save
        self.meter, self.steps_done = EpochMeter(device), 0
        if progress is not None:
            self.steps_done, self.learning_rate = progress["step"], progress["learning_rate"]
            if is_main():  # it holds the sums of all processes
                self.meter.load_state_dict(progress["meter"])
        loader.sampler.set_epoch(number, start=self.steps_done * loader.batch_size)

    def progress_at(self, step: int) -> dict[str, Any]:
        """Return what a checkpoint after a step says of the epoch."""
        progress = {"epoch": self.number, "learning_rate": self.learning_rate, "step": step}
        return progress | {"meter": self.meter.state_dict()}

    def before_step(self, step: int) -> None:
        """Seed all that is random in a step."""
        seed_everything(self.settings.seed, self.number, step, rank())

    def before_evaluation(self, loader: DataLoader) -> None:
        """Seed what is random in one, which so is the same where a run stopped in it goes on."""
        self.before_step(self.steps + 1)
        self.evaluated, self.to_evaluate, self.all_evaluate = 0, len(loader), min(gather(len(loader)))

    def save_after(self, step: int) -> bool:
        """Whether to save after a step: several processes agree, for which they wait for each other, now and then."""
        asked = self._asks_at(step) and self.stop.agree(self.device)
        every = self.settings.save_every_steps
        return asked or (every > 0 and step % every == 0 and step < self.steps)

    def _asks_at(self, number: int) -> bool:
        """Whether the processes ask each other after so many batches if they are to stop."""
        return world_size() == 1 or number % steps_between_readings(self.device) == 0

    def save(self, step: int) -> None:
        """Write a checkpoint within the epoch. Raises Stopped where the run was asked to stop."""
        progress = self.progress_at(step)
        if is_main():
            self.write(progress)
        if self.stop.agreed:
            any_process(False, self.device)  # torchrun ends all when one has ended: wait for the one that saves
            raise Stopped

    def after_evaluation_batch(self, batch: object, output: NetworkOutput, prediction: Tensor) -> None:
        """Stop where that was asked for, but not on weights that the last step has broken: the end will report that.

        Processes agree after batches that all of them have; there may be two evaluations, the second of averages.
        """
        self.evaluated = self.evaluated % self.to_evaluate + 1
        if self.evaluated > self.all_evaluate or not self._asks_at(self.evaluated) or not self.stop.agree(self.device):
            return
        if not any_process(not prediction.isfinite().all(), self.device):
            check_weights(self.system, self.steps)
            self.save(self.steps)
