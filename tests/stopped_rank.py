"""Train, and ask the second process to stop: `torchrun stopped_rank.py STEP ARGUMENT ...`; step 0: never.

Run as a script by tests/test_faults.py.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
from utils.errors import exit_with_one_sentence

at, *arguments = sys.argv[1:]
seed_everything = train.seed_everything


def seed_and_stop(*numbers: int) -> int:
    if len(numbers) == 4 and os.environ["RANK"] == "1" and numbers[2] == int(at):
        os.kill(os.getpid(), signal.SIGTERM)
    return seed_everything(*numbers)


train.seed_everything = seed_and_stop
train.STEPS_BETWEEN_READINGS = 2
with exit_with_one_sentence():
    train.main(arguments)
