"""New runs that start from the weights of another one: of other classes, or of another system."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from networks.system import ENSEMBLE_WEIGHTS, System
from utils.checkpoint import CheckpointError, load_run
from utils.older_runs import UnknownSettingsError
from utils.training.averaging import weights_of
from utils.training.building import build_from_settings

TRUNK = "backbone."  # how the names of a trunk's parameters begin
FROZEN_TRUNK = "colocalization.trunk."  # of the trunk that finds the objects and does not learn
COUNTERS = ("num_batches_tracked", "passes")  # of batch norms, which not all kinds of these have
OF_TRUNK = ("backbone", "stride_on_first_conv")  # settings by which a weight means something else
OF_IMAGES = ("normalization", "last_stride")  # by which the trunk sees or gives something else: a word is enough


def start_from(settings: Any, system: System, class_names: Sequence[str], restored: Callable[[Mapping], Any]) -> str:
    """Load, in place, what fits of the network of `initial_weights`; return in one line what does and what does not.

    A tensor fits by its name and shape; where the classes are others, those that belong to classes (whose shape follows
    from their number) are left as they are. Statistics that are kept per pass start from
    those that are shared, and the other way round. Raises CheckpointError where the file is no checkpoint of a run, its
    trunk is another one, nothing fits, or what objects are found by is not in it.
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
    of_classes = set() if same_classes else _of_classes(settings, expected, len(class_names))
    for name, value in expected.items():
        found = _as_kept(state.get(name), value, name)
        fits = found is not None and found.shape == value.shape and name not in of_classes
        if fits and name != ENSEMBLE_WEIGHTS:  # those are of other branches, or of what these were
            fitting[name] = found
    if not any(name.startswith(TRUNK) for name in fitting):
        raise CheckpointError(f"initial_weights {path}: nothing in it fits this network ({settings.model})")
    of_frozen_trunk = {name for name in expected if name.startswith(FROZEN_TRUNK) and not name.endswith(COUNTERS)}
    if system.takes_boxes and not (of_frozen_trunk and of_frozen_trunk <= fitting.keys()):
        such_a_run = "a run with that localization, or " if system.colocalization is not None else ""
        raise CheckpointError(
            f"initial_weights {path} has no frozen trunk that localization {system.options.localization!r} could find "
            f"objects by: give {such_a_run}pretrained weights instead"
        )
    system.load_state_dict(expected | fitting)
    of_theirs = of_classes & state.keys()
    new, unused = (_by_part(names - fitting.keys() - of_theirs) for names in (expected.keys(), state.keys()))
    classes = "the same classes" if same_classes else f"{len(saved['class_names'])} other classes"
    others = [name for name in OF_IMAGES if getattr(theirs, name) != getattr(settings, name)]
    values = (f"{name} was {getattr(theirs, name)!r} and is {getattr(settings, name)!r}" for name in others)
    return "; ".join(
        (
            f"starting from {path} ({theirs.model}, {classes}): {len(fitting)} of {len(expected)} tensors fit",
            f"new: {new or 'none'}",
            *([f"new as they belong to classes: {_by_part(of_theirs)}"] if of_theirs else []),
            f"not used: {unused or 'none'}",
            *values,
        )
    )


def _of_classes(settings: Any, state: Mapping[str, Tensor], num_classes: int) -> set[str]:
    """The names of the tensors of this state whose shape another number of classes changes."""
    fewer = num_classes - 1 if num_classes > 2 else 3
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        other = build_from_settings(settings, fewer, load_weights=False).state_dict()
    return {name for name, value in state.items() if other.get(name, value).shape != value.shape}


def _as_kept(found: Tensor | None, wanted: Tensor, name: str) -> Tensor | None:
    """A batch norm's statistics for each pass from those of all, or those of pictures for all."""
    of_statistics = name.startswith((TRUNK, FROZEN_TRUNK)) and name.endswith(("running_mean", "running_var"))
    if found is None or not of_statistics:
        return found
    if wanted.ndim == found.ndim + 1:
        return found.expand_as(wanted)
    return found[0] if wanted.ndim == found.ndim - 1 else found


def _by_part(names: Iterable[str]) -> str:
    """Names in one line: how many tensors of which part."""
    parts = Counter(".".join(name.split(".")[: 2 if name.startswith(TRUNK) else 1]) for name in sorted(names))
    return ", ".join(f"{part} ({count})" for part, count in parts.items())
