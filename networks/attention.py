"""Semantic-guided fusion of feature maps and channel/spatial semantic weighting.

Cross-attention: Vaswani et al., "Attention Is All You Need", NeurIPS 2017. Gates: Woo, Park, Lee & Kweon, "CBAM:
Convolutional Block Attention Module", ECCV 2018, with the 3x3 spatial convolution of the published SG-KRL code.
The residual form of the fusion and the identity start of the gates are ours: from a random start, both spoil the
pretrained maps that they are given, and with them the object boxes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.classifier import NEARLY_ZERO
from networks.outputs import Features
from networks.precision import at_least_float32


class CrossAttention(nn.Module):
    """Every cell of a deep map gathers what it needs from all cells of a shallower one, averaged to its grid.

    SG-KRL's `fuse(high, low)`. `normalise` standardises each cell's vector before the projections: the stages of a
    trunk differ in scale by orders of magnitude, which saturates the softmax.
    """

    def __init__(
        self,
        high_channels: int,
        low_channels: int,
        out_channels: int,
        *,
        heads: int,
        head_channels: int,
        dropout: float = 0.2,
        normalise: bool = False,
    ):
        super().__init__()
        width = heads * head_channels
        self.heads = heads
        self.dropout = dropout
        self.high_norm = nn.LayerNorm(high_channels) if normalise else nn.Identity()
        self.low_norm = nn.LayerNorm(low_channels) if normalise else nn.Identity()
        self.query = nn.Linear(high_channels, width)
        # A softmax ignores what all keys have in common: a bias here can never learn. The published layer has one.
        self.key = nn.Linear(low_channels, width, bias=not normalise)
        self.value = nn.Linear(low_channels, width)
        self.out = nn.Linear(width, out_channels)

    def forward(self, high: Tensor, low: Tensor) -> Tensor:
        """Fuse high [B, C_high, g, g] with low [B, C_low, H, W], which is pooled to g x g; returns [B, C_out, g, g]."""
        B, _, rows, columns = high.shape
        low = F.adaptive_avg_pool2d(low, (rows, columns))
        high_cells = self.high_norm(high.flatten(2).transpose(1, 2))  # [B, g*g, C_high]
        low_cells = self.low_norm(low.flatten(2).transpose(1, 2))  # [B, g*g, C_low]
        attended = F.scaled_dot_product_attention(
            self._split_heads(self.query(high_cells)),
            self._split_heads(self.key(low_cells)),
            self._split_heads(self.value(low_cells)),
            dropout_p=self.dropout if self.training else 0.0,
        )  # [B, heads, g*g, head_channels]
        fused = self.out(attended.transpose(1, 2).flatten(2))  # [B, g*g, C_out]
        return fused.transpose(1, 2).reshape(B, -1, rows, columns)

    def _split_heads(self, cells: Tensor) -> Tensor:
        return cells.unflatten(2, (self.heads, -1)).transpose(1, 2)


class SemanticFusion(nn.Module):
    """Joins the final map with what it attends to in stages 3 and 2 (SG-KRL).

    `residual=False`, as published: the three maps side by side, [B, C3 + C2 + C, g, g]. `residual=True`: the attended
    maps are added to the final one and rectified, [B, C, g, g]. It starts as the final map itself, and its channel sum
    stays what localization needs: large where the network sees the object.
    """

    def __init__(self, channels: dict[str, int], *, residual: bool, dropout: float = 0.2):
        super().__init__()
        self.residual = residual
        final = channels["final"]
        options = {"heads": 8, "dropout": dropout, "normalise": residual}
        stage3_out, stage2_out = (final, final) if residual else (channels["stage3"], channels["stage2"])
        self.stage3 = CrossAttention(final, channels["stage3"], stage3_out, head_channels=64, **options)
        self.stage2 = CrossAttention(final, channels["stage2"], stage2_out, head_channels=32, **options)
        self.out_channels = final if residual else final + stage3_out + stage2_out
        if residual:
            for attention in (self.stage3, self.stage2):
                nn.init.normal_(attention.out.weight, std=NEARLY_ZERO)
                nn.init.zeros_(attention.out.bias)

    def forward(self, features: Features) -> Tensor:
        """Return the fused map [B, out_channels, g, g]."""
        from_stage3 = self.stage3(features.final, features.stage3)
        from_stage2 = self.stage2(features.final, features.stage2)
        if self.residual:
            return F.relu(features.final + from_stage3 + from_stage2)
        return torch.cat([from_stage3, from_stage2, features.final], dim=1)


class ChannelGate(nn.Module):
    """Weights each channel of a map by a number read from the channel's mean and maximum.

    `identity_start` doubles the sigmoid and starts its argument at zero, so that every weight starts as 1.
    """

    def __init__(self, channels: int, *, reduction: int = 16, identity_start: bool = False):
        super().__init__()
        self.scale = 2.0 if identity_start else 1.0
        reduced = max(channels // reduction, 1)
        self.mlp = nn.Sequential(
            nn.Conv2d(channels, reduced, kernel_size=1, bias=False),
            nn.ReLU(),
            nn.Conv2d(reduced, channels, kernel_size=1, bias=False),
        )
        if identity_start:
            nn.init.normal_(self.mlp[2].weight, std=NEARLY_ZERO)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, H, W] to [B, C, H, W]."""
        mean, maximum = x.mean(dim=(2, 3), keepdim=True), x.amax(dim=(2, 3), keepdim=True)
        return x * (self.scale * torch.sigmoid(self.mlp(mean) + self.mlp(maximum)))


class SpatialGate(nn.Module):
    """Weights each cell of a map by a number read from its neighbourhood's channel mean and maximum.

    `relative` weights say where and not how much. They are divided by their mean in the picture: a gate that may scale
    the whole map learns to open everywhere, which only makes the classifier behind it too sure of itself. And they are
    read from how far mean and maximum stand out from the picture's own, with the border repeated: read from the values
    themselves they learnt to point into a corner of a small grid, with a border of zeros and with a repeated one.
    """

    def __init__(self, *, identity_start: bool = False, relative: bool = False):
        super().__init__()
        self.scale = 2.0 if identity_start else 1.0
        self.relative = relative
        padding_mode = "replicate" if relative else "zeros"
        self.conv = nn.Conv2d(2, 1, kernel_size=3, padding=1, padding_mode=padding_mode, bias=False)
        if identity_start:
            nn.init.normal_(self.conv.weight, std=NEARLY_ZERO)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, H, W] to [B, C, H, W]."""
        summary = torch.cat([x.mean(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)], dim=1)
        if not self.relative:
            return x * (self.scale * torch.sigmoid(self.conv(summary)))
        logits = self.conv(F.layer_norm(summary, summary.shape[2:]))  # standardised over the cells of the picture
        # The sigmoids divided by their mean, without computing either: where the gate has closed, both round to zero.
        logits = at_least_float32(logits)
        shares = F.logsigmoid(logits).flatten(2).softmax(dim=2).view_as(logits)  # of each cell, together 1
        return x * (shares * (shares.shape[2] * shares.shape[3])).to(x.dtype)


class SemanticWeighting(nn.Module):
    """Channel weighting, then spatial weighting."""

    def __init__(self, channels: int, *, identity_start: bool = False, relative: bool = False):
        super().__init__()
        self.channel = ChannelGate(channels, identity_start=identity_start)
        self.spatial = SpatialGate(identity_start=identity_start, relative=relative)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, H, W] to [B, C, H, W]."""
        return self.spatial(self.channel(x))
