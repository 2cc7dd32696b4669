"""The pass over the windows of the object crop: pixels through the whole trunk, or cells through its last stage only.

Cells cut from a map that is there already are what Fast R-CNN classifies its regions by (Girshick, ICCV 2015); which
stages come before and after the cut is ours. Such windows show no more detail than the crop did.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from networks.backbone import Backbone
from networks.crops import crop_cells, crop_windows
from networks.outputs import Features

WindowSource = Literal["pixels", "stage3"]


def cut_from(source: WindowSource, crops: Tensor, cropped: Features) -> Tensor:
    """Return what windows are cut from: the object crops [B, 3, S, S], or the stage-3 map of the pass over them."""
    return crops if source == "pixels" else cropped.stage3


def look_at_windows(
    backbone: Backbone, seen: Tensor, boxes: Tensor, *, source: WindowSource, input_size: int
) -> Tensor:
    """Cut windows [B, N, 4], in input_size pixels of the object crop, out of `seen` and return embeddings [B, N, C].

    `seen` is what `cut_from` returns. Pixels are enlarged to half the input's side, cells to half the map's: then the
    last stage looks at as many cells, and the gradient goes back into the pass that made the map.
    """
    if source == "pixels":
        windows = backbone(crop_windows(seen, boxes, input_size=input_size), kind="part")
    else:
        cells = crop_cells(seen, boxes, seen.shape[-1] // 2, input_size=input_size)
        windows = backbone(cells, kind="part", start="stage3")
    return windows.embedding.unflatten(0, (-1, boxes.shape[1]))
