"""Rows that say the same thing twice. A row's identity is 128 bits, so all rows can be compared at once; which row of several
stays follows from the rows alone, never from the order of files, blocks or workers."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Iterable
from typing import Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import model_validator

from dlopt.data.clean.base import ColumnCleaning
from dlopt.data.counter import row_keys
from dlopt.data.types.canonical import as_text
from dlopt.data.types.dates import dates
from dlopt.data.types.values import doubles, is_text, plain, texts, without_empty
from dlopt.part import DloptError

WHOLE, FRACTION = np.uint64(1), np.uint64(2)
"""The second word of numbers; texts have 64 random bits there and missing values 0."""
INTEGER = r"^(0|-?[1-9][0-9]{0,17}|-?[1-8][0-9]{18})$"
"""The one spelling of a whole number of 64 bits."""
REAL = r"^-?(0|[1-9][0-9]*)(\.[0-9]+)?(e[+-]?[0-9]+)?$"
"""Texts that may be the shortest spelling of another number."""


class ExactDuplicates(ColumnCleaning):
    """Of the rows with one identity, one stays: the first or last by a column, or else the one whose content has the least hash."""

    order_by: str | None = None
    """A column of numbers or dates that says which row stays; a row without a value there comes last. Ties, and all rows where no
    column is named, are decided by the hash of the row's inputs and target."""
    keep: Literal["first", "last"] = "first"
    """Whether the row with the least or the greatest value of order_by stays."""

    @model_validator(mode="after")
    def last_has_an_order(self) -> Self:
        if self.keep == "last" and self.order_by is None:
            raise ValueError("keep: last needs order_by, a column that says which row is the last")
        return self

    def identity(self, table: pa.Table) -> np.ndarray:
        """What rows are compared by, uint64 of shape (rows, 2)."""
        return row_keys([_words(table[name]) for name in self.columns])

    def order(self, table: pa.Table) -> np.ndarray | None:
        """float64 of shape (rows,): the row with the least is to stay. None without order_by."""
        if self.order_by is None:
            return None
        values = _sortable(table[self.order_by])
        return np.where(np.isfinite(values), values if self.keep == "first" else -values, np.inf)

    def refuse_unsortable(self, first: pa.Table) -> None:
        """Raises DloptError when order_by is not a column of numbers or dates, going by the first rows."""
        if self.order_by is None:
            return
        column = without_empty(plain(first[self.order_by]))
        if column.null_count < len(column) and np.isnan(_sortable(column)).all():
            value = next(value for value in column.to_pylist() if value is not None)
            raise DloptError(
                f"data.clean: {self.kind}.order_by: column {self.order_by!r} holds {value!r:.40}: name a column of numbers or dates"
            )

    @abstractmethod
    def losers(self, identity: np.ndarray, order: np.ndarray | None, keys: np.ndarray) -> np.ndarray:
        """Which rows go, bool of shape (rows,).

        identity: uint64 (rows, 2), as `identity` gives it. order: float64 (rows,) or None, as `order` gives it.
        keys: uint64 (rows, 2), the hash of each row's content.
        """


class DropDuplicates(ExactDuplicates):
    """Rows that are equal: in every input and the target, or in columns of your choice, where missing equals missing."""

    kind: Literal["drop_duplicates"] = "drop_duplicates"
    columns: tuple[str, ...] = ()
    """The columns that are compared, which need not be inputs; none: all inputs and the target, numbers as the source has them, others as
    the model sees them. Values are compared as what they say: 7, 7.0 and "7" are equal, "07" and "Seven" are other texts."""

    @property
    def title(self) -> str:
        return super().title if self.columns else "drop_duplicates"

    def losers(self, identity: np.ndarray, order: np.ndarray | None, keys: np.ndarray) -> np.ndarray:
        rows, starts = _groups(identity, order, keys)
        lost = np.zeros(len(identity), dtype=bool)
        lost[rows[~starts]] = True
        return lost


class Unique(ExactDuplicates):
    """Rows whose key, which should be unique, occurs more than once. A row without a key is never one of them."""

    kind: Literal["unique"] = "unique"
    conflict: Literal["keep_one", "drop_all"] = "keep_one"
    """What becomes of rows that have the same key but differ in an input or the target: one of them stays, or none."""

    def identity(self, table: pa.Table) -> np.ndarray:
        """As for other duplicates, but zeros for a row that misses a part of its key."""
        words = [_words(table[name]) for name in self.columns]
        absent = np.any([(column == 0).all(axis=1) for column in words], axis=0)
        return np.where(absent[:, None], np.uint64(0), row_keys(words))

    def losers(self, identity: np.ndarray, order: np.ndarray | None, keys: np.ndarray) -> np.ndarray:
        rows, starts = _groups(identity, order, keys)
        there = (identity[rows] != 0).any(axis=1)
        lost = np.zeros(len(identity), dtype=bool)
        lost[rows[there & ~starts]] = True
        if self.conflict == "drop_all" and len(rows):
            first = np.flatnonzero(starts)
            group = np.cumsum(starts) - 1
            differs = (keys[rows] != keys[rows[first]][group]).any(axis=1)
            lost[rows[there & np.logical_or.reduceat(differs, first)[group]]] = True
        return lost


def identities(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """What values of one column are compared by, uint64 of shape (rows, 2)."""
    return row_keys([_words(column)])


def _groups(identity: np.ndarray, order: np.ndarray | None, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows that may not be alone in having their identity, those of one identity side by side, the one that stays first;
    and whether each of them is such a first one."""
    rows = _repeated(identity[:, 0])
    found = identity[rows]
    by = [keys[rows, 1], keys[rows, 0], *([] if order is None else [order[rows]]), found[:, 1], found[:, 0]]
    place = np.lexsort(by)
    return rows[place], _starts(found[place])


def _repeated(words: np.ndarray) -> np.ndarray:
    """The places at which there is something that occurs more than once."""
    place = np.argsort(words)
    same = words[place[1:]] == words[place[:-1]]
    again = np.zeros(len(words), dtype=bool)
    again[1:] |= same
    again[:-1] |= same
    return place[again]


def _starts(ordered: np.ndarray) -> np.ndarray:
    """Whether each row differs from the one before, bool of shape (rows,)."""
    starts = np.ones(len(ordered), dtype=bool)
    starts[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    return starts


def _words(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """128 bits of each value, uint64 of shape (rows, 2), alike for all that canonical.as_text takes for one; zeros where missing."""
    array = plain(column)
    kind = array.type
    if pa.types.is_integer(kind) and kind != pa.uint64():
        return _of_whole(array)
    if pa.types.is_floating(kind):
        values = array.to_numpy(zero_copy_only=False)
        return _of_floats(values if values.dtype == np.float64 else values.astype(str).astype(np.float64))  # 0.1 of 32 bits is 0.1
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:  # as Hugging Face datasets keep images
        return _words(pc.struct_field(array, "bytes"))
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind):
        return _digests(array.to_pylist())
    if pa.types.is_nested(kind):
        return _digests(None if value is None else repr(value).encode() for value in array.to_pylist())
    if pa.types.is_decimal(kind):
        return _of_texts(_decimals(array))
    return _of_texts(array if is_text(kind) else texts(array))


def _of_whole(array: pa.Array) -> np.ndarray:
    values = array.cast(pa.int64()).fill_null(0).to_numpy(zero_copy_only=False)
    there = array.is_valid().to_numpy(zero_copy_only=False)
    return np.stack([values.view(np.uint64), np.where(there, WHOLE, 0).astype(np.uint64)], axis=1)


def _of_floats(values: np.ndarray) -> np.ndarray:
    """A float that is a whole number is that number."""
    whole = (values == np.rint(values)) & (np.abs(values) < 2.0**63)
    first = np.where(whole, np.where(whole, values, 0).astype(np.int64).view(np.uint64), values.view(np.uint64))
    second = np.where(whole, WHOLE, FRACTION)
    return np.where(np.isnan(values)[:, None], np.uint64(0), np.stack([first, second], axis=1))


def _of_texts(array: pa.Array) -> np.ndarray:
    """A text that is the shortest spelling of a number is that number; others are their digest. Each is looked at once."""
    codes = without_empty(array).dictionary_encode()
    known = codes.dictionary
    words = np.zeros((len(known) + 1, 2), dtype=np.uint64)
    whole = pc.match_substring_regex(known, INTEGER)
    real = pc.and_not(pc.match_substring_regex(known, REAL), whole)
    numbers = known.filter(real).cast(pa.float64())
    shortest = pc.equal(known.filter(real), pa.array(map(as_text, numbers.to_pylist()), known.type))
    real = pc.replace_with_mask(real, real, shortest)
    words[_places(whole)] = _of_whole(known.filter(whole).cast(pa.int64()))
    words[_places(real)] = _of_floats(numbers.filter(shortest).to_numpy(zero_copy_only=False))
    rest = pc.invert(pc.or_(whole, real))
    words[_places(rest)] = _digests(known.filter(rest).cast(pa.large_binary()).to_pylist())
    return words[codes.indices.fill_null(len(known)).to_numpy()]


def _places(mask: pa.Array) -> np.ndarray:
    return np.flatnonzero(mask.to_numpy(zero_copy_only=False))


def _decimals(array: pa.Array) -> pa.Array:
    """Decimal numbers in their shortest spelling: 7.50 is 7.5 and 7.00 is 7."""
    spelled = pc.replace_substring_regex(array.cast(pa.string()), r"(\.[0-9]*?)0+$", r"\1")
    return pc.replace_substring_regex(spelled, r"\.$", "")


def _digests(values: Iterable[bytes | None]) -> np.ndarray:
    """128 bits of each value, zeros for None."""
    none = bytes(16)
    raw = b"".join(none if value is None else hashlib.blake2b(value, digest_size=16).digest() for value in values)
    return np.frombuffer(raw, dtype="<u8").reshape(-1, 2).astype(np.uint64)


def _sortable(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """Numbers as float64, and dates and times as microseconds since 1970; NaN for what is missing or neither."""
    array = plain(column)
    if pa.types.is_timestamp(array.type) or pa.types.is_date(array.type):
        return _microseconds(array)
    values, wrong = doubles(array)
    rows = np.fromiter(wrong, np.int64, len(wrong))
    if len(rows):
        values = values.copy()
        values[rows] = _microseconds(array.take(pa.array(rows)))
    return values


def _microseconds(array: pa.Array) -> np.ndarray:
    times, _ = dates(array, "")
    return times.cast(pa.int64()).cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
