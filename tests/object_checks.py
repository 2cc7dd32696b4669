"""What holds for systems that cut the object out of the picture by an activation map: checks of a `Variant`.

Their trunk is a scripted one, so that a test decides where the object is.
"""

from __future__ import annotations

from typing import NamedTuple

import reference
import torch
import torch.nn.functional as F
from small_systems import SIZE, Look, Variant, make_images, run
from system_checks import assert_contract
from torch import Tensor, nn

from networks.outputs import NetworkOutput
from networks.system import System

# ---- maps without an object ---------------------------------------------------------------------------------------


def disjoint(bright: Tensor) -> tuple[Tensor, Tensor]:
    """Two maps whose parts above the mean have no cell in common."""
    _, _, rows, columns = bright.shape
    left = (torch.arange(columns) < columns // 2).float().expand(rows, columns)
    return bright * 0 + left, bright * 0 + 1 - left


def constant(value: float) -> Look:
    return lambda bright: (torch.full_like(bright, value), torch.full_like(bright, value))


def half_constant(value: float) -> Look:
    """Only the last map is constant: nothing stands out of it, whatever the map before it shows."""
    return lambda bright: (disjoint(bright)[0], torch.full_like(bright, value))


ODD_MAPS = {
    "zero": constant(0.0),
    "constant": constant(1.0),
    "constant that is no binary fraction": constant(0.1),
    "negative constant": constant(-3.7),
    "large constant": constant(1e6),
    "disjoint": disjoint,
    "zero last map": half_constant(0.0),
}


@torch.no_grad()
def maps_without_an_object_give_the_whole_image(variant: Variant, maps: str) -> None:
    for input_size in (96, 224):
        network = variant.build_scripted(ODD_MAPS[maps], input_size=input_size).eval()
        if getattr(network, "fusion", None) is not None:
            # what random attention adds is not constant, and is not what is tested here
            for attention in (network.fusion.stage3, network.fusion.stage2):
                nn.init.zeros_(attention.out.weight)
        for mask_background in (False, True):
            output = network(make_images(input_size), mask_background=mask_background)
            assert_contract(output, network, batch=2)
            assert output.object_boxes.tolist() == [[0, 0, input_size - 1, input_size - 1]] * 2
            if output.object_masks is not None:
                assert output.object_masks.all()


# ---- crops --------------------------------------------------------------------------------------------------------


def no_gradient_flows_through_the_crops(variant: Variant) -> None:
    """The images of the object and window passes are given, not made: they carry no graph."""
    network = variant.build_scripted().train()
    output, given = run(network, make_images())
    assert len(given) > 1
    assert not any(images.requires_grad for images in given)
    assert not any(boxes.requires_grad for boxes in output[1:5] if boxes is not None)
    assert all(logits.requires_grad for logits in output.logits.values())


def object_picture(cells: Tensor, image_size: int) -> Tensor:
    """`[1, 3, S, S]`: bright where the bool `[g, g]` cells are, nowhere zero."""
    picture = F.interpolate(cells[None, None].float(), size=(image_size, image_size), mode="nearest")
    return 5 + 3 * picture.expand(-1, 3, -1, -1)


def _checker(size: int) -> Tensor:
    """`[1, 1, S, S]`: +1 and -1 from pixel to pixel, which halving the size wipes out."""
    position = torch.arange(size)
    return (1.0 - 2 * ((position[:, None] + position[None, :]) % 2))[None, None]


def _sees_brightness(variant: Variant, **settings: object) -> System:
    return variant.build_scripted(lambda bright: (bright, 100 * bright), **settings).eval()


@torch.no_grad()
def crops_of_larger_images_have_more_detail(variant: Variant) -> None:
    network = _sees_brightness(variant)
    cells = torch.zeros(4, 4, dtype=torch.bool)
    cells[1:3, 1:3] = True
    plain = object_picture(cells, 2 * SIZE)
    detailed = plain + _checker(2 * SIZE)

    def detail_by_pass(shrink: bool) -> list[float]:
        """How far the fine pattern changes what the backbone is given in each pass, away from the border."""
        given = []
        for images in (plain, detailed):
            if shrink:
                images = F.interpolate(images, size=(SIZE, SIZE), mode="bilinear", antialias=True)
            output, passes = run(network, images)
            assert output.object_boxes.tolist() == [[31, 31, 95, 95]]
            given.append(passes)
        return [
            (with_detail - without)[..., 4:-4, 4:-4].std().item() for without, with_detail in zip(*given, strict=True)
        ]

    from_large, from_small = detail_by_pass(shrink=False), detail_by_pass(shrink=True)
    assert len(from_large) > 1
    assert max(from_small) < 1e-4
    assert from_large[0] < 1e-4
    assert min(from_large[1:]) > 0.02


# ---- the mask -----------------------------------------------------------------------------------------------------


class Cut(NamedTuple):
    """An object in the form of a diamond, whose box has background in its corners, cut out of a picture."""

    images: Tensor  # [1, 3, factor * 224, factor * 224]
    cells: Tensor  # [7, 7] bool
    output: NetworkOutput
    plain: list[Tensor]  # what the backbone was given in each pass
    masked: list[Tensor]  # likewise with the background masked


@torch.no_grad()
def object_is_cut_out(variant: Variant, factor: int) -> Cut:
    """From a picture `factor` times as large as what the backbone sees; with 7 x 7 cells."""
    network = _sees_brightness(variant, input_size=224)
    row, column = torch.meshgrid(torch.arange(7), torch.arange(7), indexing="ij")
    cells = (row - 3).abs() + (column - 2).abs() <= 2
    images = object_picture(cells, factor * 224) + 0.1 * make_images(factor * 224, batch=1).clamp(-9, 9)
    output, plain = run(network, images)
    _, masked = run(network, images, mask_background=True)
    assert output.object_boxes.tolist() == [[0, 31, 159, 191]]
    assert torch.equal(plain[0], masked[0])
    expected = cut(images[0], output.object_boxes[0].tolist(), factor, 224)
    torch.testing.assert_close(plain[1][0], expected, rtol=1e-4, atol=1e-3)
    return Cut(images, cells, output, plain, masked)


@torch.no_grad()
def background_is_blanked_outside_the_mask(variant: Variant, factor: int) -> None:
    images, cells, output, plain, masked = object_is_cut_out(variant, factor)
    mask = reference.adaptive_mask(cells.numpy(), (0, 1, 5, 6))
    assert output.object_masks[0].tolist() == mask.tolist()
    kept = F.interpolate(torch.from_numpy(mask)[None, None].float(), size=images.shape[2:], mode="nearest")[0]
    kept = cut(kept, output.object_boxes[0].tolist(), factor, 224)
    # A pixel beside the edge may take a hair of its neighbour, as coordinates are rounded: look one further in.
    outside = (F.max_pool2d(kept, 3, stride=1, padding=1) == 0).expand(3, -1, -1)
    inside = (-F.max_pool2d(-kept, 3, stride=1, padding=1) == 1).expand(3, -1, -1)
    assert outside.float().mean() > 0.1
    assert inside.float().mean() > 0.5
    assert (masked[1][0][outside] == 0).all()
    torch.testing.assert_close(masked[1][0][inside], plain[1][0][inside], rtol=1e-3, atol=1e-3)
    assert (plain[1] != 0).all()


def cut(image: Tensor, box: list[float], factor: int, size: int) -> Tensor:
    """One inclusive box in small pixels, cut out of a `[C, H, W]` image `factor` times as large: `[C, size, size]`."""
    crop = reference.crop_and_resize(image, enlarged(box, factor), image.shape[-1])
    return F.interpolate(crop[None], size=(size, size), mode="bilinear", antialias=factor > 1)[0]


def enlarged(box: list[float] | tuple[float, ...], factor: int) -> tuple[int, int, int, int]:
    """The same inclusive box in pixels of an image `factor` times as large."""
    x0, y0, x1, y1 = (int(value) for value in box)
    return factor * x0, factor * y0, factor * (x1 + 1) - 1, factor * (y1 + 1) - 1
