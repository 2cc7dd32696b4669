"""A centre for each class, to which the features of its images are drawn.

As Hu et al. (WS-DAN, 2019, section 3.1) and the published code of CAL have it, after Wen, Zhang, Li & Qiao, "A
Discriminative Feature Learning Approach for Deep Face Recognition" (center loss), ECCV 2016.
"""

from __future__ import annotations

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn

from networks.processes import several_processes

RATE = 0.05  # of the way to each image's features


class Centres(nn.Module):
    """Centres [classes, D], a buffer, of which only the direction counts; all zero at first.

    `last_only`: of several images of one class in a batch only the last moves the centre, as the published code's
    indexed assignment does; without it all of them do.
    """

    def __init__(self, num_classes: int, length: int, *, last_only: bool = False):
        super().__init__()
        self.last_only = last_only
        self.register_buffer("vectors", torch.zeros(num_classes, length))

    def directions(self, labels: Tensor) -> Tensor:
        """Return the unit vectors [B, D] of the classes in labels [B]; zero for a class without a centre yet."""
        return F.normalize(self.vectors[labels], dim=1)

    def distances(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return [B]: the squared distance of each image's features [B, D] from its class's unit vector."""
        return (features - self.directions(labels)).square().sum(dim=1)

    @torch.no_grad()
    def move(self, features: Tensor, labels: Tensor) -> None:
        """Move each class's centre by a share of the way from its unit vector to its images' features [B, D].

        Where several processes share a batch, all of them make the moves of the whole of it.
        """
        features, labels = of_all_processes(features.detach()), of_all_processes(labels)
        moves = RATE * (features - self.directions(labels)).to(self.vectors.dtype)
        if self.last_only:
            follows = (labels[:, None] == labels[None, :]).triu(diagonal=1).any(dim=1)
            moves = moves * ~follows[:, None]
        self.vectors.index_add_(0, labels, moves)


def of_all_processes(values: Tensor) -> Tensor:
    """Return [processes * B, ...]: the values [B, ...] of all processes by rank; those of a process that is alone.

    All of them have to ask, with the same shape.
    """
    if not several_processes():
        return values
    parts = [torch.empty_like(values) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, values.contiguous())
    return torch.cat(parts)
