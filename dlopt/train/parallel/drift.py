"""Workers that no longer hold the same numbers are stopped, and not taken for a result."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor


def refuse_drift(alike: Mapping[str, Tensor]) -> None:
    """Workers must hold the same bits: a sum of each tensor's, compared across workers. Raises RuntimeError."""
    sums = [_sum_of_bits(value) for value in alike.values() if value.is_floating_point()]
    if not sums:
        return
    mine = torch.stack(sums)
    lowest, highest = mine.clone(), mine.clone()
    dist.all_reduce(lowest, dist.ReduceOp.MIN)
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    if not torch.equal(lowest, highest):
        raise RuntimeError("the workers' parameters are no longer identical")


def _sum_of_bits(values: Tensor) -> Tensor:
    """A 64-bit sum that changes with any bit and with the place of any value."""
    words = values.contiguous().view(-1).view(torch.int32).to(torch.int64)
    return (words * torch.arange(1, 2 * len(words), 2, device=words.device)).sum()
