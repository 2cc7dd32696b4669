"""Processes that load pictures: what they hand over, and how a run ends where they cannot."""

from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
import signal
import sys
import time
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from datasets import UNKNOWN, Batch, Sample, collate
from utils.data.workers import start_loader
from utils.errors import exit_with_one_sentence

pytestmark = pytest.mark.usefixtures("no_hang")
START = partial(start_loader, picture_memory=1.0)


def make_sample(number: int, box: torch.Tensor | None = None) -> Sample:
    return Sample(torch.full((3, 4, 4), number, dtype=torch.uint8), number, box, f"{number}.jpg")


class Samples(Dataset):
    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> Sample:
        return make_sample(index, torch.full((4,), float(index)))


@pytest.mark.parametrize("box", [None, UNKNOWN, torch.tensor([1.0, 2.0, 3.0, 4.0])])
def test_a_batch_is_handed_over_as_it_was(box):
    batch = collate([make_sample(1, box), make_sample(2, None if box is None else torch.zeros(4))])
    received = pickle.loads(pickle.dumps(batch))
    assert type(received) is Batch
    assert received.paths == ["1.jpg", "2.jpg"]
    for name, values in batch._asdict().items():
        if isinstance(values, torch.Tensor):
            taken = getattr(received, name)
            assert taken.dtype == values.dtype
            assert torch.equal(taken.nan_to_num(-1), values.nan_to_num(-1))
            taken += 1  # may be changed in place
        elif name != "paths":
            assert values is None is getattr(received, name)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit of open files")
def test_what_is_kept_of_every_batch_keeps_no_file_open():
    """As an evaluation on a CPU keeps the labels of all its images; 1,024 open files are a usual limit."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    kept = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/dev/fd").iterdir())) + 60, hard))
    try:
        for batch in DataLoader(Samples(), 1, num_workers=1, collate_fn=collate, worker_init_fn=START):
            kept.append((batch.labels, batch.boxes))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert [labels.item() for labels, _ in kept] == list(range(100))
    assert [boxes[0, 0].item() for _, boxes in kept] == list(range(100))


class NotHandedOver:
    """As a tensor, where no more files may be opened."""

    def __reduce__(self) -> tuple:
        raise OSError(errno.EMFILE, "Too many open files")


class Unlucky(Samples):
    def __getitem__(self, index: int) -> NotHandedOver:
        return NotHandedOver()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="what a process that is not forked prints is not read here")
def test_a_batch_that_cannot_be_handed_over_ends_the_run(capfd):
    options = {"num_workers": 1, "collate_fn": list, "worker_init_fn": START, "multiprocessing_context": "fork"}
    with pytest.raises(SystemExit) as ending, exit_with_one_sentence():
        next(iter(DataLoader(Unlucky(), 1, **options)))
    assert ending.value.code == 1
    lines = capfd.readouterr().err.splitlines()
    assert "a process that loads pictures cannot hand them over: [Errno 24] Too many open files" in lines
    assert lines[-1].startswith("error: a process that loads pictures died: its own message, if any, says why")


def load_and_be_killed(send: Connection) -> None:
    """Start a loader's process by way of a fork server, name it, and go before it can be told to end."""
    options = {"num_workers": 1, "collate_fn": collate, "worker_init_fn": START}
    batches = iter(DataLoader(Samples(), 1, multiprocessing_context="forkserver", **options))
    next(batches)
    send.send(batches._workers[0].pid)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="nothing tells which processes live")
def test_a_process_that_loads_pictures_ends_with_a_killed_run_whatever_stands_between():
    """As from Python 3.14 on."""
    receive, send = multiprocessing.Pipe(duplex=False)
    run = multiprocessing.get_context("fork").Process(target=load_and_be_killed, args=(send,))
    run.start()
    worker = receive.recv()
    run.join()
    while Path(f"/proc/{worker}/stat").exists() and " Z " not in Path(f"/proc/{worker}/stat").read_text():
        time.sleep(0.05)  # for ever, where it goes on: then `no_hang` ends this


FULL = "unable to allocate shared memory(shm) for file </torch_7_1_0>: No space left on device (28)"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            RuntimeError(f"Caught RuntimeError in DataLoader worker process 0.\nTraceback\nRuntimeError: {FULL}"),
            "/dev/shm",
        ),
        (
            RuntimeError(
                "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers "
                "are out of shared memory. Please try to raise your shared memory limit."
            ),
            "--shm-size",
        ),
        (
            torch.distributed.DistBackendError(
                "NCCL error in: ProcessGroupNCCL.cpp:1, unhandled system error\nLast error:\n"
                "Error while creating shared memory segment /dev/shm/nccl-Xy12 (size 9637888)"
            ),
            "--shm-size",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), "/dev/shm"),  # a lock between processes
        (RuntimeError("Too many open files. Communication with the workers is no longer possible."), "ulimit -n"),
        (RuntimeError("received 0 items of ancdata"), "ulimit -n"),
        (OSError(errno.EMFILE, "Too many open files", "a.jpg"), "(a.jpg): allow for more (ulimit -n)"),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "ulimit -u"),
    ],
)
def test_what_the_machine_allows_too_little_of_is_named_with_what_to_do(error, words, capsys):
    with pytest.raises(SystemExit) as ending, exit_with_one_sentence():
        raise error
    assert ending.value.code == (2 if isinstance(error, OSError) else 1)
    (sentence,) = capsys.readouterr().err.splitlines()
    assert sentence.startswith("error: ")
    assert words in sentence


def test_a_full_disk_and_the_shared_memory_of_a_gpu_are_not_taken_for_it(capsys, tmp_path: Path):
    with pytest.raises(SystemExit) as ending, exit_with_one_sentence():
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "log.jsonl"))
    assert ending.value.code == 2
    assert "/dev/shm" not in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="Hardware limit"), exit_with_one_sentence():
        raise RuntimeError("out of resource: shared memory, Required: 131072, Hardware limit: 101376")
