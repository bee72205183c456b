"""The order of rows in training: a pure function of (seed, epoch), whatever reads the rows and however many workers there are.

An epoch permutes the chunks (row groups) and cuts the sequence into windows of whole batches. Within a window the slots of
a batch are shared out over a fixed number of lanes, each lane gets a contiguous run of the permuted chunks, and its rows
are put into a random order. A worker takes a contiguous run of lanes: it reads only the chunks that it uses, and every
global batch is the same set of rows in the same order whether one worker computes it or sixty-four.

Balanced, the sequence has each row as often as its class is rarer than others: rows get a length each, and as many equally distant
points as an epoch has rows fall on them (systematic resampling). All lengths are integers, so that no rounding decides.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from dlopt.data.counter import bits, stream

LANES = 64
"""The most workers that a batch can be shared out to; fixed, since it is part of the order."""
WINDOW_BYTES = 256 * 2**20
"""About how many bytes of rows are shuffled at a time, over all workers together; fixed for the same reason."""
CHUNKS, ROWS, POINTS, PARTNERS = 1, 2, 4, 5  # purposes of random numbers; 3 is augmentation's
AGAIN = 2**36
"""A pick is a row and how often it has come before in the epoch, as one integer: row + AGAIN * times."""
LENGTH = 2**24
"""About the length of a row, were all classes equally frequent."""


def row_of(picks: np.ndarray) -> np.ndarray:
    """The rows of picks."""
    return picks % AGAIN


def lanes(rank: int, world: int) -> tuple[int, int]:
    """The lanes, from and up to, of worker `rank` of `world`."""
    return rank * LANES // world, (rank + 1) * LANES // world


class Arranged(NamedTuple):
    """Some whole lanes of a window, in the sequence's order."""

    picks: np.ndarray
    """int64 (n,)."""
    places: np.ndarray
    """Where each goes in the window, batch after batch, slot after slot, int64 (n,)."""
    lane: np.ndarray
    """The lane of each, rising, (n,)."""


@lru_cache(2)
def _permutation(chunks: int, seed: int, epoch: int) -> np.ndarray:
    """So many chunks in the order of an epoch."""
    return np.argsort(bits(np.arange(chunks), seed, epoch, CHUNKS), kind="stable")


@dataclass(frozen=True)
class Order:
    """The order of one split. chunk_rows: rows of each chunk; window: batches in a window; classes: of each row, for a balanced one."""

    seed: int
    chunk_rows: tuple[int, ...]
    batch_size: int
    window: int
    classes: np.ndarray | None = None

    @classmethod
    def of(cls, seed: int, chunk_rows: Sequence[int], batch_size: int, row_bytes: int, classes: np.ndarray | None = None) -> Order:
        return cls(seed, tuple(chunk_rows), batch_size, max(1, WINDOW_BYTES // (row_bytes * batch_size)), classes)

    @cached_property
    def rows(self) -> int:
        return sum(self.chunk_rows)

    @property
    def batches(self) -> int:
        """Batches in an epoch; the last may be smaller, no place is left out."""
        return -(-self.rows // self.batch_size)

    @property
    def windows(self) -> int:
        return -(-self.batches // self.window)

    def windows_from(self, start: int) -> list[tuple[int, int]]:
        """(window, its first batches that are left out) for what is left of an epoch from batch number `start` on."""
        if start >= self.batches:
            return []
        first, skipped = divmod(start, self.window)
        return [(window, skipped if window == first else 0) for window in range(first, self.windows)]

    @property
    def lane_of_slot(self) -> np.ndarray:
        """The lane of each slot of a batch, (batch_size,), rising."""
        return np.arange(self.batch_size) * LANES // self.batch_size

    def slots(self, rank: int, world: int) -> tuple[int, int]:
        """The slots of a batch, from and up to, that worker `rank` of `world` computes."""
        low, high = lanes(rank, world)
        return int(self._first_slots[low]), int(self._first_slots[high])

    def most(self, rows: int, world: int) -> int:
        """Rows of the worker that has the most of a batch of so many."""
        bounds = [min(self.slots(rank, world)[0], rows) for rank in range(world)] + [rows]
        return max(high - low for low, high in itertools.pairwise(bounds))

    def picks(self, epoch: int, window: int) -> np.ndarray:
        """The picks of a window of an epoch, batch after batch, slot after slot, int64."""
        found = self.arranged(epoch, window)
        picks = np.empty_like(found.picks)
        picks[found.places] = found.picks
        return picks

    def arranged(self, epoch: int, window: int, low: int = 0, high: int = LANES) -> Arranged:
        """The picks of lanes `low` up to `high` of a window as they come in the sequence, and where they go."""
        bounds = self.bounds(window)
        lane = np.repeat(np.arange(low, high), np.diff(bounds[low : high + 1]))
        start = window * self.window * self.batch_size
        picks = self._sequence(epoch, start + int(bounds[low]), start + int(bounds[high]))
        number = np.arange(len(lane)) + bounds[low] - bounds[lane]  # of the row in its lane
        width = np.diff(self._first_slots)[lane]
        places = np.empty_like(picks)
        shuffled = np.lexsort((bits(picks, self.seed, epoch, ROWS), lane))
        places[shuffled] = number // width * self.batch_size + self._first_slots[lane] + number % width
        return Arranged(picks, places, lane)

    def bounds(self, window: int) -> np.ndarray:
        """Where in the sequence each lane of a window begins, and where the last one ends, counted from the window's beginning,
        (LANES + 1,)."""
        start = window * self.window * self.batch_size
        batches, rest = divmod(min(self.window * self.batch_size, self.rows - start), self.batch_size)
        return batches * self._first_slots + np.minimum(rest, self._first_slots)

    def borders(self, epoch: int) -> np.ndarray:
        """Where in the sequence each of the permuted chunks begins, and where the last one ends, (chunks + 1,)."""
        ends = np.append(0, np.cumsum(self._chunk_lengths[self._permutation(epoch)]))
        if self.classes is None:
            return ends
        return np.clip(-((self._offset(epoch) - ends) // self._step), 0, self.rows)

    def partners(self, epoch: int, found: Arranged) -> np.ndarray:
        """For each pick of whole lanes the index of another one of its lane, by a random permutation without fixed points; its own where
        the lane has no other. A worker computes whole lanes, so partners are at hand whoever computes them."""
        order = np.lexsort((bits(found.picks, self.seed, epoch, PARTNERS), found.lane))
        first = np.flatnonzero(np.diff(found.lane[order], prepend=-1))
        following = np.roll(order, -1)
        following[np.append(first, len(order))[1:] - 1] = order[first]
        partners = np.empty_like(order)
        partners[order] = following
        return partners

    def _sequence(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Picks from `start` up to `stop` of the sequence of permuted chunks."""
        if start == stop:
            return np.zeros(0, dtype=np.int64)
        permutation = self._permutation(epoch)
        points = np.arange(start, stop)
        if self.classes is not None:
            points = points * self._step + self._offset(epoch)
        ends = np.cumsum(self._chunk_lengths[permutation])
        touched = range(int(np.searchsorted(ends, points[0], side="right")), int(np.searchsorted(ends, points[-1], side="right")) + 1)
        parts = np.split(points, np.searchsorted(points, ends[touched.start : touched.stop - 1]))
        found = []
        for place, part in zip(touched, parts, strict=True):
            chunk = int(permutation[place])
            found.append(self._hit(chunk, part - (ends[place] - self._chunk_lengths[chunk])))
        return np.concatenate(found)

    def _permutation(self, epoch: int) -> np.ndarray:
        """The chunks in the order of the epoch's sequence."""
        return _permutation(len(self.chunk_rows), self.seed, epoch)

    def _offset(self, epoch: int) -> int:
        """The first point, where the order is balanced."""
        return int(stream(self.seed, epoch, POINTS) % np.uint64(self._step))

    def _hit(self, chunk: int, points: np.ndarray) -> np.ndarray:
        """The picks of a chunk on which points fall. points: how far behind the beginning of the chunk, rising."""
        first = self._starts[chunk]
        if self.classes is None:
            return first + points
        lengths = self._lengths[self.classes[first : first + self.chunk_rows[chunk]]]
        ends = np.cumsum(lengths)
        row = np.searchsorted(ends, points, side="right")
        times = (points - (ends[row] - lengths[row])) // self._step
        return first + row + AGAIN * times

    @cached_property
    def _first_slots(self) -> np.ndarray:
        """The first slot of each lane, and the number of slots, (LANES + 1,)."""
        return np.searchsorted(self.lane_of_slot, np.arange(LANES + 1))

    @cached_property
    def _starts(self) -> np.ndarray:
        """The first row of each chunk."""
        return np.cumsum(self.chunk_rows, dtype=np.int64) - np.array(self.chunk_rows, dtype=np.int64)

    @cached_property
    def _lengths(self) -> np.ndarray:
        """The length of a row of each class: in inverse proportion to how many of the class there are."""
        counts = np.bincount(self.classes if self.classes is not None else [])
        return LENGTH * self.rows // np.maximum(1, counts * np.count_nonzero(counts))

    @cached_property
    def _chunk_lengths(self) -> np.ndarray:
        """The sum of its rows' lengths for each chunk; a row counts 1 where the order is not balanced."""
        if self.classes is None:
            return np.array(self.chunk_rows, dtype=np.int64)
        parts = np.split(self.classes, self._starts[1:])
        return np.array([self._lengths[part].sum() for part in parts], dtype=np.int64)

    @cached_property
    def _step(self) -> int:
        """The distance of two points."""
        return int(self._chunk_lengths.sum()) // self.rows
