"""The sections of a report, as HTML."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

import numpy
from torch import Tensor

from utils.reporting.confusions import MATRIX_CLASSES, confusions, worst_confusions
from utils.reporting.metrics import wilson_interval
from utils.reporting.report_parts import bar, chart, jpeg, png, table

LABELLED_CLASSES = 40  # up to so many, the confusion matrix has their names at its side
IOU_BINS = 20
CONFUSIONS_LISTED = 200


class Mistake(NamedTuple):
    """A wrong prediction as it is shown: the drawing is uint8 [3, H, W]."""

    drawing: Tensor
    picture: str
    true: str
    predicted: str
    probability: float


def accuracy_section(report: Mapping, *, top5: bool) -> str:
    rows, ranks = [], ("top1", "top5") if top5 else ("top1",)
    for name, values in report["branches"].items():
        cells = [(escape(name), name)]
        for k in ranks:
            low, high = values[f"{k}_interval_95"]
            cells += [(bar(values[k]), values[k]), (f"{low:.1%} to {high:.1%}", low)]
        rows.append(cells)
    titles = [title for k in ranks for title in (f"top-{k[-1]}", "95 % interval")]
    return table(["branch", *titles], rows) + (
        "<p>The prediction is what counts; the branches show which part helps. Intervals are Wilson's.</p>"
    )


def mistakes_section(mistakes: Sequence[Mistake]) -> str:
    if not mistakes:
        return "<p>No test image was classified wrongly.</p>"
    figures = "".join(
        f'<figure><img alt="" src="{jpeg(m.drawing)}"><figcaption><b>{escape(m.predicted)}</b> {m.probability:.1%}, '
        f"it is <b>{escape(m.true)}</b><br><small>{escape(m.picture)}</small></figcaption></figure>"
        for m in mistakes
    )
    return (
        f"<p>The {len(mistakes)} wrong predictions that the network was surest of: often a wrong label, two objects "
        f"or a box beside the object.</p><div class='gallery'>{figures}</div>"
    )


def confusions_section(matrix: Tensor, class_names: Sequence[str]) -> str:
    matrix = matrix.cpu()
    rows = [
        [
            (escape(worst["true"]), worst["true"]),
            (escape(worst["predicted"]), worst["predicted"]),
            (str(worst["count"]), worst["count"]),
            (f"{worst['share']:.0%}", worst["share"]),
        ]
        for worst in worst_confusions(matrix, class_names, CONFUSIONS_LISTED)
    ]
    count = len(confusions(matrix))
    listed = table(["true class", "taken for", "images", "share of the class"], rows) if rows else ""
    more = f"<p>The {len(rows)} most frequent of {count}.</p>" if count > len(rows) else ""
    drawn = _drawn_matrix(matrix.numpy(), class_names) if len(class_names) <= MATRIX_CLASSES else ""
    return drawn + listed + more


def _drawn_matrix(counts: numpy.ndarray, class_names: Sequence[str]) -> str:
    count = len(class_names)
    shares = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    # a square root, so that a single confusion among many images is still seen
    strength = numpy.sqrt(shares)[..., None]
    right = numpy.eye(count, dtype=bool)[..., None]
    colour = numpy.where(right, (0, 110, 70), (200, 40, 20))
    pixels = (255 * (1 - strength) + colour * strength).round().astype(numpy.uint8)
    labels, margin = "", 0.0
    if count <= LABELLED_CLASSES:
        names = [name if len(name) <= 24 else f"{name[:23]}…" for name in class_names]
        margin = 0.4 * max(map(len, names)) + 0.5
        labels = "".join(
            f'<text x="-0.3" y="{i + 0.7}" text-anchor="end">{escape(name)}</text>'
            f'<text transform="translate({i + 0.7} -0.3) rotate(-90)">{escape(name)}</text>'
            for i, name in enumerate(names)
        )
    side = count + margin
    cells = [[[column, n] for column, n in enumerate(row) if n] for row in counts.tolist()]
    # "<" would end the script where a class is called so
    data = json.dumps({"names": list(class_names), "rows": cells}).replace("<", "\\u003c")
    return (
        "<p>Rows: true classes, columns: predictions; green on the diagonal is right, red is wrong, strong is "
        "frequent.</p>"
        '<div id="cell" aria-live="polite">Point at a cell to read it.</div>'
        f'<svg id="matrix" style="max-width:{min(820, 28 * side):.0f}px" '
        f'viewBox="{-margin:.2f} {-margin:.2f} {side:.2f} {side:.2f}" data-count="{count}" role="img" '
        f'aria-label="confusion matrix of {count} classes"><image href="{png(pixels)}" width="{count}" '
        f'height="{count}"/><rect class="frame" height="{count}" width="{count}"/>{labels}'
        f'<rect class="cursor" id="row" height="1" width="{count}"/>'
        f'<rect class="cursor" id="column" width="1" height="{count}"/></svg>'
        f'<script type="application/json" id="matrix-data">{data}</script>'
    )


def classes_section(matrix: Tensor, class_names: Sequence[str]) -> str:
    rows = []
    for label, (name, counts) in enumerate(zip(class_names, matrix.cpu(), strict=True)):
        images, right = int(counts.sum()), int(counts[label])
        others = counts.clone()
        others[label] = 0
        worst = int(others.argmax())
        taken_for = f"{class_names[worst]} ({int(others[worst])})" if others[worst] else ""
        share = right / images if images else -1
        low, high = wilson_interval(right, images)
        rows.append(
            [
                (escape(name), name),
                (str(images), images),
                (bar(share) if images else "no image", share),
                (f"{low:.0%} to {high:.0%}", low),
                (escape(taken_for), taken_for),
            ]
        )
    return table(["class", "test images", "accuracy", "95 % interval", "most often taken for"], rows)


def localization_section(report: Mapping, overlaps: Tensor | None) -> str:
    if not report["boxes"] or overlaps is None:
        return "<p>No true boxes, or a system without object boxes: nothing to measure.</p>"
    counts = (overlaps.double() * IOU_BINS).long().clamp(0, IOU_BINS - 1).bincount(minlength=IOU_BINS).tolist()
    bars = [(n / IOU_BINS, (n + 1) / IOU_BINS, count) for n, count in enumerate(counts)]
    text = (
        f"Overlap (intersection over union) of the predicted with the true box: mean {report['boxes']['mean']:.3f}, "
        f"0.5 or more for {report['boxes']['share_at_0.5']:.1%} of the {len(overlaps)} images that have a true one."
    )
    highest = max(counts)
    shapes = "".join(
        f'<rect class="{"good" if low >= 0.5 else "poor"}" x="{low * 400 + 1:.1f}" '
        f'y="{200 - 190 * count / highest:.1f}" width="{400 / IOU_BINS - 2:.1f}" height="{190 * count / highest:.1f}">'
        f"<title>{low:.2f} to {high:.2f}: {count} images</title></rect>"
        for low, high, count in bars
    )
    return f"<p>{text}</p>" + chart(shapes, "intersection over union", f"images (highest bar: {highest})")


def calibration_section(calibration: Mapping) -> str:
    shapes, total = "", max(sum(entry["count"] for entry in calibration["bins"]), 1)
    for entry in calibration["bins"]:
        if not entry["count"]:
            continue
        x, width = entry["low"] * 400, (entry["high"] - entry["low"]) * 400
        height = entry["accuracy"] * 200
        tip = (
            f"probability {entry['low']:.0%} to {entry['high']:.0%}: {entry['count']} predictions, "
            f"{entry['accuracy']:.1%} of them right"
        )
        shapes += (
            f'<rect class="good" opacity="{0.35 + 0.65 * (entry["count"] / total) ** 0.5:.2f}" x="{x + 1:.1f}" '
            f'y="{200 - height:.1f}" width="{width - 2:.1f}" height="{height:.1f}"><title>{tip}</title></rect>'
            f'<circle cx="{entry["probability"] * 400:.1f}" cy="{200 - height:.1f}" r="3"/>'
        )
    shapes += '<line class="ideal" x1="0" y1="200" x2="400" y2="0"/>'
    return (
        f"<p>Expected calibration error {calibration['expected_error']:.1%}. Bars below the dashed line: the network "
        "is surer than it should be. Strong bars hold more of the predictions.</p>"
        + chart(shapes, "probability of the prediction", "share that is right")
    )


def settings_section(settings: Mapping) -> str:
    rows = [
        [(escape(name), name), (f"<code>{escape(str(value))}</code>", str(value))] for name, value in settings.items()
    ]
    return table(["setting", "value"], rows)
