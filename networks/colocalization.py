"""Where the object is, from the pretrained features of all training pictures together, without labels.

Deep descriptor transforming of Wei, Zhang, Wu, Shen & Zhou, "Unsupervised Object Discovery and Co-Localization by Deep
Descriptor Transforming", Pattern Recognition 2019, section 3. What the classes have in common varies most from cell to
cell, object against background: it is the first principal component of the cells' features. The features are those of
the trunk before any training, in a copy that never learns; a trunk that learns comes to look at details of the object
only, so that boxes from its own maps shrink.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn

from networks.backbone import Backbone
from networks.localization import (
    Localization,
    activation_map,
    bounding_boxes,
    cell_boxes_to_pixels,
    largest_component,
)
from networks.precision import without_autocast
from networks.processes import several_processes
from networks.shared import Shared
from utils.options import require

SMALLEST_SIDE = 448  # pixels at which the copy sees a picture at least, enlarged where it has less: a grid of 14 x 14
SHARE_OF_MAXIMUM = 0.1  # cells are the object's above so much of the picture's highest indicator


def check_colocalization(localization: str, localization_stride: int, shared: Shared) -> None:
    """Refuse options under which colocalization, or what it teaches, has nothing to go by, or no grid like that."""
    if localization in ("colocalization", "learned"):
        require(
            shared.has_pretrained_weights,
            "localization",
            localization,
            "another one where pretrained is 'none': random features do not tell objects from background",
        )
    if localization == "colocalization":
        expected = f"{shared.stride} where localization is 'colocalization', which has a grid of its own"
        require(localization_stride == shared.stride, "localization_stride", localization_stride, expected)
    if localization == "learned":
        weights = dict(shared.loss_weights or {})
        expected = "localization above 0 where localization is 'learned': nothing else teaches it"
        require(weights.get("localization") != 0, "loss_weights", weights, expected)


def check_threshold(localization: str, threshold: float, default: float) -> None:
    """Refuse a localization_threshold that is not the system's own where nothing would look at it."""
    expected = f"{default} where localization is {localization!r}: only boxes of 'channel_sum' depend on it"
    require(localization == "channel_sum" or threshold == default, "localization_threshold", threshold, expected)


class Colocalization(nn.Module):
    """Finds the object in pictures with a frozen copy of a trunk, once `fit` has seen the training pictures.

    `stride`: pixels of the network's input for each cell of what it finds.
    """

    def __init__(self, backbone: Backbone, input_size: int):
        super().__init__()
        self.size = max(input_size, SMALLEST_SIDE)
        self.stride = backbone.stride * input_size / self.size
        self.trunk = copy.deepcopy(backbone).requires_grad_(False).eval()
        if backbone.batch_norm == "shared":  # the same in evaluation, and faster: inside the convolutions
            self.trunk.batch_norm = "frozen"
        self.register_buffer("mean", torch.zeros(backbone.embedding_channels))
        self.register_buffer("component", torch.zeros(backbone.embedding_channels))

    def train(self, mode: bool = True) -> Colocalization:
        """Stay as in evaluation."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Localization:
        """Find the object in normalised images [B, 3, S, S]: the largest component of the cells that indicate it.

        Cells of `stride` pixels of the input; everything where no cell indicates an object.
        """
        indicator = self.indicator(self._features(images))
        highest = indicator.amax(dim=(1, 2), keepdim=True)
        cells = largest_component(indicator > SHARE_OF_MAXIMUM * highest.clamp(min=0))
        return Localization(cells, bounding_boxes(cells))

    def boxes(self, images: Tensor) -> Tensor:
        """Return the objects' boxes [B, 4] in images [B, 3, S, S]: pixels of the network's input, ends inclusive."""
        return cell_boxes_to_pixels(self(images).boxes, self.stride)

    def indicator(self, features: Tensor) -> Tensor:
        """Return how much each cell of features [B, C, H, W] looks like the object, [B, H, W]; above 0: it does."""
        return activation_map((features.float() - self.mean[:, None, None]) * self.component[:, None, None])

    def _features(self, images: Tensor) -> Tensor:
        if images.shape[-1] != self.size:
            shape = (self.size, self.size)
            enlarged = F.interpolate(images.float(), size=shape, mode="bilinear", antialias=True)
            images = enlarged.to(images.dtype)
        return self.trunk(images).final

    @torch.no_grad()
    def fit(self, batches: Iterable[Tensor]) -> None:
        """Take mean and first principal component of all cells of images [B, 3, S, S]; those of all processes.

        The sign is that with which the indicator goes along with the sum of the channels, which is high on objects.
        """
        channels = len(self.mean)
        device = "cpu" if self.mean.device.type == "mps" else self.mean.device  # MPS has no float64
        sums = torch.zeros(channels + 1, channels + 1, dtype=torch.float64, device=device)
        for images in batches:
            sums += sums_of_products(self._features(images).movedim(1, -1).flatten(0, -2), device)
        if several_processes():
            torch.distributed.all_reduce(sums)
        mean = sums[-1, :-1] / sums[-1, -1]
        covariance = sums[:-1, :-1] / sums[-1, -1] - mean.outer(mean)
        component = torch.linalg.eigh(covariance).eigenvectors[:, -1]
        agrees = component @ covariance.sum(dim=1) >= 0  # the covariance of the indicator and the sum of the channels
        self.mean.copy_(mean)
        self.component.copy_(component if agrees else -component)


def sums_of_products(cells: Tensor, device: torch.device | str) -> Tensor:
    """Return [C + 1, C + 1] float64 on a device: what cells [n, C] and a channel of ones, the last one, sum up to.

    That is, for two channels, the sum of their product over the cells. Products are in float32, also under autocast:
    of deviations from the cells' mean, which keep the digits that are lost in products of cells that are far from 0.
    """
    with without_autocast(cells.device):
        cells = cells.float()
        centre = cells.mean(dim=0)
        deviations = cells - centre
        products = deviations.T @ deviations
    # From here on exact but for the rounding of float64; the deviations' sum is what the mean was rounded by.
    deviation = deviations.to(device).sum(dim=0, dtype=torch.float64)
    centre = centre.to(device).double()
    total = deviation + len(cells) * centre
    sums = torch.empty(len(total) + 1, len(total) + 1, dtype=torch.float64, device=device)
    sums[:-1, :-1] = products.to(device) + total.outer(centre) + centre.outer(deviation)
    sums[-1, :-1] = sums[:-1, -1] = total
    sums[-1, -1] = len(cells)
    return sums
