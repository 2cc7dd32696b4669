"""Train with a second process in trouble: `torchrun troubled_rank.py TROUBLE STEP ARGUMENT ...`.

TROUBLE: `stop` asks it to stop, `kill` kills it, `nan` breaks its loss; in that step, counted over the run; step 0:
never. Run by the tests of several processes, see tests/launching.py.
"""

from __future__ import annotations

import math
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import thin_trunk
import torch

import train
import utils.run
from networks.system import System
from utils.errors import exit_with_one_sentence

trouble, at, *arguments = sys.argv[1:]
losses_of, steps = System.losses, []


def troubled(*positional: object, **options: object) -> dict[str, torch.Tensor]:
    losses = losses_of(*positional, **options)
    if torch.is_grad_enabled():
        steps.append(1)
        if os.environ["RANK"] == "1" and len(steps) == int(at):
            if trouble == "nan":
                losses["raw"] = losses["raw"] * math.nan
            else:
                os.kill(os.getpid(), signal.SIGTERM if trouble == "stop" else signal.SIGKILL)
    return losses


thin_trunk.install()
System.losses = troubled
utils.run.STEPS_BETWEEN_READINGS = 2
with exit_with_one_sentence(training=True):
    train.main(arguments)
