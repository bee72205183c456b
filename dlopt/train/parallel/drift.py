"""Workers that no longer hold the same numbers are stopped, and not taken for a result."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor


def refuse_drift(alike: Mapping[str, Tensor]) -> None:
    """Workers must hold the same bits: of each tensor a 64-bit sum, which changes with any bit and with the place of any value. Raises
    RuntimeError."""
    sums = list[Tensor]()
    for values in filter(Tensor.is_floating_point, alike.values()):
        words = values.contiguous().view(-1).view(torch.int32).to(torch.int64)
        sums.append((words * torch.arange(1, 2 * len(words), 2, device=words.device)).sum())
    if not sums:
        return
    lowest, highest = torch.stack(sums), torch.stack(sums)
    dist.all_reduce(lowest, dist.ReduceOp.MIN)
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    if not torch.equal(lowest, highest):
        raise RuntimeError("the workers' parameters are no longer identical")
