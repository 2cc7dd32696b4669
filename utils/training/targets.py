"""What training learns towards: how much each class counts, and pictures of two classes at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from utils.options import SettingsError

Mixing = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def class_weights_of(
    setting: str | Sequence[float], labels: Sequence[int], num_classes: int, device: torch.device | None = None
) -> Tensor | None:
    """Return the weight of each class in cross-entropies, [num_classes] float32; None where all count the same.

    "balanced": 1 / n_c of n_c training images of a class, by their `labels`: all classes then count the same together.
    The weights are scaled, so that their mean over the training images is 1, and learning rates mean what they do
    without. Raises SettingsError where numbers are given for more or fewer classes than there are.
    """
    if setting == "none":
        return None
    counts = torch.tensor(labels).bincount(minlength=num_classes)
    if setting == "balanced":
        setting = (1 / counts.clamp(min=1).double()).tolist()
    if len(setting) != num_classes:
        raise SettingsError(
            f"class_weights has {len(setting)} numbers and the data {num_classes} classes: give one for each, in the "
            "order of their names, or 'balanced'"
        )
    weights = torch.tensor(setting, dtype=torch.float64)
    return (weights * len(labels) / (weights * counts).sum()).to(device, torch.float32)


def build_mixing(num_classes: int, *, mixup: float, cutmix: float) -> Mixing | None:
    """Return what mixes a batch of images [B, 3, S, S] and labels [B] with itself; None where both alphas are 0.

    torchvision's MixUp (Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018) and CutMix (Yun et al.,
    "CutMix", ICCV 2019) with these alphas; with both, one of them is drawn for each batch. Labels become shares
    [B, num_classes]. Everything is drawn from torch's generator on the CPU, which is seeded before every step.
    """
    if mixup == cutmix == 0:
        return None
    from torchvision.transforms import v2  # takes long, and few runs mix

    kinds = [
        kind(alpha=alpha, num_classes=num_classes) for kind, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix)) if alpha
    ]
    mix = kinds[0] if len(kinds) == 1 else v2.RandomChoice(kinds)

    def mixed(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        last = images.is_contiguous(memory_format=torch.channels_last)
        images, labels = mix(images, labels)
        return images.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format), labels

    return mixed
