"""For the tests of data: the prepare stage in this process, on tables in memory, and what comes out of it."""

from __future__ import annotations

import itertools
import json
import pickle
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dlopt.artifact import Artifact, Stage, once
from dlopt.data import rows as reading
from dlopt.data.kinds import AnyTarget, CategoryTarget
from dlopt.data.prepare import arrange
from dlopt.data.prepared import Split
from dlopt.data.rows import SPILL, sort_pieces
from dlopt.data.section import Data
from dlopt.data.sources import Parquet
from dlopt.data.sources.reading import LOOK_ROWS
from dlopt.data.table.spill import PieceReport, Read, Spill, from_json
from dlopt.data.types.canonical import MISSING
from dlopt.data.types.columns import decided
from dlopt.part import DloptError, Feature, Part, Signature, Statistics

SPLITS = ("train", "validation", "test")
SOMEWHERE = Parquet(path="somewhere")
"""Stands for tables in memory."""

Tables = pa.Table | Sequence[pa.Table]


def section_of(*inputs: Part, target: AnyTarget = CategoryTarget(), **more: Any) -> Data:  # noqa: B008 (frozen)
    """A section of a job, checked as one from a file is."""
    return Data(**{"source": SOMEWHERE, "inputs": inputs, "target": target} | more)


def arranged(
    section: Data,
    source: Tables,
    home: Path,
    *,
    test: Tables | None = None,
    validation: Tables | None = None,
    blocks: int = 1,
    ranges: int = 1,
) -> Artifact:
    """What prepare makes of rows that come in so many blocks a table and are worked on in so many ranges of keys, a power of 2.
    At most a quarter of the rows may be bad."""
    given = {"source": source, "validation": validation, "test": test}
    tables = {name: [some] if isinstance(some, pa.Table) else list(some) for name, some in given.items() if some is not None}
    first = tables["source"][0]
    meaning = decided([first.slice(0, LOOK_ROWS)], {}, MISSING)
    features, whole = tuple(part.meant(part.feature(first), meaning) for part in section.inputs), section.target.whole(first)

    def make(section: Data, out: Path) -> dict[str, Any]:
        spill = Spill(section, features, whole, str(out / SPILL), meaning)
        try:
            read = {name: Read.of(_pieces(spill, some, blocks)) for name, some in tables.items()}
            return arrange(sort_pieces(section, features, read, out, anywhere), read, out, run=anywhere)
        finally:
            shutil.rmtree(out / SPILL)

    row_bytes = sum(feature.size * np.dtype(feature.stored).itemsize for feature in features) + 8
    rows = sum(len(table) for some in tables.values() for table in some)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "PART_BYTES", 2**40 if ranges == 1 else max(1, rows * row_bytes * 3 // 4 // (ranges // 2)))
        return once(Stage("data", make), section, home)


def anywhere(task: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """Run a task on each item as a cluster does, with nothing but what survives the trip there and back."""
    for item in items:
        yield pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(task))(item)))


def _pieces(spill: Spill, tables: Sequence[pa.Table], blocks: int) -> Iterator[PieceReport]:
    for table in tables:
        bounds = np.linspace(0, len(table), blocks + 1).astype(int)
        for start, stop in itertools.pairwise(bounds):
            for row in spill(table.slice(start, stop - start)):
                yield from map(from_json, row["piece"])


def shuffled(table: pa.Table, seed: int = 4) -> pa.Table:
    return table.take(pa.array(np.random.default_rng(seed).permutation(len(table))))


def files_of(data: Artifact) -> dict[str, str]:
    """The digest of every file, but for quarantine, whose files follow from the blocks."""
    return {name: file.sha256 for name, file in data.manifest.files.items() if not name.startswith("quarantine/")}


def rows_of(data: Artifact, name: str) -> dict[str, np.ndarray]:
    return Split.open(data, name).read()


def signature_of(data: Artifact) -> Signature:
    return Signature.model_validate_json(data.read("signature.json"))


def statistics_of(data: Artifact, name: str = "numbers") -> Statistics:
    return Statistics.model_validate(json.loads(data.read("statistics.json"))[name])


def feature_of(data: Artifact, name: str) -> Feature:
    return next(feature for feature in signature_of(data).inputs if feature.name == name)


def quarantine_of(data: Artifact) -> list[dict[str, Any]]:
    """Every row that was set aside, with its reason."""
    return [row for file in sorted((data.path / "quarantine").glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


def splits_of(data: Artifact, tensor: str = "numbers", column: int = 0) -> dict[float, str]:
    """The split of each row, by a number that names the row. Fails when a row is in two."""
    found = [(value, name) for name in SPLITS for value in rows_of(data, name)[tensor][:, column].tolist()]
    assert len(dict(found)) == len(found)
    return dict(found)


def refused(section: Data, source: Tables, home: Path, **more: Any) -> str:
    """The one line that a run is refused with; nothing sealed is left."""
    with pytest.raises(DloptError) as error:
        arranged(section, source, home, **more)
    assert not list(home.rglob("manifest.json"))
    assert "\n" not in str(error.value)
    return str(error.value)
