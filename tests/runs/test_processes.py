"""Processes that die, run out of memory, disagree, or share a folder."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys

import pytest
import torch
from launching import PROJECT

import datasets
import train
from utils import checkpoint, files
from utils.checkpoint import CheckpointError, load_checkpoint
from utils.errors import exit_with_one_sentence
from utils.files import FolderInUseError, locked
from utils.training import resume


class Dying(datasets.Pictures):
    def __getitem__(self, key):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_dies_ends_the_run_with_a_sentence(tiny_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets, "Pictures", Dying)
    with pytest.raises(SystemExit) as ending, exit_with_one_sentence():
        train.main(tiny_run(tmp_path, "--workers", "1"))
    assert ending.value.code == 1
    (sentence,) = capsys.readouterr().err.splitlines()
    assert "memory" in sentence


def test_a_second_run_in_the_same_folder_is_refused(tiny_run, tmp_path):
    arguments = tiny_run(tmp_path)
    with locked(tmp_path / "folder-resnet"):
        (tmp_path / "folder-resnet" / "log.jsonl").write_text("")
        with pytest.raises(FolderInUseError) as refusal:
            train.main(arguments)
        assert "--name" in str(refusal.value)
        assert [path.name for path in (tmp_path / "folder-resnet").iterdir()] == ["log.jsonl"]
    train.main(arguments)


def test_a_disk_without_locks_is_warned_of(tmp_path, monkeypatch, capsys):
    def refuse(*arguments):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    with locked(tmp_path / "run"):
        pass
    assert "cannot be locked (Operation not supported)" in capsys.readouterr().err


def test_a_lock_ends_with_its_process(tmp_path):
    code = "import sys, time; from pathlib import Path; from utils.files import locked\n"
    code += f"with locked(Path({str(tmp_path / 'run')!r})):\n print('locked', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], cwd=PROJECT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline().strip() == "locked"
        with pytest.raises(FolderInUseError), locked(tmp_path / "run"):
            pass
        process.kill()
    with locked(tmp_path / "run"):
        pass


def test_a_refused_run_leaves_no_folder(tmp_path):
    with pytest.raises(ValueError, match="no"), locked(tmp_path / "runs" / "here" / "run"):
        raise ValueError("no")
    assert list(tmp_path.iterdir()) == []


def test_another_number_of_steps_in_an_epoch_is_refused(tiny_run, tmp_path):
    arguments = tiny_run(tmp_path, "--epochs", "2")
    train.main(arguments)
    path = tmp_path / "folder-resnet" / "last.pth"
    content = load_checkpoint(path)
    content["schedule"]["last_epoch"] = 2 * 4
    torch.save(content | {"steps_per_epoch": 4}, path)
    with pytest.raises(CheckpointError, match="4 steps in an epoch, and 1 processes make it 3"):
        train.main(arguments)


def test_processes_that_find_different_checkpoints_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "gather", lambda position: [position, (3, 0)])
    with pytest.raises(CheckpointError, match="disk that all machines share"):
        resume.load_resumable(tmp_path, {}, resume.Data((), training_images=1, steps_per_epoch=1), restore=dict)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError("Unable to allocate 6.10 GiB for an array"), "on the machine"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
            "on the machine",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"),
            "on the GPU for another 2.00",
        ),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "on the machine"),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), "on the GPU"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "on the GPU"),
    ],
)
def test_too_little_memory_is_one_sentence_with_what_to_lower(error, words, capsys):
    with pytest.raises(SystemExit) as ending, exit_with_one_sentence(less_memory="lower batch_size"):
        raise error
    assert ending.value.code == 1
    (sentence,) = capsys.readouterr().err.splitlines()
    assert sentence.startswith("error: there is not enough memory")
    assert words in sentence
    assert "lower batch_size" in sentence


def test_too_little_memory_is_not_taken_for_a_damaged_checkpoint(tmp_path, monkeypatch):
    checkpoint.save_checkpoint(tmp_path / "last.pth", {"epoch": 1})

    def fail(*arguments, **options):
        raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(checkpoint.torch, "load", fail)
    with pytest.raises(RuntimeError, match="not enough memory"):
        load_checkpoint(tmp_path / "last.pth")
    with pytest.raises(RuntimeError, match="not enough memory"), checkpoint.fits(tmp_path, ""):
        fail()
