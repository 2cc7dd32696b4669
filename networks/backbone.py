"""The trunk of every system: one of torchvision's networks without its classifier, and the maps that it makes."""

from __future__ import annotations

from urllib.error import URLError

import torchvision
from torch import Tensor, nn

from networks.batch_norm import BATCH_NORMS, freeze_statistics, separate_statistics, use_statistics_of
from networks.outputs import Features
from networks.pretrained import is_weights_file, load_trunk_weights, torchvision_weights
from networks.trunks import check_trunk, family_of
from utils.errors import UserError

STRIDE = 32  # pixels of the input per cell of the final map
DENSE_STRIDE = 16  # the same for the dense maps, and without the last stride


class Backbone(nn.Module):
    """A trunk without its classifier, by its name in torchvision: one of `networks.trunks.BACKBONES`.

    `pretrained` is None (random weights), the name of torchvision weights ("DEFAULT", "IMAGENET1K_V2", ...; downloaded
    by torchvision) or the path of a file with torchvision's parameter names: see `networks.pretrained`.

    `stride_on_first_conv` puts the stride of a ResNet's bottleneck on its 1x1 convolution, as the original paper and
    Caffe weights have it, instead of on the 3x3 convolution (torchvision, "v1.5"). Weights trained one way lose a
    little accuracy the other way.

    `batch_norm`: the running statistics are `shared` by all passes, kept `per_pass` (see `networks.batch_norm.KINDS`),
    or `frozen`, that is, those of the pretrained weights are used in training as in evaluation and never change.

    `last_stride` 1 leaves the last stage without its stride, as re-identification and CAL (Rao et al., ICCV 2021) have
    it: its maps are twice as fine, and its later blocks see half as much of the picture (with `dense` they do not).

    `channels` holds the channel count of each map, `embedding_channels` that of the last one, `stride` the pixels of
    the input per cell of the final map. Raises SettingsError where the trunk lacks what is asked for.
    """

    def __init__(
        self,
        name: str = "resnet50",
        *,
        pretrained: str | None = None,
        stride_on_first_conv: bool = False,
        batch_norm: str = "shared",
        last_stride: int = 2,
    ):
        super().__init__()
        if batch_norm not in BATCH_NORMS:
            raise UserError(f"unknown batch_norm {batch_norm!r}; choose one of {', '.join(BATCH_NORMS)}")
        self.family = family_of(name)
        check_trunk(name, stride_on_first_conv=stride_on_first_conv, batch_norm=batch_norm, last_stride=last_stride)
        weights = None if pretrained is None or is_weights_file(pretrained) else torchvision_weights(name, pretrained)
        try:
            trunk = torchvision.models.get_model(name, weights=weights)
        except (URLError, RuntimeError) as error:  # no network, or a file cut short
            raise UserError(
                f"pretrained weights {pretrained} could not be downloaded ({error}): "
                "give a .pth file, or set pretrained to none"
            ) from None
        self.channels = self.family.channels(trunk)
        self.embedding_channels = self.channels["final"]
        self.stride = STRIDE if last_stride == 2 else DENSE_STRIDE
        self.family.remove_classifier(trunk)  # every system brings its own
        self.trunk = trunk
        if stride_on_first_conv:
            self.family.move_stride_to_first_conv(trunk)
        if last_stride == 1:
            self.family.leave_out_last_stride(trunk)
        if pretrained is not None and is_weights_file(pretrained):
            load_trunk_weights(trunk, pretrained, unused=self.family.classifier)
        self.batch_norm = batch_norm
        if batch_norm == "per_pass":
            separate_statistics(trunk)
        elif batch_norm == "frozen":
            freeze_statistics(trunk)

    def train(self, mode: bool = True) -> Backbone:
        """Switch between training and evaluation; frozen batch norms stay as in evaluation."""
        super().train(mode)
        if self.batch_norm == "frozen":
            freeze_statistics(self.trunk)
        return self

    def forward(
        self,
        images: Tensor,
        *,
        kind: str = "picture",
        dense: bool = False,
        split: bool = False,
        until: str = "final",
        start: str = "images",
    ) -> Features:
        """Map images [B, 3, H, W], normalised (setting `normalization`), to their `Features`.

        `kind` of images, one of `networks.batch_norm.KINDS`: whose statistics are used where they are kept per pass.

        `dense`, with ResNets only, computes the last stage at every cell of the one before it, so that its maps are [B,
        C, H/16, W/16]: every other cell of every other row is what it is without (Yu & Koltun, "Multi-Scale Context
        Aggregation by Dilated Convolutions", ICLR 2016). Without the last stride they are that fine already, and it
        changes nothing.

        `split`, with ResNets only: what the blocks that make `stage3` and `final` add up is in the features, too.

        `until` "stage2" or "stage3": the pass ends with that map, and later ones, the embedding among them, are None.

        `start` "stage3": in place of images come maps [B, C3, h, w] of that stage, whole or cut out, and only the last
        stage looks at them; `stage2` is None then, and `stage3` what came. An argument rather than a method of its own,
        so that hooks and torch.compile meet such a pass as they do any other.
        """
        if dense and not self.family.dense:
            raise UserError("dense maps were asked for; only ResNets have them")
        if split and not self.family.split:
            raise UserError("residuals and shortcuts were asked for; only ResNets have them")
        if self.batch_norm == "per_pass":
            use_statistics_of(self.trunk, kind)
        frozen = self.batch_norm == "frozen"
        if start == "stage3":
            maps = self.family.finish(self.trunk, images, frozen=frozen, dense=dense, split=split)
        else:
            maps = self.family.look(self.trunk, images, frozen=frozen, dense=dense, split=split, until=until)
        stage3 = images if start == "stage3" else maps.stage3
        embedding = None if maps.final is None else maps.final.mean(dim=(2, 3))
        stages = (maps.stage2, stage3, maps.penultimate, maps.final)
        return Features(*stages, embedding, maps.stage3_split, maps.final_split)
