"""Does each part earn its place? A table of training runs that differ in one thing, over several seeds.

    python benchmarks/ablation.py --data_root CUB_200_2011 --runs checkpoint/ablation            # the rows that decide
    python benchmarks/ablation.py --data_root ... --runs ... --rows resnet mmal trained --seeds 0 1 2
    python benchmarks/ablation.py --data_root ... --runs ... --test                       # final rows: test images

Every run is `python train.py` with the flags of its row (`--list` shows them) after the common ones, in a folder of its
own below `--runs`: a sweep that was interrupted, or is asked for more rows or seeds, goes on from what is there. Any
other flag of train.py may follow and holds for all rows. The table is of the last epoch on the validation images; test
images are looked at only with `--test`, after the last epoch of each run. `results.jsonl` keeps one line per run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from measuring import PROJECT, machine
from tqdm import tqdm

from utils.compare import paired_bootstrap
from utils.distributed import choose_device
from utils.files import write_text
from utils.results import read_predictions

COMMON = (
    *("--dataset", "cub", "--input_size", "224", "--epochs", "8", "--batch_size", "16"),
    *("--learning_rate", "4e-3", "--head_learning_rate_factor", "5", "--schedule", "one_cycle"),
    *("--clip_gradient_norm", "10", "--pictures_every", "0", "--mask_from_epoch", "100"),
)

# name -> flags after the common ones
ROWS: dict[str, tuple[str, ...]] = {
    "resnet": ("--model", "resnet"),
    "mmal": ("--model", "mmal"),
    "flrdf": ("--model", "flrdf"),
    "scrim": ("--model", "scrim"),
    "published": ("--wiring", "published"),
    "published-batch-graph": ("--wiring", "published", "--graph_scope", "batch"),
    "trained": (),
    # without one part
    "trained-no-fusion-loss": ("--loss_weights", "fused=0", "--answer", "raw", "object", "graph"),
    "trained-no-windows": ("--loss_weights", "window=0", "graph=0", "--answer", "raw", "fused", "object"),
    "trained-no-graph": ("--loss_weights", "graph=0", "--answer", "raw", "fused", "object"),
    "trained-mask": ("--mask_from_epoch", "4"),
    # variants
    "trained-dense": ("--localization_stride", "16"),
    "trained-threshold": ("--localization_threshold", "1.2"),
    "trained-dense-threshold": ("--localization_stride", "16", "--localization_threshold", "1.2"),
    "mmal-dense-threshold": ("--model", "mmal", "--localization_stride", "16", "--localization_threshold", "1.2"),
    "trained-warmup-3": ("--warmup_epochs", "3"),
    "trained-smoothing": ("--label_smoothing", "0.1"),
    "trained-detail": ("--image_size", "448"),
    "mmal-detail": ("--model", "mmal", "--image_size", "448"),
    "trained-answer-object": ("--answer", "object"),
}
DECIDING = ("resnet", "mmal", "published", "trained", "trained-dense-threshold")


def main(arguments: Sequence[str] | None = None) -> list[dict]:
    options, common = parse_arguments(arguments)
    if options.list:
        for name, flags in ROWS.items():
            print(f"{name:24} {' '.join(flags)}")
        return []
    common = [*COMMON, *common]
    wanted = [(row, seed) for seed, row in itertools.product(options.seeds, options.rows)]
    bar = tqdm(total=len(wanted), desc="runs", unit=" runs", disable=None)

    def one(job: tuple[str, int]) -> dict:
        result = run(*job, common, options.runs, test=options.test, threads=options.threads)
        bar.update()
        bar.set_postfix_str(f"{job[0]} seed {job[1]}: {100 * result['validation']['accuracy/answer']:.1f} %")
        return result

    with bar, ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(one, wanted))
    lines = (json.dumps(result) + "\n" for result in results)
    write_text(options.runs / "results.jsonl", "".join(lines))
    print(f"{' '.join(common)}\n")
    print(as_table(results, "test" if options.test else "validation", options.rows))
    if options.test:
        print("\n" + "\n".join(paired(results, options.rows)))
    return results


def parse_arguments(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description="Train the rows of the ablation table. Flags of train.py that follow hold for all rows."
    )
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=DECIDING, metavar="ROW", help="(see --list)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="default: 0")
    parser.add_argument("--runs", type=Path, default=Path("checkpoint/ablation"), help="default: %(default)s")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side (default: 1)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of each run (default: all)")
    parser.add_argument("--test", action="store_true", help="look at the test images, once, after the last epoch")
    parser.add_argument("--list", action="store_true", help="show the rows and end")
    return parser.parse_known_args(arguments)


def run(row: str, seed: int, common: Sequence[str], runs: Path, *, test: bool, threads: int) -> dict:
    """Train, or go on with, one run; return its figures. Raises RuntimeError with the output of a run that failed."""
    name = f"{row}-{seed}"
    flags = [*common, *ROWS[row], "--seed", str(seed), "--name", name, "--checkpoint_dir", str(runs)]
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    script("train.py", flags, environment)
    (folder,) = runs.glob(f"*-{name}")
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    last = lines[-1]
    result = {
        "row": row,
        "seed": seed,
        "command": f"python train.py {' '.join(flags)}",
        "epochs": last["epoch"],
        "validation": {k.removeprefix("validation/"): v for k, v in last.items() if k.startswith("validation/")},
        "boxes_by_epoch": [line.get("validation/box_iou/share_at_0.5") for line in lines],
        "train_images_per_second": statistics.median(line["speed/train_images_per_second"] for line in lines),
        "machine": machine(choose_device("auto")),
    }
    if test:
        report = folder / "report-last.json"
        if not report.exists():
            script("test.py", [str(folder / "last.pth")], environment)
        content = json.loads(report.read_text(encoding="utf-8"))
        result["test"] = {f"accuracy/{name}": branch["top1"] for name, branch in content["branches"].items()}
        result["test"] |= {f"box_iou/{name}": value for name, value in (content["boxes"] or {}).items()}
        rows = read_predictions(folder / "predictions-last.csv")
        result["right"] = {line["picture"]: line["answer"] == "1" for line in rows}
    return result


def script(name: str, flags: Sequence[str], environment: Mapping[str, str]) -> None:
    command = [sys.executable, str(PROJECT / name), *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with exit code {done.returncode}:\n{done.stderr[-2000:]}")


def as_table(results: Sequence[dict], split: str, rows: Sequence[str]) -> str:
    """Mean over the seeds of each row in per cent, and the standard deviation of the answer where there are several."""
    names = list(dict.fromkeys(n for r in results for n in r[split] if n.startswith("accuracy/")))
    names = ["accuracy/answer", *(n for n in names if n != "accuracy/answer"), "box_iou/share_at_0.5"]
    titles = [n.removeprefix("accuracy/").replace("box_iou/share_at_0.5", "boxes") for n in names]
    lines = [["row", "seeds", "spread", *titles], ["---"] * (3 + len(titles))]
    for row in rows:
        runs = [result[split] for result in results if result["row"] == row]
        answers = [100 * figures["accuracy/answer"] for figures in runs]
        spread = f"{statistics.stdev(answers):.1f}" if len(answers) > 1 else ""
        means = [
            f"{100 * statistics.mean(figures[name] for figures in runs):.1f}" if name in runs[0] else ""
            for name in names
        ]
        lines.append([row, str(len(runs)), spread, *means])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def paired(results: Sequence[dict], rows: Sequence[str]) -> list[str]:
    """Each row against the first on the same images and seeds: pictures of all seeds are drawn again and again."""
    sentences = []
    runs = {(result["row"], result["seed"]): result["right"] for result in results}
    seeds = sorted({seed for _, seed in runs})
    for row in rows[1:]:
        pairs = [(runs[rows[0], s][picture], right) for s in seeds for picture, right in runs[row, s].items()]
        difference = paired_bootstrap(*zip(*pairs, strict=True))
        sentences.append(
            f"{row} against {rows[0]}: {100 * difference.difference:+.1f} points, 95 % interval "
            f"{100 * difference.low:+.1f} to {100 * difference.high:+.1f} (of the choice of images)"
        )
    return sentences


if __name__ == "__main__":
    main()
