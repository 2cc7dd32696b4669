"""Workers of a DataLoader: they leave signals to the process of the run, and end with it."""

from __future__ import annotations

import multiprocessing.queues
import os
import signal
import sys
import threading
from contextlib import suppress
from multiprocessing.process import BaseProcess
from typing import NoReturn

from utils.data.decoding import limit_memory
from utils.files import drop_inherited_locks


def leave_run_to_the_main_process(worker: int) -> None:
    """Set a loader's process apart: it keeps no lock, only the run's process can end it, and it ends with that.

    The terminal's Ctrl-C goes to a process group, and batch systems send SIGTERM to every process of a job: a loader
    that obeyed would take the run with it before that has saved.
    """
    drop_inherited_locks()
    parent = multiprocessing.parent_process()
    if parent.pid != os.getppid():  # PyTorch watches what stands between, the fork server, which lives as long as this
        threading.Thread(target=_end_with, args=[parent], daemon=True).start()
    if hasattr(os, "setpgrp"):  # not on Windows
        os.setpgrp()
    if hasattr(signal, "sigwaitinfo"):  # not on Windows and macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_with_the_parents_signal, args=[parent.pid], daemon=True).start()


def start_loader(worker: int, picture_memory: float) -> None:
    """Start a loader's process: GB that one decoded picture may take; see `leave_run_to_the_main_process`."""
    limit_memory(picture_memory)
    leave_run_to_the_main_process(worker)
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end_for_want_of_a_batch)


def _end_for_want_of_a_batch(error: Exception, batch: object) -> NoReturn:
    """End where a batch cannot be handed over: Python would drop it, and the run wait for it for ever."""
    print(f"a process that loads pictures cannot hand them over: {error}", file=sys.stderr, flush=True)
    os._exit(1)


def _end_with(parent: BaseProcess) -> NoReturn:
    parent.join()
    os._exit(1)


def _end_with_the_parents_signal(parent: int) -> None:
    while True:
        with suppress(InterruptedError):
            if signal.sigwaitinfo([signal.SIGTERM]).si_pid == parent:
                os._exit(0)
