"""Count, extremes, mean and spread of columns, summed in parts and merged in a fixed order.

Merging of means and squared deviations: Chan, Golub, LeVeque 1983, "Algorithms for computing the sample variance", eq. 2.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from dlopt.data.inputs import NORMALIZATIONS, ImageInput, NumberInput
from dlopt.data.prepared import feature_array
from dlopt.part import Feature, Statistics


@dataclass(frozen=True)
class Moments:
    """Per channel or column: values, missing ones, extremes, mean and sum of squared deviations of those that are there."""

    count: int
    missing: list[int]
    min: list[float | None]
    max: list[float | None]
    mean: list[float]
    squares: list[float]

    def statistics(self, part: ImageInput | NumberInput) -> Statistics:
        """What the model needs: extremes, mean, deviation, and the fill, shift and scale that the job asks for."""
        seen = self.count - np.array(self.missing)
        low, high = _or_zero(self.min), _or_zero(self.max)
        mean, std = np.array(self.mean), np.sqrt(np.array(self.squares) / np.maximum(seen, 1))
        shift, scale = NORMALIZATIONS[part.normalize](low, high, mean, std)
        fill = mean if isinstance(part, ImageInput) or part.fill == "mean" else np.zeros_like(mean)
        lists = {"min": low, "max": high, "mean": mean, "std": std, "fill": fill, "shift": shift, "scale": scale}
        return Statistics(count=self.count, missing=tuple(self.missing), **{name: tuple(array.tolist()) for name, array in lists.items()})


def of(feature: Feature, table: pa.Table) -> Moments:
    """Moments of a part of the training split; images are summed as integers, so exactly."""
    values = feature_array(feature, table)
    if feature.kind == "image":
        return _of_pixels(values.reshape(-1, feature.shape[2]))
    missing = np.isnan(values)
    seen = np.maximum(len(values) - missing.sum(axis=0), 1)
    present = np.where(missing, 0.0, values.astype(np.float64))
    mean = present.sum(axis=0) / seen
    squares = np.where(missing, 0.0, (present - mean) ** 2).sum(axis=0)
    low, high = np.where(missing, np.inf, values).min(axis=0), np.where(missing, -np.inf, values).max(axis=0)
    return Moments(len(values), missing.sum(axis=0).tolist(), _finite(low), _finite(high), mean.tolist(), squares.tolist())


def merge(parts: Sequence[Moments]) -> Moments:
    """Moments of all parts together, added up in the given order."""
    total = parts[0]
    for part in parts[1:]:
        total = _merge_two(total, part)
    return total


def _of_pixels(values: np.ndarray) -> Moments:
    count = len(values)
    total = values.sum(axis=0, dtype=np.int64)
    squares = np.array([np.square(values[:, channel], dtype=np.uint32).sum(dtype=np.int64) for channel in range(values.shape[1])])
    mean = total / count
    return Moments(
        count,
        [0] * values.shape[1],
        values.min(axis=0).astype(float).tolist(),
        values.max(axis=0).astype(float).tolist(),
        mean.tolist(),
        np.maximum(squares - total * mean, 0.0).tolist(),
    )


def _merge_two(a: Moments, b: Moments) -> Moments:
    seen_a, seen_b = a.count - np.array(a.missing), b.count - np.array(b.missing)
    seen = np.maximum(seen_a + seen_b, 1)
    difference = np.array(b.mean) - np.array(a.mean)
    return Moments(
        a.count + b.count,
        (np.array(a.missing) + np.array(b.missing)).tolist(),
        _either(min, a.min, b.min),
        _either(max, a.max, b.max),
        np.where(seen_a == 0, b.mean, np.array(a.mean) + difference * seen_b / seen).tolist(),
        (np.array(a.squares) + np.array(b.squares) + difference**2 * seen_a * seen_b / seen).tolist(),
    )


def _either(choose: object, a: list[float | None], b: list[float | None]) -> list[float | None]:
    assert callable(choose)
    return [choose([value for value in pair if value is not None], default=None) for pair in zip(a, b, strict=True)]


def _finite(values: np.ndarray) -> list[float | None]:
    """JSON has no infinity: None stands for a column without values."""
    return [float(value) if np.isfinite(value) else None for value in values]


def _or_zero(values: list[float | None]) -> np.ndarray:
    return np.array([0.0 if value is None else value for value in values])
