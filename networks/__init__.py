"""The systems, built from their parts: `build_network("sgkrl", num_classes=200)`."""

from __future__ import annotations

from torch import nn

from networks.backbone import STRIDE, Backbone
from networks.mmal import MMALNet
from networks.resnet import ResNetClassifier
from networks.sgkrl import SGKRL
from networks.windows import resolve_window_set

MODELS = ("resnet", "mmal", "sgkrl")


def build_network(
    model: str,
    *,
    num_classes: int,
    backbone: str = "resnet50",
    pretrained: str | None = None,
    stride_on_first_conv: bool = False,
    input_size: int = 448,
    windows: str | tuple = "birds",
    wiring: str = "trained",
    graph_scope: str = "image",
    dropout: float = 0.5,
    answer: tuple[str, ...] | None = None,
) -> nn.Module:
    """Build one of the systems; settings that a system does not have are ignored by it.

    `input_size` is what the backbone sees, in pixels; `forward` takes pictures of that size or larger ones. `windows`
    is the name of a window set or a set of one's own (see `networks.windows`). `answer` names the branches whose mean
    probability is the system's answer (None: the system's own choice). Raises ValueError for what cannot be built.
    """
    if model not in MODELS:
        raise ValueError(f"unknown model {model!r}; choose one of {', '.join(MODELS)}")
    if num_classes < 2:
        raise ValueError(f"{num_classes} classes came; at least 2 are needed to tell apart")
    if input_size % STRIDE or input_size < 3 * STRIDE:
        raise ValueError(f"input_size {input_size} came; a multiple of {STRIDE} from {3 * STRIDE} up is needed")
    if model != "resnet":
        resolve_window_set(windows)  # before weights are downloaded
    trunk = Backbone(backbone, pretrained=pretrained, stride_on_first_conv=stride_on_first_conv)
    if model == "resnet":
        network = ResNetClassifier(trunk, num_classes, input_size=input_size, dropout=dropout)
    elif model == "mmal":
        network = MMALNet(trunk, num_classes, input_size=input_size, windows=windows, dropout=dropout)
    else:
        network = SGKRL(
            trunk,
            num_classes,
            input_size=input_size,
            windows=windows,
            wiring=wiring,
            graph_scope=graph_scope,
            dropout=dropout,
        )
    if answer is not None:
        choices = [branch for branch in network.branches if branch != "window"]
        if not answer or not set(answer) <= set(choices):
            raise ValueError(f"answer {answer!r} came for {model}; choose from its branches {', '.join(choices)}")
        network.answer = tuple(answer)
    return network
