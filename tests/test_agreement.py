"""Processes of one run that were given different settings or data."""

from __future__ import annotations

import shutil

import pytest
import torch
from launching import run_two_processes

import train
from utils.checkpoint import load_checkpoint
from utils.data.record import Picture, Record
from utils.training import agreement
from utils.training.agreement import MAY_DIFFER, DifferentProcessesError, refuse_differing_processes

pytestmark = pytest.mark.usefixtures("thin_trunk")

PICTURES = Record([Picture(0, "a", "x/0.jpg")], [Picture(1, "b", "y/0.jpg")], [])


def ask(monkeypatch: pytest.MonkeyPatch, *others: tuple[dict, tuple[str, ...], Record]) -> None:
    """Ask in process 0, beside processes that ask with these."""
    values = []
    monkeypatch.setattr(agreement, "gather", lambda value: values.append(value) or [value])
    for theirs in others:
        refuse_differing_processes(*theirs)
    monkeypatch.setattr(agreement, "gather", lambda value: [value, *values])
    refuse_differing_processes({"epochs": 3, "workers": 1}, ("x", "y"), PICTURES)


def test_what_does_not_matter_may_differ(monkeypatch):
    same = {"epochs": 3} | dict.fromkeys(MAY_DIFFER - {"initial_weights"}, "elsewhere")
    ask(monkeypatch, ({"epochs": 3, "workers": 9}, ("x", "y"), PICTURES), (same, ("x", "y"), PICTURES))


@pytest.mark.parametrize(
    ("settings", "names", "pictures", "words"),
    [
        ({"epochs": 4}, ("x", "y"), PICTURES, "process 2 was started with other settings .*epochs is 4, not 3"),
        ({}, ("x", "y"), PICTURES, "epochs is None, not 3"),
        (
            {"epochs": 4, "model": "mmal"},
            ("x", "y"),
            PICTURES,
            r"settings than process 0 \(model is 'mmal', not None\)",
        ),
        ({"epochs": 3, "initial_weights": "best.pth"}, ("x", "y"), PICTURES, "initial_weights is 'a file', not None"),
        ({"epochs": 3}, ("y", "x"), PICTURES, "process 2 sees other classes or pictures than process 0"),
        ({"epochs": 3}, ("x", "y"), PICTURES._replace(selection=[]), "1 pictures to train on, 0 to choose"),
        ({"epochs": 3}, ("x", "y"), PICTURES._replace(training=[Picture(0, "c", "x/0.jpg")]), "process 2 sees other"),
    ],
)
def test_what_matters_may_not(settings, names, pictures, words, monkeypatch):
    alike = ({"epochs": 3}, ("x", "y"), PICTURES)
    with pytest.raises(DifferentProcessesError, match=words):
        ask(monkeypatch, alike, (settings, names, pictures))


def test_two_processes_with_differing_data_train_nothing(tiny_run, picture_tree, tmp_path):
    """One machine's copy lacks four pictures, so that its split, too, is another."""
    other = tmp_path / "other"
    shutil.copytree(picture_tree, other)
    for path in sorted((other / "red").iterdir())[:4]:
        path.unlink()
    words = ("tests/troubled_rank.py", "stop", "0", *tiny_run(tmp_path), "1:--data_root", f"1:{other}")
    result = run_two_processes(*words)
    assert result.returncode == 2, result.stderr[-2000:]  # both processes
    assert result.stderr.count("error: process 1 sees other classes or pictures than process 0") == 1
    assert not list(tmp_path.glob("folder-resnet/*.pth"))


@pytest.mark.slow
def test_two_processes_start_from_the_weights_of_the_first(tiny_run, tmp_path):
    """What the file of the same name holds on the second machine does not matter."""
    for seed in ("1", "2"):
        train.main(tiny_run(tmp_path, "--seed", seed, "--name", seed))
    files = [str(tmp_path / f"folder-resnet-{seed}" / "last.pth") for seed in ("1", "2")]
    same, other = (tiny_run(tmp_path / name, "--initial_weights", files[0]) for name in ("same", "other"))
    script = ("tests/troubled_rank.py", "stop", "0")
    result = run_two_processes(*script, *same, "--", *script, *other, "1:--initial_weights", f"1:{files[1]}")
    assert result.returncode == 0, result.stderr[-2000:]
    ours, theirs = (load_checkpoint(tmp_path / n / "folder-resnet" / "last.pth")["network"] for n in ("same", "other"))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
