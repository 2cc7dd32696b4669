"""What training learns towards: how much each class counts, and pictures of two classes at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.data import Sampler

from utils.data.samplers import BalancedSampler
from utils.options import SettingsError

Mixing = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def class_weights_of(
    setting: str | Sequence[float], counts: Tensor, device: torch.device | None = None
) -> Tensor | None:
    """Return the weight of each class in cross-entropies, [classes] float32; None where all count the same.

    "balanced": 1 / n_c of the n_c images of a class that an epoch shows, `counts` [classes]: all classes then count the
    same together. The weights are scaled, so that their mean over the images is 1, and learning rates mean what they do
    without. Raises SettingsError where numbers are given for more or fewer classes than there are.
    """
    if setting == "none":
        return None
    if setting == "balanced":
        setting = (1 / counts.clamp(min=1).double()).tolist()
    if len(setting) != len(counts):
        raise SettingsError(
            f"class_weights has {len(setting)} numbers and the data {len(counts)} classes: give one for each, in the "
            "order of their names, or 'balanced'"
        )
    weights = torch.tensor(setting, dtype=torch.float64)
    return (weights * counts.sum() / (weights * counts).sum()).to(device, torch.float32)


def images_shown(sampler: Sampler, labels: Sequence[int], num_classes: int) -> Tensor:
    """Return how many images of each class, by their `labels`, an epoch shows: [num_classes] int64."""
    if isinstance(sampler, BalancedSampler):  # which has evened them out
        counts = torch.zeros(num_classes, dtype=torch.int64)
        counts[torch.from_numpy(sampler.labels)] = torch.from_numpy(sampler.shown)
        return counts
    return torch.tensor(labels).bincount(minlength=num_classes)


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
