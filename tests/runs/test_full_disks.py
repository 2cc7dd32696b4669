"""Disks that are full, files that cannot be written, pictures that cannot be drawn."""

from __future__ import annotations

import errno
import os
import re

import pytest
import torch
from cases import slow_but_for
from launching import run_script
from tensorboard.summary.writer.record_writer import RecordWriter

import datasets
import train
from utils import checkpoint, files
from utils.checkpoint import SavingError, load_checkpoint, load_last, save_last
from utils.errors import exit_with_one_sentence
from utils.reporting.runlog import log_evaluation


def test_a_full_disk_keeps_the_last_checkpoint_and_says_so(tiny_run, tmp_path):
    """No file may grow beyond a megabyte, as if the disk were full; a checkpoint has many."""
    arguments = tiny_run(tmp_path, "--epochs", "1")
    train.main(arguments)
    folder = tmp_path / "folder-resnet"
    before = {path.name: path.read_bytes() for path in folder.glob("*.pth")}
    result = run_script("train.py", *arguments, "--fresh", thin=True, file_limit=1_000_000)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert re.fullmatch(r"error: \S+next\.pth could not be written .*unharmed\n", result.stderr.splitlines(True)[-1])
    kept = tmp_path / "folder-resnet.old1"
    assert {path.name: path.read_bytes() for path in kept.glob("*.pth")} == before
    assert not list(folder.glob("*.pth"))
    assert not list(folder.glob("*.part"))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("write failed\nat line 3")])
def test_a_failed_save_leaves_both_checkpoints(error, tmp_path, monkeypatch):
    for epoch in (1, 2):
        save_last(tmp_path, {"epoch": epoch})

    def fail(content, file):
        file.write(b"half")
        raise error

    monkeypatch.setattr(checkpoint.torch, "save", fail)
    with pytest.raises(SavingError) as refusal:
        save_last(tmp_path, {"epoch": 3})
    assert len(str(refusal.value).splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"last.pth", "previous.pth"}
    assert load_last(tmp_path)[1]["epoch"] == 2


def test_a_loader_that_dies_while_a_checkpoint_is_written_is_not_taken_for_a_full_disk(tmp_path, monkeypatch, capsys):
    class Dying:
        def __reduce__(self):
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    class Full:
        def __reduce__(self):
            raise OSError(errno.EDQUOT, "Disk quota exceeded")

    with pytest.raises(SystemExit) as ending, exit_with_one_sentence(training=True):
        checkpoint.save_checkpoint(tmp_path / "last.pth", {"weights": torch.zeros(9), "late": Dying()})
    assert ending.value.code == 1
    sentence = capsys.readouterr().err
    assert "loads pictures died" in sentence
    assert "written" not in sentence
    with pytest.raises(SavingError, match=r"\(Disk quota exceeded\): make room"):
        checkpoint.save_checkpoint(tmp_path / "last.pth", {"weights": torch.zeros(9), "late": Full()})
    assert list(tmp_path.iterdir()) == []


def test_the_reason_of_a_failed_save_is_the_systems(tiny_run, tmp_path):
    """A limit on files, as a full disk, comes out of torch's writer as "unexpected pos"."""
    result = run_script("train.py", *tiny_run(tmp_path), thin=True, file_limit=1_000_000)
    assert result.returncode == 2
    assert "(File too large): let files be larger" in result.stderr
    assert "unexpected" not in result.stderr


def fill_the_disk(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """TensorBoard's thread finds no room for any event but the first few."""
    events, write = [], RecordWriter.write

    def full(self, data: bytes) -> None:
        events.append(data)
        if len(events) > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, data)

    monkeypatch.setattr(RecordWriter, "write", full)


@pytest.mark.parametrize("after", slow_but_for([12], [0, 2, 12]), ids=["at the start", "the settings", "an epoch"])
def test_a_disk_that_fills_up_with_events_is_one_sentence(after, tiny_run, tmp_path, monkeypatch, capsys):
    """The thread that writes them keeps its traceback to itself, and what was saved stays: the run can go on."""
    arguments = tiny_run(tmp_path, "--epochs", "2", "--schedule", "steps")
    train.main([*arguments, "--epochs", "1"])
    folder = tmp_path / "folder-resnet"
    before = (folder / "last.pth").read_bytes(), (folder / "log.jsonl").read_bytes()
    capsys.readouterr()
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ending, exit_with_one_sentence(training=True):
        fill_the_disk(patch, after)
        train.main(arguments)
    assert ending.value.code == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert sentence.startswith(f"error: {folder} could not be written (No space left on device): make room")
    assert ((folder / "last.pth").read_bytes(), (folder / "log.jsonl").read_bytes()) == before
    train.main(arguments)
    assert load_checkpoint(folder / "last.pth")["epoch"] == 2


def test_a_disk_that_is_full_of_figures_of_an_evaluation_is_one_sentence(tmp_path, monkeypatch, capsys):
    fill_the_disk(monkeypatch, 1)
    with pytest.raises(SystemExit) as ending, exit_with_one_sentence(elsewhere="--out"):
        log_evaluation(tmp_path / "test", 1, {"accuracy/raw": 0.5, "accuracy/prediction": 0.5})
    assert ending.value.code == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert "could not be written (No space left on device): make room or write elsewhere (--out)" in sentence


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "make room"),
        (errno.EACCES, "allow writing"),
        (errno.EISDIR, "in its place"),
        (errno.EIO, "see to"),
    ],
)
def test_advice_on_a_file_fits_the_reason_and_the_program(number, advice, tmp_path, capsys):
    with pytest.raises(SystemExit), exit_with_one_sentence(elsewhere="--out"), files.atomic_write(tmp_path / "a"):
        raise OSError(number, os.strerror(number))
    sentence = capsys.readouterr().err
    assert advice in sentence
    assert "--out" in sentence
    assert "--checkpoint_dir" not in sentence


def test_programs_that_write_one_file_at_once_do_not_meet(tmp_path):
    path = tmp_path / ("n" * 250)  # as long as a name may be
    with files.atomic_write(path) as one, files.atomic_write(path) as other, files.atomic_write(path) as third:
        for file, content in ((one, b"one"), (other, b"other"), (third, b"third")):
            file.write(content)
    assert path.read_bytes() == b"one"
    assert list(tmp_path.iterdir()) == [path]


def test_pictures_that_cannot_be_drawn_cost_no_epoch(tiny_run, tmp_path, capsys, monkeypatch):
    """A file stands where their folder should be; then what they are drawn of is gone."""
    folder = tmp_path / "folder-resnet"
    folder.mkdir()
    (folder / "pictures").touch()
    arguments = tiny_run(tmp_path, "--epochs", "2", "--pictures_every", "1")
    train.main(arguments)
    assert load_checkpoint(folder / "last.pth")["epoch"] == 2
    assert capsys.readouterr().err.count("warning: the pictures of epoch") == 2

    def gone(*arguments, **options):
        assert load_checkpoint(folder / "last.pth")["epoch"] == 1  # saved before
        raise datasets.DataError("a picture is gone")

    monkeypatch.setattr(train, "load_batch", gone)
    train.main([*arguments, "--fresh", "--epochs", "1"])
    assert "a picture is gone" in capsys.readouterr().err

    def too_large(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(train, "load_batch", too_large)
    train.main([*arguments, "--fresh", "--epochs", "1"])
    assert "out of memory" in capsys.readouterr().err
    monkeypatch.setattr(train, "load_batch", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # a mistake of ours is none of the machine's
        train.main([*arguments, "--fresh", "--epochs", "1"])
