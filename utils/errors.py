"""Errors that a user can mend end a script with one sentence instead of a traceback."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from utils.engine import NonFiniteLossError


@contextlib.contextmanager
def exit_with_one_sentence() -> Iterator[None]:
    """End the program with `error: <sentence>` and exit code 2 (bad input) or 1 (the run itself went wrong)."""
    try:
        yield
    except (ValueError, OSError) as error:
        # A loader's worker wraps the error in its traceback; the sentence is the last line.
        sentence = str(error).strip().splitlines()[-1].removeprefix("datasets.DataError: ")
        print(f"error: {sentence}", file=sys.stderr)
        sys.exit(2)
    except NonFiniteLossError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted: the same command continues from the last whole epoch", file=sys.stderr)
        sys.exit(130)
