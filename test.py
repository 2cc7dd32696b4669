"""Evaluate a checkpoint on its data set's test images: `python test.py checkpoint/demo-sgkrl/best.pth`.

Model and data are rebuilt from the settings saved in the checkpoint, not from config.py. The figures are printed and
written to report.json beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from config import Settings, SettingsError, complete
from datasets import Catalogue
from networks.losses import loss_terms
from train import catalogue_of, choose_split, draw_panel, evaluation_loader, load_trained
from utils.checkpoint import CheckpointError
from utils.early_exit import ExitCollector, choose_threshold, curve_text
from utils.engine import evaluate
from utils.errors import exit_with_one_sentence
from utils.files import write_text
from utils.metrics import confusion_matrix, mean_per_class_accuracy, topk_correct, wilson_interval, worst_confusions
from utils.pictures import save_png


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Evaluate a checkpoint on the test images of its data set.")
    parser.add_argument("checkpoint", type=Path, help="best.pth or last.pth of a run")
    parser.add_argument("--data_root", help="where the data set lies on this machine (default: as in training)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: as in training)")
    parser.add_argument("--precision", choices=("auto", "float32", "bf16"), help="(default: as in training)")
    parser.add_argument("--evaluation_batch_size", type=int, help="images at a time (default: as in training)")
    parser.add_argument("--workers", type=int, help="processes that load pictures (default: as in training)")
    parser.add_argument("--exit_threshold", type=float, help="sgkrl: surer images skip the windows (default: 1, none)")
    parser.add_argument(
        "--exit_curve",
        action="store_true",
        help="sgkrl: accuracy against compute on the validation images, and the threshold that loses nothing there",
    )
    parser.add_argument(
        "--branches", nargs="+", help="what to report beside the answer (default: all that matter to it)"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)

    # Rebuild: network, settings, data.
    overrides = {
        name: value
        for name, value in vars(options).items()
        if value is not None and name in Settings.__dataclass_fields__
    }
    network, settings, saved, plan, execution = load_trained(options.checkpoint, **overrides)
    catalogue, _ = catalogue_of(settings)
    if list(catalogue.class_names) != saved["class_names"]:
        raise CheckpointError(
            f"{options.checkpoint} knows {len(saved['class_names'])} classes and the data in {settings.data_root} "
            f"has {len(catalogue.class_names)} or others: give the --data_root it was trained on"
        )

    # Evaluate.
    shared = {
        "plan": plan,
        "loss_function": partial(loss_terms, label_smoothing=settings.label_smoothing),
        "execution": execution,
    }
    if options.exit_curve:
        settings = dataclasses.replace(settings, exit_threshold=calibrated_exit(network, settings, catalogue, shared))
    if settings.exit_threshold < 1:
        network.exit_threshold = settings.exit_threshold
    ranks = RankCollector()
    figures = evaluate(
        network,
        evaluation_loader(settings, catalogue.test),
        branches=options.branches,
        on_batch=ranks,
        description="test",
        **shared,
    )

    # Report.
    report = {
        "checkpoint": str(options.checkpoint),
        "epoch": saved["epoch"],
        "selected_on": saved["selected_on"],
        "answer": f"mean probability of {', '.join(network.answer)}" if len(network.answer) > 1 else network.answer[0],
        **ranks.report(saved["class_names"]),
        "boxes": {name.removeprefix("box_iou/"): v for name, v in figures.items() if name.startswith("box_iou/")}
        or None,
        "images_per_second": figures["images_per_second"],
        "settings": dataclasses.asdict(settings),
    }
    print(as_text(report), flush=True)
    folder = options.checkpoint.parent
    write_text(folder / "report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    panel = draw_panel(network, catalogue.test, settings, catalogue.class_names, execution, plan)
    save_png(folder / "pictures" / "test.png", panel)
    print(f"written to {folder / 'report.json'} and {folder / 'pictures' / 'test.png'}")


def calibrated_exit(network: torch.nn.Module, settings: Settings, catalogue: Catalogue, shared: dict) -> float:
    """Print accuracy against compute on the run's validation images; return the threshold that loses nothing there."""
    complete(dataclasses.replace(settings, exit_threshold=0.0))  # refuses systems that cannot exit
    if settings.select_on == "test":
        raise SettingsError(
            "--exit_curve needs validation images, and this run trained on all training images (select_on is test)"
        )
    _, entries, name = choose_split(settings, catalogue)
    collector = ExitCollector(network)
    evaluate(network, evaluation_loader(settings, entries), on_batch=collector, description="validation", **shared)
    curve = collector.curve()
    chosen = choose_threshold(curve)
    print(f"early exit, measured on {name}:\n{curve_text(curve, chosen)}\n", flush=True)
    return chosen.threshold


class RankCollector:
    """Collects, batch by batch, what each branch predicted."""

    def __init__(self) -> None:
        self.correct: dict[str, list[torch.Tensor]] = {}  # branch -> [B, 2] bool: among the first one, the first five
        self.predictions: list[torch.Tensor] = []
        self.labels: list[torch.Tensor] = []

    def __call__(self, batch, output, answer: torch.Tensor) -> None:
        labels = batch.labels.to(answer.device)
        for name, logits in {"answer": answer, **output.logits}.items():
            logits = logits.mean(dim=1) if logits.ndim == 3 else logits
            hits = torch.stack([topk_correct(logits, labels, 1), topk_correct(logits, labels, 5)], dim=1)
            self.correct.setdefault(name, []).append(hits)
        self.predictions.append(answer.argmax(dim=1))
        self.labels.append(labels)

    def report(self, class_names: Sequence[str]) -> dict:
        """Return accuracies with 95 % intervals, and the confusions of the answer."""
        predictions, labels = torch.cat(self.predictions).cpu(), torch.cat(self.labels).cpu()
        matrix = confusion_matrix(predictions, labels, len(class_names))
        branches = {}
        for name, batches in self.correct.items():
            hits = torch.cat(batches)
            top1, top5 = hits.sum(dim=0).tolist()
            branches[name] = {
                "top1": top1 / len(hits),
                "top1_interval_95": wilson_interval(top1, len(hits)),
                "top5": top5 / len(hits),
                "top5_interval_95": wilson_interval(top5, len(hits)),
            }
        return {
            "images": len(labels),
            "branches": branches,
            "mean_per_class_accuracy": mean_per_class_accuracy(matrix),
            "worst_confusions": worst_confusions(matrix, class_names),
        }


def as_text(report: dict) -> str:
    lines = [
        f"{report['images']} test images, epoch {report['epoch']}, chosen by {report['selected_on']}",
        f"answer: {report['answer']}",
        "",
        f"{'branch':<10}{'top-1':>8}   95 % interval    {'top-5':>8}",
    ]
    for name, values in report["branches"].items():
        low, high = values["top1_interval_95"]
        lines.append(f"{name:<10}{values['top1']:>8.1%}   {low:.1%} to {high:.1%}  {values['top5']:>8.1%}")
    lines += ["", f"mean per-class accuracy of the answer: {report['mean_per_class_accuracy']:.1%}"]
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
