"""When to look no further: how sure an image must be to skip the passes that are left, and what that saves."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from networks.outputs import NetworkOutput, early_prediction, object_confidence
from networks.system import System
from utils.errors import UserError


class ExitPoint(NamedTuple):
    """What one threshold does to a set of images."""

    threshold: float  # images surer than this exit
    share: float  # of the images that do
    accuracy: float
    cost: float  # backbone passes per image, in passes over one picture of input_size


class ExitCollector:
    """Collects batch by batch what exiting early would do to each image.

    The network must compute all its branches meanwhile: its `exit_threshold` is 1.
    """

    def __init__(self, network: System) -> None:
        self.network = network
        self._judged: list[tuple[Tensor, ...]] = []  # of each batch [n] each: confidence, right early, right after all

    def __call__(self, batch: Any, output: NetworkOutput, prediction: Tensor) -> None:
        """Take a batch of `datasets`, as `on_batch` of `training.engine.evaluate`."""
        self.add(output.logits, batch.labels.to(prediction.device))

    def add(self, logits: Mapping[str, Tensor], labels: Tensor) -> None:
        """Take the logits of a batch, of `object` and the branches of the prediction, and its labels [B]."""
        network, device = self.network, next(self.network.parameters()).device
        logits = {name: logits[name].to(device) for name in {*network.prediction, "object"}}
        early = early_prediction(logits, network.prediction, network.ensembling, network.ensemble_weights)
        full = network.predict_logits(NetworkOutput(logits))
        right = (prediction.argmax(dim=1) == labels.to(device) for prediction in (early, full))
        self._judged.append((object_confidence(logits), *right))

    def collected(self) -> list[Tensor]:
        """Return, [n] each on the CPU, how sure each image is, and whether it is right early, and in the end."""
        none = torch.empty(0), *torch.empty(2, 0, dtype=torch.bool)
        return [torch.cat([value.cpu() for value in values]) for values in zip(none, *self._judged, strict=True)]

    def curve(self) -> list[ExitPoint]:
        """Return `exit_curve` of all images seen."""
        early, window = costs_of_passes(self.network)
        return exit_curve(*self.collected(), early_cost=early, rest_cost=self.network.window_selector.count * window)


def costs_of_passes(network: System) -> tuple[float, float]:
    """Return what the trunk computes for an image before its windows, and for one window.

    In plain passes over one picture of input_size. Before the windows come the picture in its `raw_size`, on the finer
    map where objects are found on that, a frozen copy's look for the object where there is one (then the picture is
    left out where the prediction does without its branches), and the object.
    """
    backbone = copy.deepcopy(network.backbone).to("meta", torch.float32)  # to count operations, not to do them

    def count(side: int, **how: Any) -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            backbone(torch.empty(1, 3, side, side, device="meta"), **how)
        return counter.get_total_flops()

    side = network.input_size
    plain = count(side)
    before = plain
    if network.colocalization is None or {"raw", "fused"} & set(network.prediction):
        before += count(network.raw_size, dense=network.localization_stride < backbone.stride)
    if network.colocalization is not None:
        before += count(network.colocalization.size)
    window = count(side // 2)
    if getattr(network.options, "window_source", "pixels") == "stage3":
        window -= count(side // 2, until="stage3")
    return before / plain, window / plain


def exit_curve(
    confidence: Tensor, early_correct: Tensor, full_correct: Tensor, *, early_cost: float, rest_cost: float
) -> list[ExitPoint]:
    """Return accuracy against cost for every threshold that tells these images apart, from all exiting to none.

    Args:
        confidence: [n] in 0 .. 1, how sure each image is where it could exit.
        early_correct, full_correct: [n] bool, whether its prediction is right there, and after everything.
        early_cost, rest_cost: cost of an image up to there, and of the rest.

    Raises UserError without images.
    """
    images = len(confidence)
    if not images:
        raise UserError("there is no image; expected at least one for a curve of accuracy against cost")
    order = confidence.double().argsort(descending=True, stable=True)
    confidence = confidence.double()[order]
    zero = torch.zeros(1, dtype=torch.long)
    right = torch.cat([zero, early_correct[order].long().cumsum(0)])  # of the k surest, by their early predictions
    right += torch.cat([full_correct[order].long().flip(0).cumsum(0).flip(0), zero])  # and of the others
    points = [
        # The k surest exit: the threshold is the confidence of the first one that does not.
        ExitPoint(threshold, k / images, correct / images, early_cost + rest_cost * (1 - k / images))
        for k, (threshold, correct) in enumerate(zip([*confidence.tolist(), 0.0], right.tolist(), strict=True))
        if k == 0 or threshold < confidence[k - 1]
    ]
    points[0] = points[0]._replace(threshold=1.0)
    return points[::-1]


def choose_threshold(curve: list[ExitPoint]) -> ExitPoint:
    """Return the cheapest point that is right as often as if no image exited."""
    return min((point for point in curve if point.accuracy >= curve[-1].accuracy), key=lambda point: point.cost)


def curve_text(curve: list[ExitPoint], chosen: ExitPoint, rows: int = 9) -> str:
    """The curve as a table of about so many rows, evenly spread over the share of exits, the chosen one marked."""
    steps = {round(i * (len(curve) - 1) / max(rows - 1, 1)) for i in range(rows)} | {curve.index(chosen)}
    lines = [f"{'threshold':>11}{'skip windows':>14}{'accuracy':>10}{'passes per image':>18}"]
    for step in sorted(steps):
        point = curve[step]
        mark = "  <- chosen" if point == chosen else ""
        # nine digits tell float32 numbers apart: what is printed exits as many when it is given
        lines.append(f"{point.threshold:>11.9g}{point.share:>14.1%}{point.accuracy:>10.1%}{point.cost:>18.2f}{mark}")
    return "\n".join(lines)
