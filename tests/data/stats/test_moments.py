"""Statistics in parts against numpy on everything at once."""

from __future__ import annotations

from functools import reduce

import numpy as np
import pytest

from dlopt.data.stats.moments import Moments, of_pixels, of_values

RANDOM = np.random.default_rng(2)


def of_numbers(values: np.ndarray, parts: int = 1) -> Moments:
    return reduce(Moments.merge, map(of_values, np.array_split(values.astype(np.float32), parts)))


def of_images(values: np.ndarray, parts: int = 1) -> Moments:
    return reduce(Moments.merge, (of_pixels(piece.reshape(-1, values.shape[-1])) for piece in np.array_split(values, parts)))


@pytest.mark.parametrize("parts", [1, 2, 7, 100])
def test_numbers_agree_with_numpy(parts: int) -> None:
    values = RANDOM.normal([0, 1e4, -3], [1, 0.5, 1e5], (1000, 3)).astype(np.float32)
    values[RANDOM.random((1000, 3)) < 0.2] = np.nan
    values[:200, 0] = np.nan  # whole parts without a value
    exact = values.astype(np.float64)
    found = of_numbers(values, parts).statistics("standard")
    assert found.count == 1000 and found.missing == tuple(np.isnan(exact).sum(axis=0).tolist())
    for name, expected in (("min", np.nanmin), ("max", np.nanmax), ("mean", np.nanmean), ("std", np.nanstd)):
        assert np.allclose(getattr(found, name), expected(exact, axis=0), rtol=1e-9, atol=0)


def test_many_columns_agree_with_numpy_one_by_one() -> None:
    values = RANDOM.normal(size=(50, 100)).astype(np.float32) * np.arange(1, 101)
    values = values.astype(np.float32)
    values[:, 40] = np.nan
    found = of_numbers(values, 3)
    there = np.delete(values.astype(np.float64), 40, axis=1)
    assert np.allclose(np.delete(found.mean, 40), there.mean(axis=0), rtol=1e-9) and found.mean[40] == 0
    assert np.allclose(np.delete(found.std, 40), there.std(axis=0), rtol=1e-9) and found.std[40] == 0


def test_a_spread_that_is_small_beside_the_values_is_not_lost() -> None:
    values = (2.0**23 + RANDOM.integers(0, 4, (10_000, 1))).astype(np.float32)
    assert np.allclose(of_numbers(values, 30).std, values.astype(np.float64).std(axis=0), rtol=1e-9)


@pytest.mark.parametrize("parts", [1, 2, 7, 100])
def test_pixels_agree_with_numpy(parts: int) -> None:
    values = RANDOM.integers(0, 256, (300, 6, 5, 3), dtype=np.uint8)
    values[..., 1] //= 16
    flat = values.reshape(-1, 3).astype(np.float64)
    found = of_images(values, parts).statistics("min_max")
    assert found.count == 300 * 30 and found.missing == (0, 0, 0)
    for name in ("min", "max", "mean", "std"):
        assert np.allclose(getattr(found, name), getattr(flat, name)(axis=0), rtol=1e-9, atol=0)


def test_scaling_follows_from_the_moments() -> None:
    found = of_numbers(np.array([[1.0], [3.0], [np.nan], [8.0]]))
    shift_and_scale = {
        name: (found.statistics(name).shift[0], found.statistics(name).scale[0])
        for name in ("standard", "min_max", "symmetric", "max_abs", "none")
    }
    std = np.std([1.0, 3.0, 8.0])
    assert shift_and_scale == {
        "standard": (4.0, pytest.approx(1 / std)),
        "min_max": (1.0, 1 / 7),
        "symmetric": (4.5, 2 / 7),
        "max_abs": (0.0, 1 / 8),
        "none": (0.0, 1.0),
    }
    assert found.statistics("min_max").fill == (4.0,)


@pytest.mark.parametrize("normalize", ["standard", "min_max"])
@pytest.mark.parametrize("rows", [7, 10, 999, 60_001])
def test_a_constant_column_is_divided_by_one_whatever_rounding_makes_of_its_mean(rows: int, normalize: str) -> None:
    values = np.append(RANDOM.normal(size=50), [0.1, 1 / 3, 1e6 + 0.3, -7e-5])
    found = of_numbers(np.tile(values, (rows, 1)), parts=3).statistics(normalize)
    assert set(found.std) == {0.0} and set(found.scale) == {1.0}
    assert found.shift == tuple(values.astype(np.float32).tolist())


def test_a_constant_column_with_missing_values_is_divided_by_one() -> None:
    values = np.full((1000, 2), 0.1, np.float32)
    values[RANDOM.random(1000) < 0.3, 0] = np.nan
    found = of_numbers(values, parts=7).statistics("standard")
    assert found.std == (0.0, 0.0) and found.shift == (float(np.float32(0.1)),) * 2


def test_a_constant_column_of_any_number_has_no_spread() -> None:
    values = np.full((1500, 1), np.log1p(np.float32(0.1), dtype=np.float64))  # whose sums are rounded
    found = reduce(Moments.merge, map(of_values, np.split(values, [41, 166, 375, 666, 1041])))
    assert found.std == 0 and found.statistics("standard").scale == (1.0,)


def test_constant_images_are_divided_by_one() -> None:
    found = of_images(np.full((10, 3, 3, 1), 77, np.uint8), parts=3).statistics("standard")
    assert (found.mean, found.std, found.shift, found.scale) == ((77.0,), (0.0,), (77.0,), (1.0,))


def test_a_column_without_a_value_is_all_zeros() -> None:
    found = of_numbers(np.full((20, 1), np.nan), parts=4).statistics("standard")
    assert found.missing == (20,)
    assert (found.min, found.max, found.mean, found.std, found.fill, found.shift, found.scale) == ((0,), (0,), (0,), (0,), (0,), (0,), (1,))
