"""Numbers: what is missing, what is an outlier, and how they are scaled; all of it is fitted here and computed in the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator

from dlopt.data.kinds.base import Bound, Matrix, RawColumns, bare, check_width, no_column_twice, no_rows, side_by_side
from dlopt.data.stats import column as profile
from dlopt.data.stats import moments
from dlopt.data.stats.moments import Moments, nonzero
from dlopt.data.stats.quantiles import Quantiles
from dlopt.data.types.arrow import pa
from dlopt.data.types.canonical import as_number
from dlopt.data.types.exact import exact_column, merged, raw_values, values_of
from dlopt.data.types.tensors import SEPARATOR, column_of
from dlopt.data.types.values import DIGITS, TOO_LARGE, Reasons, doubles, lost_in_double, numbers, plain
from dlopt.part import DloptError, Feature, Part, Statistics, Target

Normalization = Literal["min_max", "symmetric", "standard", "robust", "max_abs", "log", "quantile", "none"]
KNOTS = 64
"""Steps of the quantile normalization."""
MOST_VALUES = 2**16
"""Different values that are counted of each column for its most frequent one."""
MEDIAN, QUARTILES = 0.5, (0.25, 0.75)
PLAIN_NUMBERS = {int, float, type(None)}


class GroupMedian(Part):
    """The median of the training rows that have the same value in another column; over all rows for a value without any."""

    kind: Literal["group_median"] = "group_median"
    by: str
    """A column of a category input."""


class NumberInput(Matrix):
    """Columns of numbers, put together as one input of the model."""

    removable = True
    unit = "value"
    checks = ("identifier", "counter", "constant", "merged", "no_data")

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
    def bounded(self) -> tuple[str, ...]:
        return self.columns

    @property
    def fill_by(self) -> str | None:
        return self.fill.by if isinstance(self.fill, GroupMedian) else None

    def feature(self, table: pa.Table) -> Feature:
        return Feature(
            name=self.name, kind="number", dtype="float32", shape=(len(self.columns),), columns=self.columns, indicators=self.indicators
        )

    def read(self, table: pa.Table, feature: Feature) -> tuple[dict[str, pa.Array], Reasons]:
        """A matrix with NaN where missing, and the reason for every row that has something else than numbers."""
        values = np.empty((len(feature.columns), len(table)))
        reasons: Reasons = {}
        for index, name in enumerate(feature.columns):
            values[index], wrong = numbers(table[name])
            reasons.update({row: f"{name}: {why}" for row, why in wrong.items() if row not in reasons})
        return {feature.name: exact_column(values.T)}, reasons

    def lost(self, raw: pa.Table, read: pa.Array) -> list[np.ndarray | None]:
        return digits_lost(self.columns, raw, read)

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
        self, seen: Numbers, feature: Feature, features: Mapping[str, Feature], bounds: Mapping[str, Bound] = {}
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

    def narrowed(self, table: pa.Table, left_out: Sequence[str]) -> pa.Table:
        if self.name not in table.column_names:
            return table
        kept = [index for index, column in enumerate(self.columns) if column not in left_out]
        matrix = np.ascontiguousarray(raw_values(table[self.name], len(self.columns))[:, kept])
        return table.set_column(table.column_names.index(self.name), self.name, column_of(matrix))

    @staticmethod
    def names(feature: Feature) -> tuple[str, ...]:
        return feature.columns

    @staticmethod
    def absent(feature: Feature, table: pa.Table) -> dict[str, int]:
        missing = np.isnan(raw_values(table[feature.name], feature.size)).sum(axis=0)
        return dict(zip(feature.columns, missing.tolist(), strict=True))

    @classmethod
    def encode(cls, feature: Feature, columns: RawColumns) -> np.ndarray:
        values = side_by_side(feature, columns)
        if values is None:
            values = _rows_of([bare(columns[name]) for name in feature.columns])
        check_width(feature, values)
        if isinstance(values, np.ndarray) and values.dtype.kind not in "biuf":
            values = values.tolist()
        if isinstance(values, np.ndarray):
            return as_tensor(feature, values, feature.columns)
        if set(map(type, chain.from_iterable(values))) <= PLAIN_NUMBERS:
            numbers: Any = [[np.nan if value is None else value for value in row] for row in values]
        else:
            pairs = enumerate(values)
            numbers = [[_number(feature, *one, index) for one in zip(feature.columns, row, strict=True)] for index, row in pairs]
        return as_tensor(feature, numbers, feature.columns)

    @staticmethod
    def sent(feature: Feature) -> tuple[str, tuple[int, ...]]:
        return feature.dtype, ()

    @staticmethod
    def example(feature: Feature, place: int) -> Any:
        return 1.5

    @staticmethod
    def describe(feature: Feature) -> str:
        return f"{feature.size} number{'s' if feature.size > 1 else ''}"

    @staticmethod
    def widgets(feature: Feature) -> list[dict[str, Any]]:
        return [{"column": column, "widget": "number"} for column in feature.columns]

    @staticmethod
    def summary(column: Any, step: int, points: int) -> profile.Column:
        values, unreadable = _read_again(column)
        there = values[~np.isnan(values)]
        looked = there if step == 1 else values[::step][~np.isnan(values[::step])]
        different, counts = profile.counted(looked)
        found = profile.Column("number", numeric=True, rows=len(values), missing=len(values) - len(there), unreadable=unreadable)
        kept, weights = profile.thinned(different, counts.astype(np.float64), points)
        told = _told(column, step, different)
        return replace(
            found,
            seen=len(looked),
            **profile.moments(there),
            told=told,
            merged=told - len(different) + merged(different),
            whole=bool((different == np.rint(different)).all()),
            points=np.stack([kept, weights]).tobytes(),
            thinned=len(kept) < len(different),
            sketch=profile.registers(profile.number_hashes(different)).tobytes(),
        )

    @staticmethod
    def typical(figures: Mapping[str, Any]) -> str:
        return f"{figures['mean']:.4g} ± {figures['std']:.4g}" if figures["mean"] is not None else ""

    @staticmethod
    def sampled(column: Any) -> np.ndarray:
        return _read_again(column)[0]

    def _fill(self, seen: Numbers, feature: Feature) -> np.ndarray:
        if isinstance(self.fill, float) or self.fill == "zero":
            number = self.fill if isinstance(self.fill, float) else 0.0
            return np.full_like(seen.moments.mean, number) - (feature.offsets or 0.0)
        if self.fill == "most_frequent" and seen.counts:
            return seen.counts.first
        return seen.quantiles.at(MEDIAN) if seen.quantiles and self.fill != "mean" else seen.moments.mean

    def _group_fill(self, seen: Numbers, by: str, feature: Feature, features: Mapping[str, Feature]) -> dict[str, Any]:
        """A row of fills for each code of the grouping column."""
        category = next(feature for feature in features.values() if feature.holds == "codes" and by in feature.columns)
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


def digits_lost(columns: Sequence[str], raw: pa.Table, read: pa.Array) -> list[np.ndarray | None]:
    """Of each column what float64 does not hold of its numbers, or None. read: the matrix that was made of them."""
    values = raw_values(read, len(columns))
    return [lost_in_double(raw[column], values[:, index]) for index, column in enumerate(columns)]


def as_tensor(feature: Feature, rows: Sequence[Any] | np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Numbers of a request (rows, columns), NaN where missing, as the model takes them, float64 or float32. names: of the columns.
    Raises DloptError for one that is too large, in either."""
    if not len(rows):
        return no_rows(feature)
    try:
        found = np.array(rows, dtype=np.float64)
    except OverflowError:
        found = np.array([[as_number(value) for value in row] for row in rows])
    with np.errstate(over="ignore"):
        single = found.astype(np.float32)
    if np.isinf(single).any():
        row, place = np.argwhere(np.isinf(single))[0]
        raise DloptError(f"row {row}: {names[place]}: a number is too large")
    return found if feature.dtype == "float64" else single


def _rows_of(columns: list[Sequence[Any] | np.ndarray]) -> Sequence[Any] | np.ndarray:
    """Columns side by side."""
    if all(isinstance(values, np.ndarray) and values.dtype.kind in "biuf" for values in columns):
        return np.stack(columns, axis=1)
    return list(zip(*(values.tolist() if isinstance(values, np.ndarray) else values for values in columns), strict=True))


def _number(feature: Feature, column: str, value: Any, index: int) -> float:
    """One value as training reads it from a file: texts of numbers are numbers, true is 1, and what says so is missing."""
    if value is None or (isinstance(value, str) and (value == "" or value in feature.markers)):
        return np.nan
    try:
        return as_number(value)
    except ValueError:
        raise DloptError(f"row {index}: {column}: {value!r:.40} is not a number") from None


def _read_again(column: Any) -> tuple[np.ndarray, int]:
    """float64 with NaN for what is missing, no number or beyond what float32 holds; and how many values are of the last two."""
    if isinstance(column, np.ndarray):
        values, wrong = column.astype(np.float64), 0
    else:
        values, reasons = doubles(column)
        wrong = len(reasons)
    infinite = np.abs(values) >= TOO_LARGE
    if infinite.any():
        values, wrong = np.where(infinite, np.nan, values), wrong + int(infinite.sum())
    return values + 0.0, wrong  # no negative zero


def _told(column: Any, step: int, different: np.ndarray) -> int:
    """How many different numbers a column says: more than as float64 where whole ones have more than 53 bits."""
    if isinstance(column, np.ndarray) or not len(different) or np.abs(different[[0, -1]]).max() < DIGITS:
        return len(different)
    array = plain(column)[::step]
    values, _ = doubles(array)
    rest = lost_in_double(array, values)
    there = np.abs(values) < TOO_LARGE
    return len(different) if rest is None else len(np.unique(np.stack([values[there], rest[there]]), axis=1).T)
