"""Runs that survive: kills, signals, damaged files, full disks, broken numbers, dying workers, two runs in a folder."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from launching import PROJECT, Script, run_script, run_two_processes
from tensorboard.summary.writer.record_writer import RecordWriter
from test_train import FOUR_EPOCHS, MASKED, assert_same_run, read_log

import datasets
import export
import predict
import train
from networks.system import System
from utils import checkpoint, files, run
from utils.checkpoint import CheckpointError, SavingError, load_checkpoint, load_last, load_run, save_last
from utils.data.workers import leave_run_to_the_main_process
from utils.errors import Stopped, exit_with_one_sentence
from utils.files import FolderInUseError, locked
from utils.reporting.runlog import log_evaluation
from utils.training import learning, resume, run_folder
from utils.training.execution import Execution
from utils.training.interruption import StopRequest
from utils.training.nonfinite import NonFiniteLossError

pytestmark = pytest.mark.usefixtures("thin_trunk")

TROUBLED = "tests/troubled_rank.py"
WITHIN_EPOCHS = [
    *("--epochs", "4", "--save_every_steps", "1", "--schedule", "one_cycle", "--clip_gradient_norm", "1"),
    *("--dropout", "0.5", "--warmup_epochs", "1"),
]


def without_checkpoint_dir(arguments: list[str]) -> list[str]:
    at = arguments.index("--checkpoint_dir")
    return arguments[:at] + arguments[at + 2 :]


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.02)


# ---- Kills ----------------------------------------------------------------------------------------------------------


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


# ---- Ctrl-C and SIGTERM ---------------------------------------------------------------------------------------------


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


def test_a_loader_ends_with_its_parents_signal_only():
    receive, ready = os.pipe()
    child = os.fork()
    if not child:
        leave_run_to_the_main_process(0)
        os.write(ready, b"!")
        time.sleep(60)
        os._exit(1)
    os.read(receive, 1)
    subprocess.run(["sh", "-c", f"kill -TERM {child}"], check=True)
    time.sleep(0.3)
    assert os.waitpid(child, os.WNOHANG) == (0, 0)
    os.kill(child, signal.SIGTERM)
    wait_for(lambda: os.waitpid(child, os.WNOHANG) == (child, 0), seconds=10)


def test_a_signal_that_the_starter_ignores_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert not stop.requested
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("when", ["step", "evaluation"])
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
            patch.setattr(run, "seed_everything", request(run.seed_everything, at=6))
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


def test_a_second_signal_stops_at_once():
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
            os.kill(os.getpid(), number)  # batch systems send SIGTERM more than once
        assert stop.requested
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
        pytest.fail("it went on")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


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


def test_a_ctrl_c_inside_the_writer_is_not_taken_for_a_full_disk(tmp_path):
    class Interrupting:
        def __reduce__(self):
            os.kill(os.getpid(), signal.SIGINT)
            return int, ()

    with pytest.raises(KeyboardInterrupt):
        checkpoint.save_checkpoint(tmp_path / "last.pth", {"weights": torch.zeros(9), "late": Interrupting()})
    assert list(tmp_path.iterdir()) == []


def test_broken_weights_are_not_saved_within_an_epoch(tiny_run, tmp_path, monkeypatch):
    """The loss of the step was finite; what it did to the weights is not seen before the next one."""
    check = learning.check_weights

    def broken(network, step):
        with torch.no_grad():
            if step == 2:
                network.classifier.weight[0, 0] = math.nan
        check(network, step)

    monkeypatch.setattr(learning, "check_weights", broken)
    with pytest.raises(NonFiniteLossError, match="weights"):
        train.main(tiny_run(tmp_path, "--save_every_steps", "1"))
    saved = load_checkpoint(tmp_path / "folder-resnet" / "last.pth")
    assert saved["progress"]["step"] == 1
    assert all(value.isfinite().all() for value in saved["network"].values())


@pytest.mark.parametrize("stopped", [False, True])
def test_broken_weights_that_evaluation_leaves_out_are_not_saved(tiny_run, tmp_path, monkeypatch, stopped):
    """DCL's location only serves training, so that no figure of the evaluation shows it."""
    before_evaluation = run.Run.before_evaluation

    def broken(self, loader):
        before_evaluation(self, loader)
        if self.current == 2:
            with torch.no_grad():
                self.system.location.weight[0, 0] = math.inf
            self.stop.requested |= stopped

    monkeypatch.setattr(run.Run, "before_evaluation", broken)
    with pytest.raises(NonFiniteLossError, match="weights are no longer finite after step 3"):
        train.main(tiny_run(tmp_path, "--epochs", "2", model="dcl"))
    for name in ("last.pth", "best.pth"):
        assert load_run(tmp_path / "folder-dcl" / name)["epoch"] == 1


def test_huge_weights_are_not_saved_within_an_epoch(tiny_run, tmp_path):
    """They are finite themselves, and so was the loss of the step that made them."""
    options = ["--learning_rate", "1e30", "--save_every_steps", "1", "--clip_gradient_norm", "1"]
    with pytest.raises(NonFiniteLossError, match="step 1") as stop:
        train.main(tiny_run(tmp_path, *options))
    assert len(stop.value.paths) == 4
    assert not (tmp_path / "folder-resnet" / "last.pth").exists()


def test_losses_not_read_yet_are_read_before_a_save(tiny_run, tmp_path, monkeypatch):
    """As on a GPU, where the losses of some steps are read together: the weights are whole, a loss was not."""
    monkeypatch.setattr(learning, "steps_between_readings", lambda device: 10)
    break_the_loss(monkeypatch, 2)
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: None)
    with pytest.raises(NonFiniteLossError, match="step 2"):
        train.main(tiny_run(tmp_path, "--save_every_steps", "2"))
    assert not (tmp_path / "folder-resnet" / "last.pth").exists()


def test_the_skipped_steps_of_a_run_are_counted_over_its_stops(tiny_run, tmp_path, monkeypatch):
    arguments = tiny_run(tmp_path, "--epochs", "2", "--skip_nonfinite", "1")
    evaluate = train.evaluate

    def interrupted(*positional, **options):
        os.kill(os.getpid(), signal.SIGINT)
        return evaluate(*positional, **options)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        break_the_loss(patch, 2)
        patch.setattr(train, "evaluate", interrupted)
        train.main(arguments)
    assert load_checkpoint(tmp_path / "folder-resnet" / "last.pth")["skipped_steps"] == 1
    break_the_loss(monkeypatch, 1)
    with pytest.raises(NonFiniteLossError):
        train.main(arguments)


# ---- Damaged and hostile checkpoints --------------------------------------------------------------------------------


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


# ---- A full disk ----------------------------------------------------------------------------------------------------


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


# ---- Numbers that break ---------------------------------------------------------------------------------------------


def break_the_loss(monkeypatch, *steps: int) -> None:
    """NaN in the loss of the raw branch in these steps, counted over the whole run."""
    calls, terms = [], System.losses

    def broken(self, output, labels, **options):
        losses = terms(self, output, labels, **options)
        if torch.is_grad_enabled():
            calls.append(1)
            if len(calls) in steps:
                losses["raw"] = losses["raw"] * math.nan
        return losses

    monkeypatch.setattr(System, "losses", broken)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_its_images(tiny_run, tmp_path, monkeypatch):
    break_the_loss(monkeypatch, 5)
    with pytest.raises(NonFiniteLossError) as stop:
        train.main(tiny_run(tmp_path, "--epochs", "3"))
    folder = tmp_path / "folder-resnet"
    record = json.loads((folder / "nonfinite.json").read_text(encoding="utf-8"))
    assert (record["epoch"], record["step"], record["terms"]) == (2, 2, ["raw", "total"])
    assert len(record["images"]) == 4
    assert all(Path(path).is_file() for path in record["images"])
    for word in ("epoch 2", "step 2", "raw", "total", str(folder / "nonfinite.json")):
        assert word in str(stop.value)
    saved = load_checkpoint(folder / "last.pth")
    assert saved["epoch"] == 1
    assert all(value.isfinite().all() for value in saved["network"].values())


def test_a_loss_that_is_not_finite_in_one_process_is_told_by_all(tiny_run, tmp_path):
    result = run_two_processes(TROUBLED, "nan", "2", *tiny_run(tmp_path))
    assert result.returncode == 2
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr[-2000:]
    assert "in step 2 (raw, total)" in errors[0]
    assert "Traceback" not in result.stderr
    record = json.loads((tmp_path / "folder-resnet" / "nonfinite.json").read_text(encoding="utf-8"))
    assert (record["step"], len(record["images"])) == (2, 2)  # half a batch of 4: the other half was in order
    assert not (tmp_path / "folder-resnet" / "last.pth").exists()


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


def test_a_bounded_number_of_such_steps_may_be_skipped(tiny_run, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        break_the_loss(patch, 2, 5)
        train.main(tiny_run(tmp_path / "enough", "--epochs", "2", "--skip_nonfinite", "2"))
    lines = read_log(tmp_path / "enough" / "folder-resnet")
    assert [line["train/images"] for line in lines] == [8, 8]
    assert all(math.isfinite(line["train/loss/total"]) for line in lines)
    assert capsys.readouterr().out.count("left out") == 2
    with monkeypatch.context() as patch, pytest.raises(NonFiniteLossError):
        break_the_loss(patch, 2, 5)
        train.main(tiny_run(tmp_path / "short", "--epochs", "2", "--skip_nonfinite", "1"))


def test_a_skipped_step_changes_nothing_but_the_schedule(tiny_run, tmp_path, monkeypatch):
    """NaN pixels: the batch-norm statistics are met by them before the loss is."""
    arguments = tiny_run(tmp_path, "--skip_nonfinite", "1")
    execution = Execution.images
    calls = []

    def poisoned(self, images, augmentation=None):
        calls.append(1)
        images = execution(self, images, augmentation)
        return images * math.nan if len(calls) == 3 else images  # the last step of the epoch

    monkeypatch.setattr(Execution, "images", poisoned)
    train.main(arguments)
    network = load_checkpoint(tmp_path / "folder-resnet" / "last.pth")["network"]
    assert all(value.isfinite().all() for value in network.values())
    assert network["backbone.trunk.bn1.num_batches_tracked"] == 2


def test_a_save_that_falls_on_a_skipped_step_is_left_out(tiny_run, tmp_path, monkeypatch):
    """Its images are NaN for whole weights, too: that must not be taken for broken weights."""
    execution = Execution.images
    calls, saves = [], []

    def poisoned(self, images, augmentation=None):
        calls.append(1)
        images = execution(self, images, augmentation)
        return images * math.nan if len(calls) == 2 else images

    save_last = run.save_last

    def recorded(folder, content):
        saves.append((content["progress"] or {"step": "end"})["step"])
        save_last(folder, content)

    monkeypatch.setattr(Execution, "images", poisoned)
    monkeypatch.setattr(run, "save_last", recorded)  # within an epoch
    monkeypatch.setattr(run_folder, "save_last", recorded)  # at its end
    train.main(tiny_run(tmp_path, "--skip_nonfinite", "1", "--save_every_steps", "1"))
    assert saves == [1, "end"]
    assert load_checkpoint(tmp_path / "folder-resnet" / "last.pth")["skipped_steps"] == 1


# ---- Processes ------------------------------------------------------------------------------------------------------


def test_a_worker_that_dies_ends_the_run_with_a_sentence(tiny_run, tmp_path, monkeypatch, capsys):
    class Dying(datasets.Pictures):
        def __getitem__(self, key):
            os.kill(os.getpid(), signal.SIGKILL)

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


# ---- The table of bad input -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished_run(tiny_run, tmp_path_factory) -> Path:
    """A finished run, whose folder no refused command may touch."""
    runs = tmp_path_factory.mktemp("finished")
    train.main(tiny_run(runs))
    return runs / "folder-resnet"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# flags added to the finished run's own -> words of the one sentence
BAD_INPUT = {
    "unknown setting": (["--epoch", "3"], ["--epoch"]),
    "not a number": (["--epochs", "many"], ["epochs", "many"]),
    "impossible number": (["--epochs", "0"], ["epochs", "0"]),
    "broken windows": (["--windows", "((((", "--model", "mmal"], ["windows", "(((("]),
    "unknown windows": (["--windows", "fish", "--model", "mmal"], ["fish", "birds"]),
    "unknown model": (["--model", "vgg"], ["vgg", "sgkrl"]),
    "unknown data set": (["--dataset", "fish"], ["fish", "cub"]),
    "unknown backbone": (["--backbone", "vgg16", "--name", "other"], ["vgg16", "resnet50"]),
    "unknown weights": (["--pretrained", "IMAGENET9", "--name", "other"], ["IMAGENET9"]),
    "absent weights": (["--pretrained", "gone.pth", "--name", "other"], ["gone.pth"]),
    "weights that are no weights": (["--pretrained", __file__, "--name", "other"], ["test_faults.py"]),
    "absent data": (["--data_root", "gone"], ["gone"]),
    "data_root is a file": (["--data_root", __file__], ["test_faults.py"]),
    "no such class": (["--classes", "pur*"], ["pur*"]),
    "no such GPU": (["--device", "cuda:17"], ["cuda:17"]),
    "no such branch": (["--prediction", "tail", "--name", "other"], ["tail", "raw"]),
    "no such loss": (["--loss_weights", "tail=1", "--name", "other"], ["tail", "raw"]),
    "contradiction": (["--batch_norm", "frozen"], ["batch_norm", "pretrained"]),
    "another system's setting": (["--graph_scope", "batch"], ["graph_scope", "sgkrl_published", "resnet"]),
    "other settings in the folder": (["--seed", "9"], ["seed 0 there and 9 here", "--name", "--fresh"]),
    "other classes in the folder": (["--classes", "red", "blue"], ["classes", "--name", "--fresh"]),
    "a name that is a path": (["--name", "../up"], ["name", "../up"]),
    "a folder that cannot be made": (["--checkpoint_dir", "/proc/runs"], ["/proc/runs"]),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_ends_with_one_sentence_and_harms_nothing(case, finished_run, tiny_run, capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    flags, words = BAD_INPUT[case]
    before = contents(finished_run.parent)
    capsys.readouterr()
    with pytest.raises(SystemExit) as ending, exit_with_one_sentence():
        train.main([*tiny_run(finished_run.parent), *flags])
    assert ending.value.code == 2
    errors = capsys.readouterr().err
    (sentence,) = errors.splitlines()
    assert sentence.startswith("error: ")
    assert all(word in sentence for word in words), sentence
    assert contents(finished_run.parent) == before
    assert [path.name for path in finished_run.parent.iterdir()] == [finished_run.name]


BAD_CHECKPOINTS = {
    "absent": None,
    "empty": b"",
    "truncated": "truncated",
    "text": b"<html>",
    "a state dict": {"fc.weight": torch.zeros(2, 2)},
    "a list": [1, 2],
    "of another version": {
        "settings": {"colour": "blue"},
        "class_names": [],
        "network": {},
        "epoch": 1,
        "selected_on": "",
    },
}


@pytest.mark.parametrize("case", BAD_CHECKPOINTS)
def test_evaluating_a_bad_checkpoint_ends_with_one_sentence(case, finished_run, tmp_path, capsys, evaluation_script):
    content, path = BAD_CHECKPOINTS[case], tmp_path / "best.pth"
    if content == "truncated":
        path.write_bytes((finished_run / "best.pth").read_bytes()[:5000])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(SystemExit) as ending, exit_with_one_sentence():
        evaluation_script.main([str(path)])
    assert ending.value.code == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert sentence.startswith("error: ")
    assert str(path) in sentence
    assert not (tmp_path / "report.json").exists()


# what is in the place of an entry, by the path to it
DAMAGES = {
    "no settings": (("settings",), None),
    "settings that are a list": (("settings",), ["resnet"]),
    "a setting without a name": (("settings", 3), 4),
    "options that are a list": (("settings", "options"), [1, 2]),
    "a model that is a list": (("settings", "model"), ["resnet"]),
    "another backbone": (("settings", "backbone"), "resnet34"),
    "no class names": (("class_names",), None),
    "no epoch": (("epoch",), "one"),
    "no weights": (("network",), None),
    "weights of something else": (("network", "elsewhere.weight"), torch.zeros(2)),
    "no optimizer": (("optimizer",), {}),
    "no schedule": (("schedule",), None),
    "no place in the epoch": (("progress",), 3),
    "no best epoch": (("best",), None),
}
OF_TRAINING = {"optimizer", "schedule", "progress", "best"}  # test.py does not look at them


@pytest.mark.parametrize(
    ("script", "damage"),
    [("train", damage) for damage in DAMAGES]
    + [("test", damage) for damage, (way, _) in DAMAGES.items() if way[0] not in OF_TRAINING],
)
def test_a_checkpoint_with_something_else_in_it_is_refused(
    script, damage, finished_run, tiny_run, tmp_path, capsys, evaluation_script
):
    (*way, name), value = DAMAGES[damage]
    path = tmp_path / finished_run.name / "last.pth"
    path.parent.mkdir()
    content = load_checkpoint(finished_run / "last.pth")
    place = content
    for step in way:
        place = place[step]
    place[name] = value
    torch.save(content, path)
    with pytest.raises(SystemExit) as ending, exit_with_one_sentence():
        evaluation_script.main([str(path)]) if script == "test" else train.main(tiny_run(tmp_path))
    assert ending.value.code == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert sentence.startswith("error: ")
    assert str(path) in sentence
    assert [file.name for file in path.parent.iterdir()] == ["last.pth"]


def test_a_checkpoint_of_other_classes_is_refused_naming_both(finished_run, picture_tree, tmp_path, evaluation_script):
    """One of an older version, which does not say what it was trained on."""
    tree = Path(shutil.copytree(picture_tree, tmp_path / "tree"))
    shutil.copytree(tree / "red", tree / "yellow")
    content = load_checkpoint(finished_run / "best.pth")
    del content["pictures"]
    content["settings"]["data_root"] = str(tree)
    torch.save(content, tmp_path / "best.pth")
    with pytest.raises(CheckpointError, match=r"knows 3 classes.*has 4 \(1 new, the first is 'yellow'\)"):
        evaluation_script.main([str(tmp_path / "best.pth")])


# ---- Choices --------------------------------------------------------------------------------------------------------


def test_a_fresh_start_keeps_the_old_run_beside_it(tiny_run, tmp_path):
    for number in range(3):
        train.main(tiny_run(tmp_path, "--seed", str(number), "--fresh"))
    folders = {path.name for path in tmp_path.iterdir()}
    assert folders == {"folder-resnet", "folder-resnet.old1", "folder-resnet.old2"}
    for number, name in enumerate(("folder-resnet.old1", "folder-resnet.old2", "folder-resnet")):
        assert load_checkpoint(tmp_path / name / "last.pth")["settings"]["seed"] == number
        assert len(read_log(tmp_path / name)) == 1


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


def test_unreadable_pictures_stop_a_run_before_it_begins_or_are_left_out(tiny_run, picture_tree, tmp_path, capsys):
    tree = Path(shutil.copytree(picture_tree, tmp_path / "tree"))
    whole = (tree / "red" / "0.png").read_bytes()
    (tree / "red" / "0.png").write_bytes(whole[: len(whole) // 2])
    (tree / "blue" / "1.png").write_bytes(b"")
    arguments = tiny_run(tmp_path / "runs", "--data_root", str(tree))
    with pytest.raises(SystemExit) as ending, exit_with_one_sentence():
        train.main(arguments)
    assert ending.value.code == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert re.match(
        r"error: 2 of 24 pictures cannot be read, the first is \S+tree/\S+\.png \(.+\): .*on_bad_image", sentence
    )
    assert not (tmp_path / "runs").exists()

    train.main([*arguments, "--on_bad_image", "skip"])
    folder = tmp_path / "runs" / "folder-resnet"
    listed = (folder / "bad_pictures.txt").read_text(encoding="utf-8").splitlines()
    assert sorted(line.split("\t")[0] for line in listed) == [str(tree / "blue" / "1.png"), str(tree / "red" / "0.png")]
    assert "2 unreadable pictures are left out" in capsys.readouterr().out


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


# ---- Checkpoints with the right entries and wrong content -----------------------------------------------------------


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
    value, finished_run, tiny_run, tmp_path, capsys, evaluation_script
):
    folder = Path(shutil.copytree(finished_run, tmp_path / finished_run.name))
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


# what a checkpoint holds, changed in place -> a word of the one sentence
FORGED = {
    "a missing weight": (lambda c: c["network"].popitem(), "classifier"),
    "a weight of another shape": (
        lambda c: c["network"].update({"classifier.bias": torch.zeros(2)}),
        "classifier.bias",
    ),
    "a weight that is NaN": (lambda c: c["network"]["classifier.bias"].fill_(math.nan), "not finite"),
    "a weight that is a list": (lambda c: c["network"].update({"classifier.bias": [0.0, 0.0, 0.0]}), "network"),
    "a sparse weight": (
        lambda c: c["network"].update({"classifier.bias": c["network"]["classifier.bias"].to_sparse()}),
        "plain",
    ),
    "a huge weight of one number": (
        lambda c: c["network"].update({"classifier.bias": torch.zeros(1).expand(1 << 40)}),
        "shape",
    ),
    "more names than outputs": (lambda c: c["class_names"].append("yellow"), "names 4 classes, and has weights for 3"),
    "names that are numbers": (lambda c: c.update(class_names=[1, 2, 3]), "class_names"),
    "settings of another system": (lambda c: c["settings"].update(model="scrim", options={}), "scrim"),
    "settings as text": (lambda c: c.update(settings="resnet18"), "settings"),
    "a number as text": (lambda c: c["settings"].update(input_size="96"), "input_size"),
    "an impossible number": (lambda c: c["settings"].update(dropout=7.0), "dropout"),
    "an unknown backbone": (lambda c: c["settings"].update(backbone="vgg"), "vgg"),
    "no epoch": (lambda c: c.update(epoch=-1), "epoch"),
}


@pytest.mark.parametrize(
    ("script", "case"),
    [
        *(("test", case) for case in FORGED),
        *((script, case) for script in ("predict", "export") for case in ("a missing weight", "an unknown backbone")),
        *(("train", case) for case in list(FORGED)[::3]),  # it has a table of its own, below
    ],
)
def test_forged_checkpoints_are_refused_by_every_program(
    script, case, finished_run, tiny_run, picture_tree, tmp_path, capsys, evaluation_script
):
    change, word = FORGED[case]
    path = tmp_path / finished_run.name / "last.pth"
    path.parent.mkdir()
    content = load_checkpoint(finished_run / "last.pth")
    change(content)
    torch.save(content, path)
    commands = {
        "test": (evaluation_script.main, [str(path)]),
        "predict": (predict.main, ["--checkpoint", str(path), str(picture_tree / "red"), "--out", str(tmp_path / "o")]),
        "export": (export.main, ["--checkpoint", str(path), "--out", str(tmp_path / "model.pt2")]),
        "train": (train.main, tiny_run(tmp_path)),
    }
    main, arguments = commands[script]
    with pytest.raises(SystemExit) as ending, exit_with_one_sentence():
        main(arguments)
    assert ending.value.code == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert sentence.startswith("error: ")
    assert str(path) in sentence
    assert word in sentence or script == "train"  # which compares settings and classes with its own first
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == ["last.pth"]


FORGED_TRAINING = {
    "momentum of another shape": lambda c: c["optimizer"]["state"][0].update(momentum_buffer=torch.zeros(3)),
    "momentum that is infinite": lambda c: c["optimizer"]["state"][0]["momentum_buffer"].fill_(math.inf),
    "a rate as text": lambda c: c["optimizer"]["param_groups"][0].update(lr="fast"),
    "an optimizer without state": lambda c: c["optimizer"].pop("state"),
    "state of another optimizer": lambda c: c["optimizer"].update(param_groups=[{"params": [0], "lr": 0.1}]),
    "an empty schedule": lambda c: c.update(schedule={}),
    "a schedule elsewhere": lambda c: c["schedule"].update(last_epoch=1),
    "a best epoch to come": lambda c: c["best"].update(epoch=5),
    "a best epoch as text": lambda c: c["best"].update(epoch="five"),
    "a step that is not there": lambda c: c.update(
        progress={"epoch": 2, "step": 99, "learning_rate": 0.1, "meter": {}}
    ),
    "sums that are texts": lambda c: c.update(
        progress={
            "epoch": 2,
            "step": 1,
            "learning_rate": 0.1,
            "meter": {"sums": {"a": "b"}, "counts": {"a": 1}, "images": 1},
        }
    ),
    "a record that is none": lambda c: c.update(pictures=torch.zeros(9, dtype=torch.uint8)),
    "a record that is text": lambda c: c.update(pictures="ant"),
}


@pytest.mark.parametrize("case", FORGED_TRAINING)
def test_forged_states_of_training_are_refused(case, finished_run, tiny_run, tmp_path, capsys):
    path = tmp_path / finished_run.name / "last.pth"
    path.parent.mkdir()
    content = load_checkpoint(finished_run / "last.pth")
    FORGED_TRAINING[case](content)
    torch.save(content, path)
    with pytest.raises(SystemExit) as ending, exit_with_one_sentence():
        train.main(tiny_run(tmp_path))
    assert ending.value.code == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert sentence.startswith("error: ")
    assert str(path) in sentence


# ---- Faults while running -------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("after", [0, 2, 12], ids=["at the start", "the settings", "an epoch"])
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
    with pytest.raises(SystemExit), exit_with_one_sentence(elsewhere="--out"), files.written_whole(tmp_path / "a"):
        raise OSError(number, os.strerror(number))
    sentence = capsys.readouterr().err
    assert advice in sentence
    assert "--out" in sentence
    assert "--checkpoint_dir" not in sentence


def test_programs_that_write_one_file_at_once_do_not_meet(tmp_path):
    path = tmp_path / ("n" * 250)  # as long as a name may be
    with files.written_whole(path) as one, files.written_whole(path) as other, files.written_whole(path) as third:
        for file, content in ((one, b"one"), (other, b"other"), (third, b"third")):
            file.write(content)
    assert path.read_bytes() == b"one"
    assert list(tmp_path.iterdir()) == [path]


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
