"""A graph over the windows of a picture and the graph convolutions that reason on it.

Kipf & Welling, "Semi-Supervised Classification with Graph Convolutional Networks", ICLR 2017; the neighbourhood rules
are those of SG-KRL: ours, in which the order of equally near windows is defined, and the published one.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.classifier import NEARLY_ZERO, Classifier
from networks.windows import pairwise_iou
from utils.errors import UserError

Edges = Literal["equal", "distance", "overlap"]  # what an edge weighs, see `edge_weights`


def nearest_neighbours(corners: Tensor, k: int) -> Tensor:
    """Link every node to its k nearest by the distance of corners [G, N, 2], in whole pixels: fractions are cut off.

    Returns adjacency [G, N, N] bool; `adjacency[g, i, j]` is the edge from i to its neighbour j. Equally near nodes are
    taken by the lowest index. A node is no neighbour of itself; of fewer than k others all are taken.
    """
    N = corners.shape[1]
    position = corners.detach().long()  # so distances are exact, and equal ones compare as equal
    squared = ((position[:, :, None] - position[:, None, :]) ** 2).sum(dim=-1)
    itself = torch.eye(N, dtype=torch.bool, device=corners.device)
    squared = squared.masked_fill(itself, -1)  # nearer than any other: sorts first, and is dropped
    nearest = squared.argsort(dim=-1, stable=True)[:, :, 1 : k + 1]
    return torch.zeros_like(squared, dtype=torch.bool).scatter(2, nearest, True)


def published_neighbours(corners: Tensor, k: int) -> Tensor:
    """Link nodes as the published SG-KRL does, by the same two calls; corners [G, N, 2] to adjacency [G, N, N] bool.

    Of a node's k + 1 nearest, itself included, the first is dropped on the assumption that it is the node. Where nodes
    share a corner it may be another one, and an edge from the node to itself remains. Which of equally near nodes are
    taken, and which comes first, is decided by `topk` and defined nowhere. Of fewer than k + 1 nodes all are taken.
    """
    corners = corners.detach().float()
    # `cdist` takes a matrix product from 26 nodes on, but a traced graph has to hold for any number. It may always take
    # one: corners are whole pixels, their products are exact, and distances are in the same order either way.
    product = "use_mm_for_euclid_dist"
    mode = product if torch.compiler.is_compiling() else f"{product}_if_necessary"
    distances = torch.cdist(corners, corners, compute_mode=mode)
    nearest = distances.topk(min(k + 1, corners.shape[1]), largest=False).indices[:, :, 1:]
    return torch.zeros_like(distances, dtype=torch.bool).scatter(2, nearest, True)


def edge_weights(boxes: Tensor, rule: str) -> Tensor:
    """Return what an edge between windows [G, N, 4] weighs, [G, N, N] float32, one on the diagonal.

    `rule`: `distance`, exp(-d^2 / (a + b)) with the distance d of the centres and the areas a and b; `overlap`, the
    intersection over union.
    """
    boxes = boxes.detach().float()
    if rule == "overlap":
        return pairwise_iou(boxes)
    centres = (boxes[..., :2] + boxes[..., 2:]) / 2
    areas = (boxes[..., 2:] - boxes[..., :2] + 1).prod(dim=-1)  # both ends belong to a box
    squared = (centres[..., :, None, :] - centres[..., None, :, :]).square().sum(dim=-1)
    return torch.exp(-squared / (areas[..., :, None] + areas[..., None, :]))


def propagation_matrix(adjacency: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return [G, N, N] float32 P = D^-1/2 (A + I) D^-1/2, transposed so that `P @ nodes` sums over incoming edges.

    A is the adjacency [G, N, N] bool, times `weights` of the same shape if given (one on the diagonal), D a node's
    in-degree (the sum of its incoming weights) plus one. A node that has an edge to itself gets no second one.
    """
    N = adjacency.shape[-1]
    with_self = (adjacency | torch.eye(N, dtype=torch.bool, device=adjacency.device)).float()
    if weights is not None:
        with_self = with_self * weights
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
    with. `neighbourhood` is the rule that links windows, `nearest_neighbours` or `published_neighbours`; `symmetric`
    adds the reverse of every edge. `edges`: what they weigh, see `edge_weights`. `zero_start` lets the logits start
    near zero, for a sum with others. Raises UserError for unknown `edges` and `scope`, and for weights with "batch".
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        hidden_channels: tuple[int, ...] = (512, 256),
        neighbours: int = 3,
        neighbourhood: Callable[[Tensor, int], Tensor] = nearest_neighbours,
        symmetric: bool = True,
        scope: str = "image",
        edges: Edges = "equal",
        dropout: float = 0.5,
        zero_start: bool = False,
    ):
        super().__init__()
        if edges not in get_args(Edges):
            raise UserError(f"unknown graph_edges {edges!r}; choose one of {', '.join(get_args(Edges))}")
        if scope not in ("image", "batch"):
            raise UserError(f"unknown graph_scope {scope!r}; choose image or batch")
        if edges != "equal" and scope == "batch":
            raise UserError(
                f"graph_edges is {edges!r}; expected 'equal' with graph_scope 'batch', whose windows share no picture"
            )
        self.edges = edges
        self.neighbours = neighbours
        self.neighbourhood = neighbourhood
        self.symmetric = symmetric
        self.scope = scope
        self.convolutions = nn.ModuleList(GraphConvolution(i, o) for i, o in pairwise((in_channels, *hidden_channels)))
        self.dropout = nn.Dropout(dropout)
        self.classifier = Classifier(hidden_channels[-1], num_classes)
        if zero_start:
            nn.init.normal_(self.classifier.weight, std=NEARLY_ZERO)
            nn.init.zeros_(self.classifier.bias)

    def forward(self, nodes: Tensor, window_boxes: Tensor) -> Tensor:
        """Map window embeddings [B, N, C] and boxes [B, N, 4] to logits [B, classes]."""
        B, N, _ = nodes.shape
        corners = window_boxes[..., :2]
        if self.scope == "batch":
            nodes, corners = nodes.flatten(0, 1)[None], corners.flatten(0, 1)[None]
        adjacency = self.neighbourhood(corners, self.neighbours)
        if self.symmetric:
            adjacency = adjacency | adjacency.transpose(1, 2)
        weights = None if self.edges == "equal" else edge_weights(window_boxes, self.edges)
        propagation = propagation_matrix(adjacency, weights)
        for index, convolution in enumerate(self.convolutions):
            nodes = F.relu(convolution(nodes, propagation))
            if index == 0:
                nodes = self.dropout(nodes)
        return self.classifier(nodes.reshape(B, N, -1).mean(dim=1))
