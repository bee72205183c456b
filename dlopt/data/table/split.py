"""Splits as pure functions of a row: independent of the order of rows, of blocks and of workers.

A split gives every row a position: by a hash of its content and of which copy of that content it is, by a hash of its group, where
equal ones never fall into two splits, or by time. Edges cut the positions into parts, and each part belongs to a split.

Rows of equal content are told apart by their number among them. Were they not, all copies of an input and its label would be on one
side: a test row's own label would be rarer in training than it is, and a model that learns well would score worse than chance.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, field_validator, model_validator

from dlopt.data.counter import bits, mix, stream, string_words
from dlopt.data.types.canonical import as_text
from dlopt.data.types.columns import column_type
from dlopt.data.types.dates import dates, known_form
from dlopt.data.types.values import Reasons, doubles, is_text, plain, texts
from dlopt.part import DloptError, Part

NAMES = ("train", "validation", "test")


class Fold(Part):
    """One of several equal parts of what is not for testing, which is the validation split while the others are for training."""

    index: int = Field(ge=0)
    """Which one, from 0."""
    of: int = Field(ge=2)
    """How many there are."""

    @model_validator(mode="after")
    def index_is_below(self) -> Self:
        if self.index >= self.of:
            raise ValueError(f"index {self.index} must be less than of, {self.of}")
        return self


class Shares(Part):
    """What most splits have in common."""

    train: float = Field(0.8, gt=0, le=1)
    """Share of the rows to train on."""
    validation: float = Field(0.1, ge=0, lt=1)
    """Share to choose the best epoch by."""
    test: float = Field(0.1, ge=0, lt=1)
    """Share to measure the final result on; 0 when `data.test` names a source of its own."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The raw columns that decide."""
        return ()

    @model_validator(mode="after")
    def shares_sum_to_one(self) -> Self:
        total = self.train + self.validation + self.test
        if abs(total - 1) > 1e-6:
            raise ValueError(f"train, validation and test sum to {total:g}: make them sum to 1")
        return self

    def parts(self, fold: Fold | None) -> tuple[tuple[float, ...], tuple[str, ...]]:
        """The share of each part, and the split that it belongs to."""
        if fold is None:
            return (self.train, self.validation, self.test), NAMES
        names = ["validation" if index == fold.index else "train" for index in range(fold.of)]
        return ((1 - self.test) / fold.of,) * fold.of + (self.test,), (*names, "test")


class Hashed(Shares):
    """By a hash."""

    seed: int = Field(0, ge=0)
    """Another seed, another split; apart from the job's seed, so that repeated trainings compare on the same rows."""

    def position(self, words: np.ndarray, copies: np.ndarray | None = None) -> np.ndarray:
        """Where each row stands in [0, 1).

        words: uint64 (rows,), a hash of the row or of its group. copies: int64 (rows,), which of several equal rows each is; the first,
        0, stands where it does without.
        """
        if copies is not None and (again := np.flatnonzero(copies)).size:
            words = words.copy()
            words[again] ^= bits(copies[again], 29)
        return (mix(words ^ stream(17, self.seed)) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def edges(self, fold: Fold | None) -> np.ndarray:
        return cut(self.parts(fold)[0])


class ByRow(Hashed):
    """By the hash of each row."""

    group: Literal["content"] | None = None
    """content: rows that are equal in every input and the target stay together in one split. Without it each copy is a row like any
    other, as in a survey, where equal answers are other people's."""


class RandomSplit(ByRow):
    """Each row by its own hash: a row stays in its split whatever other rows come or go; sizes vary by chance."""

    kind: Literal["random"] = "random"


class GroupSplit(Hashed):
    """Each row by the hash of a column's value: rows of one patient, one user or one document stay together."""

    kind: Literal["group"] = "group"
    column: str
    """The column that names the group; its values are compared as texts."""

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    def side(self, table: pa.Table) -> tuple[pa.Array, Reasons]:
        """The hash of each row's group, and the reason for each row that has none."""
        values = texts(table[self.column]).dictionary_encode()
        known = values.dictionary.to_pylist()
        words = string_words(known)[values.indices.to_numpy()]
        missing = np.flatnonzero(np.array([name == "" for name in known], dtype=bool)[values.indices.to_numpy()])
        return pa.array(words), dict.fromkeys(missing.tolist(), f"{self.column}: no group to split by")


class StratifiedSplit(ByRow):
    """Exact shares of every class: its rows in the order of their hashes, cut at the rounded counts."""

    kind: Literal["stratified"] = "stratified"

    def wanted(self, label: object, rows: int, fold: Fold | None) -> list[int]:
        """At which ranks a class with so many rows is cut. Raises DloptError when it is too small."""
        shares = self.parts(fold)[0]
        wanted = sum(share > 0 for share in shares)
        if rows < wanted:
            raise DloptError(
                f"data.split: class {label!r} has {rows} row(s), too few for {wanted} stratified splits: "
                "add rows, drop the class, or use kind: random"
            )
        return np.cumsum(shares_of(rows, shares))[:-1].tolist()


class TimeSplit(Shares):
    """The earliest rows for training, later ones for validation, the latest for testing; rows of one moment stay together."""

    kind: Literal["time"] = "time"
    column: str
    """The column of dates, times or numbers that rise with time."""
    form: str = ""
    """How dates are written, for other texts than ISO 8601, as strptime has it."""

    @field_validator("form")
    @classmethod
    def form_is_known(cls, form: str) -> str:
        return known_form(form)

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    def side(self, table: pa.Table) -> tuple[pa.Array, Reasons]:
        """When each row was, in seconds since 1970 or in the column's own numbers, and the reason for each row without."""
        column = plain(table[self.column])
        numbers = column_type(table, self.column) == "number" and not self.form
        if (is_text(column.type) and not numbers) or pa.types.is_timestamp(column.type) or pa.types.is_date(column.type):
            found, reasons = dates(column, self.form)
            values = pc.divide(found.cast(pa.int64()).cast(pa.float64()), 1e6).to_numpy(zero_copy_only=False)
        else:
            values, reasons = doubles(column)
        missing = dict.fromkeys(np.flatnonzero(np.isnan(values)).tolist(), "no time to split by")
        return pa.array(np.nan_to_num(values)), {row: f"{self.column}: {why}" for row, why in (missing | reasons).items()}


class GivenSplit(Part):
    """A column says which split each row is in."""

    kind: Literal["given"] = "given"
    column: str
    """The column."""
    names: dict[str, Literal["train", "validation", "test"]] = {"train": "train", "validation": "validation", "test": "test"}
    """Which of its values mean which split; rows with another value are set aside."""

    def parts(self, fold: Fold | None) -> tuple[tuple[float, ...], tuple[str, ...]]:
        return (), NAMES

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    def side(self, table: pa.Table) -> tuple[pa.Array, Reasons]:
        """The index of each row's split, and the reason for each row that has none."""
        values = texts(table[self.column]).dictionary_encode()
        known = values.dictionary.to_pylist()
        kind = column_type(table, self.column)
        names = {as_text(name, kind): NAMES.index(split) for name, split in self.names.items()}
        index = np.array([names.get(name, -1) for name in known], dtype=np.float64)
        found = index[values.indices.to_numpy()]
        wrong = np.flatnonzero(found < 0).tolist()
        said = values.indices.to_numpy()
        return pa.array(found), {row: f"{self.column}: {known[said[row]]!r:.40} names no split" for row in wrong}

    @property
    def validation(self) -> float:
        """Whether there is a validation split: more than 0."""
        return float("validation" in self.names.values())

    @property
    def test(self) -> float:
        return float("test" in self.names.values())


AnySplit = Annotated[RandomSplit | StratifiedSplit | GroupSplit | TimeSplit | GivenSplit, Field(discriminator="kind")]


def cut(shares: tuple[float, ...]) -> np.ndarray:
    """Where parts of these shares begin, but for the first: a part without a share begins at the end."""
    return np.array([1.0 if sum(shares[place:]) == 0 else sum(shares[:place]) for place in range(1, len(shares))])


def shares_of(rows: int, shares: tuple[float, ...]) -> list[int]:
    """Whole rows for each share, summing to `rows`; every share above 0 gets at least one row (there are enough)."""
    counts = [max(round(rows * share), 1) if share else 0 for share in shares]
    largest = counts.index(max(counts))
    counts[largest] += rows - sum(counts)
    return counts
