"""The order of rows in training: a pure function of (seed, epoch), whatever reads the rows and however many workers there are.

An epoch permutes the chunks (row groups) and cuts the sequence into windows of whole batches. Within a window the slots of
a batch are shared out over a fixed number of lanes, each lane gets a contiguous run of the permuted chunks, and its rows
are put into a random order. A worker takes a contiguous run of lanes: it reads only the chunks that it uses, and every
global batch is the same set of rows in the same order whether one worker computes it or sixty-four.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dlopt.data.counter import bits

LANES = 64
"""The most workers that a batch can be shared out to; fixed, since it is part of the order."""
WINDOW_BYTES = 256 * 2**20
"""About how many bytes of rows are shuffled at a time, over all workers together; fixed for the same reason."""
CHUNKS, ROWS = 1, 2  # purposes of random numbers


@dataclass(frozen=True)
class Order:
    """The order of one split. chunk_rows: rows of each chunk; window: batches in a window."""

    seed: int
    chunk_rows: tuple[int, ...]
    batch_size: int
    window: int

    @classmethod
    def of(cls, seed: int, chunk_rows: Sequence[int], batch_size: int, row_bytes: int) -> Order:
        return cls(seed, tuple(chunk_rows), batch_size, max(1, WINDOW_BYTES // (row_bytes * batch_size)))

    @property
    def rows(self) -> int:
        return sum(self.chunk_rows)

    @property
    def batches(self) -> int:
        """Batches in an epoch; the last may be smaller, no row is left out."""
        return -(-self.rows // self.batch_size)

    @property
    def windows(self) -> int:
        return -(-self.batches // self.window)

    @property
    def lane_of_slot(self) -> np.ndarray:
        """The lane of each slot of a batch, (batch_size,), rising."""
        return np.arange(self.batch_size) * LANES // self.batch_size

    def slots(self, rank: int, world: int) -> tuple[int, int]:
        """The slots of a batch, from and up to, that worker `rank` of `world` computes."""
        lanes = self.lane_of_slot
        return int(np.searchsorted(lanes, rank * LANES // world)), int(np.searchsorted(lanes, (rank + 1) * LANES // world))

    def window_rows(self, epoch: int, window: int) -> np.ndarray:
        """Row numbers of a window of an epoch, batch after batch, slot after slot."""
        start = window * self.window * self.batch_size
        stop = min(start + self.window * self.batch_size, self.rows)
        rows = self._permuted_chunks(epoch, start, stop)
        lane = self.lane_of_slot[np.arange(stop - start) % self.batch_size]
        by_lane = np.argsort(lane, kind="stable")
        shuffled = rows[np.lexsort((bits(rows, self.seed, epoch, ROWS), lane[by_lane]))]
        order = np.empty_like(rows)
        order[by_lane] = shuffled
        return order

    def _permuted_chunks(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Row numbers from `start` up to `stop` of the sequence of permuted chunks."""
        sizes = np.array(self.chunk_rows, dtype=np.int64)
        first = np.cumsum(sizes) - sizes
        permutation = np.argsort(bits(np.arange(len(sizes)), self.seed, epoch, CHUNKS), kind="stable")
        ends = np.cumsum(sizes[permutation])
        touched = range(int(np.searchsorted(ends, start, side="right")), int(np.searchsorted(ends, stop, side="left")) + 1)
        parts = []
        for place in touched:
            chunk, end = permutation[place], ends[place]
            begin = end - sizes[chunk]
            low, high = max(start, begin) - begin, min(stop, end) - begin
            parts.append(np.arange(first[chunk] + low, first[chunk] + high))
        return np.concatenate(parts)
