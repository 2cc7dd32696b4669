"""DFL-CNN: a bank of filters, some for each class, looks for the patch of the picture that each responds to most.

Wang, Morariu & Davis, "Learning a Discriminative Filter Bank within a CNN for Fine-grained Recognition", CVPR 2018.
The authors published no code. Logits and losses follow two public reimplementations (songdejia/DFL-CNN, and
Ien001/non-random-initialization-for-DFL-CNN for ResNet-50). Neither starts the filters as the paper does; ours do,
which is a reading of what the paper says of it. Both overwrite the scale and shift of all pretrained batch norms with
random ones by mistake, which `norm_start` repeats if asked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from networks.backbone import DENSE_STRIDE, Backbone
from networks.classifier import Classifier
from networks.crops import resize_images
from networks.filter_bank import FilterBank, copy_from_first_process, find_peaks, gather_rows
from networks.outputs import NetworkOutput, requested_branches
from networks.shared import Shared
from networks.system import System
from utils.options import Count

WEIGHTS = {"global": 1.0, "parts": 1.0, "side": 0.1}  # of the losses, and of the logits in the prediction
PATCH = 5  # cells along a side of the patch that is drawn for a filter


@dataclass(frozen=True)
class Options:
    filters_per_class: Count = 10  # of the bank; fewer where there are many hundred classes
    filter_start: Literal["k_means", "random"] | None = None  # None: k_means on pretrained weights, else random
    peaks_per_picture: Count = 10  # filter_start=k_means: how many vectors of a training picture are clustered
    norm_start: Literal["pretrained", "random"] = "pretrained"  # random: all batch norms are, as in the public code

    def completed(self, shared: Shared) -> Options:
        start = self.filter_start or ("k_means" if shared.has_pretrained_weights else "random")
        return dataclasses.replace(self, filter_start=start)


class DFLCNN(System):
    """Branches `global`, `parts` and `side`, from one pass; the prediction is the weighted sum of their logits."""

    Options = Options
    run_defaults = {
        "epochs": 120,
        "batch_size": 56,
        "learning_rate": 0.1,
        "weight_decay": 5e-6,
        "schedule": "exponential",
        "decay_rate": 0.9**0.1,  # published: times 0.9 after every 10 epochs
        "keep_aspect_ratio": True,
        "flip": 0.3,
        "brightness": 0.0,
        "contrast": 0.0,
        "ensembling": "sum_logits",
    }
    published_names = {
        **{f"conv1_conv4.{n}.": f"backbone.trunk.{name}." for n, name in ((0, "conv1"), (1, "bn1"))},
        **{f"conv1_conv4.{n}.": f"backbone.trunk.layer{n - 3}." for n in (4, 5, 6)},
        "conv5.0.": "backbone.trunk.layer4.",
        "conv6.": "bank.filters.",
        "cls5.": "cell_classifier.",
        "cls6.0.": "part_classifier.",
    }
    warmup_branches = ()

    branches = ("global", "parts", "side")
    evaluated = branches
    prediction = branches
    loss_weights = WEIGHTS

    def __init__(self, backbone: Backbone, num_classes: int, options: Options, shared: Shared):
        super().__init__(backbone, options, shared)
        filters = num_classes * options.filters_per_class
        self.cell_classifier = nn.Sequential(
            nn.Conv2d(backbone.embedding_channels, num_classes, 1), nn.BatchNorm2d(num_classes), nn.ReLU()
        )
        self.bank = FilterBank(backbone.channels["stage3"], num_classes, options.filters_per_class)
        self.part_classifier = Classifier(filters, num_classes)
        if options.norm_start == "random":
            for module in self.modules():
                if hasattr(module, "running_mean"):
                    nn.init.normal_(module.weight, 1.0, 0.02)
                    nn.init.zeros_(module.bias)

    def forward(
        self,
        images: Tensor,
        *,
        labels: Tensor | None = None,
        mask_background: bool = False,
        branches: tuple[str, ...] | None = None,
    ) -> NetworkOutput:
        """Map normalised images [B, 3, S, S], S >= input_size, to logits [B, classes] of each branch.

        `global` classifies every cell of the last map. The filters of the bank look at the map before it: `side` is how
        strongly those of each class respond where they do most, `parts` what a classifier makes of all of them.
        `part_boxes` [B, filters_per_class, 4] are the patches of the class that `side` chooses, those of the
        strongest responses first. DFL-CNN has no mask: `mask_background` changes nothing.
        """
        wanted = requested_branches(branches, self.branches)
        features = self.backbone(resize_images(images, self.input_size))
        logits = {}
        if "global" in wanted:
            cells = self.cell_classifier(features.final)
            logits["global"] = cells.mean(dim=(2, 3), dtype=torch.promote_types(cells.dtype, torch.float32))
        if wanted <= {"global"}:
            return NetworkOutput(logits)
        responses, cells = self.bank(features.stage3)
        side = self.bank.mean_by_class(responses)
        if "parts" in wanted:
            logits["parts"] = self.part_classifier(responses)
        if "side" in wanted:
            logits["side"] = side
        strengths, places = (self.bank.of_class(values, side.argmax(dim=1)) for values in (responses, cells))
        strongest_first = places.gather(1, strengths.argsort(dim=1, descending=True, stable=True))
        return NetworkOutput(logits, part_boxes=self._patches(strongest_first, features.stage3.shape[-1]))

    def _patches(self, cells: Tensor, columns: int) -> Tensor:
        """Return boxes [B, N, 4] of PATCH x PATCH cells around cells [B, N] of a map with so many columns."""
        x, y = (DENSE_STRIDE * (place - PATCH // 2) for place in (cells % columns, cells // columns))
        end = DENSE_STRIDE * PATCH - 1
        return torch.stack([x, y, x + end, y + end], dim=-1).float()

    def predict_logits(self, output: NetworkOutput) -> Tensor:
        """Return the prediction, [B, classes]; where logits are summed, those of `side` count a tenth."""
        if self.ensembling != "sum_logits" or len(self.prediction) == 1:
            return super().predict_logits(output)
        return sum(WEIGHTS[name] * output.logits[name].float() for name in self.prediction)

    def branch_weights(self) -> Tensor | None:
        if self.ensembling != "sum_logits" or len(self.prediction) == 1:
            return super().branch_weights()
        return torch.tensor([WEIGHTS[name] for name in self.prediction], device=self.bank.filters.weight.device)

    @torch.no_grad()
    def prepare(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Start the filters of each class from its training pictures: paper, section 3.3. The same in all processes."""
        if self.options.filter_start != "k_means":
            return
        mode, found, classes = self.training, [], []
        self.eval()
        for images, labels in batches:
            stage3 = self.backbone(resize_images(images, self.input_size)).stage3
            vectors, is_peak = find_peaks(stage3, self.options.peaks_per_picture)
            found.append(vectors[is_peak].cpu())
            classes.append(labels[:, None].expand_as(is_peak)[is_peak].cpu())
        self.train(mode)
        self.bank.start_from(gather_rows(torch.cat(found)), gather_rows(torch.cat(classes)))
        copy_from_first_process(self.bank)

    def heads(self) -> list[nn.Module]:
        return [self.cell_classifier, self.bank, self.part_classifier]
