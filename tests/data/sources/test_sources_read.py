"""Sources as Ray's workers read them: every row once, whatever the pieces, and one line for what cannot be read."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from dlopt import session
from dlopt.data.sources import Arrow, Csv, HuggingFace, Images, JsonLines, Parquet, Sample, from_data
from dlopt.data.sources.reading import MIN_BLOCK
from dlopt.part import DloptError
from tests.data.sources.test_sources import flights, image_table, png, saved  # noqa: F401

pytestmark = pytest.mark.usefixtures("ray_cluster")


def rows_of(source: Any, columns: list[str] | None = None) -> pa.Table:
    """All rows, sorted by their first column."""
    session.data_context()
    tables = list(source.read(columns).iter_batches(batch_size=None, batch_format="pyarrow"))
    found = pa.concat_tables([table for table in tables if len(table)])
    return found.sort_by(found.column_names[0])


def pieces_of(source: Any) -> list[int]:
    """How many rows each task gets that comes after reading."""
    session.data_context()
    counted = source.read().map_batches(lambda table: pa.table({"rows": [len(table)]}), batch_size=None, batch_format="pyarrow")
    return [row["rows"] for row in counted.take_all()]


def refused(source: Any) -> str:
    session.data_context()
    with pytest.raises(DloptError) as error:
        source.read().materialize()
    return str(getattr(error.value, "cause", error.value)).partition("\nFailed to apply UDF")[0]  # Ray's own lines come after it


def numbered(rows: int) -> pa.Table:
    """Text with quotes and line ends, numbers with gaps."""
    text = [f'row "{row}",\nsaid "x' if row % 3 else f"plain {row}" for row in range(rows)]
    return pa.table({"id": range(rows), "x": [None if row % 7 == 0 else row / 8 for row in range(rows)], "text": text})


def test_one_large_csv_is_read_by_several_tasks_and_every_row_once(tmp_path: Path) -> None:
    table = numbered(150_000)
    pa.csv.write_csv(table, tmp_path / "x.csv")
    source = Csv(path=str(tmp_path / "x.csv"))
    assert (tmp_path / "x.csv").stat().st_size > 4 * MIN_BLOCK
    pieces = pieces_of(source)
    assert sum(pieces) == 150_000 and len(pieces) > 3
    found = rows_of(Csv(path=str(tmp_path / "x.csv")))
    assert found.schema == pa.schema([(name, pa.string()) for name in table.column_names])
    wanted = table.take(pa.array(np.argsort([str(row) for row in range(150_000)])))
    assert found["id"].to_pylist() == [str(row) for row in wanted["id"].to_pylist()]
    assert found["text"].to_pylist() == wanted["text"].to_pylist()
    assert found["x"].to_pylist() == ["" if x is None else f"{x:.10g}" for x in wanted["x"].to_pylist()]


def test_large_and_small_csv_files_make_one_set_and_chosen_columns(tmp_path: Path) -> None:
    pa.csv.write_csv(numbered(150_000), tmp_path / "large.csv")
    (tmp_path / "small.csv").write_text("more,text,id\n1,end,-1\n")
    found = rows_of(Csv(path=str(tmp_path)), ["text", "id"])
    assert found.column_names == ["text", "id"] and len(found) == 150_001 and found["text"][0].as_py() == "end"


def test_a_line_deep_in_a_large_csv_is_named_by_the_worker(tmp_path: Path) -> None:
    pa.csv.write_csv(numbered(150_000), tmp_path / "x.csv")
    with open(tmp_path / "x.csv", "ab") as file:
        line = 1 + (tmp_path / "x.csv").read_bytes().count(b"\n")
        file.write(b"1,2,3,4\n")
    assert refused(Csv(path=str(tmp_path / "x.csv"))) == f"{tmp_path}/x.csv: cannot be read: line {line} has 4 values where 3 are expected"


def test_json_lines_have_the_same_columns_and_types_in_every_piece(tmp_path: Path) -> None:
    lines = [b'{"id": %d, "n": [1, %d]%b}\n' % (row, row, b', "late": "x"' if row % 2 else b"") for row in range(120_000)]
    lines += [b'{"id": "word", "late": 7.5}\n'] + [b'{"id": %d}\n' % row for row in range(3)]
    (tmp_path / "x.jsonl").write_bytes(b"".join(lines))
    source = JsonLines(path=str(tmp_path / "x.jsonl"))
    assert len(pieces_of(source)) > 2
    found = rows_of(source)
    assert found.schema == pa.schema([("id", pa.string()), ("n", pa.list_(pa.int64())), ("late", pa.string())])
    assert len(found) == 120_004 and found["n"].null_count == 4 and found["late"].null_count == 60_003
    assert found.slice(len(found) - 1).to_pylist() == [{"id": "word", "n": None, "late": "7.5"}]
    (tmp_path / "x.jsonl").write_bytes(b"".join(lines) + b'{"id": \n')
    assert refused(source).startswith(f"{tmp_path}/x.jsonl: line 120005 is not JSON: ")


@pytest.mark.parametrize("groups", [1, pytest.param(12, marks=pytest.mark.slow)])
def test_parquet_keeps_several_tasks_busy_whatever_its_row_groups(groups: int, tmp_path: Path) -> None:
    table = pa.table({"id": np.arange(600_000), "x": np.random.default_rng(0).random(600_000)})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=600_000 // groups)
    pieces = pieces_of(Parquet(path=str(tmp_path / "x.parquet")))
    assert sum(pieces) == 600_000 and len(pieces) >= 6 and max(pieces) * 16 < 3 * MIN_BLOCK
    assert rows_of(Parquet(path=str(tmp_path / "x.parquet"))).equals(table)


@pytest.mark.parametrize("kind", ["parquet", "csv", "arrow"])
def test_a_file_without_a_column_is_named_and_other_columns_do_not_matter(kind: str, tmp_path: Path) -> None:
    writers: dict[str, Any] = {"parquet": pq.write_table, "csv": pa.csv.write_csv, "arrow": pa.feather.write_feather}
    writers[kind](pa.table({"a": [1], "b": [2]}), str(tmp_path / f"1.{kind}"))
    writers[kind](pa.table({"c": [3], "a": [4]}), str(tmp_path / f"2.{kind}"))
    source = {"parquet": Parquet, "csv": Csv, "arrow": Arrow}[kind](path=str(tmp_path))
    assert refused(source) == f"{tmp_path}/2.{kind}: has no column 'b'; its columns are c, a"
    assert [int(value) for value in rows_of(source, ["a"])["a"].to_pylist()] == [1, 4]


def test_whole_numbers_and_fractions_of_parquet_files_make_one_column(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [1, 2]}), tmp_path / "1.parquet")
    pq.write_table(pa.table({"a": [None, 0.5]}), tmp_path / "2.parquet")
    assert rows_of(Parquet(path=str(tmp_path)))["a"].to_pylist() == [0.5, 1.0, 2.0, None]


def test_empty_files_beside_others_change_nothing(tmp_path: Path) -> None:
    (tmp_path / "1.csv").write_text("a,b\n")
    (tmp_path / "2.csv").write_text("a,b\n1,2\n")
    assert rows_of(Csv(path=str(tmp_path))).to_pylist() == [{"a": "1", "b": "2"}]
    (tmp_path / "1.jsonl").write_text("")
    (tmp_path / "2.jsonl").write_text('{"a": 1}\n')
    assert rows_of(JsonLines(path=str(tmp_path))).to_pylist() == [{"a": "1"}]


def test_images_in_folders_and_in_tables_are_read_by_workers(tmp_path: Path) -> None:
    made = image_table(tmp_path)
    assert sorted(map(len, rows_of(made, ["label", "file"])["file"].to_pylist())) == [0, 0, 8, len(png(1))]
    (tmp_path / "list.csv").write_text("file,label\n" + "1.png,cat\n" * 3000)
    assert len(pieces_of(made)) >= 3 and sum(pieces_of(made)) == 3000
    for row in range(200):
        (tmp_path / "set" / f"class{row % 3}").mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / f"class{row % 3}" / f"{row}.png").write_bytes(png(row))
    found = rows_of(Images(path=str(tmp_path / "set")), ["path", "image", "label"])
    assert {path.rpartition("/")[2]: image for path, image in zip(found["path"].to_pylist(), found["image"].to_pylist(), strict=True)} == {
        f"{row}.png": png(row) for row in range(200)
    }
    assert Counter(found["label"].to_pylist()) == {"class0": 67, "class1": 67, "class2": 66}


@pytest.mark.slow
def test_the_flights_reach_the_workers_as_they_are(flights: Any) -> None:  # noqa: F811
    found = rows_of(Sample(name="nycflights13/flights"), ["rownames", "arr_delay", "carrier"])
    assert len(found) == 336_776 and found["arr_delay"].null_count == 9430
    assert found["carrier"].to_pylist() == flights["carrier"].tolist()


@pytest.mark.slow
def test_a_hugging_face_data_set_is_loaded_by_the_workers(saved: Path) -> None:  # noqa: F811
    found = rows_of(HuggingFace(name=str(saved)), ["n", "label", "image"])
    assert found["n"].to_pylist() == list(range(50)) and found["label"].to_pylist() == [None, *["cat", "dog"] * 24, "cat"][::-1]
    assert [value["bytes"] for value in found["image"].to_pylist()] == [png(row) for row in range(50)]


def test_data_of_a_program_reaches_the_workers(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (300, 8, 8)).astype(np.uint8)
    found = rows_of(from_data({"n": np.arange(300), "image": pixels}, tmp_path))
    assert (found["image"].combine_chunks().flatten().flatten().to_numpy().reshape(300, 8, 8) == pixels).all()
