"""Slow, obvious versions of what `networks` computes in batches: one image, one window, one edge at a time.

They are written from the description of the published systems, not from our code, and are what the tests compare with.
Boxes are `(x0, y0, x1, y1)`; in pixels both ends are inclusive, in cells the last two are exclusive.
A window size is `(height, width)` in cells; a window set is a tuple of `(sizes, quota)`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from skimage.measure import label as label_components
from skimage.measure import regionprops
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import resnet50

WindowSet = tuple[tuple[tuple[tuple[int, int], ...], int], ...]

BIRDS: WindowSet = (
    (((4, 4), (3, 5), (5, 3)), 2),
    (((6, 6), (5, 7), (7, 5)), 3),
    (((8, 8), (6, 10), (10, 6), (7, 9), (9, 7), (7, 10), (10, 7)), 2),
)
VEHICLES: WindowSet = (
    (((6, 6), (5, 7), (7, 5)), 3),
    (((8, 8), (6, 10), (10, 6), (7, 9), (9, 7)), 2),
    (((10, 10), (9, 11), (11, 9), (8, 12), (12, 8)), 1),
)


# ---- localization -------------------------------------------------------------------------------------------------


def mask_above_mean(activation: np.ndarray) -> np.ndarray:
    """`[H, W]` map -> bool `[H, W]`: the cells above the map's own mean."""
    return activation > activation.mean(dtype=np.float64)


def largest_component(mask: np.ndarray) -> np.ndarray:
    """The largest 8-connected component of a bool `[H, W]` mask; of equal ones the first met row by row."""
    regions = regionprops(label_components(mask, connectivity=2))
    result = np.zeros_like(mask)
    if not regions:
        return result
    largest_area = max(region.area for region in regions)
    candidates = [region for region in regions if region.area == largest_area]
    chosen = min(candidates, key=lambda region: min(map(tuple, region.coords)))
    for row, column in chosen.coords:
        result[row, column] = True
    return result


def largest_component_by_flood(mask: np.ndarray) -> np.ndarray:
    """The same by flood fill in plain Python, so that the reference has a check of its own."""
    height, width = mask.shape
    seen: set[tuple[int, int]] = set()
    best: list[tuple[int, int]] = []
    for start in np.ndindex(height, width):
        if not mask[start] or start in seen:
            continue
        seen.add(start)
        waiting, members = [start], []
        while waiting:
            row, column = waiting.pop()
            members.append((row, column))
            for next_row in range(max(row - 1, 0), min(row + 2, height)):
                for next_column in range(max(column - 1, 0), min(column + 2, width)):
                    neighbour = (next_row, next_column)
                    if mask[neighbour] and neighbour not in seen:
                        seen.add(neighbour)
                        waiting.append(neighbour)
        if len(members) > len(best):
            best = members
    result = np.zeros_like(mask)
    for cell in best:
        result[cell] = True
    return result


def localize(mask: np.ndarray, penultimate_mask: np.ndarray) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """Two bool `[H, W]` masks -> the intersection's cells and its box in cells `(x0, y0, x1, y1)`, exclusive ends.

    An empty intersection has the whole grid for its box.
    """
    cells = largest_component(mask) & penultimate_mask
    height, width = mask.shape
    if not cells.any():
        return cells, (0, 0, width, height)
    rows, columns = np.nonzero(cells)
    return cells, (int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1)


def adaptive_mask(cells: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
    """Rows filled between their first and last cell, one cell wider at either end inside the box; empty -> all True."""
    if not cells.any():
        return np.ones_like(cells)
    x0, _, x1, _ = box
    result = np.zeros_like(cells)
    for row in range(cells.shape[0]):
        columns = [column for column in range(cells.shape[1]) if cells[row, column]]
        if not columns:
            continue
        for column in range(columns[0], columns[-1] + 1):
            result[row, column] = True
        if x0 <= columns[0] - 1:
            result[row, columns[0] - 1] = True
        if columns[-1] + 1 < x1:
            result[row, columns[-1] + 1] = True
    return result


def cell_box_to_pixels(box: tuple[int, int, int, int], stride: int) -> tuple[int, int, int, int]:
    """A box in cells, exclusive ends -> pixels, inclusive ends, as the published code counts them."""
    x0, y0, x1, y1 = box
    return max(stride * x0 - 1, 0), max(stride * y0 - 1, 0), stride * x1 - 1, stride * y1 - 1


# ---- crops --------------------------------------------------------------------------------------------------------


def crop_and_resize(image: Tensor, box: tuple[int, int, int, int], size: int) -> Tensor:
    """The pixels `[y0..y1, x0..x1]` of one `[C, H, W]` image, resized to `[C, size, size]`."""
    x0, y0, x1, y1 = (int(value) for value in box)
    part = image[None, :, y0 : y1 + 1, x0 : x1 + 1]
    return F.interpolate(part, size=(size, size), mode="bilinear", align_corners=True)[0]


# ---- windows ------------------------------------------------------------------------------------------------------


def crop_cells(map_: np.ndarray, box: tuple[float, ...], size: int, input_size: int) -> np.ndarray:
    """One inclusive pixel box cut out of a `[C, g, g]` map of the whole input: `[C, size, size]`, cell by cell."""
    _, rows, columns = map_.shape
    x0, y0, x1, y1 = box
    left, width = x0 * columns / input_size, (x1 + 1 - x0) * columns / input_size  # in cells
    top, height = y0 * rows / input_size, (y1 + 1 - y0) * rows / input_size
    across, down = math.ceil(width / size), math.ceil(height / size)  # samples of a cell
    result = np.zeros((len(map_), size, size))
    for row, column in itertools.product(range(size), repeat=2):
        for i, j in itertools.product(range(down), range(across)):
            y = top + (row + (i + 0.5) / down) * height / size
            x = left + (column + (j + 0.5) / across) * width / size
            result[:, row, column] += bilinear(map_, y - 0.5, x - 0.5) / (down * across)
    return result


def bilinear(map_: np.ndarray, y: float, x: float) -> np.ndarray:
    """The values `[C]` at a place of a `[C, h, w]` map, whose first cell's centre is (0, 0); border cells go on."""
    _, rows, columns = map_.shape
    y, x = min(max(y, 0), rows - 1), min(max(x, 0), columns - 1)
    above, left = math.floor(y), math.floor(x)
    below, right = min(above + 1, rows - 1), min(left + 1, columns - 1)
    upper = (1 - (x - left)) * map_[:, above, left] + (x - left) * map_[:, above, right]
    lower = (1 - (x - left)) * map_[:, below, left] + (x - left) * map_[:, below, right]
    return (1 - (y - above)) * upper + (y - above) * lower


def scale_window_set(window_set: WindowSet, grid_size: int) -> WindowSet:
    """A set for a 14-cell grid on another one: sizes rounded half up, within the grid, once per group."""
    groups = []
    for sizes, quota in window_set:
        scaled: list[tuple[int, int]] = []
        for size in sizes:
            height, width = (min(max(math.floor(side * grid_size / 14 + 0.5), 1), grid_size) for side in size)
            if (height, width) not in scaled:
                scaled.append((height, width))
        groups.append((tuple(scaled), quota))
    return tuple(groups)


def window_grid(sizes: tuple[tuple[int, int], ...], grid_size: int, stride: int) -> np.ndarray:
    """Every placement of every size, int64 `[n, 4]`: inclusive pixels `(x0, y0, x1, y1)`."""
    boxes = []
    for height, width in sizes:
        for row in range(grid_size - height + 1):
            for column in range(grid_size - width + 1):
                y0, x0 = stride * row - 1, stride * column - 1
                boxes.append((max(x0, 0), max(y0, 0), x0 + stride * width, y0 + stride * height))
    return np.array(boxes, dtype=np.int64).reshape(-1, 4)


def window_scores(features: Tensor, sizes: tuple[tuple[int, int], ...]) -> Tensor:
    """One `[C, g, g]` map -> `[n]`: each size average-pooled at stride 1, summed over the channels."""
    return torch.cat([F.avg_pool2d(features[None], size, stride=1)[0].sum(dim=0).flatten() for size in sizes])


def intersection_over_union(first: np.ndarray, second: np.ndarray) -> float:
    """Of two inclusive pixel boxes: a box from 3 to 5 is 3 pixels wide."""
    width = max(min(first[2], second[2]) - max(first[0], second[0]) + 1, 0)
    height = max(min(first[3], second[3]) - max(first[1], second[1]) + 1, 0)
    first_area = (first[2] - first[0] + 1) * (first[3] - first[1] + 1)
    second_area = (second[2] - second[0] + 1) * (second[3] - second[1] + 1)
    return width * height / (first_area + second_area - width * height)


def greedy_selection(scores: np.ndarray, conflicts: np.ndarray, quota: int) -> list[int]:
    """Indices of the kept windows of one image: highest score first (then lowest index), the last repeated to `quota`.

    `scores` is `[n]`; `conflicts[i, j]` of `[n, n]` says that a kept `i` drops `j`.
    """
    remaining = sorted(range(len(scores)), key=lambda index: (-float(scores[index]), index))
    kept: list[int] = []
    while remaining and len(kept) < quota:
        best = remaining[0]
        kept.append(best)
        remaining = [index for index in remaining[1:] if not conflicts[best, index]]
    return kept + [kept[-1]] * (quota - len(kept))


def select_windows(features: Tensor, window_set: WindowSet, stride: int) -> np.ndarray:
    """One `[C, g, g]` map and a window set for its grid -> int64 `[N, 4]` inclusive pixel boxes."""
    selected = []
    for sizes, quota in window_set:
        boxes = window_grid(sizes, features.shape[-1], stride)
        scores = window_scores(features, sizes).numpy()
        remaining = sorted(range(len(boxes)), key=lambda index: (-float(scores[index]), index))
        kept: list[int] = []
        while remaining and len(kept) < quota:
            best = remaining.pop(0)
            kept.append(best)
            remaining = [index for index in remaining if intersection_over_union(boxes[best], boxes[index]) <= 0.25]
        kept += [kept[-1]] * (quota - len(kept))
        selected.extend(boxes[index] for index in kept)
    return np.stack(selected)


# ---- graph --------------------------------------------------------------------------------------------------------


def squared_distance(first: np.ndarray, second: np.ndarray) -> float:
    return float(sum((float(a) - float(b)) ** 2 for a, b in zip(first, second, strict=True)))


def neighbour_edges(corners: np.ndarray, neighbours: int) -> list[tuple[int, int]]:
    """Directed edges `(i, j)`: `j` is among the nearest of `i`, itself excluded; equal distances: lowest index."""
    edges = []
    for i in range(len(corners)):
        others = [j for j in range(len(corners)) if j != i]
        others.sort(key=lambda j: (squared_distance(corners[i], corners[j]), j))
        edges.extend((i, j) for j in others[:neighbours])
    return edges


def published_edges(corners: Tensor, neighbours: int) -> list[tuple[int, int]]:
    """The published rule on float corners `[N, 2]`: the `neighbours + 1` nearest, the node itself among them, less the
    first of these. Which of equal distances come first is left to `topk`, as published.
    """
    nearest = torch.cdist(corners, corners).topk(min(neighbours + 1, len(corners)), largest=False).indices
    return [(i, j) for i, row in enumerate(nearest.tolist()) for j in row[1:]]


def propagate(nodes: Tensor, edges: list[tuple[int, int]]) -> Tensor:
    """`[N, C]` -> `[N, C]`: every node sums over its incoming edges and itself, weighted by 1 / sqrt(degrees)."""
    with_self = list(edges)
    for node in range(len(nodes)):
        if (node, node) not in with_self:
            with_self.append((node, node))
    degree = [sum(1 for _, target in with_self if target == node) for node in range(len(nodes))]
    result = torch.zeros_like(nodes)
    for source, target in with_self:
        result[target] += nodes[source] / math.sqrt(degree[source] * degree[target])
    return result


def graph_convolution(nodes: Tensor, edges: list[tuple[int, int]], weight: Tensor, bias: Tensor) -> Tensor:
    """Kipf and Welling's layer: `[N, in]` -> `[N, out]` with `weight` `[out, in]`."""
    return propagate(nodes @ weight.T, edges) + bias


def edges_to_adjacency(edges: list[tuple[int, int]], nodes: int) -> np.ndarray:
    """bool `[nodes, nodes]`: `[i, j]` is the edge from `i` to `j`."""
    adjacency = np.zeros((nodes, nodes), dtype=bool)
    for source, target in edges:
        adjacency[source, target] = True
    return adjacency


# ---- whole networks -----------------------------------------------------------------------------------------------


def without_prefix(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("module."): value for name, value in state_dict.items()}


class PublishedTrunk:
    """torchvision's ResNet-50 with the weights under `pretrained_model.`, in evaluation mode, one image at a time."""

    def __init__(self, state_dict: dict[str, Tensor]) -> None:
        weights = {
            name.removeprefix("pretrained_model."): value
            for name, value in state_dict.items()
            if name.startswith("pretrained_model.")
        }
        with torch.device("meta"):
            self.network = resnet50(weights=None)
        if "fc.weight" not in weights:
            self.network.fc = nn.Identity()
        self.network.load_state_dict(weights, strict=True, assign=True)
        self.network.eval()

    def __call__(self, image: Tensor) -> dict[str, Tensor]:
        """`[3, S, S]` -> the maps `[C, H, W]` and the embedding `[C]`."""
        network = self.network
        maps = network.maxpool(network.relu(network.bn1(network.conv1(image[None]))))
        stage2 = network.layer2(network.layer1(maps))
        stage3 = network.layer3(stage2)
        penultimate = network.layer4[1](network.layer4[0](stage3))
        final = network.layer4[2](penultimate)
        return {
            "stage2": stage2[0],
            "stage3": stage3[0],
            "penultimate": penultimate[0],
            "final": final[0],
            "embedding": final[0].mean(dim=(1, 2)),
        }


def fuse(state_dict: dict[str, Tensor], name: str, heads: int, high: Tensor, low: Tensor) -> Tensor:
    """Cross-attention from `high` `[C, g, g]` to `low` `[c, h, w]` -> `[c, g, g]`, head by head."""

    def project(which: str, tokens: Tensor) -> Tensor:
        return tokens @ state_dict[f"{name}.{which}.weight"].T + state_dict[f"{name}.{which}.bias"]

    grid_size = high.shape[-1]
    low = F.adaptive_avg_pool2d(low[None], grid_size)[0]
    high_tokens, low_tokens = high.flatten(1).T, low.flatten(1).T  # [g * g, channels]
    queries, keys, values = project("q_proj", high_tokens), project("k_proj", low_tokens), project("v_proj", low_tokens)
    head_size = queries.shape[1] // heads
    mixed = []
    for head in range(heads):
        own = slice(head * head_size, (head + 1) * head_size)
        weights = torch.softmax(queries[:, own] @ keys[:, own].T / math.sqrt(head_size), dim=1)
        mixed.append(weights @ values[:, own])
    return project("out_proj", torch.cat(mixed, dim=1)).T.reshape(low.shape)


def weight_with_gates(state_dict: dict[str, Tensor], final: Tensor) -> Tensor:
    """The published CBAM on one `[C, g, g]` map."""
    squeeze = state_dict["CBAM.channelattention.fc.0.weight"].flatten(1)
    expand = state_dict["CBAM.channelattention.fc.2.weight"].flatten(1)

    def perceptron(pooled: Tensor) -> Tensor:
        return expand @ torch.relu(squeeze @ pooled)

    channel_gate = torch.sigmoid(perceptron(final.mean(dim=(1, 2))) + perceptron(final.amax(dim=(1, 2))))
    weighted = final * channel_gate[:, None, None]
    summary = torch.stack([weighted.mean(dim=0), weighted.amax(dim=0)])
    convolution = state_dict["CBAM.spatialattention.conv1.weight"]
    return weighted * torch.sigmoid(F.conv2d(summary[None], convolution, padding=1)[0])


def object_and_windows(
    trunk: PublishedTrunk, image: Tensor, localization_map: Tensor, penultimate: Tensor, *, mask_background: bool
) -> tuple[tuple[int, int, int, int], Tensor, dict[str, Tensor]]:
    """Locate the object in one image and pass its crop: the box in pixels, the crop, the crop's features."""
    cells, box = localize(
        mask_above_mean(localization_map.sum(dim=0).numpy()), mask_above_mean(penultimate.sum(dim=0).numpy())
    )
    stride = image.shape[-1] // cells.shape[-1]
    pixel_box = cell_box_to_pixels(box, stride)
    if mask_background:
        kept = np.kron(adaptive_mask(cells, box), np.ones((stride, stride)))
        image = image * torch.from_numpy(kept).to(image.dtype)
    crop = crop_and_resize(image, pixel_box, image.shape[-1])
    return pixel_box, crop, trunk(crop)


@torch.no_grad()
def published_sgkrl(
    state_dict: dict[str, Tensor],
    images: Tensor,
    *,
    mask_background: bool,
    graph_scope: str,
    input_size: int = 448,
    window_set: WindowSet,
) -> dict[str, Tensor]:
    """The published SG-KRL in evaluation mode, one image at a time.

    `state_dict` has the published names, `images` is `[B, 3, input_size, input_size]`, `window_set` is already scaled
    to the grid of `input_size // 32` cells; `graph_scope` is "batch" (as published) or "image".
    Returns the logits `raw`, `object`, `graph` `[B, classes]`, `window` `[B, N, classes]` and the inclusive pixel boxes
    `object_boxes` `[B, 4]`, `window_boxes` `[B, N, 4]`.
    """
    assert images.shape[-2:] == (input_size, input_size)
    weights = without_prefix(state_dict)
    trunk = PublishedTrunk(weights)

    def classify(embedding: Tensor) -> Tensor:
        return weights["rawcls_net.weight"] @ embedding + weights["rawcls_net.bias"]

    results: dict[str, list[Tensor]] = {
        name: [] for name in ("raw", "object", "window", "object_boxes", "window_boxes", "nodes")
    }
    for image in images:
        features = trunk(image)
        fused = torch.cat(
            [
                fuse(weights, "fusion4", 8, features["final"], features["stage3"]),
                fuse(weights, "fusion3", 8, features["final"], features["stage2"]),
                features["final"],
            ]
        )
        box, crop, crop_features = object_and_windows(
            trunk, image, fused, features["penultimate"], mask_background=mask_background
        )
        windows = select_windows(weight_with_gates(weights, crop_features["final"]), window_set, 32)
        nodes = torch.stack([trunk(crop_and_resize(crop, window, input_size // 2))["embedding"] for window in windows])
        results["raw"].append(classify(features["embedding"]))
        results["object"].append(classify(crop_features["embedding"]))
        results["window"].append(torch.stack([classify(node) for node in nodes]))
        results["object_boxes"].append(torch.tensor(box, dtype=torch.float32))
        results["window_boxes"].append(torch.from_numpy(windows).float())
        results["nodes"].append(nodes)

    output = {name: torch.stack(values) for name, values in results.items()}
    output["graph"] = published_graph(weights, output.pop("nodes"), output["window_boxes"], graph_scope)
    return output


def published_graph(weights: dict[str, Tensor], nodes: Tensor, window_boxes: Tensor, graph_scope: str) -> Tensor:
    """`nodes` `[B, N, C]` with their boxes `[B, N, 4]` -> logits `[B, classes]`."""
    batch, count, channels = nodes.shape

    def transform(nodes: Tensor, edges: list[tuple[int, int]]) -> Tensor:
        for layer in ("conv1", "conv3"):
            weight, bias = weights[f"gcn_model.{layer}.lin.weight"], weights[f"gcn_model.{layer}.bias"]
            nodes = torch.relu(graph_convolution(nodes, edges, weight, bias))
        return nodes

    if graph_scope == "batch":
        edges = published_edges(window_boxes[..., :2].reshape(batch * count, 2), 3)
        hidden = transform(nodes.reshape(batch * count, channels), edges).reshape(batch, count, -1)
    else:
        hidden = torch.stack(
            [
                transform(image_nodes, neighbour_edges(image_boxes[:, :2].numpy(), 3))
                for image_nodes, image_boxes in zip(nodes, window_boxes, strict=True)
            ]
        )
    pooled = hidden.mean(dim=1)
    return pooled @ weights["gcn_model.classifier.weight"].T + weights["gcn_model.classifier.bias"]


@torch.no_grad()
def published_mmal(
    state_dict: dict[str, Tensor], images: Tensor, *, input_size: int = 448, window_set: WindowSet
) -> dict[str, Tensor]:
    """The published MMAL-Net in evaluation mode: as `published_sgkrl` without fusion, weighting, mask and graph."""
    assert images.shape[-2:] == (input_size, input_size)
    weights = without_prefix(state_dict)
    trunk = PublishedTrunk(weights)

    def classify(embedding: Tensor) -> Tensor:
        return weights["rawcls_net.weight"] @ embedding + weights["rawcls_net.bias"]

    results: dict[str, list[Tensor]] = {
        name: [] for name in ("raw", "object", "window", "object_boxes", "window_boxes")
    }
    for image in images:
        features = trunk(image)
        box, crop, crop_features = object_and_windows(
            trunk, image, features["final"], features["penultimate"], mask_background=False
        )
        windows = select_windows(crop_features["final"], window_set, 32)
        logits = [classify(trunk(crop_and_resize(crop, window, input_size // 2))["embedding"]) for window in windows]
        results["raw"].append(classify(features["embedding"]))
        results["object"].append(classify(crop_features["embedding"]))
        results["window"].append(torch.stack(logits))
        results["object_boxes"].append(torch.tensor(box, dtype=torch.float32))
        results["window_boxes"].append(torch.from_numpy(windows).float())
    return {name: torch.stack(values) for name, values in results.items()}


def random_published_state_dict(
    num_classes: int, seed: int, *, system: str = "sgkrl", prefix: str = ""
) -> dict[str, Tensor]:
    """Random weights under the names of a published checkpoint, of sizes that keep the activations sane.

    `system` is "sgkrl" or "mmal"; `prefix` (such as "module.") goes before every name. The trunk's unused `fc` is in.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0, centre: float = 0.0) -> Tensor:
        return centre + scale * torch.randn(shape, generator=generator)

    def uniform(*shape: int, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    weights: dict[str, Tensor] = {}
    with torch.device("meta"):
        template = resnet50(weights=None).state_dict()
    for name, value in template.items():
        shape = tuple(value.shape)
        if name.endswith("num_batches_tracked"):
            made = torch.tensor(1000)
        elif name.endswith("running_var"):
            made = uniform(*shape, low=0.5, high=1.5)
        elif name.endswith("running_mean"):
            made = normal(*shape, scale=0.2)
        elif len(shape) == 4:
            made = normal(*shape, scale=math.sqrt(2 / math.prod(shape[1:])))
        elif name == "fc.weight":
            made = normal(*shape, scale=0.02)
        elif name.endswith("weight"):
            # The last normalisation of a bottleneck is small, or sixteen residual sums would grow without bound.
            made = uniform(*shape, low=0.2, high=0.4) if "bn3" in name else uniform(*shape, low=0.7, high=1.3)
        else:
            made = normal(*shape, scale=0.1)
        weights[f"pretrained_model.{name}"] = made

    def add_linear(name: str, inputs: int, outputs: int, gain: float = 1.0) -> None:
        weights[f"{name}.weight"] = normal(outputs, inputs, scale=gain / math.sqrt(inputs))
        weights[f"{name}.bias"] = normal(outputs, scale=0.1)

    add_linear("rawcls_net", 2048, num_classes)
    if system == "sgkrl":
        weights["CBAM.channelattention.fc.0.weight"] = normal(128, 2048, 1, 1, scale=math.sqrt(2 / 2048))
        weights["CBAM.channelattention.fc.2.weight"] = normal(2048, 128, 1, 1, scale=math.sqrt(1 / 128))
        weights["CBAM.spatialattention.conv1.weight"] = normal(1, 2, 3, 3, scale=0.5)
        for layer, inputs, outputs in (("conv1", 2048, 512), ("conv3", 512, 256)):
            weights[f"gcn_model.{layer}.bias"] = normal(outputs, scale=0.1)
            weights[f"gcn_model.{layer}.lin.weight"] = normal(outputs, inputs, scale=math.sqrt(2 / inputs))
        add_linear("gcn_model.classifier", 256, num_classes)
        for name, channels, inner in (("fusion4", 1024, 512), ("fusion3", 512, 256)):
            add_linear(f"{name}.q_proj", 2048, inner)
            add_linear(f"{name}.k_proj", channels, inner)
            add_linear(f"{name}.v_proj", channels, inner)
            add_linear(f"{name}.out_proj", inner, channels)
    return {prefix + name: value for name, value in weights.items()}


# ---- host synchronisation -----------------------------------------------------------------------------------------


class ForbidHostReads(TorchDispatchMode):
    """Inside this, an operator that would make the host wait for a device raises, on the CPU too.

    That is: reading a value (`item`, `bool(tensor)`, `tolist`), every result whose shape depends on values, and a copy
    from the device to the host.
    """

    SHAPE_FROM_VALUES = frozenset(
        {"nonzero", "nonzero_numpy", "masked_select", "_unique2", "unique_dim", "unique_consecutive"}
        | {"_local_scalar_dense", "argwhere", "bincount", "equal", "is_nonzero", "item"}
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        name = func.overloadpacket.__name__
        if name in self.SHAPE_FROM_VALUES:
            raise AssertionError(f"{name} makes the host wait for the device")
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            for index in args[1]:
                if index is not None and index.dtype in (torch.bool, torch.uint8):
                    raise AssertionError(f"{name} with a mask makes the host wait for the device")
        if (
            name == "repeat_interleave"
            and func._overloadname != "self_int"
            and (kwargs or {}).get("output_size") is None
        ):
            raise AssertionError(f"{name} with a tensor of repeats makes the host wait for the device")
        result = func(*args, **(kwargs or {}))
        if name in ("_to_copy", "copy_") and result.device.type == "cpu":
            source = args[1] if name == "copy_" else args[0]
            if source.device.type != "cpu":
                raise AssertionError(f"{name} to the host makes it wait for the device")
        return result


@contextmanager
def recorded_passes(network: nn.Module) -> Iterator[list[Tensor]]:
    """What the backbone is given, pass by pass."""
    given: list[Tensor] = []
    handle = network.backbone.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0]))
    try:
        yield given
    finally:
        handle.remove()
