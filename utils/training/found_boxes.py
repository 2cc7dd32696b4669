"""Where the objects are, found once before the first epoch instead of in every pass.

For systems that take boxes, see `System.takes_boxes`. They are found in pictures without augmentation, kept with the
run, and follow each picture's augmentation as its true box does, see `datasets.Pictures`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from networks.system import System
from utils.reporting.metrics import inclusive_to_edges
from utils.training.distributed import all_reduce_sum, bar_disabled, rank, world_size
from utils.training.execution import Execution


@torch.no_grad()
def find_boxes(system: System, batches: Iterable[Any], execution: Execution, count: int) -> Tensor:
    """Return [count, 4] float32 on the CPU: where a system finds the objects of so many pictures, in their order.

    Edges in pixels of the images. `batches`, of `datasets` and without augmentation, hold every world_size-th of the
    pictures, from that of this process's rank on; all processes have to ask, and get all.
    """
    found = torch.zeros(count, 4, device=execution.device)
    own, done = found[rank() :: world_size()], 0
    for batch in with_bar(batches, "finding objects"):
        with execution.autocast():
            boxes = system.find_objects(execution.images(batch.images))
        own[done : done + len(boxes)] = inclusive_to_edges(boxes) * (batch.images.shape[-1] / system.input_size)
        done += len(boxes)
    return all_reduce_sum(found).cpu()


def with_bar(batches: Iterable[Any], description: str, total: int | None = None) -> Iterator[Any]:
    """Yield the batches under a bar, which is not there before the first one is asked for."""
    yield from tqdm(batches, desc=description, total=total, disable=bar_disabled(), leave=False)


def boxes_to_look_at(batch: Any, system: System, device: torch.device) -> Tensor | None:
    """Return the boxes [B, 4] that a batch of `datasets` brings, in input_size pixels with inclusive ends, or None."""
    if batch.found_boxes is None:
        return None
    edges = batch.found_boxes.to(device, non_blocking=True) * (system.input_size / batch.images.shape[-1])
    return torch.cat([edges[:, :2], edges[:, 2:] - 1], dim=1)
