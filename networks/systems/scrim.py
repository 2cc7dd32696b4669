"""SCRIM: coarse parts by contrast, fine parts by navigation, all of them classified together.

After "Spatial-aware collaborative region mining for fine-grained recognition", Multimedia Tools and Applications, 2024,
of which we know the abstract only. This is a reconstruction: dual coarse-part and dual fine-part modules, the contrast
by class and module and the ranking by informativeness are stated there; their insides are those of the published
building blocks (see `networks.parts` and `networks.losses`), and how they are joined is our reading.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from networks.backbone import Backbone
from networks.classifier import Classifier
from networks.crops import crop_windows, resize_images
from networks.losses import contrastive_loss, ranking_loss
from networks.outputs import NetworkOutput, requested_branches
from networks.parts import ANCHOR_SCALES, ANCHOR_SIZES, CoarsePart, Navigator, PartProposals, check_proposals
from networks.shared import Shared
from networks.system import System
from utils.options import Count, Share, require

MODULES = 2  # "dual"
FORMER_SCALES = ((1.0, 2 ** (1 / 3)), (1.0, 2 ** (1 / 3)), (1.0, 2 ** (1 / 3), 2 ** (2 / 3)))


@dataclass(frozen=True)
class Options:
    coarse_channels: Count = 1024  # length of the features that the contrastive loss compares
    part_proposals: Count = 6  # regions that each of the two navigators proposes and learns to rank, two or more
    parts_in_prediction: Count = 4  # the best of them that join the final classification
    part_max_iou: Share = 0.25  # a region that overlaps a better one by so much or more is dropped
    parts_of_every_level: bool = True  # a navigator's best small, middle and large region are always among them
    anchor_sizes: tuple[Count, Count, Count] = ANCHOR_SIZES  # sides of regions in pixels at 448, by level
    anchors: Literal["published", "former"] = "published"  # regions as NTS-Net has them, or as older runs had

    def check(self, shared: Shared) -> None:
        check_proposals(self.part_proposals, self.parts_in_prediction, shared)
        if shared.batch_size and (shared.loss_weights or {}).get("contrastive") != 0:
            require(
                2 <= shared.images_per_class <= shared.batch_size // 2,
                "images_per_class",
                shared.images_per_class,
                "at least 2 for scrim, whose contrastive loss compares images of one class, and at most half of "
                f"batch_size, {shared.batch_size}, as it compares classes, too",
            )


class SCRIM(System):
    """Branches `raw`, `part` (every proposed part by itself) and `concat` (picture and best parts), the prediction.

    Each of two modules weights the final map's channels for a part of its own and proposes `part_proposals` regions on
    it; the best `parts_in_prediction` of each go on. `anchor_sizes` are in pixels of a 448-pixel input, `part_max_iou`
    is the overlap from which on a region is dropped; `parts_of_every_level`: see `networks.parts.PartProposals`.
    `anchors` "former": smaller regions on the first two levels, dropped only above `part_max_iou`.
    """

    Options = Options
    run_defaults = {"images_per_class": 2}  # its contrastive loss needs pairs
    loss_descriptions = {
        "ranking": "Whether regions that classify better are also ranked higher.",
        "contrastive": "Whether parts of one class are closer to each other than to those of others.",
    }

    branches = ("raw", "part", "concat")
    evaluated = branches
    prediction = ("concat",)

    def __init__(self, backbone: Backbone, num_classes: int, options: Options, shared: Shared):
        super().__init__(backbone, options, shared)
        self.parts_in_prediction = options.parts_in_prediction
        self.loss_weights = {**dict.fromkeys(self.branches, 1.0), "ranking": 1.0, "contrastive": 0.5}
        channels = backbone.embedding_channels
        self.classifier = Classifier(channels, num_classes)
        self.coarse_parts = nn.ModuleList(CoarsePart(channels, options.coarse_channels) for _ in range(MODULES))
        published = options.anchors == "published"
        scales = ANCHOR_SCALES if published else FORMER_SCALES
        self.navigators = nn.ModuleList(Navigator(channels, scales=scales) for _ in range(MODULES))
        self.proposals = PartProposals(
            options.part_proposals,
            grid_size=self.input_size // backbone.stride,
            stride=backbone.stride,
            sizes=options.anchor_sizes,
            scales=scales,
            max_iou=options.part_max_iou,
            inclusive=published,
            every_level=options.parts_of_every_level,
        )
        self.part_classifier = Classifier(channels, num_classes)
        self.concat_classifier = Classifier(channels * (1 + MODULES * options.parts_in_prediction), num_classes)

    def forward(
        self,
        images: Tensor,
        *,
        labels: Tensor | None = None,
        mask_background: bool = False,
        branches: tuple[str, ...] | None = None,
    ) -> NetworkOutput:
        """Map normalised images [B, 3, S, S], S >= input_size, to a `NetworkOutput` without object boxes.

        Logits: `raw`, `concat` [B, classes], `part` [B, N, classes] of N = 2 * part_proposals parts, module by module,
        the best first. Parts are cut from the images at their full size. Only what `branches` need is computed (None:
        all); `concat` alone needs only the parts that go on. `mask_background` changes nothing.
        """
        wanted = requested_branches(branches, self.branches)
        raw = self.backbone(resize_images(images, self.input_size))
        logits = {"raw": self.classifier(self.dropout(raw.embedding))}
        if wanted <= {"raw"}:
            return NetworkOutput(logits)

        B = images.shape[0]
        part_maps, coarse_features = zip(*(coarse_part(raw.final) for coarse_part in self.coarse_parts), strict=True)
        scores = [navigator(part_map) for navigator, part_map in zip(self.navigators, part_maps, strict=True)]
        boxes, scores = self.proposals(torch.stack(scores, dim=1).flatten(0, 1))  # [2B, M, 4], [2B, M]
        count = self.proposals.count if "part" in wanted else self.parts_in_prediction
        boxes, scores = boxes[:, :count].reshape(B, -1, 4), scores[:, :count].reshape(B, MODULES, count)
        parts = self.backbone(crop_windows(images, boxes, input_size=self.input_size, outside="zeros"), kind="part")
        embeddings = parts.embedding.unflatten(0, (B, MODULES, count))  # [B, 2, M, C]
        if "part" in wanted:
            logits["part"] = self.part_classifier(self.dropout(embeddings.flatten(1, 2)))
        best = embeddings[:, :, : self.parts_in_prediction].flatten(1)
        logits["concat"] = self.concat_classifier(self.dropout(torch.cat([raw.embedding, best], dim=1)))
        extras = {"part_scores": scores}
        if self.training:  # which alone compares them, in batches made for it
            extras["coarse_features"] = torch.stack(coarse_features, dim=1)
        return NetworkOutput(logits, part_boxes=boxes, extras=extras)

    def losses(self, output: NetworkOutput, targets: Tensor, *, label_smoothing: float = 0.0) -> dict[str, Tensor]:
        """Cross-entropy of every branch; `ranking` where parts were classified, `contrastive` in training.

        Extras: `part_scores` [B, 2, M], how informative each module finds its M parts; `coarse_features` [B, 2, D].
        """
        terms = super().losses(output, targets, label_smoothing=label_smoothing)
        extras = output.extras or {}
        if "part" in output.logits:
            terms["ranking"] = ranking_loss(extras["part_scores"], output.logits["part"], targets)
        if "coarse_features" in extras:
            terms["contrastive"] = contrastive_loss(extras["coarse_features"], targets)
        return terms

    def heads(self) -> list[nn.Module]:
        return [self.classifier, self.part_classifier, self.concat_classifier, self.coarse_parts, self.navigators]
