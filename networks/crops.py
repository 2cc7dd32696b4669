"""Cutting boxes out of a batch of pictures and resizing them, in one call.

Boxes are `(x0, y0, x1, y1)` pixel corners whose ends belong to the box (see `networks.outputs.NetworkOutput`).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from networks.precision import without_autocast
from utils.errors import UserError


def crop_and_resize(images: Tensor, boxes: Tensor, size: int, *, outside: str = "border") -> Tensor:
    """Cut `boxes` out of `images` and resize every cut to size x size, bilinearly with aligned corners.

    Shapes: images [B, 3, H, W]; boxes [B, 4], giving [B, 3, size, size], or [B, N, 4], giving [B*N, 3, size, size] in
    the order of the boxes. Equals `F.interpolate(image[:, y0:y1+1, x0:x1+1], size, mode="bilinear",
    align_corners=True)` box by box. Boxes may have fractional corners, and get a gradient if they ask for one. Where
    they reach beyond the image it goes on with its border pixels ("border") or with zeros, the mean colour ("zeros").
    """
    B, C, H, W = images.shape
    # Half precision tells pixels apart only up to a few hundred: coordinates, and with them the sampling, are float32.
    precise = torch.promote_types(images.dtype, torch.float32)
    boxes = boxes.reshape(B, -1, 4).to(precise)
    N = boxes.shape[1]
    steps = torch.linspace(0, 1, size, device=images.device, dtype=precise)
    x = boxes[..., 0, None] + (boxes[..., 2] - boxes[..., 0])[..., None] * steps  # [B, N, size] pixels
    y = boxes[..., 1, None] + (boxes[..., 3] - boxes[..., 1])[..., None] * steps
    # grid_sample with align_corners=True puts the centre of the first pixel at -1 and that of the last at 1.
    x = x * (2 / max(W - 1, 1)) - 1
    y = y * (2 / max(H - 1, 1)) - 1
    shape = (B, N, size, size)
    grid = torch.stack([x[:, :, None, :].expand(shape), y[:, :, :, None].expand(shape)], dim=-1)
    # All boxes of an image are sampled as one tall picture, so the image need not be repeated for each of them.
    grid = grid.view(B, N * size, size, 2)
    crops = F.grid_sample(images.to(precise), grid, mode="bilinear", padding_mode=outside, align_corners=True)
    return crops.view(B, C, N, size, size).transpose(1, 2).reshape(B * N, C, size, size).to(images.dtype)


def resize_boxes(boxes: Tensor, scale: float) -> Tensor:
    """Carry inclusive boxes [..., 4] over to a picture `scale` times as large, covering the same part of it."""
    starts, ends = boxes[..., :2], boxes[..., 2:]
    return torch.cat([starts * scale, (ends + 1) * scale - 1], dim=-1)


def boxes_in_image(window_boxes: Tensor, object_boxes: Tensor, input_size: int) -> Tensor:
    """Carry window boxes [B, N, 4] of the object crop, input_size pixels wide, back to the picture it was cut from.

    `object_boxes` [B, 4] are the crops' boxes in that picture; returns [B, N, 4] with fractional corners.
    """
    origin = object_boxes[:, None, :2].repeat(1, 1, 2)
    extent = (object_boxes[:, 2:] - object_boxes[:, :2])[:, None].repeat(1, 1, 2)
    return origin + window_boxes * (extent / (input_size - 1))


def refuse_unless_square(images: Tensor, size: int) -> None:
    """Raise UserError where images [B, 3, H, W] are not square or smaller than `size`."""
    height, width = images.shape[-2:]
    if height != width or height < size:
        raise UserError(
            f"images have {height}x{width} pixels; expected square ones of at least {size}x{size}: "
            "resize them first, or build the network with a smaller input_size"
        )


def resize_images(images: Tensor, size: int) -> Tensor:
    """Scale square images [B, 3, S, S] down to size x size with antialiasing; unchanged where S is `size` already.

    Raises UserError where they are not square or smaller than `size`.
    """
    refuse_unless_square(images, size)
    if images.shape[-1] == size:
        return images
    # In float32: the antialiased resize does not exist for half precision on every device.
    resized = F.interpolate(images.float(), size=(size, size), mode="bilinear", antialias=True)
    return resized.to(images.dtype)


def crop_objects(images: Tensor, boxes: Tensor, *, input_size: int, masks: Tensor | None = None) -> Tensor:
    """Cut the objects out of images [B, 3, S, S] and enlarge them to the images' own size: [B, 3, S, S].

    `boxes` [B, 4] are in input_size pixels. Where S is larger than `input_size` the cut is made at the images' full
    resolution. `masks` [B, g, g] bool blanks the cells outside the object to the data set's mean colour, zero. Raises
    UserError where the images are not square or smaller than `input_size`.
    """
    refuse_unless_square(images, input_size)
    size = images.shape[-1]
    if masks is not None:
        images = images * F.interpolate(masks[:, None].to(images.dtype), size=(size, size), mode="nearest")
    return crop_and_resize(images, resize_boxes(boxes, size / input_size), size)


def crop_windows(images: Tensor, boxes: Tensor, *, input_size: int, outside: str = "border") -> Tensor:
    """Cut windows [B, N, 4], in input_size pixels, out of pictures or object crops [B, 3, S, S].

    Returns [B*N, 3, input_size / 2, input_size / 2]. `outside`: see `crop_and_resize`. Raises UserError where the
    pictures are not square or smaller than `input_size`.
    """
    refuse_unless_square(images, input_size)
    scale = images.shape[-1] / input_size
    return crop_and_resize(images, resize_boxes(boxes, scale), input_size // 2, outside=outside)


def crop_cells(maps: Tensor, boxes: Tensor, size: int, *, input_size: int) -> Tensor:
    """Cut `boxes` [B, N, 4] of an input of input_size pixels, which they lie in, out of its maps [B, C, g, g].

    Returns size x size cells of each, [B*N, C, size, size] in the order of the boxes, by RoIAlign (He, Gkioxari, Dollar
    & Girshick, "Mask R-CNN", ICCV 2017): a cell is the mean of bilinear samples, along each side as many as it covers
    cells of the map, rounded up. The maps get a gradient, the boxes none. Equals `torchvision.ops.roi_align(...,
    aligned=True)` with the boxes' ends as edges, but is a product of matrices: its gradient adds up in the same order
    every time, also on a GPU, and exported files need nothing but PyTorch.
    """
    # In float32: half precision tells positions apart only coarsely.
    precise = torch.promote_types(maps.dtype, torch.float32)
    scale = maps.shape[-1] / input_size
    boxes = boxes.detach().to(precise)
    starts, ends = boxes[..., :2] * scale, (boxes[..., 2:] + 1) * scale  # in cells of the map
    columns = _shares(starts[..., 0], ends[..., 0], size, maps.shape[-1])
    rows = _shares(starts[..., 1], ends[..., 1], size, maps.shape[-2])
    with without_autocast(maps.device):
        strips = torch.einsum("bnyh,bchw->bnycw", rows, maps.to(precise))
        cells = torch.einsum("bnycw,bnxw->bncyx", strips, columns)
    return cells.flatten(0, 1).to(maps.dtype)


def _shares(start: Tensor, end: Tensor, size: int, cells: int) -> Tensor:
    """[B, N, size, cells]: the share of each cell of a line in each of `size` equal parts between starts and ends."""
    extent = ((end - start) / size)[..., None, None]  # [B, N, 1, 1] of a part
    samples = extent.ceil()
    part = torch.arange(size, device=start.device)[:, None]
    sample = torch.arange(math.ceil(cells / size), device=start.device)  # more than some boxes need
    place = start[..., None, None] + (part + (sample + 0.5) / samples) * extent - 0.5  # 0: the first cell's centre
    distance = (place.clamp(0, cells - 1)[..., None] - torch.arange(cells, device=start.device)).abs()
    counts = (sample < samples) / samples
    return ((1 - distance).clamp(min=0) * counts[..., None]).sum(dim=-2)
