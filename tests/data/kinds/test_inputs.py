"""Every kind of input and target, and each of its options, against an independent computation."""

from __future__ import annotations

import io
import itertools
import math
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn.impute import SimpleImputer
from sklearn.preprocessing import FunctionTransformer, MaxAbsScaler, MinMaxScaler, QuantileTransformer, RobustScaler, StandardScaler

from dlopt.data.clean import Outliers, Unique
from dlopt.data.kinds import (
    CategoryInput,
    CategoryTarget,
    DateInput,
    ImageInput,
    MultiLabelTarget,
    NumberInput,
    NumberTarget,
    TextInput,
    ThresholdTarget,
    encode_rows,
)
from dlopt.data.kinds.base import Bound
from dlopt.data.kinds.category import hashed
from dlopt.data.kinds.number import KNOTS, Frequent, GroupMedian
from dlopt.data.section import Data
from dlopt.data.sources import Parquet
from dlopt.data.stats import begin
from dlopt.data.table.split import GivenSplit, TimeSplit
from dlopt.data.types.columns import Columns
from dlopt.data.types.tensors import array_of, piece_column
from dlopt.models.preprocess import Preprocess
from dlopt.part import DloptError, Feature, Signature, Statistics, Target
from tests.arranged import section_of

RANDOM = np.random.default_rng(6)
COLUMNS = ("plain", "skewed", "few", "constant", "far")
CATEGORY = CategoryInput(columns=("group",), name="groups")


def numbers_of(rows: int) -> pa.Table:
    """Columns of several kinds, a fifth of them missing, and a group for each row."""
    kinds = {
        "plain": RANDOM.normal(3, 2, rows),
        "skewed": RANDOM.exponential(100, rows) - 5,
        "few": RANDOM.choice([-2.0, 0.0, 1.0, 7.5], rows, p=[0.1, 0.3, 0.35, 0.25]),
        "constant": np.full(rows, 0.1),
        "far": RANDOM.normal(1e5, 1, rows),
    }
    columns = {name: pa.array(values.astype(np.float32), mask=RANDOM.random(rows) < 0.2) for name, values in kinds.items()}
    groups = RANDOM.choice(["a", "b", "c", "d"], rows, p=[0.5, 0.3, 0.19, 0.01])
    return pa.table(columns | {"group": pa.array(groups, mask=RANDOM.random(rows) < 0.1)})


TRAIN, OTHERS = numbers_of(1500), numbers_of(400)


def read(part: Any, raw: pa.Table) -> tuple[pa.Table, Feature, dict[int, str]]:
    """Columns on their way through prepare, and the reasons for bad rows, which are still among them."""
    feature = part.feature(raw)
    columns, reasons = part.read(raw, feature)
    return pa.table(columns), feature, reasons


def fit(*parts: Any, raw: pa.Table, pieces: int = 1, bounds: Mapping[str, Bound] = {}) -> tuple[Signature, dict[str, Statistics]]:
    """What prepare makes of training rows that it observes in so many pieces."""
    features = {part.tensor: part.feature(raw) for part in parts}
    columns = [part.read(raw, features[part.tensor])[0] for part in parts]
    table = pa.table({name: column for found in columns for name, column in found.items()})
    fitted: dict[str, Feature] = {}
    statistics = {}
    for part in sorted(parts, key=lambda part: part.kind != "category"):
        feature = features[part.tensor]
        seen = reduce(lambda mine, yours: mine.merge(yours), (part.observe(piece, feature, bounds) for piece in cut(table, pieces)))
        more = (bounds,) if part.kind == "number" else ()
        fitted[feature.name], found = part.fit(seen, feature, fitted, *more)
        if found is not None:
            statistics[feature.name] = found
    return Signature(inputs=tuple(fitted[part.tensor] for part in parts), target=Target(name="label", labels=(0, 1))), statistics


def cut(table: pa.Table, pieces: int) -> list[pa.Table]:
    """Pieces of different sizes."""
    edges = (np.linspace(0, 1, pieces + 1) ** 2 * len(table)).astype(int)
    return [table.slice(start, stop - start) for start, stop in itertools.pairwise(edges)]


def finished(signature: Signature, parts: tuple[Any, ...], raw: pa.Table) -> dict[str, np.ndarray]:
    """The rows as training reads them."""
    found = {}
    for part, feature in zip(parts, signature.inputs, strict=True):
        columns, reasons = part.read(raw, feature)
        assert reasons == {}
        found[feature.name] = part.finish(pa.table(columns), feature)
    return found


class Alone(torch.nn.Module):
    """Preprocessing as a graph of its own."""

    def __init__(self, signature: Signature, statistics: dict[str, Statistics], dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.names = [feature.name for feature in signature.inputs]
        self.layer = Preprocess(signature, statistics).to(dtype)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.layer(dict(zip(self.names, inputs, strict=True)))[self.names[0]]


def in_torch(
    signature: Signature, statistics: dict[str, Statistics], rows: dict[str, np.ndarray], dtype: Any = torch.float64
) -> np.ndarray:
    """The first input after preprocessing."""
    return Alone(signature, statistics, dtype)(*(torch.from_numpy(rows[feature.name].copy()) for feature in signature.inputs)).numpy()


def in_onnx(signature: Signature, statistics: dict[str, Statistics], rows: dict[str, np.ndarray]) -> np.ndarray:
    """The same, from the exported graph, made with few rows and run on all."""
    content, names = io.BytesIO(), [feature.name for feature in signature.inputs]
    few = tuple(torch.from_numpy(rows[name][:3].copy()) for name in names)
    axes = {name: {0: "rows"} for name in [*names, "output"]}
    graph = Alone(signature, statistics, torch.float32)
    torch.onnx.export(graph, few, content, input_names=names, output_names=["output"], dynamic_axes=axes, dynamo=False, opset_version=18)
    session = onnxruntime.InferenceSession(content.getvalue(), providers=["CPUExecutionProvider"])
    taken = {one.name for one in session.get_inputs()}
    return session.run(None, {name: values for name, values in rows.items() if name in taken})[0]


def matrix(raw: pa.Table, columns: tuple[str, ...] = COLUMNS) -> np.ndarray:
    """float64 (rows, columns), NaN where missing."""
    return np.stack([raw[name].to_numpy().astype(np.float64) for name in columns], axis=1)


def filled(train: np.ndarray, values: np.ndarray, fill: Any) -> np.ndarray:
    """By scikit-learn."""
    strategy = {"strategy": fill} if fill in ("mean", "median", "most_frequent") else {"strategy": "constant"}
    constant = {} if fill in ("mean", "median", "most_frequent") else {"fill_value": 0.0 if fill == "zero" else fill}
    return SimpleImputer(**strategy, **constant).fit(train).transform(values)


def scaled(train: np.ndarray, values: np.ndarray, normalize: str) -> np.ndarray:
    """By scikit-learn; a constant column is 0 in the middle of [-1, 1]; a place among quantiles is the last one where several are equal."""
    if normalize == "log":
        return StandardScaler().fit(signed_log(train)).transform(signed_log(values))
    if normalize == "quantile":
        return np.stack([places(train[:, column], values[:, column]) for column in range(train.shape[1])], axis=1)
    scaler = {
        "min_max": MinMaxScaler(),
        "symmetric": MinMaxScaler((-1, 1)),
        "standard": StandardScaler(),
        "robust": RobustScaler(),
        "max_abs": MaxAbsScaler(),
        "none": FunctionTransformer(),
    }[normalize]
    found = scaler.fit(train).transform(values)
    constant = np.nanmin(train, axis=0) == np.nanmax(train, axis=0)
    return found + constant if normalize == "symmetric" else found


def signed_log(values: np.ndarray) -> np.ndarray:
    return np.sign(values) * np.log1p(np.abs(values))


def places(train: np.ndarray, values: np.ndarray) -> np.ndarray:
    knots = np.nanquantile(train, np.linspace(0, 1, KNOTS + 1))
    below = np.searchsorted(knots, values, side="right") - 1
    inside = below.clip(0, KNOTS - 1)
    gap = knots[inside + 1] - knots[inside]
    within = np.where(gap > 0, (values - knots[inside]) / np.where(gap > 0, gap, 1), 1.0)
    return np.where(below < 0, 0.0, np.where(below >= KNOTS, 1.0, (inside + within) / KNOTS))


NORMALIZATIONS = ["min_max", "symmetric", "standard", "robust", "max_abs", "log", "quantile", "none"]
FILLS: list[Any] = ["mean", "median", "most_frequent", "zero", -12.5]


@pytest.mark.parametrize("pieces", [1, 6])
def test_statistics_of_numbers_are_numpys(pieces: int) -> None:
    _, statistics = fit(NumberInput(columns=COLUMNS), raw=TRAIN, pieces=pieces)
    found, train = statistics["numbers"], matrix(TRAIN)
    assert found.count == 1500 and found.missing == tuple(np.isnan(train).sum(axis=0).tolist())
    for name, expected in (("min", np.nanmin), ("max", np.nanmax), ("mean", np.nanmean), ("std", np.nanstd)):
        assert np.allclose(getattr(found, name), expected(train, axis=0), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("pieces", [1, 6])
@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_the_model_fills_and_scales_numbers_as_scikit_learn_does(normalize: Any, fill: Any, pieces: int) -> None:
    part = NumberInput(columns=COLUMNS, fill=fill, normalize=normalize)
    signature, statistics = fit(part, raw=TRAIN, pieces=pieces)
    for raw in (TRAIN, OTHERS):
        rows = finished(signature, (part,), raw)
        expected = scaled(matrix(TRAIN), filled(matrix(TRAIN), matrix(raw), fill), normalize)
        assert np.allclose(in_torch(signature, statistics, rows), expected, rtol=1e-6, atol=2e-6)
        near = [0, 1, 2, 3]  # a float32 is too coarse for a spread of 1 around 100,000
        assert np.allclose(in_torch(signature, statistics, rows, torch.float32)[:, near], expected[:, near], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(("normalize", "fill"), list(zip(NORMALIZATIONS, [*FILLS, "mean", "median", "mean"], strict=True)))
@pytest.mark.parametrize("clip", [None, 0.75])
def test_the_exported_graph_preprocesses_numbers_as_torch_does(normalize: Any, fill: Any, clip: float | None) -> None:
    bounds = {"skewed": Bound(lower=0, upper=150, action="cap"), "few": Bound(lower=-1, upper=5, action="cap")}
    part = NumberInput(columns=COLUMNS, fill=fill, normalize=normalize, clip=clip, indicators=clip is not None)
    signature, statistics = fit(part, raw=TRAIN, bounds=bounds)
    rows = finished(signature, (part,), OTHERS)
    found, expected = in_onnx(signature, statistics, rows), in_torch(signature, statistics, rows, torch.float32)
    assert found.shape == expected.shape == (400, Preprocess.width(signature.inputs[0]))
    same = np.arange(found.shape[1]) != 4 if normalize == "log" else slice(None)  # a last bit of log(100,000) is a tenth of their spread
    assert np.allclose(found[:, same], expected[:, same], rtol=1e-6, atol=1e-6)


def test_quantiles_of_continuous_columns_are_scikit_learns() -> None:
    part = NumberInput(columns=("plain", "skewed"), normalize="quantile", fill="median")
    signature, statistics = fit(part, raw=TRAIN, pieces=3)
    train, values = matrix(TRAIN, part.columns), filled(matrix(TRAIN, part.columns), matrix(OTHERS, part.columns), "median")
    expected = QuantileTransformer(n_quantiles=KNOTS + 1, subsample=None).fit(train).transform(values)
    found = in_torch(signature, statistics, finished(signature, (part,), OTHERS))
    assert found.min() >= 0 and found.max() <= 1 and np.allclose(found, expected, atol=1e-6)


def test_missing_values_are_shown_by_indicators() -> None:
    part = NumberInput(columns=COLUMNS, indicators=True)
    signature, statistics = fit(part, raw=TRAIN)
    rows = finished(signature, (part,), OTHERS)
    found = in_torch(signature, statistics, rows)
    without = Signature(inputs=(signature.inputs[0].model_copy(update={"indicators": False}),), target=signature.target)
    assert (found[:, 5:] == np.isnan(matrix(OTHERS))).all()
    assert (found[:, :5] == in_torch(without, statistics, rows)).all()


def test_scaled_values_are_clipped_on_both_sides() -> None:
    part = NumberInput(columns=COLUMNS, clip=0.5)
    signature, statistics = fit(part, raw=TRAIN)
    expected = scaled(matrix(TRAIN), filled(matrix(TRAIN), matrix(OTHERS), "mean"), "standard").clip(-0.5, 0.5)
    found = in_torch(signature, statistics, finished(signature, (part,), OTHERS))
    assert np.allclose(found, expected, atol=1e-6) and found.min() == -0.5 and found.max() == 0.5


@pytest.mark.parametrize("action", ["cap", "missing"])
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_outliers_are_capped_or_missing_in_the_statistics_and_in_the_model(normalize: Any, action: Any) -> None:
    bounds = {"plain": Bound(lower=0, upper=5, action=action), "far": Bound(lower=1e5 - 1, upper=1e5 + 1, action=action)}
    part = NumberInput(columns=COLUMNS, fill="median", normalize=normalize, indicators=True)
    signature, statistics = fit(part, raw=TRAIN, pieces=4, bounds=bounds)

    def bounded(values: np.ndarray) -> np.ndarray:
        values = values.copy()
        for place, bound in ((0, bounds["plain"]), (4, bounds["far"])):
            column = values[:, place]
            outside = (column < bound.lower) | (column > bound.upper)
            values[:, place] = column.clip(bound.lower, bound.upper) if action == "cap" else np.where(outside, np.nan, column)
        return values

    train, values = bounded(matrix(TRAIN)), bounded(matrix(OTHERS))
    expected = scaled(train, filled(train, values, "median"), normalize)
    rows = finished(signature, (part,), OTHERS)
    found = in_torch(signature, statistics, rows)
    assert np.array_equal(rows["numbers"], matrix(OTHERS).astype(np.float32), equal_nan=True)  # on disk they are as they were
    assert np.allclose(found[:, :5], expected, rtol=1e-6, atol=2e-6)
    assert (found[:, 5:] == np.isnan(values)).all() and np.isnan(values).sum() >= np.isnan(matrix(OTHERS)).sum()
    assert statistics["numbers"].missing == tuple(np.isnan(train).sum(axis=0).tolist())
    assert np.allclose(statistics["numbers"].std, np.nanstd(train, axis=0), rtol=1e-9)


def test_bounds_of_rows_that_are_dropped_are_not_for_the_model() -> None:
    _, statistics = fit(NumberInput(columns=COLUMNS), raw=TRAIN, bounds={"plain": Bound(lower=0, upper=1, action="drop")})
    assert statistics["numbers"].lower == () and statistics["numbers"].max[0] > 1


@pytest.mark.parametrize("pieces", [1, 7])
@pytest.mark.parametrize("options", [{}, {"fill": "most_frequent"}, {"min_count": 50}])
def test_missing_numbers_become_the_median_of_their_group(options: dict[str, Any], pieces: int) -> None:
    category = CATEGORY.model_copy(update=options)
    parts = (NumberInput(columns=COLUMNS, fill=GroupMedian(by="group"), normalize="none"), category)
    signature, statistics = fit(*parts, raw=TRAIN, pieces=pieces)
    rows = finished(signature, parts, OTHERS)
    train, values = matrix(TRAIN), matrix(OTHERS)
    groups, own = TRAIN["group"].to_pylist(), OTHERS["group"].to_pylist()
    known = {group for group, rows in Counter(groups).items() if rows >= options.get("min_count", 1)}
    for row, group in enumerate(own):
        if group is None and options.get("fill") == "most_frequent":
            group = "a"
        mine = train[[other == group for other in groups]] if group in known else train
        expected = np.where(np.isnan(values[row]), np.nanmedian(mine, axis=0), values[row])
        assert np.allclose(in_torch_row(signature, statistics, rows, row), expected, rtol=1e-9), (row, group)
    found = in_onnx(signature, statistics, rows)
    assert np.allclose(found, in_torch(signature, statistics, rows, torch.float32), rtol=1e-6)


def in_torch_row(signature: Signature, statistics: dict[str, Statistics], rows: dict[str, np.ndarray], row: int) -> np.ndarray:
    return in_torch(signature, statistics, {name: values[row : row + 1] for name, values in rows.items()})[0]


def test_a_group_without_any_value_is_filled_as_all_rows_are() -> None:
    raw = pa.table({"x": [1.0, 2.0, 9.0, None, None], "group": ["a", "a", "a", "b", "b"]})
    parts = (NumberInput(columns=("x",), fill=GroupMedian(by="group"), normalize="none"), CATEGORY)
    signature, statistics = fit(*parts, raw=raw)
    assert in_torch(signature, statistics, finished(signature, parts, raw))[:, 0].tolist() == [1.0, 2.0, 9.0, 2.0, 2.0]


def test_a_column_without_a_value_is_zero() -> None:
    raw = pa.table({"x": pa.array([None, None], pa.float64())})
    for normalize in NORMALIZATIONS:
        for fill in ("mean", "median", "most_frequent", "zero"):
            part = NumberInput(columns=("x",), fill=fill, normalize=normalize)  # type: ignore[arg-type]
            signature, statistics = fit(part, raw=raw)
            found = in_torch(signature, statistics, finished(signature, (part,), raw))[:, 0]
            assert np.isfinite(found).all() and (normalize == "quantile" or found.tolist() == [0.0, 0.0])


def test_numbers_have_one_zero_and_one_way_of_being_missing() -> None:
    odd = np.array([0.0, -0.0, np.nan, -np.nan, 1.0])
    table, _feature, _ = read(NumberInput(columns=("x",)), pa.table({"x": odd}))
    words = array_of(table["numbers"], "float32", (1,))[:, 0].view(np.uint32).tolist()
    assert words[0] == words[1] == 0 and words[2] == words[3] and np.isnan(odd[3])


# Categories


def columns_of_categories(rows: int) -> pa.Table:
    names = np.array(["x", "y", "z", "ü ", "x y", "q", "r"])
    return pa.table(
        {
            "name": pa.array(names[(RANDOM.random(rows) ** 2 * 7).astype(int)], mask=RANDOM.random(rows) < 0.1),
            "code": pa.array((RANDOM.random(rows) ** 3 * 50).astype(int), mask=RANDOM.random(rows) < 0.3),
        }
    )


CATEGORIES, MORE = columns_of_categories(800), columns_of_categories(300)


def texts_of(raw: pa.Table, column: str) -> list[str]:
    return ["" if value is None else str(value) for value in raw[column].to_pylist()]


@pytest.mark.parametrize("pieces", [1, 5])
@pytest.mark.parametrize("options", [{}, {"min_count": 9}, {"max_values": 4}, {"min_count": 5, "max_values": 12, "fill": "most_frequent"}])
def test_vocabularies_have_the_most_frequent_value_first(options: dict[str, Any], pieces: int) -> None:
    part = CategoryInput(columns=("name", "code"), **options)
    signature, statistics = fit(part, raw=CATEGORIES, pieces=pieces)
    feature, codes = signature.inputs[0], finished(signature, (part,), MORE)["categories"]
    assert statistics == {} and feature.dtype == "string"
    for place, column in enumerate(part.columns):
        counts = Counter(texts_of(CATEGORIES, column))
        if part.fill == "most_frequent":
            del counts[""]
        ranked = sorted((value for value in counts if counts[value] >= part.min_count), key=lambda value: (-counts[value], value))
        known = ranked[: part.max_values]
        assert feature.vocabularies[place] == tuple(known) and feature.codes[place] == len(known) + 1
        expected = [known.index(value) + 1 if value in known else 0 for value in texts_of(MORE, column)]
        if part.fill == "most_frequent":
            expected = [1 if value == "" else code for value, code in zip(texts_of(MORE, column), expected, strict=True)]
        assert codes[:, place].tolist() == expected and codes.dtype == np.int32


def test_a_missing_category_is_one_of_its_own_or_unknown_where_training_has_none() -> None:
    part = CategoryInput(columns=("a", "b"))
    raw = pa.table({"a": ["x", None, "x", ""], "b": ["x", "y", "x", "y"]})
    signature, _ = fit(part, raw=raw)
    assert signature.inputs[0].vocabularies == (("", "x"), ("x", "y"))  # as frequent, so by the alphabet
    assert signature.inputs[0].missing == (1, 0)
    other = pa.table({"a": [None, "x", "new"], "b": [None, "x", "new"]})
    assert finished(signature, (part,), other)["categories"].tolist() == [[1, 0], [2, 1], [0, 0]]


def test_hashed_categories_keep_no_vocabulary() -> None:
    part = CategoryInput(columns=("name", "code"), hash_buckets=11)
    signature, _ = fit(part, raw=CATEGORIES)
    feature, codes = signature.inputs[0], finished(signature, (part,), MORE)["categories"]
    assert (feature.dtype, feature.vocabularies, feature.codes) == ("int32", (), (11, 11))
    assert codes.min() >= 0 and codes.max() < 11 and len(set(codes[:, 1].tolist())) > 8
    by_value: dict[str, set[int]] = {}
    for value, code in zip(texts_of(MORE, "code"), codes[:, 1].tolist(), strict=True):
        by_value.setdefault(value, set()).add(code)
    assert all(len(found) == 1 for found in by_value.values())
    assert hashed(pa.array(["UA", "", "ü"]), 1000).tolist() == [803, 756, 525]  # the same on every machine


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (["7", "07", " x", "", None, "NA"], ["7", "07", " x", "", "", "NA"]),
        (pa.array([7, -1, None], pa.int8()), ["7", "-1", ""]),
        (pa.array([2**64 - 1], pa.uint64()), [str(2**64 - 1)]),
        ([7.0, 0.5, None, float("nan"), -0.0, 1e20], ["7", "0.5", "", "", "0", str(10**20)]),
        ([True, False, None], ["true", "false", ""]),
        ([Decimal("7.00"), Decimal("7.50"), Decimal("700"), None], ["7", "7.5", "700", ""]),
        (pa.array(["b", None, "a", "b"]).dictionary_encode(), ["b", "", "a", "b"]),
        (pa.array([3, None, 3]).dictionary_encode(), ["3", "", "3"]),
        ([date(2026, 11, 24), None], ["2026-11-24", ""]),
        (pa.array(["x", None], pa.large_string()), ["x", ""]),
        (pa.nulls(2), ["", ""]),
        (pa.chunked_array([["a"], [], ["b", None]]), ["a", "b", ""]),
    ],
)
def test_categories_of_any_type_are_texts(column: Any, expected: list[str]) -> None:
    table, feature, reasons = read(CategoryInput(columns=("c",)), pa.table({"c": column}))
    assert table[piece_column("categories", "c")].to_pylist() == expected and reasons == {}
    sliced = pa.table({"c": column}).slice(1)
    assert CategoryInput(columns=("c",)).read(sliced, feature)[0][piece_column("categories", "c")].to_pylist() == expected[1:]


# Dates


PARTS = ("year", "quarter", "month", "week", "day", "day_of_year", "weekday", "hour", "minute", "second", "days")


def parts_of(moment: datetime | None) -> list[float]:
    """By Python's datetime."""
    if moment is None:
        return [math.nan] * len(PARTS)
    days = (moment - datetime(1970, 1, 1)) / timedelta(days=1)
    found = [moment.year, (moment.month + 2) // 3, moment.month, moment.isocalendar().week, moment.day, moment.timetuple().tm_yday]
    return [*found, moment.weekday(), moment.hour, moment.minute, moment.second, days]


MOMENTS: list[datetime | None] = [
    None if row % 7 == 0 else datetime(1950, 1, 1) + timedelta(seconds=int(second))
    for row, second in enumerate(RANDOM.integers(0, 140 * 365 * 86400, 300))
]
DAYS = [None if moment is None else moment.date() for moment in MOMENTS]


def dates_of(column: Any, **options: Any) -> tuple[np.ndarray, dict[int, str]]:
    part = DateInput(columns=("d",), **({"parts": PARTS} | options))
    table, feature, reasons = read(part, Columns().canonical(pa.table({"d": column})))
    return part.finish(table, feature), reasons


@pytest.mark.parametrize(
    "column",
    [
        *(pa.array(MOMENTS, pa.timestamp(unit)) for unit in ("s", "ms", "us", "ns")),
        [None if moment is None else moment.isoformat() for moment in MOMENTS],
        [None if moment is None else moment.isoformat(sep=" ") + ("Z" if row % 2 else "") for row, moment in enumerate(MOMENTS)],
        pa.array(["NA" if moment is None else moment.isoformat() for moment in MOMENTS]).dictionary_encode(),
        [
            None if moment is None else moment.replace(tzinfo=UTC).astimezone(timezone(timedelta(hours=-5))).isoformat()
            for moment in MOMENTS
        ],
        pa.array([None if moment is None else moment.replace(tzinfo=UTC) for moment in MOMENTS], pa.timestamp("us", "America/New_York")),
    ],
)
def test_parts_of_times_are_pythons(column: Any) -> None:
    values, reasons = dates_of(column)
    assert reasons == {} and values.dtype == np.float32
    assert np.array_equal(values, np.array([parts_of(moment) for moment in MOMENTS], np.float32), equal_nan=True)


@pytest.mark.parametrize(
    ("column", "options"),
    [
        (pa.array(DAYS, pa.date32()), {}),
        (pa.array(DAYS, pa.date64()), {}),
        ([None if day is None else day.isoformat() for day in DAYS], {}),
        (["" if day is None else day.strftime("%d.%m.%Y") for day in DAYS], {"form": "%d.%m.%Y"}),
        (["null" if day is None else day.strftime("%A, %d %B %Y") for day in DAYS], {"form": "%A, %d %B %Y"}),
    ],
)
def test_parts_of_days_are_pythons(column: Any, options: dict[str, Any]) -> None:
    values, reasons = dates_of(column, **options)
    midnight = [None if day is None else datetime(day.year, day.month, day.day) for day in DAYS]
    assert reasons == {}
    assert np.array_equal(values, np.array([parts_of(moment) for moment in midnight], np.float32), equal_nan=True)


TIMES = [time(8, 30), time(23, 59, 59, 123456), None, time(0, 0, 7)]


@pytest.mark.parametrize(
    "column",
    [
        ["08:30", "23:59:59.123456789", "", "00:00:07"],
        *(pa.array(TIMES, pa.time64(unit)) for unit in ("us", "ns")),
        *(pa.array([one and one.replace(microsecond=0) for one in TIMES], pa.time32(unit)) for unit in ("s", "ms")),
    ],
)
def test_parts_of_times_of_day_are_pythons(column: Any) -> None:
    """In training and in requests; without parts being named, hours and minutes."""
    table = Columns().canonical(pa.table({"d": column}))
    part = DateInput(columns=("d",), parts=("hour", "minute", "second"))
    rows, feature, reasons = read(part, table)
    expected = np.array([[np.nan] * 3 if one is None else [one.hour, one.minute, one.second] for one in TIMES], np.float32)
    assert reasons == {} and np.array_equal(part.finish(rows, feature), expected, equal_nan=True)
    assert DateInput(columns=("d",)).feature(table).parts == ("hour", "minute")
    sent = [value.isoformat() if isinstance(value, time) else value for value in table["d"].to_pylist()]
    for given in (sent, table["d"].to_pylist()):
        assert np.array_equal(DateInput.encode(feature, {"d": given}), expected, equal_nan=True)


def test_what_is_no_time_of_day_among_such_is_said() -> None:
    times = ["08:30"] * 3
    _, feature, reasons = read(DateInput(columns=("d",)), pa.table({"d": times}))
    assert reasons == {}
    assert DateInput(columns=("d",)).read(pa.table({"d": ["24:00", "2026-11-24", "7:05"]}), feature)[1] == {
        row: f"d: {text!r} is not a time such as 08:30 or 08:30:00" for row, text in enumerate(["24:00", "2026-11-24", "7:05"])
    }
    with pytest.raises(DloptError, match="'d' holds times of day, which have no year: parts may be hour, minute, second"):
        DateInput(columns=("d",), parts=("year", "hour")).feature(pa.table({"d": times}))
    with pytest.raises(DloptError, match="'d' holds times of day and 'e' dates: make two inputs of them"):
        DateInput(columns=("d", "e")).feature(pa.table({"d": times, "e": ["2026-11-24"] * 3}))


def test_a_job_that_is_begun_has_times_of_day_in_an_input_of_their_own(tmp_path: Path) -> None:
    days = [date(2026, 1, 1) + timedelta(days=row) for row in range(60)]
    pq.write_table(
        pa.table({"at": pa.array(TIMES * 15, pa.time64("us")), "day": days, "y": ["a", "b", "b"] * 20}), tmp_path / "rows.parquet"
    )
    begun = begin.begin(Parquet(path=str(tmp_path / "rows.parquet")), ["y"])
    assert begun.job["data"]["inputs"] == [{"kind": "date", "columns": ["day"]}, {"kind": "date", "columns": ["at"], "name": "times"}]


def test_a_form_with_a_zone_becomes_utc() -> None:
    values, reasons = dates_of(["24.11.2026 08:30 +0200", "1.3.2026 00:30 +0100"], form="%d.%m.%Y %H:%M %z", parts=("month", "day", "hour"))
    assert reasons == {} and values.tolist() == [[11, 24, 6], [2, 28, 23]]


@pytest.mark.parametrize("wrong", ["soon", "24.11.2026", "2026-13-01", "2026-02-30", "2026-11-24T25:00:00", "7"])
def test_what_is_no_date_sets_its_row_aside(wrong: str) -> None:
    values, reasons = dates_of(["2026-11-24", wrong, None, "2026-11-25", wrong], parts=("day",))
    why = f"d: {wrong!r} is not a date such as 2026-11-24 or 2026-11-24T08:30:00Z"
    assert reasons == {1: why, 4: why}
    assert values[[0, 3], 0].tolist() == [24, 25] and np.isnan(values[2, 0])


@pytest.mark.parametrize("wrong", ["2026-11-24", "31.2.2026", "29.2.2026", "31.04.2026", "0.1.2026", "1.13.2026", "1.1.2026 x"])
def test_what_is_no_date_of_the_form_sets_its_row_aside(wrong: str) -> None:
    values, reasons = dates_of(["1.3.2026", wrong, "29.2.2024", "03.05.2026", wrong], form="%d.%m.%Y", parts=("day", "month"))
    why = f"d: {wrong!r} is not a date such as %d.%m.%Y"
    assert reasons == {1: why, 4: why}
    assert values[[0, 2, 3]].tolist() == [[1, 3], [29, 2], [3, 5]]


def test_numbers_are_no_dates() -> None:
    assert dates_of([20261124, None])[1] == {0: "d: int64 is not a date"}


@pytest.mark.parametrize("form", ["%Q", "%d.%m.%E"])
def test_a_form_that_says_nothing_is_refused(form: str) -> None:
    for make in (lambda: DateInput(columns=("d",), form=form), lambda: TimeSplit(column="d", form=form)):
        with pytest.raises(DloptError, match="form"):
            make()


@pytest.mark.parametrize("pieces", [1, 4])
@pytest.mark.parametrize("normalize", ["min_max", "symmetric", "standard", "max_abs", "none"])
def test_the_model_scales_parts_of_dates_by_the_training_rows(normalize: Any, pieces: int) -> None:
    part = DateInput(columns=("d", "e"), parts=("year", "month", "days"), normalize=normalize)
    raw = pa.table({"d": pa.array(MOMENTS), "e": pa.array(MOMENTS[::-1])})
    signature, statistics = fit(part, raw=raw, pieces=pieces)
    rows = finished(signature, (part,), raw)
    values = rows["dates"].astype(np.float64)
    assert values.shape == (300, 6) and signature.inputs[0].shape == (6,) and np.isnan(values).any()
    found = in_torch(signature, statistics, rows)
    assert np.allclose(found, scaled(values, filled(values, values, "mean"), normalize), rtol=1e-6, atol=1e-6)
    assert np.allclose(in_onnx(signature, statistics, rows), found, rtol=1e-5, atol=1e-5)


# Texts


@pytest.mark.parametrize("tokenizer", ["word", "bpe", "char"])
def test_texts_have_the_ids_of_a_tokenizer_of_the_training_rows(tokenizer: Any) -> None:
    words = np.array(["free", "call", "now", "Meet", "me", "at", "nine", "prize!", "naïve", "U2"])
    titles = [" ".join(RANDOM.choice(words, RANDOM.integers(0, 9))) if row % 9 else None for row in range(200)]
    raw = pa.table({"title": titles, "body": titles[::-1]})
    part = TextInput(columns=("title", "body"), tokenizer=tokenizer, vocab_size=300, max_length=12)
    table, feature, reasons = read(part, raw)
    learned = part.learn(iter(cut(table, 5)), feature)
    assert reasons == {} and part.learn(iter(cut(table.take(pa.array(np.arange(200)[::-1])), 2)), feature) == learned
    ids = part.finish(table, learned)
    assert (ids.shape, ids.dtype) == ((200, 12), np.int32) and learned.shape == (12,)
    assert ids.max() < learned.tokens and ids.min() == 0 and (ids != 1).all()
    assert learned.tokens > 2 and feature.tokens == 2
    served = encode_rows(Signature(inputs=(learned,), target=Target(name="y", labels=(0, 1))), raw.to_pylist())["text"]
    assert (served == ids).all()
    assert (ids == 0).sum() > 0 and ((np.diff((ids == 0).astype(int), axis=1)) >= 0).all()  # padding at the end only


def test_texts_of_any_type_are_texts() -> None:
    table, _, _ = read(TextInput(column="t"), pa.table({"t": pa.array(["a", None, "a"]).dictionary_encode()}))
    assert table["text"].to_pylist() == ["a", "", "a"]


# Images


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("normalize", ["min_max", "symmetric", "standard", "max_abs", "none"])
def test_the_model_scales_pixels_by_the_training_rows(normalize: Any, channels: int) -> None:
    pixels = RANDOM.integers(0, 200, (40, 6, 5, channels), dtype=np.uint8)
    pixels[..., 0] //= 3
    encoded = []
    for one in pixels:
        content = io.BytesIO()
        Image.fromarray(one[..., 0] if channels == 1 else one).save(content, "PNG")
        encoded.append(content.getvalue())
    part, raw = ImageInput(normalize=normalize), pa.table({"image": encoded})
    signature, statistics = fit(part, raw=raw, pieces=3)
    rows = finished(signature, (part,), raw)
    assert (rows["image"] == pixels).all()
    expected = scaled(pixels.reshape(-1, channels).astype(np.float64), pixels.reshape(-1, channels).astype(np.float64), normalize)
    expected = expected.reshape(pixels.shape).transpose(0, 3, 1, 2)
    assert np.allclose(in_torch(signature, statistics, rows), expected, atol=1e-9)
    assert np.allclose(in_onnx(signature, statistics, rows), expected, rtol=1e-5, atol=1e-6)


# Targets


def target_of(part: Any, raw: pa.Table) -> tuple[Target, np.ndarray, dict[int, str]]:
    """The target and what training reads of the good rows."""
    values, reasons = part.read(raw, part.whole(raw))
    good = values.filter(pa.array([row not in reasons for row in range(len(raw))]))
    target = part.target(part.count(good))
    return target, part.finish(good, target), reasons


@pytest.mark.parametrize(
    ("column", "labels", "expected", "wrong"),
    [
        ([3, 1, None, 3], (1, 3), [1, 0, 1], {2: "y: no label"}),
        (["b", "a", "", "b", "a"], ("a", "b"), [1, 0, 1, 0], {2: "y: no label"}),
        ([True, False, True], (0, 1), [1, 0, 1], {}),
        ([2.0, 1.0, 1.5, float("nan")], (1, 2), [1, 0], {2: "y: 1.5 is not a whole number", 3: "y: no label"}),
        (pa.array(["no", None, "yes"]).dictionary_encode(), ("no", "yes"), [0, 1], {1: "y: no label"}),
        ([-5, 10, 2], (-5, 2, 10), [0, 2, 1], {}),
    ],
)
def test_classes_are_sorted_and_rows_have_their_index(column: Any, labels: Any, expected: list[int], wrong: dict[int, str]) -> None:
    target, values, reasons = target_of(CategoryTarget(column="y"), pa.table({"y": column}))
    assert target.labels == labels and values.tolist() == expected and values.dtype == np.int64 and reasons == wrong
    assert target.positive == (labels[1] if len(labels) == 2 else None)


def test_the_positive_class_is_the_one_that_is_named() -> None:
    raw = pa.table({"y": ["spam", "ham"]})
    assert target_of(CategoryTarget(column="y", positive="ham"), raw)[0].positive == "ham"
    assert target_of(CategoryTarget(column="y", positive="0"), pa.table({"y": [0, 1]}))[0].positive == 0
    with pytest.raises(DloptError, match=r"data\.target\.positive: 'egg' must be one of two classes; there are 'ham', 'spam'"):
        target_of(CategoryTarget(column="y", positive="egg"), raw)
    with pytest.raises(DloptError, match="must be one of two classes"):
        target_of(CategoryTarget(column="y", positive="ham"), pa.table({"y": ["spam", "ham", "egg"]}))


def test_one_class_only_and_too_many_are_refused() -> None:
    with pytest.raises(DloptError, match=r"data\.target: column 'y' has one class only \('a'\): there is nothing to learn"):
        target_of(CategoryTarget(column="y"), pa.table({"y": ["a", "a"]}))
    with pytest.raises(DloptError, match=r"'y' has 100,001 different labels: for numbers use \{kind: number\}"):
        target_of(CategoryTarget(column="y"), pa.table({"y": np.arange(100_001)}))


def test_a_threshold_makes_two_classes_of_numbers() -> None:
    raw = pa.table({"delay": [14.0, 15.0, 15.1, None, -3.0, float("nan")]})
    target, values, reasons = target_of(ThresholdTarget(column="delay", above=15), raw)
    assert (target.labels, target.positive, values.tolist()) == ((0, 1), 1, [0, 0, 1, 0])
    assert reasons == {3: "delay: no label", 5: "delay: no label"}
    texts = pa.table({"delay": ["16", "3", "late", "", "NA"]})
    _, values, reasons = target_of(ThresholdTarget(column="delay", above=15), Columns().canonical(texts))
    assert values.tolist() == [1, 0]
    assert reasons == {2: "delay: 'late' is not a number", 3: "delay: no label", 4: "delay: no label"}
    with pytest.raises(DloptError, match=r"data\.target\.above: all values of 'delay' are at most 100"):
        target_of(ThresholdTarget(column="delay", above=100), raw)


@pytest.mark.parametrize(
    "column",
    [
        [["sea", "art"], [], ["art"], None, ["law", "art", "art"]],
        ["sea,art", "", " art ", None, "law, art,,art"],
        pa.array(["sea,art", "", "art", None, "law,art"]).dictionary_encode(),
    ],
)
def test_lists_and_separated_texts_are_labels(column: Any) -> None:
    target, values, reasons = target_of(MultiLabelTarget(column="tags"), pa.table({"tags": column}))
    assert (target.name, target.kind, target.labels, target.shape) == ("labels", "multi_label", ("art", "law", "sea"), (3,))
    assert values.tolist() == [[1, 0, 1], [0, 0, 0], [1, 0, 0], [1, 1, 0]] and values.dtype == np.uint8
    assert reasons == {3: "tags: no labels"}


def test_another_separator_and_whole_numbers_are_labels() -> None:
    target, values, _ = target_of(MultiLabelTarget(column="tags", separator=";"), pa.table({"tags": ["a,b;c", "c"]}))
    assert target.labels == ("a,b", "c") and values.tolist() == [[1, 1], [0, 1]]
    target, values, _ = target_of(MultiLabelTarget(column="tags"), pa.table({"tags": [[10, 9], [10]]}))
    assert target.labels == ("10", "9") and values.tolist() == [[1, 1], [1, 0]]


def test_columns_of_flags_are_labels_and_count_the_rows_that_have_them() -> None:
    raw = pa.table({"sea": [1, 0, 0, 2, None], "art": [True, True, False, True, False], "law": ["0", "0", "1", "0", "x"]})
    part = MultiLabelTarget(columns=("sea", "art", "law"))
    target, values, reasons = target_of(part, raw)
    assert target.labels == ("art", "law", "sea") and values.tolist() == [[1, 0, 1], [1, 0, 0], [0, 1, 0]]
    assert reasons == {3: "sea: is neither 0 nor 1", 4: "sea: is neither 0 nor 1"}
    assert part.count(part.read(raw.slice(0, 3), False)[0]) == {"art": 2, "sea": 1, "law": 1}
    assert part.read(raw.slice(4).drop_columns(["sea"]).append_column("sea", [[0]]), False)[1] == {0: "law: 'x' is not a number"}


def test_one_of_two_forms_of_labels_is_chosen() -> None:
    for given in ({}, {"column": "a", "columns": ("b",)}):
        with pytest.raises(DloptError, match="name either `column`"):
            MultiLabelTarget(**given)


def test_numbers_are_predicted_in_their_units() -> None:
    raw = pa.table({"x": [1.5, None, 3.0, 4.0], "y": ["1", "2", "far", "1e39"]})
    target, values, reasons = target_of(NumberTarget(columns=("x", "y")), raw)
    assert (target.name, target.kind, target.columns, target.shape, values.tolist()) == ("target", "number", ("x", "y"), (2,), [[1.5, 1]])
    assert reasons == {1: "x: no value", 2: "y: 'far' is not a number", 3: "y: a number is too large"}
    single = NumberTarget(columns=("x",))
    target, values, _ = target_of(single, raw)
    assert target.name == "x" and values.tolist() == [[1.5], [3.0], [4.0]] and values.dtype == np.float32
    table = pa.table({"t": single.read(raw.take([0, 2, 3]), False)[0]})
    found = reduce(lambda mine, yours: mine.merge(yours), (single.observe(piece["t"], target) for piece in cut(table, 2)))
    assert np.allclose([found.mean[0], found.std[0]], [np.mean([1.5, 3, 4]), np.std([1.5, 3, 4])])


def test_the_most_frequent_number_of_a_long_column_takes_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dlopt.data.kinds.number.MOST_VALUES", 100)
    values = np.random.default_rng(3).permutation(np.concatenate([np.arange(3000.0), np.full(90, 7.25), np.full(90, -3.5)]))
    matrix = np.stack([values, np.full(len(values), np.nan)], axis=1).astype(np.float32)
    found = reduce(Frequent.merge, map(Frequent.of, np.array_split(matrix, 5)))
    assert found.first.tolist() == [-3.5, 0.0] and len(found.values[0]) == 100 and found.counts[0].max() == 90


# What a job says


@pytest.mark.parametrize(
    "section",
    [
        section_of(ImageInput(size=(3, 4)), target=MultiLabelTarget(column="tags")),
        section_of(
            NumberInput(columns=("a",), fill=3.5),
            CategoryInput(columns=("b",), hash_buckets=7),
            target=ThresholdTarget(column="c", above=1),
        ),
        section_of(NumberInput(columns=("a",)), clean=[Outliers(columns=("a",)), Unique(columns=("i",))]),
        section_of(
            NumberInput(columns=("a",), fill=GroupMedian(by="b")),
            CategoryInput(columns=("b",)),
            clean=[Outliers(columns=("a",), method="quantile", high=0.9)],
            target=MultiLabelTarget(columns=("c", "d")),
            split=GivenSplit(column="s", names={"a": "train", "b": "test"}),
        ),
        section_of(TextInput(column="t"), DateInput(columns=("d",)), target=NumberTarget(columns=("c",)), split=TimeSplit(column="d")),
    ],
)
def test_a_section_that_was_written_out_reads_the_same(section: Data) -> None:
    assert Data.model_validate(section.model_dump(mode="json")) == section
    assert Data.model_validate_json(section.model_dump_json()) == section


NUMBERS = {"kind": "number", "columns": ["a", "b"]}


def outliers(column: str, **options: Any) -> dict[str, Any]:
    return {"kind": "outliers", "columns": [column]} | options


@pytest.mark.parametrize(
    ("inputs", "clean", "said"),
    [
        ([NUMBERS | {"columns": ["a", "a"]}], [], "column 'a' is named twice"),
        ([NUMBERS, {"kind": "category", "columns": ["a"]}], [], "two of them are called 'a'"),
        ([NUMBERS | {"columns": ["label"]}], [], r"target.column 'label' is among the inputs: take it out"),
        ([NUMBERS | {"fill": {"kind": "group_median", "by": "c"}}], [], r"fill.by 'c' must be a column of a category input"),
        ([NUMBERS], [outliers("a"), outliers("b"), outliers("a", action="cap")], "outliers are looked for in 'a' twice"),
        ([NUMBERS], [outliers("a", action="missing"), outliers("b", action="cap")], "'numbers'"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(inputs: Any, clean: Any, said: str) -> None:
    with pytest.raises(DloptError, match=said):
        section_of(*inputs, clean=clean)


def test_hashed_categories_take_no_settings_of_a_vocabulary() -> None:
    with pytest.raises(DloptError, match="min_count needs a vocabulary, and hash_buckets keeps none"):
        CategoryInput(columns=("a",), hash_buckets=7, min_count=3)
