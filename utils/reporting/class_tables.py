"""What a report shows of every class, as tables for other programs: accuracies, and the confusion matrix."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import Tensor

from utils.files import write_text
from utils.reporting.confusions import MATRIX_CLASSES, confusions
from utils.reporting.metrics import wilson_interval
from utils.text import cell


def write_classes(path: Path, matrix: Tensor, class_names: Sequence[str]) -> None:
    """Write a line per class: images, how many are right, accuracy and its 95 % interval (empty without images).

    `matrix` [C, C] counts by true (row) and predicted class.
    """
    rows = []
    for name, images, right in zip(class_names, matrix.sum(dim=1).tolist(), matrix.diagonal().tolist(), strict=True):
        numbers = (right / images, *wilson_interval(right, images)) if images else ()
        rows.append([cell(name), images, right, *(f"{number:.6f}" for number in numbers), *[""] * (3 - len(numbers))])
    _write(path, [["class", "images", "right", "accuracy", "interval_95_low", "interval_95_high"], *rows])


def write_confusions(path: Path, matrix: Tensor, class_names: Sequence[str]) -> None:
    """Write the confusion matrix: a line per true class, a column per predicted one.

    Of more than `MATRIX_CLASSES`, a line for each pair of classes that was confused.
    """
    names = [cell(name) for name in class_names]
    if len(names) > MATRIX_CLASSES:
        pairs = ([names[true], names[predicted], images] for true, predicted, images in confusions(matrix).tolist())
        _write(path, [["true class", "predicted class", "images"], *pairs])
    else:
        rows = ([name, *counts] for name, counts in zip(names, matrix.tolist(), strict=True))
        _write(path, [["true class", *names], *rows])


def _write(path: Path, rows: Iterable[Sequence[object]]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_text(path, text.getvalue())
