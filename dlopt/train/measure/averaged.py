"""The weights that are measured and kept, where they are not those that training stands at: averages, and what belongs to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from dlopt.models.norms import BatchNorm
from dlopt.optim.averages import reestimate
from dlopt.train.checkpoint.state import TrainingState


@contextmanager
def averaged(
    state: TrainingState, network: nn.Module, batches: Callable[[], Iterator[Any]], computing: AbstractContextManager[Any]
) -> Iterator[None]:
    """Within it, the network has the weights that are measured and kept.

    batches: inputs, of which batch normalization has its statistics for averaged weights; computing: within it, they are computed as in
    training.
    """
    average, optimizer, changed = state.average, state.optimizer, False
    with ExitStack() as stack:
        if hasattr(optimizer, "eval"):  # of schedule-free optimizers, whose weights in training are not those of their result
            optimizer.eval()
            stack.callback(optimizer.train)  # type: ignore[attr-defined]
            changed = True
        if average and average.started:
            stack.enter_context(average.swapped())
            changed = True
        stack.enter_context(state.parallel.measuring())
        if changed and any(isinstance(layer, BatchNorm) for layer in network.modules()):
            stack.enter_context(_buffers_back(network))
            with computing:
                reestimate(network, batches())
        yield


@contextmanager
def _buffers_back(network: nn.Module) -> Iterator[None]:
    """Buffers are afterwards as they were before."""
    before = {name: value.clone() for name, value in network.named_buffers()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in network.named_buffers():
                value.copy_(before[name])
