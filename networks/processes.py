"""Whether several processes train a network together."""

from __future__ import annotations

import torch


def several_processes() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
