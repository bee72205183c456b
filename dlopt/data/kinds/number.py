"""Numbers: what is missing, what is an outlier, and how they are scaled; all of it is fitted here and computed in the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, field_validator

from dlopt.data.prepared import SEPARATOR
from dlopt.data.stats import moments
from dlopt.data.stats.moments import Moments, nonzero
from dlopt.data.stats.quantiles import Quantiles
from dlopt.data.types.exact import exact_column, values_of
from dlopt.data.types.values import Reasons, numbers
from dlopt.part import DloptError, Feature, Part, Statistics, Target

Normalization = Literal["min_max", "symmetric", "standard", "robust", "max_abs", "log", "quantile", "none"]
KNOTS = 64
"""Steps of the quantile normalization."""
MOST_VALUES = 2**16
"""Different values that are counted of each column for its most frequent one."""
MEDIAN, QUARTILES = 0.5, (0.25, 0.75)


class GroupMedian(Part):
    """The median of the training rows that have the same value in another column; over all rows for a value without any."""

    kind: Literal["group_median"] = "group_median"
    by: str
    """A column of a category input."""


class Bound(Part):
    """Where the outliers of a column begin."""

    lower: float
    upper: float
    action: Literal["drop", "cap", "missing"]

    def apply(self, values: np.ndarray) -> np.ndarray:
        """What the model makes of values, float32: it never sees those that are dropped."""
        if self.action == "missing":
            return np.where((values < self.lower) | (values > self.upper), np.float32(np.nan), values)
        return values.clip(np.float32(self.lower), np.float32(self.upper)) if self.action == "cap" else values


class NumberInput(Part):
    """Columns of numbers, put together as one input of the model."""

    kind: Literal["number"] = "number"
    columns: tuple[str, ...] = Field(min_length=1)
    """The columns."""
    name: str = "numbers"
    """The name of the model's input."""
    fill: Literal["mean", "median", "most_frequent", "zero"] | float | GroupMedian = "mean"
    """What the model puts in place of a missing value: a statistic of the training split, a number, or {kind: group_median, by: column}."""
    indicators: bool = False
    """Whether the model also sees, for each column, whether the value is missing."""
    normalize: Normalization = "standard"
    """How the model scales each column, by statistics of the training split: min_max to [0, 1], symmetric to [-1, 1], standard to mean 0
    and deviation 1, robust by median and quartiles, max_abs by the greatest magnitude, log: standard of sign(x) log(1 + |x|), quantile:
    its place among the values, in [0, 1]."""
    clip: float | None = Field(None, gt=0)
    """Scaled values are cut off at this, on both sides."""

    @field_validator("columns")
    @classmethod
    def columns_differ(cls, columns: tuple[str, ...]) -> tuple[str, ...]:
        return no_column_twice(columns)

    @property
    def tensor(self) -> str:
        """The name of the model's input."""
        return self.name

    @property
    def shifts(self) -> bool:
        """Whether an offset may be subtracted before: not where the size of a number itself is what the model is to see."""
        return self.normalize not in ("log", "max_abs", "none")

    def feature(self, table: pa.Table) -> Feature:
        return Feature(
            name=self.name, kind="number", dtype="float32", shape=(len(self.columns),), columns=self.columns, indicators=self.indicators
        )

    def read(self, table: pa.Table, feature: Feature) -> tuple[dict[str, pa.Array], Reasons]:
        """A matrix with NaN where missing, and the reason for every row that has something else than numbers."""
        values = np.empty((len(table), len(feature.columns)))
        reasons: Reasons = {}
        for index, name in enumerate(feature.columns):
            values[:, index], wrong = numbers(table[name])
            reasons.update({row: f"{name}: {why}" for row, why in wrong.items() if row not in reasons})
        return {feature.name: exact_column(values)}, reasons

    def observe(self, table: pa.Table, feature: Feature, bounds: Mapping[str, Bound]) -> Numbers:
        """What training rows say of each column."""
        values = bounded(values_of(table[feature.name], feature), feature, bounds)
        wanted = [MEDIAN] if self.fill == "median" else []
        wanted += [MEDIAN, *QUARTILES] if self.normalize == "robust" else []
        wanted += [step / KNOTS for step in range(KNOTS + 1)] if self.normalize == "quantile" else []
        groups = isinstance(self.fill, GroupMedian)
        return Numbers(
            moments.of_values(values),
            moments.of_values(_signed_log(values)) if self.normalize == "log" else None,
            Quantiles.of(values, wanted) if wanted or groups else None,
            Frequent.of(values) if self.fill == "most_frequent" else None,
            _by_group(values, group_column(table, self.fill.by)) if isinstance(self.fill, GroupMedian) else None,
        )

    def fit(
        self, seen: Numbers, feature: Feature, features: dict[str, Feature], bounds: Mapping[str, Bound] = {}
    ) -> tuple[Feature, Statistics]:
        """The statistics that the model's first layer is made of."""
        base = in_units(seen.moments.statistics("none" if self.normalize in ("robust", "log", "quantile") else self.normalize), feature)
        changed: dict[str, Any] = {"fill": self._fill(seen, feature).tolist(), "clip": self.clip}
        if self.normalize == "robust" and seen.quantiles:
            low, high = (seen.quantiles.at(p) for p in QUARTILES)
            changed |= {"shift": seen.quantiles.at(MEDIAN).tolist(), "scale": (1 / nonzero(high - low)).tolist()}
        elif self.normalize == "log" and seen.log:
            logs = seen.log.statistics("standard")
            changed |= {"log": True, "shift": logs.shift, "scale": logs.scale}
        elif self.normalize == "quantile" and seen.quantiles:
            knots = np.stack([seen.quantiles.at(step / KNOTS) for step in range(KNOTS + 1)], axis=1)
            changed |= {"knots": knots.tolist()}
        changed |= _as_statistics(feature, bounds)
        if isinstance(self.fill, GroupMedian):
            changed |= self._group_fill(seen, self.fill.by, feature, features)
        return feature, Statistics.model_validate(base.model_dump() | changed)

    def finish(self, table: pa.Table, feature: Feature) -> np.ndarray:
        """The matrix, float32 (rows, columns)."""
        return values_of(table[feature.name], feature)

    def _fill(self, seen: Numbers, feature: Feature) -> np.ndarray:
        if isinstance(self.fill, float) or self.fill == "zero":
            number = self.fill if isinstance(self.fill, float) else 0.0
            return np.full_like(seen.moments.mean, number) - (feature.offsets or 0.0)
        if self.fill == "most_frequent" and seen.counts:
            return seen.counts.first
        return seen.quantiles.at(MEDIAN) if seen.quantiles and self.fill != "mean" else seen.moments.mean

    def _group_fill(self, seen: Numbers, by: str, feature: Feature, features: dict[str, Feature]) -> dict[str, Any]:
        """A row of fills for each code of the grouping column."""
        category = next(feature for feature in features.values() if feature.kind == "category" and by in feature.columns)
        place, default = category.columns.index(by), self._fill(seen, feature)
        fills = np.tile(default, (category.codes[place], 1))
        codes = {value: code for code, value in enumerate(category.vocabularies[place], start=1)}
        for value, quantiles in (seen.groups or {}).items():
            if code := codes.get(value):
                there = np.array([len(values) > 0 for values in quantiles.values])
                fills[code] = np.where(there, quantiles.at(MEDIAN), default)
        return {"fill_by": by, "group_fill": fills.tolist()}


@dataclass(frozen=True)
class Numbers:
    """What some training rows say of the columns of a number input: only what its settings ask for."""

    moments: Moments
    log: Moments | None
    quantiles: Quantiles | None
    counts: Frequent | None
    groups: dict[str, Quantiles] | None

    def merge(self, other: Numbers) -> Numbers:
        return Numbers(
            self.moments.merge(other.moments),
            self.log.merge(other.log) if self.log and other.log else None,
            self.quantiles.merge(other.quantiles) if self.quantiles and other.quantiles else None,
            self.counts.merge(other.counts) if self.counts and other.counts else None,
            _merged_groups(self.groups, other.groups) if self.groups is not None and other.groups is not None else None,
        )


@dataclass(frozen=True)
class Frequent:
    """The most frequent values of each column, at most MOST_VALUES of them, so that a column of any length takes bounded memory; exact
    while it has no more, and where it has, for every value that is among the most frequent of each piece."""

    values: list[np.ndarray]
    """float32, sorted."""
    counts: list[np.ndarray]

    @classmethod
    def of(cls, matrix: np.ndarray) -> Frequent:
        """Of a piece, float32 (rows, columns), NaN where missing."""
        found = [np.unique(column[~np.isnan(column)], return_counts=True) for column in matrix.T]
        return cls(*map(list, zip(*(_most(*pair) for pair in found), strict=True)))

    def merge(self, other: Frequent) -> Frequent:
        """Of two pieces together; in a fixed order, since what is left out depends on it."""
        found = []
        for mine, yours, my_counts, your_counts in zip(self.values, other.values, self.counts, other.counts, strict=True):
            values, place = np.unique(np.concatenate([mine, yours]), return_inverse=True)
            counts = np.zeros(len(values), np.int64)
            np.add.at(counts, place, np.concatenate([my_counts, your_counts]))
            found.append(_most(values, counts))
        return Frequent(*map(list, zip(*found, strict=True)))

    @property
    def first(self) -> np.ndarray:
        """The most frequent value of each column, float64 (columns,), the least of several; 0 where there is none."""
        pairs = zip(self.values, self.counts, strict=True)
        return np.array([float(values[counts.argmax()]) if len(values) else 0.0 for values, counts in pairs])


def _most(values: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The most frequent of the sorted values, the lesser ones of those that are as frequent."""
    if len(values) <= MOST_VALUES:
        return values, counts
    kept = np.sort(np.argsort(-counts, kind="stable")[:MOST_VALUES])
    return values[kept], counts[kept]


def bounded(values: np.ndarray, feature: Feature, bounds: Mapping[str, Bound]) -> np.ndarray:
    """Values (rows, columns) as the model sees them, outliers capped or missing."""
    if not any(column in bounds for column in feature.columns):
        return values
    columns = [
        bounds[column].apply(values[:, index]) if column in bounds else values[:, index] for index, column in enumerate(feature.columns)
    ]
    return np.stack(columns, axis=1)


def in_units(statistics: Statistics, known: Feature | Target) -> Statistics:
    """Least, greatest and mean value with the offsets that were subtracted from what they are of."""
    if not known.offsets:
        return statistics
    units = {name: tuple((np.array(getattr(statistics, name)) + known.offsets).tolist()) for name in ("min", "max", "mean")}
    return statistics.model_copy(update=units)


def no_column_twice(columns: tuple[str, ...]) -> tuple[str, ...]:
    """Raises ValueError, as a pydantic validator does."""
    twice = [column for column in columns if columns.count(column) > 1]
    if twice:
        raise ValueError(f"column {twice[0]!r} is named twice")
    return columns


def group_column(table: pa.Table, by: str) -> pa.Array:
    """The column of categories called `by` among rows on their way through prepare."""
    names = [name for name in table.column_names if name.partition(SEPARATOR)[1:] == (SEPARATOR, by)]
    if not names:
        raise DloptError(f"data.inputs: fill.by {by!r} is not a column of a category input")
    return table[names[0]].combine_chunks()


def _as_statistics(feature: Feature, bounds: Mapping[str, Bound]) -> dict[str, Any]:
    mine = [bounds.get(column) for column in feature.columns]
    kept = [bound for bound in mine if bound and bound.action != "drop"]
    if not kept:
        return {}
    lower = [bound.lower if bound and bound.action != "drop" else None for bound in mine]
    upper = [bound.upper if bound and bound.action != "drop" else None for bound in mine]
    return {"lower": lower, "upper": upper, "outside": kept[0].action}


def _signed_log(values: np.ndarray) -> np.ndarray:
    """In float64: the logarithms of large values are close together."""
    values = values.astype(np.float64)
    return np.sign(values) * np.log1p(np.abs(values))


def _by_group(values: np.ndarray, groups: pa.Array) -> dict[str, Quantiles]:
    encoded = groups.dictionary_encode()
    codes = encoded.indices.to_numpy()
    order = np.argsort(codes, kind="stable")
    ends = np.searchsorted(codes[order], np.arange(len(encoded.dictionary) + 1))
    return {
        str(encoded.dictionary[code].as_py()): Quantiles.of(values[order[ends[code] : ends[code + 1]]], [MEDIAN])
        for code in range(len(encoded.dictionary))
    }


def _merged_groups(mine: dict[str, Quantiles], yours: dict[str, Quantiles]) -> dict[str, Quantiles]:
    both = {name: quantiles.merge(yours[name]) if name in yours else quantiles for name, quantiles in mine.items()}
    return both | {name: quantiles for name, quantiles in yours.items() if name not in mine}
