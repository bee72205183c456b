"""Statistics in parts against numpy on everything at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from dlopt.data import moments
from dlopt.data.inputs import ImageInput, NumberInput
from dlopt.data.prepared import feature_columns
from dlopt.part import Feature, Statistics

RANDOM = np.random.default_rng(2)


def statistics(part: ImageInput | NumberInput, feature: Feature, values: np.ndarray, parts: int) -> Statistics:
    found = [moments.of(feature, pa.table(feature_columns(feature, piece))) for piece in np.array_split(values, parts)]
    return moments.merge(found).statistics(part)


def number_statistics(values: np.ndarray, parts: int = 1, **options: Any) -> Statistics:
    names = tuple(f"c{index}" for index in range(values.shape[1]))
    feature = Feature(name="numbers", kind="number", dtype="float32", shape=(len(names),), columns=names)
    return statistics(NumberInput(columns=names, **options), feature, values.astype(np.float32), parts)


def image_statistics(values: np.ndarray, parts: int = 1, **options: Any) -> Statistics:
    feature = Feature(name="image", kind="image", dtype="uint8", shape=values.shape[1:], columns=("image",))
    return statistics(ImageInput(**options), feature, values, parts)


@pytest.mark.parametrize("parts", [1, 2, 7, 100])
def test_numbers_agree_with_numpy(parts: int) -> None:
    values = RANDOM.normal([0, 1e4, -3], [1, 0.5, 1e5], (1000, 3)).astype(np.float32)
    values[RANDOM.random((1000, 3)) < 0.2] = np.nan
    values[:200, 0] = np.nan  # whole parts without a value
    exact = values.astype(np.float64)
    found = number_statistics(values, parts)
    assert found.count == 1000 and found.missing == tuple(np.isnan(exact).sum(axis=0).tolist())
    for name, expected in (("min", np.nanmin), ("max", np.nanmax), ("mean", np.nanmean), ("std", np.nanstd)):
        assert np.allclose(getattr(found, name), expected(exact, axis=0), rtol=1e-9, atol=0)


@pytest.mark.parametrize("parts", [1, 2, 7, 100])
def test_pixels_agree_with_numpy(parts: int) -> None:
    values = RANDOM.integers(0, 256, (300, 6, 5, 3), dtype=np.uint8)
    values[..., 1] //= 16
    flat = values.reshape(-1, 3).astype(np.float64)
    found = image_statistics(values, parts)
    assert found.count == 300 * 30 and found.missing == (0, 0, 0)
    for name in ("min", "max", "mean", "std"):
        assert np.allclose(getattr(found, name), getattr(flat, name)(axis=0), rtol=1e-9, atol=0)


def test_preprocessing_follows_from_the_statistics() -> None:
    values = np.array([[1.0], [3.0], [np.nan], [8.0]])
    standard, scaled = number_statistics(values), number_statistics(values, normalize="min_max", fill="zero")
    assert (standard.fill[0], standard.shift[0], standard.scale[0]) == (4.0, 4.0, 1 / standard.std[0])
    assert (scaled.fill[0], scaled.shift[0], scaled.scale[0]) == (0.0, 1.0, 1 / 7)
    plain = number_statistics(values, normalize="none")
    assert (plain.shift[0], plain.scale[0]) == (0.0, 1.0)


@pytest.mark.parametrize("normalize", ["standard", "min_max"])
@pytest.mark.parametrize("rows", [7, 10, 999, 60_001])
def test_a_constant_column_is_divided_by_one_whatever_rounding_makes_of_its_mean(rows: int, normalize: str) -> None:
    values = np.append(RANDOM.normal(size=50), [0.1, 1 / 3, 1e6 + 0.3, -7e-5])
    found = number_statistics(np.tile(values, (rows, 1)), parts=3, normalize=normalize)
    assert set(found.std) == {0.0} and set(found.scale) == {1.0}
    assert found.shift == tuple(values.astype(np.float32).tolist())


def test_constant_images_are_divided_by_one() -> None:
    found = image_statistics(np.full((10, 3, 3, 1), 77, np.uint8), parts=3, normalize="standard")
    assert (found.mean, found.std, found.shift, found.scale) == ((77.0,), (0.0,), (77.0,), (1.0,))


def test_a_column_without_a_value_is_all_zeros() -> None:
    found = number_statistics(np.full((20, 1), np.nan), parts=4)
    assert found.missing == (20,)
    assert (found.min, found.max, found.mean, found.std, found.fill, found.shift, found.scale) == ((0,), (0,), (0,), (0,), (0,), (0,), (1,))


def test_moments_survive_json() -> None:
    import json

    feature = Feature(name="numbers", kind="number", dtype="float32", shape=(1,), columns=("a",))
    found = moments.of(feature, pa.table({"a": pa.array([np.nan, np.nan], pa.float32())}))
    assert moments.Moments(**json.loads(json.dumps(found.__dict__, allow_nan=False))) == found
