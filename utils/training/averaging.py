"""The setting `ema_decay`: a moving average of a network's weights, kept beside those that learn."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, compress

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from networks.system import ENSEMBLE_WEIGHTS, System
from utils.checkpoint import CheckpointError
from utils.training.distributed import share_buffers
from utils.training.replicas import Replicas


class Average(AveragedModel):
    """The exponential moving average of a system, to be updated with it after every optimizer step.

    Batch-norm statistics are averaged as the weights are; counters and indices are the system's. How much each branch
    weighs in the prediction (`ensembling` learned) is learnt for the average itself. After n updates the average decays
    by (1 + n) / (10 + n) as long as that is less than `decay`, as TensorFlow's ExponentialMovingAverage does with
    `num_updates`: a run that is short beside 1 / (1 - decay) steps does not keep the weights it began with.
    """

    def __init__(self, system: System, decay: float) -> None:
        super().__init__(system, use_buffers=True)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Move the average towards the weights. The method of torch would make the host wait for a GPU."""
        updates = int(self.n_averaged)  # it is on the CPU
        averages, current = list(_tensors(self.module)), list(_tensors(model))
        moving = [updates > 0 and average.is_floating_point() for average in averages]
        if any(moving):
            move = get_ema_multi_avg_fn(min(self.decay, (1 + updates) / (10 + updates)))
            move(list(compress(averages, moving)), list(compress(current, moving)), None)
        for average, value, is_moving in zip(averages, current, moving, strict=True):
            if not is_moving:
                average.copy_(value)
        self.n_averaged += 1


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """Return a module's parameters and buffers, without the weights of its branches."""
    return chain(module.parameters(), (b for name, b in module.named_buffers() if name != ENSEMBLE_WEIGHTS))


def build_averaged_network(average: AveragedModel, beside: nn.Module) -> nn.Module:
    """Return the averaged network, spread over GPUs as the one `beside` it; call it in every process."""
    share_buffers(average.module)
    return Replicas(average.module) if isinstance(beside, nn.DataParallel) else average.module


def weights_of(saved: dict, wanted: str | None, path: object) -> tuple[dict[str, Tensor], str | None]:
    """Return the weights in a run's checkpoint, and what they are: "ema", "plain", or None where there is no average.

    `wanted` "ema" or "plain"; None: the average where there is one, which has chosen the best epoch. Raises
    CheckpointError where it was asked for and is not there.
    """
    average = saved.get("ema")
    if average is None and wanted == "ema":
        raise CheckpointError(f"{path} has no averaged weights, as its run had ema_decay 0: leave --weights ema out")
    if average is None:
        return saved["network"], None
    if wanted == "plain":
        return saved["network"], "plain"
    return {n.removeprefix("module."): v for n, v in average.items() if n != "n_averaged"}, "ema"
