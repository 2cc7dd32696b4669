"""Files that are written whole or not at all, locks on folders, and printing that outlives a closed pipe."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from utils.errors import UserError
from utils.text import visible

try:
    import fcntl
except ImportError:  # Windows: two runs in one folder are not noticed there
    fcntl = None


# What to do where the system refuses to write, by its reason
ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "allow writing there"),
    **dict.fromkeys((errno.EISDIR, errno.ENOTDIR, errno.EEXIST), "move away what is in its place"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "let programs open more files (ulimit -n)"),
    errno.EFBIG: "let files be larger (ulimit -f)",
    errno.ENAMETOOLONG: "give shorter names",
}


class SavingError(UserError, OSError):
    """A file could not be written; what was there before is unharmed. `reason`: the system's error, or words."""

    def __init__(self, path: str | Path, reason: OSError | str) -> None:
        self.path, self.advice = path, "make room"
        self.reason = reason
        if isinstance(reason, OSError):
            self.reason = reason.strerror or str(reason)
            self.advice = ADVICE.get(reason.errno, "see to that")
        super().__init__(self.sentence("--checkpoint_dir"))

    def sentence(self, elsewhere: str) -> str:
        return (
            f"{self.path} could not be written ({self.reason}): {self.advice} or write elsewhere ({elsewhere}); what "
            "was saved before is unharmed"
        )


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file for writing that replaces `path` once the block has ended without an error and it is on the disk.

    Its name until then is its own, so that programs which write the same file at once do not meet. Raises SavingError
    where the system does not let it.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name[:60]}.{secrets.token_hex(4)}.part")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except SavingError:
        raise
    except OSError as error:
        raise SavingError(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)  # half a file would only fill the disk


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, UTF-8, whole or not at all."""
    with atomic_write(path) as file:
        file.write(text.encode(errors="backslashreplace"))  # names may be of bytes that are no text


def sync_folder(folder: Path) -> None:
    """Bring new names in a folder to the disk, where the system can."""
    with contextlib.suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


OUTPUT_MARK = ".output"  # a file in folders of drawings and reports: what is in there is never read as data


def is_output(folder: Path) -> bool:
    """Whether our programs made a folder: it is marked, or it is a run's."""
    return (folder / OUTPUT_MARK).is_file() or all((folder / name).is_file() for name in ("config.json", "log.jsonl"))


def make_output_folder(folder: Path) -> None:
    """Make a folder for what a program writes. One that holds something else already is not marked: that may be data.

    Raises SavingError where the system does not let it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not any(folder.iterdir()):
            (folder / OUTPUT_MARK).write_text("What is in this folder was written by a program, and is no data.\n")
    except OSError as error:
        raise SavingError(folder, error) from error


def make_folder_of(path: Path) -> None:
    """Make the folder that a file is to be written into. Raises SavingError where the system does not let it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SavingError(path.parent, error) from error


class FolderInUseError(UserError):
    """Another process works in the folder."""


_locks: set[int] = set()  # open file numbers


def drop_inherited_locks() -> None:
    """Let go, in a forked process, of the locks that its parent keeps: it may outlive the parent for a while."""
    while _locks:
        os.close(_locks.pop())


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a folder, made if missing, to this process. The lock ends with the process, whatever ends it.

    A folder made here and still empty at the end is removed. Raises FolderInUseError where another process has it.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    number = None
    try:
        if fcntl is not None:
            number = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise FolderInUseError(
                    f"another process is training in {folder}: wait for it, or give this run a --name of its own"
                ) from None
            except OSError as error:  # some network disks know no locks
                print(
                    f"warning: {folder} cannot be locked ({error.strerror}): start no second run in it", file=sys.stderr
                )
            _locks.add(number)
        yield
    finally:
        with contextlib.suppress(OSError):  # before the lock ends, or another run may just have begun in it
            for path in missing:
                path.rmdir()
        if number is not None:
            _locks.discard(number)
            os.close(number)


def show(text: str) -> None:
    """Print what is told on the way to files: a reader that leaves early, like `head`, costs none of them."""
    try:
        print(visible(text), flush=True)
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())  # for what Python still holds back and for what follows
        os.close(nowhere)
