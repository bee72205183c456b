"""The training loop. It knows no Ray and no callbacks: it takes two functions and yields what happened."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dlopt.data.feed import Batch
from dlopt.part import DloptError
from dlopt.train.objectives import Gradient, Objective

MOST_SKIPPED = 20
"""Steps in a row with a gradient that is not finite before training gives up; a whole epoch of fewer is enough."""


class Step(NamedTuple):
    """One step, as this worker saw it. Losses are tensors, so that only who looks waits for the device."""

    loss: Tensor
    """This worker's part of the loss."""
    correct: Tensor | None
    rate: float
    gradient_norm: float
    """Of the whole batch's gradient, before clipping; the same on every worker."""


def steps(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Batch],
    objective: Objective,
    gradient: Gradient,
    rate: Callable[[int], float],
    clip_norm: float | None = None,
) -> Iterator[Step]:
    """Train on every batch, yielding each step. rate(i): learning rate of the i-th batch, from 0.

    A step whose gradient is not finite is skipped, on all workers alike, since the reduced norm decides.
    Raises DloptError when that happens too often in a row, or in every step.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.train()
    done = skipped = 0
    for done, batch in enumerate(batches, start=1):
        now = rate(done - 1)
        for group in optimizer.param_groups:
            group["lr"] = now
        for parameter in parameters:
            parameter.grad = None  # what optimizer.zero_grad does, without its bookkeeping
        losses = gradient(objective, model, batch)
        norm = _total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        if clip_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
        found = norm.item()
        if math.isfinite(found):
            optimizer.step()
            skipped = 0
        else:
            skipped += 1
            _refuse_divergence(skipped, MOST_SKIPPED)
        yield Step(losses.loss.detach(), losses.correct, now, found)
    if done:
        _refuse_divergence(skipped, done)


def _total_norm(gradients: list[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, as torch.nn.utils.get_total_norm for those of one device, in two thirds of its time."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))


def _refuse_divergence(skipped: int, most: int) -> None:
    if skipped >= most:
        raise DloptError(
            f"train: the gradient was not finite for {skipped} steps in a row: lower train.optimizer.lr or set train.clip_norm"
        )
