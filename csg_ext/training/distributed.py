"""The gate across processes."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def average_gradient(gradient: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Averages a gradient over all ranks of `group` (by default all there are), in place, and returns it.

    For a gate that fully_shard leaves out (ignored_params={model.gate}), as the projection needs whole columns on every
    rank; DistributedDataParallel does it by itself. Every rank gets the same bits, and so the same gate.
    """
    dist.all_reduce(gradient, group=group)
    return gradient.div_(dist.get_world_size(group))
