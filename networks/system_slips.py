"""Slips in a system's file that Python does not find: each is one sentence, before a run begins."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Collection
from pathlib import Path

from networks.system import NoOptions, System
from utils.config_slips import nearest
from utils.options import SettingsError, hints


def refuse_slips(system: type[System], shared: Collection[str]) -> None:
    """Raise SettingsError for what a system leaves out, misspells, or calls as it must not be called.

    `shared`: the names of all shared settings.
    """
    place = f"{Path(inspect.getfile(system)).name}: {system.__name__}"
    own = getattr(sys.modules[system.__module__], "Options", None)
    if system.Options is NoOptions and own is not None:
        raise SettingsError(f"{place} has no Options, and the file a class of that name: write Options = Options in it")
    if not dataclasses.is_dataclass(system.Options):
        raise SettingsError(f"{place} has Options that are no dataclass: write @dataclass(frozen=True) above them")
    for name in hints(system.Options):
        if name in shared:
            raise SettingsError(f"{place} has {name} in its Options, which is a shared setting: give it another name")
    for name in system.run_defaults:
        if name not in shared:
            raise SettingsError(
                f"{place} has {name} in its run_defaults, which is no shared setting{nearest(name, shared)}"
            )
    for name in ("branches", "evaluated", "prediction"):
        if not hasattr(system, name):
            raise SettingsError(f"{place} has no {name}: see networks/system.py")
        if isinstance(getattr(system, name), str):
            raise SettingsError(f"{place} has a text as its {name}; expected a tuple: ({getattr(system, name)!r},)")
    for name, of in (("evaluated", "branches"), ("prediction", "evaluated"), ("warmup_branches", "branches")):
        for branch in getattr(system, name):
            if branch not in getattr(system, of):
                choices = ", ".join(getattr(system, of)) + (", or ()" if name == "warmup_branches" else "")
                raise SettingsError(f"{place} has {branch!r} in {name}; expected some of its {of}, {choices}")
