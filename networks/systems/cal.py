"""CAL: attention maps that have to be better than random (counterfactual) ones.

Rao, Chen, Lu & Zhou, "Counterfactual Attention Learning for Fine-Grained Visual Categorization and Re-identification",
ICCV 2021, on WS-DAN (Hu et al., "See Better Before Looking Closer", 2019). Logits, crops, drops and losses follow the
published code. Ours is that every image moves its class's centre: theirs loses all but the last of a class in a batch
(`lose_repeated_labels`), and keeps other centres in each process. It evaluates by picture and crop while training, as
here, and its final figures average the logits of eight views, `--views mirror three_crops`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from networks.attention_crops import attended_pixels, draw_maps, padded_boxes, uniform
from networks.attention_pooling import AttentionMaps, attention_pooling, counterfactual_attention
from networks.backbone import Backbone
from networks.centres import Centres
from networks.classifier import Classifier
from networks.crops import crop_objects, resize_images
from networks.outputs import NetworkOutput, combine_branches, combine_logits, requested_branches
from networks.shared import Shared
from networks.system import System
from utils.options import Count

SCALE = 100  # of the vectors of length 1 before the classifier
EFFECT = "_effect"  # what a view's attention adds to what random attention knows
# Shares of the attention's maximum, and margins in shares of the picture's side: paper's code, training and evaluation
CROP_ABOVE, CROP_PADDING, DROP_ABOVE = (0.4, 0.6), 0.1, (0.2, 0.5)
EVALUATED = ((0.1, 0.05),)
THREE_CROPS = (*EVALUATED, (0.2, 0.1), (0.3, 0.1))


@dataclass(frozen=True)
class Options:
    attention_maps: Count = 32  # how many there are; each is pooled by itself, and the classifier sees all
    lose_repeated_labels: bool = False  # as published: of a class's images in a batch only the last moves its centre


class CAL(System):
    """Branches `raw` and `crop`, in training also `drop` and `<branch>_effect`; the prediction is the mean of logits.

    The effect is what the logits have more than those of counterfactual attention: random maps, weighted by the same
    classifier.
    """

    Options = Options
    run_defaults = {
        "epochs": 160,
        "batch_size": 16,
        "learning_rate": 1e-3,
        "weight_decay": 1e-5,
        "schedule": "exponential",
        "decay_rate": math.sqrt(0.9),
        "brightness": 0.126,
        "contrast": 0.0,
        "saturation": 0.5,
        "resize_size": lambda shared: round(shared.side_of_images * 512 / 448),
        "ensembling": "mean_logits",
        "last_stride": lambda shared: 1 if shared.can_leave_out_last_stride else 2,
    }
    published_names = {
        "features.0.": "backbone.trunk.conv1.",
        "features.1.": "backbone.trunk.bn1.",
        **{f"features.{number + 3}.": f"backbone.trunk.layer{number}." for number in (1, 2, 3, 4)},
        "attentions.": "attention.",
        "fc.": "classifier.",
        "feature_center": "centres.vectors",
    }
    absent_when_published = ("centres.vectors",)  # its best checkpoint is without
    loss_descriptions = {"centre": "Distance of the features from the centre of their class."}
    warmup_branches = ()

    branches = ("raw", "crop", "drop", "raw_effect", "crop_effect", "drop_effect")
    evaluated = ("raw", "crop")
    prediction = evaluated
    own_views = ("three_crops",)
    crops = EVALUATED  # in evaluation: the share of the attention's maximum, and the margin, of each

    def __init__(self, backbone: Backbone, num_classes: int, options: Options, shared: Shared):
        super().__init__(backbone, options, shared)
        self.loss_weights = {**dict.fromkeys(self.branches, 1 / 3), "centre": 1.0}
        length = options.attention_maps * backbone.embedding_channels
        self.attention = AttentionMaps(backbone.embedding_channels, options.attention_maps)
        self.classifier = Classifier(length, num_classes, bias=False)
        self.centres = Centres(num_classes, length, last_only=options.lose_repeated_labels)

    def forward(
        self,
        images: Tensor,
        *,
        labels: Tensor | None = None,
        mask_background: bool = False,
        branches: tuple[str, ...] | None = None,
    ) -> NetworkOutput:
        """Map normalised images [B, 3, S, S], S >= input_size, to a `NetworkOutput`.

        Logits [B, classes] of the picture, of the crop round what one attention map sees (the mean of all in
        evaluation) and of the picture without what another one sees, the latter two in one pass. Only the passes that
        `branches` need are computed (None: all). CAL has no mask: `mask_background` changes nothing.
        """
        wanted = requested_branches(branches, self.branches if self.training else self.evaluated)
        pictures = resize_images(images, self.input_size)
        final = self.backbone(pictures).final
        attention = self.attention(final)  # [B, M, g, g]
        features = attention_pooling(final, attention)
        logits = self._classify(["raw"], wanted, final, attention, features)
        extras = {"features": features} if self.training else None
        views = [view for view in ("crop", "drop") if wanted & {view, view + EFFECT}]
        if not views:
            return NetworkOutput(logits, extras=extras)

        boxes, dropped = self._look_again(attention)
        if not self.training and len(self.crops) > 1:
            return NetworkOutput({**logits, "crop": self._classify_crops(images, attention)}, boxes)
        shown = {}
        if "crop" in views:
            crops = crop_objects(images, boxes, input_size=self.input_size)
            shown["crop"] = resize_images(crops, self.input_size)
        if "drop" in views:
            shown["drop"] = pictures * ~dropped[:, None]
        final = self.backbone(torch.cat(list(shown.values())), kind="object").final
        attention = self.attention(final)
        logits.update(self._classify(views, wanted, final, attention, attention_pooling(final, attention)))
        return NetworkOutput(logits, boxes, extras=extras)

    def _look_again(self, attention: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is cut out, [B, 4] in input_size pixels, and what is dropped, [B, input_size, input_size] bool.

        `attention` [B, M, g, g]: two maps are drawn for each image; in evaluation it is the mean of all.
        """
        B, size, device = attention.shape[0], self.input_size, attention.device
        if not self.training:
            above, padding = self.crops[0]
            pixels = attended_pixels(attention.mean(dim=1), above, size)
            return padded_boxes(pixels, padding), pixels
        to_crop, to_drop = draw_maps(attention, 2).unbind(dim=1)
        cropped = attended_pixels(to_crop, uniform(B, *CROP_ABOVE, device), size)
        dropped = attended_pixels(to_drop, uniform(B, *DROP_ABOVE, device), size)
        return padded_boxes(cropped, CROP_PADDING), dropped

    def _classify_crops(self, images: Tensor, attention: Tensor) -> Tensor:
        """Return the logits [B, classes] that the crops of all sizes have together, each seen in a pass of its own."""
        found = []
        for above, padding in self.crops:
            boxes = padded_boxes(attended_pixels(attention.mean(dim=1), above, self.input_size), padding)
            crops = resize_images(crop_objects(images, boxes, input_size=self.input_size), self.input_size)
            final = self.backbone(crops, kind="object").final
            found.append(self.classifier(SCALE * attention_pooling(final, self.attention(final))).float())
        return combine_logits(torch.stack(found), self._rule)

    @property
    def _rule(self) -> str:
        """How the logits of several crops are combined: not to their sum, which would grow with their number."""
        return "mean_logits" if self.ensembling == "sum_logits" else self.ensembling

    def use_own_view(self, view: str) -> int:
        """Crop three times as published, the crops each as much of the prediction as the picture."""
        self.crops = THREE_CROPS
        return sum(map(self._times, self.prediction))

    def predict_logits(self, output: NetworkOutput) -> Tensor:
        """Return the prediction [B, classes]; each crop counts as much as the picture, unless weights are learnt."""
        if self.ensembling == "learned":  # of the crops together
            return super().predict_logits(output)
        names = tuple(name for name in self.prediction for _ in range(self._times(name)))
        return combine_branches(output, names, self._rule if len(self.crops) > 1 else self.ensembling)

    def branch_weights(self) -> Tensor | None:
        if self.ensembling == "learned":
            return super().branch_weights()
        return torch.tensor([self._times(name) for name in self.prediction], device=self.classifier.weight.device)

    def _times(self, branch: str) -> int:
        """How often the prediction counts a branch."""
        return len(self.crops) if branch == "crop" else 1

    def _classify(
        self, views: list[str], wanted: set[str], final: Tensor, attention: Tensor, features: Tensor
    ) -> dict[str, Tensor]:
        """Return the logits [B, classes] of views that lie one after the other in a pass, and their effects."""
        logits = self.classifier(SCALE * features)
        found = dict(zip(views, logits.unflatten(0, (len(views), -1)), strict=True))
        if any(view + EFFECT in wanted for view in views):
            without = attention_pooling(final, counterfactual_attention(attention, random=self.training))
            effects = (logits - self.classifier(SCALE * without)).unflatten(0, (len(views), -1))
            found.update({view + EFFECT: effect for view, effect in zip(views, effects, strict=True)})
        return {name: value for name, value in found.items() if name in wanted}

    def losses(self, output: NetworkOutput, targets: Tensor, *, label_smoothing: float = 0.0) -> dict[str, Tensor]:
        """Cross-entropy of every branch; in training `centre`, the mean squared distance from the classes' centres.

        Extras: `features` [B, D] of the pictures, of length 1.
        """
        terms = super().losses(output, targets, label_smoothing=label_smoothing)
        if output.extras is not None:
            terms["centre"] = self.centres.distances(output.extras["features"], targets).mean()
        return terms

    def after_step(self, output: NetworkOutput, targets: Tensor) -> None:
        """Move the centres, once they have served the loss."""
        if output.extras is not None:
            self.centres.move(output.extras["features"], targets)

    def heads(self) -> list[nn.Module]:
        return [self.attention, self.classifier]
