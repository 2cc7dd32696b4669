"""All randomness of a run, derived from a few integers.

Nothing random is stored in a checkpoint: before every step the generators are seeded again from
(seed, epoch, step, rank), so a run that was interrupted draws what the uninterrupted one would have drawn.
"""

from __future__ import annotations

import hashlib
import random

import numpy
import torch


def mix(*numbers: int) -> int:
    """Hash integers of any size and sign into one in 0 .. 2**63 - 1, the same on every machine.

    Neighbouring inputs give unrelated results, unlike `seed + epoch`, where epoch 1 of seed 0 equals epoch 0 of seed 1.
    63 bits, so that the result also fits an int64 tensor.
    """
    text = ",".join(str(int(number)) for number in numbers)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_everything(seed: int, epoch: int = 0, step: int = 0, rank: int = 0) -> int:
    """Seed PyTorch (every device), NumPy and Python's `random` from four numbers, and return the mixed seed.

    Called before every step, it makes the step's dropout a function of these numbers alone, so resuming needs no stored
    generator state. Ranks differ, so that each process drops other units.
    """
    mixed = mix(seed, epoch, step, rank)
    torch.manual_seed(mixed)
    numpy.random.seed(mixed % 2**32)  # NumPy's global generator takes 32 bits
    random.seed(mixed)
    return mixed
