"""NTS-Net: a navigator proposes parts, a teacher classifies each of them, a scrutinizer the picture with the best.

Yang, Luo, Wang, Hu, Gao & Wang, "Learning to Navigate for Fine-grained Classification", ECCV 2018. Logits, parts and
losses follow the published code, batched, but for two defects (see `Options`): its dropout never ends, so that its
evaluation is random, and a level of the navigator none of whose parts is proposed does not learn. Where it finds fewer
parts than asked for, on small inputs, the last one is repeated here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.backbone import Backbone
from networks.classifier import Classifier
from networks.crops import crop_windows, resize_images
from networks.losses import ranking_loss
from networks.outputs import NetworkOutput, requested_branches
from networks.parts import ANCHOR_SIZES, Navigator, PartProposals, check_proposals
from networks.shared import Shared
from networks.system import System
from utils.options import Count, Share


@dataclass(frozen=True)
class Options:
    part_proposals: Count = 6  # parts that the navigator proposes and learns to rank, two or more
    parts_in_prediction: Count = 4  # the best of them that are classified together with the picture
    part_max_iou: Share = 0.25  # a part that overlaps a better one by so much or more is dropped
    anchor_sizes: tuple[Count, Count, Count] = ANCHOR_SIZES  # sides of parts in pixels at 448, by level
    parts_of_every_level: bool = True  # in training the best small, middle and large part; False: as published
    dropout_in_evaluation: bool = False  # as published: what is predicted is random, and other at every call

    def check(self, shared: Shared) -> None:
        check_proposals(self.part_proposals, self.parts_in_prediction, shared)


class NTSNet(System):
    """Branches `raw`, `concat` (best parts and picture), the prediction, and `part` (every proposed part by itself)."""

    Options = Options
    run_defaults = {
        "epochs": 499,
        "batch_size": 16,
        "milestones": (59, 99),
        "warmup_epochs": 0,
        "brightness": 0.0,
        "contrast": 0.0,
        "resize_size": lambda shared: round(shared.side_of_images * 600 / 448),
    }
    published_names = {
        "pretrained_model.fc.": "classifier.",  # the trunk's own, which others leave unused
        "pretrained_model.": "backbone.trunk.",
        **{f"proposal_net.down{level + 1}.": f"navigator.levels.{level}." for level in range(3)},
        **{f"proposal_net.tidy{level + 1}.": f"navigator.scores.{level}." for level in range(3)},
        "concat_net.": "concat_classifier.",
        "partcls_net.": "part_classifier.",
    }
    loss_descriptions = {"ranking": "Whether parts that classify better are also ranked higher."}

    branches = ("raw", "concat", "part")
    evaluated = branches
    prediction = ("concat",)

    def __init__(self, backbone: Backbone, num_classes: int, options: Options, shared: Shared):
        super().__init__(backbone, options, shared)
        # The published ranking is a sum over the pairs of parts, ours the mean.
        pairs = options.part_proposals * (options.part_proposals - 1) / 2
        self.loss_weights = {**dict.fromkeys(self.branches, 1.0), "ranking": pairs}
        channels = backbone.embedding_channels
        self.classifier = Classifier(channels, num_classes)
        self.navigator = Navigator(channels, levels_alike=False)
        self.proposals = PartProposals(
            options.part_proposals,
            grid_size=self.input_size // backbone.stride,
            stride=backbone.stride,
            sizes=options.anchor_sizes,
            max_iou=options.part_max_iou,
            every_level=options.parts_of_every_level,
        )
        self.concat_classifier = Classifier(channels * (options.parts_in_prediction + 1), num_classes)
        self.part_classifier = Classifier(channels, num_classes)

    def forward(
        self,
        images: Tensor,
        *,
        labels: Tensor | None = None,
        mask_background: bool = False,
        branches: tuple[str, ...] | None = None,
    ) -> NetworkOutput:
        """Map normalised images [B, 3, S, S], S >= input_size, to a `NetworkOutput` without object boxes.

        Logits: `raw`, `concat` [B, classes], `part` [B, M, classes] of the M proposed parts, the best first; their
        `part_scores` [B, M] in the extras. Parts are cut from the images at their full size. Only what `branches` need
        is computed (None: all); `concat` alone needs only the parts that go on. NTS-Net has no mask: `mask_background`
        changes nothing.
        """
        wanted = requested_branches(branches, self.branches)
        picture = self.backbone(resize_images(images, self.input_size))
        embedding = self._dropped(picture.embedding)
        logits = {"raw": self.classifier(embedding)}
        if wanted <= {"raw"}:
            return NetworkOutput(logits)

        boxes, scores = self.proposals(self.navigator(picture.final), best_of_all=not self.training)
        count = self.proposals.count if "part" in wanted else self.options.parts_in_prediction
        boxes, scores = boxes[:, :count], scores[:, :count]
        parts = self.backbone(crop_windows(images, boxes, input_size=self.input_size, outside="zeros"), kind="part")
        of_parts = self._dropped(parts.embedding).unflatten(0, (-1, count))  # [B, M, C]
        best = of_parts[:, : self.options.parts_in_prediction].flatten(1)
        logits["concat"] = self.concat_classifier(torch.cat([best, embedding], dim=1))
        if "part" in wanted:
            logits["part"] = self.part_classifier(of_parts)
        return NetworkOutput(logits, part_boxes=boxes, extras={"part_scores": scores})

    def _dropped(self, embedding: Tensor) -> Tensor:
        """Drop values of an embedding once, for all that classify it."""
        return F.dropout(embedding, self.dropout.p, self.training or self.options.dropout_in_evaluation)

    def losses(self, output: NetworkOutput, targets: Tensor, *, label_smoothing: float = 0.0) -> dict[str, Tensor]:
        """Cross-entropy of every branch; `ranking`, which alone teaches the navigator, where parts were classified."""
        terms = super().losses(output, targets, label_smoothing=label_smoothing)
        if "part" in output.logits:
            scores = output.extras["part_scores"][:, None]
            terms["ranking"] = ranking_loss(scores, output.logits["part"], targets)
        return terms

    def heads(self) -> list[nn.Module]:
        return [self.classifier, self.navigator, self.concat_classifier, self.part_classifier]
