"""Data that a Python program holds, as a source: written to a file once, so that the job is as reproducible as one made of files."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dlopt.data.sources.lines import of_rows
from dlopt.data.sources.reading import MAX_BLOCK, as_type
from dlopt.data.sources.tables import Parquet, is_fixed_width
from dlopt.part import DloptError

LOOK_ROWS = 1024
"""Rows of different sizes that are written without counting their bytes."""


def from_data(data: Any, folder: str | Path) -> Parquet:
    """A source of what is in memory: a pyarrow Table, a pandas or polars DataFrame, a dict of numpy arrays (images as uint8 of shape (rows,
    height, width, channels)), or a list of dicts.

    It is written to `folder`, in a file named by its content's digest; the same content again finds the same file. Every node must
    see the folder. Raises DloptError for what makes no table.
    """
    table = table_of(data)
    if not table.column_names:
        raise DloptError("from_data: the data has no columns")
    folder = Path(folder).resolve()
    part = folder / f"{uuid.uuid4().hex}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{_written(table, part)}.parquet"
        if not path.is_file():
            part.replace(path)
    except OSError as error:
        raise DloptError(f"from_data: cannot write to {folder}: {error.strerror or error}") from None
    finally:
        part.unlink(missing_ok=True)
    return Parquet(path=str(path))


def _written(table: pa.Table, path: Path) -> str:
    """Write a table as parquet; the digest of the file."""
    schema = pa.schema([(name, _usual(kind)) for name, kind in zip(table.column_names, table.schema.types, strict=True)])
    with pq.ParquetWriter(path, schema, compression="zstd") as sink:
        for group in _groups(table, schema):
            sink.write_table(group, row_group_size=max(len(group), 1))
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]


def _groups(table: pa.Table, schema: pa.Schema) -> Iterator[pa.Table]:
    """The rows in groups of about MAX_BLOCK bytes, whatever chunks the table has: a few rows are looked at at a time where their sizes
    differ, since no array of strings holds more than two gigabytes."""
    widths = [kind.bit_width for kind in schema.types if is_fixed_width(kind)]
    step = LOOK_ROWS if len(widths) < len(schema) else max(1, 8 * MAX_BLOCK // sum(widths))
    some: list[pa.Table] = []
    for start in range(0, len(table), step):
        columns = [as_type(column, kind) for column, kind in zip(table.slice(start, step).columns, schema.types, strict=True)]
        some.append(pa.table(columns, schema=schema))
        if sum(part.nbytes for part in some) >= MAX_BLOCK or start + step >= len(table):
            yield pa.concat_tables(some).combine_chunks()
            some = []


def of_frame(frame: Any) -> pa.Table:
    """A pandas DataFrame without its index; a column of values of several types becomes text."""
    columns = {str(name): _of_series(frame.iloc[:, place]) for place, name in enumerate(frame.columns)}
    if len(columns) < len(frame.columns):
        raise DloptError("from_data: two columns of the DataFrame have the same name")
    return pa.table(columns)


def table_of(data: Any) -> pa.Table:
    """What is in memory as a Table. Raises DloptError for what makes none."""
    if isinstance(data, pa.Table):
        return data
    if isinstance(data, Mapping):
        return _of_arrays(data)
    if isinstance(data, Sequence) and not isinstance(data, (str, bytes)) and all(isinstance(row, Mapping) for row in data):
        return of_rows(data)
    if type(data).__module__.partition(".")[0] == "pandas" and hasattr(data, "iloc") and hasattr(data, "columns"):
        return of_frame(data)
    if hasattr(data, "__arrow_c_stream__"):  # polars, DuckDB, ...
        return pa.table(data)
    if hasattr(data, "collect") and hasattr(data, "lazy"):
        raise DloptError("from_data: a LazyFrame has no rows yet: give its .collect()")
    raise DloptError(f"from_data: a {type(data).__name__} is no table: give a Table, a DataFrame, a dict of arrays or a list of dicts")


def _usual(kind: pa.DataType) -> pa.DataType:
    """The one of several types for the same values by which a content's digest goes."""
    if pa.types.is_dictionary(kind):
        return _usual(kind.value_type)
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        return pa.binary()
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(_usual(kind.value_type), kind.list_size)
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, _usual(field.type)) for field in kind])
    return pa.list_(_usual(kind.value_type)) if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind


def _of_series(series: Any) -> pa.Array:
    try:
        found = pa.Array.from_pandas(series)
    except (pa.ArrowException, OverflowError):
        found = pa.Array.from_pandas(series.astype(str).where(series.notna(), None))
    found = found.combine_chunks() if isinstance(found, pa.ChunkedArray) else found
    return found.dictionary_decode() if pa.types.is_dictionary(found.type) else found


def _of_arrays(data: Mapping[str, Any]) -> pa.Table:
    columns = {str(name): _of_array(str(name), np.asarray(values)) for name, values in data.items()}
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise DloptError(f"from_data: the arrays have different lengths: {', '.join(f'{name} {rows:,}' for name, rows in lengths.items())}")
    return pa.table(columns)


def _of_array(name: str, values: np.ndarray) -> pa.Array:
    """(rows, a, b, ...) as lists of fixed sizes within each other."""
    if values.ndim == 0:
        raise DloptError(f"from_data: {name!r} is one value, not an array of rows")
    try:
        found = pa.array(np.ascontiguousarray(values).reshape(-1).tolist() if values.dtype == object else values.reshape(-1))
    except (pa.ArrowException, OverflowError) as error:
        raise DloptError(f"from_data: {name!r} makes no column: {str(error).splitlines()[0]}") from None
    for size in reversed(values.shape[1:]):
        found = pa.FixedSizeListArray.from_arrays(found, size)
    return found
