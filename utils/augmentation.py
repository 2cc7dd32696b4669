"""What the device does to a batch of pictures before the network sees it: mirror, jitter, normalise.

Loader processes only draw the numbers (`datasets.Augmentation`), which a few integers decide; the arithmetic is done
here for the whole batch at once, where it costs next to nothing, and batches travel as uint8, a quarter of the bytes.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

MEAN = (0.485, 0.456, 0.406)  # of ImageNet, which published backbones were trained with
STD = (0.229, 0.224, 0.225)
GRAY = (0.2989, 0.587, 0.114)  # what red, green and blue add to torchvision's gray


def normalised(images: Tensor, augmentation: Tensor | None = None) -> Tensor:
    """Return images [B, 3, H, W] with values in 0..255, augmented if asked, as float32 on the scale of ImageNet."""
    images = images.to(torch.float32, copy=True) if augmentation is None else augmented(images, augmentation)
    scale, shift, _ = _constants(images.device)
    return images.mul_(scale).add_(shift)


def augmented(images: Tensor, augmentation: Tensor) -> Tensor:
    """Mirror and jitter each image as its row says: float32 in 0..255, where torchvision rounds uint8 at every step.

    Each image is multiplied by its factor of brightness, and mixed with its mean gray by its factor of contrast, in
    either order and cut off at 0 and 255 after each, as torchvision's adjust_brightness and adjust_contrast do.

    Args:
        images: [B, 3, H, W], values in 0..255.
        augmentation: [B, 4], see `datasets.Augmentation.draw`.
    """
    columns = augmentation[:, :, None, None, None].unbind(dim=1)
    mirrored, contrast_first = (column.bool() for column in (columns[0], columns[3]))
    brightness, contrast = columns[1:3]
    images = torch.where(mirrored, images.flip(-1), images).float()
    for contrast_now in (contrast_first, ~contrast_first):
        factor = torch.where(contrast_now, contrast, brightness)
        shift = torch.where(contrast_now, (1 - contrast) * _mean_gray(images), 0)
        images.mul_(factor).add_(shift).clamp_(0, 255)  # in place: on a CPU, new memory costs more than arithmetic
    return images


def _mean_gray(images: Tensor) -> Tensor:
    """Return [B, 1, 1, 1]."""
    return (images.mean(dim=(2, 3), keepdim=True) * _constants(images.device)[2]).sum(dim=1, keepdim=True)


@cache
def _constants(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Scale and shift of the normalisation and the weights of gray, [3, 1, 1] each; kept, as a copy to a GPU waits."""
    mean, std, gray = (torch.tensor(values).reshape(3, 1, 1).to(device) for values in (MEAN, STD, GRAY))
    return 1 / (255 * std), -mean / std, gray
