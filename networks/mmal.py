"""MMAL-Net: raw, object and part branches on one backbone.

Zhang, Li, Zhai & Liu, "Multi-branch and Multi-scale Attention Learning for Fine-Grained Visual Categorization",
MMM 2021. Behaviour follows the published code, batched.
"""

from __future__ import annotations

from torch import Tensor, nn

from networks.backbone import DENSE_STRIDE, STRIDE, Backbone, checked_stride
from networks.classifier import Classifier
from networks.crops import crop_objects, crop_windows, resize_images
from networks.localization import activation_map, cell_boxes_to_pixels, localize
from networks.outputs import NetworkOutput, combine_branches, requested_branches
from networks.windows import WindowSelector


class MMALNet(nn.Module):
    """Branches `raw`, `object` and `window` share the backbone and the classifier; the answer is `object`.

    The windows only serve training: evaluation leaves their pass out unless it is asked for.
    """

    branches = ("raw", "object", "window")
    evaluated = ("raw", "object")

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        input_size: int = 448,
        localization_stride: int = STRIDE,
        localization_threshold: float = 1.0,
        windows: str | tuple = "birds",
        dropout: float = 0.5,
    ):
        super().__init__()
        self.input_size = input_size
        self.localization_stride = checked_stride(localization_stride)
        self.localization_threshold = localization_threshold
        self.answer = ("object",)
        self.loss_weights = dict.fromkeys(self.branches, 1.0)
        self.backbone = backbone
        self.dropout = nn.Dropout(dropout)
        self.classifier = Classifier(backbone.embedding_channels, num_classes)
        self.window_selector = WindowSelector(windows, grid_size=input_size // STRIDE, stride=STRIDE)

    def forward(
        self, images: Tensor, *, mask_background: bool = False, branches: tuple[str, ...] | None = None
    ) -> NetworkOutput:
        """Map normalised images [B, 3, S, S], S >= input_size, to a `NetworkOutput`.

        Logits: `raw`, `object` [B, classes], `window` [B, N, classes]. Only the passes that `branches` need are
        computed (None: all). MMAL-Net has no mask: `mask_background` changes nothing.
        """
        wanted = requested_branches(branches, self.branches)
        raw = self.backbone(resize_images(images, self.input_size), dense=self.localization_stride == DENSE_STRIDE)
        logits = {"raw": self.classifier(self.dropout(raw.embedding))}
        if wanted <= {"raw"}:
            return NetworkOutput(logits)

        localization = localize(
            activation_map(raw.final), activation_map(raw.penultimate), threshold=self.localization_threshold
        )
        object_boxes = cell_boxes_to_pixels(localization.boxes, self.localization_stride)
        crops = crop_objects(images, object_boxes, input_size=self.input_size)
        cropped = self.backbone(resize_images(crops, self.input_size), kind="object")
        logits["object"] = self.classifier(self.dropout(cropped.embedding))
        window_boxes = self.window_selector(activation_map(cropped.final))
        if "window" not in wanted:
            return NetworkOutput(logits, object_boxes, window_boxes)

        windows = self.backbone(crop_windows(crops, window_boxes, input_size=self.input_size), kind="part")
        embeddings = windows.embedding.unflatten(0, (-1, self.window_selector.count))  # [B, N, C]
        logits["window"] = self.classifier(self.dropout(embeddings))
        return NetworkOutput(logits, object_boxes, window_boxes)

    def predict_logits(self, output: NetworkOutput) -> Tensor:
        """Return the system's one answer, [B, classes]."""
        return combine_branches(output, self.answer)

    def heads(self) -> list[nn.Module]:
        """Parts that start from random weights and may want a higher learning rate than the trunk."""
        return [self.classifier]
