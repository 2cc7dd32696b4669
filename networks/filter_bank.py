"""A bank of 1x1 filters, some for each class, and their start: centres of what stands out in pictures of the class.

Wang, Morariu & Davis, "Learning a Discriminative Filter Bank within a CNN for Fine-grained Recognition", CVPR 2018.
"""

from __future__ import annotations

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn

from networks.precision import at_least_float32
from networks.processes import several_processes

ITERATIONS = 20  # of k-means
CHUNK = 4096  # vectors of which a copy is made at a time


class FilterBank(nn.Module):
    """`per_class` filters for each class: those of class c are the filters from `c * per_class` on."""

    def __init__(self, channels: int, num_classes: int, per_class: int):
        super().__init__()
        self.num_classes, self.per_class = num_classes, per_class
        self.filters = nn.Conv2d(channels, num_classes * per_class, 1)

    def forward(self, feature_map: Tensor) -> tuple[Tensor, Tensor]:
        """Map [B, channels, h, w] to the filters' highest responses and the cells where these are, both [B, filters].

        Responses are float32 unless the network was cast to more; cells are counted row by row.
        """
        responses, cells = self.filters(feature_map).flatten(2).max(dim=2)
        return at_least_float32(responses), cells

    def of_class(self, values: Tensor, classes: Tensor) -> Tensor:
        """Pick the values of the filters of each image's class: [B, filters], classes [B] to [B, per_class]."""
        by_class = values.unflatten(1, (self.num_classes, self.per_class))
        return by_class.gather(1, classes[:, None, None].expand(-1, 1, self.per_class)).squeeze(1)

    def mean_by_class(self, responses: Tensor) -> Tensor:
        """Average the responses [B, filters] over the filters of each class: [B, classes]."""
        return responses.unflatten(1, (self.num_classes, self.per_class)).mean(dim=2)

    @torch.no_grad()
    def start_from(self, vectors: Tensor, labels: Tensor) -> None:
        """Make the filters centres of the vectors [n, channels] of their class; `labels` [n]. All on the CPU.

        Two points are ours, as the paper leaves them open. The vectors are clustered by direction, so that
        bright pictures do not outweigh others. A centre gives the direction of its filter; length and bias are chosen
        so that its responses to all these vectors have mean 0 and deviation 1, as else all filters answer to what all
        vectors have in common. A class without vectors keeps its random filters. Draws from torch's global generator.
        """
        if not len(vectors):
            return
        vectors = vectors.float()
        mean, filters = vectors.mean(dim=0), self.filters.weight.detach().cpu().float().flatten(1)
        for label in labels.unique().tolist():
            first, directions = label * self.per_class, F.normalize(vectors[labels == label], dim=1)
            filters[first : first + self.per_class] = k_means(directions, self.per_class)
        # By the covariance, not by the responses themselves: these are several times as large as the vectors.
        covariance = sum((some - mean).T @ (some - mean) for some in vectors.split(CHUNK)) / len(vectors)
        deviation = ((filters @ covariance) * filters).sum(dim=1).clamp(min=1e-12).sqrt()
        filters = filters / deviation[:, None]
        self.filters.weight.copy_(filters[:, :, None, None])
        self.filters.bias.copy_(-filters @ mean)


def find_peaks(feature_map: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the vectors at the highest peaks of a map [B, C, h, w]: [B, count, C], and whether there were as many.

    A peak is a cell whose vector is no shorter than those of its 8 neighbours and longer than the map's mean. `[b, n]`
    of the second result, [B, count] bool, is False where image b has n peaks or fewer; its vector is to be left out.
    """
    lengths = feature_map.norm(dim=1)  # [B, h, w]
    highest_around = F.max_pool2d(lengths[:, None], 3, stride=1, padding=1)[:, 0]
    is_peak = (lengths == highest_around) & (lengths > lengths.mean(dim=(1, 2), keepdim=True))
    heights = (lengths * is_peak).flatten(1)
    heights, cells = heights.topk(min(count, heights.shape[1]), dim=1)
    return feature_map.flatten(2).transpose(1, 2).take_along_dim(cells[..., None], dim=1), heights > 0


def k_means(vectors: Tensor, count: int) -> Tensor:
    """Return the centres [count, D] of clusters of vectors [n, D], by Lloyd's algorithm.

    Starts at random ones of the vectors, which are taken several times where there are fewer than `count`; a centre
    that loses its last vector stays where it is.
    """
    order = torch.randperm(len(vectors))
    centres = vectors[order.repeat(-(-count // len(vectors)))[:count]]
    for _ in range(ITERATIONS):
        nearest = F.one_hot(torch.cdist(vectors, centres).argmin(dim=1), count).to(vectors.dtype)  # [n, count]
        sizes = nearest.sum(dim=0)[:, None]
        centres = torch.where(sizes > 0, nearest.T @ vectors / sizes.clamp(min=1), centres)
    return centres


def gather_rows(rows: Tensor) -> Tensor:
    """Return the rows of all processes, each of which calls this with its own, on the CPU; alone, its own."""
    if not several_processes():
        return rows
    shares: list[Tensor] = [rows] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(shares, rows)
    return torch.cat(shares)


@torch.no_grad()
def copy_from_first_process(module: nn.Module) -> None:
    """Give a module the parameters that it has in the first process, in every other one; each of them calls this."""
    if several_processes():
        for parameter in module.parameters():
            torch.distributed.broadcast(parameter, src=0)
