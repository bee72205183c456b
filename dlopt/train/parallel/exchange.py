"""What workers send each other in one piece: many tensors at once, or those of all to worker 0."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def broadcast(tensors: Sequence[Tensor], source: int) -> None:
    """From one worker to all, in place."""
    at_once(tensors, lambda flat: dist.broadcast(flat, source))


@torch.no_grad()
def at_once(tensors: Sequence[Tensor], exchange: Callable[[Tensor], Any]) -> None:
    """Exchange them in place, those of a type as one tensor (numbers,)."""
    for dtype in sorted({tensor.dtype for tensor in tensors}, key=str):
        some = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in some])
        exchange(flat)
        parts = flat.split([tensor.numel() for tensor in some])
        torch._foreach_copy_(some, [part.view(tensor.shape) for part, tensor in zip(parts, some, strict=True)])


def collected(tensors: Mapping[str, Tensor], rank: int, world: int, device: torch.device) -> list[dict[str, Tensor]]:
    """On worker 0, the tensors of each worker, on the CPU; on the others, nothing. One after the other crosses over, so that nobody needs
    the memory of all. device: through whose memory."""
    told: list[Any] = [None] * world
    dist.all_gather_object(told, [(name, tuple(value.shape), value.dtype) for name, value in tensors.items()])
    if rank:
        for value in tensors.values():
            if value.numel():
                dist.send(value.detach().to(device).contiguous().reshape(-1).view(torch.uint8), 0)
        return []
    mine = {name: value.detach().cpu() for name, value in tensors.items()}
    return [mine, *({name: _received(shape, dtype, source, device) for name, shape, dtype in told[source]} for source in range(1, world))]


def _received(shape: tuple[int, ...], dtype: torch.dtype, source: int, device: torch.device) -> Tensor:
    received = torch.empty(shape, dtype=dtype, device=device)
    if received.numel():
        dist.recv(received.view(-1).view(torch.uint8), source)
    return received.cpu()
