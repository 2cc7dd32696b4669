"""FLRDF: foreground localization by suppression, and a jigsaw branch for local detail.

After Liang & Qu, Liaoning Technical University (foreground localization and region discriminative features). Stated
there: the suppression, one shared ResNet, the three branches and the sum of their losses. Our reading, most of it a
setting: the suppression acts once, on the final map; `raw` classifies the suppressed map, so that its controller
learns; the box follows MMAL-Net's rule on that map alone; the branches share one classifier; the answer is the mean of
`raw` and `object`.
"""

from __future__ import annotations

from torch import Tensor, nn

from networks.backbone import DENSE_STRIDE, STRIDE, Backbone, checked_stride
from networks.classifier import Classifier
from networks.crops import crop_objects, resize_images
from networks.jigsaw import permute_blocks, random_permutations
from networks.localization import activation_map, cell_boxes_to_pixels, localize
from networks.outputs import NetworkOutput, combine_branches, requested_branches
from networks.suppression import RegionSuppression
from utils.errors import UserError


class FLRDF(nn.Module):
    """Branches `raw`, `object` and, in training only, `jigsaw`: the object with its blocks in a random order.

    `suppression`: see `networks.suppression.RegionSuppression`. `classify_suppressed=False` lets `raw` classify the
    plain map; the controller then has nothing to learn from, so a fixed suppression is needed. `box_agreement` keeps of
    the box only what the penultimate map confirms, as MMAL-Net does. `jigsaw_blocks` are counted along a side.
    """

    branches = ("raw", "object", "jigsaw")
    evaluated = ("raw", "object")

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        input_size: int = 448,
        localization_stride: int = STRIDE,
        localization_threshold: float = 1.0,
        suppression: str | float = "learnable",
        classify_suppressed: bool = True,
        box_agreement: bool = False,
        jigsaw_blocks: int = 2,
        dropout: float = 0.5,
    ):
        super().__init__()
        if suppression == "learnable" and not classify_suppressed:
            raise UserError(
                "classify_suppressed is off and suppression 'learnable': nothing would teach the controller; "
                "set suppression to a number such as 0.5"
            )
        if not 1 <= jigsaw_blocks <= input_size // STRIDE:
            raise UserError(f"jigsaw_blocks is {jigsaw_blocks}; expected 1 to {input_size // STRIDE} blocks a side")
        self.input_size = input_size
        self.localization_stride = checked_stride(localization_stride)
        self.localization_threshold = localization_threshold
        self.classify_suppressed = classify_suppressed
        self.box_agreement = box_agreement
        self.jigsaw_blocks = jigsaw_blocks
        self.answer = ("raw", "object")
        self.loss_weights = dict.fromkeys(self.branches, 1.0)
        self.backbone = backbone
        self.dropout = nn.Dropout(dropout)
        self.suppression = RegionSuppression(backbone.embedding_channels, suppression)
        self.classifier = Classifier(backbone.embedding_channels, num_classes)

    def forward(
        self, images: Tensor, *, mask_background: bool = False, branches: tuple[str, ...] | None = None
    ) -> NetworkOutput:
        """Map normalised images [B, 3, S, S], S >= input_size, to a `NetworkOutput`.

        Logits: `raw`, `object` and, while training, `jigsaw` [B, classes]. Only the passes that `branches` need are
        computed (None: all). FLRDF has no mask: `mask_background` changes nothing.
        """
        wanted = requested_branches(branches, self.branches if self.training else self.evaluated)
        raw = self.backbone(resize_images(images, self.input_size), dense=self.localization_stride == DENSE_STRIDE)
        suppressed = self.suppression(raw.final)
        embedding = suppressed.mean(dim=(2, 3)) if self.classify_suppressed else raw.embedding
        logits = {"raw": self.classifier(self.dropout(embedding))}
        if wanted <= {"raw"}:
            return NetworkOutput(logits)

        activation = activation_map(suppressed)
        confirming = activation_map(raw.penultimate) if self.box_agreement else activation
        localization = localize(activation, confirming, threshold=self.localization_threshold)
        object_boxes = cell_boxes_to_pixels(localization.boxes, self.localization_stride)
        crops = crop_objects(images, object_boxes, input_size=self.input_size)
        crops = resize_images(crops, self.input_size)
        if "object" in wanted:
            logits["object"] = self.classifier(self.dropout(self.backbone(crops, kind="object").embedding))
        if "jigsaw" in wanted:
            permutations = random_permutations(len(crops), self.jigsaw_blocks**2, crops.device)
            shuffled = permute_blocks(crops, permutations, self.jigsaw_blocks)
            logits["jigsaw"] = self.classifier(self.dropout(self.backbone(shuffled, kind="part").embedding))
        return NetworkOutput(logits, object_boxes)

    def predict_logits(self, output: NetworkOutput) -> Tensor:
        """Return the system's one answer, [B, classes]: the mean probability over the branches of `answer`."""
        return combine_branches(output, self.answer)

    def heads(self) -> list[nn.Module]:
        """Parts that start from random weights and may want a higher learning rate than the trunk.

        Not the suppression: it shapes the boxes, which must not jump.
        """
        return [self.classifier]
