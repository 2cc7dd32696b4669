"""A training run: its folder, what it goes on from, its log and its best epoch."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from networks.system import System
from utils.checkpoint import BEGIN_ANEW, fits, save_last
from utils.errors import Stopped, UserError, is_out_of_memory
from utils.files import locked
from utils.options import flat
from utils.reporting.pictures import save_png
from utils.reporting.report_text import figures_line, report_line
from utils.reporting.runlog import RunLog
from utils.reporting.step_log import StepLog
from utils.training.current_epoch import CurrentEpoch
from utils.training.distributed import any_process, is_main, print_once
from utils.training.interruption import StopRequest
from utils.training.nonfinite import NonFiniteLossError, SkipBudget
from utils.training.restoring import restore
from utils.training.resume import BEGUN_WITH, Data, as_begun, begun_with, load_resumable
from utils.training.run_folder import (
    complete_best,
    drop_half_files,
    list_bad_pictures,
    move_aside,
    recorded,
    save_epoch,
    write_settings,
)

Item = TypeVar("Item")


class Run:
    """What is in a run's folder and how far its training is; a context that keeps the folder to this process.

        with Run(folder, settings, ...) as run:  # run.saved: the checkpoint to go on from, if any
            run.attach(system, optimizer, schedule, loss_scale, average)
            run.begin(...)                       # before this, nothing is written
            for epoch in run.epochs():
                with run.epoch(epoch, loader) as current:  # a `CurrentEpoch`
                    ...
                run.finish_epoch(epoch, trained, evaluated)

    Args:
        settings: `config.Settings`, complete.
        facts: what the checkpoint says of the data: `resume.Data` by name, and selected_on.
        restore: turns the settings that a checkpoint holds into `config.Settings`.
        again: `settings` once more, with the values given to it in place of the command's.

    Inside, `settings` are those of the run: what follows from the number of epochs stays as it was begun.
    """

    def __init__(
        self,
        folder: Path,
        settings: Any,
        facts: Mapping[str, Any],
        device: torch.device,
        restore: Callable[[Mapping], Any],
        *,
        again: Callable[..., Any],
    ) -> None:
        self.folder, self.settings, self.facts, self.device = folder, settings, dict(facts), device
        self.restore, self.at_epochs = restore, lambda epochs: flat(again(epochs=epochs))
        self.stack = contextlib.ExitStack()
        self.epochs_done, self.best = 0, {"accuracy": -1.0, "epoch": 0}
        self.progress: dict[str, Any] | None = None  # what an epoch had done when the run was interrupted
        # Of a system that takes boxes: those of the pictures of `training` and of `selection`, [n, 4] each
        self.found_boxes: dict[str, Tensor] | None = None
        self.exit_threshold: dict[str, float] = {}  # of weights "plain" and "ema" as the last epoch left them

    def __enter__(self) -> Run:
        with contextlib.ExitStack() as stack:
            if is_main():
                stack.enter_context(locked(self.folder))
            self.saved = None
            if not self.settings.fresh:
                data = Data(**{name: self.facts[name] for name in Data._fields if name in self.facts})
                ours, restore = flat(self.settings), lambda saved: flat(self.restore(saved))
                self.saved = load_resumable(self.folder, ours, data, restore=restore, at_epochs=self.at_epochs)
            if self.saved is not None:
                self._take_over(flat(self.restore(self.saved["settings"])))
            used = self.saved["skipped_steps"] if self.saved else 0
            self.skipped = SkipBudget(self.settings.skip_nonfinite, used)
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> bool | None:
        return self.stack.__exit__(*exception)

    def _take_over(self, theirs: Mapping[str, Any]) -> None:
        """Keep what the run was begun with, the number of epochs included, from which settings may follow."""
        kept = as_begun(self.saved, flat(self.settings), theirs, self.at_epochs)
        own = {name: value for name, value in kept.items() if name in self.settings.options}
        shared = {name: value for name, value in kept.items() if name not in own}
        self.settings = dataclasses.replace(self.settings, **shared, options=self.settings.options | own)
        if (begun := begun_with(self.saved, theirs)) != self.settings.epochs:
            self.facts[BEGUN_WITH] = begun

    # ---- Before the first epoch -------------------------------------------------------------------------------------

    def attach(
        self,
        system: System,
        optimizer: Optimizer,
        schedule: LRScheduler,
        loss_scale: GradScaler,
        average: AveragedModel | None = None,
    ) -> None:
        """Take what learns, and bring it to where the run that goes on was. Raises CheckpointError where that fails."""
        self.system, self.optimizer, self.schedule, self.average = system, optimizer, schedule, average
        self.loss_scale = loss_scale
        saved = self.saved
        if saved is None:
            return
        with fits(self.folder / "last.pth", BEGIN_ANEW):
            restore(system, optimizer, schedule, saved)
            if loss_scale.is_enabled():
                loss_scale.load_state_dict(saved["loss_scale"])
            if average is not None:
                average.load_state_dict(saved["ema"])
        self.epochs_done, self.best, self.progress = saved["epoch"], saved["best"], saved["progress"]
        self.found_boxes = saved.get("found_boxes")
        is_best = self.best["epoch"] == self.epochs_done and self.progress is None
        if is_main() and is_best:
            complete_best(self.folder, saved, self.epochs_done)

    def begin(self, bad_pictures: Mapping[str, str]) -> None:
        """Start to write: the folder, the log, the settings; from here on Ctrl-C and SIGTERM end the run orderly."""
        self.stop = self.stack.enter_context(StopRequest())
        any_process(False, self.device)  # all have read what they begin with, which may lie in the folder
        if is_main() and self.settings.fresh and (kept := move_aside(self.folder)):
            print_once(f"the run that was in {self.folder} is now in {kept}")
        if is_main():
            drop_half_files(self.folder)
        classes, images = len(self.facts["class_names"]), self.facts["training_images"]
        print_once(f"{self.folder}: {classes} classes, {images} training images, on {self.device}")
        at = f", step {self.progress['step']} of epoch {self.progress['epoch']}" if self.progress else ""
        continuing = f"; continuing after epoch {self.epochs_done}{at}" if self.saved else ""
        print_once(f"best.pth is chosen by {self.facts['selected_on']}{continuing}")
        resumed = self.epochs_done if self.saved else None
        of_losses = self.system.loss_descriptions
        log = RunLog(self.folder, resume_epoch=resumed, enabled=is_main(), of_losses=of_losses)
        self.log = self.stack.enter_context(log)
        done = self.progress["step"] if self.progress else 0
        self.step_log = self.stack.enter_context(
            StepLog(
                self.folder / "steps",
                every=self.settings.log_every_steps,
                steps_done=self.epochs_done * self.facts["steps_per_epoch"] + done,
                enabled=is_main(),
                of_losses=of_losses,
            )
        )
        if is_main() and (self.saved is None or self._goes_further()):
            write_settings(self.folder, dataclasses.asdict(self.settings))
        if is_main() and self.saved is None:
            self.log.log_settings(flat(self.settings) | {"selected_on": self.facts["selected_on"]})
        if is_main() and bad_pictures:
            path = list_bad_pictures(self.folder, bad_pictures)
            print_once(f"{len(bad_pictures)} unreadable pictures are left out; they are listed in {path}")
        if self.saved is not None:
            self.saved = {"settings": self.saved["settings"]}  # the rest is in what learns: it need not be there twice

    def _goes_further(self) -> bool:
        """Whether the run that goes on shall end elsewhere than it was to."""
        before = self.restore(self.saved["settings"])
        return (before.epochs, before.patience) != (self.settings.epochs, self.settings.patience)

    def unless_stopped(self, batches: Iterable[Item]) -> Iterator[Item]:
        """Yield what is looked at before the first epoch, when nothing is there to save.

        Raises KeyboardInterrupt where the run was asked to stop; other processes end with this one.
        """
        for batch in batches:
            if self.stop.requested:
                raise KeyboardInterrupt
            yield batch

    # ---- One epoch --------------------------------------------------------------------------------------------------

    def epochs(self) -> Iterator[int]:
        """Yield the epochs that are left, counted from 1, until there is no gain any more.

        Raises Stopped between two of them where the run was asked to stop.
        """
        for epoch in range(self.epochs_done + 1, self.settings.epochs + 1):
            without_gain = epoch - 1 - self.best["epoch"]
            if 0 < self.settings.patience <= without_gain:
                print_once(
                    f"stopped after epoch {epoch - 1}, {without_gain} after the best one on "
                    f"{self.settings.select_on}, as patience is {self.settings.patience}"
                )
                return
            yield epoch
            if epoch < self.settings.epochs and self.stop.agree(self.device):
                raise Stopped

    @contextlib.contextmanager
    def epoch(self, epoch: int, loader: DataLoader) -> Iterator[CurrentEpoch]:
        """Begin an epoch, or go on where the run was in it; a loss in the block that is not finite is recorded."""
        self.exit_threshold = {}  # of other weights
        current = CurrentEpoch(
            epoch,
            loader,
            self.settings,
            self.system,
            self.device,
            self.stop,
            learning_rate=self.optimizer.param_groups[0]["lr"],
            progress=self.progress,
            save=self._save_within_epoch,
        )
        self.learning_rate = current.learning_rate
        try:
            yield current
        except NonFiniteLossError as error:
            raise recorded(self.folder, epoch, error, write=is_main()) from None
        self.progress = None

    def _save_within_epoch(self, progress: dict[str, Any]) -> None:
        save_last(self.folder, self.content(progress["epoch"] - 1) | self.training_state(progress))

    # ---- After an epoch ---------------------------------------------------------------------------------------------

    def finish_epoch(
        self,
        epoch: int,
        trained: dict[str, float],
        evaluated: dict[str, float],
        evaluated_average: dict[str, float] | None = None,
    ) -> None:
        """Log the epoch's figures and save.

        The best epoch is that of the average's best figures, where there is an average.
        """
        prefix = self.settings.select_on
        speed = {"train": trained.pop("images_per_second"), prefix: evaluated.pop("images_per_second")}
        print_once(report_line(epoch, self.settings.epochs, trained, evaluated, speed["train"], prefix))
        if evaluated_average is not None:
            del evaluated_average["images_per_second"]
            print_once(f"  averaged weights  {figures_line(evaluated_average, prefix)}")
        groups = {
            "train": trained,
            prefix: evaluated,
            "schedule": {"learning_rate": self.learning_rate},
            "speed": {f"{split}_images_per_second": value for split, value in speed.items()},
        }
        if evaluated_average is not None:
            groups[f"{prefix}_ema"] = evaluated_average
        self.log.log_epoch(epoch, groups)
        self.exit_threshold = {
            weights: figures["exit_threshold"]
            for weights, figures in {"plain": evaluated, "ema": evaluated_average or {}}.items()
            if "exit_threshold" in figures
        }
        chosen_by = evaluated if evaluated_average is None else evaluated_average
        self._save_epoch(epoch, chosen_by["accuracy/prediction"])

    def wants_pictures(self, epoch: int) -> bool:
        every = self.settings.pictures_every
        return is_main() and every > 0 and (epoch in (1, self.settings.epochs) or epoch % every == 0)

    @contextlib.contextmanager
    def pictures(self, epoch: int) -> Iterator[None]:
        """Draw in the block, after the epoch is saved: what cannot be drawn costs no epoch and ends no run."""
        try:
            yield
        except (UserError, OSError, RuntimeError, MemoryError) as error:
            if not isinstance(error, (UserError, OSError)) and not is_out_of_memory(error):
                raise
            print(f"warning: the pictures of epoch {epoch} are left out: {error}", file=sys.stderr, flush=True)

    def show_pictures(self, epoch: int, panel: Tensor) -> None:
        self.log.log_pictures(f"{self.settings.select_on}/localization", panel, epoch)
        save_png(self.folder / "pictures" / f"epoch-{epoch:03d}.png", panel)

    def _save_epoch(self, epoch: int, accuracy: float) -> None:
        is_best = accuracy > self.best["accuracy"]
        if is_best:
            self.best = {"accuracy": accuracy, "epoch": epoch}
        if is_main():
            kept = self.settings.keep_checkpoints
            save_epoch(self.folder, self.content(epoch), self.training_state(None), is_best=is_best, kept=kept)

    def content(self, epochs_done: int) -> dict[str, object]:
        """Return what every checkpoint holds."""
        return {
            "settings": dataclasses.asdict(self.settings),
            **self.facts,
            "epoch": epochs_done,
            "best": self.best,
            "network": self.system.state_dict(),
            **({} if self.average is None else {"ema": self.average.state_dict()}),
            **({"exit_threshold": self.exit_threshold} if self.exit_threshold else {}),
        }

    def training_state(self, progress: dict[str, object] | None) -> dict[str, object]:
        """Return what only last.pth holds; `progress`: what an epoch has done so far, None between two epochs."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "progress": progress,
            "skipped_steps": self.skipped.used,
            **({} if self.found_boxes is None else {"found_boxes": self.found_boxes}),
            **({"loss_scale": self.loss_scale.state_dict()} if self.loss_scale.is_enabled() else {}),
        }
