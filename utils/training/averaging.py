"""The setting `ema_decay`: a moving average of a network's weights, kept beside those that learn."""

from __future__ import annotations

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from networks.system import System
from utils.checkpoint import CheckpointError
from utils.training.distributed import share_buffers


def build_average(system: System, decay: float) -> AveragedModel:
    """Return the exponential moving average of a system, to be updated with it after every optimizer step.

    Batch-norm statistics are averaged as the weights are; counters and indices are the system's. After n updates the
    average decays by (1 + n) / (10 + n) as long as that is less than `decay`, as TensorFlow's ExponentialMovingAverage
    does with `num_updates`: a run that is short beside 1 / (1 - decay) steps does not keep the weights it began with.
    """

    def average(averaged: list[Tensor], current: list[Tensor], _: Tensor) -> None:
        updates = int(model.n_averaged)  # which is on the CPU
        if averaged[0].is_floating_point():
            get_ema_multi_avg_fn(min(decay, (1 + updates) / (10 + updates)))(averaged, current, None)
        else:
            for old, new in zip(averaged, current, strict=True):
                old.copy_(new)

    model = AveragedModel(system, multi_avg_fn=average, use_buffers=True)
    return model


def network_of(average: AveragedModel, beside: nn.Module) -> nn.Module:
    """Return the averaged network, spread over GPUs as the one `beside` it; call it in every process."""
    share_buffers(average.module)
    return nn.DataParallel(average.module) if isinstance(beside, nn.DataParallel) else average.module


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
