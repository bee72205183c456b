"""Count, extremes, mean and spread of columns, summed in parts and merged in a fixed order.

Merging of means and squared deviations: Chan, Golub, LeVeque 1983, "Algorithms for computing the sample variance", eq. 2.1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dlopt.part import Statistics

Array = np.ndarray

NORMALIZATIONS: dict[str, Callable[[Array, Array, Array, Array], tuple[Array, Array]]] = {
    "none": lambda low, high, mean, std: (np.zeros_like(low), np.ones_like(low)),
    "min_max": lambda low, high, mean, std: (low, 1 / nonzero(high - low)),
    "symmetric": lambda low, high, mean, std: ((low + high) / 2, 2 / nonzero(high - low)),
    "max_abs": lambda low, high, mean, std: (np.zeros_like(low), 1 / nonzero(np.maximum(abs(low), abs(high)))),
    "standard": lambda low, high, mean, std: (mean, 1 / nonzero(std)),
}
"""name: least, greatest, mean and deviation of the training split to (shift, scale); the model computes (x - shift) * scale."""

COLUMNS_AT_ONCE = 32
"""Columns that are laid out one after the other at a time, so that each is read in one go."""


@dataclass(frozen=True)
class Moments:
    """Per channel or column, float64 or int64 arrays: values, missing ones, extremes, mean and sum of squared deviations of those
    that are there; without a value, the extremes are infinite and the mean is 0."""

    count: int
    missing: Array
    low: Array
    high: Array
    mean: Array
    squares: Array

    @property
    def std(self) -> Array:
        """Population standard deviation; 0 for a column that never varies, whatever rounding makes of its mean."""
        return np.where(self.low < self.high, np.sqrt(self.squares / np.maximum(self.count - self.missing, 1)), 0.0)

    def merge(self, other: Moments) -> Moments:
        """Moments of both together."""
        mine, yours = self.count - self.missing, other.count - other.missing
        seen = np.maximum(mine + yours, 1)
        difference = other.mean - self.mean
        mean = np.where(mine == 0, other.mean, self.mean + difference * yours / seen)
        return Moments(
            self.count + other.count,
            self.missing + other.missing,
            np.minimum(self.low, other.low),
            np.maximum(self.high, other.high),
            mean,
            self.squares + other.squares + difference**2 * mine * yours / seen,
        )

    def statistics(self, normalize: str) -> Statistics:
        """What the model needs to scale like this."""
        low, high = finite(self.low), finite(self.high)
        shift, scale = NORMALIZATIONS[normalize](low, high, self.mean, self.std)
        lists = {"min": low, "max": high, "mean": self.mean, "std": self.std, "fill": self.mean, "shift": shift, "scale": scale}
        return Statistics(
            count=self.count,
            missing=tuple(self.missing.astype(int).tolist()),
            **{name: tuple(np.asarray(array, dtype=np.float64).tolist()) for name, array in lists.items()},
        )


def of_values(values: np.ndarray) -> Moments:
    """Of numbers, float32 (rows, columns) with NaN where missing."""
    found = []
    for start in range(0, values.shape[1], COLUMNS_AT_ONCE):
        found += [_of_column(column) for column in np.ascontiguousarray(values[:, start : start + COLUMNS_AT_ONCE].T)]
    return Moments(len(values), *(np.array(figures) for figures in zip(*found, strict=True)))


def _of_column(column: np.ndarray) -> tuple[int, float, float, float, float]:
    """Missing values, extremes, mean and sum of squared deviations of one column."""
    absent = np.isnan(column)
    missing = int(absent.sum())
    there = (column[~absent] if missing else column).astype(np.float64)
    if not len(there):
        return missing, np.inf, -np.inf, 0.0, 0.0
    low, high, mean = there.min(), there.max(), there.mean()
    there -= mean
    return missing, low, high, mean, there @ there


def of_pixels(values: np.ndarray) -> Moments:
    """Of bytes, uint8 (pixels, channels), summed as integers, so exactly."""
    count, channels = values.shape
    total = values.sum(axis=0, dtype=np.int64)
    squares = np.array([np.square(values[:, channel], dtype=np.uint32).sum(dtype=np.int64) for channel in range(channels)])
    mean = total / max(count, 1)
    low, high = values.min(axis=0, initial=255).astype(float), values.max(axis=0, initial=0).astype(float)
    return Moments(count, np.zeros(channels, np.int64), low, high, mean, np.maximum(squares - total * mean, 0.0))


def finite(values: np.ndarray) -> np.ndarray:
    """0 for the extremes of a column without values."""
    return np.where(np.isfinite(values), values, 0.0)


def nonzero(spread: np.ndarray) -> np.ndarray:
    """A column that never varies is divided by 1."""
    return np.where(spread > 0, spread, 1.0)
