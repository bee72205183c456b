"""What prepare has decided so far, and what follows from it for the rows of one range of keys: which are kept, and in which split.

Each range is a file of rows in the order of their keys (see ranges.py). Each pass goes over all ranges, each on its own, and asks here
for the columns that it needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dlopt.data.clean import Outliers
from dlopt.data.kinds.base import Bound
from dlopt.data.section import Data
from dlopt.data.table.ranges import ORIGIN
from dlopt.data.table.spill import HIGH, LOW, SIDE, TARGET, is_local, open_rows
from dlopt.data.table.split import NAMES, ByRow, GivenSplit, Hashed, StratifiedSplit
from dlopt.data.types.exact import raw_values, shifted
from dlopt.part import Feature, Target

KEEP = -1
"""In `Selected.dropped`: a row that stays."""


@dataclass(frozen=True)
class Origin:
    """A source, and the split that its rows are for, if that is settled."""

    where: str
    """data.source, data.validation or data.test."""
    split: str | None


@dataclass(frozen=True)
class Plan:
    """Everything that decides about a row; travels to the tasks."""

    section: Data
    parts: tuple[Any, ...]
    """The inputs, without columns that were left out."""
    features: tuple[Feature, ...]
    """What they are, as far as it is known by now."""
    target: Target
    origins: tuple[Origin, ...]
    power: int
    """There are 2**power ranges."""
    ranges: tuple[str, ...] = ()
    """Their files (see ranges.py)."""
    losers: tuple[tuple[int, str], ...] = ()
    """Places of parts of `clean`, and files that name the rows that they drop as duplicates: columns `range`, sorted, and `row`."""
    edges: np.ndarray | None = None
    """Where positions are cut into parts: (parts - 1,), or (classes, parts - 1); empty when the parts are given, None while unknown."""
    bounds: Mapping[str, tuple[int, Bound]] = field(default_factory=dict)
    """column: the part of `clean` that found them, and where outliers begin."""
    left_out: tuple[str, ...] = ()
    """Columns of inputs that the model does not get."""
    warnings: tuple[str, ...] = ()
    """What is suspicious about numbers as they were read, a line each."""

    @property
    def caps(self) -> dict[str, Bound]:
        """Bounds by column."""
        return {column: bound for column, (_, bound) in self.bounds.items()}

    def select(self, number: int, columns: Sequence[str]) -> Selected:
        """The rows of range `number`, with these columns."""
        rows = _Rows.of(self, number)
        table = rows.table.select([*dict.fromkeys([*columns, *self._looked_at()])])
        dropped = self._dropped(rows, table)
        copies = rows.copies(dropped == KEEP) if isinstance(self.section.split, ByRow) and not self.section.split.group else None
        split = self._split(rows, table, copies) if self.edges is not None else np.zeros(len(dropped), np.int64)
        return Selected(number, self._narrowed(table), np.where(dropped == KEEP, split, -1), dropped, rows.keys, rows.origin, copies)

    def without(self, left_out: Sequence[str]) -> Plan:
        """A plan whose inputs lack some columns; an input without any is gone."""
        kept = [
            _narrow(part, feature, columns)
            for part, feature in zip(self.parts, self.features, strict=True)
            if (columns := tuple(column for column in part.columns if not part.removable or column not in left_out))
        ]
        return replace(
            self, parts=tuple(part for part, _ in kept), features=tuple(feature for _, feature in kept), left_out=tuple(left_out)
        )

    def _looked_at(self) -> list[str]:
        """Columns that decide about a row."""
        split = self.section.split
        columns = [TARGET] if isinstance(split, StratifiedSplit) else [SIDE] if split.columns else []
        dropping = {column for column, (_, bound) in self.bounds.items() if bound.action == "drop"}
        return columns + [part.tensor for part in self.parts if dropping & set(part.bounded)]

    def _dropped(self, rows: _Rows, table: pa.Table) -> np.ndarray:
        """The part of `clean` that drops each row, or KEEP."""
        dropped = rows.lost.copy()
        for place, clean in enumerate(self.section.clean):
            if is_local(clean) and not self.losers:
                dropped[rows.repeated & (dropped == KEEP)] = place
            elif isinstance(clean, Outliers) and clean.action == "drop":
                for column in clean.columns:
                    if column in self.bounds and (values := self._values(table, column)) is not None:
                        bound = self.bounds[column][1]
                        dropped[((values < bound.lower) | (values > bound.upper)) & (dropped == KEEP)] = place
        return dropped

    def _values(self, table: pa.Table, column: str) -> np.ndarray | None:
        """A column of a number input as the model gets it, float32 (rows,)."""
        for part in self.section.inputs:
            if column in part.bounded:
                place = part.columns.index(column)
                values = raw_values(table[part.tensor], len(part.columns))[:, place : place + 1]
                feature = next(feature for feature in self.features if column in feature.columns and feature.name == part.tensor)
                return shifted(values, feature.offsets and feature.offsets[feature.columns.index(column) :][:1])[:, 0]
        return None

    def _split(self, rows: _Rows, table: pa.Table, copies: np.ndarray | None) -> np.ndarray:
        """The index of each row's split."""
        split = self.section.split
        names = split.parts(self.section.fold)[1]
        if isinstance(split, GivenSplit):
            part = table[SIDE].to_numpy().astype(np.int64)
        else:
            words = table[SIDE].to_numpy() if split.columns else rows.keys[:, 0]
            position = split.position(words, copies) if isinstance(split, Hashed) else words
            part = self._part(position, table)
        found = np.array([NAMES.index(name) for name in names])[part]
        for index, origin in enumerate(self.origins):
            if origin.split:
                found[rows.origin == index] = NAMES.index(origin.split)
        return found

    def _part(self, position: np.ndarray, table: pa.Table) -> np.ndarray:
        assert self.edges is not None
        if self.edges.ndim == 1:
            return np.searchsorted(self.edges, position, side="right")
        codes = pc.index_in(table[TARGET].combine_chunks(), pa.array(self.target.labels, table[TARGET].type)).to_numpy(zero_copy_only=False)
        return (position[:, None] >= self.edges[codes]).sum(axis=1)

    def _narrowed(self, table: pa.Table) -> pa.Table:
        """Inputs without the columns that were left out."""
        for part in self.section.inputs if self.left_out else ():
            table = part.narrowed(table, self.left_out)
        return table


@dataclass(frozen=True)
class Selected:
    """Rows of a range in the order of their keys, and what becomes of each."""

    number: int
    table: pa.Table
    split: np.ndarray
    """Index in NAMES, or -1 for a row that is dropped; (rows,)."""
    dropped: np.ndarray
    """The part of `clean` that drops it, or KEEP; (rows,)."""
    keys: np.ndarray
    """uint64 (rows, 2)."""
    origin: np.ndarray
    """Index in the plan's origins; (rows,)."""
    copies: np.ndarray | None = None
    """Which of the equal rows of one origin that stay each is, where the split tells them apart; (rows,)."""

    def of(self, split: int) -> pa.Table:
        """The rows of a split."""
        return self.table.filter(pa.array(self.split == split))

    @property
    def across(self) -> dict[str, int]:
        """How many rows of validation and test equal one of train in every input and in the target; and of train, another one of train."""
        kept = np.flatnonzero(self.split >= 0)
        keys, split = self.keys[kept], self.split[kept]
        if not len(kept):
            return {}
        group = np.cumsum(np.append(True, (keys[1:] != keys[:-1]).any(axis=1))) - 1
        in_train = np.bincount(group, weights=split == 0)[group]
        return {name: int(((split == index) & (in_train > (index == 0))).sum()) for index, name in enumerate(NAMES)}


@dataclass(frozen=True)
class _Rows:
    """The rows of a range, in the order of their keys."""

    table: pa.Table
    keys: np.ndarray
    """uint64 (rows, 2)."""
    origin: np.ndarray
    repeated: np.ndarray
    """Whether a row has the key and the origin of the one before."""
    lost: np.ndarray
    """The part of `clean` that dropped it as a duplicate, or KEEP."""

    @classmethod
    def of(cls, plan: Plan, number: int) -> _Rows:
        table = open_rows(plan.ranges[number])
        keys = np.stack([table[HIGH].to_numpy(), table[LOW].to_numpy()], axis=1)
        origin = table[ORIGIN].to_numpy()
        repeated = np.zeros(len(table), dtype=bool)
        repeated[1:] = (keys[1:] == keys[:-1]).all(axis=1) & (origin[1:] == origin[:-1])
        return cls(table, keys, origin, repeated, lost_rows(plan.losers, number, len(table)))

    def copies(self, kept: np.ndarray) -> np.ndarray:
        """The number of each row among the rows of its key and origin that are kept, int64 (rows,). What tells such rows apart decides
        about their order, and what they hold is the same, so the numbers do not depend on how the rows came."""
        number = np.cumsum(kept) - kept
        starts = np.flatnonzero(~self.repeated)
        return number - np.repeat(number[starts], np.diff(np.append(starts, len(number))))


def lost_rows(losers: Sequence[tuple[int, str]], number: int, rows: int) -> np.ndarray:
    """The part of `clean` that dropped each of the rows of a range as a duplicate so far, or KEEP. losers: as in a plan."""
    lost = np.full(rows, KEEP, dtype=np.int64)
    for place, file in losers:
        found = open_rows(file)
        ranges = found["range"].to_numpy()
        start, stop = np.searchsorted(ranges, [number, number + 1])
        lost[found["row"].to_numpy()[start:stop]] = place
    return lost


def _narrow(part: Any, feature: Feature, columns: tuple[str, ...]) -> tuple[Any, Feature]:
    """An input with only these of its columns."""
    if columns == feature.columns:
        return part, feature
    kept = [index for index, column in enumerate(feature.columns) if column in columns]
    changed: dict[str, Any] = {"columns": columns, "shape": (len(columns),)}
    if feature.offsets:
        changed["offsets"] = tuple(feature.offsets[index] for index in kept)
    if feature.vocabularies:
        changed |= {name: tuple(getattr(feature, name)[index] for index in kept) for name in ("vocabularies", "missing")}
    return part.model_copy(update={"columns": columns}), feature.model_copy(update=changed)
