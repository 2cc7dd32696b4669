"""Graph: neighbours, propagation and the layers against loops over edges."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import reference
import torch
from torch import Tensor
from tracing import traced

from networks.graph import (
    GraphConvolution,
    GraphHead,
    edge_weights,
    nearest_neighbours,
    propagation_matrix,
    published_neighbours,
)
from utils.errors import UserError


def random_corners(graphs: int, nodes: int, *, span: int = 14, seed: int = 0) -> np.ndarray:
    """Corners as windows have them: multiples of 32 less one, many of them equal or equally far apart."""
    cells = np.random.default_rng(seed).integers(0, span, (graphs, nodes, 2))
    return np.maximum(32 * cells - 1, 0)


def random_adjacency(nodes: int, density: float, seed: int) -> np.ndarray:
    """Directed, with some self edges."""
    return np.random.default_rng(seed).random((nodes, nodes)) < density


def edges_of(adjacency: np.ndarray) -> list[tuple[int, int]]:
    return [(int(source), int(target)) for source, target in np.argwhere(adjacency)]


# ---- neighbours ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("span", (1, 2, 4, 14))
@pytest.mark.parametrize("nodes", (1, 2, 3, 4, 5, 7, 12))
def test_neighbours_equal_reference(nodes: int, span: int) -> None:
    corners = random_corners(40, nodes, span=span, seed=nodes)
    for neighbours in (1, 3):
        result = nearest_neighbours(torch.from_numpy(corners).float(), neighbours)
        assert result.dtype == torch.bool
        edges = [reference.neighbour_edges(one, neighbours) for one in corners]
        expected = [reference.edges_to_adjacency(one, nodes) for one in edges]
        np.testing.assert_array_equal(result.numpy(), np.stack(expected))


@pytest.mark.parametrize("nodes", (1, 2, 3, 7))
def test_number_of_neighbours(nodes: int) -> None:
    corners = torch.from_numpy(random_corners(5, nodes)).float()
    adjacency = nearest_neighbours(corners, 3)
    assert adjacency.shape == (5, nodes, nodes)
    assert (adjacency.sum(dim=2) == min(3, nodes - 1)).all()
    assert not adjacency.diagonal(dim1=1, dim2=2).any()


def test_equal_distances_lowest_index_first() -> None:
    corners = torch.tensor([[[0, 0], [32, 0], [0, 32], [-32, 0], [0, -32]]]).float()
    assert nearest_neighbours(corners, 2)[0, 0].tolist() == [False, True, True, False, False]
    assert nearest_neighbours(corners, 3)[0, 0].tolist() == [False, True, True, True, False]
    # 6400 + 0 and 2304 + 4096 are the same squared distance; a rounded root or product must not tell them apart.
    corners = torch.tensor([[[0, 0], [48, 64], [80, 0], [64, 48], [0, 80]]]).float() + 127
    assert nearest_neighbours(corners, 2)[0, 0].tolist() == [False, True, True, False, False]


@pytest.mark.parametrize("span", (1, 2, 4, 14))  # 1: all corners coincide
@pytest.mark.parametrize("nodes", (1, 2, 3, 4, 5, 7, 12, 25, 26, 42, 140))  # `cdist` takes another way from 26 on
def test_published_neighbours_equal_reference(nodes: int, span: int) -> None:
    corners = torch.from_numpy(random_corners(5, nodes, span=span, seed=nodes)).float()
    for neighbours in (1, 3):
        result = published_neighbours(corners, neighbours)
        assert result.dtype == torch.bool
        assert (result.sum(dim=2) == min(neighbours, nodes - 1)).all()
        edges = [reference.published_edges(one, neighbours) for one in corners]
        expected = [reference.edges_to_adjacency(one, nodes) for one in edges]
        np.testing.assert_array_equal(result.numpy(), np.stack(expected))


@pytest.mark.parametrize("nodes", (4, 7, 42))
def test_published_neighbours_are_the_nearest_less_one(nodes: int) -> None:
    """Whatever the order of equal ones: of the four nearest corners, the node's own among them, one is left out."""
    for corners in random_corners(20, nodes, span=5, seed=nodes):
        adjacency = published_neighbours(torch.from_numpy(corners).float()[None], 3)[0].numpy()
        for node, linked in zip(corners, adjacency, strict=True):
            squared = np.array([reference.squared_distance(node, other) for other in corners])
            nearest = sorted(squared)[:4]
            assert nearest[0] == 0
            assert sorted(squared[linked]) == nearest[1:]


def test_published_neighbours_keep_self_edges_where_corners_coincide() -> None:
    corners = torch.tensor([[10, 10], [10, 10], [10, 10], [50, 50], [90, 10]]).float()
    adjacency = published_neighbours(corners[None], 3)[0]
    own = adjacency[:3, :3].sum(dim=1)
    assert own.tolist() == [2, 2, 2]  # one of the three at the same corner was dropped, the node itself or another
    assert adjacency[:3, 3].all()
    assert not adjacency.diagonal()[3:].any()  # alone at their corners, these two were dropped themselves
    assert published_neighbours(corners[None, :1], 3).tolist() == [[[False]]]
    whole_batch = torch.from_numpy(random_corners(1, 6 * 7, span=5, seed=3)).float()
    assert published_neighbours(whole_batch, 3).diagonal(dim1=1, dim2=2).any()
    assert not nearest_neighbours(whole_batch, 3).diagonal(dim1=1, dim2=2).any()


@pytest.mark.parametrize("nodes", (7, 42))
def test_published_neighbours_are_the_same_traced_and_under_autocast(nodes: int) -> None:
    corners = torch.from_numpy(random_corners(6, nodes, span=6, seed=nodes)).float()
    expected = published_neighbours(corners, 3)
    compiled = traced(published_neighbours)
    assert torch.equal(compiled(corners, 3), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(published_neighbours(corners, 3), expected)


# ---- propagation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", (0.0, 0.2, 0.5, 1.0))
@pytest.mark.parametrize("nodes", (1, 2, 3, 7, 20))
def test_propagation_equals_a_loop_over_edges(nodes: int, density: float) -> None:
    adjacency = np.stack([random_adjacency(nodes, density, seed) for seed in range(6)])
    values = torch.randn(6, nodes, 5, generator=torch.Generator().manual_seed(0))
    matrix = propagation_matrix(torch.from_numpy(adjacency))
    assert matrix.dtype == torch.float32
    for one_matrix, one_adjacency, one_values in zip(matrix, adjacency, values, strict=True):
        expected = reference.propagate(one_values, edges_of(one_adjacency))
        torch.testing.assert_close(one_matrix @ one_values, expected, rtol=1e-5, atol=1e-5)


def test_propagation_by_hand() -> None:
    adjacency = torch.zeros(1, 3, 3, dtype=torch.bool)
    adjacency[0, 0, 1] = adjacency[0, 2, 1] = adjacency[0, 2, 2] = True  # 0 -> 1, 2 -> 1 and a self edge of 2
    root = 3**-0.5
    expected = [[1, 0, 0], [root, 1 / 3, root], [0, 0, 1]]
    torch.testing.assert_close(propagation_matrix(adjacency)[0], torch.tensor(expected))


def test_self_edge_is_not_counted_twice() -> None:
    adjacency = torch.from_numpy(random_adjacency(7, 0.4, seed=1))[None]
    with_self = adjacency | torch.eye(7, dtype=torch.bool)
    assert torch.equal(propagation_matrix(adjacency), propagation_matrix(with_self))


def test_symmetric_edges_give_a_symmetric_matrix_of_norm_one() -> None:
    adjacency = nearest_neighbours(torch.from_numpy(random_corners(30, 7)).float(), 3)
    adjacency = adjacency | adjacency.transpose(1, 2)
    matrix = propagation_matrix(adjacency)
    torch.testing.assert_close(matrix, matrix.transpose(1, 2))
    torch.testing.assert_close(torch.linalg.matrix_norm(matrix, ord=2), torch.ones(30), rtol=1e-5, atol=1e-5)


# ---- weights ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ("distance", "overlap"))
def test_edge_weights_equal_their_definition(rule: str) -> None:
    generator = np.random.default_rng(0)
    starts = generator.integers(0, 100, (3, 6, 2))
    boxes = np.concatenate([starts, starts + generator.integers(0, 100, (3, 6, 2))], axis=2)
    result = edge_weights(torch.from_numpy(boxes).float(), rule)
    for one, weights in zip(boxes, result, strict=True):
        for i, j in itertools.product(range(6), repeat=2):
            first, second = one[i].astype(float), one[j].astype(float)
            if rule == "overlap":
                expected = reference.intersection_over_union(first, second)
            else:
                areas = [(box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (first, second)]
                squared = sum(((first[k] + first[k + 2]) / 2 - (second[k] + second[k + 2]) / 2) ** 2 for k in (0, 1))
                expected = np.exp(-squared / sum(areas))
            assert weights[i, j].item() == pytest.approx(expected, abs=1e-6)
            assert i != j or weights[i, j] == 1


def test_weights_of_one_are_no_weights() -> None:
    adjacency = torch.from_numpy(np.stack([random_adjacency(7, 0.4, seed) for seed in range(5)]))
    weighted = propagation_matrix(adjacency, torch.ones(5, 7, 7))
    torch.testing.assert_close(weighted, propagation_matrix(adjacency))


def test_weighted_propagation_equals_loops() -> None:
    adjacency = random_adjacency(6, 0.5, 3)
    weights = np.random.default_rng(4).random((6, 6))
    np.fill_diagonal(weights, 1)
    result = propagation_matrix(torch.from_numpy(adjacency)[None], torch.from_numpy(weights)[None].float())[0]
    strength = {(i, j): weights[i, j] for i in range(6) for j in range(6) if adjacency[i, j] or i == j}
    degree = [sum(value for (_, target), value in strength.items() if target == node) for node in range(6)]
    for target, source in itertools.product(range(6), repeat=2):
        expected = strength.get((source, target), 0) / np.sqrt(degree[source] * degree[target])
        assert result[target, source].item() == pytest.approx(expected, abs=1e-6)


def test_a_head_weighs_its_edges() -> None:
    nodes, boxes = head_inputs(3)
    plain, weighted = (build_head(edges=edges)(nodes, boxes) for edges in ("equal", "overlap"))
    assert not torch.allclose(plain, weighted)
    torch.testing.assert_close(build_head(edges="overlap")(nodes[1:2], boxes[1:2]), weighted[1:2])


@pytest.mark.parametrize(("settings", "words"), (({"edges": "all"}, "equal"), ({"edges": "overlap"}, "batch")))
def test_impossible_edges_are_refused(settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build_head(scope="batch", **settings)


# ---- layers -------------------------------------------------------------------------------------------------------


def test_graph_convolution_equals_reference() -> None:
    torch.manual_seed(0)
    layer = GraphConvolution(6, 4)
    assert {name: tuple(value.shape) for name, value in layer.named_parameters()} == {
        "lin.weight": (4, 6),
        "bias": (4,),
    }
    assert not layer.bias.any()
    torch.nn.init.normal_(layer.bias)
    adjacency = np.stack([random_adjacency(7, 0.4, seed) for seed in range(5)])
    nodes = torch.randn(5, 7, 6)
    result = layer(nodes, propagation_matrix(torch.from_numpy(adjacency)))
    for one, one_adjacency, one_result in zip(nodes, adjacency, result, strict=True):
        expected = reference.graph_convolution(one, edges_of(one_adjacency), layer.lin.weight, layer.bias)
        torch.testing.assert_close(one_result, expected, rtol=1e-4, atol=1e-5)


def test_graph_convolution_does_not_care_for_the_order_of_nodes() -> None:
    torch.manual_seed(1)
    layer = GraphConvolution(6, 4)
    nodes, order = torch.randn(1, 7, 6), torch.randperm(7)
    adjacency = torch.from_numpy(random_adjacency(7, 0.4, seed=9))[None]
    result = layer(nodes, propagation_matrix(adjacency))
    shuffled = layer(nodes[:, order], propagation_matrix(adjacency[:, order][:, :, order]))
    torch.testing.assert_close(shuffled, result[:, order], rtol=1e-4, atol=1e-5)


def build_head(**settings: object) -> GraphHead:
    torch.manual_seed(2)
    head = GraphHead(16, 5, hidden_channels=(12, 8), **settings).eval()
    for name, value in head.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(value, std=0.1)
    return head


def build_published_head(*, scope: str) -> GraphHead:
    """As sgkrl_published builds it: the published rule is that of graphs over the batch."""
    rule = published_neighbours if scope == "batch" else nearest_neighbours
    return build_head(neighbourhood=rule, symmetric=False, scope=scope)


def head_reference(head: GraphHead, nodes: Tensor, boxes: Tensor, graph_scope: str) -> Tensor:
    weights = [value.detach() for name, value in head.named_parameters() if name.endswith("weight")]
    biases = [value.detach() for name, value in head.named_parameters() if name.endswith("bias")]
    named = {}
    for name, weight, bias in zip(("conv1.lin", "conv3.lin", "classifier"), weights, biases, strict=True):
        named[f"gcn_model.{name}.weight"] = weight
        named[f"gcn_model.{name.removesuffix('.lin')}.bias"] = bias
    return reference.published_graph(named, nodes, boxes, graph_scope)


def head_inputs(batch: int, count: int = 7) -> tuple[Tensor, Tensor]:
    corners = torch.from_numpy(random_corners(batch, count, span=4, seed=4)).float()
    nodes = torch.randn(batch, count, 16, generator=torch.Generator().manual_seed(5))
    return nodes, torch.cat([corners, corners + 96], dim=-1)


@pytest.mark.parametrize("scope", ("image", "batch"))
@pytest.mark.parametrize(("batch", "count"), ((1, 1), (1, 3), (4, 1), (4, 2), (4, 3), (4, 7), (12, 7)))
def test_published_head_equals_reference(batch: int, count: int, scope: str) -> None:
    head = build_published_head(scope=scope)
    nodes, boxes = head_inputs(batch, count)
    with torch.no_grad():
        result = head(nodes, boxes)
    assert result.shape == (batch, 5)
    torch.testing.assert_close(result, head_reference(head, nodes, boxes, scope), rtol=1e-4, atol=1e-5)


def test_dropout_comes_after_the_first_convolution_only() -> None:
    head, widths = build_head(), []
    head.dropout.register_forward_hook(lambda module, given, found: widths.append(found.shape[-1]))
    head.train()(*head_inputs(2))
    assert widths == [12]


@pytest.mark.parametrize("symmetric", (False, True))
def test_graph_inside_the_image_does_not_know_its_batch(symmetric: bool) -> None:
    head = build_head(symmetric=symmetric, scope="image")
    nodes, boxes = head_inputs(6)
    with torch.no_grad():
        together = head(nodes, boxes)
        alone = torch.cat([head(one[None], box[None]) for one, box in zip(nodes, boxes, strict=True)])
        order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
        shuffled = head(nodes[order], boxes[order])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(shuffled, together[order], rtol=1e-5, atol=1e-6)


def test_graph_over_the_batch_knows_its_batch() -> None:
    head = build_published_head(scope="batch")
    nodes, boxes = head_inputs(6)
    with torch.no_grad():
        assert not torch.allclose(head(nodes, boxes)[:1], head(nodes[:1], boxes[:1]), atol=1e-3)


def test_symmetric_head_equals_a_loop_over_edges_both_ways() -> None:
    head = build_head(symmetric=True, scope="image")
    nodes, boxes = head_inputs(4)
    layers = [module for module in head.modules() if isinstance(module, GraphConvolution)]
    classifier = [module for module in head.modules() if isinstance(module, torch.nn.Linear)][-1]
    with torch.no_grad():
        result = head(nodes, boxes)
        for one, image_boxes, logits in zip(nodes, boxes, result, strict=True):
            one_way = reference.neighbour_edges(image_boxes[:, :2].numpy(), 3)
            edges = sorted(set(one_way) | {(target, source) for source, target in one_way})
            for layer in layers:
                one = torch.relu(reference.graph_convolution(one, edges, layer.lin.weight, layer.bias))
            torch.testing.assert_close(logits, classifier(one.mean(dim=0)), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_head_that_starts_near_zero() -> None:
    nodes, boxes = head_inputs(4)
    torch.manual_seed(2)
    plain = GraphHead(16, 5).eval()(nodes, boxes)
    torch.manual_seed(2)
    started = GraphHead(16, 5, zero_start=True).eval()(nodes, boxes)
    assert 0 < started.abs().max() < 0.02 * plain.abs().max()


@pytest.mark.parametrize("scope", ("image", "batch"))
@pytest.mark.parametrize("build", (build_head, build_published_head))
def test_no_host_synchronisation_and_no_graph_break(build: Callable[..., GraphHead], scope: str) -> None:
    head = build(scope=scope)
    inputs = head_inputs(5)
    with torch.no_grad():
        expected = head(*inputs)
        with reference.ForbidHostReads():
            result = head(*inputs)
        torch.testing.assert_close(result, expected)
        compiled = traced(head)(*inputs)
    torch.testing.assert_close(compiled, expected)


def test_every_parameter_and_node_gets_a_gradient() -> None:
    head = build_head(symmetric=True, scope="image")
    nodes, boxes = head_inputs(4)
    nodes.requires_grad_()
    head(nodes, boxes).square().sum().backward()
    assert (nodes.grad.abs().sum(dim=2) > 0).all()
    assert all(value.grad.abs().sum() > 0 for value in head.parameters())


def test_an_unknown_scope_is_refused() -> None:
    with pytest.raises(UserError, match="unknown graph_scope 'batches'; choose image or batch"):
        GraphHead(8, 2, scope="batches")
