"""The report of an evaluation as one HTML file that needs nothing else: it opens offline, anywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from torch import Tensor

from utils.files import write_text
from utils.reporting.report_sections import (
    Mistake,
    accuracy_section,
    calibration_section,
    classes_section,
    confusions_section,
    localization_section,
    mistakes_section,
    settings_section,
)
from utils.reporting.report_style import SCRIPT, STYLE


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
        ("Accuracy", accuracy_section(report, top5=shows_top5(report))),
        ("Surest mistakes", mistakes_section(mistakes)),
        ("Confusions", confusions_section(matrix, class_names)),
        ("Classes", classes_section(matrix, class_names)),
        ("Localization", localization_section(report, overlaps)),
        ("Calibration", calibration_section(report["calibration"])),
        ("Settings", settings_section(_by_name(report["settings"]))),
    ]
    identifiers = [title.lower().replace(" ", "-") for title, _ in sections]
    links = "".join(f'<a href="#{i}">{title}</a>' for i, (title, _) in zip(identifiers, sections, strict=True))
    body = "".join(
        f'<section id="{i}"><h2>{title}</h2>{content}</section>'
        for i, (title, content) in zip(identifiers, sections, strict=True)
    )
    title = escape(str(report["checkpoint"]))
    subtitle = escape(f"{epoch_of(report)}; prediction: {report['prediction']}")
    notes = "".join(f"<p>{escape(note[:1].upper() + note[1:])}.</p>" for note in report["data"]["notes"])
    # The policy keeps the page to itself whatever a class is called.
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    page = (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head><body><header><h1>{title}</h1><p>{subtitle}</p>"
        f"{notes}{_tiles(report)}<nav>{links}</nav></header><main>{body}</main><script>{SCRIPT}</script></body></html>\n"
    )
    write_text(path, page)


def epoch_of(report: Mapping) -> str:
    """Say which epoch was evaluated, of a run that averaged its weights with which of them, and what chose it."""
    weights = {"ema": ", averaged weights", "plain": ", weights that are not averaged"}
    progress, best = report["progress"], report["best_epoch"]
    epoch = f"epoch {report['epoch']}" if progress is None else f"step {progress['step']} of epoch {progress['epoch']}"
    chosen = f"chosen by {report['selected_on']}"
    if progress is not None or best not in (None, report["epoch"]):
        chosen = f"not the best epoch, {best}, which was {chosen}" if best else "before any epoch was evaluated"
    return f"{epoch}{weights.get(report.get('weights'), '')}, {chosen}"


def shows_top5(report: Mapping) -> bool:
    """Whether the five likeliest classes are not all that there are."""
    return report["classes"] > 5


def of_classes_with_images(report: Mapping) -> str:
    """Say of how many classes the mean per-class accuracy is, "" where it is of all."""
    with_images, classes = report["classes_with_images"], report["classes"]
    return "" if with_images == classes else f" (of {with_images} classes: {classes - with_images} have no test image)"


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
        (f"{report['mean_per_class_accuracy']:.1%}", f"mean accuracy of the classes{of_classes_with_images(report)}"),
        (f"{report['calibration']['expected_error']:.1%}", "expected calibration error"),
        (f"{report['images']}", f"test images{order_where_it_matters(report)}"),
        (f"{report['images_per_second']:.1f}", "images a second"),
    ]
    if report["exited"] is not None:
        tiles.append((f"{report['exited'] / report['images']:.1%}", "of the images skip the windows (early exit)"))
    if report["boxes"]:
        tiles.insert(2, (f"{report['boxes']['share_at_0.5']:.1%}", "object boxes with IoU of 0.5 or more"))
    return '<div class="tiles">' + "".join(f"<div><b>{value}</b>{text}</div>" for value, text in tiles) + "</div>"
