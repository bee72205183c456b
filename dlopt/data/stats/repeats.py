"""How many rows of a split equal one of train by chance, so that the guard speaks of leaks and not of what the data looks like.

Answers of a survey repeat because there are few that can be given; a photograph repeats because somebody has copied it. What tells
them apart is how likely two rows are to be equal though nobody copied one. From different rows one sees how often two agree in each
column. Were columns independent, the chances of all of them would multiply; as they are not, half of the columns' information (Renyi's
of order 2, in bits) is counted, though at least that of the most telling column. A text or an image is told in so many ways that none
repeats by chance, unless there are so few that each occurs RICH times on average.

What is not seen: rows of one or two columns of numbers that were copied, since as many rows of few values look the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from dlopt.data.kinds import kinds
from dlopt.part import Feature

SAMPLE_ROWS, SAMPLE_CELLS = 2048, 2**19
"""Different rows that are compared of each range, fewer for many columns."""
RICH = 4


@dataclass(frozen=True)
class Repeats:
    """How often rows repeat, and how often different ones agree in a column."""

    rows: int
    distinct: int
    """Different ones among these rows."""
    pairs: int
    """Pairs of different rows that were compared."""
    equal: np.ndarray
    """How many of these pairs agree in each column of numbers, dates or categories, int64 (columns,)."""
    rich: bool
    """Whether there are texts or images besides."""

    def merge(self, other: Repeats) -> Repeats:
        """Of two ranges, which have no row in common."""
        return Repeats(
            self.rows + other.rows, self.distinct + other.distinct, self.pairs + other.pairs, self.equal + other.equal, self.rich
        )

    @property
    def chance(self) -> float:
        """The chance that a row equals another one, from above. In no column do two agree less than if each row had a value of its own."""
        if self.rich and self.rows < RICH * self.distinct:
            return 0.0
        shares = np.maximum(self.equal / max(self.pairs, 1), 1 / max(self.distinct, 1))
        told = [*(-np.log2(shares)).tolist(), *([math.log2(max(self.distinct, 1))] if self.rich else [])]
        return float(2.0 ** -max([*told, sum(told) / 2]))

    def expected(self, rows: int, train: int) -> float:
        """How many of so many rows equal one of so many rows of train by chance, at most."""
        return rows * min(1.0, train * self.chance)


def repeats(table: pa.Table, features: Sequence[Feature], rows: np.ndarray, keys: np.ndarray) -> Repeats:
    """Of some rows of a table, int64 (rows,), in the order of their keys, uint64 (rows, 2)."""
    first = np.flatnonzero(np.append(True, (keys[1:] != keys[:-1]).any(axis=1))[: len(keys)])
    asked = [(feature, kinds[feature.kind]) for feature in features]
    width = sum(len(kind.names(feature)) for feature, kind in asked)
    some = first[:: max(1, math.ceil(len(first) / max(64, min(SAMPLE_ROWS, SAMPLE_CELLS // max(width, 1)))))]
    plain = [name for feature, kind in asked if not kind.rich for name in kind.pieces(feature)]
    chosen = table.select(plain).take(pa.array(rows[some]))
    equal = [_equal_pairs(column) for feature, kind in asked if not kind.rich for column in kind.comparable(feature, chosen)]
    rich = any(kind.rich for _, kind in asked)
    return Repeats(len(keys), len(first), len(some) * (len(some) - 1) // 2, np.array(equal, dtype=np.int64), rich)


def _equal_pairs(column: np.ndarray) -> int:
    """How many pairs of rows are equal; missing ones are."""
    counts = np.unique(column, return_counts=True)[1].astype(np.int64)
    return int((counts * (counts - 1) // 2).sum())
