"""Curves within epochs, read back by TensorBoard's own reader, against means written out."""

from __future__ import annotations

import pytest
import torch
from whole_runs import read_events

from utils.reporting.metrics import EpochMeter
from utils.reporting.step_log import StepLog

CPU = torch.device("cpu")
LOSSES = [3.0, 1.0, 4.0, 1.5, 9.0, 2.0, 6.0]


def _learn(meter: EpochMeter, loss: float, images: int = 2) -> None:
    """A step of which the first image is right, and no other one."""
    labels, logits = torch.zeros(images, dtype=torch.int64), torch.tensor([[0.0, 1.0]]).repeat(images, 1)
    logits[0] = torch.tensor([1.0, 0.0])
    meter.update(labels, losses={"raw": torch.tensor(loss), "total": torch.tensor(loss + 1)}, logits={"raw": logits})


def _points(folder, tag: str) -> dict[int, float]:
    points = {point.step: point.value for point in read_events(folder).Scalars(tag)}
    assert len(points) == len(read_events(folder).Scalars(tag))  # what is hidden does not come back
    return points


def _log_epoch(log: StepLog, losses: list[float], *, first_step: int = 1, **options) -> None:
    meter = EpochMeter(CPU)
    log.begin(meter, "epoch 1/2", len(losses))
    for step, loss in enumerate(losses[first_step - 1 :], start=first_step):
        _learn(meter, loss)
        log.after_step(step, 0.1 / step, **options)


def test_a_point_is_the_mean_since_the_one_before(tmp_path):
    with StepLog(tmp_path, every=3) as log:
        _log_epoch(log, LOSSES)
        _log_epoch(log, LOSSES)
    # steps 1 to 3, 4 to 6; of the second epoch 8 and 9, 10 to 12
    means = {3: sum(LOSSES[:3]) / 3, 6: sum(LOSSES[3:6]) / 3, 9: sum(LOSSES[:2]) / 2, 12: sum(LOSSES[2:5]) / 3}
    assert _points(tmp_path, "step/loss/raw") == pytest.approx(means)
    assert _points(tmp_path, "step/loss/total") == pytest.approx({step: mean + 1 for step, mean in means.items()})
    assert _points(tmp_path, "step/accuracy/raw") == dict.fromkeys(means, 0.5)
    rates = {3: 0.1 / 3, 6: 0.1 / 6, 9: 0.1 / 2, 12: 0.1 / 5}
    assert _points(tmp_path, "step/learning_rate") == pytest.approx(rates)
    assert all(value > 0 for value in _points(tmp_path, "step/images_per_second").values())


def test_a_mean_is_over_images_and_over_those_a_term_is_of():
    meter = EpochMeter(CPU)
    _learn(meter, 100.0)
    before = meter.copy()
    meter.update(torch.zeros(3, dtype=torch.int64), losses={"total": torch.tensor(2.0)})
    meter.update(torch.zeros(1, dtype=torch.int64), losses={"total": torch.tensor(6.0), "late": torch.tensor(5.0)})
    assert meter.since(before).compute() == {"loss/total": 3.0, "loss/late": 5.0, "images": 4}
    assert before.compute()["images"] == 2  # a copy stays as it is


def test_a_run_that_goes_on_hides_what_came_after_its_checkpoint(tmp_path):
    with StepLog(tmp_path, every=2) as log:
        _log_epoch(log, LOSSES)
    with StepLog(tmp_path, every=2, steps_done=3) as log:
        _log_epoch(log, [*LOSSES[:3], *(loss + 10 for loss in LOSSES[3:])], first_step=4)
    # the second: of step 4 alone
    assert _points(tmp_path, "step/loss/raw") == pytest.approx({2: 2.0, 4: 11.5, 6: 15.5})


def test_a_line_where_no_bar_is(tmp_path, capsys):
    with StepLog(tmp_path, every=3) as log:
        _log_epoch(log, LOSSES[:4], as_line=True)
        _log_epoch(log, LOSSES[:1])
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("epoch 1/2, step 3 of 4  loss 3.667  ")
    assert line.endswith(" images/s  train:  raw 50.0%")


def test_steps_without_images_have_no_point(tmp_path, capsys):
    """All were skipped, as their losses were not finite."""
    with StepLog(tmp_path, every=1) as log:
        log.begin(EpochMeter(CPU), "epoch 1/1", 2)
        log.after_step(1, 0.1, as_line=True)
        _learn(log.meter, 2.0)
        log.after_step(2, 0.1)
    assert _points(tmp_path, "step/loss/raw") == {2: 2.0}
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("options", [{"every": 0}, {"every": 1, "enabled": False}, {"every": 8}])
def test_without_a_point_nothing_is_written(tmp_path, capsys, options):
    with StepLog(tmp_path / "steps", **options) as log:
        _log_epoch(log, LOSSES, as_line=True)
    assert not (tmp_path / "steps").exists()
    assert capsys.readouterr().out == ""
