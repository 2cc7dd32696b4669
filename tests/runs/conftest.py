"""Runs that the tests of this folder share, and only read."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torchvision
from thin_trunk import get_thin_model
from whole_runs import FOUR_EPOCHS, MASKED, TWO_EPOCHS

import train


@contextlib.contextmanager
def quick() -> Iterator[None]:
    """Thin trunks, and no wait for the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchvision.models, "get_model", get_thin_model)
        patch.setattr(os, "fsync", lambda file_number: None)
        yield


@pytest.fixture(scope="module", autouse=True)
def _quick():
    with quick():
        yield


@pytest.fixture
def tmp_path(tmp_path):
    """pytest's own, emptied after the test: checkpoints are large, and pytest would keep them for three sessions."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def finished(tiny_run, runs) -> Path:
    """The folder of an uninterrupted run of SG-KRL over four epochs."""
    with quick():
        train.main(tiny_run(runs, *FOUR_EPOCHS, *MASKED, model="sgkrl"))
    return runs / "folder-sgkrl"


@pytest.fixture(scope="session")
def short(tiny_run, runs) -> Path:
    """The folder of a ResNet's run over two epochs."""
    with quick():
        train.main(tiny_run(runs, *TWO_EPOCHS))
    return runs / "folder-resnet"


@pytest.fixture
def short_copy(short, tmp_path) -> Path:
    """A copy of that folder whose files may be replaced or removed, but not written into: they are hard links."""
    return Path(shutil.copytree(short, tmp_path / "runs" / short.name, copy_function=os.link))


@pytest.fixture(scope="session")
def single_epoch(tiny_run, runs) -> Path:
    """The folder of a ResNet's run over one epoch, the only one where it lies."""
    with quick():
        train.main(tiny_run(runs / "single"))
    return runs / "single" / "folder-resnet"


@pytest.fixture(scope="session")
def averaged(tiny_run, runs) -> Path:
    """The folder of a run that keeps an average of its weights."""
    with quick():
        train.main(tiny_run(runs / "ema", "--epochs", "3", "--ema_decay", "0.9", "--learning_rate", "0.05"))
    return runs / "ema" / "folder-resnet"
