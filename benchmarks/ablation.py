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
from sweep_results import as_text, check_against, identity, in_current_words, read_results, sorted_rows, store
from sweep_rows import COMMON, DECIDING, ROWS, command_of, flags_of, links_the_batch, portable
from tqdm import tqdm

from utils.errors import exit_with_one_sentence
from utils.reporting.results import read_predictions
from utils.training.distributed import choose_device


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
    # none of an epoch that was stopped in its evaluation and went on there
    speeds = [s for line in lines if (s := line["speed/train_images_per_second"]) is not None]
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
        "train_images_per_second": statistics.median(speeds) if speeds else None,
        "processes": options.processes,
        "machine": machine(choose_device("auto")),
    }
    if options.test:
        result["test"] = test_figures(folder, environment, last["epoch"])
        if links_the_batch(flags):
            result["test_shuffled"] = test_figures(folder, environment, last["epoch"], shuffle=True)
        rows = sorted(read_predictions(folder / "predictions-last.csv"), key=lambda line: line["picture"])
        result["pictures"] = len(rows)
        result["right"] = "".join(line["correct"] for line in rows)  # "1" or "0" each, by the pictures' names
    return result


def test_figures(
    folder: Path, environment: Mapping[str, str], epoch: int, *, shuffle: bool = False
) -> dict[str, float]:
    """Return accuracies and box figures of the last `epoch` on the test images, which are looked at once."""
    report = folder / ("report-last-shuffled.json" if shuffle else "report-last.json")
    if not report.exists() or json.loads(report.read_text(encoding="utf-8"))["epoch"] != epoch:
        script("test.py", [str(folder / "last.pth"), *(["--shuffle"] if shuffle else [])], environment)
    content = json.loads(report.read_text(encoding="utf-8"))
    accuracies = {f"accuracy/{name}": branch["top1"] for name, branch in content["branches"].items()}
    return in_current_words(accuracies) | {f"box_iou/{name}": value for name, value in (content["boxes"] or {}).items()}


def script(name: str, flags: Sequence[str], environment: Mapping[str, str], processes: int = 1) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes))
    command = [sys.executable, *(torchrun if processes > 1 else ()), str(PROJECT / name), *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with exit code {done.returncode}:\n{done.stderr[-8000:]}")


if __name__ == "__main__":
    with exit_with_one_sentence():
        main()
