"""What has to be in a checkpoint that train.py wrote: a table of its entries, and what must agree among them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

PLAIN_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Expected(NamedTuple):
    """What an entry must hold, for a test and in words."""

    holds: Callable[[Any], bool]
    words: str


def _is_whole(value: object, lowest: int = 0) -> bool:
    return type(value) is int and lowest <= value < 2**63


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _has_names(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(name, str) for name in value)


def _are_weights(value: object) -> bool:
    return _has_names(value) and len(value) > 0 and all(isinstance(weight, Tensor) for weight in value.values())


def _is_best(value: object) -> bool:
    return isinstance(value, dict) and _is_number(value.get("accuracy")) and _is_whole(value.get("epoch"))


def _is_progress(value: object) -> bool:
    if value is None:
        return True
    counted = isinstance(value, dict) and _is_whole(value.get("epoch"), 1) and _is_whole(value.get("step"))
    return counted and _is_number(value.get("learning_rate")) and _is_meter(value.get("meter"))


def _is_meter(value: object) -> bool:
    if not isinstance(value, dict) or not _is_whole(value.get("images")):
        return False
    sums, counts = value.get("sums"), value.get("counts")
    return (
        _has_names(sums)
        and _has_names(counts)
        and all(_is_number(number) for number in sums.values())
        and all(_is_whole(counts.get(name)) for name in sums)
    )


def _are_found_boxes(value: object) -> bool:
    if not isinstance(value, dict) or value.keys() not in ({"training", "selection"}, {"training"}):
        return False
    return all(isinstance(boxes, Tensor) and boxes.ndim == 2 and boxes.shape[1] == 4 for boxes in value.values())


def _are_thresholds(value: object) -> bool:
    if not isinstance(value, dict) or not value.keys() <= {"plain", "ema"}:
        return False
    return all(_is_number(threshold) and 0 <= threshold <= 1 for threshold in value.values())


def _is_loss_scale(value: object) -> bool:
    names = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}
    if not isinstance(value, dict) or value.keys() != names or not all(_is_number(v) for v in value.values()):
        return False
    return value["scale"] > 0


# In every checkpoint of a run, those to go on from and those to evaluate
NETWORK = {
    "settings": Expected(lambda value: isinstance(value, dict) and len(value) > 0, "settings by name"),
    "class_names": Expected(lambda v: isinstance(v, list) and all(isinstance(n, str) for n in v), "names of classes"),
    "epoch": Expected(_is_whole, "a number of epochs"),
    "selected_on": Expected(lambda value: isinstance(value, str), "a text"),
    "network": Expected(_are_weights, "weights by name"),
}
# What train.py needs to go on
TRAINING = {
    "training_images": Expected(lambda value: _is_whole(value, 1), "a number of images"),
    "steps_per_epoch": Expected(lambda value: _is_whole(value, 1), "a number of steps"),
    "best": Expected(_is_best, "the accuracy and the number of an epoch"),
    "optimizer": Expected(lambda v: isinstance(v, dict) and {"state", "param_groups"} <= v.keys(), "its state"),
    "schedule": Expected(lambda value: _has_names(value) and len(value) > 0, "its state"),
    "progress": Expected(_is_progress, "None, or what an epoch has done"),
    "skipped_steps": Expected(_is_whole, "a number of steps"),
}
# What older versions did not write yet, and what only some runs have
OPTIONAL = {
    "ema": Expected(_are_weights, "averaged weights by name"),
    "begun_with_epochs": Expected(lambda value: _is_whole(value, 1), "a number of epochs"),
    "pictures": Expected(
        lambda v: isinstance(v, Tensor) and v.dtype == torch.uint8 and v.ndim == 1, "a record of the run's pictures"
    ),
    "found_boxes": Expected(_are_found_boxes, "boxes of the run's pictures"),
    "loss_scale": Expected(_is_loss_scale, "the scale of a loss in fp16"),
    # what test.py says of the epoch
    **{name: TRAINING[name] for name in ("best", "progress")},
    "exit_threshold": Expected(_are_thresholds, "probabilities from 0 to 1 for the weights plain and ema"),
}


def problem_of(content: Mapping[str, object], entries: Mapping[str, Expected]) -> str | None:
    """Return what is wrong with a checkpoint that should hold these entries, None where nothing is."""
    missing = [name for name in entries if name not in content]
    if missing:
        return f"it lacks {', '.join(missing)}"
    for name, entry in (entries | {n: entry for n, entry in OPTIONAL.items() if n in content}).items():
        if not entry.holds(content[name]):
            return f"its {name} is not {entry.words}"
    for place, value in _tensors(content):
        if (problem := _problem_of_tensor(value)) is not None:
            return f"{place} {problem}"
    return _disagreement(content) if "progress" in entries else None


def _tensors(value: object, place: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield place, value
    elif isinstance(value, dict | list | tuple):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _tensors(item, f"{place}/{name}" if place else str(name))


def _problem_of_tensor(value: Tensor) -> str | None:
    if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
        return "is not a plain tensor"
    if value.untyped_storage().nbytes() < value.numel() * value.element_size():
        return "has fewer values than its shape"
    if value.is_complex() or value.is_floating_point() and value.dtype not in PLAIN_FLOATS:
        return f"is of type {value.dtype}"
    if value.is_floating_point() and not value.isfinite().all():
        return "is not finite"
    return None


def _disagreement(content: Mapping[str, Any]) -> str | None:
    """Return which of the numbers of epochs and steps contradict each other, None where none do."""
    epoch, progress, best = content["epoch"], content["progress"], content["best"]
    steps = content["steps_per_epoch"]
    done = epoch * steps
    if progress is not None:
        if progress["epoch"] != epoch + 1 or progress["step"] > steps:
            return f"epoch {epoch} is done in it, and step {progress['step']} of epoch {progress['epoch']}"
        done += progress["step"]
    boxes = content.get("found_boxes")
    if boxes is not None and len(boxes["training"]) != content["training_images"]:
        return f"it has {len(boxes['training'])} boxes for {content['training_images']} images"
    if best["epoch"] > epoch:
        return f"its best epoch is {best['epoch']}, and it has done {epoch}"
    scheduled = content["schedule"].get("last_epoch")  # a schedule's epoch is a step
    if scheduled != done:
        return f"its schedule is at step {scheduled}, and it has done {done}"
    return None
