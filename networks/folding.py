"""Networks that only predict: batch norm folded into the convolutions before it, weights cast once and for all."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import TypeVar

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

IN_ORDER = (nn.Sequential, BasicBlock, Bottleneck, ResNet)  # these apply what they hold as it was registered

Network = TypeVar("Network", bound=nn.Module)


def fold_batch_norm(network: Network) -> Network:
    """Return a copy in evaluation mode whose convolutions contain the batch norms that follow them.

    Those of nn.Sequential, of torchvision's ResNets, and of modules that say with an attribute `applies_in_order` that
    a batch norm gets what the convolution registered before it gives. All others stay as they are, and so do batch
    norms that normalise each pass in their own way. The copy computes the same up to rounding and cannot be trained any
    more: its parameters need no gradient. The weights keep device, precision and memory layout.
    """
    folded = copy.deepcopy(network).eval().requires_grad_(False)
    for module in folded.modules():
        if not isinstance(module, IN_ORDER) and not getattr(module, "applies_in_order", False):
            continue
        for (name, child), (next_name, next_child) in pairwise(list(module.named_children())):
            if not isinstance(child, nn.Conv2d) or not isinstance(next_child, nn.BatchNorm2d):
                continue
            if child.out_channels == next_child.num_features:
                setattr(module, name, fuse_conv_bn_eval(child, next_child))
                setattr(module, next_name, nn.Identity())
    return folded


def cast_for_autocast(network: Network, dtype: torch.dtype) -> Network:
    """Cast, in place, the weights that autocast to `dtype` would cast anew in every forward pass; returns the network.

    Those of convolutions and linear layers, not of subclasses, which the classifiers are, nor of modules that say with
    an attribute `computes_in_float32` that they do so whatever autocast is. Under that autocast the network computes
    the same, bit for bit; without it, it no longer runs.
    """
    precise = [module for module in network.modules() if getattr(module, "computes_in_float32", False)]
    kept = {part for module in precise for part in module.modules()}
    for module in network.modules():
        if type(module) in (nn.Conv2d, nn.Linear) and module not in kept:
            module.to(dtype)
    return network
