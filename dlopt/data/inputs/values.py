"""Raw columns, whatever type a source gave them, as plain values. What cannot be read gets a reason instead of stopping the rest."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dlopt.data.canonical import TRUTH, as_text
from dlopt.data.encode import parse_dates
from dlopt.part import DloptError

Reasons = dict[int, str]
"""Row number within the table to why it cannot be used."""


def plain(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """One array without a dictionary."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array


def is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def without_empty(array: pa.Array) -> pa.Array:
    """Text with null for an empty one; what else says that a value is missing is null by then (see `Columns.canonical`)."""
    return pc.if_else(pc.equal(array, ""), None, array) if is_text(array.type) else array


def floats(column: pa.ChunkedArray | pa.Array) -> tuple[np.ndarray, Reasons]:
    """Values as float32, which is what the model sees, with NaN where missing; and the reason for each row that is no number.
    Equal values have equal bits: there is one zero and one NaN."""
    values, reasons = doubles(column)
    with np.errstate(over="ignore"):
        values = values.astype(np.float32)
    values += 0
    infinite = np.isinf(values)
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
            values[row] = float(TRUTH.get(str(value).lower(), value) if "_" not in str(value) else "")  # 1_000 is Python's own
        except OverflowError:
            values[row] = np.inf
        except (TypeError, ValueError):
            reasons[row] = f"{value!r:.40} is not a number"
    return values, reasons


def texts(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """Every value as the text that stands for it (see canonical.as_text), "" where it is missing; never null."""
    array = plain(column)
    if is_text(array.type):
        return array.cast(pa.string()).fill_null("")
    if pa.types.is_timestamp(array.type):
        array = parse_dates(array, "")  # Python has no nanoseconds
    codes = array.dictionary_encode()  # so that each value is looked at once
    known = pa.array([*map(as_text, _shortest(codes.dictionary)), ""], pa.string())
    return known.take(codes.indices.fill_null(len(known) - 1))


def _shortest(array: pa.Array) -> list[Any]:
    """Values for Python; a float32 as the shortest number that it can be, which is what was written when it was made: 0.1."""
    if pa.types.is_float32(array.type) or pa.types.is_float16(array.type):
        return [float(str(value)) for value in array.to_numpy(zero_copy_only=False)]
    return array.to_pylist()


def dates(column: pa.ChunkedArray | pa.Array, form: str) -> tuple[pa.Array, Reasons]:
    """Values as timestamps of microseconds, null where missing, and the reason for each row that is no date.

    form: how dates are written, as strptime has it; "" for ISO 8601.
    """
    array = without_empty(plain(column))
    try:
        return parse_dates(array, form), {}
    except DloptError:
        pass
    codes = array.dictionary_encode()
    found: list[object] = []
    wrong: dict[int, str] = {}
    for index in range(len(codes.dictionary)):
        try:
            found.append(parse_dates(codes.dictionary.slice(index, 1), form)[0].as_py())
        except DloptError as error:
            found.append(None)
            wrong[index] = str(error)
    parsed = pa.array([*found, None], pa.timestamp("us"))
    indices = codes.indices.fill_null(len(found))
    rows = indices.to_numpy()
    return parsed.take(indices), {int(row): wrong[int(rows[row])] for row in np.flatnonzero(np.isin(rows, list(wrong)))}
