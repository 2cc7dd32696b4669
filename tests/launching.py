"""Run the project's scripts from tests: forked from a process that has imported them, or with a Python of their own.

A fork starts in a hundredth of a second, not in four. What it cannot show is that a script finds its modules by itself,
and what Python or PyTorch read when they start (PYTHON..., OMP_NUM_THREADS): `run_python` shows these.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
ALONE = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


@functools.cache
def _server() -> socket.socket:
    """Start tests/fork_server.py, once in a process of pytest."""
    ours, theirs = socket.socketpair()
    command = [sys.executable, str(PROJECT / "tests" / "fork_server.py"), str(theirs.fileno())]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    process = subprocess.Popen(
        command, env=os.environ | ALONE, pass_fds=[theirs.fileno()], start_new_session=True, **pipes
    )
    theirs.close()
    atexit.register(ours.close)
    atexit.register(process.wait)
    atexit.register(process.kill)
    return ours


class Script:
    """A script of the project in a forked process of a process group of its own; used as `subprocess.Popen` is.

    thin: `resnet18` is a quarter as wide there (tests/thin_trunk.py).
    file_limit: bytes beyond which no file can grow there.
    """

    def __init__(
        self, *words: str, folder: Path = PROJECT, thin: bool = False, file_limit: int | None = None, **environment: str
    ) -> None:
        self.args = [*map(str, words)]
        self.args[0] = str(PROJECT / self.args[0])
        self.returncode: int | None = None
        self._open = contextlib.ExitStack()
        self._output = self._open.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
        self._errors = self._open.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
        self._connection, theirs = socket.socketpair()
        self._open.enter_context(self._connection)
        files = [theirs.fileno(), self._output.fileno(), self._errors.fileno()]
        socket.send_fds(_server(), [b"!"], files)
        theirs.close()
        request = {"words": self.args, "folder": str(folder), "thin": thin, "file_limit": file_limit}
        request["environment"] = os.environ | ALONE | environment
        self._connection.sendall(json.dumps(request).encode() + b"\n")
        self.pid = self._receive()

    def _receive(self) -> int:
        number = self._connection.recv(8)
        if not number:
            raise RuntimeError("tests/fork_server.py has ended; its own message says why")
        return int.from_bytes(number, "little", signed=True)

    def poll(self) -> int | None:
        try:
            return self.wait(0)
        except BlockingIOError:
            return None

    def wait(self, timeout: float | None = None) -> int:
        """The exit code; raises TimeoutError, or BlockingIOError where the time is 0."""
        if self.returncode is None:
            self._connection.settimeout(timeout)
            self.returncode = self._receive()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Standard output and error, when it has ended."""
        self.wait(timeout)
        texts = []
        for file in (self._output, self._errors):
            file.seek(0)
            texts.append(file.read().decode("utf-8", errors="surrogateescape"))
        return texts[0], texts[1]

    def __enter__(self) -> Script:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.returncode is None:
            os.killpg(self.pid, signal.SIGKILL)
            self.wait()
        self._open.close()


def run_script(*words: str, timeout: float = 120, **options: object) -> subprocess.CompletedProcess:
    """Run a script of the project in a forked process; options as for `Script`."""
    with Script(*words, **options) as script:
        output, errors = script.communicate(timeout)
    return subprocess.CompletedProcess(script.args, script.returncode, output, errors)


def run_two_processes(*words: str, **options: object) -> subprocess.CompletedProcess:
    """As `torchrun --nproc_per_node 2`, in less time; see tests/two_processes.py."""
    return run_script("tests/two_processes.py", *words, **options)


def run_python(*words: str, timeout: float = 120) -> subprocess.CompletedProcess:
    """Start a Python of its own with these words, in the project's folder."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, *words]
    with subprocess.Popen(command, cwd=PROJECT, env=os.environ | ALONE, **pipes) as process:
        try:
            output, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.terminate()  # not killed: torchrun then ends the processes that it started
            process.wait(timeout=60)
            raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)
