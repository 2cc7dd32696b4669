"""SG-KRL: semantic-guided fusion, cropping, weighting, windows and a graph on one backbone.

After the published SG-KRL code, which adds to MMAL-Net (Zhang et al., MMM 2021) a cross-attention fusion that guides
the object crop, CBAM weighting that guides the windows, and a graph convolution over the windows.

Two wirings of the same parts. `published` repeats that code, in which the fusion and the weighting are used only
detached: they never learn and keep their random start (here they are frozen, which is the same). `trained`, ours, gives
every part a gradient: the fused map is classified, the object is classified from its weighted map, and the graph links
windows of one picture only, so that no prediction depends on the batch. There each part starts by changing nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from networks.attention import SemanticFusion, SemanticWeighting
from networks.backbone import DENSE_STRIDE, STRIDE, Backbone, checked_stride
from networks.classifier import Classifier
from networks.crops import crop_objects, crop_windows, resize_images
from networks.graph import GraphHead, nearest_neighbours, published_neighbours
from networks.localization import activation_map, adaptive_mask, cell_boxes_to_pixels, localize, with_gradient
from networks.outputs import NetworkOutput, combine_branches, object_confidence, requested_branches
from networks.windows import WindowSelector
from utils.errors import UserError

WIRINGS = ("trained", "published")
GRAPH_SCOPES = ("image", "batch")
SPATIAL_WEIGHTS = ("relative", "absolute")
PARTS = ("fusion", "weighting")  # that can be left out of the trained wiring


class SGKRL(nn.Module):
    """Branches `raw`, `fused` (trained wiring only), `object`, `window` and `graph`.

    One linear classifier serves all branches but the graph: their maps have the same channels with the same meaning,
    which keeps the fused map an activation map that localization can use. The answer is by default the mean
    probability of `raw`, `fused`, `object` and `graph`, in the published wiring `object`, MMAL-Net's choice.

    `graph_residual` adds the graph's logits to the mean of those of the windows, and lets them start near zero: the
    branch `graph` starts as what the windows say, each by itself. `spatial_weights`: `absolute` ones are the sigmoids
    of CBAM, `relative` ones have mean 1 in each picture and see how far a cell stands out from it (see
    `networks.attention.SpatialGate`). The trained wiring has the graph as a residual and relative weights unless told
    otherwise (None); the published one knows neither, nor `without`: parts that are left out, for comparison.

    `crop_gradient` lets the losses of object, windows and graph move the object box, too (see
    `networks.localization.with_gradient`).
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        input_size: int = 448,
        localization_stride: int = STRIDE,
        localization_threshold: float = 1.0,
        windows: str | tuple = "birds",
        wiring: str = "trained",
        graph_scope: str = "image",
        graph_neighbours: int = 3,
        graph_edges: str = "equal",
        graph_residual: bool | None = None,
        spatial_weights: str | None = None,
        without: tuple[str, ...] = (),
        crop_gradient: bool = False,
        dropout: float = 0.5,
    ):
        super().__init__()
        if wiring not in WIRINGS:
            raise UserError(f"unknown wiring {wiring!r}; choose one of {', '.join(WIRINGS)}")
        if graph_scope not in GRAPH_SCOPES:
            raise UserError(f"unknown graph_scope {graph_scope!r}; choose one of {', '.join(GRAPH_SCOPES)}")
        trained = wiring == "trained"
        if trained and graph_scope == "batch":
            raise UserError("graph_scope 'batch' came with the trained wiring; it exists only for wiring 'published'")
        if crop_gradient and not trained:
            raise UserError("crop_gradient came with the published wiring, whose fusion never learns")
        graph_residual = trained if graph_residual is None else graph_residual
        spatial_weights = spatial_weights or ("relative" if trained else "absolute")
        if spatial_weights not in SPATIAL_WEIGHTS:
            raise UserError(f"unknown spatial_weights {spatial_weights!r}; choose one of {', '.join(SPATIAL_WEIGHTS)}")
        if not set(without) <= set(PARTS):
            raise UserError(f"without {without!r} came; choose from {', '.join(PARTS)}")
        if not trained and (graph_residual or spatial_weights == "relative" or without):
            raise UserError("graph_residual, relative spatial_weights and without belong to the trained wiring")
        self.trained = trained
        self.graph_residual = graph_residual
        self.crop_gradient = crop_gradient
        self.input_size = input_size
        self.localization_stride = checked_stride(localization_stride)
        self.localization_threshold = localization_threshold
        fused = ("fused",) if trained and "fusion" not in without else ()
        self.branches = ("raw", *fused, "object", "window", "graph")
        self.evaluated = self.branches
        self.answer = ("raw", *fused, "object", "graph") if trained else ("object",)
        self.loss_weights = dict.fromkeys(self.branches, 1.0)
        self.exit_threshold = 1.0  # in evaluation, images whose `object` branch is surer than this skip the windows

        channels = backbone.embedding_channels
        self.backbone = backbone
        self.dropout = nn.Dropout(dropout)
        self.classifier = Classifier(channels, num_classes)
        self.fusion = None if "fusion" in without else SemanticFusion(backbone.channels, residual=trained)
        self.weighting = nn.Identity()
        if "weighting" not in without:
            relative = spatial_weights == "relative"
            self.weighting = SemanticWeighting(channels, identity_start=trained, relative=relative)
        self.window_selector = WindowSelector(windows, grid_size=input_size // STRIDE, stride=STRIDE)
        self.graph = GraphHead(
            channels,
            num_classes,
            neighbours=graph_neighbours,
            neighbourhood=nearest_neighbours if trained else published_neighbours,
            edges=graph_edges,
            symmetric=trained,
            scope=graph_scope,
            dropout=dropout,
            zero_start=graph_residual,
        )
        if not trained:
            self.fusion.requires_grad_(False)
            self.weighting.requires_grad_(False)

    def forward(
        self, images: Tensor, *, mask_background: bool = False, branches: tuple[str, ...] | None = None
    ) -> NetworkOutput:
        """Map normalised images [B, 3, S, S], S >= input_size, to a `NetworkOutput`.

        The raw pass sees the images scaled down to input_size; object crop and windows are cut at their full size.
        Logits: `raw`, `fused`, `object`, `graph` [B, classes], `window` [B, N, classes]. `mask_background` blanks what
        lies outside the adaptive object mask before the object is cut. Only the passes that `branches` need are
        computed (None: all).

        With an `exit_threshold` below 1, evaluation looks at the windows of unsure images only (for which the host
        waits for the device); `window` and `graph` of the others repeat the answer of the branches before them.
        """
        wanted = requested_branches(branches, self.branches)
        raw = self.backbone(resize_images(images, self.input_size), dense=self.localization_stride == DENSE_STRIDE)
        logits = {"raw": self.classifier(self.dropout(raw.embedding))}
        if wanted <= {"raw"}:
            return NetworkOutput(logits)

        with torch.set_grad_enabled(self.trained and torch.is_grad_enabled()):
            fused = raw.final if self.fusion is None else self.fusion(raw)
        if "fused" in self.branches:
            logits["fused"] = self.classifier(self.dropout(fused.mean(dim=(2, 3))))
        localization = localize(
            activation_map(fused), activation_map(raw.penultimate), threshold=self.localization_threshold
        )
        object_boxes = cell_boxes_to_pixels(localization.boxes, self.localization_stride)
        object_masks = adaptive_mask(localization)
        if not wanted & {"object", "window", "graph"}:
            return NetworkOutput(logits, object_boxes, None, object_masks)

        masks = object_masks if mask_background else None
        crop_boxes = (
            with_gradient(object_boxes, fused, self.localization_stride) if self.crop_gradient else object_boxes
        )
        crops = crop_objects(images, crop_boxes, input_size=self.input_size, masks=masks)
        cropped = self.backbone(resize_images(crops, self.input_size), kind="object")
        with torch.set_grad_enabled(self.trained and torch.is_grad_enabled()):
            weighted = self.weighting(cropped.final)
        object_embedding = weighted.mean(dim=(2, 3)) if self.trained else cropped.embedding
        logits["object"] = self.classifier(self.dropout(object_embedding))
        window_boxes = self.window_selector(activation_map(weighted))
        if not wanted & {"window", "graph"}:
            return NetworkOutput(logits, object_boxes, window_boxes, object_masks)

        if self.training or self.exit_threshold >= 1:
            logits["window"], logits["graph"] = self._look_at_windows(crops, window_boxes)
        else:
            logits["window"], logits["graph"] = self._look_where_unsure(crops, window_boxes, logits)
        return NetworkOutput(logits, object_boxes, window_boxes, object_masks)

    def _look_at_windows(self, crops: Tensor, window_boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `window` and `graph` from object crops and windows [B, N, 4] on them."""
        windows = self.backbone(crop_windows(crops, window_boxes, input_size=self.input_size), kind="part")
        nodes = self.dropout(windows.embedding.unflatten(0, (-1, self.window_selector.count)))  # [B, N, C]
        by_window, by_graph = self.classifier(nodes), self.graph(nodes, window_boxes)
        return by_window, by_graph + by_window.mean(dim=1) if self.graph_residual else by_graph

    def _look_where_unsure(
        self, crops: Tensor, window_boxes: Tensor, logits: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        graph = self.early_answer(logits).float().clone()  # it may be the logits of a branch itself
        window = graph[:, None].repeat(1, self.window_selector.count, 1)
        unsure = (object_confidence(logits) <= self.exit_threshold).nonzero().squeeze(1)
        if len(unsure):
            window[unsure], graph[unsure] = (
                found.float() for found in self._look_at_windows(crops[unsure], window_boxes[unsure])
            )
        return window, graph

    def early_answer(self, logits: dict[str, Tensor]) -> Tensor:
        """Return [B, classes] logits of the mean probability of the answer's branches that need no windows."""
        branches = tuple(name for name in self.answer if name not in ("window", "graph")) or ("object",)
        return combine_branches(NetworkOutput(logits), branches)

    def predict_logits(self, output: NetworkOutput) -> Tensor:
        """Return the system's one answer, [B, classes]: the mean probability over the branches of `answer`."""
        return combine_branches(output, self.answer)

    def heads(self) -> list[nn.Module]:
        """Parts that start from random weights and may want a higher learning rate than the trunk."""
        return [self.classifier, self.graph]
