"""What columns look like: summaries of pieces of a table that are bounded in size, travel as JSON and merge to that of the whole.

Of each column there is a `Column`; of at most SAMPLE_ROWS random rows the values themselves are kept, so that columns can be compared
with the target.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from dlopt.data.counter import bits, string_words
from dlopt.data.kinds import column_kinds
from dlopt.data.stats.column import Column, merge_columns, pack, unpack
from dlopt.data.types.exact import raw_values
from dlopt.data.types.values import plain
from dlopt.part import Feature, Target

LOOK_CELLS = 2**20
"""A piece of more rows times columns is looked at in every n-th row only; what is exact is still of all rows."""
POINTS, MOST_POINTS = 2048, 2**17
"""Points that are kept of a column that has more different numbers, fewer for many columns; each thinning moves a rank by at most
half a point's share, and pieces merged pairwise are thinned log2(pieces) times: 1 % at 10^6 pieces."""
SAMPLE_ROWS, SAMPLE_CELLS = 4096, 2**20
"""Rows of the sample, fewer for many columns."""

Columns = Mapping[str, Any]
"""Columns by name: Arrow arrays (of a pa.Table), or numpy arrays of numbers (rows,) and of images (rows, height, width, channels)."""


@dataclass(frozen=True)
class RowSample:
    """Random rows, those with the smallest random keys, so that samples of pieces merge to one of the whole."""

    names: list[str]
    keys: bytes
    """uint64 (rows,), sorted."""
    values: bytes
    """uint32 (columns, rows): numbers as float32, NaN where missing; hashes of categories and texts, 0 where missing."""

    def __len__(self) -> int:
        return len(self.keys) // 8

    def column(self, name: str, kind: str) -> np.ndarray:
        """Values of the rows, in the order of their keys: float64 with NaN, or uint32 of categories and texts."""
        values = self._matrix[self.names.index(name)]
        return values.view(np.float32).astype(np.float64) if column_kinds[kind].ranked else values

    def merge(self, other: RowSample) -> RowSample:
        keys = np.frombuffer(self.keys + other.keys, np.uint64)
        kept = np.argsort(keys, kind="stable")[: _sample_rows(len(self.names))]
        values = np.concatenate([self._matrix, other._matrix], axis=1)[:, kept]
        return RowSample(self.names, keys[kept].tobytes(), values.tobytes())

    @cached_property
    def _matrix(self) -> np.ndarray:
        return np.frombuffer(self.values, np.uint32).reshape(len(self.names), -1)


@dataclass(frozen=True)
class Summary:
    """What is known of a piece of a table, or of all of it."""

    rows: int
    columns: dict[str, Column]
    sample: RowSample | None

    def to_json(self) -> str:
        return json.dumps(asdict(self), default=pack)

    @classmethod
    def from_json(cls, text: str) -> Summary:
        found = json.loads(text)
        columns = {name: Column(**_unpacked(column, "points", "sketch")) for name, column in found["columns"].items()}
        return cls(found["rows"], columns, RowSample(**_unpacked(found["sample"], "keys", "values")) if found["sample"] else None)

    def merge(self, other: Summary) -> Summary:
        points = _points(len(self.columns))
        columns = {name: merge_columns(column, other.columns[name], points) for name, column in self.columns.items()}
        sample = self.sample.merge(other.sample) if self.sample and other.sample else self.sample or other.sample
        return Summary(self.rows + other.rows, columns, sample)


def _unpacked(known: dict[str, Any], *names: str) -> dict[str, Any]:
    return known | {name: unpack(known[name]) for name in names}


def summarise(columns: Columns, kinds: Mapping[str, str], targets: Sequence[str] = ()) -> Summary:
    """Summary of a piece of a table.

    kinds: the columns to look at (the target's among them), each of the kind of an input, or multi_label.
    targets: columns to compare the others with; without any, no rows are kept. The piece's rows may come in any order.
    """
    rows = len(columns[next(iter(kinds))])
    step = max(1, math.ceil(rows * len(kinds) / LOOK_CELLS))
    points = _points(len(kinds))
    found = {name: column_kinds[kind].summary(columns[name], step, points) for name, kind in kinds.items()}
    return Summary(rows, found, _sampled(columns, kinds, found, rows) if targets and rows else None)


def prepared_columns(
    features: Sequence[Feature], target: Target, table: pa.Table, goal: pa.ChunkedArray
) -> tuple[dict[str, Any], dict[str, str], tuple[str, ...]]:
    """Columns, kinds and targets for `summarise`, from rows on their way through prepare (see dlopt.data.kinds).

    Numbers and categories are columns of their own again; of dates there are the parts, as numbers; goal: the targets, as they are read.
    """
    found = {name: told for feature in features for name, told in column_kinds[feature.kind].profiled(feature, table).items()}
    if target.columns:
        matrix = raw_values(goal, target.size)
        found |= {name: ("number", matrix[:, index]) for index, name in enumerate(target.columns)}
    else:
        found[target.name] = target.kind, goal
    return {name: values for name, (_, values) in found.items()}, {name: kind for name, (kind, _) in found.items()}, target.names


def _sampled(columns: Columns, kinds: Mapping[str, str], found: Mapping[str, Column], rows: int) -> RowSample:
    """Random rows of a piece. The randomness comes from what the piece holds, so that pieces of one table have different keys."""
    (seed,) = string_words([repr([(c.mean, c.squares, pack(c.sketch), c.missing, c.rows) for c in found.values()])])
    keys = bits(np.arange(rows), 19, int(seed))
    size = min(rows, _sample_rows(len(kinds)))
    chosen = np.argpartition(keys, size - 1)[:size]
    chosen = chosen[np.argsort(keys[chosen])]
    values = [_bits(column_kinds[kind].sampled(_take(columns[name], chosen))) for name, kind in kinds.items()]
    return RowSample(list(kinds), keys[chosen].tobytes(), np.stack(values).tobytes())


def _sample_rows(columns: int) -> int:
    return max(256, min(SAMPLE_ROWS, SAMPLE_CELLS // columns))


def _take(column: Any, rows: np.ndarray) -> Any:
    return column[rows] if isinstance(column, np.ndarray) else plain(column.take(pa.array(rows)))


def _bits(values: np.ndarray) -> np.ndarray:
    """uint32 (rows,): numbers as the bits of a float32; hashes are that already."""
    with np.errstate(over="ignore"):
        return values if values.dtype == np.uint32 else values.astype(np.float32).view(np.uint32)


def _points(columns: int) -> int:
    return max(128, min(POINTS, MOST_POINTS // columns))
