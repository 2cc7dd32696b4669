"""Accuracies, overlaps and confusions against known values and direct computations; seeds; two processes' sums."""

from __future__ import annotations

import os
import random
import sys

import numpy
import pytest
import torch
import torch.distributed
import torchvision
from launching import run_two_processes

from utils.reporting.metrics import (
    EpochMeter,
    inclusive_to_edges,
    paired_box_iou,
    share_of_predicted,
    topk_correct,
    wilson_interval,
)
from utils.training import distributed
from utils.training.seeding import mix, seed_everything

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (50, 100, 0.4038, 0.5962),
        (81, 263, 0.2553, 0.3662),  # R. G. Newcombe, Statistics in Medicine 17, 1998, table I
        (15, 148, 0.0624, 0.1605),  # the same table
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson_interval_equals_published_values(correct, total, low, high):
    assert wilson_interval(correct, total) == pytest.approx((low, high), abs=5e-5)


def test_wilson_interval_widens_with_confidence_and_refuses_nonsense():
    low, high = wilson_interval(5, 10)
    wide_low, wide_high = wilson_interval(5, 10, confidence=0.99)
    assert wide_low < low < 0.5 < high < wide_high
    for arguments in ((11, 10), (-1, 10), (5, 10, 1.0), (5, 10, 0.0)):
        with pytest.raises(ValueError, match="expected"):
            wilson_interval(*arguments)


def test_inclusive_boxes_gain_their_end_pixel():
    boxes = torch.tensor([[[0.0, 0.0, 31.0, 63.0]]])
    assert inclusive_to_edges(boxes).tolist() == [[[0, 0, 32, 64]]]
    assert boxes[0, 0, 2] == 31  # the argument stays as it was


def test_paired_iou_is_the_diagonal_of_all_pairs():
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(2, 200, 4, generator=generator) * 100
    first, second = (torch.cat([c[:, :2], c[:, :2] + c[:, 2:]], dim=1) for c in corners)
    expected = torchvision.ops.box_iou(first, second).diagonal()
    assert 0 < (expected == 0).sum() < 150  # both kinds are met
    torch.testing.assert_close(paired_box_iou(first, second), expected)


def test_iou_of_boxes_without_area_is_zero():
    points = torch.tensor([[5, 5, 5, 5], [0, 0, 10, 0], [9, 9, 1, 1], [0, 0, 10, 10]])
    others = torch.tensor([[5, 5, 5, 5], [0, 0, 10, 10], [1, 1, 9, 9], [0, 0, 10, 10]])
    assert paired_box_iou(points, others).tolist() == [0, 0, 0, 1]
    assert paired_box_iou(points[:0], others[:0]).shape == (0,)


def test_iou_with_a_box_that_is_not_known_is_none():
    boxes, unknown = torch.tensor([[0.0, 0, 4, 4], [0.0, 0, 4, 4]]), torch.tensor([[torch.nan] * 4, [0.0, 0, 4, 2]])
    assert paired_box_iou(boxes, unknown)[0].isnan() and paired_box_iou(unknown, boxes)[0].isnan()
    assert paired_box_iou(boxes, unknown)[1] == 0.5


def test_an_overlap_of_just_a_half_counts():
    meter = EpochMeter(torch.device("cpu"))
    boxes, halves = torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([[0.0, 0, 10, 5]])
    meter.update(torch.zeros(1, dtype=torch.int64), boxes=boxes, true_boxes=halves)
    assert meter.compute() == {"box_iou/mean": 0.5, "box_iou/share_at_0.5": 1.0, "images": 1}


def test_topk():
    logits = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    labels = torch.tensor([0, 1, 2])
    assert topk_correct(logits, labels, 1).tolist() == [True, False, False]
    assert topk_correct(logits, labels, 2).tolist() == [True, True, False]
    assert topk_correct(logits, labels, 5).tolist() == [True, True, True]


def test_of_equal_logits_the_first_is_the_highest():
    """As it is to argmax, by which classes are named; so top-1 is never right where top-5 is not."""
    logits = torch.zeros(6, 6)
    logits[:, 4] = -1
    labels = torch.arange(6)
    for k, right in ((1, {0}), (2, {0, 1}), (5, {0, 1, 2, 3, 5}), (6, set(range(6)))):
        assert topk_correct(logits, labels, k).nonzero().flatten().tolist() == sorted(right)
    assert (topk_correct(logits, labels, 1) == (logits.argmax(dim=1) == labels)).all()
    logits[2] = float("nan")
    assert not topk_correct(logits, labels, 1)[2]


def test_a_mixed_picture_is_right_by_the_share_of_what_is_predicted():
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 0.0, 1.0], [0.0, 1.0, 2.0]])
    shares = torch.tensor([[0.25, 0.75, 0.0], [0.25, 0.75, 0.0], [0.5, 0.5, 0.0]])
    assert share_of_predicted(logits, shares).tolist() == [0.75, 0.25, 0.0]
    meter = EpochMeter(torch.device("cpu"))
    meter.update(shares, logits={"raw": logits})
    assert meter.compute() == {"accuracy/raw": pytest.approx(1 / 3), "images": 3}


def _random_batches(sizes, classes=4):
    generator = torch.Generator().manual_seed(1)
    for size in sizes:
        corners = torch.rand(2, size, 2, generator=generator) * 20
        yield {
            "labels": torch.randint(classes, (size,), generator=generator),
            "raw": torch.randn(size, classes, generator=generator),
            "window": torch.randn(size, 3, classes, generator=generator),
            "per_image": torch.rand(size, generator=generator),
            "boxes": torch.cat([corners[0], corners[0] + 30], dim=1),
            "true_boxes": torch.cat([corners[1], corners[1] + 30], dim=1),
        }


def _fill(meter, batches):
    for batch in batches:
        meter.update(
            batch["labels"],
            losses={"total": batch["per_image"].mean()},
            logits={"raw": batch["raw"], "window": batch["window"]},
            boxes=batch["boxes"],
            true_boxes=batch["true_boxes"],
        )


def _direct(batches):
    whole = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    overlap = torchvision.ops.box_iou(whole["boxes"], whole["true_boxes"]).diagonal()
    return {
        "loss/total": whole["per_image"].double().mean().item(),
        "accuracy/raw": (whole["raw"].argmax(1) == whole["labels"]).double().mean().item(),
        "accuracy/window": (whole["window"].mean(1).argmax(1) == whole["labels"]).double().mean().item(),
        "box_iou/mean": overlap.double().mean().item(),
        "box_iou/share_at_0.5": (overlap >= 0.5).double().mean().item(),
        "images": len(overlap),
    }


def test_meter_equals_a_direct_computation_over_uneven_batches():
    batches = list(_random_batches([16, 16, 5, 1]))
    expected = _direct(batches)
    assert 0 < expected["box_iou/share_at_0.5"] < 1
    meter = EpochMeter(CPU)
    _fill(meter, batches)
    meter.reduce()  # alone: changes nothing
    assert meter.compute() == pytest.approx(expected, rel=1e-6)


def test_meter_keeps_no_graph_and_averages_a_term_over_its_own_images():
    meter = EpochMeter(CPU)
    weight = torch.ones((), requires_grad=True)
    meter.update(torch.zeros(4, dtype=torch.int64), losses={"total": weight * 2, "graph": weight * 6})
    meter.update(torch.zeros(2, dtype=torch.int64), losses={"total": weight * 5})
    assert not any(value.requires_grad for value in meter.sums.values())
    assert meter.compute() == {"loss/total": 3.0, "loss/graph": 6.0, "images": 6}
    assert EpochMeter(CPU).compute() == {"images": 0}


def test_meter_shows_a_loss_that_is_not_finite():
    meter = EpochMeter(CPU)
    meter.update(torch.zeros(4, dtype=torch.int64), losses={"total": torch.tensor(float("nan"))})
    assert numpy.isnan(meter.compute()["loss/total"])


def _one_process(rank, folder):
    """What each of two processes does: the first sees more images, and a loss term that the second never meets."""
    assert distributed.setup_distributed("cpu") == CPU
    meter = EpochMeter(CPU)
    batches = list(_random_batches([8, 3, 2]))
    _fill(meter, batches[:2] if rank == 0 else batches[2:])
    if rank == 0:
        meter.update(torch.zeros(1, dtype=torch.int64), losses={"only_here": torch.tensor(7.0)})
    meter.reduce()
    result = {
        "values": meter.compute(),
        "rank": distributed.rank(),
        "world_size": distributed.world_size(),
        "is_main": distributed.is_main(),
    }
    torch.save(result, f"{folder}/{rank}.pth")
    torch.distributed.barrier()
    distributed.cleanup()
    assert not distributed.is_distributed()


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this PyTorch has no gloo")
def test_two_processes_sum_what_they_saw(tmp_path):
    ended = run_two_processes("tests/test_metrics.py", str(tmp_path))  # this file, see its end
    assert ended.returncode == 0, ended.stderr
    results = [torch.load(tmp_path / f"{rank}.pth") for rank in range(2)]
    expected = _direct(list(_random_batches([8, 3, 2])))
    expected |= {"loss/only_here": 7.0, "images": 14}
    for rank, result in enumerate(results):
        assert result.pop("values") == pytest.approx(expected, rel=1e-6)
        assert result == {"rank": rank, "world_size": 2, "is_main": rank == 0}


def test_several_processes_wrap_the_network_and_allow_unused_branches(monkeypatch):
    class Recorder(torch.nn.Module):  # the real one takes seconds to import and needs the other processes
        def __init__(self, module, **settings):
            super().__init__()
            self.module, self.settings = module, settings

    monkeypatch.setattr(distributed, "is_distributed", lambda: True)
    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", Recorder)
    network = torch.nn.Linear(2, 2)
    for device, device_ids in ((CPU, None), (torch.device("cuda", 1), [1])):
        wrapped = distributed.wrap_network(network, device, data_parallel=True)
        assert wrapped.settings == {"device_ids": device_ids, "find_unused_parameters": True}
        assert distributed.unwrap(wrapped) is network


def test_a_lone_process_is_its_own_main(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    network = torch.nn.Linear(2, 2)
    assert distributed.setup_distributed("cpu") == CPU
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    assert distributed.wrap_network(network, CPU, data_parallel=True) is network
    assert distributed.unwrap(network) is network
    assert distributed.unwrap(torch.nn.DataParallel(network)) is network
    assert distributed.all_reduce_sum(torch.tensor([2.0])).item() == 2
    distributed.cleanup()


def _draws():
    return torch.rand(3).tolist() + numpy.random.rand(3).tolist() + [random.random()]


def test_seeds_repeat_and_differ():
    seed_everything(3, epoch=5, rank=1)
    first = _draws()
    _draws()
    seed_everything(3, epoch=5, rank=1)
    assert _draws() == first
    for other in ((4, 5, 1), (3, 6, 1), (3, 5, 0), (5, 3, 1)):
        seed_everything(*other)
        assert not set(_draws()) & set(first)


def test_mix_is_fixed_and_fits_int64():
    assert mix(0, 1, 2) == mix(0, 1, 2)
    values = {mix(seed, epoch, rank) for seed in range(20) for epoch in range(20) for rank in range(5)}
    assert len(values) == 2000
    assert all(0 <= value < 2**63 for value in values)
    assert mix(12, 3) != mix(1, 23)
    mix(-1, 2**100)


if __name__ == "__main__":
    _one_process(int(os.environ["RANK"]), sys.argv[1])
