"""How sure an image must be to skip the windows, learnt from an evaluation: what `predict.py` goes by."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Binomial

from networks.outputs import SKIPPED_BY_EXIT, NetworkOutput
from networks.system import System
from utils.reporting.early_exit import ExitCollector
from utils.training.distributed import gather
from utils.training.ensemble import EnsembleLearning

LOST_AT_MOST = 0.01  # of all images: right after all passes, and wrong where they exit
CONFIDENCE = 0.95


def has_passes_to_skip(system: System) -> bool:
    """Whether a prediction may do without its last passes: with its early exit, where it looks at windows at all."""
    return system.can_exit_early and not set(SKIPPED_BY_EXIT).isdisjoint(system.prediction)


def safe_threshold(confidence: Tensor, early_correct: Tensor, full_correct: Tensor) -> float:
    """Return the lowest threshold at which, with 95 % confidence, exiting loses one image in a hundred at most.

    Lower ones lose more, so that they are tested in their order, until one fails, without losing confidence by their
    number (fixed sequence testing: Angelopoulos et al., "Learn then Test", 2021). Fewer than 299 images can show that
    of no threshold: then it is 1, and none exits.

    Args:
        confidence: [n] in 0 .. 1, how sure each image is where it could exit.
        early_correct, full_correct: [n] bool, whether its prediction is right there, and after everything.
    """
    images = len(confidence)
    if not images:
        return 1.0
    # So many lost images, of so many, would be a chance of 5 % or less if one in a hundred of all were lost
    chances = Binomial(images, torch.tensor(LOST_AT_MOST).double()).log_prob(torch.arange(images + 1.0).double())
    allowed = int((chances.logcumsumexp(0).exp() <= 1 - CONFIDENCE).sum()) - 1
    if allowed < 0:
        return 1.0
    lost = confidence[full_correct & ~early_correct].double().sort(descending=True).values
    return lost[allowed].item() if len(lost) > allowed else 0.0


class ExitLearning:
    """Learns the threshold from what exiting early would do to the images of an evaluation.

    ensemble: learns in the same evaluation, first, what each branch weighs in a prediction, and keeps their logits.
    """

    def __init__(self, system: System, ensemble: EnsembleLearning | None = None) -> None:
        self._collector = ExitCollector(system)
        self._ensemble = ensemble

    def add(self, output: NetworkOutput, labels: Tensor) -> None:
        """Take a batch with its labels [B]."""
        if self._ensemble is None:
            self._collector.add(output.logits, labels)

    def finish(self) -> dict[str, float]:
        """Return, in all processes, `exit_threshold`: `safe_threshold` of the images of all."""
        if self._ensemble is not None:
            for logits, labels in self._ensemble.kept.parts():
                self._collector.add(logits, labels)
        shares = gather(self._collector.collected())
        return {"exit_threshold": safe_threshold(*(torch.cat(parts) for parts in zip(*shares, strict=True)))}
