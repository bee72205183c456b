"""Files of typed columns: parquet and Arrow. Parts of a large file are read by several workers."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from dlopt.data.sources.places import File, Place, reading
from dlopt.data.sources.reading import MAX_BLOCK, Files, Named, Piece, conform, plain, usual
from dlopt.part import DloptError

MOST_OPENED = 256
"""Of more files than this, only so many are opened in advance; the rest are read one by one."""


class Parquet(Files):
    """Parquet files; a column of images holds encoded bytes (PNG, JPEG, ...) or nested numbers."""

    endings: ClassVar[tuple[str, ...]] = (".parquet",)

    kind: Literal["parquet"] = "parquet"

    def first(self, rows: int) -> pa.Table:
        place, files = self.located()
        for file in files:
            with _parquet(place, file.name, file.path) as parquet:
                found = parquet.schema_arrow.empty_table()
                if parquet.metadata.num_rows:
                    found = pa.Table.from_batches([next(parquet.iter_batches(batch_size=max(rows, 1)))])
                    break
        shared = {field.name: field.type for field in self.layout(())}
        return conform(file.name, found, pa.schema([(field.name, shared.get(field.name, field.type)) for field in plain(found.schema)]))

    def layout(self, columns: Sequence[str] | None = None) -> pa.Schema:
        """The first file's columns, in types that hold the other files' values as well: a column of whole numbers may be one of
        fractions where a value is missing."""
        place, files = self.located()
        return _together(place.each(lambda file: _look(place, file)[0], files[:MOST_OPENED]), [file.name for file in files], columns)

    def pieces(self) -> tuple[Place, list[Piece]]:
        place, files = self.located()
        found = place.each(lambda file: _look(place, file)[1], files[:MOST_OPENED])
        return place, [piece for some in found for piece in some] + [
            Piece(file.name, file.path, bytes=file.size) for file in files[MOST_OPENED:]
        ]

    def load(self, place: Place | None, pieces: Sequence[Piece]) -> Iterator[Named]:
        assert place is not None
        for piece in pieces:
            with _parquet(place, piece.name, piece.path) as parquet:
                groups = list(range(piece.start, piece.stop or parquet.metadata.num_row_groups))
                rows = sum(parquet.metadata.row_group(group).num_rows for group in groups)
                size = sum(parquet.metadata.row_group(group).total_byte_size for group in groups)
                batch = max(1, rows * MAX_BLOCK // max(size, MAX_BLOCK))
                yield piece.name, parquet.schema_arrow.empty_table()
                for some in parquet.iter_batches(batch, row_groups=groups, use_threads=False):
                    yield piece.name, pa.Table.from_batches([some])


class Arrow(Files):
    """Arrow files, also called feather: what `pyarrow.feather`, `pyarrow.ipc` and pandas' `to_feather` write."""

    endings: ClassVar[tuple[str, ...]] = (".arrow", ".feather", ".arrows")

    kind: Literal["arrow"] = "arrow"

    def pieces(self) -> tuple[Place, list[Piece]]:
        place, files = self.located()
        found = place.each(lambda file: _batches(place, file), files[:MOST_OPENED])
        return place, [piece for some in found for piece in some] + [
            Piece(file.name, file.path, bytes=file.size) for file in files[MOST_OPENED:]
        ]

    def load(self, place: Place | None, pieces: Sequence[Piece]) -> Iterator[Named]:
        assert place is not None
        for piece in pieces:
            with reading(piece.name), place.file(piece.path) as opened:
                is_file = _is_file(opened)
                batches: Any = pa.ipc.open_file(opened) if is_file else pa.ipc.open_stream(opened)
                yield piece.name, _without_views(batches.schema.empty_table())
                numbers = range(piece.start, piece.stop or batches.num_record_batches) if is_file else []
                for batch in map(batches.get_batch, numbers) if is_file else batches:
                    yield piece.name, _without_views(pa.Table.from_batches([batch]))


def _without_views(table: pa.Table) -> pa.Table:
    """Texts and bytes in Arrow's older layout, which all functions take."""
    for place, field in enumerate(table.schema):
        if field.type in (pa.string_view(), pa.binary_view()):
            table = table.set_column(place, field.name, table[place].cast(usual(field.type)))
    return table


@contextmanager
def _parquet(place: Place, name: str, path: str) -> Iterator[pq.ParquetFile]:
    with reading(name), place.file(path) as opened, pq.ParquetFile(opened) as parquet:
        yield parquet


def _look(place: Place, file: File) -> tuple[pa.Schema, list[Piece]]:
    with _parquet(place, file.name, file.path) as parquet:
        return parquet.schema_arrow, _row_groups(file, parquet.metadata)


def _row_groups(file: File, metadata: pq.FileMetaData) -> list[Piece]:
    sizes = [metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)]
    if not sizes:
        return [Piece(file.name, file.path)]
    return [Piece(file.name, file.path, group, group + 1, size) for group, size in enumerate(sizes)]


def _batches(place: Place, file: File) -> list[Piece]:
    """The batches of a file, or all of a stream."""
    with reading(file.name), place.file(file.path) as opened:
        count = pa.ipc.open_file(opened).num_record_batches if _is_file(opened) else 0
    if not count:
        return [Piece(file.name, file.path, bytes=file.size)]
    return [Piece(file.name, file.path, number, number + 1, file.size // count) for number in range(count)]


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
