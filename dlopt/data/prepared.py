"""How prepared rows lie on disk: parquet files in the order of row keys, in row groups that are the unit of shuffling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dlopt.artifact import Artifact
from dlopt.data.types.tensors import array_of, column_of
from dlopt.part import DloptError, Signature

CHUNK_BYTES = 2**20
"""About how many bytes a row group has."""

UNREADABLE = (pa.ArrowException, OSError, ValueError, MemoryError)
"""What pyarrow raises on damage, depending on the place."""

Rows = dict[str, np.ndarray]
"""Feature name to values (rows, *shape), and the target's name to its values (rows, *target.shape)."""


@dataclass(frozen=True)
class RowGroup:
    """A row group of a file, and where its rows stand in the split."""

    file: str
    group: int
    start: int
    rows: int


@dataclass(frozen=True)
class Split:
    """One split of a prepared set: where its rows are, and how to read them."""

    signature: Signature
    chunks: tuple[RowGroup, ...]

    @classmethod
    def open(cls, data: Artifact, name: str) -> Split:
        """The split called `name`; one without rows when the data has none."""
        signature = Signature.model_validate_json(data.read("signature.json"))
        chunks: list[RowGroup] = []
        start = 0
        for file in sorted((data.path / name).glob("*.parquet")):
            metadata = _metadata(file)
            for group in range(metadata.num_row_groups):
                rows = metadata.row_group(group).num_rows
                chunks.append(RowGroup(str(file.resolve()), group, start, rows))
                start += rows
        return cls(signature, tuple(chunks))

    def __len__(self) -> int:
        return self.chunks[-1].start + self.chunks[-1].rows if self.chunks else 0

    @cached_property
    def starts(self) -> np.ndarray:
        """Where the rows of each chunk begin, int64 (chunks,)."""
        return np.array([chunk.start for chunk in self.chunks], dtype=np.int64)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row in memory."""
        return row_bytes(self.signature)

    def read(self, chunks: Sequence[RowGroup] | None = None) -> Rows:
        """All rows of the chunks (of the whole split by default), in their order."""
        chunks = self.chunks if chunks is None else chunks
        by_file: dict[str, list[int]] = {}
        for chunk in chunks:
            by_file.setdefault(chunk.file, []).append(chunk.group)
        tables = [_read_groups(self.signature, file, groups) for file, groups in by_file.items()]
        return as_rows(self.signature, pa.concat_tables(tables)) if tables else empty_rows(self.signature)


def row_bytes(signature: Signature) -> int:
    """Bytes of one row in memory: its inputs and its target."""
    inputs = sum(feature.size * np.dtype(feature.stored).itemsize for feature in signature.inputs)
    return inputs + math.prod(signature.target.shape) * np.dtype(signature.target.stored).itemsize


def write_part(table: pa.Table, signature: Signature, path: Path) -> None:
    """Write rows of one split; pages carry checksums, so that damage is seen when they are read."""
    chunk_rows = max(64, min(8192, CHUNK_BYTES // row_bytes(signature)))
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=chunk_rows, compression="lz4", use_dictionary=False, write_page_checksum=True)


def as_rows(signature: Signature, table: pa.Table) -> Rows:
    """Columns as they lie in parquet, as arrays."""
    target = signature.target
    rows = {feature.name: array_of(table[feature.name], feature.stored, feature.shape) for feature in signature.inputs}
    return rows | {target.name: array_of(table[target.name], target.stored, target.shape)}


def as_table(signature: Signature, rows: Rows) -> pa.Table:
    """Arrays as columns: the way back from `as_rows`. Each tensor is one column; a row of it is its bytes."""
    return pa.table({name: column_of(values) for name, values in rows.items()}).select(list(empty_rows(signature)))


def empty_rows(signature: Signature) -> Rows:
    rows = {feature.name: np.zeros((0, *feature.shape), dtype=feature.stored) for feature in signature.inputs}
    return rows | {signature.target.name: np.zeros((0, *signature.target.shape), dtype=signature.target.stored)}


def _metadata(file: Path) -> pq.FileMetaData:
    try:
        return pq.read_metadata(file)
    except UNREADABLE as error:
        raise damaged(str(file), error) from None


def _read_groups(signature: Signature, file: str, groups: list[int]) -> pa.Table:
    """Rows of some row groups. Pages have checksums; the footer has none, so what it says is compared with the signature."""
    try:
        with pq.ParquetFile(file, page_checksum_verification=True) as parquet:
            table = parquet.read_row_groups(groups)
        if table.schema != as_table(signature, empty_rows(signature)).schema or any(column.null_count for column in table.columns):
            raise ValueError("its columns are not those of signature.json")
    except UNREADABLE as error:
        raise damaged(file, error) from None
    return table


def damaged(file: str, error: Exception) -> DloptError:
    """What to say of a file of a split that cannot be read."""
    folder = Path(file).parent.parent
    return DloptError(f"{file}: damaged ({str(error).splitlines()[0]}): delete the folder {folder} and run the job again")
