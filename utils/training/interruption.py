"""Ctrl-C and SIGTERM, which a batch system sends before it ends a job: finish the step, save, and go."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType

import torch

from utils.training.distributed import any_process, is_main


class StopRequest:
    """While active, the first Ctrl-C or SIGTERM only sets a flag; a Ctrl-C after it stops at once.

    with StopRequest() as stop:
        for step in ...:
            if stop.agree(device): save, and raise Stopped
    """

    def __init__(self) -> None:
        self.requested = False  # in this process
        self.agreed = False  # in all

    def __enter__(self) -> StopRequest:
        self.process = os.getpid()
        self.previous = {}
        if threading.current_thread() is threading.main_thread():  # Python gives signals to no other
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:  # whoever started the run wants it left alone
                    self.previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not set by Python

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

    def agree(self, device: torch.device) -> bool:
        """Tell whether any process was asked to stop; all processes have to ask at the same time."""
        self.agreed = any_process(self.requested, device)
        return self.agreed
