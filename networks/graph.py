"""A graph over the windows of a picture and the graph convolutions that reason on it.

Kipf & Welling, "Semi-Supervised Classification with Graph Convolutional Networks", ICLR 2017; the neighbourhood rule is
that of SG-KRL.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.classifier import Classifier


def nearest_neighbours(corners: Tensor, k: int, *, keep_self: bool = False) -> Tensor:
    """Link every node to its k nearest by the distance of corners [G, N, 2], in pixels.

    Returns adjacency [G, N, N] bool; `adjacency[g, i, j]` is the edge from i to its neighbour j. Equally near nodes are
    taken by the lowest index. A node is no neighbour of itself, and k is at most N - 1.

    `keep_self=True` is the published rule: of the k + 1 nearest, the node itself included, the first is dropped on the
    assumption that it is the node; where several nodes share a corner that may be another one and a self edge remains.
    """
    G, N, _ = corners.shape
    position = corners.detach().long()  # corners are whole pixels: distances are exact, equal ones compare as equal
    squared = ((position[:, :, None] - position[:, None, :]) ** 2).sum(dim=-1)
    if not keep_self:
        itself = torch.eye(N, dtype=torch.bool, device=corners.device)
        squared = squared.masked_fill(itself, -1)  # nearer than any other: sorts first, and is dropped
    nearest = squared.argsort(dim=-1, stable=True)[:, :, 1 : k + 1]
    adjacency = torch.zeros(G, N, N, dtype=torch.bool, device=corners.device)
    return adjacency.scatter(2, nearest, True)


def propagation_matrix(adjacency: Tensor) -> Tensor:
    """Return [G, N, N] float32 P = D^-1/2 (A + I) D^-1/2, transposed so that `P @ nodes` sums over incoming edges.

    D is a node's in-degree plus one. A node that has an edge to itself gets no second one.
    """
    N = adjacency.shape[-1]
    with_self = (adjacency | torch.eye(N, dtype=torch.bool, device=adjacency.device)).float()
    scale = with_self.sum(dim=1).rsqrt()  # [G, N]
    return (scale[:, :, None] * with_self * scale[:, None, :]).transpose(1, 2)


class GraphConvolution(nn.Module):
    """One propagation step: nodes [G, N, C_in] to P nodes W + b, [G, N, C_out]."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.lin = nn.Linear(in_channels, out_channels, bias=False)
        self.bias = nn.Parameter(torch.zeros(out_channels))
        nn.init.xavier_uniform_(self.lin.weight)

    def forward(self, nodes: Tensor, propagation: Tensor) -> Tensor:
        return torch.bmm(propagation.to(nodes.dtype), self.lin(nodes)) + self.bias


class GraphHead(nn.Module):
    """Classifies a picture from the embeddings of its windows.

    `scope="image"` links windows of the same picture. `scope="batch"` is what the published code does: neighbours are
    sought among all windows of the batch, so that a prediction depends on the pictures it happens to share a batch
    with. `symmetric` adds the reverse of every edge.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        hidden_channels: tuple[int, ...] = (512, 256),
        neighbours: int = 3,
        symmetric: bool = True,
        scope: str = "image",
        dropout: float = 0.5,
    ):
        super().__init__()
        self.neighbours = neighbours
        self.symmetric = symmetric
        self.scope = scope
        self.convolutions = nn.ModuleList(GraphConvolution(i, o) for i, o in pairwise((in_channels, *hidden_channels)))
        self.dropout = nn.Dropout(dropout)
        self.classifier = Classifier(hidden_channels[-1], num_classes)

    def forward(self, nodes: Tensor, window_boxes: Tensor) -> Tensor:
        """Map window embeddings [B, N, C] and boxes [B, N, 4] to logits [B, classes]."""
        B, N, _ = nodes.shape
        corners = window_boxes[..., :2]
        if self.scope == "batch":
            nodes, corners = nodes.flatten(0, 1)[None], corners.flatten(0, 1)[None]
        adjacency = nearest_neighbours(corners, self.neighbours, keep_self=self.scope == "batch")
        if self.symmetric:
            adjacency = adjacency | adjacency.transpose(1, 2)
        propagation = propagation_matrix(adjacency)
        for index, convolution in enumerate(self.convolutions):
            nodes = F.relu(convolution(nodes, propagation))
            if index == 0:
                nodes = self.dropout(nodes)
        return self.classifier(nodes.reshape(B, N, -1).mean(dim=1))
