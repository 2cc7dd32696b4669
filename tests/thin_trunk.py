"""Thin trunks, one of every family, for tests of whole runs and systems: nothing they look at depends on millions of
weights.
"""

from __future__ import annotations

from collections.abc import Callable

import torchvision
from torch import nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.regnet import BlockParams, RegNet
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2

get_model = torchvision.models.get_model


class ThinResNet(ResNet):
    """A quarter as wide; blocks of bottlenecks an eighth. One block in all stages but the last, which has two."""

    def _make_layer(self, block: type[nn.Module], planes: int, *arguments: object, **options: object) -> nn.Module:
        planes //= 4 if block is BasicBlock else 8
        return super()._make_layer(block, planes, *arguments, **options)


def _resnet(block: type[nn.Module], blocks: list[int], **options: object) -> nn.Module:
    network = ThinResNet(block, blocks, **options)
    network.fc = nn.Linear(network.inplanes, network.fc.out_features)
    return network


def _regnet() -> nn.Module:
    sizes = {"depths": [1, 1, 1, 2], "widths": [16, 24, 32, 48], "group_widths": [8] * 4, "strides": [2] * 4}
    return RegNet(BlockParams(**sizes, bottleneck_multipliers=[1.0] * 4, se_ratio=0.25))


def _convnext() -> nn.Module:
    stages = [CNBlockConfig(8, 16, 1), CNBlockConfig(16, 24, 1), CNBlockConfig(24, 32, 1), CNBlockConfig(32, None, 2)]
    return ConvNeXt(stages, stochastic_depth_prob=0.1, layer_scale=0.5)  # not 1e-6: a new block does something


def _swin(**options: object) -> nn.Module:
    return SwinTransformer([4, 4], 8, [1, 1, 1, 2], [1, 1, 2, 2], [4, 4], stochastic_depth_prob=0.1, **options)


THIN: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: _resnet(BasicBlock, [1, 1, 1, 2]),
    "resnext50_32x4d": lambda: _resnet(Bottleneck, [1, 1, 1, 2], groups=4, width_per_group=32),
    "wide_resnet50_2": lambda: _resnet(Bottleneck, [1, 1, 1, 2], width_per_group=128),
    "regnet_y_400mf": _regnet,
    "convnext_tiny": _convnext,
    "swin_t": _swin,
    "swin_v2_t": lambda: _swin(block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2),
}


def get_thin_model(name: str, **options: object) -> nn.Module:
    return THIN[name]() if name in THIN else get_model(name, **options)


def install() -> None:
    """Let these names be thin ones in this process from here on."""
    torchvision.models.get_model = get_thin_model
