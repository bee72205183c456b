"""The metrics, a class each: for which targets it is, how it is written and what it says, whether less is better, and how it comes of what
was counted (`dlopt.train.measure.metrics` counts). To add one: a class, and its name in METRICS, which are told in that order.

Imports no torch: the report has its words from here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

MOST_SCORED = 100
"""Of more classes the probabilities of all rows, which areas under curves need, are too many to keep."""
TOP = 5


class Counts(NamedTuple):
    """What was counted of a split, over all workers; what its target does not have is left out."""

    rows: int
    loss: float
    """The sum over the rows."""
    right: Any = None
    """Rows that were given each class or label rightly, float64 (n,); those that were given it, and those that have it."""
    given: Any = None
    real: Any = None
    positive: int = 0
    """Which one of two classes is asked for."""
    labels: int = 0
    """How many a row can have."""
    whole: float = 0.0
    """Rows with all labels right."""
    first: float = 0.0
    """Rows whose class is among the TOP likeliest ones."""
    bins: Any = None
    """By how sure the model is, float64 (3, bins): rows, the sum of their probabilities, and rows it is right on."""
    areas: tuple[tuple[float | None, float | None], ...] = ()
    """Of each class or label that is scored, the area under its ROC curve, and its average precision."""
    absolute: Any = None
    """Of each number, float64 (n,), the sums of absolute and squared errors, and of squared distances from the mean."""
    squared: Any = None
    around: Any = None
    varies: Any = None
    """Whether it does, bool (n,)."""


class Metric:
    """One of them; every class says all of what stands here without a value."""

    name: ClassVar[str]
    targets: ClassVar[tuple[str, ...]]
    """Kinds of targets."""
    written: ClassVar[str]
    says: ClassVar[str] = ""
    """What it is, for the report: {what} stands for classes or labels, {positive} for the one of two that is asked for."""
    smaller_is_better: ClassVar[bool]
    is_share: ClassVar[bool]
    """Whether it is a share of rows, and written in per cent."""
    least: ClassVar[int] = 1
    most: ClassVar[float] = float("inf")
    """Of how many classes it is told."""

    @staticmethod
    def of(counts: Counts) -> float | None:
        """None where the split cannot tell."""
        raise NotImplementedError


class Loss(Metric):
    name, written, targets = "loss", "loss", ("category", "multi_label", "number")
    smaller_is_better, is_share = True, False

    @staticmethod
    def of(counts: Counts) -> float:
        return counts.loss / counts.rows


class R2(Metric):
    name, written, targets = "r2", "R²", ("number",)
    says = "share of the variance that is explained: 1 is perfect, 0 is no better than the mean"
    smaller_is_better, is_share = False, False

    @staticmethod
    def of(counts: Counts) -> float:
        return _number((1 - counts.squared[counts.varies] / counts.around[counts.varies]).mean())


class Mae(Metric):
    name, written, targets = "mae", "MAE", ("number",)
    says = "mean absolute error, in units of the data"
    smaller_is_better, is_share = True, False

    @staticmethod
    def of(counts: Counts) -> float:
        return _number((counts.absolute / counts.rows).mean())


class Rmse(Metric):
    name, written, targets = "rmse", "RMSE", ("number",)
    says = "root of the mean squared error, in units of the data"
    smaller_is_better, is_share = True, False

    @staticmethod
    def of(counts: Counts) -> float:
        return _number((counts.squared / counts.rows).sqrt().mean())


class Accuracy(Metric):
    """Of labels, each of a row counts."""

    name, written, targets = "accuracy", "accuracy", ("category", "multi_label")
    smaller_is_better, is_share = False, True

    @staticmethod
    def of(counts: Counts) -> float:
        if not counts.labels:
            return _number(counts.right.sum()) / counts.rows
        return 1 - _number((counts.given + counts.real - 2 * counts.right).sum()) / (counts.rows * counts.labels)


class SubsetAccuracy(Metric):
    name, written, targets = "subset_accuracy", "subset accuracy", ("multi_label",)
    says = "share of rows that have all labels right"
    smaller_is_better, is_share = False, True

    @staticmethod
    def of(counts: Counts) -> float:
        return counts.whole / counts.rows


class MicroF1(Metric):
    name, written, targets = "micro_f1", "micro F1", ("multi_label",)
    says = "of all labels of all rows together"
    smaller_is_better, is_share = False, False

    @staticmethod
    def of(counts: Counts) -> float | None:
        right, given, real = (_number(values.sum()) for values in (counts.right, counts.given, counts.real))
        return 2 * right / (given + real) if real else None


class MacroF1(Metric):
    name, written, targets = "macro_f1", "macro F1", ("category", "multi_label")
    says = "mean of all {what}, each counting alike"
    smaller_is_better, is_share = False, False

    @staticmethod
    def of(counts: Counts) -> float | None:
        return _macro(counts, lambda right, given, real: 2 * right / (given + real))


class MacroPrecision(Metric):
    name, written, targets = "macro_precision", "macro precision", ("category", "multi_label")
    smaller_is_better, is_share = False, True

    @staticmethod
    def of(counts: Counts) -> float | None:
        return _macro(counts, lambda right, given, real: right / given.clamp_min(1))


class MacroRecall(Metric):
    name, written, targets = "macro_recall", "macro recall", ("category", "multi_label")
    smaller_is_better, is_share = False, True

    @staticmethod
    def of(counts: Counts) -> float | None:
        return _macro(counts, lambda right, given, real: right / real.clamp_min(1))


class CalibrationError(Metric):
    """How far the probability of the likeliest class is from the share of rows that have it: the mean over the rows of what their bin is
    off (the expected calibration error of Guo et al., On Calibration of Modern Neural Networks, 2017)."""

    name, written, targets = "calibration_error", "calibration error", ("category",)
    smaller_is_better, is_share = True, False

    @staticmethod
    def of(counts: Counts) -> float:
        rows, sure, right = counts.bins
        return _number((sure - right).abs().sum() / rows.sum())


class Precision(Metric):
    """A class that is given to no row has a precision of 0."""

    name, written, targets, least, most = "precision", "precision", ("category",), 2, 2
    smaller_is_better, is_share = False, True

    @staticmethod
    def of(counts: Counts) -> float | None:
        right, given, real = _positive(counts)
        return right / max(given, 1) if real else None


class Recall(Metric):
    name, written, targets, least, most = "recall", "recall", ("category",), 2, 2
    smaller_is_better, is_share = False, True

    @staticmethod
    def of(counts: Counts) -> float | None:
        right, _, real = _positive(counts)
        return right / real if real else None


class F1(Metric):
    name, written, targets, least, most = "f1", "F1", ("category",), 2, 2
    says = "of {positive}: the harmonic mean of precision and recall"
    smaller_is_better, is_share = False, False

    @staticmethod
    def of(counts: Counts) -> float | None:
        right, given, real = _positive(counts)
        return 2 * right / (given + real) if real else None


class RocAuc(Metric):
    name, written, targets, least, most = "roc_auc", "ROC AUC", ("category",), 2, 2
    says = "how often a row of {positive} ranks above another"
    smaller_is_better, is_share = False, False

    @staticmethod
    def of(counts: Counts) -> float | None:
        return counts.areas[0][0]


class AveragePrecision(Metric):
    name, written, targets, least, most = "average_precision", "average precision", ("category",), 2, 2
    smaller_is_better, is_share = False, False

    @staticmethod
    def of(counts: Counts) -> float | None:
        return counts.areas[0][1]


class MacroRocAuc(Metric):
    """Of each class or label against all others."""

    name, written, targets, least, most = "macro_roc_auc", "macro ROC AUC", ("category", "multi_label"), 3, MOST_SCORED
    says = "mean of all {what}: how often a row of it ranks above another"
    smaller_is_better, is_share = False, False

    @staticmethod
    def of(counts: Counts) -> float | None:
        return _mean(area for area, _ in counts.areas)


class MacroAveragePrecision(Metric):
    name, written, targets = "macro_average_precision", "macro average precision", ("category", "multi_label")
    smaller_is_better, is_share, least, most = False, False, 3, MOST_SCORED

    @staticmethod
    def of(counts: Counts) -> float | None:
        return _mean(average for _, average in counts.areas)


class Top5Accuracy(Metric):
    name, written, targets, least = "top5_accuracy", "top-5 accuracy", ("category",), TOP + 1
    smaller_is_better, is_share = False, True

    @staticmethod
    def of(counts: Counts) -> float:
        return counts.first / counts.rows


METRICS: dict[str, type[Metric]] = {
    metric.name: metric
    for metric in (
        Loss,
        R2,
        Mae,
        Rmse,
        Accuracy,
        SubsetAccuracy,
        MicroF1,
        MacroF1,
        MacroPrecision,
        MacroRecall,
        CalibrationError,
        Precision,
        Recall,
        F1,
        RocAuc,
        AveragePrecision,
        MacroRocAuc,
        MacroAveragePrecision,
        Top5Accuracy,
    )
}


def names(kind: str, classes: int | None = None) -> tuple[str, ...]:
    """The metrics of a kind of target; the second one is shown while training runs. classes: how many there are, where that is known."""
    counted = classes if kind == "category" else None
    return tuple(
        name for name, metric in METRICS.items() if kind in metric.targets and (counted is None or metric.least <= counted <= metric.most)
    )


def listed() -> str:
    """All of them in words, by what they are for."""
    of = {
        "classes have": lambda metric: "category" in metric.targets and metric.least == 1,
        "two of them also": lambda metric: "category" in metric.targets and metric.most == 2,
        f"three to {MOST_SCORED} also": lambda metric: metric.least == 3,
        f"more than {TOP} also": lambda metric: metric.least == TOP + 1,
        "labels have": lambda metric: "multi_label" in metric.targets,
        "numbers have": lambda metric: "number" in metric.targets,
    }
    return "; ".join(f"{what} {', '.join(name for name, one in METRICS.items() if fits(one))}" for what, fits in of.items())


def _number(value: Tensor) -> float:
    return float(value)


def _positive(counts: Counts) -> list[float]:
    return [_number(values[counts.positive]) for values in (counts.right, counts.given, counts.real)]


def _macro(counts: Counts, share: Callable[[Tensor, Tensor, Tensor], Tensor]) -> float | None:
    """The mean over the classes that some row has or is given, as scikit-learn has it: what is a share of nothing is 0."""
    there = counts.given + counts.real > 0
    return _number(share(counts.right[there], counts.given[there], counts.real[there]).mean()) if there.any() else None


def _mean(values: Iterable[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None
