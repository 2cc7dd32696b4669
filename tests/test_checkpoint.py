"""Checkpoints: whole or not at all, and read without running what is in them."""

from __future__ import annotations

import collections
import os
import pickle
import stat
from pathlib import Path

import pytest
import torch

from utils.checkpoint import CheckpointError, load_checkpoint, save_checkpoint, save_last


def _content(value: float) -> dict:
    return {
        "network": collections.OrderedDict(weight=torch.full((300, 10), value), steps=torch.tensor(3)),
        "settings": {"windows": ((((4, 4),), 1),), "name": None, "flip": 0.5},
        "schedule": {"milestones": collections.Counter({60: 1, 100: 1})},
    }


def _assert_is(content: dict, value: float) -> None:
    expected = _content(value)
    assert content.keys() == expected.keys()
    assert torch.equal(content["network"]["weight"], expected["network"]["weight"])
    assert torch.equal(content["network"]["steps"], expected["network"]["steps"])
    assert content["settings"] == expected["settings"]
    assert content["schedule"] == expected["schedule"]


def test_what_was_saved_is_read_back_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "last.pth"
    save_checkpoint(path, _content(1.0))
    _assert_is(load_checkpoint(path), 1.0)
    save_checkpoint(str(path), _content(2.0))
    _assert_is(load_checkpoint(str(path)), 2.0)
    assert [file.name for file in tmp_path.iterdir()] == ["last.pth"]


def test_tensors_come_back_on_the_cpu_in_their_memory_layout(tmp_path):
    weight = torch.rand(4, 3, 5, 5).to(memory_format=torch.channels_last)
    save_checkpoint(tmp_path / "last.pth", {"weight": weight})
    loaded = load_checkpoint(tmp_path / "last.pth")["weight"]
    assert loaded.device.type == "cpu"
    assert torch.equal(loaded, weight)
    assert loaded.stride() == weight.stride()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["disk", "ctrl-c"])
def test_a_failure_in_the_middle_of_writing_leaves_the_old_file(tmp_path, monkeypatch, error):
    path = tmp_path / "last.pth"
    save_checkpoint(path, _content(1.0))
    before = path.read_bytes()

    def write_half(content, file, *arguments, **options):
        file.write(before[: len(before) // 2])
        file.flush()
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", write_half)
        with pytest.raises(type(error)):
            save_checkpoint(path, _content(2.0))
    assert path.read_bytes() == before
    _assert_is(load_checkpoint(path), 1.0)

    save_checkpoint(path, _content(2.0))  # what the failure left does not stand in the way
    _assert_is(load_checkpoint(path), 2.0)
    assert [file.name for file in tmp_path.iterdir()] == ["last.pth"]


def test_a_failed_write_does_not_fill_the_disk(tmp_path, monkeypatch):
    def write_half(content, file, *arguments, **options):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", write_half)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path / "last.pth", _content(1.0))
    assert list(tmp_path.iterdir()) == []


def test_the_file_is_on_the_disk_before_it_replaces_the_old_one(tmp_path, monkeypatch):
    """Whole, none of it left in Python's buffer; then its new name, which the folder holds."""
    order, sizes = [], []
    fsync, replace = os.fsync, Path.replace

    def synced(number):
        status = os.fstat(number)
        order.append("fsync of folder" if stat.S_ISDIR(status.st_mode) else "fsync")
        sizes.append(status.st_size)
        fsync(number)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", lambda path, to: (order.append("replace"), replace(path, to))[1])
    path = tmp_path / "last.pth"
    save_checkpoint(path, _content(1.0))
    assert order == ["fsync", "replace", "fsync of folder"]
    assert sizes[0] == path.stat().st_size
    order.clear()
    save_last(tmp_path, {"epoch": 2})
    assert order[-3:] == ["replace", "replace", "fsync of folder"]


class _CreatesAFile:
    """Unpickled by plain pickle, it creates a file: a stand-in for any code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    planted, path = tmp_path / "planted", tmp_path / "evil.pth"
    for save in (lambda: torch.save(_CreatesAFile(planted), path), lambda: _pickle(_CreatesAFile(planted), path)):
        save()
        with pytest.raises(CheckpointError) as refusal:
            load_checkpoint(path)
        assert not planted.exists()
        assert str(path) in str(refusal.value)
        assert len(str(refusal.value).splitlines()) == 1

    with path.open("rb") as file:  # the plant itself works
        pickle.load(file)
    assert planted.exists()


def _pickle(content: object, path: Path) -> None:
    with path.open("wb") as file:
        pickle.dump(content, file)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.5, 0.999])
def test_a_truncated_checkpoint_is_refused(tmp_path, share):
    path = tmp_path / "best.pth"
    save_checkpoint(path, _content(1.0))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    _assert_refused(path)


@pytest.mark.parametrize(
    "junk",
    [
        b"",
        b"hello\n",
        b"a text file of notes\n",
        b"<html>\n",
        b'{"a": 1}',
        b"PK\x03\x04junk",
        b"\x80\x02.",
        b"\x89PNG\r\n",
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, junk):
    path = tmp_path / "best.pth"
    path.write_bytes(junk)
    _assert_refused(path)


def test_an_absent_checkpoint_is_refused(tmp_path):
    _assert_refused(tmp_path / "best.pth")


def test_a_folder_is_refused(tmp_path):
    _assert_refused(tmp_path)


def test_a_checkpoint_that_is_no_dict_is_refused(tmp_path):
    torch.save(torch.rand(3), tmp_path / "best.pth")
    _assert_refused(tmp_path / "best.pth")


def _assert_refused(path: Path) -> None:
    with pytest.raises(CheckpointError) as refusal:
        load_checkpoint(path)
    assert str(path) in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1
