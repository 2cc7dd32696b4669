"""Load weights, optimizer and schedule from a checkpoint, and refuse states of another structure."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Number
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from networks.system import System
from utils.text import first_few


def restore(system: System, optimizer: Optimizer, schedule: LRScheduler, saved: Mapping[str, Any]) -> None:
    """Load the states in a checkpoint. Raises ValueError, or what PyTorch does, for one of another form.

    PyTorch itself takes a schedule of any content, and a momentum of another shape until it is used.
    """
    for name, ours in (("param_groups", optimizer.state_dict()["param_groups"]), ("schedule", schedule.state_dict())):
        theirs = saved["optimizer"][name] if name == "param_groups" else saved[name]
        if (place := _other_form(ours, theirs, name)) is not None:
            raise ValueError(f"{place} is of another form")
    load_weights(system, saved["network"], len(saved["class_names"]))
    optimizer.load_state_dict(saved["optimizer"])
    schedule.load_state_dict(saved["schedule"])
    for parameter, state in optimizer.state.items():
        if not isinstance(parameter, Tensor) or not isinstance(state, dict):
            raise ValueError("the optimizer's state is not by parameters")
        for name, value in state.items():
            if isinstance(value, Tensor) and value.ndim > 0 and value.shape != parameter.shape:
                raise ValueError(f"{name} {tuple(value.shape)} of a parameter {tuple(parameter.shape)}")


def load_weights(network: nn.Module, weights: Mapping[str, Tensor], classes: int) -> None:
    """Load the weights of a checkpoint that names so many classes. Raises ValueError where they do not fit."""
    ours = network.state_dict()
    names = {"missing": ours.keys() - weights.keys(), "left over": weights.keys() - ours.keys()}
    problems = [f"{kind}: {first_few(sorted(found))}" for kind, found in names.items() if found]
    shapes = {n: (tuple(weights[n].shape), tuple(v.shape)) for n, v in ours.items() if n in weights}
    shapes = {name: pair for name, pair in shapes.items() if pair[0] != pair[1]}
    of_trunk = any(name.startswith("backbone.") for name in shapes)
    counts = {_classes_in(theirs, expected, classes) for theirs, expected in shapes.values()}
    if len(counts) == 1 and None not in counts and not of_trunk:
        problems.append(f"it names {classes} classes, and has weights for {counts.pop()}: {first_few(list(shapes))}")
    elif shapes:
        listed = [f"{n} {theirs} instead of {expected}" for n, (theirs, expected) in shapes.items()]
        problems.append(f"of another shape: {first_few(listed)}")
    if problems:
        raise ValueError("; ".join(problems))
    network.load_state_dict(weights)


def _classes_in(theirs: tuple[int, ...], ours: tuple[int, ...], classes: int) -> int | None:
    """The number of classes that a shape is for, where it is ours but for that number; else None."""
    differing = [(a, b) for a, b in zip(theirs, ours, strict=False) if a != b]
    if len(theirs) != len(ours) or len(differing) != 1 or classes < 1:
        return None
    found, expected = differing[0]
    each, rest = divmod(expected, classes)
    return found // each if each and not rest and not found % each else None


def _other_form(ours: object, theirs: object, place: str) -> str | None:
    """Return the first place where what was saved is of another type or length than ours, None where all is alike.

    Names that only one has are passed over, as PyTorch's versions differ in them; so is what is None in one.
    """
    if ours is None or theirs is None:
        return None
    if isinstance(ours, Number) and isinstance(theirs, Number):
        return None
    if type(ours) is not type(theirs):
        return place
    if isinstance(ours, dict):
        if (ours or theirs) and not ours.keys() & theirs.keys():  # a schedule may have no milestones
            return place
        pairs = [(f"{place}/{name}", ours[name], theirs[name]) for name in ours if name in theirs]
    elif isinstance(ours, list | tuple):
        if len(ours) != len(theirs):
            return place
        pairs = [(f"{place}/{index}", a, b) for index, (a, b) in enumerate(zip(ours, theirs, strict=True))]
    else:
        pairs = []
    return next((found for inner, a, b in pairs if (found := _other_form(a, b, inner)) is not None), None)
