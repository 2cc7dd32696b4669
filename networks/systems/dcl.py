"""DCL: pictures taken to pieces, so that detail is looked at, and learnt to be put together again.

Chen, Bai, Zhang & Mei, "Destruction and Construction Learning for Fine-grained Image Recognition", CVPR 2019. Logits
and losses follow the published code, which differs from the paper (see docs/systems.md). Ours are clean blocks, whose
places are known: the published code resamples destroyed pictures, and guesses by colour where each of their blocks came
from (`guessed_places`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.backbone import Backbone
from networks.classifier import Classifier
from networks.crops import resize_images
from networks.jigsaw import (
    guess_permutations,
    neighbour_permutations,
    permute_blocks,
    permute_resampled_blocks,
)
from networks.losses import cross_entropy
from networks.outputs import NetworkOutput, requested_branches
from networks.shared import Shared
from networks.system import System
from utils.options import Count, PositiveOrZero, require

REGIONS = 7  # along a side of 448 pixels


@dataclass(frozen=True)
class Options:
    regions: Count | None = None  # blocks along a side; None: at most 7, as many as divide input_size
    swap_classes: Literal["each", "two"] = "each"  # told apart when destroyed: each class, or, as in the paper, none
    location_weight: PositiveOrZero = 1.0  # of the loss of where blocks came from; for cars and aircraft 0.01
    guessed_places: bool = False  # as published: blocks are resampled, and where they came from is guessed by colour

    def completed(self, shared: Shared) -> Options:
        cells = shared.input_size // shared.stride
        dividing = [number for number in range(1, min(REGIONS, cells) + 1) if shared.input_size % number == 0]
        return replace(self, regions=self.regions or dividing[-1])

    def check(self, shared: Shared) -> None:
        cells = shared.input_size // shared.stride
        expected = f"a number from 2 to {cells} that divides input_size, {shared.input_size}"
        require(2 <= self.regions <= cells and shared.input_size % self.regions == 0, "regions", self.regions, expected)


class DCL(System):
    """Branches `raw`, in training `destroyed`, and `swap`; the prediction is the sum of the logits of `raw` and `swap`.

    `swap` tells whole from destroyed pictures of each class, and so knows the class twice: its logits are the sum of
    both. With `swap_classes` "two" it only tells whole from destroyed, and `raw` is the prediction.
    """

    Options = Options
    run_defaults = {
        "epochs": 180,
        "batch_size": 16,
        "learning_rate": 8e-4,
        "head_learning_rate_factor": 10.0,
        "weight_decay": 0.0,
        "schedule": "steps",
        "milestones": (60, 120),
        "brightness": 0.0,
        "contrast": 0.0,
        "rotation": 15.0,
        "resize_size": lambda shared: round(shared.side_of_images * 512 / 448),
        "ensembling": "sum_logits",
    }
    published_names = {
        "model.0.": "backbone.trunk.conv1.",
        "model.1.": "backbone.trunk.bn1.",
        **{f"model.{number + 3}.": f"backbone.trunk.layer{number}." for number in (1, 2, 3, 4)},
        "classifier.": "classifier.",
        "classifier_swap.": "swap_classifier.",
        "Convmask.": "location.",
    }
    loss_descriptions = {"location": "How far from their true places the blocks are located."}
    warmup_branches = ()

    branches = ("raw", "destroyed", "swap")
    evaluated = ("raw", "swap")
    prediction = evaluated

    def __init__(self, backbone: Backbone, num_classes: int, options: Options, shared: Shared):
        super().__init__(backbone, options, shared)
        self.regions = options.regions
        self.loss_weights = {"raw": 0.5, "destroyed": 0.5, "swap": 1.0, "location": options.location_weight}
        channels, of_each_class = backbone.embedding_channels, options.swap_classes == "each"
        if not of_each_class:
            self.branches, self.evaluated, self.prediction = ("raw", "destroyed"), ("raw",), ("raw",)
        self.classifier = Classifier(channels, num_classes, bias=False)
        self.swap_classifier = Classifier(channels, 2 * num_classes if of_each_class else 2, bias=False)
        self.location = nn.Conv2d(channels, 1, kernel_size=1)

    def forward(
        self,
        images: Tensor,
        *,
        labels: Tensor | None = None,
        mask_background: bool = False,
        branches: tuple[str, ...] | None = None,
    ) -> NetworkOutput:
        """Map normalised images [B, 3, S, S], S >= input_size, to logits [B, classes] of each branch; no boxes.

        In training each picture and its destroyed version are in one pass, unless `branches` leave the latter out. DCL
        has no mask: `mask_background` changes nothing.
        """
        wanted = requested_branches(branches, self.branches if self.training else self.evaluated)
        pictures, extras = resize_images(images, self.input_size), {}
        shown = pictures[:, None]
        if self.training and wanted - {"raw"}:
            destroyed, extras["places"] = self._destroy(pictures)
            shown = torch.stack([pictures, destroyed], dim=1)
        versions = shown.shape[1]
        features = self.backbone(shown.flatten(0, 1))
        classified = self.classifier(features.embedding).unflatten(0, (-1, versions))  # [B, versions, classes]
        extras["swap"] = self.swap_classifier(features.embedding).unflatten(0, (-1, versions))
        logits = {"raw": classified[:, 0]}
        if versions == 2:
            logits["destroyed"] = classified[:, 1]
            located = F.adaptive_avg_pool2d(self.location(features.final), self.regions)
            extras["locations"] = located.tanh().view(len(images), versions, -1)
        if "swap" in wanted:
            whole, as_destroyed = extras["swap"][:, 0].chunk(2, dim=1)
            logits["swap"] = whole + as_destroyed
        return NetworkOutput({name: logits[name] for name in self.branches if name in wanted}, extras=extras)

    def _destroy(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Return pictures [B, 3, S, S] in pieces, and for each of their blocks which one it was, [B, regions^2]."""
        permutations = neighbour_permutations(len(pictures), self.regions, pictures.device)
        if not self.options.guessed_places:
            return permute_blocks(pictures, permutations, self.regions), permutations
        destroyed = permute_resampled_blocks(pictures, permutations, self.regions)
        return destroyed, guess_permutations(destroyed, pictures, self.regions)

    def losses(self, output: NetworkOutput, targets: Tensor, *, label_smoothing: float = 0.0) -> dict[str, Tensor]:
        """Cross-entropy of `raw` and `destroyed`; `swap` and, in training, `location` over both versions.

        Extras, of one version in evaluation and two in training: `swap` [B, versions, 2 * classes or 2] logits;
        `locations` [B, 2, regions^2] and `places` [B, regions^2], see `_destroy`.
        """
        terms = super().losses(output, targets, label_smoothing=label_smoothing)
        swap, extras = output.extras["swap"], output.extras
        version = torch.arange(swap.shape[1], device=targets.device)
        shared = {"label_smoothing": label_smoothing}
        if self.options.swap_classes == "each":
            wanted = targets[:, None] + version * (swap.shape[2] // 2)  # [B, versions]
            shared["class_weights"] = None if self.class_weights is None else self.class_weights.repeat(2)
        else:
            wanted = (1 - version).expand(len(targets), -1)
        terms["swap"] = cross_entropy(swap.flatten(0, 1), wanted.flatten(), **shared)
        if "locations" in extras:
            count = extras["places"].shape[1]
            in_order = torch.arange(count, device=targets.device).expand_as(extras["places"])
            places = torch.stack([in_order, extras["places"]], dim=1)
            terms["location"] = F.l1_loss(extras["locations"].float(), (places - count // 2) / count)
        return terms

    def heads(self) -> list[nn.Module]:
        return [self.classifier, self.swap_classifier, self.location]
