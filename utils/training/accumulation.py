"""Gradient accumulation: a batch in parts that are computed one after another, for one optimizer step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from networks.outputs import NetworkOutput
from networks.system import Step


def parts_of(step: Step, count: int) -> list[tuple[Step, float]]:
    """Return the parts of a step, with a share of its images each: `count`, but no more than there are images.

    They differ by one image at most. The mean of a loss over a batch is that of its means over the parts, weighted by
    their shares.
    """
    count = min(count, len(step.images))
    boxes = [None] * count if step.boxes is None else step.boxes.tensor_split(count)
    parts = zip(step.images.tensor_split(count), step.targets.tensor_split(count), boxes, strict=True)
    return [
        (step._replace(images=images, targets=targets, boxes=own), len(images) / len(step.images))
        for images, targets, own in parts
    ]


def joined_outputs(outputs: Sequence[NetworkOutput]) -> NetworkOutput:
    """Return what the network would have given for all images at once; fields are batch-first, or None."""
    return outputs[0] if len(outputs) == 1 else NetworkOutput(*map(_joined, zip(*outputs, strict=True)))


def joined_terms(terms: Sequence[dict[str, Tensor]], shares: Sequence[float]) -> dict[str, Tensor]:
    """Return the loss terms of all parts together."""
    return {name: sum(share * part[name] for part, share in zip(terms, shares, strict=True)) for name in terms[0]}


def _joined(values: tuple) -> object:
    if isinstance(values[0], dict):
        return {name: torch.cat([value[name] for value in values]) for name in values[0]}
    return None if values[0] is None else torch.cat(values)
