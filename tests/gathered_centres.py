"""Move centres in each of two processes by half of a batch, and compare them with those that one moves by all of it.

Run by tests/systems/test_cal.py, see tests/launching.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from networks.centres import Centres
from utils.training.distributed import cleanup, rank, setup_distributed

features = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
labels = torch.tensor([2, 0, 2, 1, 2, 0])
alone = Centres(4, 8)
alone.move(features, labels)
setup_distributed("cpu")
together = Centres(4, 8)
together.move(features[rank() :: 2], labels[rank() :: 2])
torch.testing.assert_close(together.vectors, alone.vectors)
assert together.vectors.any()
cleanup()
