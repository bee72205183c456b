"""What the model says of the test split, read from predictions.parquet (dlopt/train/measure/evaluate.py explains its columns): tables,
plots and the worst mistakes, a class for each kind of target."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dlopt.artifact import Artifact
from dlopt.part import Target
from dlopt.report import Figure, plots
from dlopt.report.words import figure, percent

PREDICTIONS = "predictions.parquet"
MOST_CELLS = 30
"""A confusion matrix of more classes is no longer legible: its largest cells are listed instead, so many of them."""
MOST_NUMBERS = 6
"""Columns of a target of numbers that are drawn."""
BINS = 10
"""Of probabilities, in the calibration plot."""
THRESHOLDS = np.arange(1, 10) / 10
"""Of two classes: what else the line could be drawn at."""


class Results(ABC):
    """What the model says of each row of the test split."""

    def __init__(self, target: Target, table: pa.Table) -> None:
        self.target, self.rows = target, len(table)
        self.loss: np.ndarray = table["loss"].to_numpy()

    @property
    @abstractmethod
    def wrong(self) -> np.ndarray:
        """Numbers of the rows that are not right, worst first."""

    @property
    @abstractmethod
    def figures(self) -> list[Figure]:
        """Plots of how well the outputs tell what is so."""

    @abstractmethod
    def said(self, row: int) -> tuple[str, str]:
        """What is so, and what the model says."""

    def facts(self, row: int) -> dict[str, str]:
        """What else there is to say of a row."""
        return {"loss": figure(float(self.loss[row]))}

    def _worst(self, rows: np.ndarray) -> np.ndarray:
        """Highest loss first; a loss that is not a number is the highest."""
        return rows[np.argsort(-np.nan_to_num(self.loss[rows], nan=np.inf), kind="stable")]


class Cell(NamedTuple):
    """Test rows of class `label` that were called `predicted`, and their share of the class."""

    label: Any
    predicted: Any
    rows: int
    share: float


class Score(NamedTuple):
    """How a class or label fares: its rows, how many were given it, the shares of both that are right, and F1."""

    label: Any
    rows: int
    given: int
    recall: float | None
    precision: float | None
    f1: float | None

    @classmethod
    def of(cls, label: Any, rows: int, given: int, right: int) -> Score:
        """None where there is nothing to take a share of."""
        return cls(label, rows, given, _share(right, rows), _share(right, given), _share(2 * right, rows + given))


class Threshold(NamedTuple):
    """What comes of calling a row positive when its probability is at least so much, and whether that is what the model does."""

    threshold: float
    score: Score
    chosen: bool


class Categories(Results):
    """One of several classes."""

    most = MOST_CELLS

    def __init__(self, target: Target, table: pa.Table) -> None:
        super().__init__(target, table)
        self.label, self.predicted, self.probability = (table[name].to_numpy() for name in ("label", "predicted", "probability"))
        self.score: np.ndarray | None = table["score"].to_numpy() if "score" in table.column_names else None
        """Of two classes: the probability of the positive one."""

    @property
    def wrong(self) -> np.ndarray:
        return self._worst(np.flatnonzero(self.label != self.predicted))

    @property
    def confused(self) -> list[Cell]:
        """The pairs of classes that some row is wrong in, fullest first."""
        return self._cells(np.flatnonzero(self.label != self.predicted))

    @property
    def matrix(self) -> dict[tuple[Any, Any], Cell] | None:
        """The cells of the confusion matrix that have rows; None where there are too many classes."""
        if len(self.target.labels) > MOST_CELLS:
            return None
        return {(cell.label, cell.predicted): cell for cell in self._cells(np.arange(self.rows))}

    @property
    def scores(self) -> list[Score]:
        """How well each class is told from the others."""
        size = len(self.target.labels)
        rows, given = (np.bincount(values, minlength=size).tolist() for values in (self.label, self.predicted))
        right = np.bincount(self.label[self.label == self.predicted], minlength=size).tolist()
        return [Score.of(*found) for found in zip(self.target.labels, rows, given, right, strict=True)]

    @property
    def thresholds(self) -> list[Threshold]:
        """Of two classes: what other thresholds would give, and what the model's own gives."""
        if self.score is None:
            return []
        truth, name = self.label == self.target.positive_index, self.target.labels[self.target.positive_index]
        own = self.target.thresholds or (0.5,)
        found = []
        for threshold in sorted({*THRESHOLDS.tolist(), *own}):
            called = self.score >= np.float32(threshold)
            score = Score.of(name, int(truth.sum()), int(called.sum()), int((called & truth).sum()))
            found.append(Threshold(threshold, score, threshold in own))
        return found

    @property
    def calibration(self) -> Figure | None:
        """How often what was given a probability is so: of two classes the positive one, else the predicted one."""
        chance = self.probability if self.score is None else self.score
        so = self.label == self.predicted if self.score is None else self.label == self.target.positive_index
        if not self.rows or not np.isfinite(chance).all():
            return None
        place = np.minimum((chance * BINS).astype(int), BINS - 1)
        rows = np.bincount(place, minlength=BINS)
        there = rows > 0
        said, share = (np.bincount(place, weights=values, minlength=BINS)[there] / rows[there] for values in (chance, so))
        apart = float(np.average(np.abs(said - share), weights=rows[there]))
        name = "the predicted class" if self.score is None else f"class {self.target.labels[self.target.positive_index]}"
        told = "; ".join(f"{one:.2f}: {other:.2f} of {count} rows" for one, other, count in zip(said, share, rows[there], strict=True))
        svg = plots.calibration("Calibration", said, share, rows[there])
        return Figure(
            f"Calibration, {percent(apart)} apart", svg, f"How often {name} is right, by its mean probability in {BINS} bins: {told}."
        )

    @property
    def figures(self) -> list[Figure]:
        """Of two classes: the ROC and the precision-recall curve; none where the test split has only one of them."""
        if self.score is None or not np.isfinite(self.score).all() or len(np.unique(self.label)) < 2:
            return []
        truth, name = self.label == self.target.positive_index, self.target.labels[self.target.positive_index]
        false_rate, true_rate, area = roc(self.score, truth)
        recall, precision, average = precision_recall(self.score, truth)
        base = float(truth.mean())
        svg = plots.curve("ROC", false_rate, true_rate, ("false positive rate", "true positive rate"), diagonal=True)
        other = plots.curve("Precision and recall", recall, precision, ("recall", "precision"), level=base, steps=True)
        said = f"{name}: true positive rate by false positive rate; the area under the curve is {area:.4f}, and by chance it is 0.5."
        told = f"{name}: precision by recall; the average precision is {average:.4f}, and by chance it is {base:.4f}."
        return [
            Figure(f"ROC curve, AUC {area:.4f}", svg, said),
            Figure(f"Precision and recall, AP {average:.4f}", other, told),
        ]

    def said(self, row: int) -> tuple[str, str]:
        return str(self.target.labels[self.label[row]]), str(self.target.labels[self.predicted[row]])

    def facts(self, row: int) -> dict[str, str]:
        return {"probability": percent(float(self.probability[row]))} | super().facts(row)

    def _cells(self, rows: np.ndarray) -> list[Cell]:
        """The cells of the confusion matrix that have any of these rows, fullest first."""
        labels = self.target.labels
        pairs, counts = np.unique(np.stack([self.label[rows], self.predicted[rows]], axis=1), axis=0, return_counts=True)
        of_class = np.bincount(self.label, minlength=len(labels))
        return [
            Cell(labels[label], labels[predicted], count, count / of_class[label])
            for (label, predicted), count in sorted(zip(pairs.tolist(), counts.tolist(), strict=True), key=lambda found: -found[1])
        ]


class Labels(Results):
    """Any number of labels."""

    def __init__(self, target: Target, table: pa.Table) -> None:
        super().__init__(target, table)
        self.labels, self.predicted = (_chosen(table[name], target.size) for name in ("labels", "predicted"))
        """bool (rows, labels)."""

    @property
    def wrong(self) -> np.ndarray:
        return self._worst(np.flatnonzero((self.labels != self.predicted).any(axis=1)))

    @property
    def counts(self) -> np.ndarray:
        """Rows that have each label, that are given it, and that are given it rightly, int64 (3, labels)."""
        return np.stack([values.sum(axis=0) for values in (self.labels, self.predicted, self.labels & self.predicted)])

    @property
    def scores(self) -> list[Score]:
        """How each label fares."""
        return [Score.of(*found) for found in zip(self.target.labels, *self.counts.tolist(), strict=True)]

    @property
    def micro(self) -> Score:
        """All labels of all rows together."""
        return Score.of("micro", *self.counts.sum(axis=1).tolist())

    @property
    def macro(self) -> Score:
        """The mean of the labels, each of which counts alike; those with nothing to take a share of are left out."""
        rows, given, _ = self.counts.sum(axis=1).tolist()
        shares = [[getattr(score, name) for score in self.scores] for name in ("recall", "precision", "f1")]
        return Score("macro", rows, given, *(_mean(values) for values in shares))

    @property
    def figures(self) -> list[Figure]:
        return []

    def said(self, row: int) -> tuple[str, str]:
        return self._names(self.labels[row]), self._names(self.predicted[row])

    def _names(self, chosen: np.ndarray) -> str:
        return ", ".join(str(self.target.labels[index]) for index in np.flatnonzero(chosen)) or "none"


class Number(NamedTuple):
    """How far off one number is: mean absolute error, root of the mean squared error, share of the variance explained, and the
    mean error, which is above 0 where predictions are too high."""

    name: str
    mae: float
    rmse: float
    r2: float | None
    bias: float


class Numbers(Results):
    """Numbers in the units of the data."""

    def __init__(self, target: Target, table: pa.Table) -> None:
        super().__init__(target, table)
        self.true, self.predicted = (
            np.stack([table[f"{what}.{column}"].to_numpy() for column in target.columns], axis=1).astype(np.float64)
            for what in ("target", "predicted")
        )
        """(rows, columns)."""

    @property
    def wrong(self) -> np.ndarray:
        """All rows that are off at all."""
        return self._worst(np.flatnonzero((self.true != self.predicted).any(axis=1)))

    @property
    def numbers(self) -> list[Number]:
        """How each number fares."""
        error, spread = self.predicted - self.true, self.true.var(axis=0)
        square = (error**2).mean(axis=0)
        return [
            Number(
                name,
                float(np.abs(error[:, index]).mean()),
                float(np.sqrt(square[index])),
                float(1 - square[index] / spread[index]) if spread[index] else None,
                float(error[:, index].mean()),
            )
            for index, name in enumerate(self.target.columns)
        ]

    @property
    def figures(self) -> list[Figure]:
        """Predicted by true and the histogram of errors, of the first numbers; rows that are not finite are left out."""
        return [found for index, name in enumerate(self.target.columns[:MOST_NUMBERS]) for found in self._figures(index, name)]

    def said(self, row: int) -> tuple[str, str]:
        return self._written(self.true[row]), self._written(self.predicted[row])

    def facts(self, row: int) -> dict[str, str]:
        off = self.predicted[row] - self.true[row]
        return {"error": ", ".join(f"{value:+.4g}" for value in off)} | super().facts(row)

    def _figures(self, index: int, name: str) -> list[Figure]:
        true, predicted = self.true[:, index], self.predicted[:, index]
        finite = np.isfinite(true) & np.isfinite(predicted)
        if not finite.any():
            return []
        true, predicted = true[finite], predicted[finite]
        low, middle, high = np.quantile(predicted - true, (0.05, 0.5, 0.95))
        said = f"{name}: predicted by true value of {finite.sum():,} rows, from {true.min():.4g} to {true.max():.4g}."
        told = (
            f"{name}: histogram of predicted less true; nine rows in ten are between {low:.4g} and {high:.4g}, the middle is {middle:.4g}."
        )
        return [
            Figure(f"{name}: predicted by true", plots.scatter(f"{name} scatter", true, predicted), said),
            Figure(f"{name}: errors", plots.errors(f"{name} errors", predicted - true, "predicted less true"), told),
        ]

    def _written(self, values: np.ndarray) -> str:
        if len(values) == 1:
            return figure(float(values[0]), 6)
        return ", ".join(f"{name} {figure(float(value), 6)}" for name, value in zip(self.target.columns, values, strict=True))


KINDS: dict[str, type[Results]] = {"category": Categories, "multi_label": Labels, "number": Numbers}


def read_results(model: Artifact, target: Target) -> Results | None:
    """None without a test split. Raises DloptError when the file is damaged."""
    if PREDICTIONS not in model.manifest.files:
        return None
    return KINDS[target.kind](target, pq.read_table(pa.BufferReader(model.read(PREDICTIONS))))


def roc(score: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """False and true positive rates from (0, 0) to (1, 1) as the threshold falls, and the area under them.

    score: (rows,), the higher the likelier; truth: bool (rows,), with rows of both sorts.
    """
    right, wrong = _sweep(score, truth)
    x, y = np.append(0, wrong) / wrong[-1], np.append(0, right) / right[-1]
    return x, y, float((np.diff(x) * (y[1:] + y[:-1]) / 2).sum())


def precision_recall(score: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Recall and precision as the threshold falls, and the average precision: the mean of precision over what each adds to recall."""
    right, wrong = _sweep(score, truth)
    recall, precision = right / right[-1], right / (right + wrong)
    return recall, precision, float((np.diff(recall, prepend=0) * precision).sum())


def _sweep(score: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many rows are called positive rightly and wrongly from each different score on, the highest first."""
    order = np.argsort(-score, kind="stable")
    last = np.append(np.flatnonzero(np.diff(score[order])), len(order) - 1)
    right = np.cumsum(truth[order])[last]
    return right, last + 1 - right


def _chosen(lists: pa.ChunkedArray, size: int) -> np.ndarray:
    """Lists of indices as bool (rows, size)."""
    array = lists.combine_chunks()
    chosen = np.zeros((len(array), size), dtype=bool)
    rows = np.repeat(np.arange(len(array)), np.diff(array.offsets.to_numpy()))
    chosen[rows, array.flatten().to_numpy()] = True
    return chosen


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None
