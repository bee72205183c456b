"""Cleaning by rules, exact duplicates and outliers, each against a few lines of pandas or Python; and a table with planted faults."""

from __future__ import annotations

import datetime
import math
import re
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pydantic import TypeAdapter, ValidationError

from dlopt.data.clean import (
    Allowed,
    Clean,
    Cleaning,
    DropColumns,
    DropDuplicates,
    DropMissing,
    ExactDuplicates,
    Length,
    NearDuplicates,
    Outliers,
    Pattern,
    Range,
    RowRule,
    Unique,
)
from dlopt.data.counter import row_keys
from dlopt.data.kinds.pixels import decode_image
from dlopt.data.types.columns import Columns
from dlopt.docstrings import json_schema
from dlopt.part import DloptError
from tests.planted import CLEAN, REASONS, planted

PARTS: list[dict[str, Any]] = [
    {"kind": "range", "columns": ["a"], "min": 0},
    {"kind": "pattern", "columns": ["a"], "regex": "x+"},
    {"kind": "allowed", "columns": ["a"], "values": ["x", 1]},
    {"kind": "drop_missing", "columns": ["a", "b"]},
    {"kind": "length", "columns": ["a"], "max": 3},
    {"kind": "drop_columns", "share": 0.2},
    {"kind": "drop_duplicates"},
    {"kind": "drop_duplicates", "columns": ["a", "b"], "order_by": "c", "keep": "last"},
    {"kind": "unique", "columns": ["a"], "conflict": "drop_all"},
    {"kind": "near_duplicate_images"},
    {"kind": "near_duplicate_texts", "columns": ["a"]},
    {"kind": "outliers", "columns": ["a"], "method": "quantile", "low": 0.05, "high": 0.95},
]
FAMILIES = (RowRule, ExactDuplicates, NearDuplicates, Outliers, DropColumns)


def part(**given: Any) -> Any:
    return TypeAdapter(Clean).validate_python(given)


def judged(rule: RowRule, *values: Any, kind: pa.DataType | None = None) -> list[str | None]:
    """What a rule of the column a says of these values."""
    return rule.judge(Columns().canonical(pa.table({"a": pa.array(values, kind)}))).to_pylist()


def survivors(clean: ExactDuplicates, table: pa.Table, keys: np.ndarray) -> np.ndarray:
    """The places of the rows that stay."""
    identity = clean.identity(table) if clean.columns else keys
    return np.flatnonzero(~clean.losers(identity, clean.order(table), keys))


def keys_of(table: pa.Table) -> np.ndarray:
    return DropDuplicates(columns=tuple(table.column_names)).identity(table)


# What there is


@pytest.mark.parametrize("given", PARTS, ids=lambda given: given["kind"])
def test_every_part_is_made_from_yaml_belongs_to_one_family_and_is_documented(given: dict[str, Any]) -> None:
    made = part(**given)
    assert made.kind == given["kind"] and made.most == 0.5 and made.title.startswith(made.kind)
    assert sum(isinstance(made, family) for family in FAMILIES) == 1 and isinstance(made, Cleaning)
    fields = json_schema(type(made))["properties"]
    assert [name for name, field in fields.items() if "description" not in field and name != "kind"] == []


def test_titles_name_what_is_looked_at() -> None:
    assert part(kind="drop_duplicates", columns=["title", "description"]).title == "drop_duplicates of title, description"
    assert part(kind="drop_duplicates").title == "drop_duplicates"
    assert part(kind="outliers", columns=["a"], method="zscore").title == "outliers (zscore) of a"


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"kind": "range", "columns": ["a"]}, "neither min nor max"),
        ({"kind": "range", "columns": ["a"], "min": 2, "max": 1}, "min 2 is above max 1"),
        ({"kind": "range", "columns": [], "min": 2}, "at least 1 item"),
        ({"kind": "range", "columns": ["a", "b", "a"], "min": 2}, "column 'a' is named twice"),
        ({"kind": "pattern", "columns": ["a"], "regex": "(x"}, r"'(x': missing )"),
        ({"kind": "length", "columns": ["a"], "min": 3, "max": 2}, "min 3 is above max 2"),
        ({"kind": "drop_duplicates", "keep": "last"}, "keep: last needs order_by"),
        ({"kind": "unique"}, "columns"),
        ({"kind": "outliers", "columns": ["a"], "method": "quantile", "factor": 2}, "method quantile has no factor"),
        ({"kind": "outliers", "columns": ["a"], "low": 0.1}, "low and high are of method quantile"),
        ({"kind": "outliers", "columns": ["a"], "method": "quantile", "low": 0.9, "high": 0.1}, "low 0.9 is not below high 0.1"),
        ({"kind": "drop_dupes"}, "drop_dupes"),
    ],
)
def test_a_mistake_is_named(given: dict[str, Any], why: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(why)):
        part(**given)


# Rules


def test_a_range_holds_for_numbers_however_they_are_written() -> None:
    rule = Range(columns=("a",), min=0, max=10)
    low, high = "a: less than 0", "a: more than 10"
    assert judged(rule, -0.1, 0.0, 10.0, 10.1, None, math.nan, math.inf) == [low, None, None, high, None, None, high]
    assert judged(rule, "-1", "1e1", "11", "", "NA", "x", "1 000") == [low, None, high, None, None, "a: not a number", "a: not a number"]
    assert judged(rule, Decimal("-0.01"), Decimal("10.00")) == [low, None]
    assert judged(rule, 11, None, -1, kind=pa.int8()) == [high, None, low]
    assert judged(rule, True, False) == [None, None]


def test_an_open_range_leaves_its_bounds_out() -> None:
    assert judged(Range(columns=("a",), min=0, max=1, inclusive=False), 0, 0.5, 1) == ["a: not above 0", None, "a: not below 1"]


def test_missing_values_can_break_a_rule() -> None:
    assert judged(Range(columns=("a",), min=0, missing="drop"), None, "", "nan", "1", "-1") == [*["a: missing"] * 3, None, "a: less than 0"]
    assert judged(Pattern(columns=("a",), regex="x", missing="drop"), None, "x") == ["a: missing", None]
    assert judged(Allowed(columns=("a",), values=("x",), missing="drop"), None, "x") == ["a: missing", None]


def test_a_pattern_is_of_the_whole_value() -> None:
    rule = Pattern(columns=("a",), regex="[a-z]+|ü[0-9]")
    wrong = "a: does not match [a-z]+|ü[0-9]"
    assert judged(rule, "abc", "ü7", "abc ", "ü", "A", "abc\n", "", None) == [None, None, wrong, wrong, wrong, wrong, None, None]
    assert judged(Pattern(columns=("a",), regex="[0-9]{3}"), 123, 12) == [None, "a: does not match [0-9]{3}"]


def test_allowed_values_are_compared_as_what_they_say() -> None:
    rule, wrong = Allowed(columns=("a",), values=(1, 2.5, "x", True)), "a: not an allowed value"
    assert judged(rule, 1, 2, None) == [None, wrong, None]
    assert judged(rule, 1.0, 2.5, 2.0) == [None, None, wrong]
    assert judged(rule, "1", "2.5", "x", "X", "01", "", "true") == [None, None, None, wrong, wrong, None, None]
    assert judged(rule, True, False) == [None, wrong]


def test_a_length_is_in_characters_and_a_missing_text_has_none() -> None:
    rule = Length(columns=("a",), min=1, max=3)
    short, long = "a: shorter than 1 characters", "a: longer than 3 characters"
    assert judged(rule, "äöü", "äöüx", "", None, "日本語", "🙂") == [None, long, short, short, None, None]


def test_rows_are_dropped_that_miss_more_than_a_share_of_the_columns() -> None:
    table = pa.table({"a": [1.0, math.nan, None, None], "b": ["x", "x", "NA", ""], "c": [[1], [1], [1], None]})
    table = Columns().canonical(table)
    columns = ("a", "b", "c")
    assert DropMissing(columns=columns).judge(table).to_pylist() == [None, "a: missing", "a: missing", "a: missing"]
    assert DropMissing(columns=("b",)).judge(table).to_pylist() == [None, None, "b: missing", "b: missing"]
    third = DropMissing(columns=columns, share=1 / 3).judge(table).to_pylist()
    assert third == [None, None, *["missing: more than 33% of a, b, c"] * 2]
    assert DropMissing(columns=columns, share=2 / 3).judge(table).to_pylist() == [None, None, None, "missing: more than 67% of a, b, c"]


def test_of_several_columns_the_first_that_breaks_a_rule_is_named() -> None:
    table = pa.table({"a": [1, -1, 1, -1], "b": ["-1", "1", "1", "x"]})
    assert Range(columns=("a", "b"), min=0).judge(table).to_pylist() == ["b: less than 0", "a: less than 0", None, "a: less than 0"]


RULES = [
    Range(columns=("a",), min=0),
    Pattern(columns=("a",), regex="x"),
    Allowed(columns=("a",), values=(1,)),
    Length(columns=("a",), max=0),
    DropMissing(columns=("a",)),
]


KINDS = [pa.string(), pa.large_string(), pa.float64(), pa.int32(), pa.null(), pa.dictionary(pa.int32(), pa.string())]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.kind)
@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.float64(), pa.int32(), pa.null(), pa.dictionary(pa.int32(), pa.string())]
)
def test_rules_take_columns_without_rows_or_values(rule: RowRule, kind: pa.DataType) -> None:
    assert rule.judge(pa.table({"a": pa.array([], kind)})).to_pylist() == []
    expected = "a: missing" if rule.kind == "drop_missing" else None
    assert judged(rule, None, None, kind=kind) == [expected] * 2


def test_rules_take_columns_in_several_chunks() -> None:
    column = pa.chunked_array([["1", "-1"], [], ["x"]])
    assert Range(columns=("a",), min=0).judge(pa.table({"a": column})).to_pylist() == [None, "a: less than 0", "a: not a number"]


# Exact duplicates


def spelled(random: np.random.Generator, rows: int) -> pa.Table:
    """Few different rows, of every usual type."""
    number = random.integers(0, 4, rows)
    return pa.table(
        {
            "number": pa.array(number, pa.int16(), mask=number == 3),
            "real": pa.array(random.choice([0.5, math.nan, -0.0, 0.0, 1e300], rows)),
            "text": pa.array(random.choice(["", "ä", "a", "A", "日本"], rows).tolist()),
            "category": pa.array(random.choice(["x", "y"], rows).tolist()).dictionary_encode(),
            "bytes": pa.array([b"\x00" * int(size) for size in random.integers(0, 3, rows)]),
            "list": pa.array([[0] * int(size) for size in random.integers(0, 2, rows)], pa.list_(pa.uint8())),
            "day": pa.array([datetime.date(2026, 1, int(day)) for day in random.integers(1, 3, rows)]),
            "row": np.arange(rows),
        }
    )


COLUMNS = ("number", "real", "text", "category", "bytes", "list", "day")


@pytest.mark.parametrize("columns", [("number",), ("real", "text"), ("bytes", "list"), ("category", "day"), COLUMNS])
def test_as_many_rows_stay_as_in_pandas_and_none_is_equal_to_another(columns: tuple[str, ...]) -> None:
    table = spelled(np.random.default_rng(0), 3000)
    frame = table.select(columns).to_pandas().astype({"category": str} if "category" in columns else {})
    frame = frame.map(lambda value: tuple(value) if isinstance(value, np.ndarray) else value)
    stay = survivors(DropDuplicates(columns=columns), table, keys_of(table))
    assert len(stay) == len(frame.drop_duplicates()) == len(frame.iloc[stay].drop_duplicates())


def test_the_same_rows_stay_whatever_the_order_of_rows() -> None:
    random = np.random.default_rng(1)
    table = spelled(random, 2000)
    keys = row_keys([np.arange(2000)])
    for clean in (
        DropDuplicates(columns=("number", "text")),
        DropDuplicates(columns=("number", "text"), order_by="real"),
        Unique(columns=("text", "real"), order_by="row", keep="last"),
        Unique(columns=("number",), conflict="drop_all"),
    ):
        order = random.permutation(2000)
        before = survivors(clean, table, keys)
        after = order[survivors(clean, table.take(order), keys[order])]
        assert sorted(before.tolist()) == sorted(after.tolist())


def test_the_least_hash_stays_without_an_order() -> None:
    table = spelled(np.random.default_rng(2), 1000)
    keys = row_keys([np.arange(1000)])
    groups: dict[Any, list[int]] = {}
    for row, value in enumerate(table["text"].to_pylist()):
        groups.setdefault(value, []).append(row)
    expected = {min(rows, key=lambda row: tuple(keys[row])) for rows in groups.values()}
    assert set(survivors(DropDuplicates(columns=("text",)), table, keys).tolist()) == expected


@pytest.mark.parametrize("keep", ["first", "last"])
def test_the_first_or_last_by_a_column_stays_as_in_pandas(keep: Any) -> None:
    random = np.random.default_rng(3)
    table = spelled(random, 2000).append_column("order", pa.array(random.permutation(2000) / 7))
    frame = table.select(["number", "text", "order"]).to_pandas().sort_values("order")
    expected = set(frame.drop_duplicates(["number", "text"], keep=keep).index)
    clean = DropDuplicates(columns=("number", "text"), order_by="order", keep=keep)
    assert set(survivors(clean, table, keys_of(table)).tolist()) == expected


@pytest.mark.parametrize(
    ("values", "first", "last"),
    [
        ([3, 1, 2, None], 1, 0),
        (["10", "9", "", "NA"], 1, 0),
        (["2026-01-10", "2026-01-09T23:00:00Z", None, "2025-12-31"], 3, 0),
        (["2026-01-10T01:00:00+02:00", "2026-01-09T23:30:00Z", "soon", None], 0, 1),
        ([datetime.date(2026, 1, 2), datetime.date(1960, 1, 1), None, None], 1, 0),
        ([datetime.datetime(2026, 1, 2, 3), datetime.datetime(2026, 1, 2, 4), None, None], 0, 1),
        ([math.nan, -math.inf, 5.0, 6.0], 2, 3),
        ([None, Decimal("1.5"), Decimal("-1.5"), None], 2, 1),
    ],
)
def test_an_order_is_of_numbers_or_times_and_what_is_missing_comes_last(values: list[Any], first: int, last: int) -> None:
    table = pa.table({"a": ["x"] * 4, "order": values})
    for keep, expected in (("first", first), ("last", last)):
        clean = part(kind="drop_duplicates", columns=["a"], order_by="order", keep=keep)
        assert survivors(clean, table, row_keys([np.arange(4)])).tolist() == [expected]
        clean.refuse_unsortable(table)


def test_an_order_by_words_is_refused() -> None:
    clean = DropDuplicates(order_by="a")
    with pytest.raises(
        DloptError, match=r"data.clean: drop_duplicates.order_by: column 'a' holds 'soon': name a column of numbers or dates"
    ):
        clean.refuse_unsortable(pa.table({"a": [None, "soon", "later"]}))
    clean.refuse_unsortable(pa.table({"a": [None, ""]}))


def test_a_tie_in_the_order_is_decided_by_the_hash() -> None:
    table, keys = pa.table({"a": ["x"] * 50, "order": [1.0] * 50}), row_keys([np.arange(50)])
    least = min(range(50), key=lambda row: tuple(keys[row]))
    for keep in ("first", "last"):
        clean = part(kind="drop_duplicates", columns=["a"], order_by="order", keep=keep)
        assert survivors(clean, table, keys).tolist() == [least]


SAME: list[list[Any]] = [
    [7, 7.0, "7", Decimal("7.00"), np.float32(7)],
    [0.5, "0.5", Decimal("0.50")],
    [-3, -3.0, "-3"],
    [0, 0.0, -0.0, "0"],
    [1e19, "10000000000000000000"],
    [2**60 + 1, str(2**60 + 1)],
    [None, math.nan, "", "NA"],
    ["07"],
    ["7.0"],
    [" 7"],
    ["0.50"],
    ["seven"],
    ["Seven"],
    ["ﬁ"],
    ["fi"],
    [True, "true"],
    [b"7"],
    [[7]],
    [[7, 7]],
    [2**63 + 5],
    [datetime.date(2026, 1, 2), "2026-01-02"],
]
"""In each line values that are equal; values of different lines differ."""


def test_values_are_compared_as_what_they_say() -> None:
    words: dict[tuple[int, int], int] = {}
    for number, values in enumerate(SAME):
        for value in values:
            column = pa.array([value], pa.uint64() if isinstance(value, int) and value >= 2**63 else None)
            (found,) = map(tuple, DropDuplicates(columns=("a",)).identity(Columns().canonical(pa.table({"a": column}))).tolist())
            assert words.setdefault(found, number) == number, f"{value!r} in line {number}"
    assert len(words) == len(SAME)


def test_images_are_compared_by_their_bytes_whatever_they_are_called() -> None:
    column = pa.array([{"bytes": b"x", "path": "1"}, {"bytes": b"x", "path": "2"}, {"bytes": b"y", "path": "1"}, None])
    words = DropDuplicates(columns=("a",)).identity(pa.table({"a": column}))
    assert (words[0] == words[1]).all() and len(np.unique(words, axis=0)) == 3


def test_a_row_is_its_columns_in_their_order() -> None:
    table = pa.table({"a": ["x", "y", ""], "b": ["y", "x", "xy"]})
    assert len(np.unique(DropDuplicates(columns=("a", "b")).identity(table), axis=0)) == 3


def test_rows_without_a_key_are_not_duplicates_of_each_other() -> None:
    table = Columns().canonical(pa.table({"a": [None, None, "", "x", "x", "NA"], "b": [1, 1, 1, 1, 1, 1]}))
    assert len(survivors(Unique(columns=("a", "b")), table, keys_of(table))) == 5
    assert len(survivors(DropDuplicates(columns=("a", "b")), table, keys_of(table))) == 2  # there missing equals missing


def test_rows_that_disagree_about_a_key_are_all_dropped_if_so_wished() -> None:
    table = pa.table({"key": [1, 1, 2, 2, 3, None, None], "value": [5, 6, 7, 7, 8, 9, 10]})
    keys = DropDuplicates(columns=("key", "value")).identity(table)
    stay = survivors(Unique(columns=("key",), conflict="drop_all"), table, keys)
    assert table["key"].take(stay).to_pylist() == [2, 3, None, None]
    assert len(survivors(Unique(columns=("key",)), table, keys)) == 5


@pytest.mark.parametrize("clean", [DropDuplicates(columns=("a",)), Unique(columns=("a",)), Unique(columns=("a",), conflict="drop_all")])
def test_no_rows_one_row_and_many_equal_rows(clean: ExactDuplicates) -> None:
    for rows, stay in ((0, 0), (1, 1), (50_000, 1)):
        table = pa.table({"a": pa.array(["x"] * rows, pa.string())})
        assert len(survivors(clean, table, keys_of(table))) == stay


@pytest.mark.parametrize("half", [0, 1])
def test_identities_that_agree_in_one_half_only_are_different(half: int) -> None:
    identity = np.ones((200, 2), dtype=np.uint64)
    identity[:, half] = np.random.default_rng(0).integers(0, 20, 200)
    assert DropDuplicates().losers(identity, None, row_keys([np.arange(200)])).sum() == 180


# Outliers


def bounds_of(clean: Outliers, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    q25, q75, low, high = np.nanquantile(values, [0.25, 0.75, clean.low, clean.high], axis=0)
    return clean.bounds(np.nanmean(values, axis=0), np.nanstd(values, axis=0), q25, q75, low, high)


@pytest.mark.parametrize(
    "clean",
    [
        Outliers(columns=("a", "b", "c"), method="zscore"),
        Outliers(columns=("a", "b", "c"), method="zscore", factor=2),
        Outliers(columns=("a", "b", "c")),
        Outliers(columns=("a", "b", "c"), method="quantile", low=0.1, high=0.95),
    ],
    ids=["zscore 3", "zscore 2", "iqr", "quantile"],
)
def test_outliers_are_those_that_pandas_finds(clean: Outliers) -> None:
    random = np.random.default_rng(4)
    values = random.standard_t(2, (5000, 3)) * [1, 1e6, 1e-6] + [0, 5e6, 0]
    values[random.random(values.shape) < 0.05] = np.nan
    found = clean.judge(values, *bounds_of(clean, values))
    for column in range(3):
        series = pd.Series(values[:, column])
        if clean.method == "zscore":
            expected = ((series - series.mean()) / series.std(ddof=0)).abs() > (clean.factor or 3)
        elif clean.method == "iqr":
            q1, q3 = series.quantile(0.25), series.quantile(0.75)
            expected = (series < q1 - 1.5 * (q3 - q1)) | (series > q3 + 1.5 * (q3 - q1))
        else:
            expected = (series < series.quantile(0.1)) | (series > series.quantile(0.95))
        assert 0 < expected.sum() < 1000
        assert (found[:, column] == expected.to_numpy()).all()


@pytest.mark.parametrize("method", ["zscore", "iqr", "quantile"])
def test_a_column_without_spread_has_no_outliers(method: Any) -> None:
    values = np.full((1000, 1), np.float32(0.1))
    clean = Outliers(columns=("a",), method=method)
    assert not clean.judge(values, *bounds_of(clean, values)).any()
    if method != "quantile":  # sums that were rounded
        mean, std = np.array([float(values[0, 0]) + 1e-12]), np.array([1e-13])
        assert not clean.judge(values, *clean.bounds(mean, std, mean, mean + std, mean, mean)).any()


def test_iqr_has_no_bounds_where_most_values_are_the_same() -> None:
    values = np.array([[0.0]] * 90 + [[5.0]] * 10)
    lower, upper = bounds_of(Outliers(columns=("a",)), values)
    assert np.isinf([lower, upper]).all()


def test_missing_values_are_no_outliers() -> None:
    clean = Outliers(columns=("a", "b"))
    found = clean.judge(np.array([[np.nan, 0], [np.nan, 9], [-9, np.nan]]), np.array([-1, -1]), np.array([1, 1]))
    assert found.tolist() == [[False, False], [False, True], [True, False]]
    assert clean.reasons(found).to_pylist() == [None, "b: outlier by iqr", "a: outlier by iqr"]


# Planted faults


@pytest.mark.parametrize("seed", [0, 1])
def test_exactly_the_planted_rows_are_found_and_each_for_its_fault(seed: int) -> None:
    plant = planted(1500, seed)
    table, ids = Columns().canonical(plant.table), plant.table["id"].to_numpy()
    found: dict[str, set[int]] = {kind: set() for kind in REASONS}
    stay = np.ones(len(table), dtype=bool)
    for rule in CLEAN:
        if isinstance(rule, RowRule):
            reasons = rule.judge(table)
            for row in np.flatnonzero(reasons.is_valid().to_numpy(zero_copy_only=False)).tolist():
                kinds = [kind for kind, pattern in REASONS.items() if re.search(pattern, reasons[row].as_py())]
                assert len(kinds) == 1
                found[kinds[0]].add(int(ids[row]))
                stay[row] = False
    for row, image in enumerate(table["image"].to_pylist()):
        if not _decodes(image, plant.pixels[ids[row]]):
            found["image"].add(int(ids[row]))
            stay[row] = False
    stay &= table["label"].is_valid().to_numpy(zero_copy_only=False)
    found["no label"] = set(ids[table["label"].is_null().to_numpy(zero_copy_only=False)].tolist())
    left = table.filter(pa.array(stay))
    clean = DropDuplicates(columns=("image", "amount", "weight", "label"), order_by="id")
    lost = clean.losers(clean.identity(left), clean.order(left), keys_of(left))
    found["duplicate"] = set(left["id"].to_numpy()[lost].tolist())
    assert {kind: frozenset(rows) for kind, rows in found.items()} == plant.faults
    assert set(left["id"].to_numpy()[~lost].tolist()) == plant.good and len(plant.good) == 1500 - 7 * 15
    assert min(map(len, plant.faults.values())) == max(map(len, plant.faults.values())) == 15


def _decodes(image: bytes | None, pixels: np.ndarray) -> bool:
    """Whether it is an image; if so, it is the one that it should be."""
    try:
        found = decode_image(image or b"")
    except DloptError:
        return False
    assert (found[..., 0] == pixels).all()
    return True
