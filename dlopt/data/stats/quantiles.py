"""Quantiles of columns of any length from a summary of bounded size, the same whoever sums up what, merged in a fixed order.

A summary has at most POINTS order statistics of each column at equal distances, so the rank of a quantile is off by at most
1 / (2 POINTS) of the rows; as long as a column has no more values than that, and for the quantiles that were asked for of a
single piece, it is exact (and then equal to numpy's "linear" method).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

POINTS = 4096
"""Order statistics that are kept of each column; fewer for many columns, so that all of them together stay below MOST_POINTS."""
MOST_POINTS = 2**20
SLACK = 16
"""Merged summaries are thinned out only when they have so many times as many points, so that errors do not add up."""


@dataclass(frozen=True)
class Quantiles:
    """For each column: sorted values, how many rows each stands for, and quantiles that are known exactly."""

    values: list[np.ndarray]
    weights: list[np.ndarray]
    exact: list[dict[float, float]]

    @classmethod
    def of(cls, matrix: np.ndarray, wanted: Sequence[float] = ()) -> Quantiles:
        """Of a piece. matrix: float32 (rows, columns), NaN where missing. wanted: probabilities to be exact in this piece."""
        points = max(256, min(POINTS, MOST_POINTS // max(matrix.shape[1], 1)))
        values, weights, exact = [], [], []
        for column in range(matrix.shape[1]):
            ordered = np.sort(np.ascontiguousarray(matrix[:, column]))
            there = ordered[: len(ordered) - int(np.isnan(ordered).sum())].astype(np.float64)
            exact.append({p: float(_interpolated(there, p * (len(there) - 1))) for p in wanted} if len(there) else {})
            few, weight = _thinned(there, np.ones(len(there)), points)
            values.append(few)
            weights.append(weight)
        return cls(values, weights, exact)

    def merge(self, other: Quantiles) -> Quantiles:
        """Of two pieces together; order matters to the last bit, so merge in a fixed one."""
        values, weights, exact = [], [], []
        points = max(256, min(POINTS, MOST_POINTS // max(len(self.values), 1)))
        for mine, yours, my_weights, your_weights, my_exact, your_exact in zip(
            self.values, other.values, self.weights, other.weights, self.exact, other.exact, strict=True
        ):
            together, weight = np.concatenate([mine, yours]), np.concatenate([my_weights, your_weights])
            order = np.argsort(together, kind="stable")
            together, weight = together[order], weight[order]
            if len(together) > 4 * SLACK * points:
                together, weight = _thinned(together, weight, SLACK * points)
            values.append(together)
            weights.append(weight)
            exact.append(my_exact if not len(yours) else your_exact if not len(mine) else {})
        return Quantiles(values, weights, exact)

    def at(self, p: float) -> np.ndarray:
        """The quantile of every column, float64 (columns,); 0 where a column has no value."""
        return np.array([self._of_column(column, p) for column in range(len(self.values))])

    def _of_column(self, column: int, p: float) -> float:
        values, weights = self.values[column], self.weights[column]
        if not len(values):
            return 0.0
        if p in self.exact[column]:
            return self.exact[column][p]
        ranks = np.cumsum(weights) - weights / 2 - 0.5
        return float(np.interp(p * (weights.sum() - 1), ranks, values))


def _interpolated(ordered: np.ndarray, place: float) -> float:
    low = int(np.floor(place))
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _thinned(ordered: np.ndarray, weights: np.ndarray, points: int) -> tuple[np.ndarray, np.ndarray]:
    """At most `points` of the sorted values, at equal distances by weight, the ends among them as nearly as may be."""
    if len(ordered) <= points:
        return ordered, weights
    total = weights.sum()
    wanted = (np.arange(points) + 0.5) * total / points
    kept = np.searchsorted(np.cumsum(weights), wanted, side="left").clip(0, len(ordered) - 1)
    return ordered[kept], np.full(points, total / points)
