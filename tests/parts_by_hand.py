"""Part proposals and their anchors, one box at a time: the slow obvious versions."""

from __future__ import annotations

import numpy as np
import reference
import torch
from torch import Tensor

from networks.parts import CoarsePart

# As published for 448 pixels: stride, size, scales.
ANCHOR_RULE = (
    (32, 48, (2 ** (1 / 3), 2 ** (2 / 3))),
    (64, 96, (2 ** (1 / 3), 2 ** (2 / 3))),
    (128, 192, (1, 2 ** (1 / 3), 2 ** (2 / 3))),
)
FORMER_SCALES = ((1, 2 ** (1 / 3)), (1, 2 ** (1 / 3)), (1, 2 ** (1 / 3), 2 ** (2 / 3)))  # of older runs of SCRIM
RATIOS = (2 / 3, 1, 3 / 2)
COUNTS = {96: 87, 128: 129, 160: 240, 224: 426, 256: 516, 448: 1614}  # 6 g^2 + 6 ceil(g / 2)^2 + 9 ceil(g / 4)^2


def list_anchors(
    input_size: int, sizes: tuple[int, ...] = (48, 96, 192), scales: tuple | None = None
) -> list[dict[str, float]]:
    """Every anchor with its place, centre and sides, and its pixels `x0, y0, x1, y1`, both ends inclusive."""
    anchors = []
    for level, (stride, _, published) in enumerate(ANCHOR_RULE):
        cells = -(-input_size // stride)
        for scale_number, scale in enumerate(published if scales is None else scales[level]):
            for ratio_number, ratio in enumerate(RATIOS):
                side = sizes[level] * scale * input_size / 448
                width, height = side * ratio**0.5, side / ratio**0.5
                for row in range(cells):
                    for column in range(cells):
                        x = min(stride / 2 + column * stride, input_size)
                        y = min(stride / 2 + row * stride, input_size)
                        padding = 10 * input_size  # edges are positive when they are cut down to whole pixels
                        anchors.append(
                            {
                                "level": level,
                                "channel": scale_number * len(RATIOS) + ratio_number,
                                "row": row,
                                "column": column,
                                "x": x,
                                "y": y,
                                "width": width,
                                "height": height,
                                "x0": int(x - width / 2 + padding) - padding,
                                "y0": int(y - height / 2 + padding) - padding,
                                "x1": int(x + width / 2 + padding) - padding - 1,
                                "y1": int(y + height / 2 + padding) - padding - 1,
                            }
                        )
    return anchors


def list_boxes(input_size: int, sizes: tuple[int, ...] = (48, 96, 192), scales: tuple | None = None) -> np.ndarray:
    """int64 `[A, 4]`."""
    anchors = list_anchors(input_size, sizes, scales)
    return np.array([[anchor[name] for name in ("x0", "y0", "x1", "y1")] for anchor in anchors], dtype=np.int64)


def propose(
    scores: np.ndarray,
    boxes: np.ndarray,
    count: int,
    *,
    levels: np.ndarray | None = None,
    max_iou: float = 0.25,
    inclusive: bool = True,
) -> list[int]:
    """Indices of the proposals of one map, the best first.

    With `levels`, the first pick is one of level 0, and so on, as long as the level has one; the last pick is repeated
    where there is none at all to take. `inclusive`: those that overlap it by just `max_iou` are dropped, too.
    """

    def may_stay(best: int, index: int) -> bool:
        overlap = reference.intersection_over_union(boxes[best], boxes[index])
        return overlap < max_iou or overlap == 0 or (overlap == max_iou and not inclusive)

    remaining = sorted(range(len(scores)), key=lambda index: (-float(scores[index]), index))
    kept: list[int] = []
    for step in range(count):
        restricted = levels is not None and count >= 3 and step < 3
        candidates = [index for index in remaining if not restricted or levels[index] == step] or remaining
        if not candidates:
            kept.append(kept[-1])
            continue
        best = candidates[0]
        kept.append(best)
        remaining = [index for index in remaining if index != best and may_stay(best, index)]
    return sorted(kept, key=lambda index: -float(scores[index]))


def gate_by_hand(part: CoarsePart, features: Tensor) -> Tensor:
    """Squeeze and excitation of one map `[C, H, W]`."""
    squeeze, expand = part.gate.fc1, part.gate.fc2
    hidden = torch.relu(squeeze.weight.flatten(1) @ features.mean(dim=(1, 2)) + squeeze.bias)
    gate = 1 / (1 + torch.exp(-(expand.weight.flatten(1) @ hidden + expand.bias)))
    return features * gate[:, None, None]
