"""Training in fp16: the loss is scaled up, so that small gradients do not vanish among numbers that end at 6e-8.

Micikevicius et al., "Mixed Precision Training", ICLR 2018, section 3.2, by PyTorch's own GradScaler.
"""

from __future__ import annotations

import warnings

from torch.amp import GradScaler

from utils.training.execution import Execution
from utils.training.nonfinite import WHAT_TO_DO, NonFiniteLossError, StepLosses

SMALLEST_SCALE = 2.0**-8  # half of which is reached from PyTorch's 2**16 when 25 steps in a row are left out


def build_loss_scale(execution: Execution) -> GradScaler:
    """Return what scales the loss in fp16 and leaves out steps whose gradient overflows; otherwise it does nothing."""
    if execution.precision != "fp16":
        return GradScaler("cpu", enabled=False)
    warnings.filterwarnings("ignore", "Detected call of .lr_scheduler.step")  # where the first step is left out
    return GradScaler(execution.device.type)


def check_loss_scale(loss_scale: GradScaler, last: StepLosses) -> None:
    """Raise NonFiniteLossError where the gradient overflows at any scale, so that nothing has been learnt lately.

    Waits for the device, in fp16 only. All processes see the same gradient.
    """
    if loss_scale.is_enabled() and loss_scale.get_scale() < SMALLEST_SCALE:
        raise NonFiniteLossError(
            f"the gradient was not finite in many steps before step {last.step}: {WHAT_TO_DO}, or precision float32",
            step=last.step,
            terms=["gradient"],
            paths=last.paths,
        )
