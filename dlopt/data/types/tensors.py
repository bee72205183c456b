"""Tensors as columns of a table, a row of one the bytes of a cell, and what such columns are called."""

from __future__ import annotations

import math

import numpy as np

from dlopt.data.types.arrow import pa

SEPARATOR = "\x1f"
"""Between the parts of a name that is made of others (ASCII's unit separator)."""


def piece_column(tensor: str, column: str) -> str:
    """What a column of a category input is called on its way through prepare. No input's name holds the separator, so no two are alike."""
    return f"{tensor}{SEPARATOR}{column}"


def part_column(column: str, part: str) -> str:
    """What a part of a date is called where it stands as a column of its own."""
    return f"{column}.{part}"


def column_of(values: np.ndarray) -> pa.Array:
    """Values (rows, ...) as a column: of plain numbers, or of the bytes of each row."""
    if values.ndim == 1:
        return pa.array(values)
    buffer = pa.py_buffer(np.ascontiguousarray(values))
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(math.prod(values.shape[1:]) * values.itemsize), len(values), [None, buffer])


def array_of(column: pa.ChunkedArray, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """The way back from `column_of`, without a copy where the column is one piece. shape: of one row."""
    array = column.combine_chunks()
    if not shape:
        return array.to_numpy(zero_copy_only=False)
    size = math.prod(shape)
    data = np.frombuffer(array.buffers()[1] or b"", dtype=dtype)
    return data[array.offset * size : (array.offset + len(array)) * size].reshape(len(array), *shape)
