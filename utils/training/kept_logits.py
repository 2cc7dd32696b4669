"""What branches said of the images of an evaluation, kept until it has ended."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from networks.outputs import NetworkOutput

PART = 2**24  # numbers that may stay where the network is: 64 MiB


class KeptLogits:
    """Logits of some branches, and labels: the latest where the network is, all others in main memory.

    They go there in parts, as a GPU does not hold those of thousands of images and classes, and a copy of every batch
    would make the host wait for each.
    """

    def __init__(self, branches: tuple[str, ...]) -> None:
        self.branches = branches
        self.numbers, self._moved = 0, 0  # logits of all batches, and of those in main memory
        self._latest: list[tuple[Tensor, Tensor]] = []  # of each batch: logits [B, branches, classes], labels [B]
        self._parts: list[tuple[Tensor, Tensor]] = []  # the same of several, on the CPU

    def add(self, output: NetworkOutput, labels: Tensor) -> None:
        """Take a batch with its labels [B]."""
        logits = torch.stack([output.logits[name].float() for name in self.branches], dim=1)
        self._latest.append((logits, labels))
        self.numbers += logits.numel()
        if self.numbers - self._moved >= PART:
            self._move()

    def _move(self) -> None:
        if self._latest:
            self._parts.append(tuple(torch.cat(values).cpu() for values in zip(*self._latest, strict=True)))
            self._latest.clear()
            self._moved = self.numbers

    def parts(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Yield, on the CPU, logits [n, classes] by branch and labels [n] of a part of the images after the other."""
        self._move()
        for logits, labels in self._parts:
            yield dict(zip(self.branches, logits.unbind(1), strict=True)), labels
