"""ResNets, and what torchvision builds of the same class: ResNeXts and Wide ResNets.

He, Zhang, Ren & Sun, "Deep Residual Learning for Image Recognition", CVPR 2016; Xie, Girshick, Dollar, Tu & He,
"Aggregated Residual Transformations for Deep Neural Networks", CVPR 2017; Zagoruyko & Komodakis, "Wide Residual
Networks", BMVC 2016.
"""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

from networks.trunks.convolution import convolve, rectified
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

    # Batch norms that are frozen or folded are computed inside the convolutions, without calling the blocks: hooks see
    # nothing. Nor are blocks called that are split.
    @staticmethod
    def begin(trunk: nn.Module, images: Tensor, *, frozen: bool, split: bool, until: str) -> Maps:
        x = trunk.maxpool(convolve(trunk.conv1, trunk.bn1, images, frozen=frozen, relu=True))
        stage1 = _stage(trunk.layer1, x, frozen=frozen).final
        stage2 = _stage(trunk.layer2, stage1, frozen=frozen).final
        if until == "stage2":
            return Maps(stage2)
        stage3 = _stage(trunk.layer3, stage2, frozen=frozen, split=split)
        return Maps(stage2, stage3.final, stage3_split=stage3.final_split)

    @staticmethod
    def finish(trunk: nn.Module, stage3: Tensor, *, frozen: bool, dense: bool, split: bool) -> Maps:
        return _stage(trunk.layer4, stage3, frozen=frozen, dense=dense, split=split, keep_penultimate=True)


def _stage(
    stage: nn.Sequential,
    x: Tensor,
    *,
    frozen: bool,
    dense: bool = False,
    split: bool = False,
    keep_penultimate: bool = False,
) -> Maps:
    """Run a stage; return its `final` map, that one's split if asked for, and the `penultimate` one if it is kept."""
    dilation, of_last, penultimate = 1 if dense else None, None, None
    last = len(stage) - 1
    for index, block in enumerate(stage):
        if index == last and keep_penultimate:
            penultimate = x
        is_split = split and index == last
        if frozen or dense or is_split or isinstance(block.bn1, nn.Identity):
            ours = index > 0 and x is not penultimate
            x, of_last, dilation = _block(block, x, dilation, frozen=frozen, split=is_split, overwrite=ours)
        else:
            x = block(x)
    return Maps(penultimate=penultimate, final=x, final_split=of_last)


def _block(
    block: nn.Module, x: Tensor, dilation: int | None, *, frozen: bool, split: bool, overwrite: bool
) -> tuple[Tensor, Split | None, int | None]:
    """Run a residual block; with a dilation, without its stride, and dilated by it after a stride.

    `overwrite`: nothing else needs x. Returned are the map, what is added up in it if that is to be `split`, and the
    dilation of the block that follows.
    """
    shortcut = x
    if block.downsample is not None:
        shortcut, overwrite = convolve(*block.downsample, x, dilation, frozen=frozen), True
    layers = [(block.conv1, block.bn1), (block.conv2, block.bn2)]
    if isinstance(block, Bottleneck):
        layers.append((block.conv3, block.bn3))
    for convolution, norm in layers[:-1]:
        x = convolve(convolution, norm, x, dilation, frozen=frozen, relu=True)
        dilation = _after(convolution, dilation)
    convolution, norm = layers[-1]
    after = _after(convolution, dilation)
    if split:
        residual = convolve(convolution, norm, x, dilation, frozen=frozen)
        return rectified(residual + shortcut), Split(residual, shortcut), after
    shared = {"frozen": frozen, "relu": True, "summand": shortcut, "overwrite_summand": overwrite}
    return convolve(convolution, norm, x, dilation, **shared), None, after


def _after(convolution: nn.Conv2d, dilation: int | None) -> int | None:
    """The dilation of what follows a convolution that was computed without its stride."""
    return None if dilation is None else dilation * convolution.stride[0]
