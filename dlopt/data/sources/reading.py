"""What all sources have in common: pieces that are read one by one, here for a look, and by Ray's workers for all of them.

The rows of a source do not depend on how it is cut into pieces; the sizes only decide how well the work spreads.
"""

from __future__ import annotations

import itertools
import json
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import field_validator

from dlopt.data.sources.places import File, Listing, Place, matching, say_left_out
from dlopt.data.types.columns import Columns, Stated, decided
from dlopt.part import DloptError, Part

if TYPE_CHECKING:
    from ray.data import Dataset

    from dlopt.data.types.canonical import ColumnType

MIN_BLOCK, MAX_BLOCK = 2**20, 32 * 2**20
"""Bytes of rows that one task gets, about: small enough that a few megabytes keep several cores busy, large enough that the start of a
task does not count."""
LOOK_ROWS = 64
"""How many rows are looked at for what the columns mean."""
BLOCKS = 16
"""How many blocks a set is cut into that is neither small nor large."""


@dataclass(frozen=True)
class Piece:
    """What one call of `load` reads at once: a file, or a part of it."""

    name: str = ""
    """The file as it is said to the user."""
    path: str = ""
    """The file within its place."""
    start: int = 0
    """First of the parts that the file has (row groups, batches, rows), and one after the last; stop 0 stands for all."""
    stop: int = 0
    bytes: int = 0
    """About how much its rows take in memory."""
    folder: str = ""
    """The folders on the way to the file from the one that was asked for: a/b, or year=2026/month=11."""


Named = tuple[str, pa.Table]
"""Rows, and the file that they are from, as it is said to the user."""
Load = Callable[[Sequence[Piece]], Iterator[Named]]


class Rows(Part):
    """A source: `pieces` says what there is to read, `load` reads it."""

    def found(self) -> Any:
        """What the artifact's digest depends on beside the job, as JSON."""
        raise NotImplementedError

    def left_out(self) -> str:
        """What lies among the files and is not read, in one line; "" for nothing."""
        return ""

    def pieces(self) -> tuple[Place | None, list[Piece]]:
        """What `load` is to read, in order, and where it lies, for sources that are made of files."""
        raise NotImplementedError

    def load(self, place: Place | None, pieces: Sequence[Piece], columns: Sequence[str] | None = None) -> Iterator[Named]:
        """The rows of pieces, at least one table, which may have no rows; of files that can be read by column not more than these
        columns. Raises DloptError."""
        raise NotImplementedError

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """All rows in their order, read by this process: what `read` has Ray's workers do. Raises DloptError."""
        yield from self.shaped(*self.pieces(), wanted(self.layout(columns), columns))

    def shaped(self, place: Place | None, pieces: Sequence[Piece], schema: pa.Schema) -> Iterator[pa.Table]:
        """The rows of pieces in their order, with the columns of a schema; cut into the same tables every time. Raises DloptError."""
        for name, table in self.load(place, pieces, schema.names):
            yield conform(name, table, schema)

    def first(self, rows: int) -> pa.Table:
        """The first rows as they are read, without Ray. Raises DloptError."""
        place, pieces = self.pieces()
        return first_rows(self.load(place, pieces), rows)

    def looks(self) -> Iterator[pa.Table]:
        """The first rows of some files, by which the types of columns are decided."""
        yield self.first(LOOK_ROWS)

    def meaning(self) -> Columns:
        """What the columns mean. Raises DloptError."""
        return decided(self.looks(), *self.stated())

    def stated(self) -> tuple[dict[str, ColumnType], tuple[str, ...]]:
        """The types that the job states, and which texts say that a value is missing; where no job says so, no text does."""
        return (self.types, self.missing) if isinstance(self, Stated) else ({}, ("",))

    def peek(self, rows: int, meaning: Columns | None = None) -> pa.Table:
        """The first rows, without Ray, as values of the types that they have in all of the source: those of `meaning` where that is
        known already. Raises DloptError."""
        return (meaning or self.meaning()).typed(self.first(rows))

    def layout(self, columns: Sequence[str] | None = None) -> pa.Schema:
        """Names and Arrow's types of the columns that `read` gives. Raises DloptError for one of `columns` that files disagree on."""
        return self.first(1).schema

    def read(self, columns: Sequence[str] | None = None) -> Dataset:
        """All rows, in no particular order, read by Ray's workers: the columns that are asked for, or those of the first file.
        Each file must have them; other columns are left out."""
        place, pieces = self.pieces()
        schema = wanted(self.layout(columns), columns)
        return dataset_of(lambda some: self.load(place, some, schema.names), pieces, schema)


class Files(Stated, Rows):
    """What the sources made of files have in common."""

    endings: ClassVar[tuple[str, ...]]
    compressed: ClassVar[bool] = False
    """Whether files may be compressed: .gz, .bz2, .zst, .lz4."""

    path: str | tuple[str, ...]
    """A file, a folder or a glob (`data/*.parquet`), or a list of them; on disks that every node of the cluster sees, or
    behind s3://, gs://, abfs://, http:// or https:// (single files)."""

    @field_validator("path")
    @classmethod
    def path_names_something(cls, path: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not path or not all(path):
            raise ValueError("names no file")
        return path

    def listed(self) -> Listing:
        """The files, and what lies among them and is none of them; raises DloptError when there are none."""
        return matching(self.path, self.endings, self.compressed)

    def located(self) -> tuple[Place, list[File]]:
        """The files, sorted; raises DloptError when there are none."""
        found = self.listed()
        return found.place, found.files

    def left_out(self) -> str:
        return say_left_out(self.listed().left_out)

    def files(self) -> list[str]:
        """Their names."""
        return [file.name for file in self.located()[1]]

    def found(self) -> Any:
        """Names, sizes and times of the files: changed files are new data, so they make a new artifact."""
        return [file.state for file in self.located()[1]]

    def pieces(self) -> tuple[Place, list[Piece]]:
        place, files = self.located()
        return place, [Piece(file.name, file.path, bytes=file.size, folder=file.folder) for file in files]


def first_rows(tables: Iterator[Named], rows: int) -> pa.Table:
    """The first rows of the first table that has any."""
    for _, table in tables:
        if len(table):
            break
    return as_usual(table.slice(0, rows))


def as_usual(table: pa.Table) -> pa.Table:
    """A table of columns of the types that `plain` leaves them."""
    schema = plain(table.schema)
    return pa.table([as_type(column, field.type) for column, field in zip(table.columns, schema, strict=True)], schema=schema)


def as_type(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    """A column as another type, as Arrow casts it, or would if it could. Raises pyarrow.ArrowException."""
    own = column.type
    if isinstance(own, pa.BaseExtensionType):
        storage = pa.chunked_array([chunk.storage for chunk in column.chunks], own.storage_type)
        ids = [None if value is None else str(uuid.UUID(bytes=value)) for value in storage.to_pylist()] if own == pa.uuid() else None
        return as_type(storage, kind) if ids is None else pa.chunked_array([pa.array(ids, pa.string())])
    if pa.types.is_run_end_encoded(own):
        return as_type(pa.chunked_array([pc.run_end_decode(chunk) for chunk in column.chunks], own.value_type), kind)
    if pa.types.is_interval(own) or pa.types.is_union(own):
        texts = [None if value is None else json.dumps(value, default=str) for value in column.to_pylist()]
        return pa.chunked_array([pa.array(texts, pa.string())])
    if "list_view" in str(own):  # of which Arrow makes lists that end too early
        return pa.chunked_array([pa.array(chunk.to_pylist(), kind) for chunk in column.chunks], kind)
    if pa.types.is_dictionary(own) and usual(own) != own.value_type:  # which Arrow cannot decode
        words = [chunk.dictionary.cast(usual(own)) for chunk in column.chunks]
        arrays = [pa.DictionaryArray.from_arrays(chunk.indices, some) for chunk, some in zip(column.chunks, words, strict=True)]
        column = pa.chunked_array(arrays, pa.dictionary(own.index_type, usual(own)))
    return column if column.type == kind else column.cast(kind)


def wanted(schema: pa.Schema, columns: Sequence[str] | None) -> pa.Schema:
    """The part of a schema that is asked for."""
    if columns is None:
        return plain(schema)
    there = set(schema.names)
    return plain(pa.schema([schema.field(name) for name in dict.fromkeys(columns) if name in there]))


def plain(schema: pa.Schema) -> pa.Schema:
    """A schema without dictionaries and views, which are the file's own affair, and without metadata."""
    return pa.schema([(field.name, usual(field.type)) for field in schema])


def usual(kind: pa.DataType) -> pa.DataType:
    """A type without its dictionary or runs, and not as a view, which polars writes; within lists and structs as well. What parquet has
    no type for becomes text."""
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return usual(kind.value_type)
    if isinstance(kind, pa.BaseExtensionType):
        return {pa.uuid(): pa.string(), pa.bool8(): pa.bool_()}.get(kind) or usual(kind.storage_type)
    if pa.types.is_interval(kind) or pa.types.is_union(kind):
        return pa.string()
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(usual(kind.value_type), kind.list_size)
    if pa.types.is_list(kind) or pa.types.is_list_view(kind):
        return pa.list_(usual(kind.value_type))
    if pa.types.is_large_list(kind) or pa.types.is_large_list_view(kind):
        return pa.large_list(usual(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, usual(field.type)) for field in kind])
    return {pa.string_view(): pa.string(), pa.binary_view(): pa.binary()}.get(kind, kind)


def conform(name: str, table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The columns of a schema, in its order and of its types; raises DloptError that names the file and the column."""
    there = dict(zip(table.column_names, table.columns, strict=True))  # asked for one by one, a thousand columns take a second
    columns = []
    for field in schema:
        if field.name not in there:
            raise no_column(name, field.name, table.column_names)
        column = there[field.name]
        try:
            columns.append(as_type(column, field.type))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError):
            raise DloptError(
                f"{name}: column {field.name!r} is {column.type}, where it is {field.type} in the first of the files"
            ) from None
    return pa.Table.from_arrays(columns, schema=schema)


def no_column(name: str, column: str, columns: Sequence[str]) -> DloptError:
    return DloptError(f"{name}: has no column {column!r}; its columns are {', '.join(columns)}")


def block_bytes(pieces: Sequence[Piece]) -> int:
    """How large a block should be, for pieces of this size together."""
    return block_of(sum(piece.bytes for piece in pieces))


def block_of(size: int) -> int:
    """How many bytes a block should have of so many together."""
    return max(MIN_BLOCK, min(MAX_BLOCK, size // BLOCKS))


def dataset_of(load: Load, pieces: Sequence[Piece], schema: pa.Schema | None) -> Dataset:
    """The rows of pieces, in blocks of `block_bytes`."""

    def read(tasks: pa.Table) -> Iterator[pa.Table]:
        for name, table in load([Piece(**row) for row in tasks.to_pylist()]):
            yield table if schema is None else conform(name, table, schema)

    block = block_bytes(pieces)
    return dataset(read, [_as_table(some) for some in grouped(pieces, block)], block)


def dataset(read: Callable[[pa.Table], Iterator[pa.Table]], tasks: list[pa.Table], block: int) -> Dataset:
    """What is read of tasks, in blocks of so many bytes. Where there are few tasks, what comes after reading gets tasks of its own, so
    that a single file keeps more than one core busy."""
    import ray.data

    alone = len(tasks) if len(tasks) < BLOCKS else None  # Ray runs two maps as one task unless their concurrency differs
    rows = ray.data.from_arrow(tasks).map_batches(read, batch_size=None, batch_format="pyarrow", concurrency=alone)
    rows.context.target_max_block_size = block  # of this dataset and those made of it
    return rows


def from_table(table: pa.Table) -> Dataset:
    """The rows of a table that this process holds."""
    import ray.data

    rows = max(1, len(table) * block_of(table.nbytes) // max(table.nbytes, 1))
    return ray.data.from_arrow([table.slice(start, rows) for start in range(0, max(len(table), 1), rows)])


def grouped(pieces: Sequence[Piece], block: int) -> Iterator[list[Piece]]:
    """Pieces one after the other in groups of about `block` bytes."""
    ends = itertools.accumulate(piece.bytes for piece in pieces)
    places = [(end - piece.bytes) // block for end, piece in zip(ends, pieces, strict=True)]
    for _, some in itertools.groupby(zip(places, pieces, strict=True), key=lambda pair: pair[0]):
        yield [piece for _, piece in some]


def joined(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Parts of a file that follow each other as one, so that the file is opened once."""
    for _, some in itertools.groupby(pieces, key=lambda piece: piece.path):
        last, *others = some
        for piece in others:
            if 0 < last.stop == piece.start:
                last = replace(last, stop=piece.stop, bytes=last.bytes + piece.bytes)
            else:
                yield last
                last = piece
        yield last


def _as_table(pieces: Sequence[Piece]) -> pa.Table:
    return pa.Table.from_pylist([asdict(piece) for piece in pieces])


def missing_package(what: str, extra: str) -> DloptError:
    return DloptError(f"{what} needs another package: pip install 'dlopt[{extra}]'")
