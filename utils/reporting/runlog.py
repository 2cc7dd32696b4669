"""The log of a run: TensorBoard events and `log.jsonl`, one line per epoch, under the same names.

`train/loss/total`, `validation/accuracy/object`, `schedule/learning_rate`, `speed/train_images_per_second`, ...
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_SCALAR, Summary, SummaryMetadata
from tensorboard.plugins.hparams import summary_v2 as hparams
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from utils.errors import UserError
from utils.files import SavingError, write_text
from utils.text import visible

# What a curve means, by the beginning or the end of its name without the group; shown beside it in TensorBoard.
DESCRIPTIONS = {
    "loss/total": "Weighted sum of the losses being trained. It rises where warm-up ends, since more is added up.",
    "loss/": "Cross-entropy of this branch, with label_smoothing and class_weights as trained, or a further term of "
    "the system. Validation rising while training falls: overfitting.",
    "accuracy/prediction": "Share of images that the system classifies rightly (top-1).",
    "accuracy/": "Share of images that this branch alone classifies rightly (top-1).",
    "ensemble_weight/": "How much the log-probabilities of this branch weigh in the prediction (ensembling learned).",
    "exit_threshold": "How sure an image must be to skip the windows in predict.py; 1: none does.",
    "box_iou/mean": "Mean overlap of predicted and true object boxes (intersection over union).",
    "box_iou/share_at_0.5": "Share of images whose object box overlaps the true one by 0.5 or more. "
    "Falling while training: the learning rate is too high.",
    "step/learning_rate": "Learning rate of the backbone at this step.",
    "learning_rate": "Learning rate of the backbone at the beginning of the epoch.",
    "step/images_per_second": "Images a second since the point before, loading included.",
    "images_per_second": "Images a second over the whole epoch, loading included.",
    "images": "Number of images in the epoch.",
    "calibration_error": "Expected calibration error: how far the prediction's probabilities are from its accuracy.",
}

# What the table of runs (HParams) compares: (group of events within the run, curve, name of the column)
FINAL_FIGURES = (
    ("", "validation/accuracy/prediction", "validation prediction"),
    ("", "validation/box_iou/share_at_0.5", "validation boxes IoU >= 0.5"),
    ("", "validation_ema/accuracy/prediction", "validation prediction, averaged weights"),
    ("", "validation_ema/box_iou/share_at_0.5", "validation boxes IoU >= 0.5, averaged weights"),
    ("", "train/loss/total", "training loss"),
    ("", "speed/train_images_per_second", "training images/s"),
    ("test", "accuracy/prediction", "test prediction"),
    ("test", "box_iou/share_at_0.5", "test boxes IoU >= 0.5"),
)


class RunLog:
    """Writes what happens in a run into its folder.

    Args:
        folder: the run's folder, made if missing; holds the TensorBoard events and `log.jsonl`.
        resume_epoch: the last epoch whose result is kept. Later ones may be in the log, of a run killed between its
            log line and its checkpoint: they are dropped here and hidden in TensorBoard. None: a new run, which
            starts with an empty log and hides what an earlier one left in the folder.
        enabled: False: nothing is ever written (every process but the main one).
        of_losses: what to say of loss terms, by name, see `System.loss_descriptions`.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        resume_epoch: int | None = None,
        enabled: bool = True,
        of_losses: Mapping[str, str] | None = None,
    ) -> None:
        self.enabled = enabled
        self.of_losses = of_losses or {}
        if not enabled:
            return
        self.path = Path(folder) / "log.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            _drop_later_epochs(self.path, resume_epoch)
        threading.excepthook = _except_of_writers
        self.first_epoch = 0 if resume_epoch is None else resume_epoch + 1
        with naming_folder(self.path.parent):
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
        with naming_folder(self.path.parent):
            add_scalars(self.writer, numbers, epoch, self.of_losses)
            self.writer.flush()
        # one write of the whole line, on disk before the checkpoint that follows
        with naming_folder(self.path.parent), self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

    def log_pictures(self, tag: str, image: Tensor, epoch: int) -> None:
        """Show a picture, uint8 [3, H, W], under TensorBoard's Images."""
        if self.enabled:
            with naming_folder(self.path.parent):
                self.writer.add_image(tag, image, epoch)
                self.writer.flush()

    def log_settings(self, settings: str | Mapping[str, object]) -> None:
        """Show the run's settings under TensorBoard's Text: a mapping as a table, a text as Markdown.

        A mapping is also the run's row under HParams, beside its final figures.
        """
        if self.enabled:
            text = settings if isinstance(settings, str) else visible(_markdown_table(settings))
            with naming_folder(self.path.parent):
                self.writer.add_text("settings", text, self.first_epoch)
                if not isinstance(settings, str):
                    self._log_row(settings)
                self.writer.flush()

    def _log_row(self, settings: Mapping[str, object]) -> None:
        values = {name: v if isinstance(v, bool | int | float) else visible(str(v)) for name, v in settings.items()}
        columns = [hparams.HParam(name) for name in values]
        figures = [hparams.Metric(tag, group=group, display_name=name) for group, tag, name in FINAL_FIGURES]
        self.writer.file_writer.add_summary(hparams.hparams_config_pb(hparams=columns, metrics=figures))
        self.writer.file_writer.add_summary(hparams.hparams_pb(values, trial_id=self.path.parent.name))

    def close(self) -> None:
        """Write what is still waiting and close the events file."""
        if self.enabled:
            with naming_folder(self.path.parent):
                self.writer.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with contextlib.suppress(OSError) if error else contextlib.nullcontext():  # that error is the one to tell
            self.close()


@contextlib.contextmanager
def naming_folder(folder: Path) -> Iterator[None]:
    """Raise SavingError with the folder's name where writing in the block fails: a full disk's own words have none."""
    try:
        yield
    except OSError as error:
        raise SavingError(folder, error) from error


def _except_of_writers(fault: threading.ExceptHookArgs) -> None:
    """Report what ended a thread, unless it is one of TensorBoard's, which has kept it for the main thread to raise."""
    if getattr(fault.thread, "exception", None) is not fault.exc_value:
        threading.__excepthook__(fault)


EMBEDDINGS = "test"  # what an evaluation's are called in TensorBoard
EMBEDDING_FILES = ("tensors.tsv", "metadata.tsv", "sprite.png")  # that SummaryWriter.add_embedding writes


def log_evaluation(folder: str | Path, epoch: int, numbers: Mapping[str, float], **embeddings: object) -> None:
    """Write the figures of an evaluation to a folder of their own, in place of earlier ones.

    `embeddings` go to TensorBoard's projector: see `SummaryWriter.add_embedding`.
    """
    folder = Path(folder)
    threading.excepthook = _except_of_writers
    with naming_folder(folder):
        for old in (*folder.glob("events.out.tfevents.*"), *folder.glob("projector_config.pbtxt")):
            old.unlink()
        for name in EMBEDDING_FILES:  # of an epoch; whatever else lies there stays
            for old in folder.glob(f"[0-9][0-9][0-9][0-9][0-9]/{EMBEDDINGS}/{name}"):
                old.unlink()
                for place in (old.parent, old.parent.parent):
                    with contextlib.suppress(OSError):  # not empty
                        place.rmdir()
    with naming_folder(folder), SummaryWriter(str(folder)) as writer:
        add_scalars(writer, numbers, epoch, {})
        if embeddings:
            writer.add_embedding(global_step=epoch, tag=EMBEDDINGS, **embeddings)


def add_scalars(writer: SummaryWriter, numbers: Mapping[str, float], epoch: int, of_losses: Mapping[str, str]) -> None:
    """Write what SummaryWriter.add_scalar does, each with its description (`describe`)."""
    for name, value in numbers.items():
        metadata = SummaryMetadata(
            display_name=name,
            summary_description=describe(name, of_losses),
            data_class=DATA_CLASS_SCALAR,  # without it TensorBoard's fast reader drops the description
            plugin_data=SummaryMetadata.PluginData(plugin_name="scalars"),
        )
        summary = Summary(value=[Summary.Value(tag=name, simple_value=float(value), metadata=metadata)])
        writer.file_writer.add_summary(summary, epoch)
    writer.flush()


def describe(name: str, of_losses: Mapping[str, str]) -> str:
    """Return a line on what the curve of this name means, "" where nothing is known; `of_losses`: see `RunLog`."""
    group, _, term = name.rpartition("loss/")
    if group and term in of_losses:
        return of_losses[term]
    for known, description in DESCRIPTIONS.items():
        if name.endswith(known) or (known.endswith("/") and known in name):
            return description
    return ""


def _drop_later_epochs(path: Path, last_epoch: int | None) -> None:
    """Rewrite a log with the lines up to `last_epoch` (None: no line) and without a line that was cut short."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason}): move it away to go on without it") from None
    kept = []
    for line in lines:
        try:
            epoch = json.loads(line)["epoch"]
        except (ValueError, KeyError, TypeError):
            continue
        if isinstance(epoch, int) and last_epoch is not None and epoch <= last_epoch:
            kept.append(line + "\n")
    write_text(path, "".join(kept))


def _strict(value: float) -> float | int | None:
    """A number as strict JSON can hold it: JSON has neither NaN nor infinity."""
    value = value if isinstance(value, int) else float(value)
    return value if math.isfinite(value) else None


def _markdown_table(settings: Mapping[str, object]) -> str:
    rows = [f"| {name} | {str(value).replace('|', chr(92) + '|')} |" for name, value in settings.items()]
    return "\n".join(["| setting | value |", "| --- | --- |", *rows])
