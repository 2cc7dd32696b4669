"""Train with batch norm in evaluation mode: `python frozen_statistics.py ARGUMENT ...`, under torchrun or without.

So an image's gradient does not depend on the others of its batch, and one process can be compared with several.
Run by tests/test_distributed.py, see tests/launching.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train

if __name__ == "__main__":  # and not where a process that loads pictures imports this file
    nn.BatchNorm2d.train = lambda module, mode=True: nn.Module.train(module, False)
    train.main(sys.argv[1:])
