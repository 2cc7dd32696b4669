"""The plain ResNet: what every other system has to beat at equal budget.

He, Zhang, Ren & Sun, "Deep Residual Learning for Image Recognition", CVPR 2016. The dropout before the classifier is
MMAL-Net's, so that the raw branches of all systems are the same.
"""

from __future__ import annotations

from torch import Tensor, nn

from networks.backbone import Backbone
from networks.classifier import Classifier
from networks.crops import resize_images
from networks.outputs import NetworkOutput, combine_branches


class ResNetClassifier(nn.Module):
    """Backbone and linear classifier: branch `raw`, which is also the answer."""

    branches = ("raw",)
    evaluated = branches

    def __init__(self, backbone: Backbone, num_classes: int, *, input_size: int = 448, dropout: float = 0.5):
        super().__init__()
        self.input_size = input_size
        self.answer = ("raw",)
        self.loss_weights = {"raw": 1.0}
        self.backbone = backbone
        self.dropout = nn.Dropout(dropout)
        self.classifier = Classifier(backbone.embedding_channels, num_classes)

    def forward(
        self, images: Tensor, *, mask_background: bool = False, branches: tuple[str, ...] | None = None
    ) -> NetworkOutput:
        """Map normalised images [B, 3, S, S], S >= input_size, to logits `raw` [B, classes]; no boxes.

        `mask_background` and `branches` are part of the common call and change nothing here.
        """
        features = self.backbone(resize_images(images, self.input_size))
        return NetworkOutput({"raw": self.classifier(self.dropout(features.embedding))})

    def predict_logits(self, output: NetworkOutput) -> Tensor:
        """Return the system's one answer, [B, classes]."""
        return combine_branches(output, self.answer)

    def heads(self) -> list[nn.Module]:
        """Parts that start from random weights and may want a higher learning rate than the trunk."""
        return [self.classifier]
