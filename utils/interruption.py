"""Ctrl-C and SIGTERM, which a batch system sends before it ends a job: finish the step, save, and go."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType

import torch

from utils.distributed import any_process, is_main
from utils.files import drop_inherited_locks


class Stopped(Exception):
    """The run was asked to stop, has saved its state, and unwinds."""


class StopRequest:
    """While active, the first Ctrl-C or SIGTERM only sets a flag; a Ctrl-C after it stops at once.

    with StopRequest() as stop:
        for step in ...:
            if stop.agreed(): save, and raise Stopped
    """

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> StopRequest:
        self.process = os.getpid()
        self.previous = {}
        if threading.current_thread() is threading.main_thread():  # Python gives signals to no other
            self.previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:  # a process that loads pictures, just forked
            return
        if self.requested:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return  # batch systems send SIGTERM twice, to the process and through its parent
        self.requested = True
        if is_main():
            print("\nfinishing this step and saving; Ctrl-C now stops at once", file=sys.stderr, flush=True)

    def agreed(self, device: torch.device) -> bool:
        """Tell whether any process was asked to stop; all processes have to ask at the same time."""
        return any_process(self.requested, device)


def leave_run_to_the_main_process(worker: int) -> None:
    """Set a loader's process apart: it keeps no lock, and the terminal's Ctrl-C does not end it."""
    drop_inherited_locks()
    if hasattr(os, "setpgrp"):  # not on Windows
        os.setpgrp()
