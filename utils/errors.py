"""Errors that a user can mend end a script with one sentence instead of a traceback."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
from collections.abc import Iterator
from typing import ClassVar

from utils.text import let_every_name_pass, one_line

# What the system refuses for reasons that lie outside this code
MENDABLE = {
    *(errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG),
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE, errno.ELOOP),
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EPIPE, errno.ETIMEDOUT),
}


class UserError(ValueError):
    """What a user can mend, in one sentence: what it is, what was expected, what to do.

    Every error that this code raises on purpose is one; all others are faults of the code and keep their traceback.
    """

    exit_code: ClassVar[int] = 2  # bad input
    agreed: ClassVar[bool] = False  # whether all processes of a run raise it together, so that one of them reports it

    # Not called `message`: PyTorch raises a worker's error anew by that keyword, where the class has such an attribute.
    def sentence(self, elsewhere: str) -> str:
        """Return the sentence; `elsewhere`: the flag by which this program writes to another place."""
        return str(self)


class Stopped(Exception):
    """The run was asked to stop, has saved its state, and unwinds."""


@contextlib.contextmanager
def exit_with_one_sentence(
    *, training: bool = False, elsewhere: str = "--checkpoint_dir", less_memory: str = "lower batch_size"
) -> Iterator[None]:
    """End the program with `error: <sentence>` and exit code 2 (bad input) or 1 (the run itself went wrong).

    Of several processes each reports its own error, since another may not have it; what all agreed on is reported once.
    `training`: an interruption says how the run goes on. `elsewhere`: the flag that lets the program write to another
    place. `less_memory`: what to do where memory is not enough.
    """
    rank = int(os.environ.get("RANK", "0"))  # torchrun's
    process = f"[process {rank}] " if rank else ""
    again = "with the same command" + (", without --fresh" if "--fresh" in sys.argv else "")
    let_every_name_pass()
    try:
        yield
    except UserError as error:
        if rank == 0 or not error.agreed:
            print(f"{process}error: {one_line(error.sentence(elsewhere))}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno not in MENDABLE:
            raise
        memory = _out_of_memory(error, less_memory)
        sentence = memory or _too_little_of_something(error) or str(error)
        print(f"{process}error: {one_line(sentence)}", file=sys.stderr)
        sys.exit(1 if memory else 2)
    except (RuntimeError, MemoryError) as error:
        sentence = _out_of_memory(error, less_memory) or _too_little_of_something(error) or _what_ended_the_run(error)
        if sentence is None:
            raise
        goes_on = f"; a training run continues from its last checkpoint {again}" if training else ""
        print(f"{process}error: {sentence}{goes_on}", file=sys.stderr)
        sys.exit(1)
    except (KeyboardInterrupt, Stopped) as stop:
        goes_on = ""
        if training:
            saved = "where it stopped" if isinstance(stop, Stopped) else "its last checkpoint"
            goes_on = f"; a training run continues from {saved} {again}"
        if rank == 0:
            print(f"interrupted{goes_on}", file=sys.stderr)
        sys.exit(130)


# How messages of PyTorch and its libraries say that memory was not enough, beside errors of a type of their own
OUT_OF_MEMORY = (
    *("DefaultCPUAllocator:", "not enough memory", "Cannot allocate memory", "can't allocate memory", "std::bad_alloc"),
    *("CUDA out of memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED"),
    *("MPS backend out of memory", "could not create a memory object", "unable to mmap", "can't start new thread"),
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there was not enough memory, of the machine or of a GPU."""
    kinds = {kind.__name__ for kind in type(error).__mro__}  # by name: scripts that refuse their flags need no torch
    if isinstance(error, MemoryError) or "OutOfMemoryError" in kinds:
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM  # such as of a process that cannot be started
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in OUT_OF_MEMORY)


def tells_of_dead_loader(error: BaseException) -> bool:
    """Whether PyTorch says, wherever the main process is, that one which loads pictures was killed."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid")  # not: "Caught ... in"


def _out_of_memory(error: BaseException, less_memory: str) -> str | None:
    if not is_out_of_memory(error):
        return None
    text = str(error)
    gpu = any(word in text for word in ("CUDA", "CUBLAS", "CUDNN", "MPS"))
    asked = re.search(r"[Tt]ried to allocate ([\d.]+ ?\w+)", text)
    wanted = f" for another {asked[1]}" if asked else ""
    return f"there is not enough memory on the {'GPU' if gpu else 'machine'}{wanted}: {less_memory}"


# How PyTorch and NCCL say that processes could not hand something over; CUDA kernels have a shared memory, too
SHARED_MEMORY_FULL = (
    *("unable to allocate shared memory(shm)", "unable to resize file </torch_", "workers are out of shared memory"),
    "shared memory segment /dev/shm",
)
TOO_MANY_FILES = ("Too many open files", "items of ancdata")


def _too_little_of_something(error: BaseException) -> str | None:
    """A sentence for what the machine, or a container on it, allows too little of; None for any other error."""
    text = str(error)
    if any(sign in text for sign in TOO_MANY_FILES):
        where = f" ({error.filename})" if isinstance(error, OSError) and error.filename is not None else ""
        return f"too many files are open at once{where}: allow for more (ulimit -n), or lower workers"
    if any(sign in text for sign in SHARED_MEMORY_FULL):
        return (
            "the shared memory of this machine (/dev/shm) is too small for what processes hand each other: lower "
            "workers, prefetch or batch_size, or give a container more (docker run --shm-size 8g)"
        )
    if isinstance(error, OSError) and error.filename is None:
        if error.errno == errno.ENOSPC:
            return f"{error}: make room on the disk, or in the machine's shared memory (/dev/shm)"
        if error.errno == errno.EAGAIN:
            return f"{error}: too many processes, most likely; allow for more (ulimit -u), or lower workers"
    return None


def _what_ended_the_run(error: RuntimeError) -> str | None:
    """A sentence for what PyTorch raises for other processes that are gone, and on MPS; None for any other error."""
    from torch.distributed import DistError  # here: scripts that refuse their flags need no torch

    if isinstance(error, DistError) or "/gloo/" in str(error):
        return "another process of this run ended, or the connection to it broke: its own message, if any, says why"
    if isinstance(error, NotImplementedError) and "MPS" in str(error):
        return (
            f"PyTorch cannot compute something on mps ({str(error).partition('. ')[0]}): set the environment variable "
            "PYTORCH_ENABLE_MPS_FALLBACK=1, so that the CPU does it, or give --device cpu"
        )
    if tells_of_dead_loader(error):
        return (
            "a process that loads pictures died: its own message, if any, says why; most likely memory was not "
            "enough: lower workers, image_size or batch_size"
        )
    return None
