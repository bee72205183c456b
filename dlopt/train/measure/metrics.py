"""Metrics of a split by the kind of its target, exact however many workers share it out: they are made of sums, which add up, and of
scores, which are gathered. Nothing here is an average of averages.

A metric that the split cannot tell (ROC AUC without a row of the class, R2 of a number that never changes) is None, and so is one
that is not finite. Losses are those that are trained, without class weights and label smoothing: for numbers in squares of the training
rows' standard deviation, else in nats.

torchmetrics computes the same (tests/train/measure/test_metrics.py holds each of these against it and against scikit-learn), but is not
imported here: its functional API divides in float32 and so is off by 1e-7, wants all rows at once where counts and sums of shares will do,
counts classes in a matrix of classes x classes, takes 170 ms for the ROC AUC of 10,000 rows of 10 classes, and 1.2 s to be imported.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dlopt.models import Units
from dlopt.part import Target
from dlopt.train.measure.curves import EXACT, Bins, Curve, average_precision, bins_of, curve_of, roc_auc
from dlopt.train.measure.metric import METRICS, MOST_SCORED, TOP, Counts, names

Metrics = dict[str, float | None]

BINS = 15
"""Of the calibration error."""


def activated(target: Target, outputs: Tensor) -> Tensor:
    """What the graph gives: probabilities of classes, probabilities of labels, or the numbers themselves, (rows, outputs)."""
    if target.kind == "category":
        return outputs.softmax(dim=1)
    return outputs.sigmoid() if target.kind == "multi_label" else outputs


def decided(target: Target, probabilities: Tensor) -> Tensor:
    """The class of each row, int64 (rows,), or whether it is given each label, bool (rows, labels), as the server has it: the likelier
    class, and labels of more than one half, or where the target has thresholds, what reaches them (in float32)."""
    if target.kind == "category" and not target.thresholds:
        return probabilities.argmax(dim=1)
    if not target.thresholds:
        return probabilities > 0.5
    least = torch.tensor(target.thresholds, dtype=torch.float32).to(probabilities.device)
    if target.kind == "multi_label":
        return probabilities.float() >= least
    positive = target.positive_index
    return torch.where(probabilities[:, positive].float() >= least, positive, 1 - positive)


class Tally(ABC):
    """What tells the metrics, a batch at a time."""

    def __init__(self, target: Target, sums: int, scored: int, rows: int, device: torch.device) -> None:
        self.target, self.device = target, device
        self.bins = Bins(scored, device) if rows * scored > EXACT else None
        """Where there are too many scores to keep them."""
        self.sums = torch.zeros(sums + 1, dtype=torch.float64, device=device)
        """The sum of the rows' losses, then those of the kind; they add up over batches and workers."""
        self.scores = [torch.zeros(0, 2, scored, device=device)]
        """(rows, 2, scored) float32: probabilities, and 1 where they ought to be 1."""

    def add(self, outputs: Tensor, target: Tensor, losses: Tensor) -> None:
        """Outputs float64 (rows, outputs), the targets, and the rows' losses (rows,)."""
        given = activated(self.target, outputs)
        self.sums += torch.cat([losses.sum().reshape(1), *self.counts(given, target)])
        if self.bins:
            self.bins.add(*self.scored(given, target))
        elif self.scores[0].shape[2]:
            self.scores.append(torch.stack(self.scored(given, target), dim=1).float())

    def metrics(self, rows: int) -> Metrics:
        """Of a split of so many rows, once all workers' sums and scores are here. All of one kind have the same names."""
        if not rows:
            raise ValueError("a split without rows has no metrics")
        areas = tuple((None, None) if curve is None else (roc_auc(curve), average_precision(curve)) for curve in self.curves())
        counts = Counts(rows, self.sums[0].item(), areas=areas, **self.counted(self.sums[1:], rows))
        values = {name: METRICS[name].of(counts) for name in names(self.target.kind, self.target.size)}
        return {name: value if value is not None and math.isfinite(value) else None for name, value in values.items()}

    def curves(self) -> list[Curve | None]:
        """Of each class or label that is scored, once all workers' scores are here."""
        if self.bins:
            return self.bins.curves()
        scores, truths = torch.cat(self.scores).unbind(dim=1)
        return [curve_of(*column) for column in zip(scores.T.contiguous(), truths.T.contiguous() > 0.5, strict=True)]

    @abstractmethod
    def counts(self, given: Tensor, target: Tensor) -> list[Tensor]:
        """The sums of a batch, each float64 (n,). given: probabilities or numbers (rows, outputs), as the graph gives them."""

    def scored(self, given: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities (rows, scored), and whether they ought to be 1."""
        raise NotImplementedError

    @abstractmethod
    def counted(self, sums: Tensor, rows: int) -> dict[str, Any]:
        """What `Counts` has of these sums over all workers, of a split of so many rows."""


class Classes(Tally):
    """Counts of each class: rows that are given it rightly, that are given it, that have it; rows whose class is among the likeliest
    ones; and for the calibration, by how sure the model is: rows, the sum of their probabilities, and rows it is right on."""

    def __init__(self, target: Target, rows: int, device: torch.device) -> None:
        super().__init__(target, 3 * target.size + 1 + 3 * BINS, scored(target), rows, device)

    def counts(self, given: Tensor, target: Tensor) -> list[Tensor]:
        decision = decided(self.target, given)
        counted = [values.bincount(minlength=self.target.size).double() for values in (target[decision == target], decision, target)]
        return [*counted, _among_the_first(given, target, TOP).sum().double().reshape(1), _binned(given, target)]

    def scored(self, given: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        classes = torch.arange(self.target.size, device=given.device)
        if self.target.size == 2:
            classes = classes[self.target.positive_index, None]
        return given[:, classes], target[:, None] == classes

    def counted(self, sums: Tensor, rows: int) -> dict[str, Any]:
        counted, first, bins = sums.split([3 * self.target.size, 1, 3 * BINS])
        right, given, real = counted.reshape(3, -1)
        positive = self.target.positive_index if self.target.size == 2 else 0
        return {"right": right, "given": given, "real": real, "positive": positive, "first": first.item(), "bins": bins.reshape(3, -1)}


class Labels(Tally):
    """Counts of each label: rows that are given it rightly, that are given it, that have it; and rows with all labels right."""

    def __init__(self, target: Target, rows: int, device: torch.device) -> None:
        super().__init__(target, 1 + 3 * target.size, target.size, rows, device)

    def counts(self, given: Tensor, target: Tensor) -> list[Tensor]:
        decision, real = decided(self.target, given), target > 0
        whole = (decision == real).all(dim=1).sum().reshape(1)
        return [whole.double(), *(values.sum(dim=0).double() for values in (decision & real, decision, real))]

    def scored(self, given: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return given, target

    def counted(self, sums: Tensor, rows: int) -> dict[str, Any]:
        right, given, real = sums[1:].reshape(3, -1)
        return {"right": right, "given": given, "real": real, "labels": self.target.size, "whole": sums[0].item()}


class Numbers(Tally):
    """Sums of each number: absolute and squared errors, and distances from the training rows' mean and their squares."""

    def __init__(self, target: Target, units: Units, device: torch.device) -> None:
        super().__init__(target, 4 * target.size, 0, 0, device)
        self.mean = units.mean.double()

    def counts(self, given: Tensor, target: Tensor) -> list[Tensor]:
        error, distance = given - target, target - self.mean
        return [values.sum(dim=0) for values in (error.abs(), error.square(), distance, distance.square())]

    def counted(self, sums: Tensor, rows: int) -> dict[str, Any]:
        absolute, squared, distance, square = sums.reshape(4, -1)
        around = square - distance.square() / rows
        varies = around > 1e-12 * square  # less is what rounding leaves of a number that never changes
        return {"absolute": absolute, "squared": squared, "around": around, "varies": varies}


def scored(target: Target) -> int:
    """How many probabilities of a row the areas under curves need."""
    if target.kind == "category":
        return 1 if target.size == 2 else target.size if target.size <= MOST_SCORED else 0
    return target.size if target.kind == "multi_label" else 0


def approximated(target: Target, rows: Mapping[str, int]) -> str | None:
    """A line on what is not exact of splits of so many rows, if anything is not."""
    large = [name for name, count in rows.items() if count * scored(target) > EXACT]
    if not large:
        return None
    what = " and ".join(name for name in names(target.kind, target.size) if name.endswith(("roc_auc", "average_precision")))
    return (
        f"{what} of {' and '.join(large)}: counted in {bins_of(scored(target)):,} bins of probabilities, since there are too many to keep"
    )


def tally(target: Target, output: torch.nn.Module, rows: int, device: torch.device) -> Tally:
    """The one for a kind of target, of a split of so many rows. output: the network's output layer."""
    if target.kind == "number":
        assert isinstance(output, Units)
        return Numbers(target, output, device)
    return Classes(target, rows, device) if target.kind == "category" else Labels(target, rows, device)


def _binned(probabilities: Tensor, target: Tensor) -> Tensor:
    """Rows, the sum of the likeliest class's probabilities, and rows that have it, by that probability: (0, 1/15] to (14/15, 1]."""
    sure, likeliest = probabilities.max(dim=1)
    place = torch.bucketize(sure, torch.linspace(0, 1, BINS + 1, dtype=sure.dtype, device=sure.device)[1:-1])
    each = torch.stack([torch.ones_like(sure), sure, (likeliest == target).to(sure.dtype)])
    return (each @ (place[:, None] == torch.arange(BINS, device=place.device)).to(sure.dtype)).reshape(-1)


def _among_the_first(probabilities: Tensor, target: Tensor, most: int) -> Tensor:
    """Whether each row's class is among so many likeliest ones; of those that are as likely, the first ones are."""
    own = probabilities.gather(1, target[:, None])
    earlier = torch.arange(probabilities.shape[1], device=target.device) < target[:, None]
    ahead = (probabilities > own) | ((probabilities == own) & earlier)
    return (ahead.sum(dim=1) < most) & ~own[:, 0].isnan()
