"""Evaluate a checkpoint on its data set's test images: `python test.py checkpoint/demo-sgkrl/best.pth`.

Model and data are rebuilt from the settings saved in the checkpoint, not from config.py. The figures are printed and
written beside it: report.html to look at, report.json and predictions.csv to compute with (report-last.html and so on
for last.pth, report-plain.html with --weights plain, report-mirror.html with --views mirror). Test images are read as
the data set lists them, mostly class by class; --shuffle mixes them, with the run's seed, for files that end in
-shuffled: where a graph links the windows of a batch, the order changes predictions.

    python test.py checkpoint/demo-sgkrl/best.pth --data_root DIR --out REPORT  # other labelled pictures
    python test.py checkpoint/demo-sgkrl/best.pth --ensembling learned          # the branches combined otherwise
    python test.py --compare checkpoint/A checkpoint/B ...                      # evaluated runs in one table
    python test.py published.pth --model mmal --dataset cub --data_root DIR     # a checkpoint of the published code
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy

from datasets import (
    choose_split,
    comes_with_corners,
    evaluation_loader,
    load_batch,
    load_catalogue,
    load_labelled,
    loading_of,
)
from networks.outputs import SKIPPED_BY_EXIT
from networks.views import VIEWS, add_views
from utils.checkpoint import CheckpointError, load_checkpoint, load_published
from utils.config_slips import config_as_edited
from utils.data.catalogue import Entry
from utils.data.evaluated import Evaluated
from utils.errors import exit_with_one_sentence
from utils.files import make_output_folder, show
from utils.options import SettingsError, flat
from utils.reporting.compare import compare
from utils.reporting.embeddings import PROJECTED, project
from utils.reporting.evaluation_flags import parse_arguments
from utils.reporting.exit_threshold import let_exit_early
from utils.reporting.mistakes import draw_mistakes, mistaken_batches
from utils.reporting.other_ensembling import ensemble_otherwise
from utils.reporting.panels import draw_panel, spread_over
from utils.reporting.report_files import ending_of, folder_of_report, write_files
from utils.reporting.report_text import as_text, ensembled_text, weights_of_branches
from utils.reporting.results import ResultCollector
from utils.reporting.runlog import log_evaluation
from utils.training.allocator import keep_freed_memory
from utils.training.building import Trained, build_from_settings, load_trained, make_ready
from utils.training.engine import evaluate
from utils.training.evaluated_data import Readers, find_data, validation_images

with config_as_edited():
    from config import parse_settings, rebuilt, restored

MACHINE = ("data_root", "labels", "class_level", "device", "precision", "evaluation_batch_size", "workers")
DATA_FUNCTIONS = Readers(load_catalogue, load_labelled, choose_split)


def main(arguments: Sequence[str] | None = None) -> None:
    options, more = parse_arguments(arguments, views=VIEWS)
    if options.compare:
        show(compare(options.compare, options.format, restore=lambda saved: flat(restored(saved))))
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
    views = add_views(network, options.views, corners=corners) if options.views else 1

    def validation(needed_for: str):
        selection, words = validation_images(settings, data, DATA_FUNCTIONS, needed_for)
        return evaluation_loader(settings, selection, corners=corners), words

    trained = ensemble_otherwise(
        trained, options, shared, rebuilt=rebuilt, validation=partial(validation, "--ensembling")
    )
    settings = let_exit_early(trained, options, shared, rebuilt=rebuilt, validation=partial(validation, "--exit_curve"))
    exits = network.can_exit_early and network.exit_threshold < 1
    # where images exit, these repeat other branches, so that no figure is theirs
    copied = SKIPPED_BY_EXIT if exits else ()
    results = ResultCollector(network.input_size, leave_out=copied, keep_logits=options.save_logits)
    figures = evaluate(
        network,
        evaluation_loader(settings, entries, corners=corners),
        branches=options.branches,
        on_batch=results,
        description="test",
        **shared,
    )
    results.check_finite()

    # Report.
    report = {
        "checkpoint": str(options.checkpoint),
        "epoch": saved["epoch"],
        "weights": options.weights,
        "progress": saved.get("progress") and {name: saved["progress"][name] for name in ("epoch", "step")},
        "selected_on": saved["selected_on"],
        "best_epoch": saved.get("best", {}).get("epoch"),
        "data": {"root": settings.data_root, "notes": list(data.notes), "trained_on": data.trained_on},
        "order": f"shuffled with seed {settings.seed}" if options.shuffle else listing_order(listed),
        "prediction": ensembled_text(network, views, options.views),
        "ensemble_weights": weights_of_branches(network),
        "views": views,
        **results.report(class_names),
        "boxes": figures_of_boxes(figures, results),
        "images_per_second": figures["images_per_second"],
        "settings": dataclasses.asdict(settings),
    }
    show(as_text(report))
    batch = load_batch(spread_over(listed), settings, corners=corners)
    panel = draw_panel(network, batch, execution, plan, class_names)
    folder, ending = folder_of_report(options, settings, data), ending_of(options, VIEWS)
    make_output_folder(folder)
    mistaken = mistaken_batches(
        [(entries[position], *judged) for position, *judged in results.surest_mistakes()],
        partial(load_batch, settings=settings, corners=corners),
        loading=loading_of(settings),
        step=settings.evaluation_batch_size,
    )
    drawn = draw_mistakes(trained, mistaken)
    write_files(folder, ending, class_names, results, report, drawn, panel)
    if options.embeddings or (folder / "log.jsonl").exists():  # a run's folder, whose curves TensorBoard shows
        shown = curves(figures, leave_out=copied) | {"calibration_error": report["calibration"]["expected_error"]}
        seen = spread_over(entries, PROJECTED)
        projected = project(trained, evaluation_loader(settings, seen), class_names) if options.embeddings else {}
        log_evaluation(folder / f"test{ending}", saved["epoch"], shown, **projected)


def curves(figures: Mapping[str, float], *, leave_out: Sequence[str]) -> dict[str, float]:
    """Return those of an evaluation's figures that TensorBoard shows, without these branches."""
    shown = {name: value for name, value in figures.items() if name.startswith(("accuracy/", "box_iou/"))}
    return {name: value for name, value in shown.items() if name.removeprefix("accuracy/") not in leave_out}


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
        own = {} if options.ensembling is None else {"ensembling": options.ensembling}
        return rebuild_published(options.checkpoint, content, overrides | own, more)
    if more:
        raise CheckpointError(
            f"unrecognized arguments: {' '.join(more)} (settings of training are read from {options.checkpoint}; only "
            "for a published checkpoint they are given, --model among them)"
        )
    if options.labels is not None:
        if content["settings"].get("dataset") != "csv":
            raise SettingsError(
                f"--labels names a table of data set csv, and {options.checkpoint} is of data set "
                f"{content['settings'].get('dataset')}: leave it out"
            )
        overrides |= {"validation_labels": None, "test_labels": None}
    trained = load_trained(options.checkpoint, rebuilt, weights=options.weights, content=content, **overrides)
    return trained, find_data(
        trained,
        options.checkpoint,
        DATA_FUNCTIONS,
        asked=options.data_root is not None or options.labels is not None,
        with_labels=options.labels is not None,
        include_trained=options.include_trained,
    )


def rebuild_published(path: Path, content: dict, overrides: dict, more: Sequence[str]) -> tuple[Trained, Evaluated]:
    """Return the network of a published checkpoint, which says little about itself, and the data set asked for."""
    words = [word for name, value in overrides.items() for word in (f"--{name}", str(value))]
    settings = parse_settings([*words, *more])
    if settings.ensembling == "learned":
        raise CheckpointError(
            f"{path} has no learnt weights of its branches, as no published checkpoint has: choose another ensembling"
        )
    catalogue, _ = load_catalogue(settings, parts=("test",))
    epoch = content.get("epoch")
    saved = {
        "class_names": list(catalogue.class_names),
        "epoch": epoch if isinstance(epoch, int) else settings.epochs,  # it decides on the mask
        "selected_on": "what its authors chose",
    }
    network = build_from_settings(settings, len(catalogue.class_names), load_weights=False)
    load_published(network, path, content)
    return make_ready(network, settings, saved), Evaluated(catalogue.test)


def figures_of_boxes(figures: Mapping[str, float], results: ResultCollector) -> dict[str, float] | None:
    """Return those of the images that have a true box, with their number where they are not all."""
    named = {n.removeprefix("box_iou/"): value for n, value in figures.items() if n.startswith("box_iou/")}
    overlaps = results.overlaps()
    if overlaps is None:
        return named or None
    return named if len(overlaps) == len(results.paths) else named | {"images": len(overlaps)}


def shuffled(entries: Sequence[Entry], seed: int) -> list[Entry]:
    return [entries[i] for i in numpy.random.default_rng(seed).permutation(len(entries))]


def listing_order(entries: Sequence[Entry]) -> str:
    labels = [entry.label for entry in entries]
    return "in class order" if labels == sorted(labels) else "in the data set's order"


if __name__ == "__main__":
    with exit_with_one_sentence(elsewhere="--out", less_memory="lower --evaluation_batch_size or --workers"):
        main()
