"""Runs side by side, from the reports that test.py wrote: what differs in their settings and in their figures."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy

from utils.errors import UserError
from utils.reporting.results import read_predictions
from utils.shared_settings import OF_THE_MACHINE
from utils.text import cell

# What a comparison does not list
UNIMPORTANT = OF_THE_MACHINE | {"evaluation_batch_size", "fresh", "name", "save_every_steps", "skip_nonfinite"}
RESAMPLES = 10_000


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


def _has_numbers(value: object, *names: str) -> bool:
    return isinstance(value, dict) and all(_is_number(value.get(name)) for name in names)


def _are_two_numbers(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))


# What is read of a report, and whether it is there
EXPECTED: dict[str, Callable[[Mapping], bool]] = {
    "settings": lambda report: isinstance(report["settings"], dict) and "model" in report["settings"],
    "branches": lambda report: all(_has_numbers(branch, "top1") for branch in report["branches"].values()),
    "prediction": lambda report: "prediction" in report["branches"],
    "top1_interval_95": lambda report: _are_two_numbers(report["branches"]["prediction"]["top1_interval_95"]),
    "images": lambda report: _is_number(report.get("images")),
    "mean_per_class_accuracy": lambda report: _is_number(report.get("mean_per_class_accuracy")),
    "images_per_second": lambda report: _is_number(report.get("images_per_second")),
    "boxes": lambda report: not report.get("boxes") or _has_numbers(report["boxes"], "share_at_0.5", "mean"),
}


class ComparisonError(UserError):
    """Runs that cannot be compared, said in one sentence."""


class EvaluatedRun(NamedTuple):
    name: str
    report: Mapping
    correct: dict[str, bool] | None  # picture -> whether it was classified rightly; None without predictions.csv
    labels: dict[str, str] | None = None  # picture -> the name of its class


class PairedDifference(NamedTuple):
    """How much more often the second of two runs is right on the same images; shares in 0 .. 1.

    Of several runs on either side, their mean; `only_first` and `only_second` then count images of single runs.
    """

    images: int
    difference: float
    low: float  # 95 % interval
    high: float
    only_first: int  # images that only the first run gets right
    only_second: int


def compare(places: Sequence[Path], form: str = "text", *, restore: Callable[[Mapping], Mapping] = dict) -> str:
    """Return the table of runs as "text", "csv" or "markdown"; text ends with paired comparisons of all pairs.

    `places` are folders of runs (their report.json) or report files; `restore` turns the settings in a report, of
    any version, into those of this one by name. Raises ComparisonError where a report is missing.
    """
    runs = [_read_run(place) for place in places]
    if len(runs) < 2:
        raise ComparisonError(f"there is one run to compare, {places[0]}; expected at least two")
    header, rows = _table(runs, restore)
    if form == "csv":
        text = io.StringIO(newline="")
        escaped = ([_csv_cell(value) for value in row] for row in rows)
        csv.writer(text, lineterminator="\n").writerows([header, *escaped])
        return text.getvalue().rstrip("\n")
    pairs = [_sentence(one, other) for one, other in itertools.combinations(runs, 2)]
    if form == "markdown":
        lines = [header, ["---"] * len(header), *rows]
        table = ("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines)
        return "\n".join([*table, "", *(f"- {pair}" for pair in pairs)])
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in [header, *rows])
    return "\n".join([*lines, "", *pairs])


def paired_bootstrap(first: Sequence, second: Sequence, *, seed: int = 0) -> PairedDifference:
    """Compare two runs on the same images, in the same order: images are drawn again and again, with both predictions.

    `first`, `second`: whether each image is right, [images] or, of runs with several seeds each, [seeds, images]: an
    image is then drawn with all of its predictions, as those of one image are alike.

    Efron & Tibshirani, "An Introduction to the Bootstrap", 1993. Pairing leaves out how hard the images are, so the
    interval is much narrower than the runs' own. Other seeds are another matter.
    """
    first, second = (numpy.atleast_2d(numpy.asarray(right, dtype=bool)) for right in (first, second))
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    seeds, images = first.shape
    # only the counts of the kinds of images matter, by what the second side gains: a resample is a multinomial draw
    gains = numpy.array([*range(-seeds, 0), *range(1, seeds + 1), 0])
    of_image = second.sum(axis=0, dtype=int) - first.sum(axis=0, dtype=int)
    shares = (of_image == gains[:, None]).sum(axis=1) / images
    drawn = numpy.random.default_rng(seed).multinomial(images, shares, size=RESAMPLES)
    differences = drawn @ gains / (seeds * images)
    low, high = numpy.quantile(differences, (0.025, 0.975)).tolist()
    difference = (only_second - only_first) / (seeds * images)
    return PairedDifference(images, difference, low, high, only_first, only_second)


def exact_probability(only_first: int, only_second: int) -> float:
    """Return how probable so uneven a split, or a more uneven one, of the images that one run alone gets right is where
    both are as often right: of few such images, bootstrap intervals are too narrow.

    McNemar, "Note on the sampling error of the difference between correlated proportions or percentages", 1947, exact.
    """
    differing, fewer = only_first + only_second, min(only_first, only_second)
    return min(1.0, sum(math.comb(differing, n) for n in range(fewer + 1)) / 2 ** (differing - 1)) if differing else 1.0


def _read_run(place: Path) -> EvaluatedRun:
    path = place / "report.json" if place.is_dir() or not place.suffix else place
    if path.suffix == ".pth":
        ending = "" if path.stem == "best" else f"-{path.stem}"
        path = path.with_name(f"report{ending}.json")
    if not path.is_file():
        ending = path.stem.removeprefix("report")
        name = ending.removesuffix("-shuffled").removeprefix("-") or "best"
        shuffle = " --shuffle" if ending.endswith("-shuffled") else ""
        checkpoint = path.with_name(f"{name}.pth")
        command = f"python test.py {checkpoint}{shuffle}"
        if not re.fullmatch(r"best|last|epoch-\d+", name) and not checkpoint.is_file():
            command = "test.py and the options that its name stands for"  # such as views
        raise ComparisonError(f"there is no report {path}: write it with {command}")
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        branches = report["branches"]
        if "answer" in branches:  # of an older version
            report["branches"] = branches = {"prediction": branches.pop("answer"), **branches}
        missing = [name for name, holds in EXPECTED.items() if not holds(report)]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ComparisonError(f"{path} is no report of test.py: write it again") from None
    if missing:
        raise ComparisonError(f"{path} is no whole report of test.py, it lacks {', '.join(missing)}: write it again")
    table = path.with_name(path.name.replace("report", "predictions", 1)).with_suffix(".csv")
    correct = labels = None
    if table.is_file():
        root = report["settings"].get("data_root")
        rows = {_below(row["picture"], root): row for row in read_predictions(table)}
        correct = {picture: row["correct"] == "1" for picture, row in rows.items()}
        labels = {picture: row["label"] for picture, row in rows.items()}
    name = path.parent.name + path.stem.removeprefix("report")
    return EvaluatedRun(name, report, correct, labels)


def _below(picture: str, root: str | None) -> str:
    """The picture's path within its data set, which may lie elsewhere on another machine."""
    if root is None:
        return picture
    path = Path(picture)
    folder = Path(root).expanduser()
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else picture


def _table(runs: Sequence[EvaluatedRun], restore: Callable[[Mapping], Mapping]) -> tuple[list[str], list[list[str]]]:
    # lists for tuples, as in the reports
    settings = [json.loads(json.dumps(restore(run.report["settings"]))) for run in runs]
    names = list(dict.fromkeys(name for values in settings for name in values))
    differing = [
        name for name in names if name not in UNIMPORTANT and _differs([s[name] for s in settings if name in s])
    ]
    branches = list(dict.fromkeys(name for run in runs for name in run.report["branches"]))
    header = ["run", *differing, "images", "prediction %", "95 % interval"]
    header += [f"{b} %" for b in branches if b != "prediction"]
    header += ["per class %", "boxes IoU >= 0.5 %", "mean IoU", "images/s"]
    rows = []
    for run, values in zip(runs, settings, strict=True):
        report, prediction = run.report, run.report["branches"]["prediction"]
        low, high = prediction["top1_interval_95"]
        boxes = report.get("boxes") or {}
        row = [run.name, *(_shown(values.get(name, "")) for name in differing), str(report["images"])]
        row += [f"{100 * prediction['top1']:.1f}", f"{100 * low:.1f} to {100 * high:.1f}"]
        others = [report["branches"].get(branch) for branch in branches if branch != "prediction"]
        row += ["" if figures is None else f"{100 * figures['top1']:.1f}" for figures in others]
        row += [f"{100 * report['mean_per_class_accuracy']:.1f}"]
        row += [f"{100 * boxes['share_at_0.5']:.1f}", f"{boxes['mean']:.3f}"] if boxes else ["", ""]
        rows.append([*row, f"{report['images_per_second']:.1f}"])
    return header, rows


def _differs(values: Sequence[object]) -> bool:
    """Of the runs that have a setting: those of another system may have none of that name."""
    return any(value != values[0] for value in values)


def _csv_cell(text: str) -> str:
    """A name, or a setting's value, which a spreadsheet shall not take for a formula; numbers stay numbers."""
    try:
        float(text)
    except ValueError:
        return cell(text)
    return text


def _shown(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _sentence(one: EvaluatedRun, other: EvaluatedRun) -> str:
    """The paired comparison of two runs, or why there is none."""
    if one.correct is None or other.correct is None:
        missing = one.name if one.correct is None else other.name
        return f"{other.name} against {one.name}: {missing} has no predictions.csv, evaluate it again to compare"
    if one.correct.keys() != other.correct.keys():
        return f"{other.name} against {one.name}: they were tested on different images, so they cannot be paired"
    if one.labels != other.labels:
        return f"{other.name} against {one.name}: their images have other labels, so they cannot be paired"
    pictures = list(one.correct)
    paired = paired_bootstrap([one.correct[p] for p in pictures], [other.correct[p] for p in pictures])
    if not paired.only_first + paired.only_second:
        right = f"{sum(one.correct.values())} of {paired.images} images"
        return f"{other.name} against {one.name}: +0.0 points, they are right on the same {right}"
    is_sure = not paired.low <= 0 <= paired.high and exact_probability(paired.only_first, paired.only_second) < 0.05
    verdict = "; more than the choice of test images explains" if is_sure else ""
    return (
        f"{other.name} against {one.name}: {100 * paired.difference:+.1f} points, 95 % interval "
        f"{100 * paired.low:+.1f} to {100 * paired.high:+.1f} (paired bootstrap of {paired.images} images; "
        f"{paired.only_second} only {other.name} gets right, {paired.only_first} only {one.name}){verdict}"
    )
