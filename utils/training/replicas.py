"""Several GPUs of one machine, each with a share of every batch: `nn.DataParallel` as the systems need it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn


class Replicas(nn.DataParallel):
    """`nn.DataParallel` that computes in the precision of its caller, in as many replicas as a batch has shares.

    By itself it starts replicas in threads, where CUDA's autocast is float16 whatever it is for the caller, and it
    calls one without images where a batch, such as nine images on four GPUs, is cut into fewer shares than GPUs.
    """

    def scatter(
        self, inputs: tuple[Any, ...], kwargs: dict[str, Any] | None, device_ids: Sequence[Any]
    ) -> tuple[Sequence[tuple[Any, ...]], Sequence[dict[str, Any]]]:
        shares, options = super().scatter(inputs, kwargs, device_ids)
        count = sum(len(share) > 0 for share in shares)  # the rest was filled up, for options that all replicas get
        return shares[:count], options[:count]

    def parallel_apply(self, replicas: Sequence[Callable[..., Any]], inputs: Sequence[Any], kwargs: Any) -> list[Any]:
        kind = self.src_device_obj.type
        dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)  # of this thread

        def as_here(replica: Callable[..., Any], *images: Any, **options: Any) -> Any:
            with torch.autocast(kind, dtype=dtype, enabled=enabled):
                return replica(*images, **options)

        return super().parallel_apply([partial(as_here, replica) for replica in replicas], inputs, kwargs)
