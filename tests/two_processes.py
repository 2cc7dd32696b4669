"""Run a script in two processes that train together: `python two_processes.py SCRIPT ARGUMENT ... [-- ...]`.

As torchrun would, but forked from a process that has imported PyTorch and computed nothing yet: to import it for the
launcher and for every process takes longer than a short run. After `--` comes what is run next. Ends with the number of
processes that failed. Run as a script by the tests of several processes.
"""

from __future__ import annotations

import os
import runpy
import socket
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch._dynamo  # noqa: F401  every DistributedDataParallel imports it

import train  # noqa: F401

os.fsync = lambda file_number: None  # the disk may be slow


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(rank: int, port: int, words: list[str]) -> int:
    """Fork a process that runs a script, and return its number."""
    child = os.fork()
    if child:
        return child
    joined = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in joined.items()}
    sys.argv = words
    code = 0
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> int:
    jobs: list[list[str]] = [[]]
    for word in sys.argv[1:]:
        if word == "--":
            jobs.append([])
        else:
            jobs[-1].append(word)
    failed = 0
    for words in jobs:
        port = free_port()
        children = [start(rank, port, words) for rank in range(2)]
        failed += sum(os.waitpid(child, 0)[1] != 0 for child in children)
    return failed


if __name__ == "__main__":
    sys.exit(main())
