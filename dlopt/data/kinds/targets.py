"""What the model predicts: classes, labels or numbers of raw columns, as the target of the signature."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, field_validator, model_validator

from dlopt.data.kinds.base import InputKind, no_column_twice
from dlopt.data.kinds.number import digits_lost
from dlopt.data.stats import column as profile
from dlopt.data.stats import moments
from dlopt.data.stats.moments import Moments
from dlopt.data.types.arrow import pa, pc
from dlopt.data.types.canonical import NUMBER, TRUTH, as_text
from dlopt.data.types.exact import exact_column, values_of
from dlopt.data.types.values import Reasons, doubles, is_text, numbers, plain
from dlopt.part import DloptError, Part, Target

MOST_LABELS = 100_000
"""More different labels than this are no classes."""

CODE = re.compile(r"[+-]?0[0-9]+|[+][0-9]+")
"""Labels that are numbers but for a zero or a plus in front."""

Labels = tuple[int, ...] | tuple[str, ...]


class TargetKind(Part):
    """What the model predicts, of some columns of a row."""

    textual: ClassVar[bool] = False
    """Whether labels are compared as texts."""
    classes: ClassVar[bool] = False
    """Whether a row has one of several classes."""
    trained_as: ClassVar[Literal["category", "multi_label", "number"]] = "category"
    """The kind of `Target` that it becomes."""

    if TYPE_CHECKING:

        @property
        def name(self) -> str: ...

    def stand_in(self) -> Target:
        """The target before the data is read."""
        return Target(name=self.name, kind=self.trained_as, labels=(0, 1), positive=1)

    def whole(self, table: pa.Table) -> bool:
        """Whether the labels are whole numbers, or else strings, from the first rows. Raises DloptError."""
        return False

    def lost(self, raw: pa.Table, read: pa.Array) -> list[np.ndarray | None]:
        """Of each column what float64 does not hold of its numbers, or None; [] where there are none to lose."""
        return []

    def count(self, values: pa.Array) -> Counter[Any]:
        """How often each label is there."""
        return counted(values)

    def observe(self, values: pa.ChunkedArray, target: Target) -> Moments | None:
        """What training rows say of numbers."""
        return None


class CategoryTarget(TargetKind):
    """A column of classes, one a row: whole numbers or strings, true and false being 1 and 0."""

    textual = classes = True

    kind: Literal["category"] = "category"
    column: str = "label"
    """The column."""
    positive: int | str | None = None
    """Of two classes, the one that precision, recall, F1 and ROC AUC are of; the last in order unless it is named."""

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    @property
    def name(self) -> str:
        return self.column

    def whole(self, table: pa.Table) -> bool:
        """Whether the classes are whole numbers, or else strings, from the first rows. Raises DloptError."""
        kind = plain(table[self.column]).type
        if is_text(kind) or pa.types.is_null(kind):
            return False
        if pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
            return True
        raise DloptError(f"data.target.column: {self.column!r} is {kind}; classes must be whole numbers or strings")

    def read(self, table: pa.Table, whole: bool) -> tuple[pa.Array, Reasons]:
        """The classes as int64 or string, null where there is none, and the reason for each of those rows."""
        classes = plain(table[self.column]).dictionary_encode()  # so that each class is looked at once
        names = [*classes.dictionary.to_pylist(), None]
        codes = classes.indices.fill_null(len(names) - 1)
        there = [not (name is None or name == "" or name != name) for name in names]
        read = whole_number if whole else as_text
        values = [read(name) if is_there else None for name, is_there in zip(names, there, strict=True)]
        labels = pa.array(values, pa.int64() if whole else pa.string()).take(codes)
        why = [self._why_not(name) if is_there else "no label" for name, is_there in zip(names, there, strict=True)]
        wrong = np.flatnonzero(labels.is_null().to_numpy(zero_copy_only=False)).tolist()
        return labels, {row: f"{self.column}: {why[codes[row].as_py()]}" for row in wrong}

    def _why_not(self, name: object) -> str:
        """Why something is no whole number; a code such as 0123 is one for most programs, and another class than 123."""
        hint = f" as 123 is: types: {{{self.column}: string}} in the source keeps such labels" if CODE.fullmatch(str(name)) else ""
        return f"{name!r:.40} is not a whole number{hint}"

    def target(self, counts: Mapping[Any, int]) -> Target:
        """With the classes that were seen. Raises DloptError."""
        labels = tuple(sorted(counts))
        if len(labels) < 2:
            raise DloptError(f"data.target: column {self.column!r} has one class only ({labels[0]!r}): there is nothing to learn")
        _refuse_too_many(self.column, labels)
        return Target(name=self.column, labels=labels, positive=self._positive(labels))

    def _positive(self, labels: tuple[Any, ...]) -> Any:
        if self.positive is None:
            return labels[1] if len(labels) == 2 else None
        whole = whole_number(self.positive) if isinstance(labels[0], int) else None
        found = next((label for label in labels if label in (self.positive, whole) or str(label) == str(self.positive)), None)
        if found is None or len(labels) != 2:
            hint = " (YAML reads yes and on as true, no and off as false: write them in quotes)" if self.positive in TRUTH else ""
            raise DloptError(f"data.target.positive: {self.positive!r} must be one of two classes; there are {_some(labels)}{hint}")
        return found

    def finish(self, values: pa.Array, target: Target) -> np.ndarray:
        """Class indices, int64 (rows,)."""
        return pc.index_in(values, pa.array(target.labels, values.type)).to_numpy(zero_copy_only=False).astype(np.int64)


class ThresholdTarget(TargetKind):
    """Two classes made of a column of numbers: 1 above a threshold, else 0."""

    classes = True

    kind: Literal["threshold"] = "threshold"
    column: str
    """The column of numbers."""
    above: float
    """Greater values are of class 1."""

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    @property
    def name(self) -> str:
        return self.column

    def whole(self, table: pa.Table) -> bool:
        return True

    def read(self, table: pa.Table, whole: bool) -> tuple[pa.Array, Reasons]:
        """1, 0, or null with its reason."""
        values, reasons = doubles(table[self.column])
        absent = np.isnan(values)
        missing = dict.fromkeys(np.flatnonzero(absent).tolist(), "no label")
        labels = pa.array((values > self.above).astype(np.int64), mask=absent)
        return labels, {row: f"{self.column}: {why}" for row, why in (missing | reasons).items()}

    def target(self, counts: Mapping[Any, int]) -> Target:
        if len(counts) < 2:
            side = "above" if 1 in counts else "at most"
            raise DloptError(f"data.target.above: all values of {self.column!r} are {side} {self.above:g}: there is nothing to learn")
        return Target(name=self.column, labels=(0, 1), positive=1)

    def finish(self, values: pa.Array, target: Target) -> np.ndarray:
        """0 and 1, int64 (rows,)."""
        return values.to_numpy(zero_copy_only=False).astype(np.int64)


class MultiLabelTarget(TargetKind):
    """Any number of labels a row: a column of lists, or of texts with a separator between labels, or a column of 0 and 1 for each label."""

    textual = True
    trained_as = "multi_label"

    kind: Literal["multi_label"] = "multi_label"
    column: str | None = None
    """The column of lists or texts."""
    columns: tuple[str, ...] = ()
    """The columns of 0 and 1, each of which is a label."""
    separator: str = Field(",", min_length=1)
    """What stands between the labels in a text."""
    name: str = "labels"
    """What they are called together."""

    @model_validator(mode="after")
    def one_form_is_chosen(self) -> Self:
        if (self.column is None) == (not self.columns) and self.columns != (self.column,):
            raise ValueError("name either `column` (lists of labels) or `columns` (one of 0 and 1 for each label)")
        if self.column is not None:
            object.__setattr__(self, "columns", (self.column,))
        return self

    def read(self, table: pa.Table, whole: bool) -> tuple[pa.Array, Reasons]:
        """A list of labels a row, null with its reason where there is none."""
        return self._lists(table) if self.column is not None else self._flags(table)

    def _lists(self, table: pa.Table) -> tuple[pa.Array, Reasons]:
        assert self.column is not None
        found, reasons = [], {}
        for row, value in enumerate(plain(table[self.column]).to_pylist()):
            if value is None:
                reasons[row] = f"{self.column}: no labels"
            parts = value.split(self.separator) if isinstance(value, str) else value if isinstance(value, list) else [value]
            found.append(None if value is None else sorted({as_text(part).strip() for part in parts if part is not None} - {""}))
        return pa.array(found, pa.list_(pa.string())), reasons

    def _flags(self, table: pa.Table) -> tuple[pa.Array, Reasons]:
        reasons: Reasons = {}
        flags = np.zeros((len(table), len(self.columns)), dtype=bool)
        for index, column in enumerate(self.columns):
            values, wrong = doubles(table[column])
            odd = dict.fromkeys(np.flatnonzero(~np.isin(values, (0.0, 1.0))).tolist(), "is neither 0 nor 1")
            reasons = {row: f"{column}: {why}" for row, why in (odd | wrong).items()} | reasons
            flags[:, index] = values == 1
        found = [[self.columns[index] for index in np.flatnonzero(row)] for row in flags]
        return pa.array([None if row in reasons else labels for row, labels in enumerate(found)], pa.list_(pa.string())), reasons

    def count(self, values: pa.Array) -> Counter[Any]:
        """How many rows have each label."""
        return counted(values.flatten())

    def target(self, counts: Mapping[Any, int]) -> Target:
        labels = tuple(sorted(self.columns if self.column is None else counts))
        if not labels:
            raise DloptError(f"data.target: column {self.column!r} holds no label")
        _refuse_too_many(self.name, labels)
        return Target(name=self.name, kind="multi_label", labels=labels)

    def finish(self, values: pa.Array, target: Target) -> np.ndarray:
        """1 for each label that a row has, uint8 (rows, labels)."""
        found = np.zeros((len(values), target.size), dtype=np.uint8)
        rows = np.repeat(np.arange(len(values)), values.value_lengths().to_numpy(zero_copy_only=False))
        found[rows, pc.index_in(values.flatten(), pa.array(target.labels, pa.string())).to_numpy(zero_copy_only=False)] = 1
        return found


class NumberTarget(TargetKind):
    """Columns of numbers, which the model predicts in the units of the data."""

    trained_as = "number"

    kind: Literal["number"] = "number"
    columns: tuple[str, ...] = Field(min_length=1)
    """The columns."""
    name: str = "target"
    """What they are called together; a single column is called by its own name."""

    @field_validator("columns")
    @classmethod
    def columns_differ(cls, columns: tuple[str, ...]) -> tuple[str, ...]:
        return no_column_twice(columns)

    def read(self, table: pa.Table, whole: bool) -> tuple[pa.Array, Reasons]:
        """A matrix, and the reason for every row that lacks a number."""
        values = np.empty((len(table), len(self.columns)))
        reasons: Reasons = {}
        for index, column in enumerate(self.columns):
            values[:, index], wrong = numbers(table[column])
            missing = dict.fromkeys(np.flatnonzero(np.isnan(values[:, index])).tolist(), "no value")
            reasons = {row: f"{column}: {why}" for row, why in (missing | wrong).items()} | reasons
        return exact_column(values), reasons

    def count(self, values: pa.Array) -> Counter[Any]:
        return Counter()

    def target(self, counts: Mapping[Any, int]) -> Target:
        return self.stand_in()

    def stand_in(self) -> Target:
        return Target(name=self.columns[0] if len(self.columns) == 1 else self.name, kind="number", columns=self.columns)

    def lost(self, raw: pa.Table, read: pa.Array) -> list[np.ndarray | None]:
        return digits_lost(self.columns, raw, read)

    def observe(self, values: pa.ChunkedArray, target: Target) -> Moments:
        """What training rows say of each column."""
        return moments.of_values(values_of(values, target))

    def finish(self, values: pa.Array, target: Target) -> np.ndarray:
        """The numbers, float32 (rows, columns)."""
        return values_of(values, target)


class LabelLists(InputKind):
    """A column of lists of labels in the profile; it is no input."""

    ranked = False
    checks = ("blanks",)

    @staticmethod
    def summary(column: Any, step: int, points: int) -> profile.Column:
        """A row without any label is not missing."""
        array = plain(column)[::step]
        found = profile.of_texts("multi_label", array.flatten(), 1)[0]
        return replace(found, rows=len(column), missing=array.null_count, seen=len(array) - array.null_count)

    @staticmethod
    def sampled(column: Any) -> np.ndarray:
        """Several labels are not compared."""
        return np.zeros(len(column), np.uint32)


AnyTarget = Annotated[CategoryTarget | ThresholdTarget | MultiLabelTarget | NumberTarget, Field(discriminator="kind")]


def whole_number(value: object) -> int | None:
    """7, 7.0, True and their spellings in a text file; None for anything else, also for codes such as 007, and for more than 64 bits."""
    if isinstance(value, str) and value.lower() not in TRUTH and not NUMBER.fullmatch(value.strip()):
        return None
    try:
        number = Decimal(str(TRUTH.get(str(value).lower(), value)))
        return int(number) if number == number.to_integral_value() and abs(number) < 2**63 else None
    except ArithmeticError:
        return None


def counted(values: pa.Array) -> Counter[Any]:
    found = pc.value_counts(values)
    return Counter(
        {value: count for value, count in zip(found.field(0).to_pylist(), found.field(1).to_pylist(), strict=True) if value is not None}
    )


def _refuse_too_many(column: str, labels: tuple[Any, ...]) -> None:
    if len(labels) > MOST_LABELS:
        raise DloptError(f"data.target: column {column!r} has {len(labels):,} different labels: for numbers use {{kind: number}}")


def _some(labels: tuple[Any, ...]) -> str:
    return ", ".join(map(repr, labels[:10])) + (", ..." if len(labels) > 10 else "")
