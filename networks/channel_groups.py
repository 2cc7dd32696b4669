"""The channels of a map dealt to the classes, and how well each class's own tell it, and how much they overlap.

Chang et al., "The Devil is in the Channels: Mutual-Channel Loss for Fine-Grained Image Classification", IEEE TIP 29,
2020. Consecutive channels belong to a class. Where their number is no multiple of the classes, the last classes have
one channel more than the first.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def channel_groups(channels: Tensor, num_classes: int) -> list[Tensor]:
    """Deal channels [B, N, ...] to classes: [B, classes, size, ...] for each of the one or two sizes of groups."""
    size, larger = divmod(channels.shape[1], num_classes)
    split = (num_classes - larger) * size
    groups = [channels[:, :split].unflatten(1, (-1, size))]
    return groups if larger == 0 else [*groups, channels[:, split:].unflatten(1, (larger, size + 1))]


def draw_masks(count: int, channels: int, num_classes: int, share: float, device: torch.device) -> Tensor:
    """Return [count, channels] bool, True where kept: at random, all but `floor(share * size)` of each class's."""
    ranks = [
        group.argsort(dim=2).argsort(dim=2)
        for group in channel_groups(torch.rand(count, channels, device=device), num_classes)
    ]
    return torch.cat([(rank < rank.shape[2] - math.floor(share * rank.shape[2])).flatten(1) for rank in ranks], dim=1)


def logits_of_groups(feature_map: Tensor, num_classes: int, masks: Tensor) -> Tensor:
    """Map [B, N, h, w] to logits [B, classes]: the mean over the cells of the maximum over each class's channels.

    Channels that `masks`, [B, N] or [1, N] bool, leave out count as zeros. Float32, or the map's own precision above.
    """
    kept = feature_map * masks[:, :, None, None]
    highest = torch.cat([group.amax(dim=2) for group in channel_groups(kept, num_classes)], dim=1)
    return highest.mean(dim=(2, 3), dtype=torch.promote_types(highest.dtype, torch.float32))


def channel_overlap(feature_map: Tensor, num_classes: int) -> Tensor:
    """Return [B]: how much the channels of a class look at the same cells of a map [B, N, h, w].

    Each channel is made a distribution over the cells. In a group of `size` channels, the highest of each cell sum up
    to between 1, where all are the same, and `size`, where they share no cell: the overlap is 1 - sum / size, from 0
    to 1 - 1 / size. The mean over the classes; where there are two sizes of groups, one for each of them, added.
    """
    precise = torch.promote_types(feature_map.dtype, torch.float32)
    shares = feature_map.flatten(2).softmax(dim=2, dtype=precise)
    covered = [group.amax(dim=2).sum(dim=2) / group.shape[2] for group in channel_groups(shares, num_classes)]
    return sum((1 - cover).mean(dim=1) for cover in covered)
