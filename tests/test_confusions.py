"""Which classes are taken for which, and how it is written down where they are many."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from utils.reporting import class_tables, report_sections
from utils.reporting.class_tables import write_confusions
from utils.reporting.confusions import (
    classes_with_images,
    confusion_matrix,
    confusions,
    mean_per_class_accuracy,
    worst_confusions,
)
from utils.reporting.report_sections import confusions_section


def test_confusions():
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    predictions = torch.tensor([0, 1, 1, 2, 1, 0, 2])
    matrix = confusion_matrix(predictions, labels, 4)
    assert matrix.tolist() == [[1, 2, 1, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    names = ["auk", "bunting", "crow", "dunlin"]
    assert worst_confusions(matrix, names, count=2) == [
        {"true": "auk", "predicted": "bunting", "count": 2, "share": 0.5},
        {"true": "auk", "predicted": "crow", "count": 1, "share": 0.25},
    ]
    assert len(worst_confusions(matrix, names)) == 3  # pairs that never happened are not listed
    assert matrix.diagonal().tolist() == [1, 1, 1, 0]  # the argument stays as it was
    assert mean_per_class_accuracy(matrix) == pytest.approx((0.25 + 0.5 + 1) / 3)  # without the dunlin
    assert classes_with_images(matrix) == 3


def test_confusion_matrix_refuses_unknown_classes():
    for wrong in (torch.tensor([4]), torch.tensor([-1])):
        with pytest.raises(ValueError, match="4 classes"):
            confusion_matrix(wrong, torch.tensor([0]), 4)
        with pytest.raises(ValueError, match="4 classes"):
            confusion_matrix(torch.tensor([0]), wrong, 4)
    nothing = torch.zeros(0, dtype=torch.int64)
    assert confusion_matrix(nothing, nothing, 4).sum() == 0
    assert mean_per_class_accuracy(torch.zeros(4, 4, dtype=torch.int64)) == 0


def test_confusions_come_by_their_number_and_then_by_class():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randint(4, (12, 12), generator=generator)
    pairs = [(t, p, matrix[t, p].item()) for t in range(12) for p in range(12) if t != p and matrix[t, p]]
    assert confusions(matrix).tolist() == [list(pair) for pair in sorted(pairs, key=lambda pair: (-pair[2], pair))]
    assert confusions(torch.eye(3, dtype=torch.int64)).shape == (0, 3)


@pytest.fixture
def few_are_many(monkeypatch):
    for module in (class_tables, report_sections):
        monkeypatch.setattr(module, "MATRIX_CLASSES", 2)


def test_of_very_many_classes_the_pairs_are_written_that_were_confused(few_are_many, tmp_path: Path):
    matrix = torch.tensor([[5, 1, 0], [3, 4, 0], [0, 0, 2]])
    write_confusions(tmp_path / "confusions.csv", matrix, ["auk", "=bunting", "crow"])
    with (tmp_path / "confusions.csv").open(encoding="utf-8", newline="") as file:
        assert list(csv.reader(file)) == [
            ["true class", "predicted class", "images"],
            ["'=bunting", "auk", "3"],
            ["auk", "'=bunting", "1"],
        ]


def test_of_very_many_classes_no_matrix_is_drawn(few_are_many):
    section = confusions_section(torch.tensor([[5, 1, 0], [3, 4, 0], [0, 0, 2]]), ["auk", "bunting", "crow"])
    assert "matrix" not in section
    assert section.index("bunting") < section.index("43%") < section.index("17%")
