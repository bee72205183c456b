"""The weights that are measured and kept, where they are not those that training stands at: averages, and what belongs to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from torch import nn

from dlopt.models.layers import buffers_kept
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
            stack.enter_context(buffers_kept(network))
            with computing:
                reestimate(network, batches())
        yield
    if changed:
        state.best_of = None  # not of the weights that training goes on with
