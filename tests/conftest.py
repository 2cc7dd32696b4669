"""Fixtures that several test files share: a small folder of pictures, and the settings of runs of a few seconds."""

from __future__ import annotations

import gc
import importlib.util
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy
import pytest
import torch
import torch.utils.data
import torchvision
from PIL import Image
from thin_trunk import get_thin_model

from datasets import Entry
from networks import find_system

pytest.register_assert_rewrite("small_systems", "system_checks", "object_checks", "toy_system", "whole_runs")

PROJECT = Path(__file__).resolve().parent.parent

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in what a shell script starts in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # there is a process for every core already
# Where the garbage collector ends a loader that stands in a cycle, PyTorch waits so many seconds for each worker
torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 1.0


def pytest_collection_finish() -> None:
    """Spare the garbage collector what has been imported and collected, and stays: else it walks through all of it."""
    gc.freeze()


@pytest.fixture(scope="module")
def thin_trunk():
    """Let `resnet18` be a quarter as wide in this module, except in processes of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchvision.models, "get_model", get_thin_model)
        yield


@pytest.fixture
def real_birds() -> Path:
    """The folder of 36 species of CUB-200-2011, which is not part of the project."""
    root = Path(os.environ.get("FINEGRAINED_SHARED", PROJECT.parent / "shared")) / "data" / "cub36"
    if not root.is_dir():
        pytest.skip(f"no real birds in {root}: set FINEGRAINED_SHARED to the folder that holds data/cub36")
    return root


@pytest.fixture
def no_hang() -> Iterator[None]:
    """Whatever waits for ever (a pipe, a loop of links) ends as a failure instead."""
    if not hasattr(signal, "alarm"):
        yield
        return

    def fail(*_: object) -> None:
        raise AssertionError("hangs")

    previous = signal.signal(signal.SIGALRM, fail)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


@pytest.fixture(scope="session", autouse=True)
def _quick_png_files():
    """Compress PNG files the least: it is more than half of a short run, and no pixel depends on it."""
    save = Image.Image.save

    def quick(image: Image.Image, file: object, format: str | None = None, **options: object) -> None:
        if format == "PNG":
            options = {"compress_level": 1} | options
        save(image, file, format, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image.Image, "save", quick)
        yield


@pytest.fixture(scope="session")
def picture_tree(tmp_path_factory) -> Path:
    """A `folder` data set: 24 noisy pictures of 40 x 40 pixels in 3 classes of different colours."""
    root = tmp_path_factory.mktemp("pictures")
    generator = numpy.random.default_rng(7)
    for name, colour in {"blue": (40, 60, 220), "green": (50, 200, 60), "red": (220, 50, 40)}.items():
        (root / name).mkdir()
        for number in range(8):
            pixels = generator.integers(0, 256, (40, 40, 3)) * 0.6
            x, y = generator.integers(0, 20, 2)
            pixels[y : y + 20, x : x + 20] = 0.4 * pixels[y : y + 20, x : x + 20] + 0.6 * numpy.array(colour)
            Image.fromarray(pixels.astype("uint8")).save(root / name / f"{number}.png")
    return root


@pytest.fixture(scope="session")
def tiny_run(picture_tree):
    """A function: the command line of a short run on `picture_tree` (12 training, 6 validation, 6 test pictures)."""

    def arguments(checkpoint_dir: Path, *more: str, model: str = "resnet") -> list[str]:
        values = {
            "model": model,
            "dataset": "folder",
            "data_root": picture_tree,
            "checkpoint_dir": checkpoint_dir,
            "backbone": "resnet18",
            "pretrained": "none",
            "input_size": 96,
            "validation": 0.34,
            "test_fraction": 0.25,
            "epochs": 1,
            "batch_size": 4,
            "evaluation_batch_size": 4,
            "workers": 0,
            "pictures_every": 0,
            "device": "cpu",
            "precision": "float32",  # the same wherever the tests run
        }
        if "windows" in find_system(model).Options.__dataclass_fields__:
            values["windows"] = "((((5, 5),), 1),)"
        return [word for name, value in values.items() for word in (f"--{name}", str(value))] + list(more)

    return arguments


@pytest.fixture
def rectangle(tmp_path: Path) -> Entry:
    """A bright rectangle on a dark ground, with its box."""
    pixels = numpy.full((120, 200, 3), 40, dtype=numpy.uint8)
    pixels[30:90, 20:100] = 200
    Image.fromarray(pixels).save(tmp_path / "rectangle.png")
    return Entry(tmp_path / "rectangle.png", 3, (20, 30, 100, 90))


@pytest.fixture(scope="session")
def evaluation_script() -> ModuleType:
    """The project's `test.py`, by its path: Python's standard library has a module of that name."""
    specification = importlib.util.spec_from_file_location("evaluation_script", PROJECT / "test.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    return module
