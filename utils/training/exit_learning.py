"""How sure an image must be to skip the windows, learnt from an evaluation: what `predict.py` goes by."""

from __future__ import annotations

import torch
from torch import Tensor

from networks.outputs import NetworkOutput
from networks.system import System
from utils.reporting.early_exit import ExitCollector, choose_threshold, exit_curve
from utils.training.distributed import gather


def has_passes_to_skip(system: System) -> bool:
    """Whether a prediction may do without its last passes: with its early exit, where it looks at windows at all."""
    return system.can_exit_early and not {"window", "graph"}.isdisjoint(system.prediction)


class ExitLearning:
    """Collects what exiting early would do to the images of an evaluation, and learns the threshold."""

    def __init__(self, system: System) -> None:
        self._collector = ExitCollector(system)

    def add(self, output: NetworkOutput, labels: Tensor) -> None:
        """Take a batch with its labels [B]."""
        self._collector.add(output, labels)

    def finish(self) -> dict[str, float]:
        """Return, in all processes, `exit_threshold`, the lowest that costs no image of all: see `choose_threshold`."""
        shares = gather(self._collector.collected())
        columns = (torch.cat(parts) for parts in zip(*shares, strict=True))
        curve = exit_curve(*columns, early_cost=1, rest_cost=1)  # the more exit the cheaper, whatever windows cost
        return {"exit_threshold": choose_threshold(curve).threshold}
