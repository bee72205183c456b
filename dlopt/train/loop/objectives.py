"""What a step minimises: the loss of a batch of rows, and penalties of the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from dlopt.data.feed.batches import Batch
from dlopt.models import noise
from dlopt.part import Target
from dlopt.train.loop.losses import Loss


class Losses(NamedTuple):
    """This worker's part of a batch's loss: the parts of all workers add up to the loss of the batch."""

    loss: Tensor
    """To be minimised: sum of the rows' losses over the rows of the whole batch, and this worker's part of the penalties."""
    correct: Tensor | None
    """Of classes: how many of this worker's rows got the right one; of a mixed row, the share of it that did."""


Objective = Callable[[nn.Module, Batch], Losses]
Given = Literal["balanced"] | Mapping[str, float]
"""Class weights as a job has them."""


def supervised(loss: Loss, l1: float, l2: float, world: int) -> Objective:
    """The loss of the rows, plus l1 times the sum of |w| and l2 times the sum of w^2 over all weights but biases: the elastic net of Zou
    and Hastie (2005) with both of them.

    A row that is mixed of two has share * loss(first target) + (1 - share) * loss(second target). Each call of a step draws the same masks.
    """

    def objective(model: nn.Module, batch: Batch) -> Losses:
        noise.part(batch.first, len(batch.target), batch.target.device)
        outputs = model(batch.inputs)
        if outputs.dtype in (torch.bfloat16, torch.float16):
            outputs = outputs.float()  # be it that layers compute with less
        if batch.mixed:
            share = batch.mixed.share.to(outputs.dtype)
            both = (loss(outputs, target, "none") for target in (batch.target, batch.mixed.target))
            total = (share * next(both) + (1 - share) * next(both)).sum()
        else:
            total = loss(outputs, batch.target, "sum")
        mean = total / batch.total
        if l1 or l2:
            mean = mean + penalty(model, l1, l2) * batch.part / world
        return Losses(mean, _correct(outputs.detach(), batch))

    return objective


def _correct(outputs: Tensor, batch: Batch) -> Tensor | None:
    """Only classes are one number a row."""
    if batch.target.dim() > 1:
        return None
    predicted = outputs.argmax(dim=1)
    right = predicted == batch.target
    if not batch.mixed:
        return right.sum()
    return (batch.mixed.share * right + (1 - batch.mixed.share) * (predicted == batch.mixed.target)).sum()


def class_weights(given: Given, target: Target, rows: Mapping[str, int], total: int, balanced_rows: bool = False) -> Tensor:
    """Weights of a row's loss by its class, float64 (classes,); of labels (2, labels), of those it has not and those it has.

    given: `balanced`, which makes the rows of each class weigh as much in all, or a weight by label, 1 for those left out.
    rows: how many of the `total` training rows have each label, 0 for those left out.
    Weights are divided by their mean over the training rows (over the classes where `balanced_rows` are drawn), a constant: the mean
    loss keeps its size, and as no batch is divided by its own weights, its parts add up however it is shared out.
    """
    counts = torch.tensor([rows.get(str(label), 0) for label in target.labels], dtype=torch.float64)
    if target.kind == "multi_label":
        return _label_weights(given, target, counts, total)
    weights = total / (target.size * counts.clamp_min(1)) if given == "balanced" else _as_said(given, target)
    shares = (counts > 0) / (counts > 0).sum() if balanced_rows else counts / counts.sum()
    return weights / (weights @ shares.double())


def _label_weights(given: Given, target: Target, counts: Tensor, total: int) -> Tensor:
    """A label's weight is that of having it, against 1 for not having it."""
    present = (total - counts).clamp_min(1) / counts.clamp_min(1) if given == "balanced" else _as_said(given, target)
    mean = (counts * present + total - counts) / total
    return torch.stack([1 / mean, present / mean])


def _as_said(given: Mapping[str, float], target: Target) -> Tensor:
    return torch.tensor([given.get(str(label), 1.0) for label in target.labels], dtype=torch.float64)


def penalty(model: nn.Module, l1: float, l2: float) -> Tensor:
    """Of weights, which have more than one dimension: biases and the scales of normalisation layers are left alone."""
    weights = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    total = torch.zeros((), dtype=weights[0].dtype, device=weights[0].device)
    for weight in weights:
        if l1:
            total = total + l1 * weight.abs().sum()
        if l2:
            total = total + l2 * weight.square().sum()
    return total
