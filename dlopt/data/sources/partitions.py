"""What folders such as year=2026/month=11 say of all rows of the files in them, as Hive, Spark and pyarrow.dataset write tables."""

from __future__ import annotations

from collections.abc import Iterable
from urllib.parse import unquote

import pyarrow as pa

MISSING = "__HIVE_DEFAULT_PARTITION__"
"""How a folder says that a value is missing."""


def values_of(folder: str) -> dict[str, str | None]:
    """The columns that the folders on the way to a file make, and their value."""
    pairs = (part.partition("=") for part in folder.split("/") if "=" in part)
    return {unquote(name): None if value == MISSING else unquote(value) for name, _, value in pairs}


def types_of(folders: Iterable[str]) -> dict[str, pa.DataType]:
    """The types of these columns: whole numbers where all values are, else text, as pyarrow has it."""
    seen: dict[str, set[str]] = {}
    for folder in set(folders):
        for name, value in values_of(folder).items():
            seen.setdefault(name, set()).update(() if value is None else (value,))
    return {name: pa.int64() if values and all(map(_is_whole, values)) else pa.string() for name, values in seen.items()}


def added(table: pa.Table, folder: str, types: dict[str, pa.DataType]) -> pa.Table:
    """A file's rows with these columns, in place of columns of the file that have the same name."""
    values = values_of(folder)
    for name, kind in types.items():
        value = values.get(name)
        column = pa.nulls(len(table), kind) if value is None else pa.repeat(pa.scalar(value).cast(kind), len(table))
        place = table.column_names.index(name) if name in table.column_names else -1
        table = table.append_column(name, column) if place < 0 else table.set_column(place, name, column)
    return table


def _is_whole(text: str) -> bool:
    return text.isascii() and text.removeprefix("-").isdigit() and len(text) < 19
