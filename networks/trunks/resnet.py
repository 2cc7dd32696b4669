"""ResNets, and what torchvision builds of the same class: ResNeXts and Wide ResNets.

He, Zhang, Ren & Sun, "Deep Residual Learning for Image Recognition", CVPR 2016; Xie, Girshick, Dollar, Tu & He,
"Aggregated Residual Transformations for Deep Neural Networks", CVPR 2017; Zagoruyko & Komodakis, "Wide Residual
Networks", BMVC 2016.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

from networks.trunks.family import Family, Maps, Split


class ResNets(Family):
    names = (
        *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
        *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2"),
    )
    classifier = "fc."
    dense = True
    split = True
    first_conv = tuple(name for name in names if name not in ("resnet18", "resnet34"))

    @staticmethod
    def stages(trunk: nn.Module) -> list[nn.Sequential]:
        return [trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4]

    @staticmethod
    def channels(trunk: nn.Module) -> dict[str, int]:
        return {
            "stage2": trunk.layer3[0].conv1.in_channels,
            "stage3": trunk.layer4[0].conv1.in_channels,
            "final": trunk.fc.in_features,
        }

    @staticmethod
    def remove_classifier(trunk: nn.Module) -> None:
        trunk.fc = nn.Identity()

    @classmethod
    def move_stride_to_first_conv(cls, trunk: nn.Module) -> None:
        for stage in cls.stages(trunk)[1:]:
            stage[0].conv1.stride = (2, 2)
            stage[0].conv2.stride = (1, 1)

    # Frozen batch norms are computed inside the convolutions, without calling the blocks: hooks see nothing. Nor are
    # blocks called that are split.
    @staticmethod
    def begin(trunk: nn.Module, images: Tensor, *, frozen: bool, split: bool, until: str) -> Maps:
        x = trunk.maxpool(F.relu(_convolve(trunk.conv1, trunk.bn1, images, frozen=frozen), inplace=True))
        _, stage1, _ = _stage(trunk.layer1, x, frozen=frozen)
        _, stage2, _ = _stage(trunk.layer2, stage1, frozen=frozen)
        if until == "stage2":
            return Maps(stage2)
        _, stage3, stage3_split = _stage(trunk.layer3, stage2, frozen=frozen, split=split)
        return Maps(stage2, stage3, stage3_split=stage3_split)

    @staticmethod
    def finish(trunk: nn.Module, stage3: Tensor, *, frozen: bool, dense: bool, split: bool) -> Maps:
        penultimate, final, final_split = _stage(trunk.layer4, stage3, frozen=frozen, dense=dense, split=split)
        return Maps(penultimate=penultimate, final=final, final_split=final_split)


def _stage(
    stage: nn.Sequential, x: Tensor, *, frozen: bool, dense: bool = False, split: bool = False
) -> tuple[Tensor, Tensor, Split | None]:
    """Run a stage and return the output of its second-to-last and of its last residual block, and that one's split."""
    dilation, of_last = 1 if dense else None, None
    for index, block in enumerate(stage):
        penultimate, is_split = x, split and index == len(stage) - 1
        if frozen or dense or is_split:
            summands, dilation = _summands(block, x, dilation, frozen=frozen)
            x = F.relu(summands.residual + summands.shortcut, inplace=True)
            of_last = summands if is_split else None
        else:
            x = block(x)
    return penultimate, x, of_last


def _summands(block: nn.Module, x: Tensor, dilation: int | None, *, frozen: bool) -> tuple[Split, int | None]:
    """Run a residual block up to its sum; with a dilation, without its stride, and dilated by it after a stride.

    Returned are what is added, and the dilation of the block that follows.
    """
    shortcut = x
    if block.downsample is not None:
        shortcut = _convolve(*block.downsample, x, dilation, frozen=frozen)
    layers = [(block.conv1, block.bn1), (block.conv2, block.bn2)]
    if isinstance(block, Bottleneck):
        layers.append((block.conv3, block.bn3))
    for index, (convolution, norm) in enumerate(layers):
        if index:
            x = F.relu(x, inplace=True)
        x = _convolve(convolution, norm, x, dilation, frozen=frozen)
        if dilation is not None:
            dilation *= convolution.stride[0]
    return Split(x, shortcut), dilation


def _convolve(
    convolution: nn.Conv2d, norm: nn.Module, x: Tensor, dilation: int | None = None, *, frozen: bool
) -> Tensor:
    """Convolve and normalise; with a dilation, without the convolution's stride and dilated by it.

    Frozen batch norms only scale and shift, so the weights can be scaled instead of the maps: backward then needs no
    copy of the map between the two, nearly half of what a trunk in training keeps.
    """
    weight, bias = convolution.weight, convolution.bias
    folded = frozen and isinstance(norm, nn.BatchNorm2d)  # in copies for inference it is the identity already
    if folded:
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        weight, bias = weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale
    if dilation is None:
        x = F.conv2d(x, weight, bias, convolution.stride, convolution.padding, groups=convolution.groups)
    else:
        padding = dilation * (convolution.kernel_size[0] // 2)
        x = F.conv2d(x, weight, bias, padding=padding, dilation=dilation, groups=convolution.groups)
    return x if folded else norm(x)
