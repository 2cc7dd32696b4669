"""One process, or several started by `torchrun`: the rest of the code asks here and works the same in both cases."""

from __future__ import annotations

import contextlib
import os

import torch
import torch.distributed
from torch import Tensor, nn

from utils.errors import UserError
from utils.files import show
from utils.training.replicas import Replicas


def is_distributed() -> bool:
    """True after `setup_distributed` has joined several processes."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def rank() -> int:
    """This process's number, 0 when it is alone."""
    return torch.distributed.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Number of processes, 1 when this one is alone."""
    return torch.distributed.get_world_size() if is_distributed() else 1


def is_main() -> bool:
    """True in the one process that prints and writes files."""
    return rank() == 0


def bar_disabled() -> bool | None:
    """What tqdm is to take as `disable`: one process shows a bar, on a terminal only, not in a log file (None)."""
    return None if is_main() else True


def print_once(text: str) -> None:
    """Print, once for all processes."""
    if is_main():
        show(text)


def print_note(note: str | None) -> None:
    """Print what a user should know, once for all processes; None: there is nothing to say."""
    if note is not None:
        print_once(f"note: {note}")


def choose_device(name: str) -> torch.device:
    """Turn the setting into a device; "auto" is the CUDA GPU where there is one. Raises UserError for an absent one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device is {name!r} and {torch.cuda.device_count()} GPUs are visible: set device to cpu or auto"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device is 'mps' and PyTorch finds no Metal GPU here: set device to cpu or auto")
    if device.type == "mps" and not torch.amp.is_autocast_available("mps"):
        raise UserError(
            f"device is 'mps', for which PyTorch {torch.__version__} lacks too much: use 2.5 or newer, or the cpu"
        )
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # nothing shall be put on the first one beside it
    return device


def setup_distributed(name: str = "auto") -> torch.device:
    """Join the other processes if `torchrun` started this one, and return the device this process computes on.

    Args:
        name: see `choose_device`. Under torchrun a CUDA device becomes the GPU numbered LOCAL_RANK.

    Raises:
        UserError: no such GPU, one of Metal under torchrun, or torchrun started more processes on this machine than it
            has GPUs.
    """
    device = choose_device(name)
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return device
    if device.type == "mps":
        raise UserError("device is 'mps', on which one process trains: leave torchrun out, or set device to cpu")
    if device.type != "cuda":
        torch.distributed.init_process_group("gloo")
        return device
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"process {local_rank} of this machine has no GPU of its own: {torch.cuda.device_count()} visible; "
            "start torchrun with --nproc_per_node no larger than that"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl", device_id=device)
    return device


def cleanup() -> None:
    """Leave the process group; nothing to do for a lone process."""
    if is_distributed():
        torch.distributed.destroy_process_group()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place, and return it. NCCL wants it on the GPU."""
    if is_distributed():
        torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.SUM)
    return tensor


def any_process(flag: bool, device: torch.device) -> bool:
    """True where the flag is set in any process; all of them have to ask. Waits for the device if there are several."""
    if not is_distributed():
        return flag
    return all_reduce_sum(torch.tensor(int(flag), device=device)).item() > 0


def gather(value: object) -> list[object]:
    """The values of all processes, by rank; all of them have to give one, of plain types."""
    if not is_distributed():
        return [value]
    values: list[object] = [None] * world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def wrap_network(
    network: nn.Module, device: torch.device, *, data_parallel: bool, sync_batch_norm: bool = False
) -> nn.Module:
    """Spread a network, already on `device`, over processes or GPUs.

    Under torchrun: DistributedDataParallel. Alone with `data_parallel`, a CUDA device without a number ("cuda", not
    "cuda:1", which asks for that one) and several GPUs visible: `Replicas` on all of them. Otherwise: the network.

    sync_batch_norm: under torchrun, batch norm takes its statistics from the images of all processes. Raises UserError
    on a CPU, where PyTorch cannot.
    """
    if is_distributed():
        if sync_batch_norm:
            if device.type != "cuda":
                raise UserError(f"sync_batch_norm is True and the device is {device}: it needs GPUs, set it to False")
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        device_ids = [device.index] if device.type == "cuda" else None
        # a schedule can switch branches off, and their parameters then get no gradient
        return nn.parallel.DistributedDataParallel(network, device_ids=device_ids, find_unused_parameters=True)
    if data_parallel and device.type == "cuda" and device.index is None and torch.cuda.device_count() > 1:
        return Replicas(network)
    return network


def unwrap(network: nn.Module) -> nn.Module:
    """The network inside a DataParallel or DistributedDataParallel, for its own attributes and its state dict."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    return network.module if isinstance(network, wrappers) else network


def without_synchronisation(network: nn.Module) -> nn.Module:
    """The network itself where several processes share it, for a forward pass that may differ among them."""
    return network.module if isinstance(network, nn.parallel.DistributedDataParallel) else network


def gradients_shared(network: nn.Module, shared: bool) -> contextlib.AbstractContextManager:
    """Return the context of a forward and backward pass, whose gradients processes share; `shared` False: not yet."""
    apart = not shared and isinstance(network, nn.parallel.DistributedDataParallel)
    return network.no_sync() if apart else contextlib.nullcontext()


def evaluation_network(network: nn.Module) -> nn.Module:
    """What to evaluate with: processes may have different numbers of batches, so none may wait for the others.

    DistributedDataParallel's forward would, to share rank 0's batch-norm statistics: they are shared here, once, and
    its inner network is returned. Anything else is returned as it is.
    """
    inner = without_synchronisation(network)
    if inner is not network:
        share_buffers(inner)
    return inner


def share_buffers(network: nn.Module) -> None:
    """Give all processes the buffers of the first one; nothing to do for a lone process."""
    if is_distributed():
        for buffer in network.buffers():
            torch.distributed.broadcast(buffer, src=0)


@torch.no_grad()
def share_weights(network: nn.Module) -> None:
    """Give all processes the parameters and buffers of the first one, as DistributedDataParallel begins with them."""
    if is_distributed():
        for parameter in network.parameters():
            torch.distributed.broadcast(parameter, src=0)
    share_buffers(network)
