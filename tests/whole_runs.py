"""Command lines of short runs, how to stop one, and how to read and compare what they leave."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from networks import build_network
from utils.checkpoint import load_checkpoint
from utils.training.current_epoch import CurrentEpoch
from utils.training.resume import FREE_ON_RESUME

BRANCHES = ("raw", "fused", "object", "window", "graph")

# Everything that a resumed run could get wrong: flips, jitter and dropout are on; warm-up ends, the mask begins and the
# learning rate changes at every step.
FOUR_EPOCHS = [
    *("--epochs", "4", "--warmup_epochs", "1", "--schedule", "one_cycle"),
    *("--learning_rate", "0.01", "--head_learning_rate_factor", "5", "--clip_gradient_norm", "1"),
    *("--label_smoothing", "0.1", "--dropout", "0.5", "--pictures_every", "3"),
]

MASKED = ["--mask_from_epoch", "3"]  # of sgkrl
TWO_EPOCHS = ["--epochs", "2", "--schedule", "steps", "--milestones", "1", "--learning_rate", "0.05"]
TROUBLED = "tests/troubled_rank.py"  # train.py in a process that gets into trouble


def read_log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def without_speeds(lines: list[dict]) -> list[dict]:
    return [{name: v for name, v in line.items() if not name.startswith("speed/")} for line in lines]


def read_events(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    events.Reload()
    return events


def assert_equal(one: object, other: object, place: str = "") -> None:
    """Two checkpoints hold the same, every tensor bit for bit."""
    assert type(one) is type(other), place
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, place
        assert torch.equal(one, other), place
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), place
        for name, value in one.items():
            assert_equal(value, other[name], f"{place}/{name}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), place
        for index, (ours, theirs) in enumerate(zip(one, other, strict=True)):
            assert_equal(ours, theirs, f"{place}/{index}")
    else:
        assert one == other, place


def assert_same_run(one: Path, other: Path, *, but: frozenset = frozenset()) -> None:
    """Logs and checkpoints are the same, but for settings that are free and those in `but`."""
    assert without_speeds(read_log(one)) == without_speeds(read_log(other))
    for name in ("last.pth", "best.pth"):
        contents = [load_checkpoint(folder / name) for folder in (one, other)]
        for content in contents:
            settings = content["settings"]
            content.pop("begun_with_epochs", None)
            content["settings"] = {name: v for name, v in settings.items() if name not in FREE_ON_RESUME | but}
        assert_equal(*contents, name)


def interrupt_in_epoch(monkeypatch: pytest.MonkeyPatch, epoch: int) -> None:
    """Ctrl-C after the training of an epoch, before its evaluation."""
    evaluate = train.evaluate
    plan_epoch, planned = train.plan_epoch, []

    def plan(system, number, *arguments, **options):
        planned.append(number)
        return plan_epoch(system, number, *arguments, **options)

    def interrupted(*arguments, **options):
        if planned[-1] == epoch:
            raise KeyboardInterrupt
        return evaluate(*arguments, **options)

    monkeypatch.setattr(train, "plan_epoch", plan)
    monkeypatch.setattr(train, "evaluate", interrupted)


def stop_after_step(monkeypatch: pytest.MonkeyPatch, epoch: int, step: int) -> None:
    """Ask the run to stop after a step of an epoch."""

    def save_after(self, done):
        if (self.number, done) == (epoch, step):
            self.stop.requested = True
            return self.stop.agree(self.device)
        return False

    monkeypatch.setattr(CurrentEpoch, "save_after", save_after)


def put_together(saved: dict) -> torch.nn.Module:
    """A checkpoint's network, put together here."""
    settings = {name: saved["settings"][name] for name in ("backbone", "input_size")} | saved["settings"]["options"]
    network = build_network(saved["settings"]["model"], num_classes=len(saved["class_names"]), **settings)
    network.load_state_dict(saved["network"])
    return network.eval()


def contents(folder: Path) -> dict[str, bytes]:
    """Of all files of a folder and the folders in it, by path."""
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.02)
