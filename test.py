"""Evaluate a checkpoint on its data set's test images: `python test.py checkpoint/demo-sgkrl/best.pth`.

Model and data are rebuilt from the settings saved in the checkpoint, not from config.py. The figures are printed and
written beside it: report.html to look at, report.json and predictions.csv to compute with (report-last.html and so on
for last.pth, report-plain.html with --weights plain, report-mirror.html with --views mirror). Test images are read as
the data set lists them, mostly class by class; --shuffle mixes them, with the run's seed, for files that end in
-shuffled: where a graph links the windows of a batch, the order changes predictions.

    python test.py checkpoint/demo-sgkrl/best.pth --data_root DIR --out REPORT  # other labelled pictures
    python test.py --compare checkpoint/A checkpoint/B ...                      # evaluated runs in one table
    python test.py published.pth --model mmal --dataset cub --data_root DIR     # a checkpoint of the published code
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy

from datasets import (
    DataError,
    Entry,
    choose_split,
    comes_with_corners,
    evaluation_loader,
    load_batch,
    load_catalogue,
    load_labelled,
    loading_of,
)
from networks.outputs import ENSEMBLINGS
from networks.system import System
from networks.views import VIEWS, look_at_views
from utils.checkpoint import CheckpointError, load_checkpoint, load_published
from utils.command_line import Parser, named
from utils.config_slips import config_as_edited
from utils.data.catalogue import Catalogue
from utils.data.cropping import cut_out, seen_part
from utils.data.decoding import DRAWN_AT_LEAST, load_picture
from utils.data.demo_birds import draw_demo_picture
from utils.data.evaluated import Evaluated, choose_evaluated
from utils.data.record import differing_names, unpack
from utils.errors import exit_with_one_sentence
from utils.files import make_output_folder, show, write_text
from utils.options import SettingsError, flat
from utils.reporting.class_tables import write_classes, write_confusions
from utils.reporting.compare import compare
from utils.reporting.early_exit import ExitCollector, choose_threshold, curve_text
from utils.reporting.embeddings import project
from utils.reporting.metrics import confusion_matrix
from utils.reporting.mistakes import draw_mistakes
from utils.reporting.panels import draw_panel, spread_over
from utils.reporting.pictures import save_png
from utils.reporting.report import write_report
from utils.reporting.report_text import as_text
from utils.reporting.results import ResultCollector
from utils.reporting.runlog import log_evaluation
from utils.training.allocator import keep_freed_memory
from utils.training.building import Trained, build_from_settings, load_trained, make_ready
from utils.training.engine import evaluate

with config_as_edited():
    from config import parse_settings, rebuilt, restored

MACHINE = ("data_root", "class_level", "device", "precision", "evaluation_batch_size", "workers")


def parse_arguments(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Return the options, and what else was given: settings for a published checkpoint."""
    parser = Parser(
        description="Evaluate a checkpoint on the test images of its data set, or compare runs that were evaluated.",
        epilog="With a checkpoint of a system's published code, any setting of train.py may follow.",
        usage="test.py CHECKPOINT [--option value ...] | test.py --compare RUN RUN ...",
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", type=named, nargs="?", help="best.pth or last.pth of a run, or a published file")
    parser.add_argument("--branches", nargs="+", help="report these beside the prediction (default: all that matter)")
    parser.add_argument("--embeddings", action="store_true", help="write TensorBoard's projector of the test images")
    parser.add_argument("--shuffle", action="store_true", help="read the test images in random order (the run's seed)")
    parser.add_argument(
        "--weights", choices=("plain", "ema"), help="of a run with ema_decay (default: ema, the average)"
    )
    parser.add_argument("--views", nargs="+", choices=VIEWS, help="classify by these views of a picture, too; slower")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the report (default: the checkpoint's)")
    parser.add_argument("--include_trained", action="store_true", help="evaluate images of training as well, if met")
    early = parser.add_argument_group("early exit (sgkrl, sgkrl_published)")
    early.add_argument("--exit_threshold", type=float, metavar="P", help="surer images skip the windows (1: none does)")
    early.add_argument("--exit_curve", action="store_true", help="find the threshold that loses nothing on validation")
    comparison = parser.add_argument_group("compare")
    comparison.add_argument("--compare", type=named, nargs="+", metavar="RUN", help="folders of runs, or report files")
    comparison.add_argument(
        "--format", choices=("text", "csv", "markdown"), default="text", help="how to print the table (%(default)s)"
    )
    machine = parser.add_argument_group("machine (default: as in training)")
    machine.add_argument("--data_root", metavar="DIR", help="where the data lie: the run's, or other pictures by class")
    machine.add_argument("--class_level", type=int, metavar="N", help="folders: the level of those that are classes")
    machine.add_argument("--device", help="cpu, cuda, cuda:1 ..., mps")
    machine.add_argument("--precision", choices=("auto", "float32", "bf16"))
    machine.add_argument("--evaluation_batch_size", type=int, metavar="N", help="images at a time")
    machine.add_argument("--workers", type=int, metavar="N", help="processes that load pictures")
    options, more = parser.parse_known_args(arguments)
    if (options.checkpoint is None) == (options.compare is None):
        parser.error("give one checkpoint, or --compare and the folders of runs")
    if more and options.compare:
        parser.refuse(more)
    return options, more


def main(arguments: Sequence[str] | None = None) -> None:
    options, more = parse_arguments(arguments)
    if options.compare:
        print(compare(options.compare, options.format, restore=lambda saved: flat(restored(saved))))
        return
    keep_freed_memory()

    # Rebuild: network, settings, data.
    trained, data = rebuild(options, more)
    network, settings, saved, plan, execution = trained
    options.weights, class_names = saved.get("weights"), saved["class_names"]
    for note in data.notes:
        show(f"note: {note}")
    listed = entries = data.entries
    if options.shuffle:  # here, so that all below finds results and images in one order
        entries = shuffled(listed, settings.seed)
    shared = {"plan": plan, "execution": execution, "label_smoothing": settings.label_smoothing}

    # Evaluate.
    corners = comes_with_corners(settings, options.views)
    views = look_at_views(network, options.views, corners=corners) if options.views else 1
    settings = let_exit_early(network, settings, data, options, shared)
    exits = network.can_exit_early and network.exit_threshold < 1
    # where images exit, these repeat other branches, so that no figure is theirs
    copied = ("window", "graph") if exits else ()
    results = ResultCollector(network.input_size, leave_out=copied)
    figures = evaluate(
        network,
        evaluation_loader(settings, entries, corners=corners),
        branches=options.branches,
        on_batch=results,
        description="test",
        **shared,
    )

    # Report.
    names = network.prediction
    ensembled = f"{ENSEMBLINGS[network.ensembling]} of {', '.join(names)}" if len(names) > 1 else names[0]
    report = {
        "checkpoint": str(options.checkpoint),
        "epoch": saved["epoch"],
        "weights": options.weights,
        "selected_on": saved["selected_on"],
        "data": {"root": settings.data_root, "notes": list(data.notes)},
        "order": f"shuffled with seed {settings.seed}" if options.shuffle else listing_order(listed),
        "prediction": ensembled + (f", over {views} views ({', '.join(options.views)})" if options.views else ""),
        "views": views,
        **results.report(class_names),
        "boxes": {n.removeprefix("box_iou/"): v for n, v in figures.items() if n.startswith("box_iou/")} or None,
        "images_per_second": figures["images_per_second"],
        "settings": dataclasses.asdict(settings),
    }
    show(as_text(report))
    batch = load_batch(spread_over(listed), settings, corners=corners)
    panel = draw_panel(network, batch, execution, plan, class_names)
    folder, ending = folder_of_report(options, settings, data), ending_of(options)
    make_output_folder(folder)
    save_png(folder / "pictures" / f"test{ending}.png", panel)
    mistakes = mistaken_batches(settings, entries, results.surest_mistakes(), one_by_one=exits, corners=corners)
    drawn = draw_mistakes(trained, mistakes)
    if options.embeddings or (folder / "log.jsonl").exists():  # a run's folder, whose curves TensorBoard shows
        shown = {name: v for name, v in figures.items() if name.startswith(("accuracy/", "box_iou/"))}
        numbers = {name: v for name, v in shown.items() if name.removeprefix("accuracy/") not in copied}
        numbers["calibration_error"] = report["calibration"]["expected_error"]
        loader = evaluation_loader(settings, entries)
        projected = project(trained, loader, class_names) if options.embeddings else {}
        log_evaluation(folder / f"test{ending}", saved["epoch"], numbers, **projected)
    write_files(folder, ending, class_names, results, report, drawn)


def rebuild(options: argparse.Namespace, more: Sequence[str]) -> tuple[Trained, Evaluated]:
    """Return the checkpoint's network, and what to evaluate it on."""
    overrides = {name: getattr(options, name) for name in MACHINE if getattr(options, name) is not None}
    content = load_checkpoint(options.checkpoint)
    if "settings" not in content:
        if not any(word.partition("=")[0] == "--model" for word in more):
            raise CheckpointError(
                f"{options.checkpoint} was not written by train.py: it lacks settings; a checkpoint of published code "
                "needs --model (mmal, sgkrl_published ...), --dataset and --data_root"
            )
        return rebuild_published(options.checkpoint, content, overrides, more)
    if more:
        raise CheckpointError(
            f"unrecognized arguments: {' '.join(more)} (settings of training are read from {options.checkpoint}; only "
            "for a published checkpoint they are given, --model among them)"
        )
    trained = load_trained(options.checkpoint, rebuilt, weights=options.weights, content=content, **overrides)
    return trained, find_data(trained, options)


def find_data(trained: Trained, options: argparse.Namespace) -> Evaluated:
    """Return what to evaluate a run's checkpoint on: its own test images, or the data at --data_root.

    Raises DataError where these cannot be read.
    """
    settings, saved = trained.settings, trained.saved
    asked = options.data_root is not None
    own = None
    if not (asked and settings.dataset == "demo"):
        try:
            own, _ = load_catalogue(settings)
        except DataError:
            if not asked:
                raise
    try:
        record = unpack(saved["pictures"]) if "pictures" in saved else None
    except ValueError as error:
        raise CheckpointError(f"{options.checkpoint} is refused: there is {error} in it") from None
    if record is None and not asked and list(own.class_names) != saved["class_names"]:
        raise CheckpointError(
            f"{options.checkpoint} knows {len(saved['class_names'])} classes and the data in {settings.data_root} has "
            f"{len(own.class_names)} ({differing_names(saved['class_names'], own.class_names)}): give the --data_root "
            "of the pictures to evaluate"
        )
    return choose_evaluated(
        saved["class_names"],
        record,
        own,
        lambda: load_labelled(settings),
        selected_on_test=settings.select_on == "test",
        include_trained=options.include_trained,
        asked=asked,
        as_many=record is not None or own is None or has_as_many(settings, saved, own),
    )


def has_as_many(settings: Any, saved: Mapping, own: Catalogue) -> bool:
    """Whether the data have as many images to train on and to select by as a run of an older version had."""
    try:
        training, selection, _ = choose_split(settings, own)
    except DataError:
        return False
    selected = re.search(r"\d+", saved["selected_on"])
    known = (saved.get("training_images"), selected and int(selected[0]))
    return known == (len(training), len(selection))


def rebuild_published(path: Path, content: dict, overrides: dict, more: Sequence[str]) -> tuple[Trained, Evaluated]:
    """Return the network of a published checkpoint, which says little about itself, and the data set asked for."""
    words = [word for name, value in overrides.items() for word in (f"--{name}", str(value))]
    settings = parse_settings([*words, *more])
    catalogue, _ = load_catalogue(settings)
    epoch = content.get("epoch")
    saved = {
        "class_names": list(catalogue.class_names),
        "epoch": epoch if isinstance(epoch, int) else settings.epochs,  # it decides on the mask
        "selected_on": "what its authors chose",
    }
    network = build_from_settings(settings, len(catalogue.class_names), load_weights=False)
    load_published(network, path, content)
    return make_ready(network, settings, saved), Evaluated(catalogue.test)


def shuffled(entries: Sequence[Entry], seed: int) -> list[Entry]:
    return [entries[i] for i in numpy.random.default_rng(seed).permutation(len(entries))]


def listing_order(entries: Sequence[Entry]) -> str:
    labels = [entry.label for entry in entries]
    return "in class order" if labels == sorted(labels) else "in the data set's order"


def let_exit_early(
    network: System, settings: Any, data: Evaluated, options: argparse.Namespace, shared: Mapping
) -> Any:
    """Set the network's threshold, if it has one, to what was asked for; return the settings with it."""
    asked = options.exit_threshold is not None or options.exit_curve
    if not network.can_exit_early:
        if asked and (options.exit_curve or options.exit_threshold != 1):
            raise SettingsError(
                f"{settings.model} has no pass to skip: leave exit_threshold and exit_curve out, which are for systems "
                "such as sgkrl"
            )
        return settings
    threshold = settings.options["exit_threshold"] if options.exit_threshold is None else options.exit_threshold
    if options.exit_curve:
        changed_threshold(settings, 0.0)  # refuses a graph that cannot do without
        corners = comes_with_corners(settings, options.views)
        threshold = calibrated_exit(network, settings, data, shared, corners=corners)
    network.exit_threshold = threshold
    return changed_threshold(settings, threshold)


def changed_threshold(settings: Any, threshold: float) -> Any:
    return rebuilt(dataclasses.asdict(settings), exit_threshold=threshold)


def calibrated_exit(network: System, settings: Any, data: Evaluated, shared: Mapping, *, corners: bool) -> float:
    """Print accuracy against compute on the run's validation images; return the threshold that loses nothing there."""
    if settings.select_on == "test":
        raise SettingsError(
            "--exit_curve needs validation images, and this run trained on all training images (select_on is test)"
        )
    if not data.own:
        raise SettingsError(
            "--exit_curve needs the run's own validation images, and these are other data: leave it out"
        )
    if data.selection is None:  # of an older version, which did not keep them
        _, entries, name = choose_split(settings, load_catalogue(settings)[0])
    else:
        entries, name = data.selection, f"{len(data.selection)} validation images of the run"
    collector = ExitCollector(network)
    loader = evaluation_loader(settings, entries, corners=corners)
    evaluate(network, loader, branches=network.branches, on_batch=collector, description="validation", **shared)
    curve = collector.curve()
    chosen = choose_threshold(curve)
    show(f"early exit, measured on {name}:\n{curve_text(curve, chosen)}\n")
    return chosen.threshold


def load_upright(path: Path):
    return load_picture(path, at_least=DRAWN_AT_LEAST, memory=math.inf)[0]


def mistaken_batches(
    settings: Any, entries: Sequence[Entry], positions: Sequence[int], *, one_by_one: bool, corners: bool
) -> Iterator[tuple[Any, list, list[int]]]:
    """Yield the images at these positions once more, as batches, what is seen of them in its own size, and labels."""
    step = 1 if one_by_one else settings.evaluation_batch_size  # with an early exit, passes differ between images
    for start in range(0, len(positions), step):
        chosen = [entries[position] for position in positions[start : start + step]]
        batch = load_batch(chosen, settings, corners=corners)
        sources = [entry.source for entry in chosen]
        pictures = [draw_demo_picture(s) if isinstance(s, int) else load_upright(s) for s in sources]
        pictures = [cut_out(picture, seen_part(*picture.size, **loading_of(settings))) for picture in pictures]
        yield batch, pictures, [entry.label for entry in chosen]


def ending_of(options: argparse.Namespace) -> str:
    """Return how the names of an evaluation's files end: nothing for best.pth."""
    stem = options.checkpoint.stem
    plain = "-plain" if options.weights == "plain" else ""
    views = "".join(f"-{view}" for view in VIEWS if view in (options.views or ()))
    return ("" if stem == "best" else f"-{stem}") + plain + views + ("-shuffled" if options.shuffle else "")


def folder_of_report(options: argparse.Namespace, settings: Any, data: Evaluated) -> Path:
    """Return where a report goes: beside the checkpoint, or, of other data, into a folder of its own there."""
    if options.out is not None:
        return options.out
    beside = options.checkpoint.parent
    return beside if data.own else beside / f"on-{Path(settings.data_root).resolve().name}"


def write_files(
    folder: Path, ending: str, class_names: Sequence[str], results: ResultCollector, report: Mapping, mistakes: list
) -> None:
    """Write the report for people and for programs, and the tables of predictions and classes."""
    write_text(folder / f"report{ending}.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    results.write(folder / f"predictions{ending}.csv", class_names)
    values = results.values()
    matrix = confusion_matrix(values["prediction"], values["label"], len(class_names))
    write_classes(folder / f"classes{ending}.csv", matrix, class_names)
    write_confusions(folder / f"confusions{ending}.csv", matrix, class_names)
    write_report(
        folder / f"report{ending}.html",
        report,
        class_names=class_names,
        matrix=matrix,
        overlaps=values.get("box_iou"),
        mistakes=mistakes,
    )
    files = ("report{}.html", "report{}.json", "predictions{}.csv", "classes{}.csv", "confusions{}.csv")
    names = ", ".join(name.format(ending) for name in (*files, "pictures/test{}.png"))
    show(f"written to {folder}: {names}")


if __name__ == "__main__":
    with exit_with_one_sentence(elsewhere="--out", less_memory="lower --evaluation_batch_size or --workers"):
        main()
