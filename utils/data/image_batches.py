"""Batches of images on the device: augmented as was drawn for each, and normalised.

All of a batch at once, where it costs next to nothing; images come as uint8, a quarter of the bytes.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.data.augmentation import ANGLE, CONTRAST, ERASED, FACTORS, MIRRORED, ORDER, PART, SATURATION

# Mean and deviation of red, green and blue, of 0..1
NORMALIZATIONS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # which published backbones were trained with
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
GRAY = (0.2989, 0.587, 0.114)  # what red, green and blue add to torchvision's gray


def normalised(images: Tensor, augmentation: Tensor | None = None, normalization: str = "imagenet") -> Tensor:
    """Return images [B, 3, H, W] with values in 0..255, augmented if asked, as normalised float32.

    What is erased is 0 after it: the mean colour, as where torchvision's RandomErasing follows on Normalize.
    """
    images = images.to(torch.float32, copy=True) if augmentation is None else augmented(images, augmentation)
    scale, shift = _scale_and_shift(normalization, images.device)
    images = images.mul_(scale).add_(shift)
    if augmentation is not None and augmentation[:, ERASED].any():
        erased = augmentation.to(images.device, non_blocking=True)[:, ERASED]  # whole rows: a part would be waited for
        images.masked_fill_(_inside(erased, images), 0)
    return images


def augmented(images: Tensor, augmentation: Tensor) -> Tensor:
    """Mirror, crop, turn and jitter each image as its row says: float32 in 0..255; torchvision rounds uint8 each time.

    The part is cut out of the mirrored image and enlarged, as torchvision's resized_crop does, and turned as its rotate
    does. Each image is then multiplied by its factor of brightness, mixed with its mean gray by its factor of contrast
    and with its gray by that of saturation, in any order and cut off at 0 and 255 after each, as torchvision's
    adjust_brightness, adjust_contrast and adjust_saturation do.

    Args:
        images: [B, 3, H, W], values in 0..255.
        augmentation: [B, 16], see `Augmentation.draw`; on the CPU, as it is looked at before it is moved.
    """
    starts, ends = augmentation[:, PART].split(2, dim=1)
    cropped, turned = bool((ends - starts < 1).any()), bool(augmentation[:, ANGLE].any())  # a GPU would be waited for
    factors, order = augmentation[:, FACTORS], augmentation[:, ORDER]
    saturated = bool((factors[:, SATURATION] != 1).any() or (order[:, :2] == SATURATION).any())
    augmentation = augmentation.to(images.device, non_blocking=True)
    mirrored = augmentation[:, MIRRORED, None, None, None].bool()
    images = torch.where(mirrored, images.flip(-1), images).float()
    if cropped:
        images = _enlarged(images, augmentation[:, PART])
    if turned:
        images = _turned(images, augmentation[:, ANGLE])
    return _jittered(images, augmentation[:, FACTORS], augmentation[:, ORDER], saturated=saturated)


def _enlarged(images: Tensor, parts: Tensor) -> Tensor:
    """Cut parts [B, 4], edges in shares of the sides, out of images [B, 3, H, W], and enlarge each to H x W.

    Bilinear is enough, without antialiasing: parts are never made smaller. A whole image stays, but for rounding.
    """
    H, W = images.shape[-2:]
    # Not by affine_grid, whose matrix product would be rounded to bfloat16 under autocast.
    x, y = (_centres(parts[:, axis, None], parts[:, axis + 2, None], count) for axis, count in ((0, W), (1, H)))
    grid = torch.stack([x[:, None, :].expand(-1, H, -1), y[:, :, None].expand(-1, -1, W)], dim=-1)  # [B, H, W, 2]
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _centres(starts: Tensor, ends: Tensor, count: int) -> Tensor:
    """Centres [B, count] of so many equal steps from starts to ends [B, 1], shares 0..1, as grid_sample's -1..1."""
    half = 0.5 / count
    centres = starts + (ends - starts) * (torch.arange(count, device=starts.device) / count + half)
    return 2 * centres.clamp(starts + half, ends - half) - 1  # nothing of the pixels around the part is mixed in


def _turned(images: Tensor, degrees: Tensor) -> Tensor:
    """Turn images [B, 3, H, W] counter-clockwise by degrees [B] about their centres; black comes in from beyond."""
    H, W = images.shape[-2:]
    angles = degrees.deg2rad()[:, None, None]
    cosine, sine = angles.cos(), angles.sin()
    x, y = (torch.arange(side, device=images.device) + 0.5 - side / 2 for side in (W, H))
    x, y = x[None, None, :], y[None, :, None]
    sources = [(x * cosine - y * sine) * (2 / W), (x * sine + y * cosine) * (2 / H)]  # of each pixel, -1 to 1
    return F.grid_sample(images, torch.stack(sources, dim=-1), padding_mode="zeros", align_corners=False)


def _jittered(images: Tensor, factors: Tensor, order: Tensor, *, saturated: bool) -> Tensor:
    """Change images [B, 3, H, W] in place by factors [B, 3], in an order [B, 3] of them.

    saturated: False where saturation comes last everywhere, and its factor is 1.
    """
    order = order.long()
    for now in order.unbind(dim=1)[: 3 if saturated else 2]:
        factor = factors.gather(1, now[:, None])[:, :, None, None]
        now = now[:, None, None, None]
        mixed_in = torch.where(now == CONTRAST, _mean_gray(images), 0)
        if saturated:
            mixed_in = torch.where(now == SATURATION, _gray(images), mixed_in)
        images.mul_(factor).add_((1 - factor) * mixed_in).clamp_(0, 255)  # in place: new memory costs more on a CPU
    return images


def _mean_gray(images: Tensor) -> Tensor:
    """Return [B, 1, 1, 1]."""
    return (images.mean(dim=(2, 3), keepdim=True) * _colours(GRAY, images.device)).sum(dim=1, keepdim=True)


def _gray(images: Tensor) -> Tensor:
    """Return [B, 1, H, W]."""
    red, green, blue = images.split(1, dim=1)
    return (red * GRAY[0]).add_(green, alpha=GRAY[1]).add_(blue, alpha=GRAY[2])


def _inside(parts: Tensor, images: Tensor) -> Tensor:
    """Which pixels of images [B, 3, H, W] have their centres in parts [B, 4], edges as shares: bool [B, 1, H, W]."""
    x, y = ((torch.arange(side, device=parts.device) + 0.5) / side for side in reversed(images.shape[-2:]))
    x0, y0, x1, y1 = parts[:, :, None].unbind(dim=1)
    return ((y0 <= y) & (y < y1))[:, None, :, None] & ((x0 <= x) & (x < x1))[:, None, None, :]


@cache
def _scale_and_shift(normalization: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """What values in 0..255 are multiplied by, and what is added, [3, 1, 1] each."""
    mean, std = (_colours(values, device) for values in NORMALIZATIONS[normalization])
    return 1 / (255 * std), -mean / std


@cache
def _colours(values: tuple[float, float, float], device: torch.device) -> Tensor:
    """A number for each colour as a tensor [3, 1, 1]; kept, as a copy to a GPU waits."""
    return torch.tensor(values).reshape(3, 1, 1).to(device)
