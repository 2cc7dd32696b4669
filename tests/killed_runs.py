"""Train in child processes and kill them: `python killed_runs.py KILLS SEED REFERENCE_DIR KILLED_DIR ARGUMENT ...`.

Run by tests/runs/test_stopped_runs.py in a forked process (tests/launching.py), so that the children come from one that
has computed nothing yet.
First an uninterrupted run into REFERENCE_DIR, then one into KILLED_DIR that is killed KILLS times and started again
with the same arguments. Prints where each child was killed. A child counts its moments (steps, writes, renamings, log
lines, evaluations) and kills itself with SIGKILL at a drawn one; every third is killed from outside, shortly after one.
"""

from __future__ import annotations

import functools
import io
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import thin_trunk
import torch

import train
from utils.reporting.runlog import RunLog
from utils.training import current_epoch

thin_trunk.install()
os.fsync = lambda file_number: None  # a kill loses nothing that the system was given, and the disk may be slow


def kill_at_moment(number: int, report: int, *, from_outside: bool) -> None:
    """Make this process kill itself at its moment `number`, and write what it was about to do to the pipe `report`.

    `from_outside`: it only writes, and goes on.
    """
    count = 0

    def moment(name: str) -> bool:
        nonlocal count
        count += 1
        if count == number:
            os.write(report, name.encode())
        return count == number and not from_outside

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def before(function: Callable, name: str) -> Callable:
        def wrapped(*arguments: object, **options: object) -> object:
            if moment(name):
                die()
            return function(*arguments, **options)

        return wrapped

    save = torch.save

    def save_or_half(content: object, file: io.IOBase, *arguments: object) -> None:
        if moment("half a checkpoint written"):
            buffer = io.BytesIO()
            save(content, buffer)
            file.write(buffer.getvalue()[: buffer.tell() // 2])
            file.flush()
            die()
        save(content, file, *arguments)

    torch.save = save_or_half
    train.seed_everything = current_epoch.seed_everything = before(train.seed_everything, "step")
    train.evaluate = before(train.evaluate, "evaluation")
    RunLog.log_epoch = before(RunLog.log_epoch, "log line")
    Path.replace = before(Path.replace, "renaming")


def run(arguments: list[str], prepare: Callable[[], None] = lambda: None) -> int:
    """Fork a child that trains, and return its number."""
    child = os.fork()
    if child:
        return child
    try:
        prepare()
        train.main(arguments)
        os._exit(0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def finish(child: int) -> int:
    """Wait for a child: 0 where it ended well, -9 where it was killed."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    kills, seed, reference, killed, *arguments = sys.argv[1:]
    draw = random.Random(int(seed))
    assert finish(run([*arguments, "--checkpoint_dir", reference])) == 0
    arguments = [*arguments, "--checkpoint_dir", killed]
    for number in range(int(kills)):
        receive, report = os.pipe()
        from_outside = number % 3 == 2
        prepare = functools.partial(kill_at_moment, draw.randint(1, 8), report, from_outside=from_outside)
        child = run(arguments, prepare)
        os.close(report)
        moment = os.read(receive, 100).decode()  # nothing, where it ended before
        if from_outside:
            time.sleep(draw.uniform(0, 0.02))
            os.kill(child, signal.SIGKILL)
            moment = "some time"
        code = finish(child)
        assert code in (0, -signal.SIGKILL), f"a killed run went on with exit code {code}"
        print("finished" if code == 0 else f"killed: {moment}", flush=True)
    assert finish(run(arguments)) == 0


if __name__ == "__main__":
    main()
