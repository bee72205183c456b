"""A value means the same whatever way it comes: csv, JSON, parquet, `data.test` of another format, a request."""

from __future__ import annotations

import csv
import json
from datetime import date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from dlopt.artifact import Artifact, once
from dlopt.data.kinds import CategoryInput, CategoryTarget, DateInput, Input, NumberInput, TextInput, encode_rows
from dlopt.data.kinds.number import GroupMedian
from dlopt.data.prepare import PREPARE
from dlopt.data.rows import look, meanings, peek
from dlopt.data.section import Data
from dlopt.data.sources import Arrow, Csv, JsonLines, Parquet, from_data
from dlopt.data.sources.lines import Lines
from dlopt.data.sources.reading import conform, wanted
from dlopt.data.table.split import RandomSplit, TimeSplit
from dlopt.data.types.canonical import MISSING, ColumnType, as_text
from dlopt.data.types.columns import Columns, decided, spelled, type_of_texts
from dlopt.data.types.dates import parse_dates
from dlopt.part import DloptError, Feature, Signature, Target
from tests.arranged import rows_of, signature_of

ROWS = 60
COLUMNS = ("flag", "code", "level", "zip", "version", "word", "day", "moment")
INPUTS: tuple[Input, ...] = (
    NumberInput(columns=("amount", "count"), fill=GroupMedian(by="flag")),
    CategoryInput(columns=COLUMNS),
    CategoryInput(columns=tuple(f"{name}2" for name in COLUMNS), name="hashed", hash_buckets=997),
    DateInput(columns=("when", "date"), parts=("year", "month", "day", "hour", "second")),
    TextInput(column="title", min_frequency=1),
)
FORMATS = ("csv", "json", "parquet")


def table() -> pa.Table:
    """A column of every kind and of every type that sources give, most with missing values."""
    random = np.random.default_rng(0)
    moments = [datetime(2026, 1, 2) + timedelta(hours=6 * int(hour), seconds=int(hour) % 4) for hour in random.integers(0, 400, ROWS)]

    def some(values: list[Any]) -> list[Any]:
        return [None if row % 11 == 5 else values[int(index)] for row, index in enumerate(random.integers(0, len(values), ROWS))]

    found = {
        "amount": pa.array(some([0.5, 12.25, -3.0, 1e-5, 1e20])),
        "count": pa.array(some([1, 2, 70])),
        "flag": pa.array(some([True, False])),
        "code": pa.array(some([1, 2, 30, -4]), pa.int32()),
        "level": pa.array(some([0.5, 1.0, 2.0, 0.1, 1e-5, 1e22]), pa.float64()),
        "zip": pa.array(some(["01234", "1234", "99999"])),
        "version": pa.array(some(["1.1", "1.10", "1.9", "2.0"])),
        "word": pa.array(some(["yes", "No", 'ü,"x"', "7", "1.0", "true"])),
        "day": pa.array([None if moment is None else moment.date() for moment in some(moments)], pa.date32()),
        "moment": pa.array(some(moments), pa.timestamp("us")),
        "when": pa.array(some(moments), pa.timestamp("ms")),
        "date": pa.array([None if moment is None else moment.date() for moment in some(moments)], pa.date32()),
        "title": pa.array(some(["free entry now", "call me", "2 for 1"])),
        "label": pa.array([bool(row % 3) for row in range(ROWS)]),
    }
    return pa.table(found | {f"{name}2": found[name] for name in COLUMNS})


TABLE = table()


def written(folder: Path) -> dict[str, Any]:
    """The table as pandas writes it to csv, whole numbers with missing ones being fractions there; as JSON has it, and as parquet."""
    folder.mkdir(parents=True, exist_ok=True)
    TABLE.to_pandas().to_csv(folder / "x.csv", index=False)
    (folder / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in as_requests()))
    pq.write_table(TABLE, folder / "x.parquet")
    return {"csv": Csv(path=f"{folder}/x.csv"), "json": JsonLines(path=f"{folder}/x.jsonl"), "parquet": Parquet(path=f"{folder}/x.parquet")}


def as_requests() -> list[dict[str, Any]]:
    return [{k: v.isoformat() if isinstance(v, date) else v for k, v in row.items()} for row in TABLE.to_pylist()]


def section_of(source: Any, **more: Any) -> Data:
    return Data(source=source, inputs=INPUTS, target=CategoryTarget(), **more)


def read(source: Any, columns: tuple[str, ...]) -> pa.Table:
    """What `source.read` gives, in this process."""
    place, pieces = source.pieces()
    layout = wanted(source.layout(columns), columns)
    chunks = source._chunks(place, pieces, 2**20) if isinstance(source, Lines) else []
    named = ((c.name, source.parse(c, layout)) for c in chunks) if isinstance(source, Lines) else source.load(place, pieces)
    return pa.concat_tables(conform(name, some, layout) for name, some in named)


def fitted(section: Data, raw: pa.Table) -> Signature:
    features, found = look(section, list(meanings(section)))[0], dict[str, Feature]()
    for part, feature in sorted(zip(section.inputs, features, strict=True), key=lambda pair: pair[0].kind != "category"):
        rows = pa.table(columns_of(section, features, raw))
        if isinstance(part, TextInput):
            found[feature.name] = part.learn(iter([rows]), feature)
        else:
            found[feature.name], _ = part.fit(part.observe(rows, feature, {}), feature, found)  # type: ignore[union-attr, arg-type]
    return Signature(inputs=tuple(found[feature.name] for feature in features), target=Target(name="label", labels=(0, 1)))


def columns_of(section: Data, features: tuple[Feature, ...], said: pa.Table) -> dict[str, pa.Array]:
    found: dict[str, pa.Array] = {}
    for part, feature in zip(section.inputs, features, strict=True):
        columns, reasons = part.read(said, feature)
        assert reasons == {}
        found |= columns
    return found


def encoded(section: Data, signature: Signature, said: pa.Table) -> dict[str, np.ndarray]:
    rows = pa.table(columns_of(section, signature.inputs, said))
    return {feature.name: part.finish(rows, feature) for part, feature in zip(section.inputs, signature.inputs, strict=True)}


def served(signature: Signature, rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """What the graph has of requests: strings looked up, texts as wide as on disk."""
    found = encode_rows(signature, rows)
    for feature in signature.inputs:
        if feature.dtype == "string":
            codes = [{value: code for code, value in enumerate(known, start=1)} for known in feature.vocabularies]
            found[feature.name] = np.array([[known.get(v, 0) for known, v in zip(codes, row, strict=True)] for row in found[feature.name]])
        elif feature.kind == "text":
            found[feature.name] = np.pad(found[feature.name], ((0, 0), (0, feature.size - found[feature.name].shape[1])))
    return found


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], columns: tuple[str, ...] = COLUMNS) -> None:
    for name, values in expected.items():
        assert np.array_equal(found[name], values, equal_nan=values.dtype == np.float32), name


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return written(tmp_path_factory.mktemp("formats"))


@pytest.mark.parametrize("trained", FORMATS)
def test_rows_are_encoded_alike_whatever_way_they_come(trained: str, sources: dict[str, Any]) -> None:
    section = section_of(sources[trained], test=sources["json"], split=RandomSplit(train=0.9, test=0))
    meaning = next(meanings(section))
    said = {name: meaning.canonical(read(sources[name], section.columns), section.compared) for name in FORMATS}
    signature = fitted(section, said[trained])
    expected = encoded(section, signature, said[trained])
    for name in FORMATS:
        assert_same(encoded(section, signature, said[name]), expected)
        labels, reasons = section.target.read(said[name], True)
        assert labels.to_pylist() == [int(row % 3 > 0) for row in range(ROWS)] and reasons == {}
    assert_same(served(signature, as_requests()), expected)
    codes = expected["categories"]
    missing = np.array([[value is None for value in TABLE[name].to_pylist()] for name in COLUMNS]).T
    known = next(feature.vocabularies for feature in signature.inputs if feature.name == "categories")
    assert (codes > 0).all() and [len(set(column)) for column in codes.T.tolist()] == [len(some) for some in known]
    assert [some[0] if len(some) == 1 else "" in some for some in known] == missing.any(axis=0).tolist()
    assert set(known[0]) == {"", "true", "false"} and set(known[1]) == {"", "1", "2", "30", "-4"}
    assert set(known[2]) == {"", "0.5", "1", "2", "0.1", "1e-05", str(10**22)}
    assert set(known[3]) == {"", "01234", "1234", "99999"} and set(known[4]) == {"", "1.1", "1.10", "1.9", "2.0"}


def test_requests_may_spell_a_value_as_they_like(sources: dict[str, Any]) -> None:
    """Rows of the csv file as Python's reader gives them, all of them strings but for the numbers."""
    section = section_of(sources["csv"])
    said = next(meanings(section)).canonical(read(sources["csv"], section.columns), section.compared)
    signature = fitted(section, said)
    with open(f"{sources['csv'].path}", newline="") as file:
        rows: list[dict[str, Any]] = list(csv.DictReader(file))
    for row in rows:
        row |= {name: float(row[name]) if row[name] else "NA" for name in ("amount", "count")}
    assert_same(served(signature, rows), encoded(section, signature, said))


def test_a_prepared_set_whose_splits_come_in_three_formats_has_every_row_thrice(ray_cluster: None, tmp_path: Path) -> None:
    given = written(tmp_path / "files")
    section = section_of(
        given["csv"], validation=given["json"], test=given["parquet"], split=RandomSplit(train=1.0, validation=0.0, test=0.0)
    )
    data: Artifact = once(PREPARE, section, tmp_path / "home")
    assert data.manifest.info["counts"] | {"read": 0} == {
        **{"read": 0, "bad": 0, "dropped": 0, "duplicates": 0},
        **dict.fromkeys(("train", "validation", "test"), ROWS),
    }
    assert data.manifest.info["across"] == {"validation": ROWS, "test": ROWS}
    train, test = rows_of(data, "train"), rows_of(data, "test")
    for name, values in train.items():
        assert np.array_equal(values, test[name], equal_nan=values.dtype == np.float32), name
    assert signature_of(data).inputs[1].types == ("boolean", "number", "number", "string", "string", "string", "date", "date")


# The text of a value, and the type of a column


@pytest.mark.parametrize(
    ("kind", "values", "text"),
    [
        ("number", [1, 1.0, "1", "1.0", " 1 ", True, "True", "1e0", Decimal("1.00")], "1"),
        ("number", [0.1, "0.1", "0.10", ".1", Decimal("0.10")], "0.1"),
        ("number", [0, -0.0, "-0", "-0.0", False, "false"], "0"),
        ("number", [1e22, "1e22", "1E+22", 10**22], str(10**22)),
        ("number", [1e-5, "0.00001", "1e-5"], "1e-05"),
        ("number", ["12345678901234567890", 12345678901234567890], "12345678901234567890"),
        ("number", ["007"], "007"),
        ("number", ["+49"], "+49"),
        ("number", ["word"], "word"),
        ("boolean", [True, "true", "True", "TRUE", " true", 1, 1.0, "1", "1.0"], "true"),
        ("boolean", ["maybe"], "maybe"),
        ("date", [date(2026, 1, 2), datetime(2026, 1, 2), "2026-01-02", "2026-01-02 00:00:00", "2026-01-02T01:00:00+01:00"], "2026-01-02"),
        ("date", [datetime(2026, 1, 2, 3, 4, 5), "2026-01-02 03:04:05", "2026-01-02T03:04:05Z"], "2026-01-02T03:04:05"),
        ("string", ["1.10"], "1.10"),
        ("string", ["True"], "True"),
        ("string", [" a"], " a"),
        ("string", [None, float("nan"), "", "NA", "nan"], ""),
        ("number", [None, float("nan"), "", "NA", "nan"], ""),
    ],
)
def test_a_value_has_one_text(kind: ColumnType, values: list[Any], text: str) -> None:
    assert {as_text(value, kind, MISSING) for value in values} == {text}


@pytest.mark.parametrize("kind", ["number", "boolean", "date"])
def test_columns_are_spelled_as_values_are(kind: ColumnType) -> None:
    """Of numbers most are recognised by an expression and never looked at by Python."""
    random = np.random.default_rng(3)
    floats = random.normal(size=2000) * 10.0 ** random.integers(-8, 20, 2000)
    texts = [form % value for value in floats.tolist() for form in ("%.17g", "%.6g", "%.2f")] + [str(value) for value in floats.tolist()]
    texts += ["0", "-0", "0.0", "-0.5", "1.10", "0.0001", "0.00001", "007", "+1", "1e400", "true", "x", "", "2026-01-02 00:00:00", "0.10"]
    found = spelled(pa.chunked_array([[*texts, None]]), kind)
    assert found.to_pylist() == [*(as_text(text, kind) for text in texts), None]


@pytest.mark.parametrize(
    ("texts", "kind"),
    [
        (["1", "20", "-3"], "number"),
        (["1", "1.0", "2.5"], "number"),
        (["1.50", "10.00", "0.25"], "number"),
        (["1e5", "2.5E-3"], "number"),
        (["1.9", "1.10"], "string"),
        (["01234", "1234"], "string"),
        (["+4912", "+4913"], "string"),
        (["True", "FALSE"], "boolean"),
        (["0", "1"], "number"),
        (["true", "1"], "string"),
        (["2026-01-02", "2026-01-02 03:04:05"], "date"),
        (["2026-01-02", "soon"], "string"),
        (["20260102"], "number"),
        (["x", "1"], "string"),
    ],
)
def test_the_type_of_a_column_of_texts(texts: list[str], kind: str) -> None:
    assert type_of_texts(texts) == kind


def test_types_are_decided_by_all_files_and_can_be_stated(tmp_path: Path) -> None:
    for number, lines in enumerate(["zip,n,flag\n1234,1,\n", "zip,n,flag\n1235,NA,True\n", "zip,n,flag\n01234,2.5,False\n"]):
        (tmp_path / f"{number}.csv").write_text(lines)
    assert Csv(path=str(tmp_path)).meaning().types == {"zip": "string", "n": "number", "flag": "boolean"}
    assert Csv(path=str(tmp_path)).peek(9).to_pylist() == [{"zip": "1234", "n": 1, "flag": None}]
    one = str(tmp_path / "0.csv")
    assert Csv(path=one).peek(9)["zip"].to_pylist() == [1234]
    assert Csv(path=one, types={"zip": "string"}).peek(9)["zip"].to_pylist() == ["1234"]
    with pytest.raises(DloptError, match=r"types: has no column 'zpi'; its columns are zip, n, flag"):
        Csv(path=one, types={"zpi": "string"}).peek(1)


def test_labels_that_are_codes_are_as_many_classes_as_there_are_texts(tmp_path: Path) -> None:
    rows = ["1234", "01234", "99"] * 4
    (tmp_path / "x.csv").write_text("a,label\n" + "".join(f"{n},{label}\n" for n, label in enumerate(rows)))
    section = Data(source=Csv(path=f"{tmp_path}/x.csv"), inputs=(NumberInput(columns=("a",)),), target=CategoryTarget())
    raw = next(meanings(section)).canonical(read(section.source, section.columns), section.compared)
    labels, reasons = section.target.read(raw, look(section, list(meanings(section)))[1])
    assert labels.to_pylist() == rows and reasons == {}
    labels, reasons = section.target.read(raw, True)  # where only a later row shows it, it is no other class in silence
    assert labels.to_pylist()[:3] == [1234, None, 99]
    assert reasons[1] == "label: '01234' is not a whole number as 123 is: types: {label: string} in the source keeps such labels"


def test_the_types_of_the_training_source_hold_for_the_others(tmp_path: Path) -> None:
    pq.write_table(pa.table({"version": ["1.0", "2.0"], "a": [1, 2], "label": ["x", "y"]}), tmp_path / "x.parquet")
    (tmp_path / "t.csv").write_text("version,a,label\n1.0,1.0,x\n2.0,2.0,y\n")
    inputs = (CategoryInput(columns=("version", "a")),)
    given = {"inputs": inputs, "target": CategoryTarget(), "split": RandomSplit(train=0.9, test=0)}
    section = Data(source=Parquet(path=f"{tmp_path}/x.parquet"), test=Csv(path=f"{tmp_path}/t.csv"), **given)  # type: ignore[arg-type]
    meaning = list(meanings(section))[1]
    found = meaning.canonical(read(section.test, section.columns), section.compared)
    assert found["version"].to_pylist() == ["1.0", "2.0"] and found["a"].to_pylist() == ["1", "2"]
    train = Parquet(path=f"{tmp_path}/x.parquet", missing=("?",))
    assert [meaning.missing for meaning in meanings(section.model_copy(update={"source": train}))] == [("", "?"), ("", "?")]
    stated = section.model_copy(update={"test": Csv(path=f"{tmp_path}/t.csv", types={"version": "number"})})
    with pytest.raises(DloptError, match=r"data\.test\.types: 'version' is number, and string in data\.source: state one type in both"):
        list(meanings(stated))


# What is missing


def test_what_says_that_a_value_is_missing_is_one_setting_for_all(tmp_path: Path) -> None:
    """Against pandas, whose list is the default."""
    import pandas

    lines = "a,c,label\n" + "".join(f"{text},{text},{text}\n" for text in [*MISSING, "?", "x", "-", "1"])
    (tmp_path / "x.csv").write_text(lines)
    expected = pandas.read_csv(tmp_path / "x.csv")["label"].isna().tolist()
    for missing, gone in [(MISSING, expected), (("", "?", "-"), [text in ("", "?", "-") for text in [*MISSING, "?", "x", "-", "1"]])]:
        source = Csv(path=f"{tmp_path}/x.csv", missing=missing)
        section = Data(source=source, inputs=(CategoryInput(columns=("c",)),), target=CategoryTarget())
        said = next(meanings(section)).canonical(read(source, ("a", "c", "label")), section.compared)
        assert said["c"].is_null().to_pylist() == said["a"].is_null().to_pylist() == gone
        _, reasons = section.target.read(said, False)
        assert sorted(reasons) == [row for row, is_gone in enumerate(gone) if is_gone]
        (feature,), _ = look(section, list(meanings(section)))
        signature = Signature(inputs=(feature,), target=Target(name="label", labels=(0, 1)))
        texts = encode_rows(signature, [{"c": text} for text in [*MISSING, "?", "x", "-", "1"]])["categories"][:, 0].tolist()
        assert [text == "" for text in texts] == gone
    assert Csv(path="x", missing=["?"]).missing == ("", "?")  # type: ignore[arg-type]


def test_a_list_after_nulls_is_a_list_and_never_a_text_in_silence(tmp_path: Path) -> None:
    (tmp_path / "1.jsonl").write_text('{"tags": null, "n": 1}\n' * 3)
    (tmp_path / "2.jsonl").write_text('{"tags": ["a", "b"], "n": 1.0}\n')
    source = JsonLines(path=str(tmp_path))
    assert read(source, ("tags", "n")).to_pylist() == [{"tags": None, "n": "1"}] * 3 + [{"tags": ["a", "b"], "n": "1"}]
    assert source.peek(9).schema == pa.schema([("tags", pa.list_(pa.string())), ("n", pa.int64())])
    for number in range(3, 40):  # more than are looked at
        (tmp_path / f"{number:02d}.jsonl").write_text('{"tags": null, "n": [7]}\n' if number == 5 else '{"tags": null, "n": 1}\n')
    with pytest.raises(DloptError, match=r"05\.jsonl: after line 1, column 'n' holds a list or an object, and none in the first rows"):
        read(source, ("n",))
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "1.jsonl").write_text('{"tags": null, "n": 1}\n' * 20_000 + '{"tags": ["a"], "n": 1}\n')  # far behind the first rows
    late = JsonLines(path=f"{tmp_path}/x")
    assert late.peek(1).schema.field("tags").type == pa.list_(pa.string()) and read(late, ("tags",))["tags"].to_pylist()[-1] == ["a"]
    stated = JsonLines(path=str(tmp_path), types={"n": "string"})
    assert "[7]" in read(stated, ("n",))["n"].to_pylist()


def test_whole_numbers_of_json_are_exact(tmp_path: Path) -> None:
    ids = [12345678901234567890, 2**63 - 1, 1, 98765432109876543210]
    (tmp_path / "x.jsonl").write_text("".join(f'{{"id": {number}}}\n' for number in ids))
    assert read(JsonLines(path=f"{tmp_path}/x.jsonl"), ("id",))["id"].to_pylist() == list(map(str, ids))


def test_values_of_several_types_in_json_have_their_own_texts(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"a": 1.0}\n{"a": "1.0"}\n{"a": true}\n{"a": 0.1}\n{"a": null}\n')
    source = JsonLines(path=f"{tmp_path}/x.jsonl")
    assert source.meaning().types == {"a": "string"} and read(source, ("a",))["a"].to_pylist() == ["1", "1.0", "true", "0.1", None]


def test_numbers_of_32_bits_are_the_shortest_that_they_can_be(tmp_path: Path) -> None:
    source = from_data(pa.table({"a": pa.array([0.1, 2.0, None], pa.float32())}), tmp_path)
    part = CategoryInput(columns=("a",))
    found, _ = part.read(Columns().canonical(source.peek(3)), part.feature(source.peek(3)))
    assert [column.to_pylist() for column in found.values()] == [["0.1", "2", ""]]


def test_a_column_whose_files_disagree_is_text() -> None:
    looks = [pa.table({"a": [1, 2], "b": [True, None], "c": pa.nulls(2)}), pa.table({"a": ["x", "y"], "b": pa.nulls(2), "c": ["1", "2"]})]
    assert decided(looks, {}, MISSING).types == {"a": "string", "b": "boolean", "c": "string"}
    assert decided(looks, {}, MISSING, untyped=True).types == {"a": "string", "b": "boolean", "c": "number"}


# How csv files are written

GERMAN = {"decimal": ",", "thousands": "."}
WRITTEN: list[tuple[bytes, dict[str, Any], dict[str, Any]]] = [
    (b"a;b;c\n1,5;x,y;1.234,5\n-2;1,5 m;7\n;z;1.000\n", {"delimiter": ";"} | GERMAN, {"sep": ";"} | GERMAN),
    (b'a,b\n"1,234.5",x\n"12,345,678",y\n-7.25,z\n', {"thousands": ","}, {"thousands": ","}),
    (b"# made by hand\na,b\n1,x\n#2,y\n3,#z\n", {"comment": "#"}, {"skiprows": 1}),
    (b'a,b\n1,"say \\"hi\\", you"\n2,x\\,y\n', {"escape": "\\"}, {"escapechar": "\\"}),
    (b"a, b\n1, yes\n2, no\n", {"trim": True}, {"skipinitialspace": True}),
    (b"a,b,\n1,x\n2,y\n", {}, {"usecols": ["a", "b"]}),
    (b",a\n0,1\n1,2\n", {}, {"index_col": 0}),
    (b"a,b\n1,-\n?,y\n", {"missing": ["-", "?"]}, {"na_values": ["-", "?"]}),
]


@pytest.mark.parametrize(("content", "given", "pandas_has"), WRITTEN)
def test_csv_is_read_as_pandas_reads_it(content: bytes, given: dict[str, Any], pandas_has: dict[str, Any], tmp_path: Path) -> None:
    import pandas

    (tmp_path / "x.csv").write_bytes(content)
    source = Csv.model_validate({"path": f"{tmp_path}/x.csv"} | given)
    expected = pandas.read_csv(tmp_path / "x.csv", **pandas_has)
    if given.get("comment"):  # pandas takes what follows one within a line for a comment as well
        expected = expected[~expected["a"].astype(str).str.startswith("#")].astype({"a": int})
    found = source.peek(9)
    rows = [{name: None if value != value else value for name, value in row.items()} for row in expected.to_dict("records")]
    assert found.to_pylist() == rows
    meaning = source.meaning()
    texts = meaning.canonical(read(source, tuple(found.column_names)), tuple(found.column_names))
    assert [[as_text(value) for value in row.values()] for row in rows] == [[as_text(v) for v in row.values()] for row in texts.to_pylist()]


def test_thousands_that_the_job_does_not_name_are_said(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("a;b\n1.234,5;x\n2,5;y\n")
    with pytest.raises(DloptError, match=r"x\.csv: column 'a' parts thousands by '\.': set thousands to it"):
        Csv(path=f"{tmp_path}/x.csv", delimiter=";", decimal=",").peek(1)
    for wrong in ({"decimal": ",", "thousands": ","}, {"escape": '"'}, {"comment": "ä"}):
        with pytest.raises(DloptError):
            Csv.model_validate({"path": "x"} | wrong)


def test_lines_keep_their_numbers_whatever_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text('a,b\n# one\n1,"\\"\n"\n# two, "too\n\n2,3,4\n')
    with pytest.raises(DloptError, match=r"x\.csv: cannot be read: line 7 has 3 values where 2 are expected"):
        Csv(path=f"{tmp_path}/x.csv", comment="#", escape="\\").peek(1)


# Refused without need


def test_views_that_polars_writes_are_texts(tmp_path: Path) -> None:
    views = pa.table({"a": pa.array(["x", None], pa.string_view()), "b": pa.array([b"1", b"2"], pa.binary_view())})
    with pa.OSFile(f"{tmp_path}/x.arrow", "wb") as sink, pa.ipc.new_file(sink, views.schema) as writer:
        writer.write_table(views)
    source = Arrow(path=f"{tmp_path}/x.arrow")
    found = read(source, ("a", "b"))
    assert found.schema == pa.schema([("a", pa.string()), ("b", pa.binary())])
    assert found.to_pylist() == source.peek(2).to_pylist() == [{"a": "x", "b": b"1"}, {"a": None, "b": b"2"}]


def test_whatever_gives_a_stream_of_arrow_is_a_table(tmp_path: Path) -> None:
    """As polars' DataFrame does."""

    class Frame:
        def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
            return pa.table({"a": pa.array(["x", None], pa.string_view())}).__arrow_c_stream__(requested_schema)

    assert from_data(Frame(), tmp_path).peek(2).to_pylist() == [{"a": "x"}, {"a": None}]


@pytest.mark.parametrize(
    "text",
    [
        *("2026-11-24T08:30:00.1234567", "2026-11-24 08:30:00.123456789Z", "2026-11-24T08:30:00+00"),
        *("2026-11-24T08:30:00.5-05", "2026-11-24T08:30:00.123456789+05:30"),
    ],
)
def test_dates_in_iso_8601_are_those_of_pandas(text: str) -> None:
    import pandas

    expected = pandas.Timestamp(text)
    expected = expected.tz_convert(None) if expected.tz else expected
    assert parse_dates(pa.array([text, None, "2026-01-02"]), "")[0].as_py() == expected.floor("us").to_pydatetime()


def test_forms_that_arrow_does_not_read_are_read_by_python() -> None:
    texts = ["24.11.2026 08:30:00.25", None, "01.02.2026 23:59:59.999999"]
    found = parse_dates(pa.array(texts), "%d.%m.%Y %H:%M:%S.%f")
    assert found.to_pylist() == [datetime(2026, 11, 24, 8, 30, 0, 250_000), None, datetime(2026, 2, 1, 23, 59, 59, 999_999)]
    with pytest.raises(DloptError, match=r"is not a date such as %d\.%m\.%Y %f"):
        parse_dates(pa.array(["24.11.2026"]), "%d.%m.%Y %f")


def test_a_split_by_time_goes_by_the_numbers_of_a_csv_file(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("t,label\n2013,a\n2015.5,b\n,a\nsoon,b\n")
    source = Csv(path=f"{tmp_path}/x.csv", types={"t": "number"})
    values, reasons = TimeSplit(column="t").side(source.meaning().canonical(read(source, ("t",))))
    assert values.to_pylist()[:2] == [2013.0, 2015.5] and reasons == {2: "t: no time to split by", 3: "t: 'soon' is not a number"}
    (tmp_path / "y.csv").write_text("t\n2013-01-02\n2013-01-01\n")
    dated = Csv(path=f"{tmp_path}/y.csv")
    assert np.diff(TimeSplit(column="t").side(dated.meaning().canonical(read(dated, ("t",))))[0].to_numpy()).tolist() == [-86400.0]


def test_a_column_that_nobody_asks_for_may_change_its_type(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [1], "x": [1]}), tmp_path / "1.parquet")
    pq.write_table(pa.table({"a": [2.5], "x": ["one"]}), tmp_path / "2.parquet")
    source = Parquet(path=str(tmp_path))
    assert read(source, ("a",)).to_pylist() == [{"a": 1.0}, {"a": 2.5}] and source.peek(1).to_pylist() == [{"a": 1.0, "x": 1}]
    with pytest.raises(DloptError, match=r"2\.parquet: its columns are not those of \S+1\.parquet"):
        read(source, ("x",))


def test_yes_without_quotes_is_said() -> None:
    target = CategoryTarget.model_validate(yaml.safe_load("{column: y, positive: yes}"))
    with pytest.raises(DloptError, match=r"'true' must be one of two classes; there are 'no', 'yes' \(YAML reads yes and on as true"):
        target.target({"no": 3, "yes": 4})
    assert target.target({0: 3, 1: 4}).positive == 1


@pytest.mark.parametrize("large", [float("inf"), 1e39, 10**400])
def test_a_number_that_is_too_large_is_said_with_its_row_and_column(large: Any) -> None:
    part = NumberInput(columns=("a", "b"))
    signature = Signature(inputs=(part.feature(pa.table({"a": [1.0], "b": [1.0]})),), target=Target(name="y", labels=(0, 1)))
    with pytest.raises(DloptError, match=r"^row 1: b: a number is too large$"):
        encode_rows(signature, [{"a": 1, "b": None}, {"a": None, "b": large}])


def test_the_heads_of_files_are_looked_at_once_to_decide_types(sources: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []
    for kind in (Csv, JsonLines):
        looks = kind.looks
        monkeypatch.setattr(kind, "looks", lambda source, looks=looks: looked.append(source.kind) or looks(source))
    peek(section_of(sources["csv"], test=sources["csv"], split=RandomSplit(train=0.9, test=0)))
    assert looked == ["csv"]
