"""Files of images: in a folder for each class, or listed in a table."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from dlopt.data.sources import places
from dlopt.data.sources.lines import Csv, JsonLines
from dlopt.data.sources.reading import Files, Named, Piece, Rows, block_of, dataset, wanted
from dlopt.data.sources.tables import Arrow, Parquet
from dlopt.data.types.columns import Columns, Stated
from dlopt.part import DloptError

if TYPE_CHECKING:
    from ray.data import Dataset

    from dlopt.data.types.canonical import ColumnType

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
AT_ONCE = 64
"""Files that become one table; from an object store they are fetched side by side."""
TASK_ROWS = 1024
"""Images of a table that one task fetches."""


class Folders(Stated, Rows):
    """What the sources with a folder for each class have in common. Of each file, of which there may be millions, no more is held than
    its name, size and time."""

    endings: ClassVar[tuple[str, ...]]
    what: ClassVar[str]
    """What a file is, which is also the name of its column."""
    holds: ClassVar[pa.DataType]

    path: str = Field(min_length=1)
    """A folder that holds one folder for each class, of files and of folders of them; on a disk that every node of the cluster sees, or
    behind s3://, gs://, abfs://."""

    missing: tuple[str, ...] = ("",)
    """Texts that say that a value is missing; a folder's name never does."""

    def listed(self) -> places.Folders:
        """The files; raises DloptError when there are none."""
        found = places.in_folders(self.path, self.endings)
        if not len(found.files):
            but = f": {said}" if (said := places.say_left_out(found.left_out)) else ""
            raise DloptError(f"{self.path}: holds no CLASS/{self.what} files ({', '.join(self.endings)}){but}")
        return found

    def left_out(self) -> str:
        return places.say_left_out(self.listed().left_out)

    def files(self) -> list[str]:
        """Their names, sorted."""
        found = self.listed()
        return [f"{found.place.prefix}{found.path}/{inside}" for inside in found.files["inside"].to_pylist()]

    def found(self) -> Any:
        """How many files there are, and a digest of their names, sizes and times: changed files are new data."""
        found, digest = self.listed(), hashlib.sha256()
        for batch in found.files.to_batches(max_chunksize=places.LISTED):
            columns = [batch["inside"], batch["size"].cast(pa.large_string()), batch["changed"].cast(pa.large_string())]
            lines = pc.binary_join_element_wise(*columns, pa.scalar("\t", pa.large_string()), null_handling="replace")
            digest.update("\n".join(lines.to_pylist()).encode() + b"\n")
        return [places.as_sent(found.place.prefix + found.path), len(found.files), digest.hexdigest()]

    def meaning(self) -> Columns:
        return Columns(self.types, self.missing)

    def layout(self, columns: Sequence[str] | None = None) -> pa.Schema:
        return pa.schema([(self.what.lower(), self.holds), ("label", pa.string()), ("path", pa.string())])

    def first(self, rows: int) -> pa.Table:
        """As many rows, at most AT_ONCE, from all over the folders: files follow each other by class."""
        found = self.listed()
        most = max(1, min(rows, AT_ONCE, len(found.files)))
        some = pa.array([number * len(found.files) // most for number in range(most)])
        return next(self._rows(found.place, found.path, found.files.take(some)))

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        found = self.listed()
        schema = wanted(self.layout(), columns)
        return (table.select(schema.names) for table in self._rows(found.place, found.path, found.files))

    def read(self, columns: Sequence[str] | None = None) -> Dataset:
        found = self.listed()
        schema, sizes = wanted(self.layout(), columns), found.files["size"].to_numpy()
        block = block_of(int(sizes.sum()))
        starts = np.flatnonzero(np.diff((np.cumsum(sizes) - sizes) // block, prepend=-1))
        files = found.files.select(["inside"])
        tasks = [files.slice(start, stop - start) for start, stop in itertools.pairwise([*starts.tolist(), len(files)])]
        place, path = found.place, found.path
        return dataset(lambda some: (table.select(schema.names) for table in self._rows(place, path, some)), tasks, block)

    def _rows(self, place: places.Place, folder: str, files: pa.Table) -> Iterator[pa.Table]:
        """The rows of some files, a few at a time."""
        for start in range(0, len(files), AT_ONCE):
            some = files["inside"].slice(start, AT_ONCE).to_pylist()
            labels, paths = [inside.partition("/")[0] for inside in some], [f"{folder}/{inside}" for inside in some]
            yield pa.table([self.values(place, paths), labels, [place.prefix + path for path in paths]], schema=self.layout())

    def values(self, place: places.Place, paths: Sequence[str]) -> pa.Array:
        """What is in files. Raises DloptError."""
        raise NotImplementedError


class Images(Folders):
    """A folder with one folder of image files for each class; columns `image`, `label` (the folder's name) and `path`."""

    endings: ClassVar[tuple[str, ...]] = IMAGE_ENDINGS
    what: ClassVar[str] = "IMAGE"
    holds: ClassVar[pa.DataType] = pa.binary()

    kind: Literal["images"] = "images"

    def values(self, place: places.Place, paths: Sequence[str]) -> pa.Array:
        return contents(place, paths)


class ImageFiles(Files):
    """Image files without classes: a folder, a glob or a list; columns are one of images and `path`. It trains nothing."""

    endings: ClassVar[tuple[str, ...]] = IMAGE_ENDINGS

    kind: Literal["image_files"] = "image_files"
    column: str = "image"
    """What the column of images is called."""

    def layout(self, columns: Sequence[str] | None = None) -> pa.Schema:
        return pa.schema([(self.column, pa.binary()), ("path", pa.string())])

    def meaning(self) -> Columns:
        return Columns(self.types, self.missing)

    def load(self, place: places.Place | None, pieces: Sequence[Piece], columns: Sequence[str] | None = None) -> Iterator[Named]:
        assert place is not None
        for start in range(0, len(pieces), AT_ONCE):
            some = pieces[start : start + AT_ONCE]
            images = contents(place, [piece.path for piece in some])
            yield some[0].name, pa.table([images, [piece.name for piece in some]], schema=self.layout())


class Texts(Folders):
    """A folder with one folder of text files for each class; columns `text`, `label` (the folder's name) and `path`."""

    what: ClassVar[str] = "TEXT"
    holds: ClassVar[pa.DataType] = pa.string()

    kind: Literal["text"] = "text"
    encoding: str = "utf-8"
    """How letters are written in the files: utf-8, latin-1, cp1252, utf-16, ..."""
    endings: tuple[str, ...] = (".txt",)  # type: ignore[misc]
    """Which files are read, by the ends of their names."""

    def values(self, place: places.Place, paths: Sequence[str]) -> pa.Array:
        return pa.array([self._text(place, path) for path in paths], pa.string())

    def _text(self, place: places.Place, path: str) -> str:
        name = place.prefix + path
        with places.reading(name):
            content = place.read(path)
        try:
            return content.decode("utf-8-sig" if self.encoding == "utf-8" else self.encoding)
        except UnicodeDecodeError as error:
            line = 1 + content.count(b"\n", 0, error.start)
            raise DloptError(f"{name}: line {line} is not {self.encoding}: set encoding, for example to latin-1") from None


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
        place, folder = places.place_of(self.folder)
        digest, count = hashlib.sha256(), 0
        with places.reading(self.folder):
            for table in self.table.tables([self.column]):
                paths = [_within(folder, path) for path in self._paths(table) if path]
                for file in place.file_infos(paths):
                    digest.update(f"{places.as_sent(file.path)}\t{file.size}\t{file.changed}\n".encode())
                count += len(paths)
        return [self.table.found(), count, digest.hexdigest()]

    def left_out(self) -> str:
        return self.table.left_out()

    def meaning(self) -> Columns:
        return self.table.meaning()

    def stated(self) -> tuple[dict[str, ColumnType], tuple[str, ...]]:
        return self.table.stated()

    def first(self, rows: int) -> pa.Table:
        place, folder = places.place_of(self.folder)
        return self._with_images(self.table.peek(rows), place, folder)

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        place, folder = places.place_of(self.folder)
        for table in self.table.tables(None if columns is None else [*columns, self.column]):
            for start in range(0, len(table), AT_ONCE):
                yield self._with_images(table.slice(start, AT_ONCE), place, folder)

    def read(self, columns: Sequence[str] | None = None) -> Dataset:
        place, folder = places.place_of(self.folder)
        rows = self.table.read(None if columns is None else [*columns, self.column])
        spread = rows.repartition(target_num_rows_per_block=TASK_ROWS, strict=True)  # a small table may list many large images
        return spread.map_batches(lambda table: self._with_images(table, place, folder), batch_size=AT_ONCE, batch_format="pyarrow")

    def _paths(self, table: pa.Table) -> list[str | None]:
        if self.column not in table.column_names:
            raise DloptError(f"has no column {self.column!r}; its columns are {', '.join(table.column_names)}")
        return [None if path is None else str(path) for path in table[self.column].to_pylist()]

    def _with_images(self, table: pa.Table, place: places.Place, folder: str) -> pa.Table:
        paths = [_within(folder, path) if path else "" for path in self._paths(table)]
        return table.set_column(table.column_names.index(self.column), self.column, contents(place, paths))


def contents(place: places.Place, paths: Sequence[str]) -> pa.Array:
    """The bytes of files; a file that cannot be read is an empty one, which is set aside later as no image."""

    def content(path: str) -> bytes:
        try:
            return place.read(path) if path else b""
        except (OSError, ValueError, pa.ArrowException):
            return b""

    return pa.array(place.each(content, paths), pa.binary())


def _within(folder: str, path: str) -> str:
    return path if path.startswith("/") else f"{folder.rstrip('/')}/{path}"
