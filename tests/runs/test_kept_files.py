"""Which files of a run are kept, and which go."""

from __future__ import annotations

from pathlib import Path

import pytest
from whole_runs import contents, read_log

import train
from utils.checkpoint import CheckpointError, load_checkpoint
from utils.training import run_folder


def test_a_fresh_start_keeps_the_old_run_beside_it(tiny_run, tmp_path):
    for number in range(3):
        train.main(tiny_run(tmp_path, "--seed", str(number), "--fresh"))
    folders = {path.name for path in tmp_path.iterdir()}
    assert folders == {"folder-resnet", "folder-resnet.old1", "folder-resnet.old2"}
    for number, name in enumerate(("folder-resnet.old1", "folder-resnet.old2", "folder-resnet")):
        assert load_checkpoint(tmp_path / name / "last.pth")["settings"]["seed"] == number
        assert len(read_log(tmp_path / name)) == 1


def test_of_a_run_that_is_moved_aside_what_could_be_gone_on_from_goes_first(tmp_path, monkeypatch):
    folder, moved = tmp_path / "run", []
    folder.mkdir()
    for name in ("best.pth", "config.json", "last.pth", "log.jsonl", "next.pth", "previous.pth"):
        (folder / name).touch()
    monkeypatch.setattr(Path, "rename", lambda path, to: moved.append(path.name))
    run_folder.move_aside(folder)
    assert set(moved[:3]) == {"last.pth", "next.pth", "previous.pth"}


def test_checkpoints_of_the_last_epochs_are_kept(tiny_run, tmp_path):
    train.main(tiny_run(tmp_path, "--epochs", "3", "--keep_checkpoints", "2"))
    folder = tmp_path / "folder-resnet"
    assert sorted(path.name for path in folder.glob("epoch-*.pth")) == ["epoch-002.pth", "epoch-003.pth"]
    assert [load_checkpoint(folder / f"epoch-00{epoch}.pth")["epoch"] for epoch in (2, 3)] == [2, 3]


def test_of_a_thousand_epochs_the_oldest_are_dropped(tmp_path):
    for epoch in (998, 999, 1000, 1001):
        (tmp_path / f"epoch-{epoch:03d}.pth").touch()
    run_folder.drop_old_epochs(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch-1000.pth", "epoch-1001.pth"]


def test_what_is_left_of_a_run_without_its_last_checkpoint_is_not_replaced(tiny_run, tmp_path):
    """With other settings, which would be seen only in last.pth."""
    train.main(tiny_run(tmp_path))
    folder = tmp_path / "folder-resnet"
    for name in ("last.pth", "previous.pth"):
        (folder / name).unlink(missing_ok=True)
    before = contents(folder)
    with pytest.raises(CheckpointError, match=r"best\.pth.*--name.*--fresh"):
        train.main(tiny_run(tmp_path, "--learning_rate", "0.5"))
    assert contents(folder) == before
    train.main(tiny_run(tmp_path, "--learning_rate", "0.5", "--fresh"))
    assert contents(tmp_path / "folder-resnet.old1").keys() == {k.replace("resnet/", "resnet.old1/") for k in before}


def test_a_file_that_only_looks_like_an_epochs_is_left_alone(tmp_path):
    for name in ("001", "002", "best", "-1", "²"):
        (tmp_path / f"epoch-{name}.pth").touch()
    run_folder.drop_old_epochs(tmp_path, 1)
    assert {path.stem for path in tmp_path.iterdir()} == {"epoch-002", "epoch-best", "epoch--1", "epoch-²"}


def test_half_files_of_a_killed_run_go_and_those_of_an_evaluation_stay(tmp_path):
    for name in ("last.pth.1f.part", "next.pth.part", "log.jsonl.2e.part", "report.json.3d.part"):
        (tmp_path / name).touch()
    run_folder.drop_half_files(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report.json.3d.part"]
