"""MMAL-Net: raw, object and part branches on one backbone.

Zhang, Li, Zhai & Liu, "Multi-branch and Multi-scale Attention Learning for Fine-Grained Visual Categorization",
MMM 2021. Behaviour follows the published code, batched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from networks.backbone import Backbone
from networks.classifier import Classifier
from networks.colocalization import check_colocalization, check_threshold
from networks.crops import crop_objects, resize_images
from networks.first_pass import check_raw_size, look_at_picture
from networks.learned_localization import FoundBy, add_localization
from networks.localization import activation_map, cell_boxes_to_pixels, localize
from networks.outputs import NetworkOutput, requested_branches
from networks.shared import Shared
from networks.system import System
from networks.window_pass import WindowSource, cut_from, look_at_windows
from networks.windows import Windows, WindowSelector
from utils.options import Count, Positive


@dataclass(frozen=True)
class Options:
    windows: Windows = "birds"  # which windows of the object are looked at: birds, vehicles, or groups of one's own
    window_source: WindowSource = "pixels"  # what is cut out for a window: pixels, or stage3, cells; docs/settings.md
    localization: FoundBy = "channel_sum"  # what finds the object; see docs/settings.md
    raw_size: Count | None = None  # side in pixels at which the picture is looked at to find it; None: input_size
    localization_stride: Literal[32, 16] = 32  # of these pixels for each cell of the map of the object
    localization_threshold: Positive = 1.0  # cells belong to the object above so many times the map's mean

    def check(self, shared: Shared) -> None:
        check_raw_size(self.raw_size, shared.input_size)
        shared.check_localization(self.localization_stride, confirmed=self.localization == "channel_sum")
        check_colocalization(self.localization, self.localization_stride, shared)
        check_threshold(self.localization, self.localization_threshold, Options.localization_threshold)


class MMALNet(System):
    """Branches `raw`, `object` and `window` share the backbone and the classifier; the prediction is `object`.

    The windows only serve training: evaluation leaves their pass out unless it is asked for.
    """

    Options = Options
    run_defaults = {"epochs": 200, "batch_size": 6}
    published_names = {"pretrained_model.": "backbone.trunk.", "rawcls_net.": "classifier."}

    branches = ("raw", "object", "window")
    evaluated = ("raw", "object")
    prediction = ("object",)

    def __init__(self, backbone: Backbone, num_classes: int, options: Options, shared: Shared):
        super().__init__(backbone, options, shared)
        self.raw_size = options.raw_size or self.input_size
        self.localization_stride = options.localization_stride
        self.cell_side = self.localization_stride * self.input_size / self.raw_size  # pixels of the input
        self.localization_threshold = options.localization_threshold
        self.loss_weights = dict.fromkeys(self.branches, 1.0)
        self.classifier = Classifier(backbone.embedding_channels, num_classes)
        stride = backbone.stride
        self.window_selector = WindowSelector(options.windows, grid_size=self.input_size // stride, stride=stride)
        add_localization(self, options.localization, backbone.embedding_channels, self.cell_side)

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

        Logits: `raw`, `object` [B, classes], `window` [B, N, classes]. Only the passes that `branches` need are
        computed (None: all); that over the picture also serves to find the object, unless colocalization does. `boxes`
        [B, 4]: where the objects are, if that is known; see `System.takes_boxes`. MMAL-Net has no mask:
        `mask_background` changes nothing.
        """
        wanted = requested_branches(branches, self.branches)
        logits, extras = {}, None
        if "raw" in wanted or self.colocalization is None:
            raw = look_at_picture(self, images)
            logits["raw"] = self.classifier(self.dropout(raw.embedding))
        if wanted <= {"raw"} and not self.is_taught_by(boxes):
            return NetworkOutput(logits)

        if self.colocalization is not None:
            object_boxes = self.find_objects(images) if boxes is None else boxes
        elif self.learned_localization is not None:
            object_boxes, _, extras = self.learned_localization.find(raw.final, boxes)
        else:
            activations = activation_map(raw.final), activation_map(raw.penultimate)
            cells = localize(*activations, threshold=self.localization_threshold).boxes
            object_boxes = cell_boxes_to_pixels(cells, self.cell_side)
        if wanted <= {"raw"}:
            return NetworkOutput(logits, object_boxes, extras=extras)
        crops = crop_objects(images, object_boxes, input_size=self.input_size)
        cropped = self.backbone(resize_images(crops, self.input_size), kind="object")
        logits["object"] = self.classifier(self.dropout(cropped.embedding))
        window_boxes = self.window_selector(activation_map(cropped.final))
        if "window" not in wanted:
            return NetworkOutput(logits, object_boxes, window_boxes, extras=extras)

        source = self.options.window_source
        seen = cut_from(source, crops, cropped)
        embeddings = look_at_windows(self.backbone, seen, window_boxes, source=source, input_size=self.input_size)
        logits["window"] = self.classifier(self.dropout(embeddings))
        return NetworkOutput(logits, object_boxes, window_boxes, extras=extras)
