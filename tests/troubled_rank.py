"""Train with a second process in trouble: `torchrun troubled_rank.py TROUBLE STEP ARGUMENT ...`.

TROUBLE: `stop` asks it to stop, `kill` kills it, `nan` breaks its loss; in that step, counted over the run; step 0:
never. `stop_in_evaluation` asks it to stop in that batch of those that it evaluates. Arguments that begin with `1:` are
the second process's only. Run by the tests of several processes, see tests/launching.py.
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
from networks.system import System
from utils.errors import exit_with_one_sentence

trouble, at, *arguments = sys.argv[1:]
losses_of, steps, evaluated = System.losses, [], []


def troubled(*positional: object, **options: object) -> dict[str, torch.Tensor]:
    losses = losses_of(*positional, **options)
    if torch.is_grad_enabled():
        steps.append(1)
        if os.environ["RANK"] == "1" and len(steps) == int(at):
            if trouble == "nan":
                losses["raw"] = losses["raw"] * math.nan
            elif trouble != "stop_in_evaluation":
                os.kill(os.getpid(), signal.SIGTERM if trouble == "stop" else signal.SIGKILL)
    else:
        evaluated.append(1)
        if trouble == "stop_in_evaluation" and os.environ["RANK"] == "1" and len(evaluated) == int(at):
            os.kill(os.getpid(), signal.SIGTERM)
    return losses


if __name__ == "__main__":  # and not where a process that loads pictures imports this file
    if os.environ["RANK"] == "0":
        arguments = [word for word in arguments if not word.startswith("1:")]
    thin_trunk.install()
    System.losses = troubled
    with exit_with_one_sentence(training=True):
        train.main([word.removeprefix("1:") for word in arguments])
