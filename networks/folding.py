"""Networks that only predict: batch norm folded into the convolutions before it, weights cast once and for all."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import TypeVar

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

Network = TypeVar("Network", bound=nn.Module)


def fold_batch_norm(network: Network) -> Network:
    """Return a copy in evaluation mode whose convolutions contain the batch norms that follow them.

    A batch norm is taken to follow the convolution registered just before it in the same module, as in torchvision's
    ResNets; one that normalises anything else, or each pass in its own way, stays as it is. The copy computes the same
    up to rounding and cannot be trained any more: its parameters need no gradient. The weights keep device, precision
    and memory layout.
    """
    folded = copy.deepcopy(network).eval().requires_grad_(False)
    for module in folded.modules():
        for (name, child), (next_name, next_child) in pairwise(list(module.named_children())):
            if not isinstance(child, nn.Conv2d) or not isinstance(next_child, nn.BatchNorm2d):
                continue
            if child.out_channels == next_child.num_features:
                setattr(module, name, fuse_conv_bn_eval(child, next_child))
                setattr(module, next_name, nn.Identity())
    return folded


def cast_for_autocast(network: Network, dtype: torch.dtype) -> Network:
    """Cast, in place, the weights that autocast to `dtype` would cast anew in every forward pass; returns the network.

    Those of convolutions and linear layers, not of subclasses, which the classifiers are. Under that autocast the
    network computes the same, bit for bit; without it, it no longer runs.
    """
    for module in network.modules():
        if type(module) in (nn.Conv2d, nn.Linear):
            module.to(dtype)
    return network
