"""Tracing in one graph, as `torch.compile` needs it, whatever other tests have traced before."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

Traced = TypeVar("Traced", bound=Callable)


def traced(function: Traced) -> Traced:
    """Return a function or module that is traced when called, and fails where its graph would break.

    What was traced before in this process is forgotten: a function is traced anew for each kind of input only so many
    times, and which tests share a process is chance.
    """
    torch.compiler.reset()
    return torch.compile(function, backend="eager", fullgraph=True)
