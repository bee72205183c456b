"""Splits by a stable hash: shares, stability, and that equal rows stay together."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from dlopt.data.clean import DropDuplicates
from dlopt.data.counter import row_keys
from dlopt.data.split import RandomSplit, StratifiedSplit, shares_of
from dlopt.part import DloptError

ROWS = np.random.default_rng(3).integers(0, 256, (20_000, 12), dtype=np.uint8)


def random_split(rows: np.ndarray, split: RandomSplit = RandomSplit()) -> np.ndarray:  # noqa: B008 (frozen)
    position = split.position(row_keys([rows]))
    first, second = split.cuts
    return (position >= first).astype(int) + (position >= second)


def stratified(rows: np.ndarray, labels: np.ndarray, split: StratifiedSplit) -> np.ndarray:
    position = split.position(row_keys([rows, labels[:, None]]))
    cuts = split.thresholds({label: position[labels == label] for label in np.unique(labels).tolist()})
    first, second = np.array([cuts[label] for label in labels.tolist()]).T
    return (position >= first).astype(int) + (position >= second)


def test_random_shares_are_met_within_chance() -> None:
    counts = np.bincount(random_split(ROWS), minlength=3)
    for count, share in zip(counts, (0.8, 0.1, 0.1), strict=True):
        assert abs(count - share * 20_000) < 4 * np.sqrt(20_000 * share * (1 - share))


def test_a_row_stays_in_its_split_when_others_come_go_or_move() -> None:
    before = random_split(ROWS)
    order = np.random.default_rng(0).permutation(len(ROWS))
    assert (random_split(ROWS[order]) == before[order]).all()
    assert (random_split(ROWS[100:200]) == before[100:200]).all()
    more = np.concatenate([np.zeros((50, 12), np.uint8), ROWS])
    assert (random_split(more)[50:] == before).all()


def test_another_seed_is_another_split() -> None:
    agree = (random_split(ROWS) == random_split(ROWS, RandomSplit(seed=1))).mean()
    assert abs(agree - (0.8**2 + 2 * 0.1**2)) < 0.02  # as often as by chance


def test_equal_rows_are_never_in_two_splits() -> None:
    assert len(set(random_split(np.repeat(ROWS[:1], 50, axis=0)).tolist())) == 1
    labels = np.zeros(1000, dtype=np.int64)
    repeated = ROWS[np.arange(1000) % 40]
    found = stratified(repeated, labels, StratifiedSplit())
    for row in range(40):
        assert len(set(found[row::40].tolist())) == 1


def test_stratified_shares_are_exact_in_every_class() -> None:
    labels = np.repeat([0, 1, 2, 3], [1000, 500, 30, 3])
    found = stratified(ROWS[: len(labels)], labels, StratifiedSplit())
    counts = {label: np.bincount(found[labels == label], minlength=3).tolist() for label in range(4)}
    assert counts == {0: [800, 100, 100], 1: [400, 50, 50], 2: [24, 3, 3], 3: [1, 1, 1]}


def test_stratified_depends_on_no_order() -> None:
    labels = np.arange(5000) % 7
    order = np.random.default_rng(0).permutation(5000)
    assert (
        stratified(ROWS[:5000][order], labels[order], StratifiedSplit()) == stratified(ROWS[:5000], labels, StratifiedSplit())[order]
    ).all()


def test_a_split_without_test_or_validation_leaves_them_empty() -> None:
    assert set(random_split(ROWS, RandomSplit(train=0.7, validation=0.3, test=0)).tolist()) == {0, 1}
    assert set(random_split(ROWS, RandomSplit(train=0.7, validation=0, test=0.3)).tolist()) == {0, 2}
    labels = np.zeros(1000, dtype=np.int64)
    assert np.bincount(stratified(ROWS[:1000], labels, StratifiedSplit(train=0.7, validation=0, test=0.3)), minlength=3).tolist() == [
        700,
        0,
        300,
    ]
    assert np.bincount(stratified(ROWS[:1000], labels, StratifiedSplit(train=1, validation=0, test=0)), minlength=3).tolist() == [
        1000,
        0,
        0,
    ]


def test_a_class_too_small_for_its_splits_is_refused_by_name() -> None:
    with pytest.raises(DloptError, match=r"data\.split: class 'cat' has 1 row\(s\), too few for 3 stratified splits: add rows"):
        StratifiedSplit().thresholds({"cat": np.array([0.5])})


@pytest.mark.parametrize("shares", [(0.8, 0.1, 0.1), (0.34, 0.33, 0.33), (0.98, 0.01, 0.01), (0.5, 0.5, 0.0), (0.01, 0.98, 0.01)])
def test_shares_of_rows_sum_up_and_leave_none_empty(shares: tuple[float, ...]) -> None:
    for rows in range(3, 200):
        counts = shares_of(rows, shares)
        assert sum(counts) == rows
        assert all((count > 0) == (share > 0) for count, share in zip(counts, shares, strict=True))
        assert all(abs(count - max(rows * share, 1)) <= 2 for count, share in zip(counts, shares, strict=True) if share)


def test_shares_that_do_not_sum_to_one_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"sum to 1\.1: make them sum to 1"):
        RandomSplit(train=0.9, validation=0.1, test=0.1)


def test_dropping_duplicates_keeps_the_first_of_equal_keys() -> None:
    keys = np.array([[1, 1], [1, 1], [1, 2], [3, 0], [3, 0], [3, 0]], dtype=np.uint64)
    assert DropDuplicates().keep(keys).tolist() == [True, False, True, True, False, False]
    assert DropDuplicates().keep(keys[:0]).tolist() == []
