"""Vectors: flat lists of numbers, all of one length, such as embeddings that another model has made."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, Literal

import numpy as np
from pydantic import Field

from dlopt.data.kinds.base import Bound, Cells, Matrix, RawColumns, side_by_side
from dlopt.data.kinds.number import as_tensor, in_units
from dlopt.data.stats import column as profile
from dlopt.data.stats import moments
from dlopt.data.stats.moments import Moments
from dlopt.data.types.arrow import pa, pc
from dlopt.data.types.canonical import as_number
from dlopt.data.types.exact import exact_column, raw_values, values_of
from dlopt.data.types.values import TOO_LARGE, Reasons, doubles, is_text, plain, without_empty
from dlopt.part import DloptError, Feature, Statistics

SHOWN = 6
"""Numbers that people are shown of a vector."""


class VectorInput(Matrix):
    """A column of lists of numbers, all of one length, as one input of the model. A text is read as JSON writes a list: "[0.5, 1]"."""

    rich = nested = True
    alone = together = False
    unit = "length of the vector"
    checks = ()
    countable = False

    kind: Literal["vector"] = "vector"
    column: str = "vector"
    """The column; also the name of the model's input."""
    size: int | None = Field(None, ge=1)
    """How many numbers each list has; without it as many as most of the first rows have."""
    normalize: Literal["min_max", "symmetric", "standard", "max_abs", "none"] = "standard"
    """How the model scales each number, by statistics of the training split; none leaves vectors as they are, which some that are made
    to be compared by their angle want. A missing vector becomes the mean."""

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    @property
    def tensor(self) -> str:
        """The name of the model's input."""
        return self.column

    def feature(self, table: pa.Table) -> Feature:
        """The tensor. Raises DloptError when no row has such a list."""
        sizes = _sizes(table[self.column])
        if not sizes:
            raise DloptError(f"data.inputs: column {self.column!r} holds no list of numbers in its first {len(table)} rows")
        size = self.size or sizes.most_common(1)[0][0]
        return Feature(name=self.column, kind="vector", dtype="float32", shape=(size,), columns=(self.column,))

    def decided(self, table: pa.Table) -> str:
        sizes = _sizes(table[self.column])
        if self.size is not None or len(sizes) < 2:
            return ""
        return f"{self.column}: lists of other than {sizes.most_common(1)[0][0]} numbers are set aside"

    def read(self, table: pa.Table, feature: Feature) -> tuple[dict[str, pa.Array], Reasons]:
        """A matrix with NaN in rows without a vector, and the reason for every row that has another value."""
        values, wrong = _matrix(table[self.column], feature.size)
        return {feature.name: exact_column(values)}, {row: f"{self.column}: {why}" for row, why in wrong.items()}

    def observe(self, table: pa.Table, feature: Feature, bounds: Any) -> Moments:
        return moments.of_values(values_of(table[feature.name], feature))

    def fit(
        self, seen: Moments, feature: Feature, features: Mapping[str, Feature], bounds: Mapping[str, Bound] = {}
    ) -> tuple[Feature, Statistics]:
        return feature, in_units(seen.statistics(self.normalize), feature)

    @staticmethod
    def names(feature: Feature) -> tuple[str, ...]:
        return tuple(f"{feature.name}[{place}]" for place in range(feature.size))

    @staticmethod
    def comparable(feature: Feature, table: pa.Table) -> list[np.ndarray]:
        return []

    @classmethod
    def profiled(cls, feature: Feature, table: pa.Table) -> dict[str, tuple[str, Any]]:
        return {feature.name: ("vector", raw_values(table[feature.name], feature.size))}

    @classmethod
    def readable(cls, feature: Feature, table: pa.Table) -> dict[str, Any]:
        values = raw_values(table[feature.name], feature.size)
        return {feature.name: pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), feature.size)}

    @classmethod
    def encode(cls, feature: Feature, columns: RawColumns) -> np.ndarray:
        side_by_side(feature, columns)
        column, found = feature.columns[0], list[Any]()
        given = columns[column]
        if isinstance(given, np.ndarray) and given.dtype.kind in "iuf" and given.shape == (len(given), feature.size) and _fits(given):
            return as_tensor(feature, given, (column,) * feature.size)
        for index, value in enumerate(given):
            if value is None or (isinstance(value, str) and value in ("", *feature.markers)):
                found.append([np.nan] * feature.size)
                continue
            try:
                found.append(_numbers(value, feature.size))
            except DloptError as error:
                raise DloptError(f"row {index}: {column}: {error}") from None
        return as_tensor(feature, found, (column,) * feature.size)

    @staticmethod
    def sent(feature: Feature) -> tuple[str, tuple[int, ...]]:
        return feature.dtype, feature.shape

    @staticmethod
    def example(feature: Feature, place: int) -> Any:
        return [1.5] * feature.size

    @staticmethod
    def describe(feature: Feature) -> str:
        return f"a vector of {feature.size}"

    @classmethod
    def headings(cls, feature: Feature) -> Sequence[str]:
        return feature.columns

    @staticmethod
    def cells(feature: Feature, values: np.ndarray) -> Cells:
        more = ", …" if feature.size > SHOWN else ""
        return [["missing" if row[0] != row[0] else ", ".join(f"{x:.4g}" for x in row) + more] for row in values[:, :SHOWN].tolist()]

    @staticmethod
    def widgets(feature: Feature) -> list[dict[str, Any]]:
        return [{"column": feature.columns[0], "widget": "list", "size": feature.size}]

    @staticmethod
    def recognises(values: Sequence[Any]) -> bool:
        lists = all(isinstance(value, list) for value in values)
        return lists and len({len(value) for value in values}) == 1 and len(values[0]) > 1 and not _strange(values)

    @staticmethod
    def summary(column: Any, step: int, points: int) -> profile.Column:
        """Of raw lists those of the usual size count; others are unreadable."""
        rows = len(column)
        if isinstance(column, np.ndarray):
            values, unreadable = column, 0
        else:
            size = next(iter(_sizes(column).most_common(1)), (1, 0))[0]
            values, wrong = _matrix(column, size)
            unreadable = len(wrong)
        there = values[~np.isnan(values).any(axis=1)]
        looked = there[:: max(1, step)]
        found = profile.Column("vector", rows=rows, missing=rows - len(there), unreadable=unreadable, seen=len(looked), whole=False)
        lengths = np.sqrt(np.square(looked, dtype=np.float64).sum(axis=1))
        return profile.measured(replace(found, counts={f"{values.shape[1]} numbers": len(looked)}), lengths, points)

    @staticmethod
    def typical(figures: Mapping[str, Any]) -> str:
        return f"{figures['frequent'][0][0]}, length {figures['mean']:.4g}" if figures["frequent"] else ""

    @staticmethod
    def sampled(column: Any) -> np.ndarray:
        """Their lengths."""
        values = column if isinstance(column, np.ndarray) else _matrix(column, next(iter(_sizes(column).most_common(1)), (1, 0))[0])[0]
        return np.sqrt(np.square(values, dtype=np.float64).sum(axis=1))


def _sizes(column: pa.ChunkedArray | pa.Array) -> Counter[int]:
    """How many lists of numbers have how many."""
    array = without_empty(plain(column)).drop_null()
    if is_text(array.type):
        return Counter(len(value) for value in map(_parsed, array.to_pylist()) if isinstance(value, list) and value)
    if not _is_list(array.type):
        return Counter()
    found = pc.value_counts(pc.list_value_length(array))
    return Counter({value["values"]: value["counts"] for value in found.to_pylist() if value["values"]})


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _matrix(column: pa.ChunkedArray | pa.Array, size: int) -> tuple[np.ndarray, Reasons]:
    """Lists of numbers, or texts of such, as float64 (rows, size), NaN in rows without one; and why other rows are none."""
    array = without_empty(plain(column))
    values = np.full((len(array), size), np.nan)
    there = np.flatnonzero(array.is_valid().to_numpy(zero_copy_only=False))
    fits = there
    if _is_list(array.type):
        fits = there[pc.equal(pc.list_value_length(array), size).fill_null(False).to_numpy(zero_copy_only=False)[there]]
        numbers, strange = doubles(array.take(pa.array(fits)).flatten())
        found = numbers.reshape(-1, size) + 0.0
        good: np.ndarray = np.all(np.abs(found) < TOO_LARGE, axis=1)
        good[np.unique(np.fromiter(strange, np.int64, len(strange)) // size)] = False
        values[fits[good]] = found[good]
        there = np.setdiff1d(there, fits[good])
    reasons: Reasons = {}
    for row, value in zip(there.tolist(), array.take(pa.array(there)).to_pylist(), strict=True):
        try:
            values[row] = _numbers(value, size)
        except DloptError as error:
            reasons[row] = str(error)
    return values, reasons


def _fits(values: np.ndarray) -> bool:
    """Whether all are numbers that float32 reaches."""
    return bool((np.abs(values) < TOO_LARGE).all())


def _numbers(value: Any, size: int) -> list[float]:
    """One value, be it of a file or of a request. Raises DloptError saying why it is no vector of this size."""
    value = value.tolist() if isinstance(value, np.ndarray) else _parsed(value)
    if not isinstance(value, (list, tuple)):
        raise DloptError(f"{value!r:.40} is not a list of {size} numbers")
    if len(value) != size:
        raise DloptError(f"a list of {len(value)} where {size} numbers are needed")
    if set(map(type, value)) <= {int, float} and all(abs(one) < TOO_LARGE for one in value):
        return list(value)
    return [_number(one, place) for place, one in enumerate(value)]


def _number(value: Any, place: int) -> float:
    try:
        number = as_number(value)
    except ValueError:
        number = math.nan
    if number != number:
        raise DloptError(f"{value!r:.40} in place {place} is not a number")
    if abs(number) >= TOO_LARGE:
        raise DloptError(f"a number is too large in place {place}")
    return number


def _parsed(value: Any) -> Any:
    """A text as the JSON that it is, or as it is."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def _strange(values: Sequence[Sequence[Any]]) -> bool:
    """Whether something in some lists is no number."""
    return not set(map(type, chain.from_iterable(values))) <= {int, float}
