"""The runs of an ablation: the file that keeps a line of each, and the tables and paired comparisons of many."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from sweep_rows import ROWS

from utils.errors import UserError
from utils.files import write_text
from utils.reporting.compare import paired_bootstrap


def identity(result: Mapping) -> tuple[str, int, str]:
    return result["row"], result["seed"], result["command"]


def read_results(path: Path) -> list[dict]:
    """Return the runs of a file, one a line. Raises UserError, with the line's number, for another file."""
    results = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            result = json.loads(line)
            known = {"row", "seed", "common", "command", "validation"} <= result.keys()
        except (ValueError, AttributeError):
            known = False
        if not known:
            raise UserError(f"line {number} of {path} is no result of this script: mend it, or give another file")
        splits = {"validation", "test", "test_shuffled"} & result.keys()
        results.append(result | {split: in_current_words(result[split]) for split in splits})
    return results


def store(path: Path, result: dict) -> None:
    """Add a run to the file, in place of the same run where it was less; all others stay."""
    results = {identity(known): known for known in read_results(path)} if path.exists() else {}
    results[identity(result)] = result
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(known) + "\n" for known in results.values()))


def in_current_words(figures: Mapping[str, float]) -> dict[str, float]:
    """Return figures of a run of any version: older ones called the prediction the answer."""
    return {"accuracy/prediction" if name == "accuracy/answer" else name: value for name, value in figures.items()}


def check_against(against: Sequence[str], rows: Sequence[str]) -> None:
    """Raise UserError for a row to pair with that is not among the table's."""
    for row in against:
        if row not in rows:
            raise UserError(f"--against {row} is no row of this table, which has {', '.join(rows)}: give one of them")


def sorted_rows(results: Sequence[Mapping]) -> list[str]:
    """The rows of the results in the order of `ROWS`, those it no longer has last."""
    found = dict.fromkeys(result["row"] for result in results)
    return [row for row in ROWS if row in found] + [row for row in found if row not in ROWS]


def as_text(results: Sequence[Mapping], rows: Sequence[str], against: Sequence[str], *, test: bool) -> str:
    """The tables and paired comparisons, apart for runs with other common flags."""
    parts = []
    for common in dict.fromkeys(result["common"] for result in results):
        alike = [result for result in results if result["common"] == common]
        parts += [common, f"validation images, last epoch:\n{as_table(alike, 'validation', rows)}"]
        tested = [result for result in alike if "test" in result]
        if test and tested:
            parts.append(f"test images, last epoch:\n{as_table(tested, 'test', rows)}")
            parts.append("\n".join(paired(tested, rows, against)))
    return "\n\n".join(part for part in parts if part)


def as_table(results: Sequence[Mapping], split: str, rows: Sequence[str]) -> str:
    """Mean over the seeds of each row in per cent, and the prediction's standard deviation where there are several."""
    names = list(dict.fromkeys(n for r in results for n in r[split] if n.startswith("accuracy/")))
    names = ["accuracy/prediction", *(n for n in names if n != "accuracy/prediction"), "box_iou/share_at_0.5"]
    titles = [n.removeprefix("accuracy/").replace("box_iou/share_at_0.5", "boxes") for n in names]
    lines = [["row", "seeds", "spread", *titles], ["---"] * (3 + len(titles))]
    for row in rows:
        orders = {split: row, "test_shuffled": f"{row}, shuffled"} if split == "test" else {split: row}
        for order, title in orders.items():
            runs = [result[order] for result in results if result["row"] == row and order in result]
            if runs:
                lines.append([title, *_cells(runs, names)])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _cells(runs: Sequence[Mapping[str, float]], names: Sequence[str]) -> list[str]:
    predictions = [100 * figures["accuracy/prediction"] for figures in runs]
    spread = f"{statistics.stdev(predictions):.1f}" if len(predictions) > 1 else ""
    means = [
        f"{100 * statistics.mean(figures[name] for figures in runs):.1f}" if all(name in f for f in runs) else ""
        for name in names
    ]
    return [str(len(runs)), spread, *means]


def paired(results: Sequence[Mapping], rows: Sequence[str], against: Sequence[str]) -> list[str]:
    """Each row against those of `against` (none: the first, and `published`), on the same images and seeds.

    Pictures are drawn again and again, each with all seeds that both rows have. Two of `against` are paired once.
    """
    runs = {(result["row"], result["seed"]): result["right"] for result in results}
    rows = [row for row in rows if any(row == tested for tested, _ in runs)]
    bases = [base for base in dict.fromkeys(against or [*rows[:1], "published"]) if base in rows]
    pairs = [(row, base) for at, base in enumerate(bases) for row in rows if row not in bases[: at + 1]]
    return [_sentence(row, base, runs) for row, base in pairs]


def _sentence(row: str, base: str, runs: Mapping[tuple[str, int], str]) -> str:
    seeds = sorted(seed for name, seed in runs if name == row and (base, seed) in runs)
    if not seeds:
        return f"{row} against {base}: no seed that both have, so they cannot be paired"
    if any(len(runs[row, seed]) != len(runs[base, seed]) for seed in seeds):
        return f"{row} against {base}: they were tested on different images, so they cannot be paired"
    first, second = ([[letter == "1" for letter in runs[name, seed]] for seed in seeds] for name in (base, row))
    difference = paired_bootstrap(first, second)
    return (
        f"{row} against {base}: {100 * difference.difference:+.1f} points, 95 % interval "
        f"{100 * difference.low:+.1f} to {100 * difference.high:+.1f} "
        f"(of the choice of images; seeds {', '.join(map(str, seeds))})"
    )
