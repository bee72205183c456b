"""Rules that judge a row by itself: a value out of range, of a wrong form, not among those allowed, missing, too long.

All of them look at raw columns of any type. A value is compared as what it says: in a csv file, where all is text, "7" is a number.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, field_validator, model_validator

from dlopt.data.clean.base import Cleaning, ColumnCleaning
from dlopt.data.clean.duplicates import identities
from dlopt.data.types.canonical import TRUTH, as_text
from dlopt.data.types.values import doubles, plain, texts, without_empty

Violation = tuple[np.ndarray, str]
"""Which rows violate a rule, bool of shape (rows,), and how."""


class RowRule(ColumnCleaning):
    """A rule that each row is judged by on its own."""

    @abstractmethod
    def judge(self, table: pa.Table) -> pa.Array:
        """Why each row is to be dropped, as strings of shape (rows,); null for a row that stays. table: raw columns."""


class ColumnRule(RowRule):
    """A rule that holds for each of the columns."""

    def judge(self, table: pa.Table) -> pa.Array:
        """As every rule; of several reasons, the first."""
        found = [(mask, f"{name}: {why}") for name in self.columns for mask, why in self.violations(table[name])]
        codes = np.full(len(table), len(found))
        for code in reversed(range(len(found))):
            codes[found[code][0]] = code
        return pa.array([*(reason for _, reason in found), None], pa.string()).take(pa.array(codes))

    @abstractmethod
    def violations(self, column: pa.ChunkedArray) -> Iterator[Violation]:
        """The ways in which values of a column violate the rule."""


class ValueRule(ColumnRule):
    """A rule for values that are there."""

    missing: Literal["keep", "drop"] = "keep"
    """What becomes of a row whose value is missing."""

    def violations(self, column: pa.ChunkedArray) -> Iterator[Violation]:
        absent = is_missing(column)
        if self.missing == "drop":
            yield absent, "missing"
        for mask, why in self.wrong(column):
            yield mask & ~absent, why

    @abstractmethod
    def wrong(self, column: pa.ChunkedArray) -> Iterator[Violation]:
        """The ways in which values violate the rule; what it says of missing ones does not count."""


class Range(ValueRule):
    """Numbers must lie in a range; what is no number does not."""

    kind: Literal["range"] = "range"
    min: float | None = None
    """The least value, if there is one."""
    max: float | None = None
    """The greatest value, if there is one."""
    inclusive: bool = True
    """Whether min and max themselves are in the range."""

    @model_validator(mode="after")
    def range_is_not_empty(self) -> Self:
        if self.min is None and self.max is None:
            raise ValueError("range has neither min nor max: give at least one")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min:g} is above max {self.max:g}")
        return self

    def wrong(self, column: pa.ChunkedArray) -> Iterator[Violation]:
        values, unreadable = doubles(column)
        wrong = np.zeros(len(values), dtype=bool)
        wrong[list(unreadable)] = True
        yield wrong, "not a number"
        if self.min is not None:
            too_low = values < self.min if self.inclusive else values <= self.min
            yield too_low, f"{'less than' if self.inclusive else 'not above'} {self.min:g}"
        if self.max is not None:
            too_high = values > self.max if self.inclusive else values >= self.max
            yield too_high, f"{'more than' if self.inclusive else 'not below'} {self.max:g}"


class Pattern(ValueRule):
    """The whole of every value must match a regular expression."""

    kind: Literal["pattern"] = "pattern"
    regex: str
    """The expression, in the syntax of RE2 (no look-around, no back-references)."""

    @field_validator("regex")
    @classmethod
    def regex_compiles(cls, regex: str) -> str:
        try:
            pc.match_substring_regex(pa.array([""]), regex)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{regex!r}: {str(error).removeprefix('Invalid regular expression: ')}") from None
        return regex

    def wrong(self, column: pa.ChunkedArray) -> Iterator[Violation]:
        matched = pc.match_substring_regex(texts(column), rf"\A(?:{self.regex})\z")
        yield ~matched.to_numpy(zero_copy_only=False), f"does not match {self.regex}"


class Allowed(ValueRule):
    """Every value must be one of a list."""

    kind: Literal["allowed"] = "allowed"
    values: tuple[bool | int | float | str, ...] = Field(min_length=1)
    """The values that are allowed; 7, 7.0 and "7" are the same."""

    def wrong(self, column: pa.ChunkedArray) -> Iterator[Violation]:
        truths = [as_text(value, "boolean") for value in self.values if str(value).lower() in TRUTH]
        known = np.concatenate([identities(pa.array([value]))[:, 0] for value in [*self.values, *truths]])
        yield ~np.isin(identities(column)[:, 0], known), "not an allowed value"


class Length(ColumnRule):
    """Texts must have a number of characters; a missing one has none."""

    kind: Literal["length"] = "length"
    min: int = Field(0, ge=0)
    """The fewest characters."""
    max: int | None = Field(None, ge=0)
    """The most characters, if there is a limit."""

    @model_validator(mode="after")
    def some_length_is_left(self) -> Self:
        if self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}")
        return self

    def violations(self, column: pa.ChunkedArray) -> Iterator[Violation]:
        lengths = pc.utf8_length(texts(column)).to_numpy(zero_copy_only=False)
        yield lengths < self.min, f"shorter than {self.min} characters"
        if self.max is not None:
            yield lengths > self.max, f"longer than {self.max} characters"


class DropMissing(RowRule):
    """Rows in which too many of some columns are missing."""

    kind: Literal["drop_missing"] = "drop_missing"
    share: float = Field(0.0, ge=0, lt=1)
    """Rows are dropped that miss a larger share of the columns than this; 0: rows that miss any of them."""

    def judge(self, table: pa.Table) -> pa.Array:
        absent = np.stack([is_missing(table[name]) for name in self.columns])
        dropped = absent.sum(axis=0) > self.share * len(self.columns) + 1e-9
        if self.share == 0:
            return _where(dropped, [f"{name}: missing" for name in self.columns], absent.argmax(axis=0))
        return _where(dropped, [f"missing: more than {self.share:.0%} of {', '.join(self.columns)}"], np.zeros(len(dropped), np.int64))


class DropColumns(Cleaning):
    """Leave input columns out of the model that are missing in too many training rows."""

    kind: Literal["drop_columns"] = "drop_columns"
    share: float = Field(0.5, ge=0, lt=1)
    """A column of an input that is missing in a larger share of the training rows than this is left out."""
    most: float = Field(0.5, ge=0, le=1)
    """A larger share of left out columns than this stops the run."""

    @property
    def title(self) -> str:
        return f"drop_columns missing in more than {self.share:.0%}"


def is_missing(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """Whether each value is null, not a number, or a text that says so."""
    return without_empty(plain(column)).is_null(nan_is_null=True).to_numpy(zero_copy_only=False)


def _where(dropped: np.ndarray, reasons: list[str], which: np.ndarray) -> pa.Array:
    """reasons[which] of the dropped rows."""
    return pa.array([*reasons, None], pa.string()).take(pa.array(np.where(dropped, which, len(reasons))))
