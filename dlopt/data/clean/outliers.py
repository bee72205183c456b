"""Values far from the others of their column, by what the training rows say."""

from __future__ import annotations

from typing import Literal, Self

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from dlopt.data.clean.base import ColumnCleaning

RESOLUTION = 2.0**-22
"""A spread that is a smaller part of the column's values is rounding."""


class Outliers(ColumnCleaning):
    """Numbers far from the others. The bounds are fitted on the training rows, before any of them is dropped, and hold for all."""

    kind: Literal["outliers"] = "outliers"
    columns: tuple[str, ...] = Field(min_length=1)
    """Columns of number inputs."""
    method: Literal["zscore", "iqr", "quantile"] = "iqr"
    """Where the bounds are: zscore, mean +- factor x standard deviation; iqr, the quartiles -+ factor x the distance between them (Tukey's
    fences); quantile, the quantiles low and high. A column without any spread has no bounds."""
    factor: float | None = Field(None, gt=0)
    """How far from the mean or the quartiles; by default 3 for zscore and 1.5 for iqr."""
    low: float = Field(0.01, ge=0, lt=1)
    """The quantile below which values are outliers."""
    high: float = Field(0.99, gt=0, le=1)
    """The quantile above which values are outliers."""
    action: Literal["drop", "cap", "missing"] = "drop"
    """drop the row; cap: the bound takes the value's place; missing: the value is filled as missing ones are. The last two happen in the
    model, so also to rows that it is asked about."""

    @model_validator(mode="after")
    def settings_are_of_the_method(self) -> Self:
        fields = type(self).model_fields
        if self.method == "quantile" and self.factor is not None:
            raise ValueError("method quantile has no factor: set low and high")
        if self.method != "quantile" and (self.low, self.high) != (fields["low"].default, fields["high"].default):
            raise ValueError(f"low and high are of method quantile, not of {self.method}: set factor")
        if self.low >= self.high:
            raise ValueError(f"low {self.low:g} is not below high {self.high:g}")
        return self

    @property
    def title(self) -> str:
        return f"outliers ({self.method}) of {', '.join(self.columns)}"

    def bounds(
        self, mean: np.ndarray, std: np.ndarray, q25: np.ndarray, q75: np.ndarray, low_q: np.ndarray, high_q: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The least and greatest value that is no outlier, float64 of shape (columns,); infinite where there is no bound.

        All arguments are of shape (columns,): statistics of the training rows, low_q and high_q their quantiles `low` and `high`.
        """
        if self.method == "quantile":
            return np.asarray(low_q, np.float64), np.asarray(high_q, np.float64)
        if self.method == "zscore":
            lower, upper, spread = mean, mean, np.asarray(std, np.float64)
        else:
            lower, upper, spread = q25, q75, np.asarray(q75, np.float64) - q25
        reach = np.where(spread > RESOLUTION * np.maximum(np.abs(lower), np.abs(upper)), spread * self._factor, np.inf)
        return lower - reach, upper + reach

    def judge(self, values: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
        """Which values are outliers, bool of the shape of values (rows, columns); a missing one is none. lower, upper: (columns,)."""
        return (values < lower) | (values > upper)

    def reasons(self, outliers: np.ndarray) -> pa.Array:
        """Why each row is to be dropped, as strings of shape (rows,); null for a row that stays. outliers: as `judge` finds them."""
        which = np.where(outliers.any(axis=1), outliers.argmax(axis=1), len(self.columns))
        return pa.array([*(f"{name}: outlier by {self.method}" for name in self.columns), None], pa.string()).take(pa.array(which))

    @property
    def _factor(self) -> float:
        return self.factor if self.factor is not None else {"zscore": 3.0, "iqr": 1.5}.get(self.method, 0.0)
