"""Whether the processes of a run, which may be on several machines, were given the same settings and data.

Each reads its own copies, and takes its share of what it reads: of different lists one process may train on what
another one is tested on, or wait for a step that the other does not take.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from utils.data.record import Record
from utils.errors import UserError
from utils.options import shown
from utils.shared_settings import OF_THE_MACHINE
from utils.training.distributed import gather

# Of pictures and labels the content is compared; weights are those of the first process
MAY_DIFFER = OF_THE_MACHINE | {"labels", "validation_labels", "test_labels", "pretrained", "initial_weights"}


class DifferentProcessesError(UserError):
    """The processes of a run were given different settings or data."""

    agreed = True


def refuse_differing_processes(settings: Mapping[str, object], class_names: Sequence[str], pictures: Record) -> None:
    """Raise DifferentProcessesError in every process unless all have the same; each of them has to ask.

    `settings` by name, the system's own among them; those that `MAY_DIFFER` are left aside.
    """
    counts = tuple(map(len, pictures))
    digest = hashlib.sha256(repr((list(class_names), pictures)).encode(errors="surrogatepass")).hexdigest()
    asked = {name: value for name, value in settings.items() if name not in MAY_DIFFER}
    asked["initial_weights"] = None if settings.get("initial_weights") is None else "a file"
    (first, first_counts, first_digest), *others = gather((asked, counts, digest))
    for number, (theirs, their_counts, their_digest) in enumerate(others, start=1):
        names = sorted(name for name in first.keys() | theirs.keys() if first.get(name) != theirs.get(name))
        names = ["model"] if "model" in names else names  # whose own settings differ, too
        if names:
            values = (f"{name} is {shown(theirs.get(name))}, not {shown(first.get(name))}" for name in names)
            raise DifferentProcessesError(
                f"process {number} was started with other settings than process 0 ({', '.join(values)}): "
                "start all processes of a run with the same"
            )
        if their_digest != first_digest:
            raise DifferentProcessesError(
                f"process {number} sees other classes or pictures than process 0 ({_counted(their_counts)}; "
                f"in process 0 {_counted(first_counts)}): data_root has to hold the same for all processes of a run"
            )


def _counted(counts: tuple[int, int, int]) -> str:
    return "{} pictures to train on, {} to choose the best epoch by, {} to test".format(*counts)
