"""Where a system's prediction comes from: class activation maps of all its passes, laid over the picture.

Zhou, Khosla, Lapedriza, Oliva & Torralba, "Learning Deep Features for Discriminative Localization", CVPR 2016, carried
over to what lies between the maps of a pass that are classified and the class by the gradient: the map times the
gradient, summed over the channels (HiResCAM: Draelos & Carin, "Use HiResCAM instead of Grad-CAM for faithful
explanations", 2020). For a linear classifier of the averaged map that is the class activation map itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.crops import boxes_in_image
from networks.outputs import Features, NetworkOutput, detached
from networks.system import System
from networks.trunks import Split
from networks.views import looks_at_other_view


def forward_with_evidence(
    network: System,
    images: Tensor,
    *,
    size: int = 112,
    mask_background: bool = False,
    branches: tuple[str, ...] | None = None,
) -> tuple[NetworkOutput, Tensor]:
    """Run a system (in eval mode) and return its output, and what speaks for its prediction where: [B, size, size].

    The evidence is float32, not negative, and covers the whole picture; of all passes behind the prediction (picture,
    object, windows or parts) each counts where it looked, per area, with each of its maps that a branch classifies.
    Only its proportions mean something. A branch counts as much as it does in the prediction. Other views of the
    picture, and further crops (`networks.views`), have a say in what is predicted, and no evidence of their own.
    """
    passes: list[tuple[Tensor, ...]] = []

    def begin(*_: object) -> None:
        if not looks_at_other_view(network):
            torch.set_grad_enabled(False)

    def end(backbone: nn.Module, inputs: object, features: Features) -> Features:
        """Let gradients go back to the maps of the pass that a system may classify, and no further."""
        if looks_at_other_view(network):
            return features
        torch.set_grad_enabled(True)
        maps = {name: getattr(features, name) for name in ("stage2", "stage3", "final")}
        maps = {name: _leaf(map_) for name, map_ in maps.items() if map_ is not None}  # a pass may start at stage 3
        splits = {name: getattr(features, name) for name in ("stage3_split", "final_split")}
        splits = {name: Split(*map(_leaf, split)) for name, split in splits.items() if split is not None}
        passes.append((*maps.values(), *(map_ for split in splits.values() for map_ in split)))
        return features._replace(**maps, **splits, embedding=maps["final"].mean(dim=(2, 3)))

    hooks = network.backbone.register_forward_pre_hook(begin), network.backbone.register_forward_hook(end)
    try:
        with torch.enable_grad():
            output = network(images, mask_background=mask_background, branches=branches)
            predicted = network.predict_logits(output).argmax(dim=1, keepdim=True)
            scores = torch.stack([output.logits[name].gather(1, predicted) for name in network.prediction]).float()
            if (weights := network.branch_weights()) is not None:
                scores = scores * weights[:, None, None]
            maps = [map_ for of_pass in passes for map_ in of_pass]
            gradients = dict(zip(maps, torch.autograd.grad(scores.sum(), maps, allow_unused=True), strict=True))
    finally:
        for hook in hooks:
            hook.remove()
    output = detached(output)
    input_size = network.input_size
    evidence = torch.zeros(len(images), size, size, device=images.device)
    # where a frozen trunk finds the object, the picture itself is looked at for the sake of `raw` only
    sees_picture = network.colocalization is None or "raw" in output.logits
    looked_at = _boxes_of_passes(output, len(images), input_size, sees_picture)  # the last of them may be left out
    for of_pass, (rows, boxes) in zip(passes, looked_at, strict=False):
        for map_ in of_pass:
            if (gradient := gradients[map_]) is not None:
                contributions = (map_.detach().float() * gradient.float()).sum(dim=1)  # [B * N, g, g]
                evidence[rows] += _lay_over(contributions.unflatten(0, (len(boxes), -1)), boxes, input_size, size)
    return output, evidence.clamp(min=0)


def _leaf(value: Tensor) -> Tensor:
    """The same values as something that gradients are taken for."""
    return value.detach().requires_grad_()


def _boxes_of_passes(
    output: NetworkOutput, count: int, input_size: int, sees_picture: bool
) -> Sequence[tuple[slice | Tensor, Tensor]]:
    """Which images each pass of the systems looks at, in their order, and where: inclusive boxes [n, N, 4] in these."""
    every = slice(None)
    whole = torch.tensor([0.0, 0.0, input_size - 1, input_size - 1]).expand(count, 1, 4)
    passes = [(every, whole)] if sees_picture else []
    if output.object_boxes is not None:
        passes.append((every, output.object_boxes[:, None]))
        if output.window_boxes is not None:
            rows = every if output.unsure is None else output.unsure
            boxes = boxes_in_image(output.window_boxes, output.object_boxes, input_size)
            passes.append((rows, boxes[rows]))
    if output.part_boxes is not None:
        passes.append((every, output.part_boxes))
    return passes


def _lay_over(contributions: Tensor, boxes: Tensor, input_size: int, size: int) -> Tensor:
    """Spread maps [B, N, g, g] over their boxes [B, N, 4] in pictures of size x size points: their sum [B, size, size].

    A cell's contribution is divided by the area that it covers in the picture.
    """
    B, N, rows, columns = contributions.shape
    boxes = boxes.to(contributions)
    starts, extents = boxes[..., :2], boxes[..., 2:] - boxes[..., :2] + 1  # [B, N, 2], x and y
    points = (torch.arange(size, device=boxes.device) + 0.5) * (input_size / size)
    x = (points - starts[..., :1]) / extents[..., :1] * 2 - 1  # [B, N, size], -1 to 1 across the box
    y = (points - starts[..., 1:]) / extents[..., 1:] * 2 - 1
    shape = (B, N, size, size)
    grid = torch.stack([x[:, :, None, :].expand(shape), y[:, :, :, None].expand(shape)], dim=-1).flatten(0, 1)
    # Cells at the border reach to the edge of the box, and nothing beyond it.
    maps = contributions.reshape(B * N, 1, rows, columns)
    values = F.grid_sample(maps, grid, padding_mode="border", align_corners=False)
    inside = (grid.abs() <= 1).all(dim=-1)
    density = rows * columns * (input_size**2 / extents.prod(dim=-1))  # [B, N]
    return ((values[:, 0] * inside).unflatten(0, (B, N)) * density[..., None, None]).sum(dim=1)
