"""How to compute: the device, mixed precision and the memory layout."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from utils.data.image_batches import normalised

HALF_PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}  # mixed: weights and losses are float32


class Execution(NamedTuple):
    """How to compute: the device, mixed precision, the memory layout, and the scale of the images."""

    device: torch.device
    precision: str = "float32"
    channels_last: bool = True
    normalization: str = "imagenet"

    def autocast(self) -> torch.autocast:
        """Return the context in which the network runs."""
        return torch.autocast(self.device.type, dtype=self.half or torch.bfloat16, enabled=self.half is not None)

    @property
    def half(self) -> torch.dtype | None:
        """What convolutions and matrix products are computed in, None where that is float32."""
        return HALF_PRECISIONS.get(self.precision)

    def images(self, images: Tensor, augmentation: Tensor | None = None) -> Tensor:
        """Move a batch of images [B, 3, H, W] to the device, in the chosen layout, as the network wants them.

        uint8 is augmented there, if `augmentation` [B, 16], itself on the CPU, says how, and normalised; floating point
        is so already.
        """
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        images = images.to(self.device, non_blocking=True)
        if images.dtype == torch.uint8:
            images = normalised(images, augmentation, self.normalization)
        return images.contiguous(memory_format=layout)

    def batches(self, loader: DataLoader) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the images of a loader's batches, as `images` gives them, with their labels [B], on the device."""
        for batch in loader:
            labels = batch.labels.to(self.device, non_blocking=True)
            yield self.images(batch.images, batch.augmentation), labels
