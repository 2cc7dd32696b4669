"""Checkpoints that are damaged, or hold code."""

from __future__ import annotations

import os
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from whole_runs import assert_same_run

import train
from utils.checkpoint import CheckpointError, load_checkpoint, load_last, save_last


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    damaged = {
        "truncated": content[: len(content) // 2],
        "empty": b"",
        "zeros": bytes(len(content)),
        "html": b"<html>502 Bad Gateway</html>",
    }[how]
    path.write_bytes(damaged)


@pytest.mark.parametrize("how", ["truncated", "empty", "zeros", "html"])
def test_a_damaged_last_checkpoint_falls_back_to_the_one_before(how, tmp_path, capsys):
    for epoch in (1, 2):
        save_last(tmp_path, {"epoch": epoch, "weights": torch.full((100,), float(epoch))})
    damage(tmp_path / "last.pth", how)
    path, content = load_last(tmp_path)
    assert (path.name, content["epoch"]) == ("previous.pth", 1)
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: ")
    assert str(tmp_path / "last.pth") in warning
    assert str(tmp_path / "previous.pth") in warning
    damage(tmp_path / "previous.pth", how)
    with pytest.raises(CheckpointError, match=r"previous\.pth"):
        load_last(tmp_path)


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(tiny_run, tmp_path, capsys):
    for name in ("whole", "damaged"):
        train.main(tiny_run(tmp_path / name, "--epochs", "2", "--learning_rate", "0.05"))
    folder = tmp_path / "damaged" / "folder-resnet"
    damage(folder / "last.pth", "truncated")
    train.main(tiny_run(tmp_path / "damaged", "--epochs", "2", "--learning_rate", "0.05"))
    assert "warning" in capsys.readouterr().err
    assert (folder / "last.pth.damaged").exists()
    assert [load_checkpoint(folder / name)["epoch"] for name in ("previous.pth", "last.pth")] == [1, 2]
    assert_same_run(tmp_path / "whole" / "folder-resnet", folder)


@pytest.mark.parametrize("killed_at", [1, 2, 3])
def test_killed_between_the_renamings_there_is_always_a_checkpoint(killed_at, tmp_path, monkeypatch):
    save_last(tmp_path, {"epoch": 1})
    replace, calls = Path.replace, []

    def killed(path, target):
        calls.append(target)
        if len(calls) == killed_at:
            raise KeyboardInterrupt
        return replace(path, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", killed)
        save_last(tmp_path, {"epoch": 2})
    epoch = load_last(tmp_path)[1]["epoch"]
    assert epoch == (2 if killed_at == 3 else 1)
    save_last(tmp_path, {"epoch": 3})
    assert load_last(tmp_path)[1]["epoch"] == 3


class Plant:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("reader", ["train", "test", "pretrained"])
def test_code_in_a_checkpoint_is_never_run(reader, tiny_run, tmp_path, evaluation_script):
    target = tmp_path / "planted"
    folder = tmp_path / "runs" / "folder-resnet"
    folder.mkdir(parents=True)
    path = folder / "last.pth"
    path.write_bytes(pickle.dumps({"epoch": Plant(target)}, protocol=2))
    arguments = tiny_run(tmp_path / "runs")
    with pytest.raises(ValueError, match=r"last\.pth"):
        if reader == "train":
            train.main(arguments)
        elif reader == "test":
            evaluation_script.main([str(path)])
        else:
            train.main([*arguments, "--fresh", "--pretrained", str(path)])
    assert not target.exists()
    assert path.exists()


def flip_a_byte_in_a_weight(path: Path, value: bytes = b"") -> None:
    """Of the largest file in the archive; `value` is put there instead, if given."""
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda file: file.file_size)
        content = bytearray(path.read_bytes())
        middle = content.index(archive.read(largest)) + largest.file_size // 2
    content[middle : middle + max(len(value), 1)] = value or bytes([content[middle] ^ 0x40])
    path.write_bytes(content)


@pytest.mark.parametrize("value", [b"", bytes(4096)], ids=["a flipped byte", "zeros"])
def test_a_changed_weight_is_found_and_the_run_goes_on_from_before_it(
    value, single_epoch, tiny_run, tmp_path, capsys, evaluation_script
):
    folder = Path(shutil.copytree(single_epoch, tmp_path / single_epoch.name))
    shutil.copy(folder / "last.pth", folder / "previous.pth")
    whole = (folder / "last.pth").read_bytes()
    for name in ("best.pth", "last.pth"):
        flip_a_byte_in_a_weight(folder / name, value)
    with pytest.raises(CheckpointError, match="checksums"):
        evaluation_script.main([str(folder / "best.pth")])
    train.main(tiny_run(tmp_path))
    assert "going on from" in capsys.readouterr().err
    assert (folder / "last.pth.damaged").exists()
    assert (folder / "previous.pth").read_bytes() == whole


def test_a_program_is_told_from_a_checkpoint_without_a_warning(tmp_path, recwarn):
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "model.pt"))
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),))
    torch.export.save(program, tmp_path / "model.pt2")
    recwarn.clear()
    for name, words in (("model.pt", "TorchScript"), ("model.pt2", r"torch\.export")):
        with pytest.raises(CheckpointError, match=words):
            load_checkpoint(tmp_path / name)
    assert not recwarn.list
