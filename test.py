"""Evaluate a checkpoint on its data set's test images: `python test.py checkpoint/demo-sgkrl/best.pth`.

Model and data are rebuilt from the settings saved in the checkpoint, not from config.py. The figures are printed and
written beside it: report.html to look at, report.json and predictions.csv to compute with (report-last.html and so on
for last.pth). Test images are read as the data set lists them, mostly class by class; --shuffle mixes them, with the
run's seed, for files that end in -shuffled: where a graph links the windows of a batch, the order changes its answers.

    python test.py --compare checkpoint/A checkpoint/B ...                      # evaluated runs in one table
    python test.py published.pth --model mmal --dataset cub --data_root DIR     # a checkpoint of the published code
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F

from assembly import (
    Trained,
    draw_panel,
    load_trained,
    trained_network,
)
from config import Parser, Settings, SettingsError, complete, parse_settings, settings_of_older_runs
from datasets import Catalogue, Entry, choose_split, collate, evaluation_loader, load_catalogue
from networks.evidence import forward_with_evidence
from networks.losses import loss_terms
from utils.checkpoint import CheckpointError, load_checkpoint, load_published
from utils.data.decoding import load_picture
from utils.data.demo_birds import draw_demo_picture
from utils.errors import exit_with_one_sentence
from utils.files import show, write_text
from utils.reporting.compare import compare
from utils.reporting.early_exit import ExitCollector, choose_threshold, curve_text
from utils.reporting.metrics import confusion_matrix
from utils.reporting.panels import image_panel
from utils.reporting.pictures import save_png
from utils.reporting.report import Mistake, order_where_it_matters, write_report
from utils.reporting.results import ResultCollector
from utils.reporting.runlog import log_evaluation
from utils.training.allocator import keep_freed_memory
from utils.training.engine import evaluate

PUBLISHED_MODELS = ("mmal", "sgkrl")


def parse_arguments(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Return the options, and what else was given: settings for a published checkpoint."""
    parser = Parser(
        description="Evaluate a checkpoint on the test images of its data set, or compare runs that were evaluated.",
        epilog="With a checkpoint of the published MMAL-Net or SG-KRL code, any setting of train.py may follow.",
        usage="test.py CHECKPOINT [--option value ...] | test.py --compare RUN RUN ...",
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", type=Path, nargs="?", help="best.pth or last.pth of a run, or a published file")
    parser.add_argument("--branches", nargs="+", help="report these beside the answer (default: all that matter to it)")
    parser.add_argument("--embeddings", action="store_true", help="write TensorBoard's projector of the test images")
    parser.add_argument("--shuffle", action="store_true", help="read the test images in random order (the run's seed)")
    early = parser.add_argument_group("early exit (sgkrl)")
    early.add_argument("--exit_threshold", type=float, metavar="P", help="surer images skip the windows (1: none does)")
    early.add_argument("--exit_curve", action="store_true", help="find the threshold that loses nothing on validation")
    comparison = parser.add_argument_group("compare")
    comparison.add_argument("--compare", type=Path, nargs="+", metavar="RUN", help="folders of runs, or report files")
    comparison.add_argument(
        "--format", choices=("text", "csv", "markdown"), default="text", help="how to print the table (%(default)s)"
    )
    machine = parser.add_argument_group("machine (default: as in training)")
    machine.add_argument("--data_root", metavar="DIR", help="where the data set lies on this machine")
    machine.add_argument("--device", help="cpu, cuda, cuda:1 ...")
    machine.add_argument("--precision", choices=("auto", "float32", "bf16"))
    machine.add_argument("--evaluation_batch_size", type=int, metavar="N", help="images at a time")
    machine.add_argument("--workers", type=int, metavar="N", help="processes that load pictures")
    options, more = parser.parse_known_args(arguments)
    if (options.checkpoint is None) == (options.compare is None):
        parser.error("give one checkpoint, or --compare and the folders of runs")
    if more and options.compare:
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    return options, more


def main(arguments: Sequence[str] | None = None) -> None:
    options, more = parse_arguments(arguments)
    if options.compare:
        print(compare(options.compare, options.format, older=settings_of_older_runs()))
        return
    keep_freed_memory()

    # Rebuild: network, settings, data.
    trained, catalogue = rebuild(options, more)
    network, settings, saved, plan, execution = trained
    listed = catalogue.test
    if options.shuffle:  # here, so that all below finds results and images in one order
        catalogue = catalogue._replace(test=shuffled(listed, settings.seed))

    # Evaluate.
    shared = {
        "plan": plan,
        "loss_function": partial(loss_terms, label_smoothing=settings.label_smoothing),
        "execution": execution,
    }
    if options.exit_curve:
        settings = dataclasses.replace(settings, exit_threshold=calibrated_exit(network, settings, catalogue, shared))
    copied = ()
    if settings.exit_threshold < 1:
        network.exit_threshold = settings.exit_threshold
        copied = ("window", "graph")  # where images exit these repeat other branches, so that no figure is theirs
    results = ResultCollector(network.input_size, leave_out=copied)
    figures = evaluate(
        network,
        evaluation_loader(settings, catalogue.test),
        branches=options.branches,
        on_batch=results,
        description="test",
        **shared,
    )

    # Report.
    report = {
        "checkpoint": str(options.checkpoint),
        "epoch": saved["epoch"],
        "selected_on": saved["selected_on"],
        "order": f"shuffled with seed {settings.seed}" if options.shuffle else listing_order(listed),
        "answer": f"mean probability of {', '.join(network.answer)}" if len(network.answer) > 1 else network.answer[0],
        **results.report(saved["class_names"]),
        "boxes": {name.removeprefix("box_iou/"): v for name, v in figures.items() if name.startswith("box_iou/")}
        or None,
        "images_per_second": figures["images_per_second"],
        "settings": dataclasses.asdict(settings),
    }
    show(as_text(report))
    folder, stem = options.checkpoint.parent, options.checkpoint.stem
    ending = ("" if stem == "best" else f"-{stem}") + ("-shuffled" if options.shuffle else "")
    write_text(folder / f"report{ending}.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    results.write(folder / f"predictions{ending}.csv", saved["class_names"])
    values = results.values()
    write_report(
        folder / f"report{ending}.html",
        report,
        class_names=saved["class_names"],
        matrix=confusion_matrix(values["prediction"], values["label"], len(saved["class_names"])),
        overlaps=values.get("box_iou"),
        mistakes=draw_mistakes(trained, catalogue, results.surest_mistakes()),
    )
    if (folder / "log.jsonl").exists():  # a run's folder, whose curves TensorBoard shows
        shown = {name: v for name, v in figures.items() if name.startswith(("accuracy/", "box_iou/"))}
        numbers = {name: v for name, v in shown.items() if name.removeprefix("accuracy/") not in copied}
        numbers["calibration_error"] = report["calibration"]["expected_error"]
        projected = project(trained, catalogue) if options.embeddings else {}
        log_evaluation(folder / f"test{ending}", saved["epoch"], numbers, **projected)
    panel = draw_panel(network, listed, settings, catalogue.class_names, execution, plan)
    save_png(folder / "pictures" / f"test{ending}.png", panel)
    names = (f"report{ending}.html", f"report{ending}.json", f"predictions{ending}.csv", f"pictures/test{ending}.png")
    show(f"written to {folder}: {', '.join(names)}")


def rebuild(options: argparse.Namespace, more: Sequence[str]) -> tuple[Trained, Catalogue]:
    """Return the checkpoint's network and its data set."""
    overrides = {n: v for n, v in vars(options).items() if v is not None and n in Settings.__dataclass_fields__}
    content = load_checkpoint(options.checkpoint)
    if "settings" not in content:
        if not any(word.partition("=")[0] == "--model" for word in more):
            raise CheckpointError(
                f"{options.checkpoint} was not written by train.py: it lacks settings; a checkpoint of the published "
                f"code needs --model ({' or '.join(PUBLISHED_MODELS)}), --dataset and --data_root"
            )
        return rebuild_published(options.checkpoint, content, overrides, more)
    if more:
        raise CheckpointError(
            f"unrecognized arguments: {' '.join(more)} (settings of training are read from {options.checkpoint}; only "
            "for a published checkpoint they are given, --model among them)"
        )
    trained = load_trained(options.checkpoint, **overrides)
    catalogue, _ = load_catalogue(trained.settings)
    if list(catalogue.class_names) != trained.saved["class_names"]:
        raise CheckpointError(
            f"{options.checkpoint} knows {len(trained.saved['class_names'])} classes and the data in "
            f"{trained.settings.data_root} has {len(catalogue.class_names)} or others: give the --data_root it was "
            "trained on"
        )
    return trained, catalogue


def rebuild_published(path: Path, content: dict, overrides: dict, more: Sequence[str]) -> tuple[Trained, Catalogue]:
    """Return the network of a published checkpoint, which says little about itself, and the data set asked for."""
    words = [word for name, value in overrides.items() for word in (f"--{name}", str(value))]
    settings = parse_settings(["--wiring", "published", *words, *more])
    if settings.model not in PUBLISHED_MODELS:
        raise CheckpointError(
            f"model is {settings.model}; published checkpoints are of {' or '.join(PUBLISHED_MODELS)}"
        )
    catalogue, _ = load_catalogue(settings)
    epoch = content.get("epoch")
    saved = {
        "class_names": list(catalogue.class_names),
        "epoch": epoch if isinstance(epoch, int) else settings.epochs,  # it decides on the mask
        "selected_on": "what its authors chose",
    }
    return trained_network(settings, saved, partial(load_published, path=path)), catalogue


def shuffled(entries: Sequence[Entry], seed: int) -> list[Entry]:
    return [entries[i] for i in numpy.random.default_rng(seed).permutation(len(entries))]


def listing_order(entries: Sequence[Entry]) -> str:
    labels = [entry.label for entry in entries]
    return "in class order" if labels == sorted(labels) else "in the data set's order"


def calibrated_exit(network: torch.nn.Module, settings: Settings, catalogue: Catalogue, shared: dict) -> float:
    """Print accuracy against compute on the run's validation images; return the threshold that loses nothing there."""
    complete(dataclasses.replace(settings, exit_threshold=0.0))  # refuses systems that cannot exit
    if settings.select_on == "test":
        raise SettingsError(
            "--exit_curve needs validation images, and this run trained on all training images (select_on is test)"
        )
    _, entries, name = choose_split(settings, catalogue)
    collector = ExitCollector(network)
    loader = evaluation_loader(settings, entries)
    evaluate(network, loader, branches=network.branches, on_batch=collector, description="validation", **shared)
    curve = collector.curve()
    chosen = choose_threshold(curve)
    show(f"early exit, measured on {name}:\n{curve_text(curve, chosen)}\n")
    return chosen.threshold


def draw_mistakes(trained: Trained, catalogue: Catalogue, positions: Sequence[int]) -> list[Mistake]:
    """Run the network once more on a few test images and draw what it found in each."""
    network, settings, saved, plan, execution = trained
    names, mistakes = saved["class_names"], []
    # with an early exit, passes differ from image to image
    step = settings.evaluation_batch_size if getattr(network, "exit_threshold", 1) >= 1 else 1
    for start in range(0, len(positions), step):
        entries = [catalogue.test[p] for p in positions[start : start + step]]
        batch = collate(list(evaluation_loader(settings, entries).dataset))
        with execution.autocast():
            output, evidence = forward_with_evidence(
                network,
                execution.images(batch.images),
                size=112,
                mask_background=plan.mask_background,
                branches=network.evaluated,
            )
        probabilities = network.predict_logits(output).float().softmax(dim=1)
        top, labels = (t.tolist() for t in probabilities.topk(min(4, len(names)), dim=1))
        for index, entry in enumerate(entries):
            drawn = isinstance(entry.source, int)
            picture = draw_demo_picture(entry.source) if drawn else load_picture(entry.source)[0]
            box = None
            if batch.boxes is not None:
                box = batch.boxes[index] * (network.input_size / batch.images.shape[-1])
            drawing = image_panel(
                picture,
                output,
                index,
                [names[label] for label in labels[index]],
                top[index],
                input_size=network.input_size,
                evidence=evidence[index],
                true_box=box,
                height=200,
            )
            predicted = names[labels[index][0]]
            mistakes.append(Mistake(drawing, batch.paths[index], names[entry.label], predicted, top[index][0]))
    return mistakes


def project(trained: Trained, catalogue: Catalogue) -> dict[str, object]:
    """Return what TensorBoard's projector shows of the test images: an embedding each, its class, a small picture."""
    network, settings, _, plan, execution = trained
    embeddings, thumbnails, class_of = [], [], []
    hook = network.backbone.register_forward_hook(lambda module, inputs, output: passes.append(output.embedding))
    try:
        for batch in evaluation_loader(settings, catalogue.test):
            passes = []
            with torch.no_grad(), execution.autocast():
                images = execution.images(batch.images)
                network(images, mask_background=plan.mask_background, branches=network.answer)
            # the pass over the object where there is one, over the picture where not
            seen = [embedding for embedding in passes[:2] if len(embedding) == len(images)]
            embeddings.append(seen[-1].float().cpu())
            thumbnails.append(F.interpolate(batch.images.float(), size=(32, 32)) / 255)
            class_of += [" ".join(catalogue.class_names[label].split()) for label in batch.labels.tolist()]
    finally:
        hook.remove()
    return {"mat": torch.cat(embeddings), "metadata": class_of, "label_img": torch.cat(thumbnails)}


def as_text(report: dict) -> str:
    lines = [
        f"{report['images']} test images{order_where_it_matters(report)}, epoch {report['epoch']}, chosen by "
        f"{report['selected_on']}",
        f"answer: {report['answer']}",
        "",
        f"{'branch':<10}{'top-1':>8}   95 % interval    {'top-5':>8}",
    ]
    for name, values in report["branches"].items():
        low, high = values["top1_interval_95"]
        lines.append(f"{name:<10}{values['top1']:>8.1%}   {low:.1%} to {high:.1%}  {values['top5']:>8.1%}")
    lines += ["", f"mean per-class accuracy of the answer: {report['mean_per_class_accuracy']:.1%}"]
    lines.append(f"expected calibration error of the answer: {report['calibration']['expected_error']:.1%}")
    if report["boxes"]:
        boxes = report["boxes"]
        lines.append(f"object boxes: IoU >= 0.5 for {boxes['share_at_0.5']:.1%}, mean IoU {boxes['mean']:.3f}")
    lines.append(f"{report['images_per_second']:.1f} images/s")
    if report["worst_confusions"]:
        lines += ["", "most frequent confusions:"]
        lines += [f"  {c['count']} x {c['true']} taken for {c['predicted']}" for c in report["worst_confusions"][:5]]
    return "\n".join(lines)


if __name__ == "__main__":
    with exit_with_one_sentence():
        main()
