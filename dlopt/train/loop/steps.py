"""The training loop. It knows no Ray and no callbacks: it takes two functions and yields what happened."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dlopt.data.feed.batches import Batch
from dlopt.models import noise
from dlopt.optim.constraints import Clip, NormOf, total_norm
from dlopt.optim.wrappers import centralize
from dlopt.train.loop.gradients import Gradient
from dlopt.train.loop.objectives import Losses, Objective
from dlopt.train.loop.precision import LossScale

PEAK = "peak"
"""The key of a parameter group's peak rate, which the factor of the schedule is multiplied with."""


class Step(NamedTuple):
    """One step, as this worker saw it. Losses are tensors, so that only who looks waits for the device."""

    loss: Tensor
    """This worker's part of the loss."""
    correct: Tensor | None
    factor: float
    """On the peak rate."""
    norm: Tensor
    """Of the whole batch's gradient, before clipping; the same on every worker, but for replicas that go their own ways."""
    taken: bool
    """Whether there was a step: not when the gradient is known not to be finite, on all workers alike, since the reduced norm decides."""
    overflowed: bool = False
    """Whether there was none since the scale of the loss was too large, which is smaller now."""


def steps(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Batch],
    objective: Objective,
    gradient: Gradient,
    factor: Callable[[int], float],
    clip: Clip | None = None,
    centralized: bool = False,
    scale: LossScale | None = None,
    norm_of: NormOf = total_norm,
    seed: int = 0,
    before: int = 0,
    sure: bool = True,
) -> Iterator[Step]:
    """Train on every batch, yielding each step.

    factor(i): of the schedule for the i-th batch, from 0; a group's rate is its peak times that. clip: what becomes of large gradients.
    centralized: whether the mean of each unit's gradient is taken out. A step whose gradient is not finite is left out. scale: of the
    loss, which takes note of each step. norm_of: gives norms of whole tensors, of which a worker may have rows. What layers draw in the
    i-th step is a function of the seed and of `before` + i. sure: whether it waits for the device to know each norm; else every step is
    taken, and who reads the norms later has to go back where one was not finite.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.train()
    for index, batch in enumerate(batches):
        now = factor(index)
        for group in optimizer.param_groups:
            group["lr"] = now * group[PEAK]
        _forget(parameters)
        with noise.step(seed, before + index):
            losses = gradient(objective, model, batch)
            norm = norm_of([parameter.grad for parameter in parameters if parameter.grad is not None])
            taken = not sure or math.isfinite(norm.item())
            if taken:
                if centralized:
                    centralize(parameters)
                if clip is not None:
                    clip.apply(parameters, norm, norm_of)
                _take(optimizer, parameters, losses, lambda batch=batch: gradient(objective, model, batch))  # type: ignore[misc]
        overflowed = scale is not None and scale.note(taken)
        yield Step(losses.loss.detach(), losses.correct, now, norm, taken, overflowed)


def peaked(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer, with the rate of each of its groups remembered as the peak."""
    for group in optimizer.param_groups:
        group[PEAK] = group["lr"]
    return optimizer


def _take(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], losses: Losses, again: Callable[[], Losses]) -> None:
    """A step from the gradients that are there. L-BFGS asks for the loss, and for more gradients on its way."""
    if not isinstance(optimizer, torch.optim.LBFGS):
        optimizer.step()
        return
    known: list[Losses] = [losses]

    def closure() -> Tensor:
        if not known:
            _forget(parameters)
        return _global(known.pop() if known else again())

    optimizer.step(closure)


def _global(losses: Losses) -> Tensor:
    """The loss of the whole batch, over all workers."""
    loss = losses.loss.detach().clone()
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        torch.distributed.all_reduce(loss)
    return loss


def _forget(parameters: Iterable[nn.Parameter]) -> None:
    """What optimizer.zero_grad does, without its bookkeeping."""
    for parameter in parameters:
        parameter.grad = None
