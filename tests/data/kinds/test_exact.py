"""Numbers that float32 cannot tell apart: rows stay apart, models see their differences, and what comes out is in the data's units."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pyarrow as pa
import pytest
import torch

from dlopt.data.clean import DropColumns, DropDuplicates, Outliers
from dlopt.data.kinds import CategoryInput, DateInput, NumberInput, NumberTarget, encode_rows
from dlopt.data.kinds.number import GroupMedian
from dlopt.data.table.split import RandomSplit
from dlopt.data.types.exact import exact_column, merged, offset_of, raw_values, widened
from dlopt.data.types.values import lost_in_double, numbers
from dlopt.export.graph import onnx_file
from dlopt.models import build_network
from dlopt.models.linear import Linear
from dlopt.models.preprocess import Preprocess
from dlopt.train.measure.evaluate import evaluate, predict, write_predictions
from tests.arranged import SPLITS, Split, arranged, refused, rows_of, section_of, shuffled, signature_of, statistics_of
from tests.graphs import compared

SECONDS = 1_764_500_000 + np.random.default_rng(2).permutation(600)
"""Of ten minutes of 2025."""
CENTS = 10**12 + np.random.default_rng(3).permutation(600) * 0.01
IDS = 2**60 + np.random.default_rng(4).permutation(600)
"""Such as tweets have: float64 has one for each 256."""
LABEL = np.array(["a", "b"])[np.arange(600) % 2]
COLUMNS: dict[str, Any] = {
    "seconds": SECONDS,
    "seconds with fractions": SECONDS + 0.25,
    "amounts": CENTS,
    "ids": IDS,
    "unsigned ids": IDS.astype(np.uint64) * np.uint64(8),
    "decimals": pa.array([Decimal(int(value)) / 1000 + 10**16 for value in IDS - 2**60], pa.decimal128(38, 3)),
}


def drop(home: Path, table: pa.Table, **more: Any) -> Any:
    inputs = NumberInput(columns=("x",))
    return arranged(section_of(inputs, clean=[DropDuplicates()], **more), table, home)


@pytest.mark.parametrize("form", ["numbers", "texts"])
@pytest.mark.parametrize("name", COLUMNS)
def test_no_row_is_a_duplicate_of_one_with_another_number(name: str, form: str, tmp_path: Path) -> None:
    column = COLUMNS[name] if isinstance(COLUMNS[name], pa.Array) else pa.array(COLUMNS[name])
    column = pa.array([str(value) for value in column.to_pylist()]) if form == "texts" else column
    table = pa.table({"x": column, "label": LABEL})
    counts = drop(tmp_path, pa.concat_tables([table, table.slice(0, 7)])).info["counts"]
    assert (counts["duplicates"], sum(counts[split] for split in SPLITS)) == (7, 600)


def test_the_same_number_is_one_row_whatever_type_it_has(tmp_path: Path) -> None:
    tables = [pa.table({"x": pa.array(IDS[:50]), "label": LABEL[:50]})]
    tables += [pa.table({"x": pa.array([str(value) for value in IDS[:50]]), "label": LABEL[:50]})]
    tables += [pa.table({"x": pa.array(IDS[:50]).cast(pa.uint64()), "label": LABEL[:50]})]
    data = arranged(section_of(NumberInput(columns=("x",)), clean=[DropDuplicates(most=1)]), tables, tmp_path)
    assert data.info["counts"]["duplicates"] == 100


def test_digits_that_float64_lacks_are_those_of_the_exact_number() -> None:
    given = [2**53 + 1, -(2**60) - 3, 2**63 - 1, 5, None]
    for column in (pa.array(given, pa.int64()), pa.array([None if value is None else str(value) for value in given])):
        values, reasons = numbers(column)
        rest = lost_in_double(column, values)
        assert not reasons and rest is not None
        exact = [Decimal(float(value)) + Decimal(float(more)) for value, more in zip(values[:4], rest[:4], strict=True)]
        assert exact == given[:4] and rest[4] == 0
    assert lost_in_double(pa.array([1e300, 7.5]), np.array([1e300, 7.5])) is None
    assert lost_in_double(pa.array(["0.1", "123.456"]), np.array([0.1, 123.456])) is None


NEAR = {
    "seconds": np.sort(SECONDS)[:, None] * 1.0,
    "amounts": CENTS[:, None],
    "both": np.stack([SECONDS + 0.125, CENTS, np.arange(600) % 7], axis=1),
}


def table_of(values: np.ndarray, goal: np.ndarray | None = None) -> pa.Table:
    table = pa.table({f"n{index}": column for index, column in enumerate(values.T)})
    return table.append_column("y", pa.array(LABEL if goal is None else goal))


def number_section(columns: int, **more: Any) -> Any:
    options = {key: more.pop(key) for key in ("fill", "normalize", "indicators", "clip") if key in more}
    inputs = NumberInput(columns=tuple(f"n{index}" for index in range(columns)), **options)
    return section_of(inputs, target=NumberTarget(columns=("y",)), **more)


@pytest.mark.parametrize("name", NEAR)
def test_what_is_stored_and_its_offset_are_the_number_itself(name: str, tmp_path: Path) -> None:
    values = NEAR[name]
    goal = values[:, 0] * 2 + 3
    data = arranged(number_section(values.shape[1]), table_of(values, goal), tmp_path / "one")
    (feature,), target = signature_of(data).inputs, signature_of(data).target
    assert feature.dtype == "float64" and feature.stored == "float32" and feature.offsets[0] and target.offsets
    rows = {split: rows_of(data, split) for split in SPLITS}
    found = np.concatenate([rows[split]["numbers"] + np.array(feature.offsets) for split in SPLITS])
    goals = np.concatenate([rows[split]["y"] + np.array(target.offsets) for split in SPLITS])[:, 0]
    assert sorted(map(tuple, found.round(6).tolist())) == sorted(map(tuple, values.round(6).tolist()))
    assert np.array_equal(goals.round(4), (found[:, 0] * 2 + 3).round(4))
    statistics, train = statistics_of(data), rows["train"]["numbers"].astype(np.float64) + feature.offsets
    for figure, wanted in {"min": train.min(0), "max": train.max(0), "mean": train.mean(0), "std": train.std(0)}.items():
        assert np.allclose(getattr(statistics, figure), wanted, rtol=1e-14, atol=1e-4), figure
    again = arranged(number_section(values.shape[1]), shuffled(table_of(values, goal)), tmp_path / "two", blocks=5, ranges=4)
    assert signature_of(again) == signature_of(data)
    for split in SPLITS:
        assert np.array_equal(rows_of(again, split)["numbers"], rows[split]["numbers"])


def network_of(data: Any) -> Any:
    statistics = {name: statistics_of(data, name) for name in json.loads(data.read("statistics.json"))}
    return build_network(Linear(), signature_of(data), statistics, seed=1).eval()


@pytest.mark.parametrize("normalize", ["standard", "min_max", "robust", "quantile"])
@pytest.mark.parametrize("name", NEAR)
def test_what_is_served_is_what_was_trained_in_the_units_of_the_data(name: str, normalize: str, tmp_path: Path) -> None:
    values = NEAR[name]
    table = table_of(values, values[:, 0] * 2 + 3)
    data = arranged(number_section(values.shape[1], normalize=normalize), table, tmp_path)
    signature, network = signature_of(data), network_of(data)
    split = Split.open(data, "test")
    expected = predict(network, split, torch.device("cpu"))[0].numpy()
    content = onnx_file(network, signature, "digest")
    assert compared(content, signature, split, expected, network.output.std.double().numpy())[0] < 1e-5
    raw = split.read()["numbers"] + np.array(signature.inputs[0].offsets)
    rows = [{f"n{index}": value for index, value in enumerate(row)} for row in raw.tolist()]
    (served,) = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"]).run(None, encode_rows(signature, rows))
    assert served.dtype == np.float64
    units = expected + np.array(signature.target.offsets)
    assert np.abs(served - units).max() < 1e-5 * values[:, 0].std() + 2 * np.spacing(units.max())


@pytest.mark.parametrize("name", ["seconds", "amounts"])
def test_metrics_and_predictions_are_in_the_units_of_the_data(name: str, tmp_path: Path) -> None:
    values = NEAR[name]
    goal = values[:, 0] + np.random.default_rng(1).normal(size=600) * 0.1 * values[:, 0].std()
    data = arranged(number_section(1, split=RandomSplit(train=0.5, validation=0.1, test=0.4)), table_of(values, goal), tmp_path)
    network = network_of(data)
    with torch.no_grad():  # the best line through standardised numbers that are nearly equal
        for parameter in network.body.parameters():
            parameter.fill_(1.0 if parameter.ndim == 2 else 0.0)
    split = Split.open(data, "test")
    metrics = evaluate(network, split, torch.device("cpu"))
    write_predictions(tmp_path / "found.parquet", network, split, torch.device("cpu"))
    found = pa.parquet.read_table(tmp_path / "found.parquet")
    truth, predicted = found["target.y"].to_numpy(), found["predicted.y"].to_numpy()
    nearest = np.abs(truth[:, None] - goal).min(axis=1)
    assert truth.dtype == np.float64 and nearest.max() <= 1e-6 * goal.std() + np.spacing(goal[0])
    assert metrics["mae"] == pytest.approx(np.abs(predicted - truth).mean(), rel=1e-3)
    assert metrics["rmse"] == pytest.approx(np.sqrt(np.square(predicted - truth).mean()), rel=1e-3)
    assert metrics["r2"] == pytest.approx(1 - np.square(predicted - truth).mean() / truth.var(), rel=1e-3) and metrics["r2"] > 0.98


def test_an_offset_is_that_of_most_values_whatever_stands_for_missing_ones() -> None:
    seconds = np.sort(SECONDS) * 1.0
    marked = np.unique(np.concatenate([[-3.4e38, -9999, 0], seconds]))
    assert abs(offset_of(seconds) - SECONDS.mean()) < 60 and abs(offset_of(marked) - SECONDS.mean()) < 60
    for plain in (np.arange(600.0), np.arange(600.0) * 0.1, np.arange(600) * 128.0 + 1_764_499_968, np.array([0.1]), np.array([])):
        assert offset_of(plain) == 0
    assert merged(seconds) == 0 and merged(np.sort(SECONDS * 1e4) + np.arange(600)) == 0
    assert merged(np.append(np.arange(100) + 2.0**40, np.arange(400) * 2.0**33 + 2.0**42)) == 99


def test_pieces_of_float32_and_of_float64_go_together() -> None:
    one, two = np.array([[1.0, np.nan]]), np.array([[0.1, 2.0]])
    tables = [pa.table({"x": exact_column(values)}) for values in (one, two)]
    assert [table.schema.field("x").type.byte_width for table in tables] == [8, 16]
    found = raw_values(pa.concat_tables(widened(tables))["x"], 2)
    assert np.array_equal(found, np.concatenate([one, two]), equal_nan=True)


FILLS = ["mean", "median", "zero", 1_764_500_123.0, GroupMedian(by="c")]


@pytest.mark.parametrize("fill", FILLS, ids=str)
def test_what_stands_in_for_a_missing_number_is_that_of_the_data(fill: Any, tmp_path: Path) -> None:
    seconds = np.where(np.arange(600) % 10 == 0, np.nan, SECONDS + 0.5)
    table = pa.table({"n0": seconds, "c": np.array(["p", "q", "r"])[np.arange(600) % 3], "y": LABEL})
    section = section_of(NumberInput(columns=("n0",), fill=fill), CategoryInput(columns=("c",)), target={"kind": "category", "column": "y"})
    data = arranged(section, table, tmp_path)
    signature, train = signature_of(data), rows_of(data, "train")
    layer = Preprocess(signature, {"numbers": statistics_of(data)})
    number, _ = signature.inputs
    found = layer({name: torch.from_numpy(train[name]) for name in ("numbers", "categories")})["numbers"][:, 0].double().numpy()
    raw, code = train["numbers"][:, 0].astype(np.float64) + number.offsets[0], train["categories"][:, 0]
    there = raw[~np.isnan(raw)]
    medians = [np.median(raw[(code == one) & ~np.isnan(raw)]) for one in range(1, 4)]
    constant = {"mean": there.mean(), "median": np.median(there), "zero": 0.0}
    filling = np.array(medians)[code - 1] if isinstance(fill, GroupMedian) else constant[fill] if isinstance(fill, str) else fill
    expected = (np.where(np.isnan(raw), filling, raw) - there.mean()) / there.std()
    assert np.allclose(found, expected, rtol=1e-6, atol=1e-5)


def test_outliers_and_columns_that_are_left_out_go_by_the_numbers_of_the_data(tmp_path: Path) -> None:
    seconds = SECONDS + 0.5
    seconds[:12] = [-3.4e38, 0, *range(10)]
    columns = {"n0": np.full(600, np.nan), "n1": seconds, "n2": CENTS, "y": np.arange(600) % 7 * 1.0}
    clean = [DropColumns(share=0.5, most=1), Outliers(columns=("n1",), action="missing", factor=3)]
    data = arranged(number_section(3, clean=clean), pa.table(columns), tmp_path)
    (feature,) = signature_of(data).inputs
    assert feature.columns == ("n1", "n2") and feature.offsets == pytest.approx((SECONDS.mean(), CENTS.mean()), rel=1e-7)
    statistics, train = statistics_of(data), rows_of(data, "train")["numbers"]
    assert statistics.lower[0] is not None and -1e4 < statistics.lower[0] < 0 < statistics.upper[0] < 1e4
    kept = train[train[:, 0] > -1e6, 0].astype(np.float64) + feature.offsets[0]
    assert statistics.mean[0] == pytest.approx(kept.mean(), abs=1e-3) and statistics.std[0] == pytest.approx(kept.std(), rel=1e-9)
    assert statistics.missing[0] == len(train) - len(kept) > 0


def test_days_with_fractions_are_told_apart(tmp_path: Path) -> None:
    when = pa.array(np.sort(SECONDS) * 10**6, pa.int64()).cast(pa.timestamp("us"))
    table = pa.table({"when": when, "label": LABEL})
    data = arranged(section_of(DateInput(columns=("when",), parts=("year", "days")), clean=[DropDuplicates()]), table, tmp_path)
    (feature,) = signature_of(data).inputs
    days = np.concatenate([rows_of(data, split)["dates"][:, 1].astype(float) + feature.offsets[1] for split in SPLITS])
    assert data.info["counts"]["duplicates"] == 0 and np.allclose(np.sort(days) * 86400, np.sort(SECONDS), rtol=0, atol=1e-4)
    rows = [{"when": moment.isoformat()} for moment in when.to_pylist()[:5]]
    assert encode_rows(signature_of(data), rows)["dates"].tolist() == [[2025, second / 86400] for second in np.sort(SECONDS)[:5]]


def warnings_of(column: Any, home: Path, **options: Any) -> list[str]:
    table = pa.table({"x": column, "label": np.where(np.random.default_rng(7).random(600) < 0.5, "a", "b")})
    return list(arranged(section_of(NumberInput(columns=("x",), **options)), table, home).info["warnings"])


def test_numbers_that_float32_merges_are_named(tmp_path: Path) -> None:
    cents = np.append(10.0**12 + np.arange(500) * 0.01, np.arange(100) * 1e10)
    (line,) = warnings_of(cents, tmp_path / "wide")
    assert line.startswith("x: 83% of its different numbers are the same as others in float32")
    (line,) = warnings_of(IDS, tmp_path / "ids")
    assert line.startswith("x: 597 of its numbers have more digits than float64 holds")
    assert not warnings_of(SECONDS + 0.5, tmp_path / "seconds") and not warnings_of(CENTS, tmp_path / "cents")
    (line,) = warnings_of(SECONDS + 0.5, tmp_path / "none", normalize="none")
    assert line.startswith("x: ") and "normalize: none" in line


@pytest.mark.parametrize("mark", [-3.4e38, -3.4028234663852886e38, -9999, 99999, 9.969209968386869e36, -(2**31)])
def test_numbers_that_stand_for_no_data_are_named(mark: float, tmp_path: Path) -> None:
    values = np.random.default_rng(8).normal(50, 10, 600)
    values[:40] = mark
    (line,) = warnings_of(values, tmp_path)
    assert line.startswith(f"x: {mark:.6g} in ") and "stands for no data" in line and "columns: [x], action: missing" in line


@pytest.mark.parametrize("column", [np.arange(600) % 100, np.r_[np.arange(599) * 20, 99999] % 10000, -(np.arange(600) % 101) - 0.0])
def test_honest_extremes_are_not_named(column: np.ndarray, tmp_path: Path) -> None:
    assert not [line for line in warnings_of(column, tmp_path) if "no data" in line]


def test_a_number_beyond_float32_is_refused_in_a_line(tmp_path: Path) -> None:
    table = pa.table({"x": [1e39] * 10 + [1.0] * 90, "label": ["a", "b"] * 50})
    assert "x: a number is too large (10)" in refused(section_of(NumberInput(columns=("x",))), table, tmp_path)
