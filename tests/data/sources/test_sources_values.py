"""Values of sources that once were refused or ended in a traceback: nested ones, views, halves of letters, much text."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dlopt.data import rows as reading
from dlopt.data.kinds import TextInput
from dlopt.data.sources import Arrow, JsonLines, Parquet, from_data, infer_kind
from dlopt.data.sources.lines import _of_array
from dlopt.data.sources.reading import MAX_BLOCK
from dlopt.data.stats import begin, guard, guess
from dlopt.data.stats.column import string_hashes
from dlopt.data.stats.describe import describe
from dlopt.data.stats.summary import summarise
from dlopt.data.table import spill
from dlopt.data.table.over import Ranges
from dlopt.data.table.spill import Read, Spill
from dlopt.part import DloptError
from dlopt.progress import silent
from tests.arranged import _pieces, anywhere, section_of
from tests.data.sources.test_sources_files import Counted, counted  # noqa: F401 (a fixture)
from tests.packages import package

# Lists, structs, maps

NESTED: dict[str, tuple[pa.Array, list[str]]] = {
    "list": (pa.array([["a"], ["b", "c"], None, ["a"]]), ['["a"]', '["b", "c"]']),
    "struct": (
        pa.array([{"q": 1, "r": "x"}, {"q": 2, "r": None}, None, {"q": 1, "r": "x"}]),
        ['{"q": 1, "r": "x"}', '{"q": 2, "r": null}'],
    ),
    "map": (pa.array([[("k", 1)], [("l", 2)], None, [("k", 1)]], pa.map_(pa.string(), pa.int32())), ['[["k", 1]]', '[["l", 2]]']),
    "large list": (pa.array([[1], [], None, [1]], pa.large_list(pa.int8())), ["[1]", "[]"]),
    "list of lists of texts": (pa.array([[["a"], ["b"]], [["c"]], None, [["a"], ["b"]]]), ['[["a"], ["b"]]', '[["c"]]']),
    "uneven lists": (pa.array([[[1.0], [2.0, 3.0]], [[4.0], []], None, [[1.0], [2.0, 3.0]]]), ["[[1.0], [2.0, 3.0]]", "[[4.0], []]"]),
}


@pytest.mark.parametrize("kind", NESTED)
def test_lists_structs_and_maps_are_described_as_their_json(kind: str, tmp_path: Path) -> None:
    column, values = NESTED[kind]
    pq.write_table(pa.table({"nested": column, "y": ["u", "v", "u", "u"]}), tmp_path / "a.parquet")
    source = guess.source_of(str(tmp_path / "a.parquet"))
    kinds = guess.kinds_of(source, ["y"])
    assert kinds == {"nested": "category", "y": "category"}
    summary = summarise(source.peek(9), kinds, ["y"])
    found = summary.columns["nested"]
    assert found.counts == {values[0]: 2, values[1]: 1} and (found.missing, found.distinct) == (1, 2)
    assert describe({guard.WHOLE: summary}, ["y"])["columns"]["nested"]["kind"] == "category"
    job = begin.job_of(source, summary, ["y"], guard.findings({guard.WHOLE: summary}, ["y"])).text
    assert "    # nested is left out: lists and objects are no input: make columns of what is in them\n" in job


# Views, which polars writes


def frame() -> Any:
    polars = package("polars", "test")
    return polars.DataFrame(
        {
            "n": [1, None, 3],
            "text": ["x", None, "z" * 40],
            "word": polars.Series(["u", "v", "u"], dtype=polars.Categorical),
            "tags": [["a"], ["b", "a"], None],
            "both": [{"q": "x"}, {"q": "y"}, {"q": None}],
            "file": [b"1", b"2", None],
        }
    )


VALUES = {
    "n": [1, None, 3],
    "text": ["x", None, "z" * 40],
    "word": ["u", "v", "u"],
    "tags": [["a"], ["b", "a"], None],
    "both": [{"q": "x"}, {"q": "y"}, {"q": None}],
    "file": [b"1", b"2", None],
}


def plain_types(schema: pa.Schema) -> None:
    assert "view" not in str(schema) and "dictionary" not in str(schema)


def test_a_polars_data_frame_is_a_source(tmp_path: Path) -> None:
    source = from_data(frame(), tmp_path)
    assert source.peek(9).to_pydict() == VALUES
    plain_types(source.peek(9).schema)
    assert from_data(pa.table(frame()), tmp_path).path == source.path  # the same content


def test_a_lazy_frame_is_told_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DloptError, match=r"a LazyFrame has no rows yet: give its \.collect\(\)$"):
        from_data(frame().lazy(), tmp_path)


@pytest.mark.parametrize("how", ["file", "stream"])
def test_what_polars_writes_as_ipc_is_read(how: str, tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    (frame().write_ipc if how == "file" else frame().write_ipc_stream)(path)
    with pa.memory_map(str(path)) as opened:
        assert "view" in str((pa.ipc.open_file if how == "file" else pa.ipc.open_stream)(opened).schema)
    source = Arrow(path=str(path))
    assert source.peek(9).to_pydict() == VALUES
    plain_types(source.layout())
    table = source.peek(9)
    found = summarise(table, {name: infer_kind(table, name) for name in table.column_names} | {"text": "text"}, ["word"])
    assert found.columns["word"].counts == {"u": 2, "v": 1} and found.columns["text"].missing == 1


# Halves of letters


@pytest.mark.parametrize("array", [False, True])
def test_a_lone_surrogate_becomes_the_replacement_character(array: bool, tmp_path: Path) -> None:
    rows = ['{"a": "x\\ud83d", "b": "\\ud83d\\ude00"}', '{"a": "\\ude00\\\\ud83d", "b": "y"}', '{"a": null, "b": ["\\udfff"]}']
    path = tmp_path / "a.json"
    path.write_text("[" + ",".join(rows) + "]" if array else "\n".join(rows))
    found = JsonLines(path=str(path)).peek(9)
    assert found["a"].to_pylist() == ["x\ufffd", "\ufffd\\ud83d", None]
    assert found["b"].to_pylist() == ["\U0001f600", "y", '["\\ufffd"]']
    assert from_data([{"a": "\ud800"}], tmp_path / "home").peek(1).to_pylist() == [{"a": "\ufffd"}]


# An array of objects


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("indent", [None, 1])
def test_the_objects_of_an_array_are_found_wherever_the_text_is_cut(size: int, indent: int | None) -> None:
    for value in ([], [{}], [{"a": 'é]"[,', "b": [1, {"c": "]"}]}, {"a": None}], [1, 22], [{"a": number} for number in range(30)]):
        text = f" \n{json.dumps(value, indent=indent, ensure_ascii=False)}\n ".encode()
        parts = (text[start : start + size] for start in range(0, len(text), size))
        assert [json.loads(line) for line in _of_array(parts, "f")] == value


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[1, 2", "f: is not JSON: it does not end, after 2 rows"),
        ("[1 2]", "f: is not JSON: '2]' where a comma or the end of the array is expected, after 1 rows"),
        ("[1[2]", "f: is not JSON: '[2]' where a comma or the end of the array is expected, after 1 rows"),
        ("[1] x", "f: is not JSON: 'x' stands behind its end, after 1 rows"),
        ("[1,]", "f: is not JSON: Expecting value"),
        ("[,1]", "f: is not JSON: Expecting value"),
    ],
)
def test_what_is_no_array_is_said_with_its_row(text: str, says: str) -> None:
    for parts in ([text], list(text)):
        with pytest.raises(DloptError) as error:
            list(_of_array(iter([part.encode() for part in parts]), "f"))
        assert str(error.value).startswith(says)


def test_a_look_at_a_large_array_reads_its_beginning(tmp_path: Path, counted: type[Counted]) -> None:  # noqa: F811
    path = tmp_path / "a.json"
    path.write_text("[" + ",\n".join(json.dumps({"a": number, "text": "x" * 1000}) for number in range(5000)) + "]")
    assert JsonLines(path=str(path)).peek(3)["a"].to_pylist() == [0, 1, 2]  # once each for layout, types and rows
    assert counted.read_bytes < 0.4 * path.stat().st_size


# Bytes, not rows


def test_texts_of_more_than_an_array_can_hold_are_written_and_read_in_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks that are the same one over and over stand for much text; a group of rows never has more bytes than two blocks."""
    chunk = pa.array([f"{number:05}" + "x" * 20_000 for number in range(500)])
    table = pa.table({"n": range(5000), "text": pa.chunked_array([chunk] * 10)})
    source = from_data(table, tmp_path)
    with pq.ParquetFile(source.files()[0]) as file:
        assert max(file.read_row_group(group).nbytes for group in range(file.num_row_groups)) < 2 * MAX_BLOCK
        assert file.read().equals(table)
    whole = pa.table({"n": range(5000), "text": table["text"].combine_chunks().cast(pa.large_string())})
    assert from_data(whole, tmp_path).path == source.path  # however it is cut, and whatever the width of its offsets


def test_a_few_megabytes_of_parquet_that_are_gigabytes_of_texts_come_in_blocks(tmp_path: Path) -> None:
    """Each text is written once."""
    words = pa.DictionaryArray.from_arrays(pa.array([number % 5 for number in range(20_000)]), [f"{n}" + "x" * 20_000 for n in range(5)])
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": words}).cast(pa.schema([("text", pa.dictionary(pa.int64(), pa.string()))])), path, store_schema=False)
    assert path.stat().st_size < 2**20
    source = Parquet(path=str(path))
    tables = [table for _, table in source.load(*source.pieces())]
    assert sum(len(table) for table in tables) == 20_000
    assert max(table.nbytes for table in tables) < 4 * MAX_BLOCK < sum(table.nbytes for table in tables)
    assert infer_kind(tables[1].slice(0, 9), "text") == "category"


def test_ranges_of_rows_are_cut_by_the_bytes_of_their_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """400 texts of 20 kB are eight megabytes, and eight tokens each nothing beside it: no range of keys holds all of them, whatever the
    blocks are."""
    section = section_of(TextInput(column="text", max_length=8))
    table = pa.table({"text": [f"word{number % 9} {number} " + "x" * 20_000 for number in range(400)], "label": ["a", "b"] * 200})
    monkeypatch.setattr(spill, "PIECE_BYTES", 2**20)
    monkeypatch.setattr(reading, "PART_BYTES", 2**20)
    features = tuple(part.feature(table) for part in section.inputs)
    powers, sizes = [], []
    for blocks in (1, 7):
        first_pass = Spill(section, features, False, str(tmp_path / str(blocks)))
        pieces = list(_pieces(first_pass, [table], blocks))
        assert max(Path(piece.path).stat().st_size for piece in pieces) < 2.5 * 2**20
        read = {"source": Read.of(pieces)}
        plan = reading.first_plan(section, features, read)
        plan = reading.in_files(plan, read, tmp_path, Ranges(plan.power, anywhere, silent))
        powers.append(plan.power)
        sizes.append(max(len(plan.select(number, ["text"]).table) for number in range(2**plan.power)))
    assert powers == [3, 3] and sizes[0] == sizes[1] < 120


def test_long_texts_are_hashed_in_little_memory_and_to_the_same_words() -> None:
    values = pa.array([f"{number} " + "x" * (20_000 if number % 3 else 1) for number in range(900)] + ["", "y" * 500_000, "z"])
    apart = np.concatenate([string_hashes(values.slice(number, 1)) for number in range(len(values))])
    tracemalloc.start()
    together = string_hashes(values)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (together == apart).all()
    assert peak < 64 * 2**20 < 5 * values.nbytes * 34 / 10
