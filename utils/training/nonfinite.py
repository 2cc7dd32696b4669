"""Losses and weights that are no longer finite: found before they do harm, named, and skipped where that is allowed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from utils.errors import UserError
from utils.training.distributed import any_process, gather, is_main

STEPS_BETWEEN_READINGS = 10  # on a GPU, reading the running loss makes the host wait for the device
WHAT_TO_DO = "the last checkpoint is unharmed; try a lower learning_rate or set clip_gradient_norm"


class NonFiniteLossError(UserError):
    """The loss became NaN or infinite: `terms` names which, `paths` are the images of the step's batch.

    `step` is 0 where it showed in the evaluation that follows the last step.
    """

    exit_code = 1
    agreed = True

    def __init__(self, message: str, *, step: int = 0, terms: Sequence[str] = (), paths: Sequence[str] = ()):
        super().__init__(message)
        self.step, self.terms, self.paths = step, list(terms), list(paths)


def steps_between_readings(device: torch.device) -> int:
    return 1 if device.type == "cpu" else STEPS_BETWEEN_READINGS


class StepLosses(NamedTuple):
    """The losses of one step, not read from the device yet, and what they were computed from."""

    step: int
    names: list[str]
    values: Tensor  # [terms]
    paths: list[str]

    @classmethod
    def of(cls, step: int, losses: dict[str, Tensor], paths: list[str]) -> StepLosses:
        return cls(step, list(losses), torch.stack(list(losses.values())).detach(), paths)


class SkipBudget:
    """How many steps without a finite loss may be left out in a run, and how many have been."""

    def __init__(self, allowed: int, used: int = 0) -> None:
        self.allowed, self.used = allowed, used


def check_losses(unread: Sequence[StepLosses], budget: SkipBudget | None) -> bool:
    """Wait for the losses. True where the last step is not finite and may be skipped; else such a step is an error.

    Several processes agree: where one has such a step all skip it, or raise the same error.
    """
    if not unread:
        return False
    read = iter(torch.cat([losses.values for losses in unread]).tolist())
    broken = [(losses.step, [name for name in losses.names if not math.isfinite(next(read))]) for losses in unread]
    step, terms = next(((step, terms) for step, terms in broken if terms), (unread[-1].step, []))
    if not any_process(bool(terms), unread[-1].values.device):
        return False
    paths = next(losses.paths for losses in unread if losses.step == step)
    found = [(s, t, p) for s, t, p in gather((step, terms, paths)) if t]
    first = min(step for step, _, _ in found)
    terms = list(dict.fromkeys(term for step, names, _ in found if step == first for term in names))
    if budget is not None and budget.used < budget.allowed:
        budget.used += 1
        if is_main():
            tqdm.write(f"step {first} is left out: its loss is not finite ({', '.join(terms)})")
        return True
    raise NonFiniteLossError(
        f"the loss is no longer finite in step {first} ({', '.join(terms)}): {WHAT_TO_DO}",
        step=first,
        terms=terms,
        paths=[path for step, _, paths in found if step == first for path in paths],
    )


def check_finite(averages: dict[str, float]) -> None:
    """Raise NonFiniteLossError where an epoch's average loss is not finite."""
    broken = [name for name, value in averages.items() if name.startswith("loss/") and not math.isfinite(value)]
    if broken:
        raise NonFiniteLossError(
            f"the loss is no longer finite ({', '.join(broken)}): {WHAT_TO_DO}",
            terms=broken,
        )


@torch.no_grad()
def check_weights(network: nn.Module, step: int) -> None:
    """Raise NonFiniteLossError where a weight or a batch-norm statistic is not finite, in any process.

    Waits for the device.
    """
    values = [v for v in (*network.parameters(), *network.buffers()) if v.is_floating_point()]
    finite = torch.stack([v.isfinite().all() for v in values]).all()
    if any_process(not finite, values[0].device):
        raise NonFiniteLossError(
            f"weights are no longer finite after step {step}: {WHAT_TO_DO}", step=step, terms=["weights"]
        )
