"""Several views of a picture for one prediction: its mirror image, and parts of it enlarged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.functional import five_crop

from networks.outputs import SEVERAL_PER_IMAGE, NetworkOutput, combine_logits
from utils.errors import UserError

VIEWS = ("mirror", "five_crops")
CROP = 7 / 8  # side of a crop as a share of the picture's


def look_at_views(network: nn.Module, views: Sequence[str]) -> int:
    """Let a system, from here on, classify by a picture and by views of it together; return how many there are.

    `mirror`: the picture and its mirror image. `five_crops`: the picture, its four corners and its middle, 7/8 of its
    side, enlarged to its size; with `mirror`, the mirror images of all six. They are looked at one after the other.
    A branch's logits become what the system's `ensembling` makes of all views: with `mean_probability` those of the
    mean probability, else the mean of logits, so that they do not grow with the number of views. Boxes and masks, and
    what is classified region by region, are those of the picture itself.

    Raises UserError for an unknown view.
    """
    for view in views:
        if view not in VIEWS:
            raise UserError(f"views has {view!r}; choose from {', '.join(VIEWS)}")
    network.register_forward_hook(_AddViews(tuple(views)), with_kwargs=True)
    return (6 if "five_crops" in views else 1) * (2 if "mirror" in views else 1)


def looks_at_other_view(network: nn.Module) -> bool:
    """Whether what a system is computing is another view than the picture itself."""
    return getattr(network, "_other_view", False)


def other_views(images: Tensor, views: Sequence[str]) -> Iterator[Tensor]:
    """Yield the views of images [B, 3, S, S], each of that shape, without the images themselves."""
    size = images.shape[-1]
    side = round(size * CROP)
    mirrored = "mirror" in views
    if mirrored:
        yield images.flip(-1)
    if "five_crops" in views:
        for crop in five_crop(images, [side, side]):
            view = F.interpolate(crop.float(), size=(size, size), mode="bilinear").to(images.dtype)
            yield view
            if mirrored:
                yield view.flip(-1)


class _AddViews:
    """A forward hook of a system."""

    def __init__(self, views: tuple[str, ...]) -> None:
        self.views = views

    def __call__(self, network: Any, arguments: tuple, call: dict[str, Any], output: NetworkOutput) -> NetworkOutput:
        images, *more = arguments
        call = {name: value for name, value in call.items() if name != "boxes"}  # those are in the picture itself
        rule = "mean_probability" if network.ensembling == "mean_probability" else "mean_logits"
        found = [output.logits]
        network._other_view = True
        try:
            with torch.no_grad():
                for view in other_views(images, self.views):
                    found.append(network.forward(view, *more, **call).logits)
        finally:
            network._other_view = False
        logits = {
            name: own
            if name in SEVERAL_PER_IMAGE
            else combine_logits(torch.stack([f[name].float() for f in found]), rule)
            for name, own in output.logits.items()
        }
        return output._replace(logits=logits)
