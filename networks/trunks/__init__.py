"""The trunks of systems: torchvision's classification networks, cut into maps; a file for every family."""

from __future__ import annotations

from networks.trunks.family import Family, Maps, Split, Traits
from networks.trunks.layer_normalised import ConvNeXts, Swins
from networks.trunks.regnet import RegNets
from networks.trunks.resnet import ResNets
from utils.options import SettingsError, require, shown

__all__ = ("BACKBONES", "Family", "Maps", "Split", "Traits", "check_trunk", "family_of", "traits_of")

FAMILIES: tuple[type[Family], ...] = (ResNets, RegNets, ConvNeXts, Swins)
BACKBONES = tuple(name for family in FAMILIES for name in family.names)
LAST_STRIDES = (1, 2)


def family_of(name: str) -> type[Family]:
    """Return the family of a backbone. Raises SettingsError for an unknown one."""
    for family in FAMILIES:
        if name in family.names:
            return family
    raise SettingsError(f"unknown backbone {shown(name[:60])}; choose one of {', '.join(BACKBONES)}")


def traits_of(name: str) -> Traits:
    """Return what a backbone has. Raises SettingsError for an unknown one."""
    return family_of(name).traits(name)


def check_trunk(name: str, *, stride_on_first_conv: bool, batch_norm: str, last_stride: int) -> None:
    """Raise SettingsError where a backbone is unknown or lacks what settings ask for."""
    traits = traits_of(name)
    require(
        traits.first_conv or not stride_on_first_conv,
        "stride_on_first_conv",
        stride_on_first_conv,
        f"False for {name}, which has no 1x1 convolution to put it on; ResNets from resnet50 up have",
    )
    require(
        traits.batch_norm or batch_norm == "shared",
        "batch_norm",
        batch_norm,
        f"'shared' for {name}, which has no batch norms",
    )
    require(last_stride in LAST_STRIDES, "last_stride", last_stride, "1 or 2")
    require(
        traits.last_stride or last_stride == 2,
        "last_stride",
        last_stride,
        f"2 for {name}, which cannot leave it out; ResNets and RegNets can",
    )
