"""Numbers on their way through prepare: what the source says, until it is known what float32 has to keep of them.

A model sees float32, which has 24 bits: of seconds since 1970 it keeps every 128th, of an amount of 10^12 not even the thousands. So
rows are compared by the numbers of the source; pieces hold these, as float32 where that loses nothing and else as float64; and from a
column whose values lie closely together far from 0, an offset is subtracted in float64 before the rest becomes float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from dlopt.data.counter import mix, row_keys
from dlopt.data.types.arrow import pa
from dlopt.data.types.tensors import array_of, column_of
from dlopt.part import Feature, Target

CLOSE = 64
"""So many times as far from 0 as they are apart, values lose more than 6 of float32's 24 bits, and an offset is worth its while."""
MOST = 0.9
"""Share of a column's different values that must lie so closely together; others may be marks of what is missing."""


def exact_column(values: np.ndarray) -> pa.Array:
    """Numbers, float64 (rows, columns), as they lie in a piece: each row the bytes of float32 if that holds all of them, or of float64."""
    with np.errstate(over="ignore"):
        single = values.astype(np.float32)
    held = single == values
    held |= np.isnan(values)
    return column_of(single if held.all() else values)


def raw_values(column: pa.ChunkedArray | pa.Array, width: int) -> np.ndarray:
    """The way back, float32 or float64 (rows, columns)."""
    column = column if isinstance(column, pa.ChunkedArray) else pa.chunked_array([column])
    return array_of(column, "float64" if column.type.byte_width == 8 * width else "float32", (width,))


def values_of(column: pa.ChunkedArray | pa.Array, known: Feature | Target) -> np.ndarray:
    """Numbers of a piece as the model gets them, float32 (rows, columns), less the offsets of their input or target."""
    return shifted(raw_values(column, math.prod(known.shape)), known.offsets)


def shifted(values: np.ndarray, offsets: Sequence[float]) -> np.ndarray:
    """Numbers (rows, columns) as the model gets them, float32: less their offsets, which are subtracted in float64. An exported graph
    does the same with what `encode_rows` gives it."""
    with np.errstate(over="ignore"):
        return (values - np.array(offsets) if offsets else values).astype(np.float32, copy=False)


def widened(tables: Sequence[pa.Table]) -> list[pa.Table]:
    """Rows of several pieces with the same types: float64 wherever one of them needs it."""
    found = list(tables)
    for place, name in enumerate(found[0].column_names if found else ()):
        kinds = {table.schema.field(place).type for table in found}
        if len(kinds) == 2 and all(pa.types.is_fixed_size_binary(kind) for kind in kinds):
            width = max(kind.byte_width for kind in kinds) // 8
            wide = (column_of(raw_values(table[name], width).astype(np.float64)) for table in found)
            found = [table.set_column(place, name, column) for table, column in zip(found, wide, strict=True)]
    return found


def merged(different: np.ndarray) -> int:
    """How many of a column's different values, float64 (values,), sorted, are the same as the one before in float32, less an offset."""
    single = shifted(different, ())
    if (single != different).any():
        single = shifted(different, (offset_of(different),))
    return int(np.count_nonzero(single[1:] == single[:-1]))


def lost_in_single(values: np.ndarray) -> np.ndarray:
    """What float32 does not hold of numbers (rows, columns), as keys uint64 (rows, 2); zeros for rows of which it holds all."""
    if values.dtype == np.float32:
        return np.zeros((len(values), 2), np.uint64)
    rest = np.nan_to_num(values - values.astype(np.float32))
    return keys_of_rest(rest)


def keys_of_rest(rest: np.ndarray) -> np.ndarray:
    """Keys uint64 (rows, 2) of what was left over, float64 (rows, columns); zeros for rows without any."""
    some = rest.any(axis=1)
    keys = np.zeros((len(rest), 2), np.uint64)
    keys[some] = row_keys([rest[some] + 0.0])
    return keys


def with_rest(keys: np.ndarray, rest: np.ndarray) -> np.ndarray:
    """Keys of rows, uint64 (rows, 2), that also tell apart what was left over; without any they stay."""
    return np.where((rest != 0).any(axis=1).reshape(-1, 1), mix(keys ^ rest), keys)


def offset_of(different: np.ndarray) -> float:
    """What to subtract from a column so that float32 tells its different values apart, float64 (values,), sorted; 0 where that is no
    help. The least window that holds MOST of the different values decides: its middle value it is, from which others differ by round
    numbers if they themselves are any; and float64 holds all these differences (Sterbenz 1974)."""
    size = math.ceil(MOST * len(different))
    if size < 2 or (different == shifted(different, ())).all():
        return 0.0
    widths = different[size - 1 :] - different[: len(different) - size + 1]
    first = int(widths.argmin())
    low, high = different[first], different[first + size - 1]
    if max(abs(low), abs(high)) <= CLOSE * (high - low):
        return 0.0
    return float(different[first + size // 2])


def offsets_of(values: np.ndarray) -> tuple[float, ...]:
    """The offset of each column, (rows, columns); () when none has any."""
    if values.dtype == np.float32:
        return ()
    found = tuple(offset_of(np.unique(column[~np.isnan(column)])) for column in values.T)
    return found if any(found) else ()
