"""The random numbers and the order of rows: pinned, complete, and the same however many workers share a batch."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from dlopt.data.counter import bits, mix, row_keys, stream, string_words, uniform
from dlopt.data.feed.order import AGAIN, Order, row_of

CHUNKS = [40, 25, 40, 7, 33]


def order(batch_size: int, window: int = 1, chunks: list[int] = CHUNKS, seed: int = 7) -> Order:
    return Order(seed, tuple(chunks), batch_size, window)


def epoch_of(order: Order, epoch: int) -> np.ndarray:
    return np.concatenate([order.picks(epoch, window) for window in range(order.windows)])


def test_mixing_is_the_finalizer_of_splitmix64() -> None:
    gamma = 0x9E3779B97F4A7C15
    states = np.array([(gamma * n) % 2**64 for n in (1, 2, 3)], dtype=np.uint64)
    # the first outputs of SplitMix64 seeded with 0, as the reference implementation prints them
    assert mix(states).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_streams_and_bits_are_what_they_were() -> None:
    assert int(stream(7, 1, 2)) == 3011351786434195872
    assert bits(np.arange(3), 7, 1, 2).tolist() == [10755174912100960972, 7269535288776434170, 2730894086466605620]
    assert string_words(["ham", "spam"]).tolist() == [9909399948088910044, 12534991609212061613]
    assert row_keys([np.arange(6, dtype=np.uint8).reshape(2, 3), np.array([[1.5], [2.5]])]).tolist() == [
        [18386291924880204607, 15257946342050104009],
        [15154672164386644047, 7026076948154483757],
    ]


def test_the_order_of_rows_is_what_it_was() -> None:
    assert epoch_of(order(8, window=4, chunks=[5, 9, 6]), 1).tolist() == [
        2,
        3,
        16,
        19,
        6,
        8,
        10,
        13,
        1,
        14,
        17,
        5,
        7,
        9,
        11,
        12,
        0,
        4,
        15,
        18,
    ]


def test_streams_differ_in_every_number_and_in_their_order() -> None:
    found = {int(stream(*numbers)) for numbers in [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (-1,), (2**63,)]}
    assert len(found) == 8


def test_uniform_numbers_are_uniform_and_independent_of_their_neighbours() -> None:
    numbers = uniform(np.arange(200_000), 3, 1)
    assert numbers.min() >= 0 and numbers.max() < 1
    counts = np.histogram(numbers, bins=50, range=(0, 1))[0]
    assert ((counts - 4000) ** 2 / 4000).sum() < 100  # chi-squared, 49 degrees of freedom: far out in the tail
    assert abs(np.corrcoef(numbers[1:], numbers[:-1])[0, 1]) < 0.01
    assert abs(np.corrcoef(numbers, uniform(np.arange(200_000), 3, 2))[0, 1]) < 0.01


def test_keys_depend_on_content_alone() -> None:
    values = np.random.default_rng(0).integers(0, 256, (500, 5, 3), dtype=np.uint8)
    labels = np.arange(500)[:, None] % 10
    keys = row_keys([values, labels])
    assert len(np.unique(keys, axis=0)) == 500
    shuffled = np.random.default_rng(1).permutation(500)
    assert (row_keys([values[shuffled], labels[shuffled]]) == keys[shuffled]).all()
    assert (row_keys([np.asfortranarray(values)[3:9], labels[3:9]]) == keys[3:9]).all()
    assert (row_keys([values, labels + 1]) != keys).any(axis=1).all()


def test_equal_bytes_in_other_columns_make_another_key() -> None:
    one, two = np.array([[1, 0]], dtype=np.int64), np.array([[0, 1]], dtype=np.int64)
    assert (row_keys([one]) != row_keys([two])).all()


def test_no_rows_have_no_keys() -> None:
    assert row_keys([np.zeros((0, 28, 28, 1), np.uint8), np.zeros((0, 1), np.int64)]).shape == (0, 2)


@pytest.mark.parametrize("batch_size", [1, 10, 64, 100, 144, 145, 1000])
@pytest.mark.parametrize("window", [1, 3, 1000])
def test_every_row_comes_exactly_once_an_epoch(batch_size: int, window: int) -> None:
    rows = epoch_of(order(batch_size, window), 3)
    assert sorted(rows.tolist()) == list(range(sum(CHUNKS)))


@pytest.mark.parametrize("rows", [1, 2, 63, 65])
def test_a_set_of_fewer_rows_than_a_batch_is_one_batch(rows: int) -> None:
    found = order(128, chunks=[rows])
    assert (found.batches, found.windows) == (1, 1)
    assert sorted(epoch_of(found, 1).tolist()) == list(range(rows))


def test_no_rows_make_no_batches() -> None:
    found = order(128, chunks=[])
    assert (found.rows, found.batches, found.windows) == (0, 0, 0)


def test_epochs_and_seeds_differ() -> None:
    first = epoch_of(order(16, 4), 1)
    assert (epoch_of(order(16, 4), 1) == first).all()
    for other in (epoch_of(order(16, 4), 2), epoch_of(order(16, 4, seed=8), 1)):
        assert (other != first).mean() > 0.9


@pytest.mark.parametrize("batch_size", [3, 10, 64, 100])
@pytest.mark.parametrize("world", [1, 2, 3, 5, 64, 70])
def test_slots_of_all_workers_are_the_batch_once_and_in_order(batch_size: int, world: int) -> None:
    parts = [order(batch_size).slots(rank, world) for rank in range(world)]
    assert parts[0][0] == 0 and parts[-1][1] == batch_size
    assert all(before[1] == after[0] for before, after in pairwise(parts))


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_large_batches_are_shared_out_evenly(world: int) -> None:
    sizes = [stop - start for start, stop in (order(640).slots(rank, world) for rank in range(world))]
    assert max(sizes) - min(sizes) <= 10  # a lane


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_worker_touches_only_its_part_of_the_chunks(world: int) -> None:
    found = order(64, window=100, chunks=[100] * 64)
    slot = np.arange(6400) % 64
    rows = found.picks(1, 0)
    for rank in range(world):
        low, high = found.slots(rank, world)
        touched = np.unique(rows[(slot >= low) & (slot < high)] // 100)
        assert len(touched) == 64 // world


def test_rows_of_a_window_are_mixed() -> None:
    rows = order(64, window=1000, chunks=[6400]).picks(1, 0)
    means = rows.reshape(-1, 64).mean(axis=1)
    assert means.std() < 100  # batches look alike: each holds rows from all over the window
    assert abs(np.corrcoef(np.arange(100), rows.reshape(-1, 64)[:, 0])[0, 1]) < 0.4


def test_a_window_is_about_256_mib() -> None:
    assert Order.of(0, [1000], 128, 792).window == 256 * 2**20 // (792 * 128)
    assert Order.of(0, [1000], 128, 2**30).window == 1


def balanced(batch_size: int, window: int, classes: np.ndarray, chunks: list[int] = CHUNKS, seed: int = 7) -> Order:
    return Order(seed, tuple(chunks), batch_size, window, classes)


def few(rows: int, *counts: int) -> np.ndarray:
    """A class for each row: so many of 0, of 1, ..., in a random order."""
    assert sum(counts) == rows
    return np.random.default_rng(3).permutation(np.repeat(np.arange(len(counts)), counts)).astype(np.uint8)


@pytest.mark.parametrize("batch_size", [10, 64, 145])
@pytest.mark.parametrize("window", [1, 3, 1000])
def test_a_balanced_epoch_has_as_many_rows_and_each_class_as_often(batch_size: int, window: int) -> None:
    classes = few(145, 100, 40, 5)
    for epoch in (1, 2, 3):
        picks = epoch_of(balanced(batch_size, window, classes), epoch)
        rows = row_of(picks)
        assert len(picks) == 145 and rows.min() >= 0 and rows.max() < 145
        counts = np.bincount(classes[rows], minlength=3)
        assert np.abs(counts - 145 / 3).max() < 15
        often = np.bincount(rows, minlength=145)
        for label, expected in enumerate((145 / 300, 145 / 120, 145 / 15)):  # the nearest whole numbers
            assert set(often[classes == label]) <= {int(expected), int(expected) + 1}


def test_classes_are_equally_likely_over_many_epochs_and_every_row_of_a_class() -> None:
    classes = few(145, 100, 40, 5)
    order = balanced(16, 3, classes)
    often = np.zeros(145)
    for epoch in range(1, 401):
        often += np.bincount(row_of(epoch_of(order, epoch)), minlength=145)
    counts = np.bincount(classes, weights=often) / 400
    assert np.abs(counts - 145 / 3).max() < 0.6
    for label, size in enumerate((100, 40, 5)):
        expected = 400 * 145 / 3 / size
        assert np.abs(often[classes == label] - expected).max() < 5 * np.sqrt(400 * 0.25)


@pytest.mark.parametrize("window", [1, 3, 1000])
def test_a_row_that_comes_again_is_another_pick(window: int) -> None:
    picks = epoch_of(balanced(16, window, few(145, 100, 40, 5)), 2)
    assert len(np.unique(picks)) == 145
    for row in np.unique(row_of(picks)):
        assert sorted(picks[row_of(picks) == row] // AGAIN) == list(range(np.count_nonzero(row_of(picks) == row)))


def test_a_large_balanced_epoch_is_close_to_even_and_mixed() -> None:
    classes = few(6400, 6000, 390, 10)
    picks = balanced(64, 1000, classes, chunks=[100] * 64).picks(1, 0)
    of_batch = np.stack([np.bincount(batch, minlength=3) for batch in classes[row_of(picks)].reshape(-1, 64)])
    assert np.abs(of_batch.sum(axis=0) - 6400 / 3).max() < 200
    assert of_batch.std(axis=0).max() < 10  # no batch is all of one class


def test_a_class_of_the_target_without_rows_is_no_class() -> None:
    classes = few(145, 100, 0, 45)
    counts = np.bincount(classes[row_of(epoch_of(balanced(16, 3, classes), 1))], minlength=3)
    assert counts[1] == 0 and np.abs(counts[[0, 2]] - 72.5).max() < 15


def test_an_even_set_is_balanced_as_it_is() -> None:
    classes = few(144, 48, 48, 48)
    rows = epoch_of(balanced(16, 3, classes, chunks=[40, 25, 40, 7, 32]), 1)
    assert sorted(rows.tolist()) == list(range(144))


def test_the_balanced_order_is_what_it_was() -> None:
    picks = epoch_of(balanced(8, 4, np.array([0] * 14 + [1] * 6, dtype=np.uint8), chunks=[5, 9, 6]), 1)
    assert [(int(row_of(pick)), int(pick // AGAIN)) for pick in picks] == [
        (2, 0),
        (15, 0),
        (16, 0),
        (19, 0),
        (5, 0),
        (8, 0),
        (9, 0),
        (13, 0),
        (1, 0),
        (14, 0),
        (17, 0),
        (17, 1),
        (19, 1),
        (6, 0),
        (11, 0),
        (12, 0),
        (4, 0),
        (14, 1),
        (16, 1),
        (18, 0),
    ]


def with_partners(order: Order, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """The picks of the first window and the partner of each, batch after batch."""
    found = order.arranged(epoch, 0)
    picks, partners = np.empty_like(found.picks), np.empty_like(found.picks)
    picks[found.places], partners[found.places] = found.picks, found.picks[order.partners(epoch, found)]
    return picks, partners


@pytest.mark.parametrize("batch_size", [10, 64, 128, 145])
def test_partners_are_a_permutation_within_the_lane_and_nobodys_own(batch_size: int) -> None:
    found = order(batch_size, window=1000)
    picks, partners = with_partners(found, 1)
    lane = found.lane_of_slot[np.arange(145) % batch_size]
    assert sorted(partners.tolist()) == sorted(picks.tolist())
    lane_of = dict(zip(picks.tolist(), lane.tolist(), strict=True))
    assert [lane_of[partner] for partner in partners.tolist()] == lane.tolist()
    alone = np.bincount(lane, minlength=64)[lane] == 1
    assert ((partners == picks) == alone).all()


def test_partners_follow_no_pattern() -> None:
    found = order(64, window=1000, chunks=[6400])
    picks, partners = with_partners(found, 1)
    other = dict(zip(*with_partners(found, 2), strict=True))
    assert (np.array([other[pick] for pick in picks]) != partners).mean() > 0.95
    place = np.argsort(picks)[np.searchsorted(np.sort(picks), partners)]
    assert abs(np.corrcoef(np.arange(6400) // 64, place // 64)[0, 1]) < 0.05
