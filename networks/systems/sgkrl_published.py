"""SG-KRL as its authors published it: for their checkpoints, and to compare `sgkrl` with.

MMAL-Net (Zhang et al., MMM 2021) with a cross-attention fusion that guides the object crop, CBAM weighting that guides
the windows, and a graph convolution over the windows. Behaviour follows the published code, batched. Its defects are
kept: fusion and weighting are used only detached, so that they never learn and keep their random start (here they are
frozen, which is the same), and with `graph_scope="batch"` the graph links windows of different pictures, so that its
branch depends on the batch that a picture happens to be in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from networks.attention import SemanticFusion, SemanticWeighting
from networks.backbone import Backbone
from networks.classifier import Classifier
from networks.crops import crop_objects, crop_windows, resize_images
from networks.early_exit import look_where_unsure
from networks.first_pass import look_at_picture
from networks.graph import Edges, GraphHead, nearest_neighbours, published_neighbours
from networks.localization import activation_map, adaptive_mask, cell_boxes_to_pixels, localize
from networks.outputs import NetworkOutput, requested_branches
from networks.shared import Shared
from networks.system import System
from networks.windows import Windows, WindowSelector
from utils.options import Count, Positive, Probability, require


@dataclass(frozen=True)
class Options:
    windows: Windows = "birds"  # which windows of the object are looked at: birds, vehicles, or groups of one's own
    localization_stride: Literal[32, 16] = 32  # pixels of the input for each cell of the map of the object
    localization_threshold: Positive = 1.0  # cells belong to the object above so many times the map's mean
    graph_scope: Literal["image", "batch"] = "image"  # batch, as published: windows of other images are linked, too
    graph_neighbours: Count = 3  # how many of the nearest windows a window is linked to, if there are as many
    graph_edges: Edges = "equal"  # what a link weighs
    mask_from_epoch: Count = 46  # from this epoch on (from 1) the background is masked, as published
    exit_threshold: Probability = 1.0  # test.py: images whose object branch is surer skip the windows; 1: none does

    def check(self, shared: Shared) -> None:
        shared.check_localization(self.localization_stride)
        inside = self.graph_scope == "image"
        require(
            self.graph_edges == "equal" or inside,
            "graph_edges",
            self.graph_edges,
            "'equal' where graph_scope is 'batch': windows of two images have no distance and no overlap",
        )
        require(
            self.exit_threshold == 1 or inside,
            "exit_threshold",
            self.exit_threshold,
            "1 where graph_scope is 'batch', whose graph needs the windows of all images",
        )


class PublishedSGKRL(System):
    """Branches `raw`, `object`, `window` and `graph`; the prediction is `object`, MMAL-Net's choice.

    One linear classifier serves all branches but the graph.
    """

    Options = Options
    published_names = {
        "pretrained_model.": "backbone.trunk.",
        "rawcls_net.": "classifier.",
        "CBAM.channelattention.fc.": "weighting.channel.mlp.",
        "CBAM.spatialattention.conv1.": "weighting.spatial.conv.",
        "gcn_model.conv1.": "graph.convolutions.0.",
        "gcn_model.conv3.": "graph.convolutions.1.",
        "gcn_model.classifier.": "graph.classifier.",
        "fusion4.q_proj.": "fusion.stage3.query.",
        "fusion4.k_proj.": "fusion.stage3.key.",
        "fusion4.v_proj.": "fusion.stage3.value.",
        "fusion4.out_proj.": "fusion.stage3.out.",
        "fusion3.q_proj.": "fusion.stage2.query.",
        "fusion3.k_proj.": "fusion.stage2.key.",
        "fusion3.v_proj.": "fusion.stage2.value.",
        "fusion3.out_proj.": "fusion.stage2.out.",
    }

    branches = ("raw", "object", "window", "graph")
    evaluated = branches
    prediction = ("object",)

    def __init__(self, backbone: Backbone, num_classes: int, options: Options, shared: Shared):
        super().__init__(backbone, options, shared)
        self.localization_stride = options.localization_stride
        self.localization_threshold = options.localization_threshold
        self.exit_threshold = options.exit_threshold
        self.can_exit_early = options.graph_scope == "image"  # or the graph needs the windows of all images
        self.loss_weights = dict.fromkeys(self.branches, 1.0)
        channels = backbone.embedding_channels
        self.classifier = Classifier(channels, num_classes)
        self.fusion = SemanticFusion(backbone.channels, residual=False).requires_grad_(False)
        self.weighting = SemanticWeighting(channels).requires_grad_(False)
        stride = backbone.stride
        self.window_selector = WindowSelector(options.windows, grid_size=self.input_size // stride, stride=stride)
        self.graph = GraphHead(
            channels,
            num_classes,
            neighbours=options.graph_neighbours,
            # inside an image, which nobody published, the order of equally near windows is defined
            neighbourhood=published_neighbours if options.graph_scope == "batch" else nearest_neighbours,
            edges=options.graph_edges,
            symmetric=False,
            scope=options.graph_scope,
            dropout=shared.dropout,
        )

    def forward(
        self,
        images: Tensor,
        *,
        labels: Tensor | None = None,
        mask_background: bool = False,
        branches: tuple[str, ...] | None = None,
    ) -> NetworkOutput:
        """Map normalised images [B, 3, S, S], S >= input_size, to a `NetworkOutput`.

        Logits: `raw`, `object`, `graph` [B, classes], `window` [B, N, classes]. `mask_background` blanks what lies
        outside the adaptive object mask before the object is cut. Only the passes that `branches` need are computed
        (None: all). `exit_threshold`: see `networks.early_exit`.
        """
        wanted = requested_branches(branches, self.branches)
        raw = look_at_picture(self, images)
        logits = {"raw": self.classifier(self.dropout(raw.embedding))}
        if wanted <= {"raw"}:
            return NetworkOutput(logits)

        with torch.no_grad():
            fused = self.fusion(raw)
        localization = localize(
            activation_map(fused), activation_map(raw.penultimate), threshold=self.localization_threshold
        )
        object_boxes = cell_boxes_to_pixels(localization.boxes, self.localization_stride)
        object_masks = adaptive_mask(localization)
        masks = object_masks if mask_background else None
        crops = crop_objects(images, object_boxes, input_size=self.input_size, masks=masks)
        cropped = self.backbone(resize_images(crops, self.input_size), kind="object")
        logits["object"] = self.classifier(self.dropout(cropped.embedding))

        with torch.no_grad():
            weighted = self.weighting(cropped.final)
        window_boxes = self.window_selector(activation_map(weighted))
        if not wanted & {"window", "graph"}:
            return NetworkOutput(logits, object_boxes, window_boxes, object_masks)

        logits["window"], logits["graph"], unsure = look_where_unsure(
            self, self._look_at_windows, crops, window_boxes, logits
        )
        return NetworkOutput(logits, object_boxes, window_boxes, object_masks, unsure=unsure)

    def _look_at_windows(self, crops: Tensor, window_boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `window` and `graph` from object crops and windows [B, N, 4] on them."""
        windows = self.backbone(crop_windows(crops, window_boxes, input_size=self.input_size), kind="part")
        nodes = self.dropout(windows.embedding.unflatten(0, (-1, self.window_selector.count)))  # [B, N, C]
        return self.classifier(nodes), self.graph(nodes, window_boxes)

    def masks_background(self, epoch: int) -> bool:
        return epoch >= self.options.mask_from_epoch

    def heads(self) -> list[nn.Module]:
        return [self.classifier, self.graph]
