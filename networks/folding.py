"""Networks that only predict: batch norm folded into the convolutions before it, weights cast once and for all."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import TypeVar

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from networks.backbone import Backbone

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
    """Cast, in place, the trunk's weights that autocast to `dtype` would cast anew in every pass; returns the network.

    Those of its convolutions and linear layers. Under that autocast the network computes the same, bit for bit; without
    it, it no longer runs. Heads stay as they are: some compute in float32 on purpose.
    """
    for trunk in network.modules():
        if isinstance(trunk, Backbone):
            for module in trunk.modules():
                if type(module) in (nn.Conv2d, nn.Linear):
                    module.to(dtype)
    return network
