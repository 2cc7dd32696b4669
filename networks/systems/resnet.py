"""The plain ResNet: what every other system has to beat at equal budget.

He, Zhang, Ren & Sun, "Deep Residual Learning for Image Recognition", CVPR 2016. The dropout before the classifier is
MMAL-Net's, so that the raw branches of all systems are the same.
"""

from __future__ import annotations

from torch import Tensor

from networks.backbone import Backbone
from networks.classifier import Classifier
from networks.crops import resize_images
from networks.outputs import NetworkOutput, requested_branches
from networks.system import NoOptions, Shared, System


class ResNetClassifier(System):
    """Backbone and linear classifier: branch `raw`, which is also the prediction."""

    branches = ("raw",)
    evaluated = branches
    prediction = ("raw",)

    def __init__(self, backbone: Backbone, num_classes: int, options: NoOptions, shared: Shared):
        super().__init__(backbone, options, shared)
        self.loss_weights = {"raw": 1.0}
        self.classifier = Classifier(backbone.embedding_channels, num_classes)

    def forward(
        self,
        images: Tensor,
        *,
        labels: Tensor | None = None,
        mask_background: bool = False,
        branches: tuple[str, ...] | None = None,
    ) -> NetworkOutput:
        """Map normalised images [B, 3, S, S], S >= input_size, to logits `raw` [B, classes]; no boxes.

        `labels` and `mask_background` are part of the common call and change nothing here.
        """
        requested_branches(branches, self.branches)  # there is only one
        features = self.backbone(resize_images(images, self.input_size))
        return NetworkOutput({"raw": self.classifier(self.dropout(features.embedding))})
