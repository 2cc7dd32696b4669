"""SG-KRL, every part trained: semantic-guided fusion, cropping, weighting, windows and a graph on one backbone.

After the published SG-KRL code, which adds to MMAL-Net (Zhang et al., MMM 2021) a cross-attention fusion that guides
the object crop, CBAM weighting that guides the windows, and a graph convolution over the windows. There, fusion and
weighting are used only detached and never learn (see `sgkrl_published`). This variant, ours, gives every part a
gradient: the fused map is classified, the object is classified from its weighted map, and the graph links windows of
one picture only, so that no prediction depends on the batch. Each part starts by changing nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from torch import Tensor, nn

from networks.attention import SemanticFusion, SemanticWeighting
from networks.backbone import Backbone
from networks.classifier import Classifier
from networks.colocalization import check_colocalization, check_threshold
from networks.crops import crop_objects, resize_images
from networks.early_exit import look_where_unsure
from networks.first_pass import check_raw_size, look_at_picture
from networks.graph import Edges, GraphHead
from networks.learned_localization import FoundBy, add_localization
from networks.localization import activation_map, adaptive_mask, cell_boxes_to_pixels, localize, with_gradient
from networks.outputs import NetworkOutput, requested_branches
from networks.shared import Shared
from networks.system import System
from networks.window_pass import WindowSource, cut_from, look_at_windows
from networks.windows import Windows, WindowSelector
from utils.options import Count, Limit, Positive, Probability, require

PARTS = {"fusion", "weighting"}  # that can be left out, for comparison
Without = Annotated[
    tuple[str, ...],
    Limit(
        lambda parts: len(set(parts)) == len(parts) and set(parts) <= PARTS, "'fusion', 'weighting', both or nothing"
    ),
]


@dataclass(frozen=True)
class Options:
    windows: Windows = "birds"  # which windows of the object are looked at: birds, vehicles, or groups of one's own
    window_source: WindowSource = "pixels"  # what is cut out for a window: pixels, or stage3, cells; docs/settings.md
    localization: FoundBy = "channel_sum"  # what finds the object; see docs/settings.md
    raw_size: Count | None = None  # side in pixels at which the picture is looked at to find it; None: input_size
    localization_stride: Literal[32, 16] | None = None  # of these pixels a cell of its map; None: docs/settings.md
    localization_threshold: Positive | None = None  # cells of the object are above so many means; None: likewise
    graph_neighbours: Count = 3  # how many of the nearest windows a window is linked to, if there are as many
    graph_edges: Edges = "equal"  # what a link weighs
    graph_residual: bool = True  # the graph's logits are added to the mean of those of the windows
    spatial_weights: Literal["relative", "absolute"] = "relative"  # mean 1 in each picture, or sigmoids as published
    without: Without = ()  # fusion, weighting: parts that are left out, for comparison
    crop_gradient: bool = False  # an experiment: what is cut out moves the object box; set clip_gradient_norm, too
    mask_from_epoch: Count = 46  # from this epoch on (from 1) the background is masked, as published
    exit_threshold: Probability = 1.0  # test.py: images whose object branch is surer skip the windows; 1: none does

    def completed(self, shared: Shared) -> Options:
        """As published (32, 1) on random weights; on pretrained ones what finds birds better, see docs/settings.md."""
        stride, small = shared.stride, (self.raw_size or shared.input_size) < 448
        if shared.has_pretrained_weights and small and self.localization != "colocalization":
            stride = min(shared.localization_strides)
        return replace(
            self,
            without=tuple(sorted(self.without)),
            localization_stride=self.localization_stride or stride,
            localization_threshold=self.localization_threshold or _threshold(shared),
        )

    def check(self, shared: Shared) -> None:
        check_raw_size(self.raw_size, shared.input_size)
        shared.check_localization(self.localization_stride, confirmed=self.localization == "channel_sum")
        check_colocalization(self.localization, self.localization_stride, shared)
        check_threshold(self.localization, self.localization_threshold, _threshold(shared))
        require(
            not self.crop_gradient or self.localization == "channel_sum",
            "crop_gradient",
            self.crop_gradient,
            "False where localization is not 'channel_sum': it moves the map whose sum of channels makes the box",
        )
        require(
            "weighting" not in self.without or self.spatial_weights != "absolute",
            "without",
            self.without,
            "nothing or 'fusion' where spatial_weights is 'absolute': without the weighting there are no such weights",
        )


def _threshold(shared: Shared) -> float:
    return 1.2 if shared.has_pretrained_weights else 1.0


class SGKRL(System):
    """Branches `raw`, `fused`, `object`, `window` and `graph`; the prediction is ensembled of all but `window`.

    One linear classifier serves all branches but the graph: their maps have the same channels with the same meaning,
    which keeps the fused map an activation map that localization can use.

    `graph_residual` adds the graph's logits to the mean of those of the windows, and lets them start near zero: the
    branch `graph` starts as the mean of the windows' logits. `spatial_weights`: see
    `networks.attention.SpatialGate`. `crop_gradient`: see `networks.localization.with_gradient`.
    """

    Options = Options
    run_defaults = {
        # On all test images tried as accurate as the best branch or more, better calibrated; see benchmarks/birds.md.
        "ensembling": "learned",
        # Chosen on 135 validation images of CUB's gulls and wrens; see docs/settings.md.
        "batch_norm": lambda shared: (
            "frozen"
            if shared.has_pretrained_weights and not shared.sync_batch_norm and shared.has_batch_norm
            else "shared"
        ),
    }
    can_exit_early = True

    branches = ("raw", "fused", "object", "window", "graph")
    evaluated = branches
    prediction = ("raw", "fused", "object", "graph")

    def __init__(self, backbone: Backbone, num_classes: int, options: Options, shared: Shared):
        super().__init__(backbone, options, shared)
        self.raw_size = options.raw_size or self.input_size
        self.localization_stride = options.localization_stride
        self.cell_side = self.localization_stride * self.input_size / self.raw_size  # pixels of the input
        self.localization_threshold = options.localization_threshold
        self.crop_gradient = options.crop_gradient
        self.graph_residual = options.graph_residual
        self.exit_threshold = options.exit_threshold
        if "fusion" in options.without:
            self.branches = self.evaluated = ("raw", "object", "window", "graph")
            self.prediction = ("raw", "object", "graph")
        self.loss_weights = dict.fromkeys(self.branches, 1.0)

        channels = backbone.embedding_channels
        self.classifier = Classifier(channels, num_classes)
        self.fusion = None if "fusion" in options.without else SemanticFusion(backbone.channels, residual=True)
        self.weighting = nn.Identity()
        if "weighting" not in options.without:
            relative = options.spatial_weights == "relative"
            self.weighting = SemanticWeighting(channels, identity_start=True, relative=relative)
        stride = backbone.stride
        self.window_selector = WindowSelector(options.windows, grid_size=self.input_size // stride, stride=stride)
        self.graph = GraphHead(
            channels,
            num_classes,
            neighbours=options.graph_neighbours,
            edges=options.graph_edges,
            dropout=shared.dropout,
            zero_start=options.graph_residual,
        )
        add_localization(self, options.localization, channels, self.cell_side)

    def forward(
        self,
        images: Tensor,
        *,
        labels: Tensor | None = None,
        mask_background: bool = False,
        branches: tuple[str, ...] | None = None,
        boxes: Tensor | None = None,
    ) -> NetworkOutput:
        """Map normalised images [B, 3, S, S], S >= input_size, to a `NetworkOutput`.

        The raw pass sees the images scaled down to raw_size; object crop and windows are cut at their full size.
        Logits: `raw`, `fused`, `object`, `graph` [B, classes], `window` [B, N, classes]. `mask_background` blanks what
        lies outside the adaptive object mask before the object is cut. Only the passes that `branches` need are
        computed (None: all). With an `exit_threshold` below 1, evaluation looks at the windows of unsure images only:
        see `networks.early_exit`. `boxes` [B, 4]: where the objects are, if that is known; see `System.takes_boxes`.
        Masks are not known then, so that with `mask_background` the objects are found all the same. `extras`, where
        boxes teach the localization: its logits `inside` [B, g, g], and these `boxes`.
        """
        wanted = requested_branches(branches, self.branches)
        exits_by = set(self.prediction) if not self.training and self.exit_threshold < 1 else set()
        logits, extras = {}, None
        # 1. Look at the picture, if only to find the object, or to exit early by what it shows.
        if (wanted | exits_by) & {"raw", "fused"} or self.colocalization is None:
            raw = look_at_picture(self, images)
            logits["raw"] = self.classifier(self.dropout(raw.embedding))
            if wanted <= {"raw"} and not self.is_taught_by(boxes):
                return NetworkOutput(logits)

            # 2. Fuse the stages: every cell of the final map gathers what it needs from the shallower ones.
            fused = raw.final
            if self.fusion is not None:
                fused = self.fusion(raw)
                logits["fused"] = self.classifier(self.dropout(fused.mean(dim=(2, 3))))

        # 3. Find the object in the fused map, by what that has learnt, or in what the trunk saw before it was trained.
        if self.learned_localization is not None:
            learned = self.learned_localization
            object_boxes, localization, extras = learned.find(fused, boxes, cells=mask_background)
            object_masks = None if localization is None else adaptive_mask(localization)
        elif boxes is not None and not mask_background:
            object_boxes, object_masks = boxes, None
        else:
            cell_side = self.cell_side
            if self.colocalization is not None:
                localization, cell_side = self.colocalization(images), self.colocalization.stride
            else:
                activations = activation_map(fused), activation_map(raw.penultimate)
                localization = localize(*activations, threshold=self.localization_threshold)
            object_boxes = cell_boxes_to_pixels(localization.boxes, cell_side)
            object_masks = adaptive_mask(localization)
        if not wanted & {"object", "window", "graph"}:
            return NetworkOutput(logits, object_boxes, None, object_masks, extras=extras)

        # 4. Cut it out, enlarged, and look at it.
        masks = object_masks if mask_background else None
        crop_boxes = with_gradient(object_boxes, fused, self.cell_side) if self.crop_gradient else object_boxes
        crops = crop_objects(images, crop_boxes, input_size=self.input_size, masks=masks)
        cropped = self.backbone(resize_images(crops, self.input_size), kind="object")

        # 5. Weight its channels and cells by what they mean.
        weighted = self.weighting(cropped.final)
        logits["object"] = self.classifier(self.dropout(weighted.mean(dim=(2, 3))))

        # 6. Choose windows of several scales on the weighted map.
        window_boxes = self.window_selector(activation_map(weighted))
        if not wanted & {"window", "graph"}:
            return NetworkOutput(logits, object_boxes, window_boxes, object_masks, extras=extras)

        # 7. Look at them, and let the graph reason on what they show together.
        seen = cut_from(self.options.window_source, crops, cropped)
        logits["window"], logits["graph"], unsure = look_where_unsure(
            self, self._look_at_windows, seen, window_boxes, logits
        )
        return NetworkOutput(logits, object_boxes, window_boxes, object_masks, extras=extras, unsure=unsure)

    def _look_at_windows(self, seen: Tensor, window_boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `window` and `graph` of windows [B, N, 4] of the object crops, cut from what was `seen` of these."""
        source = self.options.window_source
        embeddings = look_at_windows(self.backbone, seen, window_boxes, source=source, input_size=self.input_size)
        nodes = self.dropout(embeddings)  # [B, N, C]
        by_window, by_graph = self.classifier(nodes), self.graph(nodes, window_boxes)
        return by_window, by_graph + by_window.mean(dim=1) if self.graph_residual else by_graph

    def masks_background(self, epoch: int) -> bool:
        return epoch >= self.options.mask_from_epoch

    def heads(self) -> list[nn.Module]:
        return [self.classifier, self.graph]
