"""Runs that are stopped: by kills, Ctrl-C, SIGTERM, and a reader that leaves."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import slow_but_for
from launching import PROJECT, Script, run_script, run_two_processes
from whole_runs import FOUR_EPOCHS, MASKED, TROUBLED, assert_same_run, read_log, wait_for

import train
from utils.checkpoint import load_checkpoint
from utils.errors import Stopped
from utils.training import current_epoch

WITHIN_EPOCHS = [
    *("--epochs", "4", "--save_every_steps", "1", "--schedule", "one_cycle", "--clip_gradient_norm", "1"),
    *("--dropout", "0.5", "--warmup_epochs", "1"),
]


def without_checkpoint_dir(arguments: list[str]) -> list[str]:
    at = arguments.index("--checkpoint_dir")
    return arguments[:at] + arguments[at + 2 :]


def test_a_run_killed_again_and_again_equals_an_uninterrupted_one(tiny_run, tmp_path):
    arguments = without_checkpoint_dir(tiny_run(tmp_path, *WITHIN_EPOCHS, *MASKED, "--workers", "2", model="sgkrl"))
    folders = [tmp_path / name for name in ("whole", "killed")]
    result = run_script("tests/killed_runs.py", "11", "3", *map(str, folders), *arguments, timeout=250)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    moments = [line.removeprefix("killed: ") for line in result.stdout.splitlines() if line.startswith("killed: ")]
    assert len(moments) >= 8
    assert {"half a checkpoint written", "renaming", "step"} <= set(moments)
    assert_same_run(*(folder / "folder-sgkrl" for folder in folders))
    assert not list((folders[1] / "folder-sgkrl").glob("*.part"))


@pytest.mark.slow
def test_two_processes_stopped_within_an_epoch_go_on_exactly(tiny_run, tmp_path):
    """One gets SIGTERM, both agree on the step, and they sum what each has seen."""
    options = [*WITHIN_EPOCHS, "--epochs", "2", "--save_every_steps", "0"]
    options += ["--batch_size", "2", "--workers", "1", "--images_per_class", "1"]
    whole, stopped = (tiny_run(tmp_path / name, *options) for name in ("whole", "stopped"))
    result = run_two_processes(TROUBLED, "stop", "0", *whole, "--", TROUBLED, "stop", "4", *stopped)
    assert result.returncode == 2, result.stderr[-2000:]  # both processes of the second run
    saved = load_checkpoint(tmp_path / "stopped" / "folder-resnet" / "last.pth")
    assert (saved["epoch"], saved["progress"]["step"], saved["progress"]["meter"]["images"]) == (0, 4, 8)
    result = run_two_processes(TROUBLED, "stop", "0", *stopped)
    assert result.returncode == 0, result.stderr[-2000:]
    assert_same_run(*(tmp_path / name / "folder-resnet" for name in ("whole", "stopped")))


def test_two_processes_stopped_in_an_evaluation_go_on_exactly(tiny_run, tmp_path):
    """The second evaluation of the epoch, that of the averaged weights, in which each has three batches, too."""
    options = ["--epochs", "2", "--evaluation_batch_size", "1", "--ema_decay", "0.9", "--model", "mmal"]
    whole, stopped = (tiny_run(tmp_path / name, *options) for name in ("whole", "stopped"))
    jobs = (TROUBLED, "stop", "0", *whole, "--", TROUBLED, "stop_in_evaluation", "5", *stopped)
    result = run_two_processes(*jobs)
    assert result.returncode == 2, result.stderr[-2000:]  # both processes of the second run
    assert result.stderr.count("interrupted; a training run continues from where it stopped") == 1
    saved = load_checkpoint(tmp_path / "stopped" / "folder-mmal" / "last.pth")
    assert (saved["epoch"], saved["progress"]["step"], saved["progress"]["meter"]["images"]) == (0, 3, 12)
    result = run_two_processes(TROUBLED, "stop", "0", *stopped)
    assert result.returncode == 0, result.stderr[-2000:]
    assert_same_run(*(tmp_path / name / "folder-mmal" for name in ("whole", "stopped")))


def test_a_signal_finishes_the_step_saves_and_the_run_goes_on_from_there(tiny_run, tmp_path):
    """It goes to the whole process group, as a terminal's Ctrl-C does."""
    arguments = without_checkpoint_dir(tiny_run(tmp_path, *FOUR_EPOCHS, "--epochs", "60", "--workers", "2"))
    command = ["train.py", *arguments, "--checkpoint_dir", str(tmp_path)]
    folder = tmp_path / "folder-resnet"
    with Script(*command, thin=True) as process:
        wait_for(lambda: (folder / "log.jsonl").exists() and len(read_log(folder)) >= 2 or process.poll() is not None)
        os.killpg(process.pid, signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert errors.strip().splitlines()[-1].startswith("interrupted; a training run continues from where it stopped")
    saved = load_checkpoint(folder / "last.pth")
    done = saved["epoch"], (saved["progress"] or {"step": 0})["step"]
    assert done >= (2, 0)
    again = run_script(*command, "--epochs", "61")
    assert again.returncode == 2  # another schedule would be another run
    assert "epochs" in again.stderr


def test_sigterm_to_every_process_of_a_job_finishes_the_step_and_saves(tiny_run, tmp_path):
    """As Slurm sends it, to the processes that load pictures as well."""
    arguments = without_checkpoint_dir(tiny_run(tmp_path, *FOUR_EPOCHS, "--epochs", "60", "--workers", "2"))
    folder = tmp_path / "folder-resnet"
    with Script("train.py", *arguments, "--checkpoint_dir", str(tmp_path), thin=True) as process:
        wait_for(lambda: (folder / "log.jsonl").exists() and len(read_log(folder)) >= 1 or process.poll() is not None)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) >= 2
        for number in (*map(int, children), process.pid):
            with contextlib.suppress(ProcessLookupError):  # those of an evaluation come and go
                os.kill(number, signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert errors.strip().splitlines()[-1].startswith("interrupted; a training run continues from where it stopped")
    assert load_checkpoint(folder / "last.pth")["epoch"] >= 1


@pytest.mark.parametrize("when", slow_but_for(["step"], ["step", "evaluation"]))
def test_a_run_stopped_by_request_equals_an_uninterrupted_one(when, tiny_run, tmp_path, monkeypatch):
    """Within the second epoch, and after it, in its evaluation."""
    arguments = tiny_run(tmp_path / "whole", *FOUR_EPOCHS, "--epochs", "3")
    train.main(arguments)
    calls = []

    def request(function, at):
        def wrapped(*positional, **options):
            calls.append(1)
            if len(calls) == at:
                os.kill(os.getpid(), signal.SIGINT)
            return function(*positional, **options)

        return wrapped

    arguments = tiny_run(tmp_path / "stopped", *FOUR_EPOCHS, "--epochs", "3")
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        if when == "step":  # 3 steps and an evaluation, then the second one
            patch.setattr(current_epoch, "seed_everything", request(current_epoch.seed_everything, at=6))
        else:
            patch.setattr(train, "evaluate", request(train.evaluate, at=2))
        train.main(arguments)
    saved = load_checkpoint(tmp_path / "stopped" / "folder-resnet" / "last.pth")
    assert saved["epoch"] == 1
    assert (saved["progress"]["epoch"], saved["progress"]["step"]) == (2, 2 if when == "step" else 3)
    train.main(arguments)
    assert_same_run(*(tmp_path / name / "folder-resnet" for name in ("whole", "stopped")))
    speeds = [line["speed/train_images_per_second"] for line in read_log(tmp_path / "stopped" / "folder-resnet")]
    assert [speed is None for speed in speeds] == [False, when == "evaluation", False]  # nothing was left to measure


def test_a_reader_that_leaves_ends_no_run(tmp_path):
    """Such as `| head -1`, or a tee that dies."""
    code = "from utils.files import show\nfor n in range(9999): show('x' * 99)\n"  # which prints all lines of a run
    code += f"open({str(tmp_path / 'done')!r}, 'w').close()"
    with subprocess.Popen([sys.executable, "-c", code], cwd=PROJECT, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
    assert process.returncode == 0 and (tmp_path / "done").exists()


def test_a_second_signal_while_saving_harms_no_file(tiny_run, tmp_path, monkeypatch):
    save = torch.save

    def interrupted(content, file, *arguments):
        if content.get("epoch") == 2:
            file.write(b"half of it")
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        save(content, file, *arguments)

    arguments = tiny_run(tmp_path, "--epochs", "2")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "save", interrupted)
        train.main(arguments)
    folder = tmp_path / "folder-resnet"
    assert load_checkpoint(folder / "last.pth")["epoch"] == 1
    assert not list(folder.glob("*.part"))
    train.main(arguments)
    assert load_checkpoint(folder / "last.pth")["epoch"] == 2
