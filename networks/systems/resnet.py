"""The plain ResNet: what every other system has to beat at equal budget.

He, Zhang, Ren & Sun, "Deep Residual Learning for Image Recognition", CVPR 2016. The dropout before the classifier is
MMAL-Net's, so that the raw branches of all systems are the same. With `localization` it sees the object only, as a
frozen copy of the pretrained trunk finds it once, before training: at the cost of a plain ResNet, what every system
that looks for the object has to beat.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from networks.backbone import Backbone
from networks.classifier import Classifier
from networks.colocalization import Colocalization, check_colocalization
from networks.crops import crop_objects, resize_images
from networks.outputs import NetworkOutput, requested_branches
from networks.shared import Shared
from networks.system import System


@dataclass(frozen=True)
class Options:
    localization: Literal["none", "colocalization"] = "none"  # what cuts the object out first; see docs/settings.md

    def check(self, shared: Shared) -> None:
        check_colocalization(self.localization, shared.stride, shared)


class ResNetClassifier(System):
    """Backbone and linear classifier: branch `raw`, or `object` with a localization, which is also the prediction."""

    Options = Options

    branches = ("raw",)
    evaluated = branches
    prediction = ("raw",)

    def __init__(self, backbone: Backbone, num_classes: int, options: Options, shared: Shared):
        super().__init__(backbone, options, shared)
        if options.localization == "colocalization":
            self.branches = self.evaluated = self.prediction = self.warmup_branches = ("object",)
            self.colocalization = Colocalization(backbone, self.input_size)
        self.loss_weights = dict.fromkeys(self.branches, 1.0)
        self.classifier = Classifier(backbone.embedding_channels, num_classes)

    def forward(
        self,
        images: Tensor,
        *,
        labels: Tensor | None = None,
        mask_background: bool = False,
        branches: tuple[str, ...] | None = None,
        boxes: Tensor | None = None,
    ) -> NetworkOutput:
        """Map normalised images [B, 3, S, S], S >= input_size, to logits [B, classes] of the only branch.

        `boxes` [B, 4]: where the objects are, if that is known; see `System.takes_boxes`. `labels` and
        `mask_background` are part of the common call and change nothing here.
        """
        requested_branches(branches, self.branches)
        if self.colocalization is not None:
            boxes = self.find_objects(images) if boxes is None else boxes
            images = crop_objects(images, boxes, input_size=self.input_size)
        features = self.backbone(resize_images(images, self.input_size))
        return NetworkOutput({self.branches[0]: self.classifier(self.dropout(features.embedding))}, boxes)
