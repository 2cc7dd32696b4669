"""New runs that start from the weights of another one: of other classes, or of another system."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from networks.system import System
from utils.checkpoint import CheckpointError, load_run
from utils.older_runs import UnknownSettingsError
from utils.training.averaging import weights_of

TRUNK = "backbone."  # how the names of a trunk's parameters begin
OF_TRUNK = ("backbone", "stride_on_first_conv")  # settings by which a weight means something else


def start_from(settings: Any, system: System, class_names: Sequence[str], restored: Callable[[Mapping], Any]) -> str:
    """Load, in place, what fits of the network of `initial_weights`; return in one line what does and what does not.

    A tensor fits by its name and shape; where the classes are others, those that could be of classes (outside the
    trunk, with as many rows as there are classes) are left as they are. Statistics that are kept per pass start from
    those that are shared, and the other way round. Raises CheckpointError where the file is no checkpoint of a run, its
    trunk is another one, or nothing fits.
    """
    path = Path(settings.initial_weights).expanduser()
    saved = load_run(path)
    try:
        theirs = restored(saved["settings"])
    except UnknownSettingsError as error:
        raise CheckpointError(f"{path} has {error}") from None
    for name in OF_TRUNK:
        if getattr(theirs, name) != getattr(settings, name):
            raise CheckpointError(
                f"initial_weights {path} has {name} {getattr(theirs, name)!r}, and here it is "
                f"{getattr(settings, name)!r}: its weights would mean something else, so take the same"
            )
    state, _ = weights_of(saved, None, path)
    same_classes = saved["class_names"] == list(class_names)
    fitting, expected = {}, system.state_dict()
    for name, value in expected.items():
        found = _as_kept(state.get(name), value, name)
        of_classes = not name.startswith(TRUNK) and value.ndim > 0 and len(value) == len(class_names)
        if found is not None and found.shape == value.shape and (same_classes or not of_classes):
            fitting[name] = found
    if not any(name.startswith(TRUNK) for name in fitting):
        raise CheckpointError(f"initial_weights {path}: nothing in it fits this network ({settings.model})")
    system.load_state_dict(expected | fitting)
    new, unused = (_by_part(names - fitting.keys()) for names in (expected.keys(), state.keys()))
    classes = "the same classes" if same_classes else f"{len(saved['class_names'])} other classes"
    return (
        f"starting from {path} ({theirs.model}, {classes}): {len(fitting)} of {len(expected)} tensors fit; "
        f"new: {new or 'none'}; not used: {unused or 'none'}"
    )


def _as_kept(found: Tensor | None, wanted: Tensor, name: str) -> Tensor | None:
    """A batch norm's statistics for each pass from those of all, or those of pictures for all."""
    if found is None or not name.startswith(TRUNK) or not name.endswith(("running_mean", "running_var")):
        return found
    if wanted.ndim == found.ndim + 1:
        return found.expand_as(wanted)
    return found[0] if wanted.ndim == found.ndim - 1 else found


def _by_part(names: Iterable[str]) -> str:
    """Names in one line: how many tensors of which part."""
    parts = Counter(".".join(name.split(".")[: 2 if name.startswith(TRUNK) else 1]) for name in sorted(names))
    return ", ".join(f"{part} ({count})" for part, count in parts.items())
