"""How long a run takes to begin: `python benchmarks/startup.py --images 100000`.

Made on the spot: a `folder` data set of that many tiny JPEGs in 100 classes. Measured, in processes of their own where
something is loaded only once:

    import      what `python train.py` loads, and of it PyTorch and torchvision alone
    index       `datasets.read_catalogue`: listing and splitting, no file is opened
    check       `utils.data.checking.find_bad_pictures`: header and last bytes of every file, before training starts
    fingerprint what a disk cache asks of every file: size and time
    step        train.py from its start to the end of its first training step (ResNet-18, a batch of 4)
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from measuring import PROJECT, machine, write_json
from PIL import Image

from datasets import read_catalogue
from utils.data.checking import find_bad_pictures
from utils.data.decoded import fingerprint
from utils.errors import exit_with_one_sentence

CLASSES = 100
FIRST_STEP = """
import sys, train
step = train.train_one_epoch
def stop_after_one(*arguments, **options):
    def stop(step):
        raise SystemExit(0)
    return step(*arguments, **options | {"save_after": stop})
train.train_one_epoch = stop_after_one
train.main(sys.argv[1:])
"""


def main(arguments: Sequence[str] | None = None) -> dict:
    options = parse_arguments(arguments)
    report = {"machine": machine(torch.device("cpu")), "images": options.images, "seconds": {}}
    seconds = report["seconds"]
    with tempfile.TemporaryDirectory(prefix="startup-") as folder:
        root = Path(folder) / "pictures"
        make_pictures(root, options.images)
        seconds["import torch, torchvision"] = timed(lambda: run("-c", "import torch, torchvision"))
        seconds["import train"] = timed(lambda: run("-c", "import train"))
        entries = []

        def index() -> None:
            catalogue = read_catalogue("folder", root)
            entries[:] = catalogue.train + catalogue.test

        seconds["index"] = timed(index)
        seconds["check"] = timed(lambda: find_bad_pictures(entries, thorough=False, silent=True))
        seconds["fingerprint"] = timed(lambda: fingerprint(entries, 224))
        settings = {
            **{"dataset": "folder", "data_root": root, "checkpoint_dir": folder, "model": "resnet"},
            **{"backbone": "resnet18", "pretrained": "none", "input_size": 96, "batch_size": 4, "device": "cpu"},
        }
        words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        seconds["first step"] = timed(lambda: run("-c", FIRST_STEP, *words))
    print(f"{report['machine']['processor']}, {options.images} pictures, load {report['machine']['load_average']}")
    for name, value in seconds.items():
        print(f"  {name:<28}{value:>8.2f} s")
    if options.json is not None:
        write_json(options.json, report)
    return report


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The time before a run's first step, on a folder of many pictures.")
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    return parser.parse_args(arguments)


def make_pictures(root: Path, count: int) -> None:
    source = root.with_name("tiny.jpg")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(source)
    for number in range(CLASSES):
        (root / f"{number:03d}").mkdir(parents=True)
    for number in range(count):
        shutil.copyfile(source, root / f"{number % CLASSES:03d}" / f"{number:06d}.jpg")


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def run(*words: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    subprocess.run([sys.executable, *words], cwd=PROJECT, env=environment, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    with exit_with_one_sentence():
        main()
