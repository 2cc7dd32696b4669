"""torchvision's ResNets as the trunk of every system.

He, Zhang, Ren & Sun, "Deep Residual Learning for Image Recognition", CVPR 2016.
"""

from __future__ import annotations

from pathlib import Path
from urllib.error import URLError

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

from networks.batch_norm import BATCH_NORMS, freeze_statistics, look_at, separate_statistics
from networks.outputs import Features
from utils.errors import UserError

BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
STRIDE = 32  # pixels of the input per cell of the final map
DENSE_STRIDE = 16  # the same for the dense maps, and without the last stride
LAST_STRIDES = (1, 2)


class Backbone(nn.Module):
    """A ResNet trunk without its classifier.

    `pretrained` is None (random weights), the name of torchvision weights ("DEFAULT", "IMAGENET1K_V2", ...; downloaded
    by torchvision) or the path of a .pth file with torchvision's parameter names in any floating type.

    `stride_on_first_conv` puts the stride of a bottleneck on its 1x1 convolution, as the original paper and Caffe
    weights have it, instead of on the 3x3 convolution (torchvision, "v1.5"). Weights trained one way lose a little
    accuracy the other way.

    `batch_norm`: the running statistics are `shared` by all passes, kept `per_pass` (see `networks.batch_norm.KINDS`),
    or `frozen`, that is, those of the pretrained weights are used in training as in evaluation and never change.
    Frozen ones are computed inside the convolutions, without calling the trunk's blocks: hooks on these see nothing.

    `last_stride` 1 leaves the last stage without its stride, as re-identification and CAL (Rao et al., ICCV 2021) have
    it: its maps are twice as fine, and its later blocks see half as much of the picture (with `dense` they do not).

    `channels` holds the channel count of each map, `embedding_channels` that of the last one, `stride` the pixels of
    the input per cell of the final map.
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
        if name not in BACKBONES:
            raise UserError(f"unknown backbone {name!r}; choose one of {', '.join(BACKBONES)}")
        weights = None if pretrained is None or is_weights_file(pretrained) else _torchvision_weights(name, pretrained)
        try:
            trunk = torchvision.models.get_model(name, weights=weights)
        except (URLError, RuntimeError) as error:  # no network, or a file cut short
            raise UserError(
                f"pretrained weights {pretrained} could not be downloaded ({error}): "
                "give a .pth file, or set pretrained to none"
            ) from None
        self.channels = {
            "stage2": trunk.layer3[0].conv1.in_channels,
            "stage3": trunk.layer4[0].conv1.in_channels,
            "final": trunk.fc.in_features,
        }
        self.embedding_channels = trunk.fc.in_features
        trunk.fc = nn.Identity()  # every system brings its own classifiers
        self.trunk = trunk
        if stride_on_first_conv:
            _move_stride_to_first_conv(trunk, name)
        if last_stride not in LAST_STRIDES:
            raise UserError(f"last_stride {last_stride!r} came; choose 1 or 2")
        self.stride = STRIDE if last_stride == 2 else DENSE_STRIDE
        if last_stride == 1:
            _leave_out_stride(trunk.layer4[0])
        if pretrained is not None and is_weights_file(pretrained):
            load_trunk_weights(trunk, pretrained)
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

    def forward(self, images: Tensor, *, kind: str = "picture", dense: bool = False) -> Features:
        """Map images [B, 3, H, W], normalised with ImageNet's mean and deviation, to their `Features`.

        `kind` of images, one of `networks.batch_norm.KINDS`: whose statistics are used where they are kept per pass.

        `dense` computes the last stage at every cell of the one before it, so that its maps are [B, C, H/16, W/16]:
        every other cell of every other row is what it is without (Yu & Koltun, "Multi-Scale Context Aggregation by
        Dilated Convolutions", ICLR 2016). Without the last stride they are that fine already, and it changes nothing.
        """
        trunk = self.trunk
        if self.batch_norm == "per_pass":
            look_at(trunk, kind)
        frozen = self.batch_norm == "frozen"
        x = trunk.maxpool(F.relu(_convolve(trunk.conv1, trunk.bn1, images, frozen=frozen), inplace=True))
        _, stage1 = _stage(trunk.layer1, x, frozen=frozen)
        _, stage2 = _stage(trunk.layer2, stage1, frozen=frozen)
        _, stage3 = _stage(trunk.layer3, stage2, frozen=frozen)
        penultimate, final = _stage(trunk.layer4, stage3, frozen=frozen, dense=dense)
        return Features(stage2, stage3, penultimate, final, embedding=final.mean(dim=(2, 3)))


def _stage(stage: nn.Sequential, x: Tensor, *, frozen: bool, dense: bool = False) -> tuple[Tensor, Tensor]:
    """Run a stage and return the output of its second-to-last and of its last residual block."""
    dilation = 1 if dense else None
    for block in stage:
        penultimate = x
        if frozen or dense:
            x, dilation = _block(block, x, dilation, frozen=frozen)
        else:
            x = block(x)
    return penultimate, x


def _block(block: nn.Module, x: Tensor, dilation: int | None, *, frozen: bool) -> tuple[Tensor, int | None]:
    """Run a residual block; with a dilation, without its stride, and return what comes after a stride dilated by it."""
    shortcut = x
    if block.downsample is not None:
        shortcut = _convolve(*block.downsample, x, dilation, frozen=frozen)
    layers = [(block.conv1, block.bn1), (block.conv2, block.bn2)]
    if isinstance(block, Bottleneck):
        layers.append((block.conv3, block.bn3))
    for index, (convolution, norm) in enumerate(layers):
        if index:
            x = F.relu(x, inplace=True)
        x = _convolve(convolution, norm, x, dilation, frozen=frozen)
        if dilation is not None:
            dilation *= convolution.stride[0]
    return F.relu(x + shortcut, inplace=True), dilation


def _convolve(
    convolution: nn.Conv2d, norm: nn.Module, x: Tensor, dilation: int | None = None, *, frozen: bool
) -> Tensor:
    """Convolve and normalise; with a dilation, without the convolution's stride and dilated by it.

    Frozen batch norms only scale and shift, so the weights can be scaled instead of the maps: backward then needs no
    copy of the map between the two, nearly half of what a trunk in training keeps.
    """
    weight, bias = convolution.weight, convolution.bias
    folded = frozen and isinstance(norm, nn.BatchNorm2d)  # in copies for inference it is the identity already
    if folded:
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        weight, bias = weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale
    if dilation is None:
        x = F.conv2d(x, weight, bias, convolution.stride, convolution.padding)
    else:
        x = F.conv2d(x, weight, bias, padding=dilation * (convolution.kernel_size[0] // 2), dilation=dilation)
    return x if folded else norm(x)


def is_weights_file(pretrained: str) -> bool:
    """Tell a file of weights from the name of torchvision weights."""
    return Path(pretrained).suffix in (".pth", ".pt") or Path(pretrained).is_file()


def _torchvision_weights(name: str, weights_name: str) -> torchvision.models.WeightsEnum:
    choices = torchvision.models.get_model_weights(name)
    try:
        return choices[weights_name.rpartition(".")[2]]
    except KeyError:
        raise UserError(
            f"unknown pretrained weights {weights_name!r} for {name}: give a .pth file or one of "
            f"{', '.join(choices.__members__)}"
        ) from None


def _move_stride_to_first_conv(trunk: nn.Module, name: str) -> None:
    for stage in (trunk.layer2, trunk.layer3, trunk.layer4):
        if not isinstance(stage[0], Bottleneck):
            raise UserError(
                f"stride_on_first_conv needs bottleneck blocks, and {name} has none: use resnet50 or deeper"
            )
        stage[0].conv1.stride = (2, 2)
        stage[0].conv2.stride = (1, 1)


def _leave_out_stride(block: nn.Module) -> None:
    for module in block.modules():
        if isinstance(module, nn.Conv2d):
            module.stride = (1, 1)


def load_trunk_weights(trunk: nn.Module, path: str | Path) -> None:
    """Load a file of torchvision-named ResNet weights; a `module.` prefix and the unused `fc` are tolerated.

    Raises UserError without the file, and where it does not hold exactly this trunk's weights.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"pretrained weights {path} are not there: give the path of a .pth file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # what the bytes of other files make an unpickler raise is listed nowhere
        kind = type(error).__name__
        raise UserError(f"pretrained weights {path} are not a plain file of tensors ({kind})") from None
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise UserError(f"pretrained weights {path} hold no state dict: a dict of tensors by name was expected")
    state = {name.removeprefix("module."): value for name, value in state.items()}
    state = {name: value for name, value in state.items() if not name.startswith("fc.")}
    # Old files (torch < 0.4.1) lack these counters, which nothing here reads.
    counters = {k: v for k, v in trunk.state_dict().items() if k.endswith("num_batches_tracked")}
    try:
        trunk.load_state_dict(counters | state, strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"pretrained weights {path} do not fit this backbone: {reason[:300]}") from None
