"""Cross-X: part maps of two stages and of both together, whose parts are to be alike across images and classes.

Luo et al., "Cross-X Learning for Fine-Grained Visual Categorization", ICCV 2019. Logits, losses and parameter names
follow the published code with ResNet-50. Ours are maps of any size, where it has 28 x 28 cells written in, at least
four units in an excitation (only ResNet-18 and 34 would have fewer), and an evaluation that averages the combined maps
before it convolves them, which is the same for half of the computation. Its settings for Aircraft are misspelt, so that
it is trained there without the regulariser; here it has the weights that were meant.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from networks.backbone import Backbone
from networks.classifier import Classifier
from networks.crops import resize_images
from networks.excitation import CombinedMap, MultiExcitation
from networks.losses import agreement_loss, semantic_loss
from networks.outputs import NetworkOutput, requested_branches
from networks.shared import Shared
from networks.system import System
from utils.options import Count, PositiveOrZero, require

LEVELS = ("final", "stage3", "combined")
PUBLISHED = {"ulti": "final", "plty": "stage3", "cmbn": "combined"}


@dataclass(frozen=True)
class Options:
    parts: Count = 2  # excitations of each stage, each with a map of its own
    semantic_weights: tuple[PositiveOrZero, PositiveOrZero, PositiveOrZero] = (0.5, 0.25, 0.5)  # paper's gamma by level
    stage3_pooling: Literal["maximum", "mean"] = "maximum"  # of the part maps of stage 3
    combine_maps: bool = True  # a third level from maps of both stages; False: two levels, as published for Dogs

    def check(self, shared: Shared) -> None:
        blocks = "a ResNet: other trunks have no residual and shortcut whose sum their stages end with"
        require(shared.has_split, "backbone", shared.backbone, blocks)


class CrossX(System):
    """Branches `final`, `stage3` and `combined`, and `sum` of their logits, which alone is classified and predicts.

    Three terms `semantic_<level>` draw the vectors of a part together and different parts apart, over the images that a
    process has; `agreement` draws the other levels' probabilities and those of `final` together.
    """

    Options = Options
    run_defaults = {
        "epochs": 30,
        "batch_size": 32,
        "learning_rate": 0.01,
        "weight_decay": 0.0,
        "milestones": (15, 25),  # as its code has it with PyTorch before 1.1; with later ones 14 and 24
        "brightness": 0.0,
        "contrast": 0.0,
        "resize_size": lambda shared: round(shared.side_of_images * 600 / 448),
    }
    loss_descriptions = {
        **{
            f"semantic_{level}": f"Whether vectors of one part ({level}) are closer to each other than to other parts'."
            for level in LEVELS
        },
        "agreement": "Distance between the probabilities of the levels.",
    }
    warmup_branches = ()
    trained_through_others = LEVELS

    branches = (*LEVELS, "sum")
    evaluated = branches
    prediction = ("sum",)

    def __init__(self, backbone: Backbone, num_classes: int, options: Options, shared: Shared):
        super().__init__(backbone, options, shared)
        self.levels = LEVELS if options.combine_maps else LEVELS[:2]
        self.branches = self.evaluated = (*self.levels, "sum")
        semantic = dict(zip(self.levels, options.semantic_weights, strict=False))
        self.loss_weights = {
            **dict.fromkeys(self.levels, 0.0),
            "sum": 1.0,
            **{f"semantic_{level}": weight for level, weight in semantic.items()},
            "agreement": 1.0,
        }
        stage3, final = backbone.channels["stage3"], backbone.channels["final"]
        lengths = {"final": final, "stage3": stage3, "combined": stage3}
        self.excitations = nn.ModuleDict(
            {level: MultiExcitation(lengths[level], options.parts) for level in ("stage3", "final")}
        )
        self.combined = nn.ModuleList(
            CombinedMap(stage3, final) for _ in range(options.parts if options.combine_maps else 0)
        )
        self.classifiers = nn.ModuleDict(
            {level: Classifier(options.parts * lengths[level], num_classes) for level in self.levels}
        )

    @property
    def published_names(self) -> dict[str, str]:
        """The excitations are named after the last blocks of their stages, whose numbers depend on the trunk."""
        trunk, parts = self.backbone.trunk, range(self.options.parts)
        return {
            f"layer3.{len(trunk.layer3) - 1}.me.": "excitations.stage3.",
            f"layer4.{len(trunk.layer4) - 1}.me.": "excitations.final.",
            **{f"conv2_{part + 1}.": f"combined.{part}.reduce." for part in parts},
            **{f"conv3_{part + 1}.": f"combined.{part}.conv." for part in parts},
            **{f"bn3_{part + 1}.": f"combined.{part}.norm." for part in parts},
            **{f"fc_{name}.": f"classifiers.{level}." for name, level in PUBLISHED.items()},
            "": "backbone.trunk.",
        }

    def forward(
        self,
        images: Tensor,
        *,
        labels: Tensor | None = None,
        mask_background: bool = False,
        branches: tuple[str, ...] | None = None,
    ) -> NetworkOutput:
        """Map normalised images [B, 3, S, S], S >= input_size, to logits [B, classes] of each branch; no boxes.

        Only the levels that `branches` need are computed (None: all). Cross-X has no mask: `mask_background` changes
        nothing.
        """
        wanted = requested_branches(branches, self.branches)
        features = self.backbone(resize_images(images, self.input_size), split=True)
        stage3 = self.excitations["stage3"](features.stage3_split)  # a map [B, C3, H/16, W/16] for each part
        final = self.excitations["final"](features.final_split)  # [B, C, H/32, W/32]
        parts = {}
        if wanted & {"final", "sum"}:
            parts["final"] = [map_.mean(dim=(2, 3)) for map_ in final]
        if wanted & {"stage3", "sum"}:
            highest = self.options.stage3_pooling == "maximum"
            parts["stage3"] = [map_.amax(dim=(2, 3)) if highest else map_.mean(dim=(2, 3)) for map_ in stage3]
        if wanted & {"combined", "sum"} and self.options.combine_maps:
            parts["combined"] = [combine(*maps) for combine, *maps in zip(self.combined, stage3, final, strict=True)]
        logits = {level: self.classifiers[level](torch.cat(vectors, dim=1)) for level, vectors in parts.items()}
        if "sum" in wanted:
            logits["sum"] = sum(logits.values())
        extras = {level: torch.stack(vectors, dim=1) for level, vectors in parts.items()} if self.training else None
        return NetworkOutput({name: logits[name] for name in self.branches if name in wanted}, extras=extras)

    def losses(self, output: NetworkOutput, targets: Tensor, *, label_smoothing: float = 0.0) -> dict[str, Tensor]:
        """Cross-entropy of every branch; in training `semantic_<level>` and, of all levels together, `agreement`.

        Extras: the vectors [B, parts, channels] of each level. `targets` [B] int64.
        """
        terms = super().losses(output, targets, label_smoothing=label_smoothing)
        if output.extras is not None:
            terms |= {f"semantic_{level}": semantic_loss(vectors) for level, vectors in output.extras.items()}
            if output.logits.keys() >= set(self.levels):
                final, *others = (output.logits[level] for level in self.levels)
                terms["agreement"] = sum(agreement_loss(final, other) for other in others)
        return terms

    def heads(self) -> list[nn.Module]:
        return [self.excitations, self.combined, self.classifiers]
