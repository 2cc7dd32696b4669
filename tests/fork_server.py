"""Fork a child for every script that tests ask for: `python fork_server.py FILE_NUMBER`, a socket's.

Started by tests/launching.py. This process has imported what the project's scripts import, which takes longer than a
short run, and has computed nothing, so that its children may start threads of their own. Each byte on the socket brings
three open files: a socket for the request (one line of JSON; back go the child's process number and, later, its exit
code, eight bytes each), and the child's standard output and error. Ends when pytest closes its end.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import resource
import runpy
import socket
import sys
import traceback
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import thin_trunk
import torch._dynamo  # noqa: F401  every DistributedDataParallel imports it

import export  # noqa: F401
import predict  # noqa: F401
import train  # noqa: F401

TESTS = Path(__file__).resolve().parent
OURS = {str(TESTS), str(TESTS.parent)}  # where Python has looked for modules because this file was started
NUMBER = 8  # bytes


def send_number(receiver: socket.socket, number: int) -> None:
    with contextlib.suppress(OSError):  # pytest has given the script up
        receiver.sendall(number.to_bytes(NUMBER, "little", signed=True))


def run_and_exit(words: list[str]) -> NoReturn:
    """Run a script as `python SCRIPT ARGUMENT ...` does, in this process, and end it.

    Without taking Python down, which costs a fork more than a second: all the memory that it shares would be copied.
    """
    sys.argv = words
    sys.path[:] = [str(Path(words[0]).resolve().parent), *(place for place in sys.path if place not in OURS)]
    code = 0
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as ending:
        code = ending.code
        if code is None or isinstance(code, str):
            sys.stderr.write(code or "")
            code = int(code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def serve(requests: socket.socket) -> dict[str, object]:
    """Fork for every request. Returns in the forked children only: what each of them has to run."""
    while True:
        _, files, _, _ = socket.recv_fds(requests, 1, 3)
        if not files:
            sys.exit()
        if not os.fork():
            requests.close()
            return start(*files)
        for file in files:
            os.close(file)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:  # those that have ended since
                pass


def start(connection: int, output: int, errors: int) -> dict[str, object]:
    """Fork once more, wait for that child and report its exit code. Returns in that child only."""
    receiver = socket.socket(fileno=connection)
    with receiver.makefile("rb") as lines:
        request = json.loads(lines.readline())
    child = os.fork()
    if child:
        send_number(receiver, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        os._exit(0)
    os.setsid()  # a process group of its own, before anyone can send it a signal
    os.dup2(output, 1)
    os.dup2(errors, 2)
    os.close(output)
    os.close(errors)
    send_number(receiver, os.getpid())
    receiver.close()
    return request


def become(words: list[str], folder: str, environment: dict[str, str], thin: bool, file_limit: int | None) -> NoReturn:
    """Run a script as if Python had been started with it there."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    if thin:
        thin_trunk.install()
    run_and_exit(words)


if __name__ == "__main__":
    gc.freeze()  # its children then share this memory for longer
    become(**serve(socket.socket(fileno=int(sys.argv[1]))))
