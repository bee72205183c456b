"""Files of typed columns: parquet and Arrow. Parts of a large file are read by several workers."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from dlopt.data.sources.partitions import added, types_of, values_of
from dlopt.data.sources.places import File, Place, reading
from dlopt.data.sources.reading import MAX_BLOCK, Files, Named, Piece, conform, joined, plain
from dlopt.part import DloptError

MOST_OPENED = 256
"""Of more files than this, only so many are opened in advance; the rest are read one by one."""
PEEK_BYTES = 2**16
"""Read at a time of each column for a look at the first rows."""
BATCH_ROWS = 4096
"""Most rows of texts that are read at a time before their bytes are counted."""


class Parquet(Files):
    """Parquet files; a column of images holds encoded bytes (PNG, JPEG, ...) or nested numbers."""

    endings: ClassVar[tuple[str, ...]] = (".parquet",)

    kind: Literal["parquet"] = "parquet"

    def first(self, rows: int) -> pa.Table:
        place, files = self.located()
        types = types_of(file.folder for file in files)
        for file in files:
            with _parquet(place, file.name, file.path, PEEK_BYTES) as parquet:
                found = parquet.schema_arrow.empty_table()
                if parquet.metadata.num_rows:
                    found = pa.Table.from_batches([next(parquet.iter_batches(batch_size=max(rows, 1)))])
                    break
        found = added(found, file.folder, types)
        shared = {field.name: field.type for field in self.layout(())}
        return conform(file.name, found, pa.schema([(field.name, shared.get(field.name, field.type)) for field in plain(found.schema)]))

    def layout(self, columns: Sequence[str] | None = None) -> pa.Schema:
        """The first file's columns, in types that hold the other files' values as well: a column of whole numbers may be one of
        fractions where a value is missing."""
        place, files = self.located()
        schemas = place.each(lambda file: _look(place, file)[0], files[:MOST_OPENED])
        found = _together(schemas, [file.name for file in files], columns)
        return added(found.empty_table(), "", types_of(file.folder for file in files)).schema

    def pieces(self) -> tuple[Place, list[Piece]]:
        place, files = self.located()
        found = place.each(lambda file: _look(place, file)[1], files[:MOST_OPENED])
        return place, [piece for some in found for piece in some] + [
            Piece(file.name, file.path, bytes=file.size, folder=file.folder) for file in files[MOST_OPENED:]
        ]

    def load(self, place: Place | None, pieces: Sequence[Piece], columns: Sequence[str] | None = None) -> Iterator[Named]:
        assert place is not None
        for piece in joined(pieces):
            says = {name: pa.string() for name in values_of(piece.folder)}
            with _parquet(place, piece.name, piece.path) as parquet:
                yield piece.name, added(parquet.schema_arrow.empty_table(), piece.folder, says)
                for some in _batches_of(parquet, piece, columns):
                    yield piece.name, added(some, piece.folder, says)


class Arrow(Files):
    """Arrow files, also called feather: what `pyarrow.feather`, `pyarrow.ipc` and pandas' `to_feather` write."""

    endings: ClassVar[tuple[str, ...]] = (".arrow", ".feather", ".arrows")

    kind: Literal["arrow"] = "arrow"

    def first(self, rows: int) -> pa.Table:
        return conform(self.files()[0], super().first(rows), self.layout())

    def layout(self, columns: Sequence[str] | None = None) -> pa.Schema:
        return added(super().first(1).slice(0, 0), "", types_of(file.folder for file in self.located()[1])).schema

    def pieces(self) -> tuple[Place, list[Piece]]:
        place, files = self.located()
        found = place.each(lambda file: _batches(place, file), files[:MOST_OPENED])
        return place, [piece for some in found for piece in some] + [
            Piece(file.name, file.path, bytes=file.size, folder=file.folder) for file in files[MOST_OPENED:]
        ]

    def load(self, place: Place | None, pieces: Sequence[Piece], columns: Sequence[str] | None = None) -> Iterator[Named]:
        assert place is not None
        for piece in joined(pieces):
            says = {name: pa.string() for name in values_of(piece.folder)}
            with reading(piece.name), place.file(piece.path) as opened:
                is_file = _is_file(opened)
                batches: Any = pa.ipc.open_file(opened) if is_file else pa.ipc.open_stream(opened)
                yield piece.name, added(batches.schema.empty_table(), piece.folder, says)
                numbers = range(piece.start, piece.stop or batches.num_record_batches) if is_file else []
                for batch in map(batches.get_batch, numbers) if is_file else batches:
                    batch.validate(full=True)  # these files have no checksums, and a place beyond a column's end would end the process
                    yield piece.name, added(pa.Table.from_batches([batch]), piece.folder, says)


@contextmanager
def _parquet(place: Place, name: str, path: str, buffer: int = 0) -> Iterator[pq.ParquetFile]:
    """buffer: bytes to be read at a time, so that no more is read than the rows that are wanted; 0 reads what a row group has of a column
    at once."""
    with reading(name), place.file(path) as opened, pq.ParquetFile(opened, buffer_size=buffer, pre_buffer=not buffer) as parquet:
        yield parquet


def _batches_of(parquet: pq.ParquetFile, piece: Piece, columns: Sequence[str] | None) -> Iterator[pa.Table]:
    """The rows of a piece, of about MAX_BLOCK bytes at a time: bytes of values, of which a file that holds each text once may have few."""
    groups = list(range(piece.start, piece.stop or parquet.metadata.num_row_groups))
    rows = sum(parquet.metadata.row_group(group).num_rows for group in groups)
    size = sum(parquet.metadata.row_group(group).total_byte_size for group in groups)
    batch = max(1, rows * MAX_BLOCK // max(size, MAX_BLOCK))
    schema, wanted = parquet.schema_arrow, None if columns is None else set(columns)  # a schema that is made anew at each look
    chosen = [field for field in schema if wanted is None or field.name in wanted]
    if any(not is_fixed_width(field.type) for field in chosen):
        batch = min(batch, BATCH_ROWS)
    names = None if wanted is None else [field.name for field in chosen]
    some, held = list[pa.RecordBatch](), 0
    for one in parquet.iter_batches(batch, row_groups=groups, columns=names, use_threads=False):
        some.append(one)
        held += one.nbytes
        if held >= MAX_BLOCK:
            yield pa.Table.from_batches(some)
            some, held = [], 0
    if some:
        yield pa.Table.from_batches(some)


def is_fixed_width(kind: pa.DataType) -> bool:
    """Whether all values of a type have the same size."""
    return pa.types.is_primitive(kind) or pa.types.is_decimal(kind) or pa.types.is_fixed_size_binary(kind)


def _look(place: Place, file: File) -> tuple[pa.Schema, list[Piece]]:
    with _parquet(place, file.name, file.path) as parquet:
        return parquet.schema_arrow, _row_groups(file, parquet.metadata)


def _row_groups(file: File, metadata: pq.FileMetaData) -> list[Piece]:
    sizes = [metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)]
    if not sizes:
        return [Piece(file.name, file.path, folder=file.folder)]
    return [Piece(file.name, file.path, group, group + 1, size, file.folder) for group, size in enumerate(sizes)]


def _batches(place: Place, file: File) -> list[Piece]:
    """The batches of a file, or all of a stream."""
    with reading(file.name), place.file(file.path) as opened:
        count = pa.ipc.open_file(opened).num_record_batches if _is_file(opened) else 0
    if not count:
        return [Piece(file.name, file.path, bytes=file.size, folder=file.folder)]
    return [Piece(file.name, file.path, number, number + 1, file.size // count, file.folder) for number in range(count)]


def _together(schemas: Sequence[pa.Schema], names: Sequence[str], asked: Collection[str] | None) -> pa.Schema:
    """One schema for the columns of the first one. Of a column that nobody has asked for the type may change. Raises DloptError."""
    schemas = [plain(schema) for schema in schemas]
    found = dict(zip(schemas[0].names, schemas[0].types, strict=True))
    for schema, name in zip(schemas[1:], names[1:], strict=False):
        for field in schema:
            if field.name not in found or found[field.name] == field.type:
                continue
            try:
                both = [pa.schema([(field.name, kind)]) for kind in (found[field.name], field.type)]
                found[field.name] = pa.unify_schemas(both, promote_options="permissive").field(0).type
            except pa.ArrowException as error:
                if asked is None or field.name in asked:
                    raise DloptError(f"{name}: its columns are not those of {names[0]}: {str(error).splitlines()[0]}") from None
    return pa.schema(list(found.items()))


def _is_file(opened: Any) -> bool:
    """Whether it is Arrow's format for files, not the one for streams."""
    start = opened.read(6)
    opened.seek(0)
    return start == b"ARROW1"
