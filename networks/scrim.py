"""SCRIM: coarse parts by contrast, fine parts by navigation, all of them classified together.

After "Spatial-aware collaborative region mining for fine-grained recognition", Multimedia Tools and Applications, 2024,
of which we know the abstract only. This is a reconstruction: dual coarse-part and dual fine-part modules, the contrast
by class and module and the ranking by informativeness are stated there; their insides are those of the published
building blocks (see `networks.parts` and `networks.losses`), and how they are joined is our reading.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from networks.backbone import STRIDE, Backbone
from networks.classifier import Classifier
from networks.crops import crop_windows, resize_images
from networks.outputs import NetworkOutput, combine_branches, requested_branches
from networks.parts import ANCHOR_SIZES, CoarsePart, Navigator, PartProposals
from utils.errors import UserError

MODULES = 2  # "dual"


class SCRIM(nn.Module):
    """Branches `raw`, `part` (every proposed part by itself) and `concat` (picture and best parts), the answer.

    Each of two modules weights the final map's channels for a part of its own and proposes `part_proposals` regions on
    it; the best `parts_in_answer` of each go on. `anchor_sizes` are in pixels of a 448-pixel input, `part_max_iou` is
    the overlap above which a region is dropped; `parts_of_every_level`: see `networks.parts.PartProposals`. Raises
    UserError where more parts are to go on than are proposed.
    """

    branches = ("raw", "part", "concat")
    evaluated = branches

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        input_size: int = 448,
        coarse_channels: int = 1024,
        part_proposals: int = 6,
        parts_in_answer: int = 4,
        part_max_iou: float = 0.25,
        parts_of_every_level: bool = True,
        anchor_sizes: Sequence[int] = ANCHOR_SIZES,
        dropout: float = 0.5,
    ):
        super().__init__()
        if not 1 <= parts_in_answer <= part_proposals:
            raise UserError(f"parts_in_answer is {parts_in_answer}; expected 1 to part_proposals, {part_proposals}")
        self.input_size = input_size
        self.parts_in_answer = parts_in_answer
        self.answer = ("concat",)
        self.loss_weights = {**dict.fromkeys(self.branches, 1.0), "ranking": 1.0, "contrastive": 0.5}
        channels = backbone.embedding_channels
        self.backbone = backbone
        self.dropout = nn.Dropout(dropout)
        self.classifier = Classifier(channels, num_classes)
        self.coarse_parts = nn.ModuleList(CoarsePart(channels, coarse_channels) for _ in range(MODULES))
        self.navigators = nn.ModuleList(Navigator(channels) for _ in range(MODULES))
        self.proposals = PartProposals(
            part_proposals,
            grid_size=input_size // STRIDE,
            stride=STRIDE,
            sizes=anchor_sizes,
            max_iou=part_max_iou,
            every_level=parts_of_every_level,
        )
        self.part_classifier = Classifier(channels, num_classes)
        self.concat_classifier = Classifier(channels * (1 + MODULES * parts_in_answer), num_classes)

    def forward(
        self, images: Tensor, *, mask_background: bool = False, branches: tuple[str, ...] | None = None
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
        count = self.proposals.count if "part" in wanted else self.parts_in_answer
        boxes, scores = boxes[:, :count].reshape(B, -1, 4), scores[:, :count].reshape(B, MODULES, count)
        parts = self.backbone(crop_windows(images, boxes, input_size=self.input_size, outside="zeros"), kind="part")
        embeddings = parts.embedding.unflatten(0, (B, MODULES, count))  # [B, 2, M, C]
        if "part" in wanted:
            logits["part"] = self.part_classifier(self.dropout(embeddings.flatten(1, 2)))
        best = embeddings[:, :, : self.parts_in_answer].flatten(1)
        logits["concat"] = self.concat_classifier(self.dropout(torch.cat([raw.embedding, best], dim=1)))
        return NetworkOutput(
            logits,
            part_boxes=boxes,
            part_scores=scores,
            # Only training compares them, in batches made for it.
            coarse_features=torch.stack(coarse_features, dim=1) if self.training else None,
        )

    def predict_logits(self, output: NetworkOutput) -> Tensor:
        """Return the system's one answer, [B, classes]."""
        return combine_branches(output, self.answer)

    def heads(self) -> list[nn.Module]:
        """Parts that start from random weights and may want a higher learning rate than the trunk."""
        return [self.classifier, self.part_classifier, self.concat_classifier, self.coarse_parts, self.navigators]
