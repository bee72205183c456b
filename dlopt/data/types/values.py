"""Raw columns, whatever type a source gave them, as plain values. What cannot be read gets a reason instead of stopping the rest."""

from __future__ import annotations

import json
from contextlib import suppress
from decimal import Decimal
from typing import Any

import numpy as np

from dlopt.data.types.arrow import pa, pc
from dlopt.data.types.canonical import as_number, as_text

TOO_LARGE = 2.0**128 - 2.0**103
"""From here on float32 rounds to infinity."""
DIGITS = 2.0**53
"""From here on float64 does not hold every whole number."""

Reasons = dict[int, str]
"""Row number within the table to why it cannot be used."""


def plain(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """One array without a dictionary, and no view, which Arrow computes little with."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    array = array.dictionary_decode() if pa.types.is_dictionary(array.type) else array
    return array.cast({pa.string_view(): pa.string(), pa.binary_view(): pa.binary()}.get(array.type, array.type))


def is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def without_empty(array: pa.Array) -> pa.Array:
    """Text with null for an empty one; what else says that a value is missing is null by then (see `Columns.canonical`)."""
    return pc.if_else(pc.equal(array, ""), None, array) if is_text(array.type) else array


def numbers(column: pa.ChunkedArray | pa.Array) -> tuple[np.ndarray, Reasons]:
    """Values as float64 with NaN where missing, and the reason for each row that is no number, or one that the model's float32 cannot
    reach. Equal values have equal bits: there is one zero and one NaN."""
    values, reasons = doubles(column)
    values = values + 0.0
    infinite = np.abs(values) >= TOO_LARGE
    values[infinite | np.isnan(values)] = np.nan
    return values, reasons | {int(row): "a number is too large" for row in np.flatnonzero(infinite)}


def doubles(column: pa.ChunkedArray | pa.Array) -> tuple[np.ndarray, Reasons]:
    """Values as float64 with NaN where missing, and the reason for each row that is no number."""
    array = without_empty(plain(column))
    try:
        return array.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False), {}
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return _doubles_by_row(array)


def _doubles_by_row(column: pa.Array) -> tuple[np.ndarray, Reasons]:
    values, reasons = np.full(len(column), np.nan), {}
    for row, value in enumerate(column.to_pylist()):
        if value is None:
            continue
        try:
            values[row] = as_number(value)
        except ValueError:
            reasons[row] = f"{value!r:.40} is not a number"
    return values, reasons


def lost_in_double(column: pa.ChunkedArray | pa.Array, values: np.ndarray) -> np.ndarray | None:
    """What float64 does not hold of numbers that were read as `values`, float64 (rows,): of whole numbers of more than 53 bits, and of
    decimal ones as long. None where it holds all."""
    array = plain(column)
    kind, large = array.type, np.abs(values)
    least = DIGITS / (10.0**kind.scale if pa.types.is_decimal(kind) else 1)
    if pa.types.is_floating(kind) or not (large >= least).any():
        return None
    rows = np.flatnonzero(large >= least)
    some, near = array.take(pa.array(rows)), values[rows]
    rest = np.zeros(len(values))
    if is_text(kind):
        with suppress(pa.ArrowInvalid):
            some = some.cast(pa.int64())
    if pa.types.is_integer(some.type):  # in two halves, each of which float64 holds
        high = pc.shift_right(some, pa.scalar(32, some.type)).cast(pa.float64()).to_numpy(zero_copy_only=False)
        low = pc.bit_wise_and(some, pa.scalar(2**32 - 1, some.type)).cast(pa.float64()).to_numpy(zero_copy_only=False)
        rest[rows] = (high * 2.0**32 - near) + low
    elif is_text(kind) or pa.types.is_decimal(kind):
        rest[rows] = [_left(value, float(number)) for value, number in zip(some.to_pylist(), near, strict=True)]
    return rest if rest.any() else None


def _left(value: Decimal | str, number: float) -> float:
    """Of a decimal number that float64 holds only nearly, nothing when it is the shortest one that is read as this float64."""
    exact = Decimal(value)
    return 0.0 if exact != exact.to_integral_value() and exact == Decimal(repr(number)) else float(exact - Decimal(number))


def texts(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """Every value as the text that stands for it (see canonical.as_text), "" where it is missing; never null."""
    array = plain(column)
    if pa.types.is_nested(array.type):
        array = _as_json(array)
    if is_text(array.type):
        return array.cast(pa.string()).fill_null("")
    if pa.types.is_timestamp(array.type):
        array = in_micros(array)  # Python has no nanoseconds
    codes = array.dictionary_encode()  # so that each value is looked at once
    known = pa.array([*map(as_text, _shortest(codes.dictionary)), ""], pa.string())
    return known.take(codes.indices.fill_null(len(known) - 1))


def in_micros(array: pa.Array) -> pa.Array:
    """Dates or timestamps as timestamps of microseconds, in UTC if they have a zone."""
    zoned = array.cast(pa.timestamp("us", "UTC"), safe=False) if getattr(array.type, "tz", None) else array
    return zoned.cast(pa.timestamp("us"), safe=False)


def _as_json(array: pa.Array) -> pa.Array:
    """Lists, structs and maps as JSON's texts, null where missing."""
    return pa.array([None if value is None else json.dumps(value, default=str) for value in array.to_pylist()], pa.string())


def _shortest(array: pa.Array) -> list[Any]:
    """Values for Python; a float32 as the shortest number that it can be, which is what was written when it was made: 0.1."""
    if pa.types.is_float32(array.type) or pa.types.is_float16(array.type):
        return [float(str(value)) for value in array.to_numpy(zero_copy_only=False)]
    return array.to_pylist()
