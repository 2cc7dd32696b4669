"""API-Net: two pictures are compared, and each is classified in the light of what it has in common with the other.

Zhuang, Wang & Qiao, "Learning Attentive Pairwise Interaction for Fine-Grained Classification", AAAI 2020. Pairs, logits
and losses follow the published code, but that a picture without partner in its batch is left out (see `Options`).
Pairs serve training only: a trained network is a plain ResNet. They are sought among the pictures of one process or
GPU. Batches are class-balanced as published, but every picture is shown at least once in an epoch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.backbone import Backbone
from networks.classifier import Classifier
from networks.crops import resize_images
from networks.losses import classification_losses, cross_entropies
from networks.outputs import NetworkOutput, requested_branches
from networks.pairs import nearest_pairs
from networks.shared import Shared
from networks.system import System
from utils.options import require

MUTUAL_CHANNELS = 512  # inside the two layers that make a pair's mutual vector
MARGIN = 0.05  # by which a picture's own gate should make the true class likelier than the other's gate does
PAIR_TERMS = ("self", "other", "priority")


@dataclass(frozen=True)
class Options:
    pair_lone_pictures: bool = False  # as published: one without partner in the batch is paired with the batch's first

    def check(self, shared: Shared) -> None:
        weights = {name: (shared.loss_weights or {}).get(name, 1.0) for name in PAIR_TERMS}
        if shared.batch_size and any(weights.values()):
            require(
                2 <= shared.images_per_class <= shared.batch_size // 2,
                "images_per_class",
                shared.images_per_class,
                "at least 2 for apinet, which compares images of one class and of two, and at most half of "
                f"batch_size, {shared.batch_size}, which it has to divide: the smallest batch_size is 4",
            )


def images_per_class(shared: Shared) -> int:
    """Return the published 4, or less in small batches, so that they hold two classes; 0 where nothing fits."""
    batch_size = shared.batch_size or 120
    return next((count for count in (4, 3, 2) if batch_size % count == 0 and batch_size >= 2 * count), 0)


class APINet(System):
    """Branch `raw`, the prediction; in training also `self` and `other`: the pictures of each image's two pairs, by
    their own gate and by their partner's.
    """

    Options = Options
    run_defaults = {
        "epochs": 100,
        "batch_size": 120,
        "images_per_class": images_per_class,
        "learning_rate": 0.01,
        "weight_decay": 5e-4,
        "schedule": "cosine_per_step",
        # 8 of 100; with random weights there is nothing to wait for
        "frozen_trunk_epochs": lambda shared: round(0.08 * shared.epochs) if shared.has_pretrained_weights else 0,
        "warmup_epochs": 0,
        "brightness": 0.0,
        "contrast": 0.0,
        "resize_size": lambda shared: round(shared.side_of_images * 512 / 448),
    }
    published_names = {
        "conv.0.": "backbone.trunk.conv1.",
        "conv.1.": "backbone.trunk.bn1.",
        **{f"conv.{stage + 3}.": f"backbone.trunk.layer{stage}." for stage in (1, 2, 3, 4)},
        "map1.": "map1.",
        "map2.": "map2.",
        "fc.": "classifier.",
    }
    loss_descriptions = {"priority": "Whether a picture's own gate makes its class likelier than its partner's gate."}
    needs_labels = True

    branches = ("raw", "self", "other")
    evaluated = ("raw",)
    prediction = ("raw",)

    def __init__(self, backbone: Backbone, num_classes: int, options: Options, shared: Shared):
        super().__init__(backbone, options, shared)
        # Half of each: the published cross-entropy is the mean over both. The picture alone has no loss of its own.
        self.loss_weights = {"raw": 0.0, "self": 0.5, "other": 0.5, "priority": 1.0}
        channels = backbone.embedding_channels
        self.map1 = nn.Linear(2 * channels, MUTUAL_CHANNELS)
        self.map2 = nn.Linear(MUTUAL_CHANNELS, channels)
        self.classifier = Classifier(channels, num_classes)

    def forward(
        self,
        images: Tensor,
        *,
        labels: Tensor | None = None,
        mask_background: bool = False,
        branches: tuple[str, ...] | None = None,
    ) -> NetworkOutput:
        """Map normalised images [B, 3, S, S], S >= input_size, to a `NetworkOutput` without boxes.

        Logits: `raw` [B, classes]; with `labels` [B] also `self` and `other` [B, 4, classes]: of picture i in the pair
        with the nearest one of its class, of that one, of picture i in the pair with the nearest one of another class,
        and of that one. Extras: the four's `pair_labels` [B, 4] and `pair_weights` [B, 4], 0 for a pair that there is
        not. API-Net has no mask: `mask_background` changes nothing.
        """
        wanted = requested_branches(branches, self.evaluated if labels is None else self.branches)
        embedding = self.backbone(resize_images(images, self.input_size)).embedding
        logits = {"raw": self.classifier(embedding)} if "raw" in wanted else {}
        if wanted == {"raw"}:
            return NetworkOutput(logits)

        partners, found = nearest_pairs(embedding, labels)
        pairs = self._paired(embedding, partners)  # [B, 2 pairs, 2 pictures, C]
        mutual = self.map2(self.dropout(self.map1(pairs.flatten(2))))  # [B, 2, C]
        gates = torch.sigmoid(mutual[:, :, None] * pairs)
        for name, gate in (("self", gates), ("other", gates.flip(2))):
            if name in wanted:
                logits[name] = self.classifier(self.dropout(pairs + pairs * gate)).flatten(1, 2)
        weights = (found | self.options.pair_lone_pictures).float().repeat_interleave(2, dim=1)
        pair_labels = self._paired(labels, partners).flatten(1)
        return NetworkOutput(logits, extras={"pair_labels": pair_labels, "pair_weights": weights})

    @staticmethod
    def _paired(values: Tensor, partners: Tensor) -> Tensor:
        """Return values [B, ...] as pairs [B, 2, 2, ...]: in both of a picture its own, then the partner's."""
        return torch.stack([values[:, None].expand(-1, 2, *values.shape[1:]), values[partners]], dim=2)

    def losses(self, output: NetworkOutput, targets: Tensor, *, label_smoothing: float = 0.0) -> dict[str, Tensor]:
        """Cross-entropy of every branch, pairs by their own labels; `priority` where both of these are there.

        Priority: the hinge on how much likelier the true class is by the other picture's gate than by one's own.
        """
        raw = {name: logits for name, logits in output.logits.items() if name == "raw"}
        shared = {"label_smoothing": label_smoothing, "class_weights": self.class_weights}
        terms = classification_losses(NetworkOutput(raw), targets, **shared)
        if not output.extras:
            return terms
        labels, weights = output.extras["pair_labels"], output.extras["pair_weights"]
        weights = weights / weights.sum().clamp(min=1)
        pairs = {name: output.logits[name].transpose(1, 2) for name in ("self", "other") if name in output.logits}
        for name, logits in pairs.items():  # [B, classes, 4]
            terms[name] = (cross_entropies(logits, labels, **shared) * weights).sum()
        if len(pairs) == 2:
            own, other = (logits.softmax(dim=1).gather(1, labels[:, None]).squeeze(1) for logits in pairs.values())
            terms["priority"] = (F.relu(other - own + MARGIN) * weights).sum()
        return terms

    def heads(self) -> list[nn.Module]:
        return [self.classifier, self.map1, self.map2]
