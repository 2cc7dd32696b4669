"""The report of an evaluation as one HTML file that needs nothing else: it opens offline, anywhere."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy
from PIL import Image
from torch import Tensor

from utils.files import write_text
from utils.reporting.metrics import wilson_interval

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


def write_report(
    path: str | Path,
    report: Mapping[str, object],
    *,
    class_names: Sequence[str],
    matrix: Tensor,
    overlaps: Tensor | None = None,
    mistakes: Sequence[Mistake] = (),
) -> None:
    """Write the page.

    Args:
        path: the file, written whole or not at all.
        report: what test.py writes to report.json.
        class_names: C names, of any characters.
        matrix: [C, C] counts by true (row) and predicted class.
        overlaps: [images] IoU of predicted and true boxes, None where there are none.
        mistakes: the surest wrong predictions, the surest first.
    """
    sections = [
        ("Accuracy", _accuracy(report)),
        ("Surest mistakes", _mistakes(mistakes)),
        ("Confusions", _confusions(matrix, class_names)),
        ("Classes", _classes(matrix, class_names)),
        ("Localization", _localization(report, overlaps)),
        ("Calibration", _calibration(report["calibration"])),
        ("Settings", _settings(_by_name(report["settings"]))),
    ]
    identifiers = [title.lower().replace(" ", "-") for title, _ in sections]
    links = "".join(f'<a href="#{i}">{title}</a>' for i, (title, _) in zip(identifiers, sections, strict=True))
    body = "".join(
        f'<section id="{i}"><h2>{title}</h2>{content}</section>'
        for i, (title, content) in zip(identifiers, sections, strict=True)
    )
    title = escape(str(report["checkpoint"]))
    subtitle = escape(f"epoch {report['epoch']}, chosen by {report['selected_on']}; prediction: {report['prediction']}")
    # The policy keeps the page to itself whatever a class is called.
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    page = (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head><body><header><h1>{title}</h1><p>{subtitle}</p>"
        f"{_tiles(report)}<nav>{links}</nav></header><main>{body}</main><script>{SCRIPT}</script></body></html>\n"
    )
    write_text(path, page)


def order_where_it_matters(report: Mapping) -> str:
    """Say in which order the test images were read if predictions depend on it, else nothing."""
    return f", {report['order']}" if _by_name(report["settings"]).get("graph_scope") == "batch" else ""


def _by_name(settings: Mapping) -> dict[str, object]:
    """Return all settings, the system's own `options` among the others."""
    shared = {name: value for name, value in settings.items() if name != "options"}
    return {**shared, **settings.get("options", {})}


# ---- Sections -------------------------------------------------------------------------------------------------------


def _tiles(report: Mapping) -> str:
    prediction = report["branches"]["prediction"]
    low, high = prediction["top1_interval_95"]
    tiles = [
        (f"{prediction['top1']:.1%}", f"top-1 of the prediction, 95 % interval {low:.1%} to {high:.1%}"),
        (f"{report['mean_per_class_accuracy']:.1%}", "mean accuracy of the classes"),
        (f"{report['calibration']['expected_error']:.1%}", "expected calibration error"),
        (f"{report['images']}", f"test images{order_where_it_matters(report)}"),
        (f"{report['images_per_second']:.1f}", "images a second"),
    ]
    if report["boxes"]:
        tiles.insert(2, (f"{report['boxes']['share_at_0.5']:.1%}", "object boxes with IoU of 0.5 or more"))
    return '<div class="tiles">' + "".join(f"<div><b>{value}</b>{text}</div>" for value, text in tiles) + "</div>"


def _accuracy(report: Mapping) -> str:
    rows = []
    for name, values in report["branches"].items():
        cells = [(escape(name), name)]
        for k in ("top1", "top5"):
            low, high = values[f"{k}_interval_95"]
            cells += [(_bar(values[k]), values[k]), (f"{low:.1%} to {high:.1%}", low)]
        rows.append(cells)
    return _table(["branch", "top-1", "95 % interval", "top-5", "95 % interval"], rows) + (
        "<p>The prediction is what counts; the branches show which part helps. Intervals are Wilson's.</p>"
    )


def _mistakes(mistakes: Sequence[Mistake]) -> str:
    if not mistakes:
        return "<p>No test image was classified wrongly.</p>"
    figures = "".join(
        f'<figure><img alt="" src="{_jpeg(m.drawing)}"><figcaption><b>{escape(m.predicted)}</b> {m.probability:.1%}, '
        f"it is <b>{escape(m.true)}</b><br><small>{escape(m.picture)}</small></figcaption></figure>"
        for m in mistakes
    )
    return (
        f"<p>The {len(mistakes)} wrong predictions that the network was surest of: often a wrong label, two objects "
        f"or a box beside the object.</p><div class='gallery'>{figures}</div>"
    )


def _confusions(matrix: Tensor, class_names: Sequence[str]) -> str:
    counts = matrix.cpu().numpy()
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
    worst = sorted(((n, t, p) for t, row in enumerate(cells) for p, n in row if p != t), key=lambda c: (-c[0], c[1:]))
    rows = [
        [
            (escape(class_names[t]), class_names[t]),
            (escape(class_names[p]), class_names[p]),
            (str(n), n),
            (f"{shares[t, p]:.0%}", shares[t, p]),
        ]
        for n, t, p in worst[:CONFUSIONS_LISTED]
    ]
    listed = _table(["true class", "taken for", "images", "share of the class"], rows) if rows else ""
    more = f"<p>The {len(rows)} most frequent of {len(worst)}.</p>" if len(worst) > len(rows) else ""
    return (
        "<p>Rows: true classes, columns: predictions; green on the diagonal is right, red is wrong, strong is "
        "frequent.</p>"
        '<div id="cell" aria-live="polite">Point at a cell to read it.</div>'
        f'<svg id="matrix" style="max-width:{min(820, 28 * side):.0f}px" '
        f'viewBox="{-margin:.2f} {-margin:.2f} {side:.2f} {side:.2f}" data-count="{count}" role="img" '
        f'aria-label="confusion matrix of {count} classes"><image href="{_png(pixels)}" width="{count}" '
        f'height="{count}"/><rect class="frame" height="{count}" width="{count}"/>{labels}'
        f'<rect class="cursor" id="row" height="1" width="{count}"/>'
        f'<rect class="cursor" id="column" width="1" height="{count}"/></svg>'
        f'<script type="application/json" id="matrix-data">{data}</script>{listed}{more}'
    )


def _classes(matrix: Tensor, class_names: Sequence[str]) -> str:
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
                (_bar(share) if images else "no image", share),
                (f"{low:.0%} to {high:.0%}", low),
                (escape(taken_for), taken_for),
            ]
        )
    return _table(["class", "test images", "accuracy", "95 % interval", "most often taken for"], rows)


def _localization(report: Mapping, overlaps: Tensor | None) -> str:
    if not report["boxes"] or overlaps is None:
        return "<p>No true boxes, or a system without object boxes: nothing to measure.</p>"
    counts = (overlaps.double() * IOU_BINS).long().clamp(0, IOU_BINS - 1).bincount(minlength=IOU_BINS).tolist()
    bars = [(n / IOU_BINS, (n + 1) / IOU_BINS, count, count >= 0) for n, count in enumerate(counts)]
    text = (
        f"Overlap (intersection over union) of the predicted with the true box: mean {report['boxes']['mean']:.3f}, "
        f"0.5 or more for {report['boxes']['share_at_0.5']:.1%} of the images."
    )
    highest = max(counts)
    shapes = "".join(
        f'<rect class="{"good" if low >= 0.5 else "poor"}" x="{low * 400 + 1:.1f}" '
        f'y="{200 - 190 * count / highest:.1f}" width="{400 / IOU_BINS - 2:.1f}" height="{190 * count / highest:.1f}">'
        f"<title>{low:.2f} to {high:.2f}: {count} images</title></rect>"
        for low, high, count, _ in bars
    )
    return f"<p>{text}</p>" + _chart(shapes, "intersection over union", f"images (highest bar: {highest})")


def _calibration(calibration: Mapping) -> str:
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
        + _chart(shapes, "probability of the prediction", "share that is right")
    )


def _settings(settings: Mapping) -> str:
    rows = [
        [(escape(name), name), (f"<code>{escape(str(value))}</code>", str(value))] for name, value in settings.items()
    ]
    return _table(["setting", "value"], rows)


# ---- Parts ----------------------------------------------------------------------------------------------------------


def _table(headers: Sequence[str], rows: Sequence[Sequence[tuple[str, object]]]) -> str:
    """A table whose columns sort; each cell is (HTML, the value it sorts by)."""
    head = "".join(f"<th><button>{escape(header)}</button></th>" for header in headers)
    body = "".join("<tr>" + "".join(_cell(cell, value) for cell, value in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(content: str, value: object) -> str:
    kind = "" if isinstance(value, str) else ' class="number"'
    return f'<td{kind} data-value="{escape(str(value))}">{content}</td>'


def _bar(share: float) -> str:
    return f'<span class="bar"><i style="width:{100 * share:.1f}%"></i></span>{share:.1%}'


def _chart(shapes: str, below: str, aside: str) -> str:
    """A chart of 400 x 200 with both axes from 0 to 1 (the upright one only where the shapes say so)."""
    ticks = "".join(f'<text x="{400 * n / 5}" y="216" text-anchor="middle">{n / 5:g}</text>' for n in range(6))
    return (
        '<svg class="chart" viewBox="-30 -6 440 250" role="img"><path class="axis" d="M0 0V200H400"/>'
        f'{shapes}{ticks}<text x="200" y="236" text-anchor="middle">{below}</text>'
        f'<text transform="translate(-12 100) rotate(-90)" text-anchor="middle">{aside}</text></svg>'
    )


def _png(pixels: numpy.ndarray) -> str:
    return _data_address(Image.fromarray(pixels), "PNG", optimize=True)


def _jpeg(drawing: Tensor) -> str:
    return _data_address(Image.fromarray(drawing.permute(1, 2, 0).cpu().numpy()), "JPEG", quality=82, optimize=True)


def _data_address(picture: Image.Image, kind: str, **options: object) -> str:
    file = io.BytesIO()
    picture.save(file, format=kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


STYLE = """
:root{--ink:#222;--soft:#666;--paper:#fff;--line:#ddd;--track:#e8e8e8;--good:#0b7a4b;--poor:#c8641e;--accent:#1f6fb2}
@media (prefers-color-scheme:dark){:root{--ink:#e6e6e6;--soft:#a0a0a0;--paper:#17191c;--line:#3a3d42;--track:#33363b;
--good:#3fb37f;--poor:#e08a4a;--accent:#6db3ee}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:1100px;margin:0 auto;
padding:16px}
h1{font-size:22px;margin:8px 0;overflow-wrap:anywhere}h2{font-size:18px;margin:32px 0 8px}
header p{color:var(--soft);margin:0 0 12px}nav a{margin-right:16px;color:var(--accent)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:10px;margin:12px 0}
.tiles div{border:1px solid var(--line);border-radius:6px;padding:10px;font-size:12px;color:var(--soft)}
.tiles b{display:block;font-size:24px;color:var(--ink)}
.scroll{overflow:auto;max-height:640px;border:1px solid var(--line);border-radius:6px}
table{border-collapse:collapse;width:100%}td,th{padding:4px 10px;text-align:left;border-bottom:1px solid var(--line)}
td{overflow-wrap:anywhere}td.number{white-space:nowrap}
thead th{position:sticky;top:0;background:var(--paper)}
th button{font:inherit;font-weight:600;color:inherit;background:none;border:0;padding:0;cursor:pointer}
th[aria-sort=ascending] button::after{content:" \\25b2"}th[aria-sort=descending] button::after{content:" \\25bc"}
.bar{display:inline-block;width:120px;height:9px;background:var(--track);margin-right:8px;vertical-align:middle}
.bar i{display:block;height:100%;background:var(--accent)}
.gallery{display:grid;grid-template-columns:repeat(auto-fill,minmax(480px,1fr));gap:14px}
figure{margin:0;border:1px solid var(--line);border-radius:6px;padding:8px}figure img{max-width:100%;display:block}
figcaption{margin-top:6px}small{color:var(--soft);overflow-wrap:anywhere}
#matrix{width:100%;display:block;margin:8px 0}#matrix image{image-rendering:pixelated}
#matrix text{font-size:.65px;fill:var(--ink)}#cell{font-weight:600;height:1.5em;overflow:hidden;white-space:nowrap;
text-overflow:ellipsis}
.frame{fill:none;stroke:var(--line);stroke-width:.1}
.cursor{fill:none;stroke:var(--accent);stroke-width:.12;visibility:hidden;pointer-events:none}
.chart{width:100%;max-width:640px}.chart text{font-size:12px;fill:var(--ink)}.axis{fill:none;stroke:var(--soft)}
.good{fill:var(--good)}.poor{fill:var(--poor)}.chart circle{fill:var(--ink)}
.ideal{stroke:var(--soft);stroke-dasharray:5 4}
@media (max-width:560px){.gallery{grid-template-columns:1fr}}
"""

SCRIPT = """
"use strict";
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const header = button.closest("th"), body = button.closest("table").tBodies[0];
    const column = header.cellIndex, rows = [...body.rows];
    const values = new Map(rows.map(row => [row, row.cells[column].dataset.value]));
    const numeric = rows.every(row => values.get(row) !== "" && isFinite(values.get(row)));
    const known = header.getAttribute("aria-sort");
    const ascending = known ? known === "descending" : !numeric;  // numbers: the highest first
    const compare = (a, b) => numeric ? values.get(a) - values.get(b)
      : values.get(a).localeCompare(values.get(b), undefined, {numeric: true});
    rows.sort((a, b) => ascending ? compare(a, b) : compare(b, a));
    for (const other of header.parentNode.cells) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    body.append(...rows);
  });
}
const matrix = document.getElementById("matrix"), cell = document.getElementById("cell");
const confusions = JSON.parse(document.getElementById("matrix-data").textContent);
const image = matrix.querySelector("image"), count = confusions.names.length;
matrix.addEventListener("pointermove", event => {
  const place = image.getBoundingClientRect();
  const column = Math.floor((event.clientX - place.left) / place.width * count);
  const row = Math.floor((event.clientY - place.top) / place.height * count);
  const inside = column >= 0 && row >= 0 && column < count && row < count;
  for (const [name, axis, value] of [["row", "y", row], ["column", "x", column]]) {
    const line = document.getElementById(name);
    line.style.visibility = inside ? "visible" : "hidden";
    line.setAttribute(axis, value);
  }
  if (!inside) return;
  const found = confusions.rows[row].find(entry => entry[0] === column);
  const total = confusions.rows[row].reduce((sum, entry) => sum + entry[1], 0);
  const [truth, prediction] = [confusions.names[row], confusions.names[column]];
  cell.textContent = `${truth} taken for ${prediction}: ${found ? found[1] : 0} of ${total}`;
});
"""
