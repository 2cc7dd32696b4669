"""FLRDF: foreground localization by suppression, and a jigsaw branch for local detail.

After Liang & Qu, Liaoning Technical University (foreground localization and region discriminative features). Stated
there: the suppression, one shared ResNet, the three branches and the sum of their losses. Our reading, most of it a
setting: the suppression acts once, on the final map; `raw` classifies the suppressed map, so that its controller
learns; the box follows MMAL-Net's rule on that map alone; the branches share one classifier; the prediction is the mean
of `raw` and `object`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from torch import Tensor

from networks.backbone import Backbone
from networks.classifier import Classifier
from networks.colocalization import check_colocalization, check_threshold
from networks.crops import crop_objects, resize_images
from networks.first_pass import check_raw_size, look_at_picture
from networks.jigsaw import permute_blocks, random_permutations
from networks.learned_localization import FoundBy, add_localization
from networks.localization import activation_map, cell_boxes_to_pixels, localize
from networks.outputs import NetworkOutput, requested_branches
from networks.shared import Shared
from networks.suppression import RegionSuppression
from networks.system import System
from utils.options import Count, Limit, Positive, require

Ceiling = Annotated[float, Limit(lambda x: 0 < x <= 1, "a share above 0, at most 1")]


@dataclass(frozen=True)
class Options:
    suppression: Literal["learnable"] | Ceiling = "learnable"  # what channels are capped at; a share of their maximum
    classify_suppressed: bool = True  # raw classifies the suppressed map; without it only a fixed suppression works
    box_agreement: bool = False  # the box keeps only what the map before the last one confirms, as in mmal
    jigsaw_blocks: Count = 2  # blocks along a side of the shuffled object; 1: not shuffled
    localization: FoundBy = "channel_sum"  # what finds the object; see docs/settings.md
    raw_size: Count | None = None  # side in pixels at which the picture is looked at to find it; None: input_size
    localization_stride: Literal[32, 16] = 32  # of these pixels for each cell of the map of the object
    localization_threshold: Positive = 1.0  # cells belong to the object above so many times the map's mean

    def check(self, shared: Shared) -> None:
        require(
            self.classify_suppressed or self.suppression != "learnable",
            "classify_suppressed",
            self.classify_suppressed,
            "True, unless suppression is a number such as 0.7: nothing else would teach the learnable one",
        )
        check_raw_size(self.raw_size, shared.input_size)
        shared.check_localization(self.localization_stride, confirmed=self.box_agreement)
        check_colocalization(self.localization, self.localization_stride, shared)
        check_threshold(self.localization, self.localization_threshold, Options.localization_threshold)
        require(
            not self.box_agreement or self.localization == "channel_sum",
            "box_agreement",
            self.box_agreement,
            "False where localization is not 'channel_sum': only such boxes does a second map confirm",
        )
        blocks = shared.input_size // shared.stride
        cells = f"at most {blocks}: a block is a cell of {shared.stride} pixels or more"
        require(self.jigsaw_blocks <= blocks, "jigsaw_blocks", self.jigsaw_blocks, cells)


class FLRDF(System):
    """Branches `raw`, `object` and, in training only, `jigsaw`: the object with its blocks in a random order.

    `suppression`: see `networks.suppression.RegionSuppression`. `classify_suppressed=False` lets `raw` classify the
    plain map; the controller then has nothing to learn from, so a fixed suppression is needed. `box_agreement` keeps of
    the box only what the penultimate map confirms, as MMAL-Net does. `jigsaw_blocks` are counted along a side.
    """

    Options = Options

    branches = ("raw", "object", "jigsaw")
    evaluated = ("raw", "object")
    prediction = ("raw", "object")

    def __init__(self, backbone: Backbone, num_classes: int, options: Options, shared: Shared):
        super().__init__(backbone, options, shared)
        self.raw_size = options.raw_size or self.input_size
        self.localization_stride = options.localization_stride
        self.cell_side = self.localization_stride * self.input_size / self.raw_size  # pixels of the input
        self.localization_threshold = options.localization_threshold
        self.classify_suppressed = options.classify_suppressed
        self.box_agreement = options.box_agreement
        self.jigsaw_blocks = options.jigsaw_blocks
        self.loss_weights = dict.fromkeys(self.branches, 1.0)
        self.suppression = RegionSuppression(backbone.embedding_channels, options.suppression)
        self.classifier = Classifier(backbone.embedding_channels, num_classes)
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

        Logits: `raw`, `object` and, while training, `jigsaw` [B, classes]. Only the passes that `branches` need are
        computed (None: all); that over the picture also serves to find the object, unless colocalization does. `boxes`
        [B, 4]: where the objects are, if that is known; see `System.takes_boxes`. FLRDF has no mask: `mask_background`
        changes nothing.
        """
        wanted = requested_branches(branches, self.branches if self.training else self.evaluated)
        logits, extras = {}, None
        if "raw" in wanted or self.colocalization is None:
            raw = look_at_picture(self, images)
            suppressed = self.suppression(raw.final)
            embedding = suppressed.mean(dim=(2, 3)) if self.classify_suppressed else raw.embedding
            logits["raw"] = self.classifier(self.dropout(embedding))
        if wanted <= {"raw"} and not self.is_taught_by(boxes):
            return NetworkOutput(logits)

        if self.colocalization is not None:
            object_boxes = self.find_objects(images) if boxes is None else boxes
        elif self.learned_localization is not None:
            object_boxes, _, extras = self.learned_localization.find(suppressed, boxes)
        else:
            activation = activation_map(suppressed)
            confirming = activation_map(raw.penultimate) if self.box_agreement else activation
            localization = localize(activation, confirming, threshold=self.localization_threshold)
            object_boxes = cell_boxes_to_pixels(localization.boxes, self.cell_side)
        if wanted <= {"raw"}:
            return NetworkOutput(logits, object_boxes, extras=extras)
        crops = crop_objects(images, object_boxes, input_size=self.input_size)
        crops = resize_images(crops, self.input_size)
        if "object" in wanted:
            logits["object"] = self.classifier(self.dropout(self.backbone(crops, kind="object").embedding))
        if "jigsaw" in wanted:
            permutations = random_permutations(len(crops), self.jigsaw_blocks**2, crops.device)
            shuffled = permute_blocks(crops, permutations, self.jigsaw_blocks)
            logits["jigsaw"] = self.classifier(self.dropout(self.backbone(shuffled, kind="part").embedding))
        return NetworkOutput(logits, object_boxes, extras=extras)

    def heads(self) -> list[Classifier]:
        """Not the suppression: it shapes the boxes, which must not jump."""
        return [self.classifier]
