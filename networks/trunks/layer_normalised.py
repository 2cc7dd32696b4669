"""ConvNeXts and Swin Transformers, whose last map may be negative: what is seen is a ReLU of the normalised one.

Liu, Mao, Wu, Feichtenhofer, Darrell & Xie, "A ConvNet for the 2020s", CVPR 2022; Liu, Lin, Cao, Hu, Wei, Zhang, Lin &
Guo, "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", ICCV 2021, and "Swin Transformer V2",
CVPR 2022. The normalisation is the networks' own before their classifier, there of the averaged map with ConvNeXt. The
ReLU, ours, makes class activation maps and boxes of it as of a ResNet's; the maps of earlier stages stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from networks.trunks.family import Family, Maps, run_stage


class ConvNeXts(Family):
    names = ("convnext_tiny", "convnext_small", "convnext_base", "convnext_large")
    classifier = "classifier.2."
    batch_norm = False
    last_stride = False

    @staticmethod
    def stages(trunk: nn.Module) -> list[nn.Sequential]:
        return list(trunk.features[1::2])  # before each: the stem, or what halves the map

    @staticmethod
    def channels(trunk: nn.Module) -> dict[str, int]:
        _, second, third, last = (stage[0].block[0].in_channels for stage in ConvNeXts.stages(trunk))
        return {"stage2": second, "stage3": third, "final": last}

    @staticmethod
    def remove_classifier(trunk: nn.Module) -> None:
        trunk.classifier = nn.Sequential(trunk.classifier[0])  # the normalisation

    @staticmethod
    def begin(trunk: nn.Module, images: Tensor, *, frozen: bool, split: bool, until: str) -> Maps:
        return Maps(*_begin(trunk.features, images, until))

    @staticmethod
    def finish(trunk: nn.Module, stage3: Tensor, *, frozen: bool, dense: bool, split: bool) -> Maps:
        return _finish(trunk.features, stage3, trunk.classifier[0])


class Swins(Family):
    names = ("swin_t", "swin_s", "swin_b", "swin_v2_t", "swin_v2_s", "swin_v2_b")
    classifier = "head."
    batch_norm = False
    last_stride = False

    @staticmethod
    def stages(trunk: nn.Module) -> list[nn.Sequential]:
        return list(trunk.features[1::2])

    @staticmethod
    def channels(trunk: nn.Module) -> dict[str, int]:
        _, second, third, last = (stage[0].norm1.normalized_shape[0] for stage in Swins.stages(trunk))
        return {"stage2": second, "stage3": third, "final": last}

    @staticmethod
    def remove_classifier(trunk: nn.Module) -> None:
        trunk.head = nn.Identity()

    @staticmethod
    def begin(trunk: nn.Module, images: Tensor, *, frozen: bool, split: bool, until: str) -> Maps:
        return Maps(*map(trunk.permute, _begin(trunk.features, images, until)))

    @staticmethod
    def finish(trunk: nn.Module, stage3: Tensor, *, frozen: bool, dense: bool, split: bool) -> Maps:
        channels_last = stage3.permute(0, 2, 3, 1)  # as its stages have it
        return _finish(trunk.features, channels_last, lambda x: trunk.permute(trunk.norm(x)))


def _begin(features: nn.Sequential, images: Tensor, until: str) -> list[Tensor]:
    """Run the second stage and, where `until` is not stage2, the third; their maps have the family's own layout."""
    stem, stage1, halve1, stage2, halve2, stage3, *_ = features
    second = stage2(halve1(stage1(stem(images))))
    return [second] if until == "stage2" else [second, stage3(halve2(second))]


def _finish(features: nn.Sequential, third: Tensor, normalise: Callable[[Tensor], Tensor]) -> Maps:
    """Run the last stage on a map in the family's own layout; `normalise` returns maps [B, C, h, w]."""
    *_, halve3, stage4 = features
    penultimate, final = (F.relu(normalise(x)) for x in run_stage(stage4, halve3(third)))
    return Maps(penultimate=penultimate, final=final)
