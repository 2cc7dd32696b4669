"""What is collected of single images while a network is evaluated, by numbers that are known."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from networks.outputs import NetworkOutput
from utils.reporting.results import ResultCollector


def collected() -> ResultCollector:
    """Eight classes, two images: of the first image the label is the fifth choice, of the second one the sixth."""
    collector, logits = ResultCollector(32), torch.arange(8.0, 0, -1).repeat(2, 1)
    batch = SimpleNamespace(
        labels=torch.tensor([4, 5]),
        boxes=torch.tensor([[0.0, 0, 32, 32], [0.0, 0, 64, 64]]),
        images=torch.zeros(2, 3, 64, 64),
        paths=["a", "b"],
    )
    output = NetworkOutput({"raw": logits}, torch.tensor([[0.0, 0, 15, 15], [0.0, 0, 15, 31]]))
    collector(batch, output, logits * torch.tensor([[1.0], [2.0]]))
    return collector


def test_what_is_reported_of_an_image() -> None:
    values = collected().values()
    assert values["top1/raw"].tolist() == [False, False]
    assert values["top5/raw"].tolist() == [True, False]
    assert values["box_iou"].tolist() == [1.0, 0.5]  # of 16 x 16 and 16 x 32 pixels, both ends included
    report = collected().report([str(number) for number in range(8)])
    assert report["branches"]["raw"]["top5_interval_95"] == pytest.approx((0.0945, 0.9055), abs=1e-4)
    sure = torch.stack([torch.arange(8.0, 0, -1).softmax(0)[0], torch.arange(16.0, 0, -2).softmax(0)[0]])
    assert report["calibration"]["expected_error"] == pytest.approx(sure.mean().item())  # none is right


def test_the_surest_mistakes_come_first() -> None:
    mistakes = collected().surest_mistakes()
    assert [(position, label) for position, label, _ in mistakes] == [(1, 0), (0, 0)]
    assert mistakes[0][2] > mistakes[1][2]
    assert collected().surest_mistakes(1) == mistakes[:1]
