"""PMG: one network trained step by step on jigsaws of smaller and larger blocks, stage by stage.

Du, Chang, Bhunia, Xie, Ma, Song & Guo, "Fine-Grained Visual Classification via Progressive Multi-Granularity Training
of Jigsaw Patches", ECCV 2020. Logits, losses, steps and gradients follow the published code. Ours are the maximum over
the whole map (theirs covers a corner of it at other sizes than 448) and, unless told otherwise, an order of blocks for
each image. As published, pictures are loaded at 550 pixels, padded by 8, cropped to 448 and normalised with mean and
deviation 0.5, though the trunk's weights come from ImageNet; at other sizes than 448 in proportion.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from networks.backbone import Backbone
from networks.classifier import build_two_layer_classifier
from networks.crops import resize_images
from networks.jigsaw import cyclic_permutations, permute_blocks
from networks.outputs import NetworkOutput, requested_branches
from networks.shared import Shared
from networks.system import Step, System
from utils.options import Count, require

STAGES = ("stage2", "stage3", "final")
HIDDEN = 512  # units


@dataclass(frozen=True)
class Options:
    granularities: tuple[Count, Count, Count] = (8, 4, 2)  # blocks along a side, one optimizer step each, by stage
    order_per_image: bool = True  # every image's blocks in an order of its own; False: one for a batch, as published
    whole_passes: bool = True  # as published: a step runs all stages and heads; False: only what its loss needs, faster
    zeroed_gradients: bool = True  # as published: what a step does not reach moves on by momentum and weight decay

    def check(self, shared: Shared) -> None:
        dividing = all(shared.input_size % blocks == 0 for blocks in self.granularities)
        require(dividing, "granularities", self.granularities, f"numbers that divide input_size, {shared.input_size}")
        require(
            shared.batch_size != 1,
            "batch_size",
            shared.batch_size,
            "at least 2 for pmg: its heads normalise over images",
        )


class ConvolutionBlock(nn.Module):
    """Convolution, batch norm, ReLU."""

    applies_in_order = True  # its batch norm gets what its convolution gives: see `networks.folding`

    def __init__(self, in_channels: int, out_channels: int, *, kernel_size: int):
        super().__init__()
        padding = kernel_size // 2
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, momentum=0.01)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)))


class PMG(System):
    """Branches `stage2`, `stage3`, `final` and `concat`, from one pass; the prediction is the sum of their logits."""

    Options = Options
    run_defaults = {
        "epochs": 200,
        "batch_size": 16,
        "learning_rate": 2e-4,
        "head_learning_rate_factor": 10.0,
        "weight_decay": 5e-4,
        "schedule": "cosine",
        "brightness": 0.0,
        "contrast": 0.0,
        "ensembling": "sum_logits",
        "resize_size": lambda shared: round(shared.side_of_images * 550 / 448),
        "padding": lambda shared: round(shared.side_of_images * 8 / 448),
        "normalization": "half",
    }
    published_names = {
        "features.": "backbone.trunk.",
        **{f"conv_block{number}.": f"blocks.{stage}." for number, stage in enumerate(STAGES, start=1)},
        **{f"classifier{number}.": f"classifiers.{stage}." for number, stage in enumerate(STAGES, start=1)},
        "classifier_concat.": "classifiers.concat.",
    }
    warmup_branches = ()
    smallest_batch = 2

    branches = (*STAGES, "concat")
    evaluated = branches
    prediction = branches

    def __init__(self, backbone: Backbone, num_classes: int, options: Options, shared: Shared):
        super().__init__(backbone, options, shared)
        self.absent_gradients = not options.zeroed_gradients
        self.loss_weights = {**dict.fromkeys(STAGES, 1.0), "concat": 2.0}
        width = backbone.embedding_channels // 2
        self.blocks = nn.ModuleDict(
            {
                stage: nn.Sequential(
                    ConvolutionBlock(backbone.channels[stage], HIDDEN, kernel_size=1),
                    ConvolutionBlock(HIDDEN, width, kernel_size=3),
                )
                for stage in STAGES
            }
        )
        self.classifiers = nn.ModuleDict({stage: build_two_layer_classifier(width, num_classes) for stage in STAGES})
        self.classifiers["concat"] = build_two_layer_classifier(width * len(STAGES), num_classes)

    def forward(
        self,
        images: Tensor,
        *,
        labels: Tensor | None = None,
        mask_background: bool = False,
        branches: tuple[str, ...] | None = None,
    ) -> NetworkOutput:
        """Map normalised images [B, 3, S, S], S >= input_size, to logits [B, classes] of each branch; no boxes.

        Only the heads that `branches` need are computed (None: all). PMG has no mask: `mask_background` changes
        nothing. In training B is at least 2.
        """
        wanted = requested_branches(branches, self.branches)
        ends = {} if self.options.whole_passes or not self.training else {"until": _deepest(wanted)}
        features = self.backbone(resize_images(images, self.input_size), **ends)
        vectors = {
            stage: self.blocks[stage](getattr(features, stage)).amax(dim=(2, 3))
            for stage in STAGES
            if wanted & {stage, "concat"}
        }
        logits = {stage: self.classifiers[stage](vector) for stage, vector in vectors.items() if stage in wanted}
        if "concat" in wanted:
            logits["concat"] = self.classifiers["concat"](torch.cat(list(vectors.values()), dim=1))
        return NetworkOutput(logits)

    def steps(self, images: Tensor, labels: Tensor) -> Iterator[Step]:
        """Jigsaws for each stage, from small blocks to large ones, then the picture: paper, section 3.2.

        With `whole_passes` every step runs the whole network, which updates all running statistics four times a batch,
        as published. Otherwise a step ends with its stage and computes its head alone, so that each layer's statistics
        are of the inputs that it learns from. Losses and gradients are the same.
        """
        images = resize_images(images, self.input_size)
        for stage, blocks in zip(STAGES, self.options.granularities, strict=True):
            orders = len(images) if self.options.order_per_image else 1
            permutations = cyclic_permutations(orders, blocks**2, images.device)
            yield self._step(permute_blocks(images, permutations, blocks), labels, stage)
        yield self._step(images, labels, "concat")

    def _step(self, images: Tensor, labels: Tensor, term: str) -> Step:
        return Step(images, labels, (term,), self.branches if self.options.whole_passes else (term,))

    def heads(self) -> list[nn.Module]:
        return [self.blocks, self.classifiers]


def _deepest(wanted: set[str]) -> str:
    """Return the last stage that branches need."""
    return "final" if "concat" in wanted else max(wanted, key=STAGES.index)
