"""Quantiles in parts against numpy on everything at once."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from dlopt.data.stats.quantiles import MOST_POINTS, POINTS, Quantiles

RANDOM = np.random.default_rng(8)
PROBABILITIES = [0.0, 0.01, 0.25, 0.5, 0.77, 0.99, 1.0]


def merged(matrix: np.ndarray, parts: int, wanted: list[float] | None = None) -> Quantiles:
    first, *others = [Quantiles.of(piece, wanted or []) for piece in np.array_split(matrix, parts)]
    for other in others:
        first = first.merge(other)
    return first


def with_gaps(rows: int, columns: int = 3) -> np.ndarray:
    """Normal numbers, whole ones with many ties, and skewed ones, a fifth of all missing."""
    kinds = [RANDOM.normal(size=rows), RANDOM.integers(0, 5, rows), RANDOM.exponential(1e3, rows)]
    matrix = np.stack([kinds[column % 3] for column in range(columns)], axis=1).astype(np.float32)
    matrix[RANDOM.random(matrix.shape) < 0.2] = np.nan
    return matrix


@pytest.mark.parametrize("parts", [1, 2, 7, 50])
def test_few_values_have_numpys_quantiles_however_they_are_parted(parts: int) -> None:
    matrix = with_gaps(POINTS)
    found = merged(matrix, parts)
    for p in PROBABILITIES:
        assert np.allclose(found.at(p), np.nanquantile(matrix.astype(np.float64), p, axis=0), rtol=1e-12, atol=1e-12)


def test_the_quantiles_that_were_asked_for_of_one_piece_are_exact_whatever_its_length() -> None:
    matrix = with_gaps(20 * POINTS)
    found = Quantiles.of(matrix, PROBABILITIES)
    for p in PROBABILITIES:
        assert np.allclose(found.at(p), np.nanquantile(matrix.astype(np.float64), p, axis=0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("rows", "parts"), [(100_000, 1), (100_000, 9), (400_000, 40), (300_000, 150)])
def test_the_rank_of_a_quantile_is_off_by_no_more_than_the_stated_share(rows: int, parts: int) -> None:
    ordered = RANDOM.permutation(rows).astype(np.float32)[:, None]  # a value is its rank
    found = merged(ordered, parts)
    errors = [abs(float(found.at(p)[0]) - p * (rows - 1)) / rows for p in np.linspace(0, 1, 201)]
    assert max(errors) <= 1 / (2 * POINTS) + 1 / rows


def test_parts_of_different_ranges_and_sizes_are_off_by_no_more_either() -> None:
    values = np.arange(200_000, dtype=np.float32)[:, None]  # sorted: each part has a range of its own
    bounds = [0, 10, 500, 60_000, 60_001, 150_000, 200_000]
    found = Quantiles.of(values[:0])
    for start, stop in itertools.pairwise(bounds):
        found = found.merge(Quantiles.of(values[start:stop]))
    errors = [abs(float(found.at(p)[0]) - p * 199_999) / 200_000 for p in np.linspace(0, 1, 201)]
    assert max(errors) <= 1 / (2 * POINTS) + 1 / 200_000


def test_a_summary_stays_small_however_much_is_merged() -> None:
    found = merged(RANDOM.normal(size=(2_000_000, 1)).astype(np.float32), 400)
    assert len(found.values[0]) <= 64 * POINTS
    assert found.weights[0].sum() == pytest.approx(2_000_000)
    wide = Quantiles.of(RANDOM.normal(size=(3000, 2000)).astype(np.float32))
    assert sum(map(len, wide.values)) <= max(MOST_POINTS, 256 * 2000)


def test_the_order_of_merging_moves_no_quantile_beyond_its_bound() -> None:
    pieces = [Quantiles.of(RANDOM.normal(size=(5000, 1)).astype(np.float32)) for _ in range(100)]
    forth, back = pieces[0], pieces[-1]
    for piece in pieces[1:]:
        forth = forth.merge(piece)
    for piece in reversed(pieces[:-1]):
        back = back.merge(piece)
    for p in (0.1, 0.5, 0.9):  # where the density is at least 0.17, so a rank's error is at most six times as large in values
        assert abs(forth.at(p)[0] - back.at(p)[0]) < 6 * 2 / (2 * POINTS)


def test_merging_the_same_pieces_in_the_same_order_gives_the_same_bits() -> None:
    matrix = with_gaps(50_000)
    one, two = merged(matrix, 30), merged(matrix.copy(), 30)
    assert all((mine == yours).all() for mine, yours in zip(one.values + one.weights, two.values + two.weights, strict=True))


def test_pieces_without_values_change_nothing() -> None:
    matrix = with_gaps(1000)
    nothing = Quantiles.of(np.full((50, 3), np.nan, np.float32), [0.5])
    some = Quantiles.of(matrix, [0.5])
    for found in (some.merge(nothing), nothing.merge(some), nothing.merge(Quantiles.of(matrix[:0])).merge(some)):
        assert (found.at(0.5) == some.at(0.5)).all()


def test_a_column_without_values_has_the_quantile_zero() -> None:
    matrix = np.array([[np.nan, 3.0], [np.nan, 1.0]], np.float32)
    assert Quantiles.of(matrix, [0.5]).at(0.5).tolist() == [0.0, 2.0]
    assert Quantiles.of(matrix[:0]).at(0.5).tolist() == [0.0, 0.0]


def test_one_value_is_every_quantile() -> None:
    found = Quantiles.of(np.array([[7.0]], np.float32))
    assert [found.at(p)[0] for p in PROBABILITIES] == [7.0] * len(PROBABILITIES)
