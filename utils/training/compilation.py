"""The setting `compile`."""

from __future__ import annotations

from torch import nn

from utils.errors import UserError
from utils.training.distributed import unwrap


def compile_backbone(network: nn.Module) -> None:
    """Run the network's backbone, nearly all of its work, through torch.compile, in place; weights keep their names.

    The parts after it are small and would be compiled anew for every branch selection. Raises UserError for a
    DataParallel network: its replicas would all run the compiled code of the first device.
    """
    if isinstance(network, nn.DataParallel):
        raise UserError(
            "compile is on and nn.DataParallel uses several GPUs: set compile to false, data_parallel to false, "
            "or start one process per GPU with torchrun"
        )
    import torch._dynamo  # takes long, and few runs compile

    # A graph for each of training and evaluation, pictures and parts, whole and last batches, the finer map, ...
    dynamo = torch._dynamo.config
    limit = "recompile_limit" if hasattr(dynamo, "recompile_limit") else "cache_size_limit"  # torch < 2.6
    setattr(dynamo, limit, max(getattr(dynamo, limit), 32))
    unwrap(network).backbone.compile()
