"""Several views of a picture for one prediction: its mirror image, and parts of it enlarged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.functional import five_crop

from networks.outputs import NetworkOutput, combine_logits
from networks.system import System
from utils.errors import UserError

VIEWS = ("mirror", "five_crops", "three_crops")
OF_EVERY_SYSTEM = VIEWS[:2]
CROP = 7 / 8  # side of a crop as a share of the picture's, where nothing lies round the picture


def add_views(network: System, views: Sequence[str], *, corners: bool = False) -> int:
    """Let a system, from here on, classify by a picture and by views of it together; return how many there are.

    `mirror`: the picture and its mirror image. `five_crops`: the picture and the corners of what it was cut out of,
    where images come with these (`utils.data.cropping.with_corners`); else its four corners and its middle, 7/8 of its
    side, enlarged to its size. With `mirror`, the mirror images of all of them, too. They are looked at one after the
    other. `three_crops`: a system that crops by its attention does so three times (`System.own_views`).

    A branch's logits become what the system's `ensembling` makes of all views: with `mean_probability` those of the
    mean probability, else the mean of logits, so that they do not grow with the number of views. Boxes and masks, and
    what is classified region by region, are those of the picture itself.

    `corners`: whether the images come with theirs. Raises UserError for a view that the system does not have.
    """
    choices = (*OF_EVERY_SYSTEM, *network.own_views)
    for view in views:
        if view not in choices:
            raise UserError(f"views has {view!r}; choose from {', '.join(choices)}")
    passes = 1
    for view in network.own_views:
        if view in views:
            passes = network.use_own_view(view)
    hook = _AddViews(tuple(views))
    network.register_forward_pre_hook(hook.take_apart)
    network.register_forward_hook(hook, with_kwargs=True)
    of_crops = 1 if "five_crops" not in views else 5 if corners else 6
    return passes * of_crops * (2 if "mirror" in views else 1)


def looks_at_other_view(network: nn.Module) -> bool:
    """Whether what a system is computing is another view than the picture itself."""
    return getattr(network, "_other_view", False)


def other_views(images: Tensor, views: Sequence[str], corners: Sequence[Tensor] = ()) -> Iterator[Tensor]:
    """Yield the views of images [B, 3, S, S], each of that shape, without the images themselves.

    `corners`: those of what the images were cut out of, each of their shape.
    """
    size = images.shape[-1]
    side = round(size * CROP)
    mirrored = "mirror" in views
    if mirrored:
        yield images.flip(-1)
    if "five_crops" in views:
        for crop in corners or five_crop(images, [side, side]):
            fits = crop.shape[-1] == size
            view = crop if fits else F.interpolate(crop.float(), size=(size, size), mode="bilinear").to(images.dtype)
            yield view
            if mirrored:
                yield view.flip(-1)


class _AddViews:
    """A forward hook of a system."""

    def __init__(self, views: tuple[str, ...]) -> None:
        self.views = views
        self.corners: Sequence[Tensor] = ()

    def take_apart(self, network: Any, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Keep the corners for later: the system sees the pictures."""
        images, *more = arguments
        picture, *self.corners = images.split(images.shape[-1], dim=-2)
        return picture, *more

    def __call__(self, network: Any, arguments: tuple, call: dict[str, Any], output: NetworkOutput) -> NetworkOutput:
        images, *more = arguments
        call = {name: value for name, value in call.items() if name != "boxes"}  # those are in the picture itself
        rule = "mean_probability" if network.ensembling == "mean_probability" else "mean_logits"
        found = [output.logits]
        network._other_view = True
        try:
            with torch.no_grad():
                for view in other_views(images, self.views, self.corners):
                    found.append(network.forward(view, *more, **call).logits)
        finally:
            network._other_view = False
            self.corners = ()
        logits = {
            name: own
            if own.ndim == 3  # region by region
            else combine_logits(torch.stack([f[name].float() for f in found]), rule)
            for name, own in output.logits.items()
        }
        return output._replace(logits=logits)
