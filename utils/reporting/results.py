"""What a network predicted, image by image: collected while it is evaluated, written as a table, and read back."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy
import torch
from torch import Tensor

from networks.outputs import NetworkOutput
from utils.errors import UserError
from utils.files import atomic_write, write_text
from utils.reporting.confusions import (
    classes_with_images,
    confusion_matrix,
    mean_per_class_accuracy,
    worst_confusions,
)
from utils.reporting.metrics import calibration, inclusive_to_edges, paired_box_iou, topk_correct, wilson_interval
from utils.text import cell, one_line


class ResultCollector:
    """Collects, batch by batch, what each branch predicted; pass it to `utils.training.engine.evaluate` as `on_batch`.

    Args:
        input_size: side of the picture that object boxes are in pixels of.
        leave_out: branches that are not reported.
        keep_logits: keep the logits of every image, for `write_logits`.
    """

    def __init__(self, input_size: int, leave_out: Sequence[str] = (), *, keep_logits: bool = False) -> None:
        self.input_size = input_size
        self.leave_out = leave_out
        self.keep_logits = keep_logits
        self.paths: list[str] = []
        self._batches: dict[str, list[Tensor]] = {}
        self._logits: dict[str, list[Tensor]] = {}

    def __call__(self, batch, output: NetworkOutput, prediction: Tensor) -> None:
        labels = batch.labels.to(prediction.device, non_blocking=True)
        predictions = prediction.argmax(dim=1)  # not of the probabilities, which may be equal where logits are not
        probabilities = prediction.float().softmax(dim=1).gather(1, predictions[:, None]).squeeze(1)
        values = {"label": labels, "prediction": predictions, "probability": probabilities}
        finite = torch.ones_like(labels, dtype=torch.bool)
        for name, logits in {"prediction": prediction, **output.logits}.items():
            if name in self.leave_out:
                continue
            logits = logits.mean(dim=1) if logits.ndim == 3 else logits
            finite = finite & logits.isfinite().all(dim=1)
            values[f"top1/{name}"] = topk_correct(logits, labels, 1)
            values[f"top5/{name}"] = topk_correct(logits, labels, 5)
            if self.keep_logits:
                self._logits.setdefault(name, []).append(logits.float().cpu())  # they may be too many for a GPU
        if output.object_boxes is not None:
            true_boxes = torch.full((len(labels), 4), torch.nan) if batch.boxes is None else batch.boxes
            true_boxes = true_boxes.to(prediction.device, non_blocking=True)
            scale = self.input_size / batch.images.shape[-1]
            values["box_iou"] = paired_box_iou(inclusive_to_edges(output.object_boxes), true_boxes * scale)
        if output.unsure is not None:
            values["exited"] = ~output.unsure
        for name, value in (values | {"finite": finite}).items():
            self._batches.setdefault(name, []).append(value)
        self.paths += batch.paths

    def check_finite(self) -> None:
        """Raise UserError where logits are not finite, of which no figure would be right."""
        finite = torch.cat(self._batches["finite"])
        refuse_nonfinite(finite, self.paths, "try --precision float32, or an earlier checkpoint")

    def values(self) -> dict[str, Tensor]:
        """Return [images] tensors: label, prediction, probability, `top1/<branch>`, `top5/<branch>`, box_iou, exited.

        box_iou is NaN for an image without a true box, and left out where none has one; exited is left out where no
        image may exit early.
        """
        values = {name: torch.cat(batches).cpu() for name, batches in self._batches.items()}
        if "box_iou" in values and values["box_iou"].isnan().all():
            del values["box_iou"]
        return values

    def overlaps(self) -> Tensor | None:
        """Return the overlap of predicted and true boxes of those images that have a true one; None where none has."""
        values = self.values().get("box_iou")
        return None if values is None else values[values.isfinite()]

    def report(self, class_names: Sequence[str]) -> dict[str, object]:
        """Return accuracies with 95 % intervals, and the prediction's confusions and calibration."""
        values = self.values()
        matrix = confusion_matrix(values["prediction"], values["label"], len(class_names))
        total = len(self.paths)
        branches = {}
        for name in (name.removeprefix("top1/") for name in values if name.startswith("top1/")):
            top1, top5 = (int(values[f"top{k}/{name}"].sum()) for k in (1, 5))
            branches[name] = {
                "top1": top1 / total,
                "top1_interval_95": wilson_interval(top1, total),
                "top5": top5 / total,
                "top5_interval_95": wilson_interval(top5, total),
            }
        return {
            "images": total,
            "exited": int(values["exited"].sum()) if "exited" in values else None,
            "branches": branches,
            "mean_per_class_accuracy": mean_per_class_accuracy(matrix),
            "classes": len(class_names),
            "classes_with_images": classes_with_images(matrix),
            "worst_confusions": worst_confusions(matrix, class_names),
            "calibration": calibration(values["probability"], values["top1/prediction"]),
        }

    def surest_mistakes(self, count: int = 24) -> list[tuple[int, int, float]]:
        """Return the positions of wrong predictions, those with the highest probability first, with class and that."""
        values = self.values()
        wrong = (~values["top1/prediction"]).nonzero().flatten()
        order = values["probability"][wrong].argsort(descending=True, stable=True)
        chosen = wrong[order[:count]]
        columns = (chosen, values["prediction"][chosen], values["probability"][chosen])
        return list(zip(*(column.tolist() for column in columns), strict=True))

    def write(self, path: Path, class_names: Sequence[str]) -> None:
        """Write one line per image: picture, names, the probability, 1 or 0 per branch, overlap of boxes."""
        values = self.values()
        branches = [name for name in values if name.startswith("top1/")]
        text = io.StringIO(newline="")
        table = csv.writer(text, lineterminator="\n")
        overlap = ["box_iou"] if "box_iou" in values else []
        named = [name.removeprefix("top1/") for name in branches]
        named[named.index("prediction")] = "correct"  # `prediction` is the class
        table.writerow(["picture", "label", "prediction", "probability", *named, *overlap])
        for index, picture in enumerate(self.paths):
            row = [cell(picture), *(cell(class_names[values[name][index]]) for name in ("label", "prediction"))]
            row.append(f"{values['probability'][index]:.6f}")
            row += [int(values[name][index]) for name in branches]
            row += ["" if values[name][index].isnan() else f"{values[name][index]:.4f}" for name in overlap]
            table.writerow(row)
        write_text(path, text.getvalue())

    def write_logits(self, path: Path, class_names: Sequence[str]) -> None:
        """Write, for `numpy.load`, `pictures`, `labels` [images], `class_names`, and each branch's [images, classes].

        Branches, windows their mean, and `prediction` are float32. Only where `keep_logits`.
        """
        logits = {name: torch.cat(batches).numpy() for name, batches in self._logits.items()}
        about = {"pictures": self.paths, "labels": self.values()["label"].numpy(), "class_names": class_names}
        with atomic_write(path) as file:
            numpy.savez(file, **{name: numpy.asarray(value) for name, value in (about | logits).items()})


def refuse_nonfinite(finite: Tensor, paths: Sequence[str], what_to_do: str) -> None:
    """Raise UserError unless all of `finite` [images] hold: whether the logits of the images are."""
    first = finite.logical_not().nonzero().flatten().tolist()
    if first:
        raise UserError(
            f"the network's logits of {len(first)} of {len(paths)} images are not finite, the first is "
            f"{one_line(paths[first[0]])}: {what_to_do}"
        )


def read_predictions(path: Path) -> list[Mapping[str, str]]:
    """Read what `ResultCollector.write` wrote, line by line. Raises UserError for another file."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error):
        rows = []
    for row in rows:
        if "answer" in row:  # of an older version
            row["correct"] = row.pop("answer")
    if not rows or not {"picture", "label", "prediction", "correct"} <= rows[0].keys():
        raise UserError(f"{path} is no table of predictions: write it again with test.py")
    return rows
