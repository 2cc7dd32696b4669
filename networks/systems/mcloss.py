"""MC-Loss: a ResNet whose last channels are dealt to the classes and taught to tell their class at different places.

Chang, Ding, Xie, Bhunia, Li, Ma, Wu, Guo & Song, "The Devil is in the Channels: Mutual-Channel Loss for Fine-Grained
Image Classification", IEEE TIP 29, 2020. From random weights, losses and recipe follow the authors' code; its trunks,
with 600 channels in the last stage, are replaced by torchvision's. That code has no pretrained ResNets: from pretrained
weights, all follows the reimplementation which it names (Kurumi233/Mutual-Channel-Loss), where the loss gains little.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import Tensor

from networks.backbone import Backbone
from networks.channel_groups import channel_overlap, draw_masks, logits_of_groups
from networks.classifier import build_two_layer_classifier
from networks.crops import resize_images
from networks.outputs import NetworkOutput, requested_branches
from networks.shared import Shared
from networks.system import System
from utils.errors import UserError
from utils.options import Share, require

SCRATCH, PRETRAINED = {"channels": 1.5, "diversity": 20.0}, {"channels": 5e-4, "diversity": 5e-3}


@dataclass(frozen=True)
class Options:
    masked_share: Share | None = None  # of each class's channels, left out at random; None: 0.4 pretrained, else 0.5
    mask_per_image: bool = False  # every image's channels are masked in a way of its own; False: one for a batch

    def completed(self, shared: Shared) -> Options:
        share = 0.4 if shared.has_pretrained_weights else 0.5
        return dataclasses.replace(self, masked_share=share if self.masked_share is None else self.masked_share)

    def check(self, shared: Shared) -> None:
        expected = "at least 2 for mcloss: its classifier normalises over images"
        require(shared.batch_size != 1, "batch_size", shared.batch_size, expected)


class MCLoss(System):
    """Branch `raw`, which is also the prediction; in training besides `channels`, the logits of the classes' channels.

    Two terms are the mutual-channel loss: the cross-entropy of `channels`, and `diversity`, how much they overlap.
    """

    Options = Options
    run_defaults = {
        "epochs": lambda shared: 150 if shared.has_pretrained_weights else 300,
        "batch_size": 32,
        "learning_rate": lambda shared: 0.005 if shared.has_pretrained_weights else 0.1,
        "head_learning_rate_factor": lambda shared: 10.0 if shared.has_pretrained_weights else 1.0,
        "weight_decay": 5e-4,
        "schedule": lambda shared: "exponential" if shared.has_pretrained_weights else "steps",
        "decay_rate": 0.8 ** (1 / 30),  # published: times 0.8 after every 30 epochs
        "milestones": (149, 224),
        "brightness": 0.0,
        "contrast": 0.0,
        "resize_size": lambda shared: round(
            shared.side_of_images * (600 / 448 if shared.has_pretrained_weights else 1)
        ),
        "padding": lambda shared: 0 if shared.has_pretrained_weights else round(shared.side_of_images * 4 / 224),
        "normalization": lambda shared: "imagenet" if shared.has_pretrained_weights else "half",
    }
    published_names = {
        **{f"backbone.{n}.": f"backbone.trunk.{name}." for n, name in ((0, "conv1"), (1, "bn1"))},
        **{f"backbone.{n}.": f"backbone.trunk.layer{n - 3}." for n in (4, 5, 6, 7)},
        "dense.": "classifier.",
    }
    loss_descriptions = {"diversity": "How much the channels of a class look at the same places."}
    warmup_branches = ()
    smallest_batch = 2

    branches = ("raw", "channels")
    evaluated = ("raw",)
    prediction = ("raw",)

    def __init__(self, backbone: Backbone, num_classes: int, options: Options, shared: Shared):
        super().__init__(backbone, options, shared)
        channels = backbone.embedding_channels
        if channels < 2 * num_classes:
            raise UserError(
                f"mcloss deals {channels} channels to {num_classes} classes, and each needs two: "
                "choose a backbone with more channels, such as resnet50, or fewer classes"
            )
        self.num_classes = num_classes
        self.loss_weights = {"raw": 1.0, **(PRETRAINED if shared.has_pretrained_weights else SCRATCH)}
        self.classifier = build_two_layer_classifier(channels, num_classes)

    def forward(
        self,
        images: Tensor,
        *,
        labels: Tensor | None = None,
        mask_background: bool = False,
        branches: tuple[str, ...] | None = None,
    ) -> NetworkOutput:
        """Map normalised images [B, 3, S, S], S >= input_size, to logits `raw` [B, classes]; no boxes.

        In training also to `channels` [B, classes], with B at least 2. MC-Loss masks no background: `mask_background`
        changes nothing.
        """
        wanted = requested_branches(branches, self.branches if self.training else self.evaluated)
        final = self.backbone(resize_images(images, self.input_size)).final
        logits = {}
        if "raw" in wanted:
            logits["raw"] = self.classifier(final.amax(dim=(2, 3)))
        if "channels" not in wanted:
            return NetworkOutput(logits)
        count = len(final) if self.options.mask_per_image else 1
        masks = draw_masks(count, final.shape[1], self.num_classes, self.options.masked_share, final.device)
        logits["channels"] = logits_of_groups(final, self.num_classes, masks)
        return NetworkOutput(logits, extras={"channel_overlap": channel_overlap(final, self.num_classes)})

    def losses(self, output: NetworkOutput, targets: Tensor, *, label_smoothing: float = 0.0) -> dict[str, Tensor]:
        """Return the cross-entropies of the branches and, in training, `diversity`; `targets` [B] int64."""
        terms = super().losses(output, targets, label_smoothing=label_smoothing)
        if output.extras is not None:
            terms["diversity"] = output.extras["channel_overlap"].mean()
        return terms
