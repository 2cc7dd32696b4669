"""Errors that a user can mend end a script with one sentence instead of a traceback."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

from utils.engine import NonFiniteLossError
from utils.interruption import Stopped

PROJECT = Path(__file__).resolve().parent.parent


@contextlib.contextmanager
def exit_with_one_sentence() -> Iterator[None]:
    """End the program with `error: <sentence>` and exit code 2 (bad input) or 1 (the run itself went wrong).

    Errors that this code did not raise on purpose keep their traceback: they are faults to be reported.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        if not _is_meant_for_users(error):
            raise
        # A loader's worker wraps the error in its traceback; the sentence is the last line.
        sentence = (str(error).strip() or type(error).__name__).splitlines()[-1].removeprefix("datasets.DataError: ")
        if os.environ.get("RANK", "0") == "0":  # torchrun: one process speaks for all
            print(f"error: {sentence}", file=sys.stderr)
        sys.exit(2)
    except NonFiniteLossError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):  # others are faults inside a worker
            raise
        print(
            "error: a process that loads pictures died, most likely for lack of memory: lower workers, image_size or "
            "batch_size; a training run continues from its last checkpoint with the same command",
            file=sys.stderr,
        )
        sys.exit(1)
    except (KeyboardInterrupt, Stopped) as stop:
        saved = "where it stopped" if isinstance(stop, Stopped) else "its last checkpoint"
        print(f"interrupted; a training run continues from {saved} with the same command", file=sys.stderr)
        sys.exit(130)


def _is_meant_for_users(error: Exception) -> bool:
    """Tell our own sentences, and the operating system's, from a ValueError out of the depths of a library."""
    if isinstance(error, OSError) or type(error).__module__ in (
        "config",
        "datasets",
        "utils.checkpoint",
        "utils.files",
    ):
        return True
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
    return raised_in.is_relative_to(PROJECT) and "site-packages" not in raised_in.parts
