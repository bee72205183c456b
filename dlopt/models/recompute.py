"""Less memory for more time: blocks of a network whose activations are not kept for the way back but computed again (Chen et al. 2016)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dlopt.models import noise
from dlopt.models.depth import Residual
from dlopt.models.encoder import Chain
from dlopt.models.transformer import Block


def recompute(network: nn.Module) -> int:
    """Let the blocks of a network compute their activations again on the way back, and say how many there are; 0 changes nothing.

    Names, weights, random numbers and results stay what they are, to the bit. All workers must do so, or none: what a batch norm asks
    of the others is asked again.
    """
    chosen = list(blocks(network))
    for block in chosen:
        block.forward = partial(_recomputed, block, block.forward)
    return len(chosen)


def blocks(network: nn.Module) -> Iterator[nn.Module]:
    """What is computed again as one: blocks of transformers, residual layers with what follows them, other layers of a chain that have
    layers inside; where a user's own network has none of these, the layers it is made of."""
    body = getattr(network, "body", network)
    yield from list(_blocks(body)) or _children(body)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    begins = type(module) is nn.Sequential and isinstance(next(module.children(), None), Residual)
    if isinstance(module, Block | Residual) or begins:
        yield module
        return
    for child in module.children():
        inner = list(_blocks(child))
        yield from inner
        if not inner and isinstance(module, Chain) and any(child.children()) and any(True for _ in child.parameters()):
            yield child


def _children(module: nn.Module) -> Iterator[nn.Module]:
    """Direct ones that have weights; of a list or a dictionary of layers, those in it."""
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _children(child)
        elif any(True for _ in child.parameters()):
            yield child


def _recomputed(block: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    contexts = lambda: (nullcontext(), _Again(block, dict(noise.now.calls)))  # noqa: E731  # around each of the two computations
    return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)


class _Again:
    """Layers draw what they have drawn before, and buffers are afterwards as they were; may be entered again, as for second derivatives.
    calls: of layers that draw, before."""

    def __init__(self, block: nn.Module, calls: dict[int, int]) -> None:
        self.block, self.calls, self.before = block, calls, list[Tensor]()

    def __enter__(self) -> None:
        noise.now.calls = dict(self.calls)
        self.before = [buffer.clone() for buffer in self.block.buffers()]

    def __exit__(self, *_: object) -> None:
        for buffer, value in zip(self.block.buffers(), self.before, strict=True):
            buffer.data.copy_(value)  # not as a change of what the way back needs
