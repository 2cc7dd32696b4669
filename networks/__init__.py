"""The systems, built from their parts: `build_network("sgkrl", num_classes=200)`.

A system has, besides `forward`:
    branches        the names of its logits
    evaluated       those that evaluation computes, the ones that only serve training left out
    answer          those whose mean probability is its answer, `predict_logits(output)`
    loss_weights    the weight of each of its loss terms (see `networks.losses.loss_terms`)
    input_size      side in pixels of what the backbone sees
    heads()         the parts that start from random weights
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from networks.backbone import STRIDE, Backbone
from networks.flrdf import FLRDF
from networks.mmal import MMALNet
from networks.outputs import SEVERAL_PER_IMAGE
from networks.parts import ANCHOR_SIZES
from networks.resnet import ResNetClassifier
from networks.scrim import SCRIM
from networks.sgkrl import SGKRL
from networks.windows import resolve_window_set
from utils.errors import UserError

MODELS = ("resnet", "mmal", "sgkrl", "flrdf", "scrim")


def build_network(
    model: str,
    *,
    num_classes: int,
    backbone: str = "resnet50",
    pretrained: str | None = None,
    stride_on_first_conv: bool = False,
    batch_norm: str = "shared",
    input_size: int = 448,
    dropout: float = 0.5,
    answer: tuple[str, ...] | None = None,
    windows: str | tuple = "birds",
    wiring: str = "trained",
    graph_scope: str = "image",
    graph_neighbours: int = 3,
    graph_edges: str = "equal",
    graph_residual: bool | None = None,
    spatial_weights: str | None = None,
    without: tuple[str, ...] = (),
    crop_gradient: bool = False,
    localization_stride: int = STRIDE,
    localization_threshold: float = 1.0,
    suppression: str | float = "learnable",
    classify_suppressed: bool = True,
    box_agreement: bool = False,
    jigsaw_blocks: int = 2,
    coarse_channels: int = 1024,
    part_proposals: int = 6,
    parts_in_answer: int = 4,
    part_max_iou: float = 0.25,
    parts_of_every_level: bool = True,
    anchor_sizes: Sequence[int] = ANCHOR_SIZES,
) -> nn.Module:
    """Build one of the systems; settings that a system does not have are ignored by it.

    `input_size` is what the backbone sees, in pixels; `forward` takes pictures of that size or larger ones. `answer`
    names the branches whose mean probability is the system's answer (None: the system's own choice). `windows` is the
    name of a window set or a set of one's own (see `networks.windows`). The settings after it are explained in the
    systems' own files. Raises UserError for what cannot be built.
    """
    if model not in MODELS:
        raise UserError(f"unknown model {model!r}; choose one of {', '.join(MODELS)}")
    if num_classes < 2:
        raise UserError(f"{num_classes} classes came; at least 2 are needed to tell apart")
    if input_size % STRIDE or input_size < 3 * STRIDE:
        raise UserError(f"input_size {input_size} came; a multiple of {STRIDE} from {3 * STRIDE} up is needed")
    if model in ("mmal", "sgkrl"):
        resolve_window_set(windows)  # before weights are downloaded
    trunk = Backbone(backbone, pretrained=pretrained, stride_on_first_conv=stride_on_first_conv, batch_norm=batch_norm)
    common = {"input_size": input_size, "dropout": dropout}
    located = common | {"localization_stride": localization_stride, "localization_threshold": localization_threshold}
    if model == "resnet":
        network = ResNetClassifier(trunk, num_classes, **common)
    elif model == "mmal":
        network = MMALNet(trunk, num_classes, windows=windows, **located)
    elif model == "sgkrl":
        network = SGKRL(
            trunk,
            num_classes,
            windows=windows,
            wiring=wiring,
            graph_scope=graph_scope,
            graph_neighbours=graph_neighbours,
            graph_edges=graph_edges,
            graph_residual=graph_residual,
            spatial_weights=spatial_weights,
            without=without,
            crop_gradient=crop_gradient,
            **located,
        )
    elif model == "flrdf":
        network = FLRDF(
            trunk,
            num_classes,
            suppression=suppression,
            classify_suppressed=classify_suppressed,
            box_agreement=box_agreement,
            jigsaw_blocks=jigsaw_blocks,
            **located,
        )
    else:
        network = SCRIM(
            trunk,
            num_classes,
            coarse_channels=coarse_channels,
            part_proposals=part_proposals,
            parts_in_answer=parts_in_answer,
            part_max_iou=part_max_iou,
            parts_of_every_level=parts_of_every_level,
            anchor_sizes=anchor_sizes,
            **common,
        )
    if answer is not None:
        choices = [branch for branch in network.evaluated if branch not in SEVERAL_PER_IMAGE]
        if not answer or not set(answer) <= set(choices):
            raise UserError(f"answer {answer!r} came for {model}; choose from its branches {', '.join(choices)}")
        network.answer = tuple(answer)
    return network
