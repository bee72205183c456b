"""Metrics of a split by the kind of its target, exact however many workers share it out: they are made of sums, which add up, and of
scores, which are gathered. Nothing here is an average of averages.

A metric that the split cannot tell (ROC AUC without a row of the class, R2 of a number that never changes) is None, and so is one
that is not finite. Losses are those that are trained, without class weights and label smoothing: for numbers in squares of the training
rows' standard deviation, else in nats.

torchmetrics computes the same (tests/test_metrics.py holds each of these against it and against scikit-learn), but is not imported here:
its functional API divides in float32 and so is off by 1e-7, wants all rows at once where counts and sums of shares will do, counts
classes in a matrix of classes x classes, takes 170 ms for the ROC AUC of 10,000 rows of 10 classes, and 1.2 s to be imported.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from dlopt.models import Units
from dlopt.part import Target

Metrics = dict[str, float | None]

METRICS: dict[str, tuple[str, ...]] = {
    "category": ("loss", "accuracy", "macro_f1", "macro_precision", "macro_recall", "calibration_error"),
    "multi_label": (
        "loss",
        "accuracy",
        "subset_accuracy",
        "micro_f1",
        "macro_f1",
        "macro_precision",
        "macro_recall",
        "macro_roc_auc",
        "macro_average_precision",
    ),
    "number": ("loss", "r2", "mae", "rmse"),
}
"""What there is for each kind of target; the second one is shown while training runs."""
TWO_CLASSES = ("precision", "recall", "f1", "roc_auc", "average_precision")
"""What there is besides for two classes: of the positive one."""
SEVERAL_CLASSES = ("macro_roc_auc", "macro_average_precision")
"""What there is besides for three to MOST_SCORED classes: the mean of each class against all others."""
MOST_SCORED = 100
"""Of more classes the probabilities of all rows, which areas under curves need, are too many to keep."""
TOP = 5
TOP_CLASSES = ("top5_accuracy",)
"""What there is besides for more than five classes."""
BINS = 15
"""Of the calibration error."""
EXACT = 2**24
"""The most probabilities of a split, of rows times classes or labels, that are kept for the areas under curves (128 MiB, over all workers);
of more they are counted in bins."""
FINE, LEAST_FINE, COUNTS = 4096, 256, 2**23
"""Bins of a class's probabilities, as many as COUNTS leave to each. They are equally wide in asinh(STEEP * logit): narrow around a half,
and against their distance from 0 and from 1."""
STEEP, WIDEST = 10.0, 88.0
"""WIDEST is the logit beyond which float32 has no probability."""
SMALLER_IS_BETTER = ("loss", "mae", "rmse", "calibration_error")


def names(kind: str, classes: int | None = None) -> tuple[str, ...]:
    """The metrics of a kind of target. classes: how many there are, where that is known."""
    if kind != "category":
        return METRICS[kind]
    two = TWO_CLASSES if classes in (None, 2) else ()
    several = SEVERAL_CLASSES if classes is None or 2 < classes <= MOST_SCORED else ()
    return METRICS[kind] + two + several + (TOP_CLASSES if classes is None or classes > TOP else ())


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
    least = torch.tensor(target.thresholds, dtype=torch.float32, device=probabilities.device)
    if target.kind == "multi_label":
        return probabilities.float() >= least
    positive = target.positive_index
    return torch.where(probabilities[:, positive].float() >= least, positive, 1 - positive)


class Tally(ABC):
    """What tells the metrics, a batch at a time."""

    def __init__(self, target: Target, sums: int, scored: int, rows: int, device: torch.device) -> None:
        self.target, self.device = target, device
        self.bins = _Bins(scored, device) if rows * scored > EXACT else None
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
        found = {"loss": self.sums[0].item() / rows} | self.told(self.sums[1:], self.curves(), rows)
        return {name: value if value is not None and math.isfinite(value) else None for name, value in found.items()}

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
    def told(self, sums: Tensor, curves: list[Curve | None], rows: int) -> Metrics:
        """The metrics besides the loss."""


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

    def told(self, sums: Tensor, curves: list[Curve | None], rows: int) -> Metrics:
        counted, first, bins = sums.split([3 * self.target.size, 1, 3 * BINS])
        right, given, real = counted.reshape(3, -1)
        found: Metrics = {"accuracy": right.sum().item() / rows} | macro(right, given, real)
        found["calibration_error"] = calibration_error(bins.reshape(3, -1))
        if self.target.size == 2:
            one = [values[self.target.positive_index].item() for values in (right, given, real)]
            area, average = _areas(curves[0])
            found |= dict(zip(TWO_CLASSES, (*precision_recall_f1(*one), area, average), strict=True))
        elif curves:
            found |= _mean_areas(curves)
        if self.target.size > TOP:
            found["top5_accuracy"] = first.item() / rows
        return found


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

    def told(self, sums: Tensor, curves: list[Curve | None], rows: int) -> Metrics:
        right, given, real = sums[1:].reshape(3, -1)
        wrong = (given + real - 2 * right).sum().item()
        return {
            "accuracy": 1 - wrong / (rows * self.target.size),
            "subset_accuracy": sums[0].item() / rows,
            "micro_f1": precision_recall_f1(*(values.sum().item() for values in (right, given, real)))[2],
            **macro(right, given, real),
            **_mean_areas(curves),
        }


class Numbers(Tally):
    """Sums of each number: absolute and squared errors, and distances from the training rows' mean and their squares."""

    def __init__(self, target: Target, units: Units, device: torch.device) -> None:
        super().__init__(target, 4 * target.size, 0, 0, device)
        self.mean = units.mean.double()

    def counts(self, given: Tensor, target: Tensor) -> list[Tensor]:
        error, distance = given - target, target - self.mean
        return [values.sum(dim=0) for values in (error.abs(), error.square(), distance, distance.square())]

    def told(self, sums: Tensor, curves: list[Curve | None], rows: int) -> Metrics:
        absolute, squared, distance, square = sums.reshape(4, -1)
        around = square - distance.square() / rows
        varies = around > 1e-12 * square  # less is what rounding leaves of a number that never changes
        return {
            "r2": (1 - squared[varies] / around[varies]).mean().item(),
            "mae": (absolute / rows).mean().item(),
            "rmse": (squared / rows).sqrt().mean().item(),
        }


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
    return f"{what} of {' and '.join(large)}: counted in {_fine(scored(target)):,} bins of probabilities, since there are too many to keep"


def tally(target: Target, output: torch.nn.Module, rows: int, device: torch.device) -> Tally:
    """The one for a kind of target, of a split of so many rows. output: the network's output layer."""
    if target.kind == "number":
        assert isinstance(output, Units)
        return Numbers(target, output, device)
    return Classes(target, rows, device) if target.kind == "category" else Labels(target, rows, device)


def precision_recall_f1(right: float, given: float, real: float) -> tuple[float | None, float | None, float | None]:
    """Of one class from its counts; none without a row of the class. A class that is given to no row has a precision of 0."""
    if not real:
        return None, None, None
    return right / max(given, 1), right / real, 2 * right / (given + real)


def macro(right: Tensor, given: Tensor, real: Tensor) -> Metrics:
    """Means over the classes that some row has or is given, as scikit-learn has them: what is a share of nothing is 0."""
    there = given + real > 0
    right, given, real = right[there], given[there], real[there]
    shares = {"f1": 2 * right / (given + real), "precision": right / given.clamp_min(1), "recall": right / real.clamp_min(1)}
    return {f"macro_{name}": share.mean().item() if there.any() else None for name, share in shares.items()}


class Curve(NamedTuple):
    """What comes of giving the class to all rows that score so much or more, for each different score, the highest first."""

    scores: Tensor
    """float32 (n,)."""
    right: Tensor
    """Rows of the class among them, int64 (n,)."""
    wrong: Tensor
    """Other rows among them."""
    exact: bool = True
    """Or each score stands for all from it to the next one."""


def curve_of(scores: Tensor, truths: Tensor) -> Curve | None:
    """scores: float32 (rows,); truths: bool (rows,). None where a score is NaN."""
    if scores.isnan().any():
        return None
    ordered, order = scores.sort(descending=True)
    ends = torch.cat([ordered[1:] != ordered[:-1], torch.ones(1, dtype=torch.bool, device=scores.device)]).nonzero()[:, 0]
    right = truths[order].cumsum(0)[ends]
    return Curve(ordered[ends], right, ends + 1 - right)


def roc_auc(curve: Curve) -> float | None:
    """How often a row of the class scores above one that is not, ties counting half: the area under the true positive rate by the false
    one, in whole numbers (Hanley, McNeil 1982). None without rows of both sorts."""
    positive, negative = int(curve.right[-1]), int(curve.wrong[-1])
    if not positive or not negative:
        return None
    heights = 2 * curve.right - curve.right.diff(prepend=curve.right.new_zeros(1))
    twice = (curve.wrong.diff(prepend=curve.wrong.new_zeros(1)) * heights).sum().item()
    return twice / (2 * positive * negative)


def average_precision(curve: Curve) -> float | None:
    """Sum over the thresholds of precision times the recall that each adds; None without a row of the class."""
    positive = int(curve.right[-1])
    if not positive:
        return None
    added = curve.right.diff(prepend=curve.right.new_zeros(1))
    return (added * (curve.right.double() / (curve.right + curve.wrong))).sum().item() / positive


def calibration_error(bins: Tensor) -> float:
    """How far the probability of the likeliest class is from the share of rows that have it: the mean over the rows of what their bin is
    off (the expected calibration error of Guo et al., On Calibration of Modern Neural Networks, 2017), float64 (3, BINS) as `_binned`."""
    rows, sure, right = bins
    return ((sure - right).abs().sum() / rows.sum()).item()


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


class _Bins:
    """How many rows score so much for each class, of those that ought to and of the others: what is told of them is off by what happens
    within a bin."""

    def __init__(self, scored: int, device: torch.device) -> None:
        self.fine = _fine(scored)
        self.counts = torch.zeros(2, scored, self.fine + 1, dtype=torch.int64, device=device)
        """Of others and of rows of the class, by the score; NaN comes last."""

    def add(self, scores: Tensor, truths: Tensor) -> None:
        """(rows, scored) each."""
        steep = (STEEP * scores.float().double().logit()).asinh() / math.asinh(STEEP * WIDEST)
        place = ((steep + 1) * (self.fine / 2)).floor().clamp(0, self.fine - 1)
        place = place.nan_to_num(self.fine).long() + (self.fine + 1) * torch.arange(scores.shape[1], device=scores.device)
        place = place + self.counts[0].numel() * truths.long()
        self.counts += place.reshape(-1).bincount(minlength=self.counts.numel()).view(self.counts.shape)

    def curves(self) -> list[Curve | None]:
        steep = torch.arange(self.fine, device=self.counts.device, dtype=torch.float64) * (2 / self.fine) - 1
        edges = ((steep * math.asinh(STEEP * WIDEST)).sinh() / STEEP).sigmoid().float().flip(0)
        return [self._curve(*pair, edges) for pair in zip(self.counts[0], self.counts[1], strict=True)]

    def _curve(self, others: Tensor, right: Tensor, edges: Tensor) -> Curve | None:
        if int(others[-1] + right[-1]):
            return None
        there = (others[:-1] + right[:-1]).flip(0) > 0
        above = [counts[:-1].flip(0).cumsum(0)[there] for counts in (right, others)]
        return Curve(edges[there], above[0], above[1], exact=False)


def _fine(scored: int) -> int:
    return max(LEAST_FINE, min(FINE, COUNTS // max(2 * scored, 1)))


def _areas(curve: Curve | None) -> tuple[float | None, float | None]:
    """ROC AUC and average precision."""
    return (None, None) if curve is None else (roc_auc(curve), average_precision(curve))


def _mean_areas(curves: list[Curve | None]) -> Metrics:
    """Over the classes or labels that the split can tell them of."""
    found = [_areas(curve) for curve in curves]
    return {"macro_roc_auc": _mean(area for area, _ in found), "macro_average_precision": _mean(average for _, average in found)}


def _mean(values: Iterable[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None
