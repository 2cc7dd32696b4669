"""Run a script in two processes that train together: `python two_processes.py SCRIPT ARGUMENT ... [-- ...]`.

As torchrun would, but forked from this process, which has imported PyTorch and computed nothing yet: to import it for
the launcher and for every process takes longer than a short run. After `--` comes what is run next. Ends with the
number of processes that failed. Run by the tests of several processes, see tests/launching.py.
"""

from __future__ import annotations

import os
import socket
import sys

from fork_server import run_and_exit

os.fsync = lambda file_number: None  # the disk may be slow


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(rank: int, port: int, words: list[str]) -> int:
    """Fork a process that runs a script, and return its number."""
    child = os.fork()
    if not child:
        joined = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in joined.items()})
        run_and_exit(words)
    return child


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
