"""What is collected of single images while a network is evaluated, by numbers that are known."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from networks.outputs import NetworkOutput
from utils.errors import UserError
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


def add_batch(collector: ResultCollector, logits: torch.Tensor, boxes: torch.Tensor | None, paths: list[str]) -> None:
    batch = SimpleNamespace(
        labels=torch.zeros(len(paths), dtype=torch.int64), boxes=boxes, images=torch.zeros(1, 3, 32, 32), paths=paths
    )
    found = torch.tensor([[0.0, 0, 15, 31]]).expand(len(paths), 4)
    collector(batch, NetworkOutput({"raw": logits}, found), logits)


def test_images_that_exit_early_are_counted() -> None:
    collector, names = ResultCollector(32), ["a", "b", "c"]
    add_batch(collector, torch.rand(2, 3), None, ["1.jpg", "2.jpg"])
    assert collector.report(names)["exited"] is None
    collector = ResultCollector(32)
    for unsure in ([True, False], [False, False]):
        batch = SimpleNamespace(labels=torch.zeros(2, dtype=torch.int64), paths=["a", "b"])
        logits = torch.rand(2, 3)
        collector(batch, NetworkOutput({"raw": logits}, unsure=torch.tensor(unsure)), logits)
    assert collector.report(names)["exited"] == 3


def test_images_without_a_true_box_are_left_out_of_its_figures_alone(tmp_path) -> None:
    """Some in a batch with others that have one, and a batch of which none has."""
    collector, known = ResultCollector(32), [0.0, 0, 32, 32]
    add_batch(collector, torch.rand(2, 3), torch.tensor([[torch.nan] * 4, known]), ["a", "b"])
    add_batch(collector, torch.rand(1, 3), None, ["c"])
    add_batch(collector, torch.rand(1, 3), torch.tensor([[0.0, 0, 16, 32]]), ["d"])
    assert collector.overlaps().tolist() == [0.5, 1.0]
    collector.write(tmp_path / "predictions.csv", ["x", "y", "z"])
    lines = (tmp_path / "predictions.csv").read_text().splitlines()
    assert [line.rpartition(",")[2] for line in lines] == ["box_iou", "", "0.5000", "", "1.0000"]
    without = ResultCollector(32)
    add_batch(without, torch.rand(1, 3), None, ["c"])
    assert without.overlaps() is None and "box_iou" not in without.values()


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_not_finite_are_no_result(broken) -> None:
    """Of the prediction or of another branch; the first such image is named."""
    collector = ResultCollector(32)
    add_batch(collector, torch.rand(2, 3), None, ["a", "b"])
    collector.check_finite()
    logits = torch.rand(3, 3)
    logits[1, 2] = logits[2, 0] = broken
    add_batch(collector, logits, None, ["c", "d", "e"])
    with pytest.raises(UserError, match="logits of 2 of 5 images are not finite, the first is d: try --precision"):
        collector.check_finite()
