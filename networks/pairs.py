"""Which pictures of a batch are compared: the nearest one of the same class, and the nearest one of another class.

Zhuang, Wang & Qiao, "Learning Attentive Pairwise Interaction for Fine-Grained Classification", AAAI 2020, section
"Pair construction".
"""

from __future__ import annotations

import torch
from torch import Tensor

from networks.precision import at_least_float32


@torch.no_grad()
def nearest_pairs(embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the partners [B, 2] int64 of each picture by embeddings [B, C], and [B, 2] bool: whether there is one.

    First the nearest other picture of its own class (`labels` [B]), then the nearest one of another class, by Euclidean
    distance; of equally near ones the first. Where there is none the partner is picture 0, as in the published code.
    """
    embeddings = at_least_float32(embeddings)
    # Not by products, the default for many pictures, which round: near pictures would change their order.
    distances = torch.cdist(embeddings, embeddings, compute_mode="donot_use_mm_for_euclid_dist")
    same = labels[:, None] == labels
    oneself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    excluded = torch.stack([~same | oneself, same], dim=1)  # [B, 2, B]
    partners = distances[:, None].masked_fill(excluded, torch.inf).argmin(dim=2)
    return partners, ~excluded.all(dim=2)
