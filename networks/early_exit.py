"""Images that are sure of their class after the object pass skip the windows, the most expensive part of evaluation.

Ours; after the early exits of Teerapittayanon, McDanel & Kung, "BranchyNet: Fast Inference via Early Exiting from Deep
Neural Networks", ICPR 2016. Training learns a threshold that hardly costs accuracy: `utils.training.exit_learning`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from networks.outputs import early_prediction, object_confidence
from networks.system import System

Look = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def look_where_unsure(
    system: System, look: Look, seen: Tensor, window_boxes: Tensor, logits: dict[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return what `look(seen, window_boxes)` does, logits `window` [B, N, classes] and `graph` [B, classes].

    In evaluation, where the system has an `exit_threshold` below 1, only images whose `object` branch is at most so
    sure are looked at, for which the host waits for the device; the logits of the others repeat the prediction of the
    branches before the windows. Which images are unsure, [B] bool, comes with them: None where all were looked at.
    """
    if system.training or system.exit_threshold >= 1:
        return *look(seen, window_boxes), None
    # cloned, as it may be the logits of a branch itself
    graph = early_prediction(logits, system.prediction, system.ensembling, system.ensemble_weights).float().clone()
    window = graph[:, None].repeat(1, window_boxes.shape[1], 1)
    unsure = object_confidence(logits) <= system.exit_threshold
    places = unsure.nonzero().squeeze(1)
    if len(places):
        window[places], graph[places] = (found.float() for found in look(seen[places], window_boxes[places]))
    return window, graph, unsure
