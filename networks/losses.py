"""Named loss terms from a network's output and the labels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from networks.outputs import NetworkOutput


def classification_losses(output: NetworkOutput, labels: Tensor, *, label_smoothing: float = 0.0) -> dict[str, Tensor]:
    """Cross-entropy of every branch, by name; `labels` [B] int64.

    For logits [B, N, classes] the label holds for each of the N and the term is the mean over B * N.
    """
    terms = {}
    for name, logits in output.logits.items():
        targets = labels if logits.ndim == 2 else labels[:, None].expand(logits.shape[:2]).flatten()
        terms[name] = F.cross_entropy(logits.flatten(0, -2).float(), targets, label_smoothing=label_smoothing)
    return terms
