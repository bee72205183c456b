"""What a step minimises, and how gradients of it come about."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dlopt.data.feed import Batch


class Losses(NamedTuple):
    """This worker's part of a batch's loss: the parts of all workers add up to the loss of the batch."""

    loss: Tensor
    """To be minimised: sum of the rows' losses over the rows of the whole batch, and this worker's part of the penalties."""
    correct: Tensor
    """How many of this worker's rows got the right class."""


Objective = Callable[[nn.Module, Batch], Losses]
Gradient = Callable[[Objective, nn.Module, Batch], Losses]


def supervised(l1: float, l2: float, world: int) -> Objective:
    """Cross-entropy, plus l1 times the sum of |w| and l2 times the sum of w^2 over all weights but biases."""

    def objective(model: nn.Module, batch: Batch) -> Losses:
        logits = model(batch.inputs)
        loss = F.cross_entropy(logits, batch.target, reduction="sum") / batch.total
        if l1 or l2:
            loss = loss + penalty(model, l1, l2) / world
        return Losses(loss, (logits.detach().argmax(dim=1) == batch.target).sum())

    return objective


def penalty(model: nn.Module, l1: float, l2: float) -> Tensor:
    weights = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    total = torch.zeros((), dtype=weights[0].dtype, device=weights[0].device)
    for weight in weights:
        if l1:
            total = total + l1 * weight.abs().sum()
        if l2:
            total = total + l2 * weight.square().sum()
    return total


def plain(world: int) -> Gradient:
    """Back-propagation. DistributedDataParallel averages over workers, so the sum over them needs a factor of `world`."""

    def gradient(objective: Objective, model: nn.Module, batch: Batch) -> Losses:
        losses = objective(model, batch)
        (losses.loss * world if world > 1 else losses.loss).backward()
        return losses

    return gradient
