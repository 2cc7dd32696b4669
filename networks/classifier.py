"""The linear classifiers of all systems, and how a part starts that is to change nothing yet."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from networks.precision import without_autocast

NEARLY_ZERO = 1e-3  # deviation of "zero" initial weights: the layer before them gets a gradient from the first step on


class Classifier(nn.Linear):
    """A linear layer that computes in its weights' precision, also where autocast computes the rest in half of it.

    bfloat16 has 8 significant bits: among 200 classes its logits often tie, and a tie says nothing.
    """

    def forward(self, embedding: Tensor) -> Tensor:
        """Map embeddings [..., C] to logits [..., classes], float32 unless the network itself was cast."""
        embedding = embedding.to(self.weight.dtype)
        with without_autocast(embedding.device):
            return F.linear(embedding, self.weight, self.bias)


def build_two_layer_classifier(in_features: int, num_classes: int, hidden: int = 512) -> nn.Sequential:
    """Return the two layers by which PMG (ECCV 2020) and MC-Loss (IEEE TIP 2020) classify a vector [B, in_features]."""
    return nn.Sequential(
        nn.BatchNorm1d(in_features),
        nn.Linear(in_features, hidden),
        nn.BatchNorm1d(hidden),
        nn.ELU(),
        Classifier(hidden, num_classes),
    )
