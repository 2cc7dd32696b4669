"""What passes between a network and the rest of the code: the output contract.

Batch-first tensors, dicts of them, and None, in NamedTuples, so that `nn.DataParallel` can gather an output and
`torch.compile` can trace it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from networks.trunks.family import Split
from utils.errors import UserError


class Features(NamedTuple):
    """Feature maps of one backbone pass over pictures of H x W pixels; H/16 for H/32 where `last_stride` is 1.

    In a pass that was told to end earlier or to start later (see `Backbone.forward`), what comes after or before is
    None, and so are the last two where they were not asked for.
    """

    stage2: Tensor  # [B, C2, H/8, W/8]
    stage3: Tensor  # [B, C3, H/16, W/16]
    penultimate: Tensor | None  # [B, C, H/32, W/32], after the last stage's second-to-last block; None: it has one
    final: Tensor  # [B, C, H/32, W/32], not negative
    embedding: Tensor  # [B, C], global average of `final`, before dropout
    stage3_split: Split | None = None  # residual and shortcut of the block that makes `stage3`, shaped like it
    final_split: Split | None = None  # the same of `final`


class NetworkOutput(NamedTuple):
    """What every system returns. Boxes are `(x0, y0, x1, y1)` pixel corners whose ends belong to the box.

    This is torchvision's order of corners. The published MMAL-Net and SG-KRL code writes the same inclusive pixels
    rows first, `(row0, col0, row1, col1)`: swap the pairs to compare. Add 1 to x1 and y1 for torchvision's box
    operations, which treat the ends as edges. `networks.crops.boxes_in_image` carries windows from the object crop
    back to the picture.
    """

    logits: dict[str, Tensor]  # branch name -> [B, classes]; "window" and "part" -> [B, N, classes]
    object_boxes: Tensor | None = None  # [B, 4], in the input scaled to input_size x input_size
    window_boxes: Tensor | None = None  # [B, N, 4], in the object crop enlarged to input_size x input_size
    object_masks: Tensor | None = None  # [B, g, g] bool, the adaptive object mask in grid cells
    part_boxes: Tensor | None = None  # [B, N, 4], in the input scaled to input_size x input_size; may reach beyond it
    extras: dict[str, Tensor] | None = None  # what only a loss needs, by name, batch first
    unsure: Tensor | None = None  # [B] bool, with an early exit: images whose windows were looked at; None: all


# Branches with several predictions of an image, one for each of its regions: no single one, only a mean over them.
SEVERAL_PER_IMAGE = ("window", "part")


def requested_branches(branches: tuple[str, ...] | None, available: tuple[str, ...]) -> set[str]:
    """Return the branches asked for (None: all that are available). Raises UserError for one that does not exist."""
    wanted = set(available if branches is None else branches)
    if not wanted or not wanted <= set(available):
        raise UserError(f"branches {branches!r} were asked for; choose from {', '.join(available)}")
    return wanted


def detached(output: NetworkOutput) -> NetworkOutput:
    """Return an output without the graph that it was computed by."""
    return NetworkOutput(*map(_detached, output))


def _detached(field: dict[str, Tensor] | Tensor | None) -> dict[str, Tensor] | Tensor | None:
    if isinstance(field, dict):
        return {name: value.detach() for name, value in field.items()}
    return None if field is None else field.detach()


# How the logits of several branches become one prediction, and what that is called in reports
ENSEMBLINGS = {
    "mean_probability": "mean probability",
    "mean_logits": "mean of logits",
    "sum_logits": "sum of logits",
    "learned": "weighted sum of the log-probabilities",
}


def combine_branches(
    output: NetworkOutput,
    branches: tuple[str, ...],
    ensembling: str = "mean_probability",
    weights: Tensor | None = None,
) -> Tensor:
    """Return the prediction of `branches` as logits [B, classes]; of one branch, its logits as they are.

    `weights` [branches]: see `combine_logits`.
    """
    if len(branches) == 1:
        return output.logits[branches[0]]
    return combine_logits(torch.stack([output.logits[name].float() for name in branches]), ensembling, weights)


def combine_logits(logits: Tensor, ensembling: str, weights: Tensor | None = None) -> Tensor:
    """Return the logits [B, classes] that those of N members, [N, B, classes], have together.

    `mean_probability`: the logarithm of the mean class probability; `mean_logits` and `sum_logits` of the logits;
    `learned`: the sum of the log-probabilities, each member's times its weight, of `weights` [N] (None: 1/N each).
    """
    if ensembling == "mean_probability":
        return torch.logsumexp(logits.log_softmax(-1), dim=0) - math.log(len(logits))
    if ensembling == "learned":
        members = logits.log_softmax(-1)
        return members.mean(dim=0) if weights is None else (weights[:, None, None] * members).sum(dim=0)
    return logits.mean(dim=0) if ensembling == "mean_logits" else logits.sum(dim=0)


def object_confidence(logits: dict[str, Tensor]) -> Tensor:
    """Return [B] float32: the probability that the `object` branch gives to its first choice."""
    return logits["object"].float().softmax(dim=-1).amax(dim=-1)


SKIPPED_BY_EXIT = ("window", "graph")  # branches that sure images do without, with an early exit


def early_prediction(
    logits: dict[str, Tensor],
    prediction: tuple[str, ...],
    ensembling: str = "mean_probability",
    weights: Tensor | None = None,
) -> Tensor:
    """Return [B, classes] logits: the prediction of those of its branches that need no windows.

    For a sum of logits their mean, and of `weights`, those of the branches of `prediction`, their shares of the sum of
    those left: so a branch that repeats it makes the prediction neither smaller nor larger. Where all of these are 0,
    the branches count alike.
    """
    ensembling = "mean_logits" if ensembling == "sum_logits" else ensembling
    branches = tuple(name for name in prediction if name not in SKIPPED_BY_EXIT) or ("object",)
    if weights is not None and len(branches) > 1:
        left = torch.stack([weights[prediction.index(name)] for name in branches])
        weights = torch.where(left.sum() > 0, left / left.sum(), 1 / len(branches))
    return combine_branches(NetworkOutput(logits), branches, ensembling, weights)
