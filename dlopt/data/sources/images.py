"""Files of images: in a folder for each class, or listed in a table."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import pyarrow as pa
from pydantic import Field

from dlopt.data.sources.lines import Csv, JsonLines
from dlopt.data.sources.places import Listing, Place, in_folders, place_of, reading
from dlopt.data.sources.reading import Files, Named, Piece, Rows, first_rows
from dlopt.data.sources.tables import Arrow, Parquet
from dlopt.data.types.columns import Columns
from dlopt.part import DloptError

if TYPE_CHECKING:
    from ray.data import Dataset

    from dlopt.data.types.canonical import ColumnType

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
AT_ONCE = 64
"""Files that become one table; from an object store they are fetched side by side."""
TASK_ROWS = 1024
"""Images of a table that one task fetches."""


class Folders(Files):
    """What the sources with a folder for each class have in common."""

    what: ClassVar[str]

    path: str
    """A folder that holds one folder for each class, of files and of folders of them; on a disk that every node of the cluster sees, or
    behind s3://, gs://, abfs://."""

    missing: tuple[str, ...] = ("",)
    """Texts that say that a value is missing; a folder's name never does."""

    def listed(self) -> Listing:
        found = in_folders(self.path, self.endings)
        if not found.files:
            but = f": {found}" if found.left_out else ""
            raise DloptError(f"{self.path}: holds no CLASS/{self.what} files ({', '.join(self.endings)}){but}")
        return found

    def meaning(self) -> Columns:
        return Columns(self.types, self.missing)

    def first(self, rows: int) -> pa.Table:
        """As many rows, at most AT_ONCE, from all over the folders: files follow each other by class."""
        place, pieces = self.pieces()
        most = max(1, min(rows, AT_ONCE, len(pieces)))
        return first_rows(self.load(place, [pieces[number * len(pieces) // most] for number in range(most)]), rows)

    def load(self, place: Place | None, pieces: Sequence[Piece], columns: Sequence[str] | None = None) -> Iterator[Named]:
        assert place is not None
        for start in range(0, len(pieces), AT_ONCE):
            some = pieces[start : start + AT_ONCE]
            labels = [piece.folder.partition("/")[0] for piece in some]
            values = self.values(place, some)
            yield self.path, pa.table({self.what.lower(): values, "label": labels, "path": pa.array([p.name for p in some], pa.string())})

    def values(self, place: Place, pieces: Sequence[Piece]) -> pa.Array:
        raise NotImplementedError


class Images(Folders):
    """A folder with one folder of image files for each class; columns `image`, `label` (the folder's name) and `path`."""

    endings: ClassVar[tuple[str, ...]] = IMAGE_ENDINGS
    what: ClassVar[str] = "IMAGE"

    kind: Literal["images"] = "images"

    def values(self, place: Place, pieces: Sequence[Piece]) -> pa.Array:
        return contents(place, [piece.path for piece in pieces])


class Texts(Folders):
    """A folder with one folder of text files for each class; columns `text`, `label` (the folder's name) and `path`."""

    what: ClassVar[str] = "TEXT"

    kind: Literal["text"] = "text"
    encoding: str = "utf-8"
    """How letters are written in the files: utf-8, latin-1, cp1252, utf-16, ..."""
    endings: tuple[str, ...] = (".txt",)  # type: ignore[misc]
    """Which files are read, by the ends of their names."""

    def values(self, place: Place, pieces: Sequence[Piece]) -> pa.Array:
        return pa.array([self._text(place, piece) for piece in pieces], pa.string())

    def _text(self, place: Place, piece: Piece) -> str:
        with reading(piece.name):
            content = place.read(piece.path)
        try:
            return content.decode("utf-8-sig" if self.encoding == "utf-8" else self.encoding)
        except UnicodeDecodeError as error:
            line = 1 + content.count(b"\n", 0, error.start)
            raise DloptError(f"{piece.name}: line {line} is not {self.encoding}: set encoding, for example to latin-1") from None


class ImageTable(Rows):
    """Images that a table lists: its column of paths becomes one of images; its other columns stay as they are. A file that cannot
    be read is an empty image, which is set aside as a bad row."""

    kind: Literal["image_table"] = "image_table"
    table: Annotated[Csv | JsonLines | Parquet | Arrow, Field(discriminator="kind")]
    """The table: a source of its own."""
    column: str = "image"
    """The column of paths."""
    folder: str
    """The folder that the paths start from."""

    def found(self) -> Any:
        """What the table depends on, and a digest of the names, sizes and times of all images."""
        place, folder = place_of(self.folder)
        digest, count = hashlib.sha256(), 0
        with reading(self.folder):
            for _, table in self.table.load(*self.table.pieces()):
                paths = [_within(folder, path) for path in self._paths(table) if path]
                for file in place.file_infos(paths):
                    digest.update(f"{file.path}\t{file.size}\t{file.changed}\n".encode())
                count += len(paths)
        return [self.table.found(), count, digest.hexdigest()]

    def left_out(self) -> str:
        return self.table.left_out()

    def meaning(self) -> Columns:
        return self.table.meaning()

    def stated(self) -> tuple[dict[str, ColumnType], tuple[str, ...]]:
        return self.table.stated()

    def first(self, rows: int) -> pa.Table:
        place, folder = place_of(self.folder)
        return self._with_images(self.table.peek(rows), place, folder)

    def read(self, columns: Sequence[str] | None = None) -> Dataset:
        place, folder = place_of(self.folder)
        rows = self.table.read(None if columns is None else [*columns, self.column])
        spread = rows.repartition(target_num_rows_per_block=TASK_ROWS, strict=True)  # a small table may list many large images
        return spread.map_batches(lambda table: self._with_images(table, place, folder), batch_size=AT_ONCE, batch_format="pyarrow")

    def _paths(self, table: pa.Table) -> list[str | None]:
        if self.column not in table.column_names:
            raise DloptError(f"has no column {self.column!r}; its columns are {', '.join(table.column_names)}")
        return [None if path is None else str(path) for path in table[self.column].to_pylist()]

    def _with_images(self, table: pa.Table, place: Place, folder: str) -> pa.Table:
        paths = [_within(folder, path) if path else "" for path in self._paths(table)]
        return table.set_column(table.column_names.index(self.column), self.column, contents(place, paths))


def contents(place: Place, paths: Sequence[str]) -> pa.Array:
    """The bytes of files; a file that cannot be read is an empty one, which is set aside later as no image."""

    def content(path: str) -> bytes:
        try:
            return place.read(path) if path else b""
        except (OSError, ValueError, pa.ArrowException):
            return b""

    return pa.array(place.each(content, paths), pa.binary())


def _within(folder: str, path: str) -> str:
    return path if path.startswith("/") else f"{folder.rstrip('/')}/{path}"
