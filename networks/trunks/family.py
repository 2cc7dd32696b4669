"""What every family of trunks is: how one of torchvision's networks is cut into the maps that systems look at."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

from torch import Tensor, nn


class Split(NamedTuple):
    """What a residual block adds up before its ReLU, two maps [B, C, h, w]."""

    residual: Tensor
    shortcut: Tensor


class Maps(NamedTuple):
    """The maps of one pass over pictures of H x W pixels; `last_stride` 1 makes the last two twice as fine.

    A pass that ends earlier has None for those that come after, one that starts later for those before, and one that is
    not to split has none of the last two.
    """

    stage2: Tensor | None = None  # [B, C2, H/8, W/8]
    stage3: Tensor | None = None  # [B, C3, H/16, W/16]
    penultimate: Tensor | None = None  # [B, C, H/32, W/32] of the last stage's second-to-last block, if it has one
    final: Tensor | None = None  # [B, C, H/32, W/32], not negative
    stage3_split: Split | None = None  # of the block that makes stage3
    final_split: Split | None = None


class Traits(NamedTuple):
    """What a trunk has that systems and settings may need."""

    batch_norm: bool  # whose statistics can be frozen, or kept per pass
    first_conv: bool  # a 1x1 convolution at the start of its blocks, which can take their stride
    last_stride: bool  # that can be left out
    dense: bool  # maps of the last stage at every cell of the one before it
    penultimate: bool  # a second-to-last block in the last stage
    split: bool  # a residual and a shortcut whose sum each of the last two stages ends with


class Family:
    """A family's way with its networks: torchvision's modules stay as they are, so that weights keep their names.

    A class only: all of it is called with the network.
    """

    names: ClassVar[tuple[str, ...]]  # in torchvision.models
    classifier: ClassVar[str]  # how the names of its parameters begin
    # What they have, see `Traits`: known before one is built, as its weights may first have to be downloaded
    batch_norm: ClassVar[bool] = True
    last_stride: ClassVar[bool] = True
    dense: ClassVar[bool] = False
    split: ClassVar[bool] = False
    first_conv: ClassVar[tuple[str, ...]] = ()  # the names of those that have it
    one_block: ClassVar[tuple[str, ...]] = ()  # the names of those whose last stage has no second-to-last block

    @staticmethod
    def stages(trunk: nn.Module) -> list[nn.Sequential]:
        """Return the four stages, modules of blocks, with whatever comes between them left out."""
        raise NotImplementedError

    @staticmethod
    def channels(trunk: nn.Module) -> dict[str, int]:
        """Return the channels of the maps `stage2`, `stage3` and `final`. Called before the classifier is removed."""
        raise NotImplementedError

    @staticmethod
    def remove_classifier(trunk: nn.Module) -> None:
        raise NotImplementedError

    @staticmethod
    def begin(trunk: nn.Module, images: Tensor, *, frozen: bool, split: bool, until: str) -> Maps:
        """Map images [B, 3, H, W] to their `stage2` and, where `until` is not that, `stage3`, split as in `look`."""
        raise NotImplementedError

    @staticmethod
    def finish(trunk: nn.Module, stage3: Tensor, *, frozen: bool, dense: bool, split: bool) -> Maps:
        """Map a stage-3 map [B, C3, h, w] to those of the last stage, `penultimate` and `final`, split as in `look`."""
        raise NotImplementedError

    @classmethod
    def look(cls, trunk: nn.Module, images: Tensor, *, frozen: bool, dense: bool, split: bool, until: str) -> Maps:
        """Map images [B, 3, H, W] to their maps up to the one called `until`, `stage2`, `stage3` or `final`.

        `frozen`: the batch norms use their running statistics. `dense` and `split` are for families that have them.
        """
        maps = cls.begin(trunk, images, frozen=frozen, split=split, until=until)
        if until != "final":
            return maps
        last = cls.finish(trunk, maps.stage3, frozen=frozen, dense=dense, split=split)
        return Maps(maps.stage2, maps.stage3, last.penultimate, last.final, maps.stage3_split, last.final_split)

    @classmethod
    def traits(cls, name: str) -> Traits:
        penultimate = name not in cls.one_block
        return Traits(cls.batch_norm, name in cls.first_conv, cls.last_stride, cls.dense, penultimate, cls.split)

    @classmethod
    def move_stride_to_first_conv(cls, trunk: nn.Module) -> None:
        """Put the strides of the stages on the 1x1 convolutions at their start, in place, where there are such."""
        raise NotImplementedError

    @classmethod
    def leave_out_last_stride(cls, trunk: nn.Module) -> None:
        """Let the last stage keep the resolution of the one before it, in place."""
        first_block = next(iter(cls.stages(trunk)[-1]))
        for module in first_block.modules():
            if isinstance(module, nn.Conv2d):
                module.stride = (1, 1)


def run_stage(stage: nn.Sequential, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return what comes into a stage's last block, and what goes out of it."""
    penultimate = x
    for block in stage:
        penultimate, x = x, block(x)
    return penultimate, x
