"""Signals, as the parts of a run take them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import time

import pytest
import torch
from whole_runs import wait_for

from utils import checkpoint
from utils.data.workers import leave_run_to_the_main_process
from utils.training.interruption import StopRequest


def test_a_loader_ends_with_its_parents_signal_only():
    receive, ready = os.pipe()

    def load() -> None:
        leave_run_to_the_main_process(0)
        os.write(ready, b"!")
        time.sleep(60)

    loader = multiprocessing.get_context("fork").Process(target=load)
    loader.start()
    child = loader.pid
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


def test_a_second_signal_stops_at_once():
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
            os.kill(os.getpid(), number)  # batch systems send SIGTERM more than once
        assert stop.requested
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
        pytest.fail("it went on")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_ctrl_c_inside_the_writer_is_not_taken_for_a_full_disk(tmp_path):
    class Interrupting:
        def __reduce__(self):
            os.kill(os.getpid(), signal.SIGINT)
            return int, ()

    with pytest.raises(KeyboardInterrupt):
        checkpoint.save_checkpoint(tmp_path / "last.pth", {"weights": torch.zeros(9), "late": Interrupting()})
    assert list(tmp_path.iterdir()) == []
