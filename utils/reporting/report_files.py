"""Where the files of an evaluation go, how their names end, and writing them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from utils.data.evaluated import Evaluated
from utils.files import show, write_text
from utils.reporting.class_tables import write_classes, write_confusions
from utils.reporting.confusions import confusion_matrix
from utils.reporting.pictures import save_png
from utils.reporting.report import write_report
from utils.reporting.results import ResultCollector


def ending_of(options: argparse.Namespace, all_views: Sequence[str]) -> str:
    """Return how the names of an evaluation's files end: nothing for best.pth; views in the order of `all_views`."""
    stem = options.checkpoint.stem
    plain = "-plain" if options.weights == "plain" else ""
    ensembling = f"-{options.ensembling}" if options.ensembling else ""
    views = "".join(f"-{view}" for view in all_views if view in (options.views or ()))
    early = options.exit_threshold not in (None, 1)  # a number, or how it was learnt
    exits = "-exit_curve" if options.exit_curve else f"-exit_{options.exit_threshold}" if early else ""
    trained = "-include_trained" if options.include_trained else ""
    shuffled = "-shuffled" if options.shuffle else ""
    return ("" if stem == "best" else f"-{stem}") + plain + ensembling + views + exits + trained + shuffled


def folder_of_report(options: argparse.Namespace, settings: Any, data: Evaluated) -> Path:
    """Return where a report goes: beside the checkpoint, or, of other data, into a folder of its own there."""
    if options.out is not None:
        return options.out
    beside = options.checkpoint.parent
    return beside if data.own else beside / f"on-{Path(settings.data_root).resolve().name}"


def write_files(
    folder: Path,
    ending: str,
    class_names: Sequence[str],
    results: ResultCollector,
    report: Mapping,
    mistakes: list,
    panel: Tensor,
) -> None:
    """Write the report for people and for programs, the tables of predictions and classes, and a panel of pictures."""
    write_text(folder / f"report{ending}.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    results.write(folder / f"predictions{ending}.csv", class_names)
    values = results.values()
    if results.keep_logits:
        results.write_logits(folder / f"logits{ending}.npz", class_names)
    matrix = confusion_matrix(values["prediction"], values["label"], len(class_names))
    write_classes(folder / f"classes{ending}.csv", matrix, class_names)
    write_confusions(folder / f"confusions{ending}.csv", matrix, class_names)
    write_report(
        folder / f"report{ending}.html",
        report,
        class_names=class_names,
        matrix=matrix,
        overlaps=results.overlaps(),
        mistakes=mistakes,
    )
    save_png(folder / "pictures" / f"test{ending}.png", panel)  # last: it is the one that can be done without
    files = ["report{}.html", "report{}.json", "predictions{}.csv", "classes{}.csv", "confusions{}.csv"]
    files += ["logits{}.npz"] if results.keep_logits else []
    names = ", ".join(name.format(ending) for name in (*files, "pictures/test{}.png"))
    show(f"written to {folder}: {names}")
