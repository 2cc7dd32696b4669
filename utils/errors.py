"""Errors that a user can mend end a script with one sentence instead of a traceback."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch

from utils.training.engine import NonFiniteLossError
from utils.training.interruption import Stopped

PROJECT = Path(__file__).resolve().parent.parent
# What the system refuses for reasons that lie outside this code
MENDABLE = {
    *(errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG),
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE, errno.ELOOP),
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EPIPE, errno.ETIMEDOUT),
}


@contextlib.contextmanager
def exit_with_one_sentence(*, training: bool = False) -> Iterator[None]:
    """End the program with `error: <sentence>` and exit code 2 (bad input) or 1 (the run itself went wrong).

    Errors that this code did not raise on purpose keep their traceback: they are faults to be reported. Of several
    processes each tells its own error, since another may not have it; what all agreed on is told once. `training`: an
    interruption says how the run goes on.
    """
    rank = int(os.environ.get("RANK", "0"))  # torchrun's
    process = f"[process {rank}] " if rank else ""
    again = "with the same command" + (", without --fresh" if "--fresh" in sys.argv else "")
    try:
        yield
    except (ValueError, OSError) as error:
        if not _is_meant_for_users(error):
            raise
        # A loader's worker wraps the error in its traceback; the sentence is the last line.
        sentence = (str(error).strip() or type(error).__name__).splitlines()[-1].removeprefix("datasets.DataError: ")
        print(f"{process}error: {sentence}", file=sys.stderr)
        sys.exit(2)
    except NonFiniteLossError as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except RuntimeError as error:
        if isinstance(error, torch.distributed.DistError) or "/gloo/" in str(error):
            print(
                f"{process}error: another process of this run ended, or the connection to it broke: its own message, "
                f"if any, says why; a training run continues from its last checkpoint {again}",
                file=sys.stderr,
            )
            sys.exit(1)
        if not str(error).startswith("DataLoader worker (pid"):  # others are faults inside a worker
            raise
        print(
            f"{process}error: a process that loads pictures died, most likely for lack of memory: lower workers, "
            f"image_size or batch_size; a training run continues from its last checkpoint {again}",
            file=sys.stderr,
        )
        sys.exit(1)
    except (KeyboardInterrupt, Stopped) as stop:
        goes_on = ""
        if training:
            saved = "where it stopped" if isinstance(stop, Stopped) else "its last checkpoint"
            goes_on = f"; a training run continues from {saved} {again}"
        if rank == 0:
            print(f"interrupted{goes_on}", file=sys.stderr)
        sys.exit(130)


def _is_meant_for_users(error: Exception) -> bool:
    """Tell our own sentences, and the operating system's, from an error out of the depths or a slip of our own."""
    if isinstance(error, OSError) and error.errno in MENDABLE:
        return True
    if type(error).__module__ in ("config", "datasets", "utils.checkpoint", "utils.files"):
        return True
    raised_in = traceback.extract_tb(error.__traceback__)[-1]
    path = Path(raised_in.filename).resolve()
    ours = path.is_relative_to(PROJECT) and "site-packages" not in path.parts
    return ours and (raised_in.line or "").startswith("raise ")  # int("x") on a line of ours is a slip
