"""A convolution with what follows it in a residual block, its batch norm, a sum and a ReLU, fused if they can be.

Each step by itself reads and writes whole maps. In a network that only predicts, on CPUs that multiply bfloat16
matrices, that takes as long as the convolutions. oneDNN does these steps while it writes a convolution's result.
PyTorch has that as operations that torch.compile uses; where they are missing or do not work, the steps are taken
one by one.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry


def convolve(
    convolution: nn.Conv2d,
    norm: nn.Module,
    x: Tensor,
    dilation: int | None = None,
    *,
    frozen: bool,
    relu: bool = False,
    summand: Tensor | None = None,
    overwrite_summand: bool = False,
) -> Tensor:
    """Convolve maps [B, C, h, w], normalise, add `summand` [B, D, h', w'] and, with `relu`, apply a ReLU.

    With a dilation the convolution is without its stride and dilated by it. `overwrite_summand`: nothing else needs the
    summand, so that it may become the result.

    Frozen batch norms only scale and shift, so the weights can be scaled instead of the maps: backward then needs no
    copy of the map between the two, nearly half of what a trunk in training keeps.
    """
    weight, bias = convolution.weight, convolution.bias
    scaled = frozen and isinstance(norm, nn.BatchNorm2d)
    if scaled:
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        weight, bias = weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale
    stride, padding, spacing = convolution.stride, convolution.padding, convolution.dilation
    if dilation is not None:
        around = dilation * (convolution.kernel_size[0] // 2)
        stride, padding, spacing = (1, 1), (around, around), (dilation, dilation)
    # in copies for inference the batch norm is in the weights already, and the identity in its place
    dtype = fused_dtype(x, weight) if scaled or isinstance(norm, nn.Identity) else None
    if dtype is not None and (summand is None or can_add_fused(x, summand, dtype, convolution.groups)):
        x, weight, bias = (None if tensor is None else tensor.to(dtype) for tensor in (x, weight, bias))
        geometry = (padding, stride, spacing, convolution.groups)
        return _fused(x, weight, bias, *geometry, relu=relu, summand=summand, overwrite_summand=overwrite_summand)
    x = F.conv2d(x, weight, bias, stride, padding, spacing, convolution.groups)
    if not scaled:
        x = norm(x)
    if summand is not None:
        x = x + summand
    return rectified(x) if relu else x


def rectified(x: Tensor) -> Tensor:
    """Apply a ReLU to a map that nothing else needs.

    In place, which saves the memory of a map; bfloat16 on a CPU takes three times as long that way.
    """
    return F.relu(x, inplace=x.device.type != "cpu" or x.dtype != torch.bfloat16)


def fused_dtype(x: Tensor, weight: Tensor) -> torch.dtype | None:
    """What x and these weights are convolved in where that can be one operation with what follows, None where not.

    It can on a CPU, without gradients. torch.compile, torch.export and traces see the single steps.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    if not torch.backends.mkldnn.enabled:
        return None
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return None
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
    else:
        dtype = weight.dtype if x.dtype == weight.dtype else None
    return dtype if works_fused(dtype) else None


def can_add_fused(x: Tensor, summand: Tensor, dtype: torch.dtype, groups: int) -> bool:
    """Whether the sum, too, can be part of an operation in this dtype.

    Only without groups and where maps lie in memory as oneDNN wants them, beyond a doubt (a single cell lies any way).
    """
    return (
        groups == 1
        and summand.dtype == dtype
        and all(
            maps.is_contiguous(memory_format=torch.channels_last) and not maps.is_contiguous() for maps in (x, summand)
        )
    )


@cache
def works_fused(dtype: torch.dtype | None) -> bool:
    """Whether oneDNN's fused operations are there and right for a dtype: those of PyTorch are not public."""
    if dtype not in (torch.bfloat16, torch.float32):
        return False
    x = torch.ones(1, 2, 2, 2, dtype=dtype, device="cpu").to(memory_format=torch.channels_last)
    weight = torch.ones(2, 2, 1, 1, dtype=dtype, device="cpu")
    geometry = ((0, 0), (1, 1), (1, 1), 1)
    try:
        alone = _fused(x, -weight, None, *geometry, relu=True)
        added = _fused(x, -weight, None, *geometry, relu=True, summand=3 * x)
        overwritten = _fused(x, weight, weight[:, 0, 0, 0], *geometry, summand=x.clone(), overwrite_summand=True)
    except (AttributeError, RuntimeError, TypeError):  # another PyTorch, or a CPU without bfloat16
        return False
    return all((found == right).all() for found, right in ((alone, 0), (added, 1), (overwritten, 4)))


def _fused(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    *,
    relu: bool = False,
    summand: Tensor | None = None,
    overwrite_summand: bool = False,
) -> Tensor:
    geometry, operations = (padding, stride, dilation, groups), torch.ops.mkldnn
    if summand is None:
        return operations._convolution_pointwise(x, weight, bias, *geometry, "relu" if relu else "none", [], "")
    sum_and_relu = ("add", 1.0, "relu" if relu else None, [], "")
    if overwrite_summand:
        return operations._convolution_pointwise_.binary(summand, x, weight, bias, *geometry, *sum_and_relu)
    return operations._convolution_pointwise.binary(x, summand, weight, bias, *geometry, *sum_and_relu)


def _count(*arguments: object, out_val: Tensor, **options: object) -> int:
    """Floating-point operations of a fused convolution, as FlopCounterMode counts those of others."""
    _, weight, after_weight, bias_or_padding, *_ = arguments
    if not isinstance(bias_or_padding, (tuple, list)):  # then a summand comes before the weight
        weight = after_weight
    return 2 * out_val.numel() * weight[0].numel()


if hasattr(torch.ops.mkldnn, "_convolution_pointwise"):
    for operation in (torch.ops.mkldnn._convolution_pointwise, torch.ops.mkldnn._convolution_pointwise_):
        flop_registry[operation] = _count
