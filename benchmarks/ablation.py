"""Does each part earn its place? A table of training runs that differ in one thing, over several seeds.

    python benchmarks/ablation.py --data_root CUB_200_2011 --runs checkpoint/ablation            # the rows that decide
    python benchmarks/ablation.py --data_root ... --runs ... --rows resnet mmal trained --seeds 0 1 2
    python benchmarks/ablation.py --data_root ... --runs ... --test                       # final rows: test images
    python benchmarks/ablation.py --table results.jsonl                                   # show it, run nothing

Every run is `python train.py` with the flags of its row (`--list` shows them) after the common ones, in a folder of
its own below `--runs`: a sweep that was interrupted, or is asked for more rows or seeds, goes on from what is there.
Any other flag of train.py that the rows' systems have may follow and holds for all rows, but where a row has its own;
runs with other such flags need a `--runs` of their own.
Test images are looked at only with `--test`, after the last epoch of each run; where the graph links the windows of a
batch, a second time in random order.

The file of `--results` gets a line as each run ends. What it holds already, with the same flags, is not run again, also
on another machine: a line does not hold where data and weights lie. It knows only the flags, not how many processes
trained, nor what the defaults of config.py were: after changing one, give another file, or another name to the rows
that ran before and a `commit`.
A run that fails does not end the sweep. `--processes N` trains every run by torchrun, on a CPU too: two processes of a
thread each are faster there than one of two threads.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import statistics
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from measuring import PROJECT, machine
from tqdm import tqdm

from utils.errors import UserError, exit_with_one_sentence
from utils.files import write_text
from utils.reporting.compare import paired_bootstrap
from utils.reporting.results import read_predictions
from utils.training.distributed import choose_device

COMMON = (
    *("--dataset", "cub", "--input_size", "224", "--epochs", "8", "--batch_size", "16"),
    *("--learning_rate", "4e-3", "--head_learning_rate_factor", "5", "--schedule", "one_cycle"),
    *("--clip_gradient_norm", "10", "--pictures_every", "0"),
    *("--batch_norm", "frozen"),  # for every row alike; other statistics after the rows: a table of its own
)

RESNET = ("--model", "resnet")
# the background is masked from an epoch past the last one: never
UNMASKED = ("--mask_from_epoch", "100")
# the object box as MMAL-Net draws it, round what is above the mean of the trunk's own grid
COARSE = ("--localization_stride", "32", "--localization_threshold", "1.0")
COLOCALIZATION = ("--localization", "colocalization")
ASPECT = ("--keep_aspect_ratio",)
MODERN = ("--recipe", "modern", "--learning_rate", "1e-4", "--head_learning_rate_factor", "10")
STAGE3_WINDOWS = ("--window_source", "stage3")
NO_WINDOWS = ("--loss_weights", "window=0", "graph=0", "--prediction", "raw", "fused", "object")
# our SG-KRL as it was before: its graph by itself, spatial weights as CBAM has them
FORMER = (*UNMASKED, "--no-graph_residual", "--spatial_weights", "absolute")
PUBLISHED = ("--model", "sgkrl_published", *UNMASKED)
# comparators see the pictures that the other rows see: their own recipes crop and colour them otherwise. Two things are
# left to those: dflcnn keeps the aspect ratio, and so sees central squares, and pmg normalises with 0.5
INPUT_SIZE = "INPUT_SIZE"  # stands for what the common flags say
# stands for as many epochs as take as long as those of the common flags take `trained`, a training step of which is
# 4.3 plain ones (systems.py at 224 pixels)
EQUAL_EPOCHS = "EQUAL_EPOCHS"
PLAIN_STEPS = 4.3
SAME_PICTURES = (
    *("--resize_size", INPUT_SIZE, "--padding", "0", "--flip", "0.5", "--rotation", "0"),
    *("--brightness", "0.2", "--contrast", "0.2", "--saturation", "0"),
)
COMPARATORS = ("ntsnet", "apinet", "cal", "dcl", "dflcnn", "mcloss")

# name -> flags after the common ones
ROWS: dict[str, tuple[str, ...]] = {
    "resnet": RESNET,
    # the plain network trained otherwise, in one thing each
    "resnet-crops": (*RESNET, "--resize_size", "256"),  # random crops of 224, the central one in evaluation
    # the central square of the picture, undistorted, in place of all of it made square; random ones in training
    "resnet-aspect": (*RESNET, *ASPECT),
    "resnet-adamw": (*RESNET, "--optimizer", "adamw", "--learning_rate", "1e-4", "--weight_decay", "0.05"),
    "resnet-ema": (*RESNET, "--ema_decay", "0.999"),
    "resnet-smoothing": (*RESNET, "--label_smoothing", "0.1"),
    "resnet-mixup": (*RESNET, "--mixup", "0.2"),
    "resnet-cutmix": (*RESNET, "--cutmix", "1.0"),
    # the whole recipe, in place of the common rates
    "resnet-modern": (*RESNET, *MODERN),
    "resnet-modern-aspect": (*RESNET, *MODERN, *ASPECT),
    # the object found by a frozen copy of the pretrained trunk
    "resnet-colocalization": (*RESNET, *COLOCALIZATION),
    "mmal-colocalization": ("--model", "mmal", *COLOCALIZATION),
    "trained-colocalization": (*UNMASKED, *COLOCALIZATION),
    "trained-learned": (*UNMASKED, "--localization", "learned"),
    "mmal": ("--model", "mmal"),
    "flrdf": ("--model", "flrdf"),
    "scrim": ("--model", "scrim"),
    **{model: ("--model", model, *SAME_PICTURES) for model in COMPARATORS},
    # where rates of its own are needed not to fall to chance
    "crossx": (
        *("--model", "crossx", *SAME_PICTURES, "--stage3_pooling", "mean"),
        *("--learning_rate", "1e-3", "--head_learning_rate_factor", "1"),
    ),
    "pmg": ("--model", "pmg", *SAME_PICTURES, "--learning_rate", "1e-3"),  # a quarter: four steps in every batch
    "resnet-equal-compute": (*RESNET, "--epochs", EQUAL_EPOCHS),
    "resnet-10-epochs": (*RESNET, "--epochs", "10"),  # as long as 3 epochs of `trained`, whose first trains raw only
    "apinet-equal-compute": ("--model", "apinet", *SAME_PICTURES, "--epochs", EQUAL_EPOCHS),
    "published": PUBLISHED,
    "published-aspect": (*PUBLISHED, *ASPECT),
    "published-batch-graph": (*PUBLISHED, "--graph_scope", "batch"),
    "trained": UNMASKED,
    "trained-mean": (*UNMASKED, "--ensembling", "mean_probability"),  # what `trained` was until weights were learnt
    "trained-aspect": (*UNMASKED, *ASPECT),
    "trained-modern-aspect": (*UNMASKED, *MODERN, *ASPECT),
    "trained-former": FORMER,
    # without one part
    "trained-no-fusion-loss": (*UNMASKED, "--loss_weights", "fused=0", "--prediction", "raw", "object", "graph"),
    "trained-no-fusion": (*UNMASKED, "--without", "fusion"),
    "trained-no-weighting": (*UNMASKED, "--without", "weighting"),
    "trained-no-windows": (*UNMASKED, *NO_WINDOWS),
    "trained-no-graph": (*UNMASKED, "--loss_weights", "graph=0", "--prediction", "raw", "fused", "object"),
    "trained-mask": ("--mask_from_epoch", "4"),
    "trained-coarse": (*UNMASKED, *COARSE),
    # without the windows, the dearest part, where only the object box is in question
    "trained-former-no-windows": (*FORMER, *NO_WINDOWS),
    "trained-former-coarse-no-windows": (*FORMER, *COARSE, *NO_WINDOWS),
    "published-no-windows": (*PUBLISHED, "--loss_weights", "window=0", "graph=0"),
    # variants
    "trained-lone-graph": (*UNMASKED, "--no-graph_residual"),
    "trained-absolute-weights": (*UNMASKED, "--spatial_weights", "absolute"),
    "trained-stage3-windows": (*UNMASKED, *STAGE3_WINDOWS),
    "trained-stage3-windows-aspect": (*UNMASKED, *STAGE3_WINDOWS, *ASPECT),
    "trained-raw-128": (*UNMASKED, "--raw_size", "128"),
    "trained-raw-128-stage3-windows": (*UNMASKED, "--raw_size", "128", *STAGE3_WINDOWS),
    "trained-crop-scale": (*UNMASKED, "--crop_scale", "0.5"),
    "trained-crop-gradient": (*UNMASKED, "--crop_gradient"),
    "trained-neighbours": (*UNMASKED, "--graph_neighbours", "6"),
    "trained-graph-overlap": (*UNMASKED, "--graph_edges", "overlap"),
    "trained-graph-distance": (*UNMASKED, "--graph_edges", "distance"),
    "trained-warmup-3": (*UNMASKED, "--warmup_epochs", "3"),
    "trained-smoothing": (*UNMASKED, "--label_smoothing", "0.1"),
    "trained-detail": (*UNMASKED, "--image_size", "448"),
    "trained-prediction-object": (*UNMASKED, "--prediction", "object"),
    "mmal-dense": ("--model", "mmal", "--localization_stride", "16", "--localization_threshold", "1.2"),
    "mmal-detail": ("--model", "mmal", "--image_size", "448"),
}
# flags that leave a run's figures as they are
OF_THE_MACHINE = ("--checkpoint_dir", "--workers", "--cache", "--device")
DECIDING = ("resnet", "mmal", "published", "trained", "trained-coarse")


def main(arguments: Sequence[str] | None = None) -> list[dict]:
    options, common = parse_arguments(arguments)
    if options.list:
        for name, flags in ROWS.items():
            print(f"{name:24} {' '.join(flags)}")
        return []
    if options.table:
        results = read_results(options.table)
        rows = sorted_rows(results)
        check_against(options.against, rows)
        print(as_text(results, rows, options.against, test=any("test" in result for result in results)))
        return results
    check_against(options.against, options.rows)
    common = [*COMMON, *common]
    path = options.results or options.runs / "results.jsonl"
    stored = {identity(result): result for result in read_results(path)} if path.exists() else {}
    wanted = [(row, seed) for seed, row in itertools.product(options.seeds, options.rows)]
    bar = tqdm(total=len(wanted), desc="runs", unit=" runs", disable=None)
    failures: dict[tuple[str, int], Exception] = {}
    writing = threading.Lock()

    def one(job: tuple[str, int]) -> dict | None:
        flags = flags_of(*job, common)
        result = stored.get((*job, command_of(flags)))
        if result is None or (options.test and not is_tested(result, flags)):
            try:
                result = run(*job, common, options)
            except Exception as error:  # whatever it was, the other runs go on
                failures[job] = error
                bar.update()
                bar.write(f"{job[0]} seed {job[1]} failed", file=sys.stderr)
                return None
            with writing:
                store(path, result)
        bar.update()
        bar.set_postfix_str(f"{job[0]} seed {job[1]}: {100 * result['validation']['accuracy/prediction']:.1f} %")
        return result

    with bar, ThreadPoolExecutor(options.jobs) as pool:
        results = [result for result in pool.map(one, wanted) if result is not None]
    print(as_text(results, options.rows, options.against, test=options.test))
    if failures:
        reasons = [f"{row} seed {seed}: {type(e).__name__}: {e}" for (row, seed), e in failures.items()]
        raise SystemExit("\n".join([f"{len(failures)} of {len(wanted)} runs failed:", *reasons]))
    return results


def parse_arguments(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description="Train the rows of the ablation table. Flags of train.py that follow hold for all rows."
    )
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=DECIDING, metavar="ROW", help="(see --list)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="default: 0")
    parser.add_argument("--runs", type=Path, default=Path("checkpoint/ablation"), help="default: %(default)s")
    parser.add_argument("--results", type=Path, metavar="FILE", help="one line per run (default: RUNS/results.jsonl)")
    parser.add_argument("--table", type=Path, metavar="FILE", help="show the table of such a file and end")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side (default: 1)")
    parser.add_argument("--processes", type=int, default=1, help="processes that train each run (default: 1)")
    parser.add_argument(
        "--threads", type=int, default=0, help="CPU threads of a process (default: all, or 1 of several)"
    )
    parser.add_argument("--test", action="store_true", help="look at the test images, once, after the last epoch")
    parser.add_argument(
        "--against",
        nargs="+",
        default=[],
        metavar="ROW",
        help="rows to pair the others with (default: the first, and published)",
    )
    parser.add_argument("--list", action="store_true", help="show the rows and end")
    return parser.parse_known_args(arguments)


def flags_of(row: str, seed: int, common: Sequence[str]) -> list[str]:
    given = dict(itertools.pairwise(portable(common)))  # of a flag that comes twice the last
    meant = {INPUT_SIZE: given["--input_size"], EQUAL_EPOCHS: str(round(PLAIN_STEPS * int(given["--epochs"])))}
    own = [meant.get(word, word) for word in ROWS[row]]
    return [*common, *own, "--seed", str(seed), "--name", f"{row}-{seed}"]


def portable(flags: Sequence[str]) -> list[str]:
    """Return flags of train.py without what only holds on this machine: places, and how pictures are loaded."""
    options: list[list[str]] = []
    for word in flags:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            options.append([name, value] if equals else [name])
        else:
            options[-1].append(word)
    words = []
    for name, *values in options:
        if name == "--data_root":
            values = ["DATA"]
        elif name == "--pretrained":
            values = [Path(value).name for value in values]
        if name not in OF_THE_MACHINE:
            words += [name, *values]
    return words


def command_of(flags: Sequence[str]) -> str:
    return f"python train.py {shlex.join(portable(flags))}"


def links_the_batch(flags: Sequence[str]) -> bool:
    scopes = [value for name, value in itertools.pairwise(portable(flags)) if name == "--graph_scope"]
    return scopes[-1:] == ["batch"]


def is_tested(result: Mapping, flags: Sequence[str]) -> bool:
    return "test" in result and ("test_shuffled" in result or not links_the_batch(flags))


def run(row: str, seed: int, common: Sequence[str], options: argparse.Namespace) -> dict:
    """Train, or go on with, one run; return its figures. Raises RuntimeError with the output of a run that failed."""
    flags = flags_of(row, seed, common)
    environment = os.environ | ({"OMP_NUM_THREADS": str(options.threads)} if options.threads else {})
    script("train.py", [*flags, "--checkpoint_dir", str(options.runs)], environment, options.processes)
    (folder,) = options.runs.glob(f"*-{row}-{seed}")
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    last = lines[-1]
    average = any(name.startswith("validation_ema/") for name in last)  # then that is the result, as in test.py
    validation = "validation_ema/" if average else "validation/"
    result = {
        "row": row,
        "seed": seed,
        "common": shlex.join(portable(common)),
        "command": command_of(flags),
        "epochs": last["epoch"],
        "validation": in_current_words(
            {name.removeprefix(validation): v for name, v in last.items() if name.startswith(validation)}
        ),
        "boxes_by_epoch": [line.get(f"{validation}box_iou/share_at_0.5") for line in lines],
        "train_images_per_second": statistics.median(line["speed/train_images_per_second"] for line in lines),
        "processes": options.processes,
        "machine": machine(choose_device("auto")),
    }
    if options.test:
        result["test"] = test_figures(folder, environment)
        if links_the_batch(flags):
            result["test_shuffled"] = test_figures(folder, environment, shuffle=True)
        rows = sorted(read_predictions(folder / "predictions-last.csv"), key=lambda line: line["picture"])
        result["pictures"] = len(rows)
        result["right"] = "".join(line["correct"] for line in rows)  # "1" or "0" each, by the pictures' names
    return result


def test_figures(folder: Path, environment: Mapping[str, str], *, shuffle: bool = False) -> dict[str, float]:
    """Return accuracies and box figures of the last epoch on the test images, which are looked at once."""
    report = folder / ("report-last-shuffled.json" if shuffle else "report-last.json")
    if not report.exists():
        script("test.py", [str(folder / "last.pth"), *(["--shuffle"] if shuffle else [])], environment)
    content = json.loads(report.read_text(encoding="utf-8"))
    accuracies = {f"accuracy/{name}": branch["top1"] for name, branch in content["branches"].items()}
    return in_current_words(accuracies) | {f"box_iou/{name}": value for name, value in (content["boxes"] or {}).items()}


def in_current_words(figures: Mapping[str, float]) -> dict[str, float]:
    """Return figures of a run of any version: older ones called the prediction the answer."""
    return {"accuracy/prediction" if name == "accuracy/answer" else name: value for name, value in figures.items()}


def script(name: str, flags: Sequence[str], environment: Mapping[str, str], processes: int = 1) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes))
    command = [sys.executable, *(torchrun if processes > 1 else ()), str(PROJECT / name), *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with exit code {done.returncode}:\n{done.stderr[-8000:]}")


# ---- The file of results --------------------------------------------------------------------------------------------


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


# ---- Tables ---------------------------------------------------------------------------------------------------------


def check_against(against: Sequence[str], rows: Sequence[str]) -> None:
    """Raise ValueError for a row to pair with that is not among the table's."""
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


if __name__ == "__main__":
    with exit_with_one_sentence():
        main()
