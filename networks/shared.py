"""What a system may know of the shared settings: its defaults and its checks follow from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from networks.backbone import DENSE_STRIDE, STRIDE
from networks.trunks import traits_of
from utils.options import require


class Shared(NamedTuple):
    """The shared settings that a system's defaults and checks may look at; see `config.Settings` for what they mean.

    `pretrained` "none": random weights to learn from; None: the weights are loaded later. `batch_size` 0: not trained.
    """

    input_size: int = 448
    image_size: int | None = None  # None: input_size
    backbone: str = "resnet50"
    pretrained: str | None = None
    sync_batch_norm: bool = False
    dropout: float = 0.5
    batch_size: int = 0
    epochs: int = 0
    images_per_class: int = 0
    loss_weights: Mapping[str, float] | None = None
    last_stride: int = 2

    @property
    def stride(self) -> int:
        """Pixels of the input per cell of the trunk's final map."""
        return STRIDE if self.last_stride == 2 else DENSE_STRIDE

    @property
    def localization_strides(self) -> tuple[int, ...]:
        """The strides of the maps that the trunk can compute over whole pictures."""
        return tuple(sorted({self.stride, DENSE_STRIDE} if traits_of(self.backbone).dense else {self.stride}))

    @property
    def can_leave_out_last_stride(self) -> bool:
        """Whether the trunk allows a `last_stride` of 1."""
        return traits_of(self.backbone).last_stride

    @property
    def has_batch_norm(self) -> bool:
        """Whether the trunk has batch norms, whose statistics can be frozen."""
        return traits_of(self.backbone).batch_norm

    @property
    def has_split(self) -> bool:
        """Whether the trunk's last two stages end with the sum of a residual and a shortcut."""
        return traits_of(self.backbone).split

    def check_localization(self, stride: int, *, confirmed: bool = True) -> None:
        """Raise SettingsError where the trunk cannot compute such a map to find the object on.

        `confirmed` by the map of the last stage's second-to-last block, which some trunks do not have.
        """
        choices = " or ".join(map(str, self.localization_strides))
        expected = f"{choices} with {self.backbone} and last_stride {self.last_stride}"
        require(stride in self.localization_strides, "localization_stride", stride, expected)
        has_two = not confirmed or traits_of(self.backbone).penultimate
        blocks = "a trunk whose last stage has a second-to-last block, which confirms where the object is"
        require(has_two, "backbone", self.backbone, blocks)

    @property
    def side_of_images(self) -> int:
        return self.image_size or self.input_size

    @property
    def has_pretrained_weights(self) -> bool:
        return self.pretrained != "none"
