"""Metrics of a split by the kind of its target, exact however many workers share it out: they are made of sums, which add up, and of
scores, which are gathered. Nothing here is an average of averages.

A metric that the split cannot tell (ROC AUC without a row of the class, R2 of a number that never changes) is None, and so is one
that is not finite. Losses are without class weights, in nats, or for numbers in squares of the training rows' standard deviation.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from dlopt.models import Units
from dlopt.part import Target

Metrics = dict[str, float | None]

METRICS: dict[str, tuple[str, ...]] = {
    "category": ("loss", "accuracy", "macro_f1"),
    "multi_label": ("loss", "accuracy", "subset_accuracy", "micro_f1", "macro_f1", "macro_roc_auc"),
    "number": ("loss", "r2", "mae", "rmse"),
}
"""What there is for each kind of target; the second one is shown while training runs."""
TWO_CLASSES = ("precision", "recall", "f1", "roc_auc", "average_precision")
"""What there is besides for two classes: of the positive one."""
SMALLER_IS_BETTER = ("loss", "mae", "rmse")


def names(kind: str, classes: int | None = None) -> tuple[str, ...]:
    """The metrics of a kind of target. classes: how many there are, where that is known."""
    return METRICS[kind] + (TWO_CLASSES if kind == "category" and classes in (None, 2) else ())


def activated(target: Target, outputs: Tensor) -> Tensor:
    """What the graph gives: probabilities of classes, probabilities of labels, or the numbers themselves, (rows, outputs)."""
    if target.kind == "category":
        return outputs.softmax(dim=1)
    return outputs.sigmoid() if target.kind == "multi_label" else outputs


class Tally(ABC):
    """What tells the metrics, a batch at a time."""

    def __init__(self, target: Target, sums: int, scored: int, device: torch.device) -> None:
        self.target, self.device = target, device
        self.sums = torch.zeros(sums + 1, dtype=torch.float64, device=device)
        """The sum of the rows' losses, then those of the kind; they add up over batches and workers."""
        self.scores = [torch.zeros(0, 2, scored, device=device)]
        """(rows, 2, scored) float32: probabilities, and 1 where they ought to be 1."""

    def add(self, outputs: Tensor, target: Tensor, losses: Tensor) -> None:
        """Outputs float64 (rows, outputs), the targets, and the rows' losses (rows,)."""
        self.sums += torch.cat([losses.sum().reshape(1), *self.counts(outputs, target)])
        if self.scores[0].shape[2]:
            self.scores.append(torch.stack(self.scored(outputs, target), dim=1).float())

    def metrics(self, rows: int) -> Metrics:
        """Of a split of so many rows, once all workers' sums and scores are here. All of one kind have the same names."""
        if not rows:
            raise ValueError("a split without rows has no metrics")
        scores, truths = torch.cat(self.scores).unbind(dim=1)
        found = {"loss": self.sums[0].item() / rows} | self.told(self.sums[1:], scores, truths > 0.5, rows)
        return {name: value if value is not None and math.isfinite(value) else None for name, value in found.items()}

    @abstractmethod
    def counts(self, outputs: Tensor, target: Tensor) -> list[Tensor]:
        """The sums of a batch, each float64 (n,)."""

    def scored(self, outputs: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities (rows, scored) as they are given out, and whether they ought to be 1."""
        raise NotImplementedError

    @abstractmethod
    def told(self, sums: Tensor, scores: Tensor, truths: Tensor, rows: int) -> Metrics:
        """The metrics besides the loss."""


class Classes(Tally):
    """Counts of each class: rows that are given it rightly, that are given it, that have it."""

    def __init__(self, target: Target, device: torch.device) -> None:
        super().__init__(target, 3 * target.size, 1 if target.size == 2 else 0, device)

    def counts(self, outputs: Tensor, target: Tensor) -> list[Tensor]:
        given = outputs.argmax(dim=1)
        return [values.bincount(minlength=self.target.size).double() for values in (target[given == target], given, target)]

    def scored(self, outputs: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        positive = self.target.positive_index
        return activated(self.target, outputs)[:, positive, None], (target == positive)[:, None]

    def told(self, sums: Tensor, scores: Tensor, truths: Tensor, rows: int) -> Metrics:
        right, given, real = sums.reshape(3, -1)
        found: Metrics = {"accuracy": right.sum().item() / rows, "macro_f1": macro_f1(right, given, real)}
        if self.target.size != 2:
            return found
        one = [values[self.target.positive_index].item() for values in (right, given, real)]
        return found | dict(zip(("precision", "recall", "f1"), precision_recall_f1(*one), strict=True)) | _areas(scores, truths)


class Labels(Tally):
    """Counts of each label: rows that are given it rightly, that are given it, that have it; and rows with all labels right."""

    def __init__(self, target: Target, device: torch.device) -> None:
        super().__init__(target, 1 + 3 * target.size, target.size, device)

    def counts(self, outputs: Tensor, target: Tensor) -> list[Tensor]:
        given, real = outputs > 0, target > 0
        whole = (given == real).all(dim=1).sum().reshape(1)
        return [whole.double(), *(values.sum(dim=0).double() for values in (given & real, given, real))]

    def scored(self, outputs: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return activated(self.target, outputs), target

    def told(self, sums: Tensor, scores: Tensor, truths: Tensor, rows: int) -> Metrics:
        right, given, real = sums[1:].reshape(3, -1)
        wrong = (given + real - 2 * right).sum().item()
        areas = [area for label in range(self.target.size) if (area := roc_auc(scores[:, label], truths[:, label])) is not None]
        return {
            "accuracy": 1 - wrong / (rows * self.target.size),
            "subset_accuracy": sums[0].item() / rows,
            "micro_f1": precision_recall_f1(*(values.sum().item() for values in (right, given, real)))[2],
            "macro_f1": macro_f1(right, given, real),
            "macro_roc_auc": sum(areas) / len(areas) if areas else None,
        }


class Numbers(Tally):
    """Sums of each number: absolute and squared errors, and distances from the training rows' mean and their squares."""

    def __init__(self, target: Target, units: Units, device: torch.device) -> None:
        super().__init__(target, 4 * target.size, 0, device)
        self.mean = units.mean.double()

    def counts(self, outputs: Tensor, target: Tensor) -> list[Tensor]:
        error, distance = outputs - target, target - self.mean
        return [values.sum(dim=0) for values in (error.abs(), error.square(), distance, distance.square())]

    def told(self, sums: Tensor, scores: Tensor, truths: Tensor, rows: int) -> Metrics:
        absolute, squared, distance, square = sums.reshape(4, -1)
        around = square - distance.square() / rows
        varies = around > 1e-12 * square  # less is what rounding leaves of a number that never changes
        return {
            "r2": (1 - squared[varies] / around[varies]).mean().item(),
            "mae": (absolute / rows).mean().item(),
            "rmse": (squared / rows).sqrt().mean().item(),
        }


def tally(target: Target, output: torch.nn.Module, device: torch.device) -> Tally:
    """The one for a kind of target. output: the network's output layer."""
    if target.kind == "number":
        assert isinstance(output, Units)
        return Numbers(target, output, device)
    return Classes(target, device) if target.kind == "category" else Labels(target, device)


def precision_recall_f1(right: float, given: float, real: float) -> tuple[float | None, float | None, float | None]:
    """Of one class from its counts; none without a row of the class. A class that is given to no row has a precision of 0."""
    if not real:
        return None, None, None
    return right / max(given, 1), right / real, 2 * right / (given + real)


def macro_f1(right: Tensor, given: Tensor, real: Tensor) -> float | None:
    """Mean F1 of the classes that some row has or is given, as scikit-learn has it."""
    there = given + real > 0
    return (2 * right[there] / (given + real)[there]).mean().item() if there.any() else None


def _areas(scores: Tensor, truths: Tensor) -> Metrics:
    return {"roc_auc": roc_auc(scores[:, 0], truths[:, 0]), "average_precision": average_precision(scores[:, 0], truths[:, 0])}


def roc_auc(scores: Tensor, truths: Tensor) -> float | None:
    """How often a row of the class scores above one that is not, ties counting half: by the ranks of its rows (Mann-Whitney).

    None without rows of both sorts, or where a score is NaN.
    """
    positive = int(truths.sum())
    negative = len(truths) - positive
    if not positive or not negative or scores.isnan().any():
        return None
    _, place, count = scores.unique(return_inverse=True, return_counts=True)
    rank = (count.cumsum(0) - (count - 1) / 2.0).double()
    return (rank[place[truths]].sum().item() - positive * (positive + 1) / 2) / (positive * negative)


def average_precision(scores: Tensor, truths: Tensor) -> float | None:
    """Sum over the thresholds of precision times the recall that each adds; None without a row of the class, or where a score is NaN."""
    positive = int(truths.sum())
    if not positive or scores.isnan().any():
        return None
    _, place, count = scores.unique(return_inverse=True, return_counts=True)
    hits = place[truths].bincount(minlength=len(count)).flip(0).double()
    return (hits * hits.cumsum(0) / count.flip(0).cumsum(0)).sum().item() / positive
