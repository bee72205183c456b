"""Pieces put together by ranges of keys: the same files whatever the pieces, and as many files opened a piece however many there are; and a
first pass that ends when it is hopeless, with an account of bounded size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dlopt.data import rows as reading
from dlopt.data.count import most_rows
from dlopt.data.kinds import CategoryTarget, NumberInput
from dlopt.data.section import Data
from dlopt.data.sources import Csv, JsonLines, Parquet
from dlopt.data.table import ranges
from dlopt.data.table.ranges import ORIGIN, in_ranges
from dlopt.data.table.spill import HIGH, KEPT_REASONS, LOW, OTHERS, TIE, PieceReport, Read, Spill, open_rows, write_rows
from dlopt.part import DloptError
from dlopt.progress import silent
from tests.arranged import anywhere

BY = (HIGH, LOW, ORIGIN, TIE)


def pieces_of(folder: Path, count: int, rows: int, seed: int = 0) -> tuple[list[tuple[str, int]], pa.Table]:
    """So many files of about so many sorted rows of three sources, and all of their rows; many keys are there twice, some with a tie."""
    generator = np.random.default_rng(seed)
    files, tables = [], []
    for number in range(count):
        size = int(generator.integers(0, 2 * rows))
        high = np.sort(generator.choice(2**63, size).astype(np.uint64) * np.uint64(2))
        high[: size // 3] = np.sort(generator.integers(0, 50, size // 3).astype(np.uint64) << np.uint64(58))
        high.sort()
        low, tie = generator.integers(0, 3, size).astype(np.uint64), generator.permutation(size).astype(np.uint64)
        table = pa.table(
            {
                "value": pa.array([f"{number}.{row}" for row in range(size)], pa.string()),
                HIGH: high,
                LOW: low,
                TIE: tie + np.uint64(1000 * number),
            }
        )
        files.append((write_rows(table, folder), number % 3))
        tables.append(table.append_column(ORIGIN, pa.array(np.full(size, number % 3, np.int8))))
    return files, pa.concat_tables(tables)


@pytest.mark.parametrize("power", [0, 1, 3, 5])
@pytest.mark.parametrize(("open_files", "bits"), [(64, 6), (3, 1), (4, 2)])
def test_ranges_are_all_rows_in_the_order_of_their_keys(
    power: int, open_files: int, bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "MOST_OPEN", open_files)
    monkeypatch.setattr(ranges, "BITS", bits)
    files, rows = pieces_of(tmp_path, 30, 20)
    found = [open_rows(path) for path in in_ranges(files, power, tmp_path / "made", anywhere)]
    assert len(found) == 2**power
    for number, some in enumerate(found):
        assert all(key >> (64 - power) == number for key in some[HIGH].to_pylist())
    expected = rows.sort_by([(name, "ascending") for name in BY])
    assert pa.concat_tables(found).select(expected.column_names).combine_chunks().equals(expected.combine_chunks())


def test_so_many_files_are_opened_a_piece_whatever_their_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, _ = pieces_of(tmp_path, 20, 5)
    opened: Counter[int] = Counter()
    monkeypatch.setattr(ranges, "open_rows", lambda path: opened.update([count]) or open_rows(path))
    for count in (250, 1000, 4000):
        in_ranges((files * 200)[:count], 3, tmp_path / "made", anywhere)
    each = [opened[count] / count for count in (250, 1000, 4000)]
    assert max(each) < 1.2 * min(each) < 1.5


# The first pass


class Rows:
    """What Ray Data makes of a source, in this process."""

    def __init__(self, tables: Iterator[pa.Table]) -> None:
        self.tables = tables

    def map_batches(self, function: Any, **options: Any) -> Rows:
        self.rows = ({"piece": text} for table in self.tables for found in function(table) for text in found["piece"])
        return self

    def iter_rows(self) -> Iterator[dict[str, Any]]:
        return self.rows


def bad_table(folder: Path, kind: str) -> tuple[Data, list[pa.Table]]:
    """2,000 rows of which all but two are bad, in 40 blocks."""
    table = pa.table({"a": ["1", *(f"w{number}" for number in range(1998)), "2"], "label": ["u", "v"] * 1000})
    path = folder / f"x.{kind}"
    match kind:
        case "csv":
            path.write_text("\n".join(["a,label", *(f"{row['a']},{row['label']}" for row in table.to_pylist())]))
        case "parquet":
            pq.write_table(table, path)
    source = Csv(path=str(path)) if kind == "csv" else Parquet(path=str(path))
    section = Data(source=source, inputs=(NumberInput(columns=("a",)),), target=CategoryTarget(column="label"))
    return section, [table.slice(start, 50) for start in range(0, 2000, 50)]


@pytest.mark.parametrize(("kind", "blocks"), [("csv", 2), ("parquet", 1)])
def test_a_hopeless_source_is_not_read_to_its_end(kind: str, blocks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section, tables = bad_table(tmp_path, kind)
    taken: list[int] = []
    monkeypatch.setattr(type(section.source), "read", lambda source, columns: Rows(taken.append(1) or table for table in tables))
    features = tuple(part.feature(tables[0]) for part in section.inputs)
    spill = Spill(section, features, False, str(tmp_path / "spill"), section.source.meaning())
    with pytest.raises(DloptError) as error:
        reading.read_sources(section, {"source": spill}, tmp_path / "quarantine", silent)
    assert len(taken) == blocks
    assert f"{49 if blocks == 1 else 99} of the first {50 * blocks} rows" in str(error.value) and "data.most_bad allows 1.0%" in str(
        error.value
    )
    assert sum(map(len, map(pq.read_table, (tmp_path / "quarantine").iterdir()))) == 50 * blocks - 1


def test_reasons_that_all_differ_are_kept_in_part_and_counted_whole() -> None:
    pieces = [
        PieceReport("", 0, 5000, Counter({f"{number}: {row}": 1 + (row == 7) for row in range(5000)}), Counter(), Counter(), Counter(), "")
        for number in range(40)
    ]
    read = Read.of(pieces)
    assert read.reasons.total() == 40 * 5001 and len(read.reasons) <= 1000 and read.reasons[OTHERS] > 190_000
    assert all(read.reasons[f"{number}: 7"] == 2 for number in range(40)) and KEPT_REASONS > 40


@pytest.mark.parametrize("kind", ["csv", "json", "parquet"])
def test_a_source_has_no_more_rows_than_its_files_can_hold(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.{kind}"
    match kind:
        case "csv":
            path.write_text("a,b\n" + ",\n" * 500)
        case "json":
            path.write_text("{}\n" * 499 + '{"a":1}')
        case "parquet":
            pq.write_table(pa.table({"a": range(500)}), path)
    source = {"csv": Csv, "json": JsonLines, "parquet": Parquet}[kind](path=str(path))
    assert 500 <= (most_rows(source) or 0) <= {"csv": 502, "json": 502, "parquet": 500}[kind]
