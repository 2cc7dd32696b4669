"""A ResNet-18 a quarter as wide, for tests of whole runs: nothing they look at depends on eleven million weights."""

from __future__ import annotations

import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

get_model = torchvision.models.get_model


class ThinResNet(ResNet):
    def _make_layer(self, block: type[BasicBlock], planes: int, *arguments: object, **options: object) -> nn.Module:
        return super()._make_layer(block, planes // 4, *arguments, **options)


def get_thin_model(name: str, **options: object) -> nn.Module:
    if name != "resnet18":
        return get_model(name, **options)
    network = ThinResNet(BasicBlock, [2, 2, 2, 2])
    network.fc = nn.Linear(network.fc.in_features // 4, network.fc.out_features)
    return network


def install() -> None:
    """Let `resnet18` be the thin one in this process from here on."""
    torchvision.models.get_model = get_thin_model
