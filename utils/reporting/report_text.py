"""What a run and an evaluation print."""

from __future__ import annotations

import math
from collections.abc import Sequence

from networks.outputs import ENSEMBLINGS
from networks.system import System
from utils.reporting.report import epoch_of, of_classes_with_images, order_where_it_matters, shows_top5


def weights_of_branches(network: System) -> dict[str, float] | None:
    """Return the learnt weight of each branch in a system's prediction; None where none are learnt."""
    if network.ensemble_weights is None:
        return None
    return dict(zip(network.prediction, network.ensemble_weights.tolist(), strict=True))


def ensembled_text(network: System, views: int, names: Sequence[str] | None) -> str:
    """Return in words what a system's prediction is, over so many views of these names."""
    weights = weights_of_branches(network) or {}
    branches = [f"{branch} ({weights[branch]:.2f})" if weights else branch for branch in network.prediction]
    ensembled = f"{ENSEMBLINGS[network.ensembling]} of {', '.join(branches)}" if len(branches) > 1 else branches[0]
    return ensembled + (f", over {views} views ({', '.join(names)})" if names else "")


def as_text(report: dict) -> str:
    """Return a report's figures as test.py prints them."""
    lines = [
        f"{report['images']} test images{order_where_it_matters(report)}, {epoch_of(report)}",
        f"prediction: {report['prediction']}",
        "",
        f"{'branch':<10}{'top-1':>8}   95 % interval" + (f"    {'top-5':>8}" if shows_top5(report) else ""),
    ]
    for name, values in report["branches"].items():
        low, high = values["top1_interval_95"]
        top5 = f"  {values['top5']:>8.1%}" if shows_top5(report) else ""
        lines.append(f"{name:<10}{values['top1']:>8.1%}   {low:.1%} to {high:.1%}{top5}")
    mean = report["mean_per_class_accuracy"]
    lines += ["", f"mean per-class accuracy of the prediction: {mean:.1%}{of_classes_with_images(report)}"]
    lines.append(f"expected calibration error of the prediction: {report['calibration']['expected_error']:.1%}")
    if report["boxes"]:
        boxes = report["boxes"]
        of = f" ({boxes['images']} images have a true one)" if "images" in boxes else ""
        lines.append(f"object boxes{of}: IoU >= 0.5 for {boxes['share_at_0.5']:.1%}, mean IoU {boxes['mean']:.3f}")
    if report["exited"] is not None:
        lines.append(f"early exit: {report['exited'] / report['images']:.1%} of the images skip the windows")
    lines.append(f"{report['images_per_second']:.1f} images/s")
    if report["worst_confusions"]:
        lines += ["", "most frequent confusions:"]
        lines += [f"  {c['count']} x {c['true']} taken for {c['predicted']}" for c in report["worst_confusions"][:5]]
    return "\n".join(lines)


def report_line(epoch: int, epochs: int, trained: dict, evaluated: dict, speed: float, prefix: str) -> str:
    """Return an epoch's figures in one line."""
    parts = [f"epoch {epoch}/{epochs}", f"loss {trained.get('loss/total', math.nan):.3f}"]
    parts += [] if math.isnan(speed) else [f"{speed:.1f} images/s"]
    return "  ".join([*parts, figures_line(evaluated, prefix)])


def figures_line(evaluated: dict, prefix: str) -> str:
    """Return the figures of an evaluation."""
    parts = [f"{prefix}:"]
    accuracies = {name.removeprefix("accuracy/"): v for name, v in evaluated.items() if name.startswith("accuracy/")}
    parts += [f"{name} {value:.1%}" for name, value in accuracies.items()]
    if "box_iou/share_at_0.5" in evaluated:
        parts.append(f"boxes {evaluated['box_iou/share_at_0.5']:.1%}")
    return "  ".join(parts)
