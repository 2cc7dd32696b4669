"""Pairs of a batch against a search through all pictures, one by one."""

from __future__ import annotations

import math

import pytest
import reference
import torch
from torch import Tensor

from networks.pairs import nearest_pairs


def pairs_by_hand(embeddings: Tensor, labels: list[int]) -> tuple[list[list[int]], list[list[bool]]]:
    """Distances are summed in float64; the first of the nearest, picture 0 where there is none."""
    partners, found = [], []
    for i, own in enumerate(embeddings.double()):
        nearest: list[tuple[float, int]] = [(math.inf, 0), (math.inf, 0)]
        for j, other in enumerate(embeddings.double()):
            kind = 0 if labels[i] == labels[j] else 1
            distance = sum((a - b) ** 2 for a, b in zip(own.tolist(), other.tolist(), strict=True))
            if i != j and distance < nearest[kind][0]:
                nearest[kind] = (distance, j)
        partners.append([index for _, index in nearest])
        found.append([distance < math.inf for distance, _ in nearest])
    return partners, found


@pytest.mark.parametrize(
    "labels",
    (
        [0, 0, 1, 1],
        [2, 0, 2, 2, 1, 0, 1, 1],
        [3, 1, 2],  # each alone of its class
        [0, 1, 1, 4],  # some of them
        [5, 5, 5],  # one class
        [1],
        [k % 7 for k in range(40)],  # more than 25, from where on distances are products by default
    ),
    ids=str,
)
@pytest.mark.parametrize("kind", ("noise", "ties", "far away", "all equal"))
def test_pairs_equal_a_search(kind: str, labels: list[int]) -> None:
    generator = torch.Generator().manual_seed(len(labels))
    embeddings = torch.randn(len(labels), 6, generator=generator)
    if kind == "ties":
        embeddings = embeddings.round()
    elif kind == "far away":  # where products would round
        embeddings = embeddings.round() + 4096
    elif kind == "all equal":
        embeddings = torch.ones_like(embeddings)
    partners, found = nearest_pairs(embeddings, torch.tensor(labels))
    assert (partners.tolist(), found.tolist()) == pairs_by_hand(embeddings, labels)


def test_pairs_have_no_gradient_and_make_the_host_wait_nowhere() -> None:
    embeddings, labels = torch.randn(6, 4).requires_grad_(), torch.tensor([0, 0, 1, 1, 2, 2])
    with reference.ForbidHostReads():
        partners, found = nearest_pairs(embeddings, labels)
    assert not partners.requires_grad and not found.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(nearest_pairs(embeddings.bfloat16(), labels)[1], found)
