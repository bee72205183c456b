"""One reading of a split for all workers. Tasks of Ray Data read each chunk once an epoch, augment its rows and say where in whose window
each of them goes; a `Dealer` hands every worker its own, in the order of the windows. Imports torch only to augment."""

from __future__ import annotations

import atexit
import os
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa

from dlopt.data.feed.order import WINDOW_BYTES, lanes, row_of
from dlopt.data.feed.sampler import Sampler
from dlopt.data.prepared import Rows, Split, as_table
from dlopt.data.types.tensors import column_of
from dlopt.part import DloptError
from dlopt.session import data_context

if TYPE_CHECKING:
    from torch import Tensor

READ_BYTES = 16 * 2**20
"""About how many bytes of rows a task reads: enough that what Ray does for a task is little beside it."""
BLOCKS = 4
"""About in how many blocks a task hands them over."""
AUGMENT_BYTES = 2 * 2**20
"""About how many bytes of rows are augmented at a time, which a processor's cache has room for."""
AHEAD_BYTES = 2 * WINDOW_BYTES
"""About how many bytes of rows may wait in the cluster's object stores for workers to take them."""
TASKS = 20_000
"""About how many tasks one execution has; it knows of all of them from its beginning."""
PICK, PLACE, PARTNER = "\x1fpick", "\x1fplace", "\x1fpartner"
"""Columns of a block: which pick the row is, where it goes among its worker's rows of the window and, where rows are mixed, where the row
goes that it is mixed with. No column of data is called so."""


@dataclass(frozen=True)
class ReadPlan:
    """What the tasks that read the epochs from `first`, from its batch number `start` on, to `last` have to do, for all workers. Tasks are
    numbered from 0; each reads some chunks that follow each other in the sequence of its epoch. sampler: that of any worker."""

    sampler: Sampler
    first: int
    last: int
    start: int
    read_bytes: int = READ_BYTES
    ahead_bytes: int = AHEAD_BYTES

    @cached_property
    def chunks(self) -> int:
        """Read by a task."""
        split = self.sampler.split
        return max(1, self.read_bytes * len(split.chunks) // max(1, len(split) * split.row_bytes))

    @cached_property
    def tasks_of_epoch(self) -> int:
        return -(-len(self.sampler.split.chunks) // self.chunks)

    @cached_property
    def left_out(self) -> int:
        """Tasks of the first epoch of which nothing is needed."""
        if self.start >= self.sampler.order.batches:
            return self.tasks_of_epoch
        return int(np.searchsorted(self.sampler.order.borders(self.first), self._begin(self.first), side="right") - 1) // self.chunks

    def __len__(self) -> int:
        return max(0, (self.last - self.first + 1) * self.tasks_of_epoch - self.left_out)

    def interval(self, task: int) -> tuple[int, int, int]:
        """The epoch of a task, and where in its sequence the rows lie, from and up to."""
        passed, number = divmod(task + self.left_out, self.tasks_of_epoch)
        epoch, chunk = self.first + passed, number * self.chunks
        borders = self.sampler.order.borders(epoch)
        return epoch, max(int(borders[chunk]), self._begin(epoch)), int(borders[min(chunk + self.chunks, len(borders) - 1)])

    def windows(self) -> Iterator[tuple[int, int, int]]:
        """(epoch, window, its first batches that are left out) for all that is read."""
        for epoch in range(self.first, self.last + 1):
            for window, skipped in self.sampler.order.windows_from(self._start(epoch)):
                yield epoch, window, skipped

    def counts(self) -> Iterator[tuple[int, int]]:
        """(rank, rows that it gets) for one window after the other: the order in which the tasks' rows come."""
        samplers = [replace(self.sampler, rank=rank) for rank in range(self.sampler.world)]
        for window in self.windows():
            yield from ((sampler.rank, sampler.needed(*window)) for sampler in samplers)

    def skipped(self, epoch: int, window: int) -> int:
        """How many of the window's first batches are left out."""
        first, batches = divmod(self._start(epoch), self.sampler.order.window)
        return batches if window == first else 0

    def _start(self, epoch: int) -> int:
        return self.start if epoch == self.first else 0

    def _begin(self, epoch: int) -> int:
        """Where in the sequence the first window begins that is read."""
        order = self.sampler.order
        return self._start(epoch) // order.window * order.window * order.batch_size


class WindowRows(NamedTuple):
    """Rows that one worker gets of a task, for one window."""

    picks: np.ndarray
    """int64 (n,), as they follow each other in the sequence."""
    places: np.ndarray
    """Where each goes among the worker's rows of the window, int64 (n,)."""
    partners: np.ndarray | None
    """Where the row that each is mixed with goes, where rows are mixed, int64 (n,)."""

    def part(self, some: slice | np.ndarray) -> WindowRows:
        return WindowRows(self.picks[some], self.places[some], None if self.partners is None else self.partners[some])


class Reader:
    """What a task of Ray Data does: read its chunks, augment their rows, and hand them over, worker after worker."""

    def __init__(self, plan: ReadPlan, offset: int = 0) -> None:
        """offset: of the tasks' numbers."""
        self.plan, self.offset = plan, offset

    def __call__(self, task: dict[str, np.ndarray]) -> Iterator[pa.Table]:
        epoch, begin, end = self.plan.interval(int(task["id"][0]) + self.offset)
        pieces = list(self._pieces(epoch, begin, end))
        if not pieces:
            return
        split = self.plan.sampler.split
        values = _Values(split, row_of(np.concatenate([piece.picks for piece in pieces])))
        step = max(1, AUGMENT_BYTES // split.row_bytes)
        for piece in pieces:
            for start in range(0, len(piece.picks), step):
                yield self._block(values, piece.part(slice(start, start + step)), epoch)

    def _pieces(self, epoch: int, begin: int, end: int) -> Iterator[WindowRows]:
        """What of an interval of the sequence goes to whom, in the sequence's order."""
        size = self.plan.sampler.order.window * self.plan.sampler.order.batch_size
        for window in range(begin // size, -(-end // size)):
            start = window * size
            yield from self._pieces_of_window(epoch, window, max(begin, start) - start, min(end, start + size) - start)

    def _pieces_of_window(self, epoch: int, window: int, begin: int, end: int) -> Iterator[WindowRows]:
        sampler = self.plan.sampler
        bounds = sampler.order.bounds(window)
        low, high = int(np.searchsorted(bounds, begin, side="right")) - 1, int(np.searchsorted(bounds, end))
        found = sampler.order.arranged(epoch, window, low, high)
        partners = sampler.order.partners(epoch, found) if sampler.mixes else None
        wanted = sampler.wanted(found, partners, self.plan.skipped(epoch, window))
        number = np.arange(len(wanted)) + bounds[low]
        wanted &= (number >= begin) & (number < end)
        for rank in range(sampler.world):
            first, last = np.searchsorted(found.lane, lanes(rank, sampler.world))
            some = np.flatnonzero(wanted[first:last]) + first
            if len(some):
                worker = replace(sampler, rank=rank)
                others = None if partners is None else worker.destinations(found.places[partners[some]])
                yield WindowRows(found.picks[some], worker.destinations(found.places[some]), others)

    def _block(self, values: _Values, piece: WindowRows, epoch: int) -> pa.Table:
        sampler = self.plan.sampler
        rows = values.of(row_of(piece.picks))
        if sampler.augmentations:
            rows |= _augmented(sampler, rows, piece.picks, epoch)
        table = as_table(sampler.split.signature, rows)
        table = table.append_column(PICK, column_of(piece.picks)).append_column(PLACE, column_of(piece.places))
        return table if piece.partners is None else table.append_column(PARTNER, column_of(piece.partners))


def _augmented(sampler: Sampler, rows: Rows, picks: np.ndarray, epoch: int) -> Rows:
    """The inputs."""
    import torch

    torch.set_num_threads(1)  # Ray gave this task one CPU
    inputs = {feature.name: torch.from_numpy(rows[feature.name]) for feature in sampler.split.signature.inputs}
    return _arrays(sampler.augmented(inputs, picks, epoch))


class _Values:
    """The chunks in which some rows lie, read."""

    def __init__(self, split: Split, rows: np.ndarray) -> None:
        self.starts = split.starts
        used = np.unique(self._chunk(rows))
        self.values = split.read([split.chunks[index] for index in used])
        sizes = np.array([split.chunks[index].rows for index in used])
        self.shift = np.zeros(len(self.starts), dtype=np.int64)
        self.shift[used] = np.cumsum(sizes) - sizes - self.starts[used]

    def of(self, rows: np.ndarray) -> Rows:
        """These rows of the split, copied."""
        place = rows + self.shift[self._chunk(rows)]
        return {name: values[place] for name, values in self.values.items()}

    def _chunk(self, rows: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.starts, rows, side="right") - 1


def _arrays(tensors: Mapping[str, Tensor]) -> Rows:
    return {name: values.numpy() for name, values in tensors.items()}


class BlockRows(NamedTuple):
    """Rows of one worker in a block, of one window."""

    block: Any
    """A reference of Ray's."""
    begin: int
    end: int


class Dealer:
    """Whom all workers take their rows from: one execution of Ray Data, whatever the number of workers, so that no chunk is read for
    two of them and each node's CPUs are shared out once. A block says by its place in the order whose it is, so that the dealer,
    who hands out references, never sees a row. A worker that takes nothing holds Ray Data up, which bounds what is read ahead; workers
    step together, so none is more than a window ahead of another."""

    def __init__(self, plan: ReadPlan) -> None:
        self.plan, self.parts = plan, [deque[BlockRows]() for _ in range(plan.sampler.world)]
        self.given: list[list[BlockRows]] = [[] for _ in self.parts]
        self.counts, self.rank, self.left = plan.counts(), 0, 0
        self.blocks = self._blocks()
        self.lock = threading.Lock()
        self._next_count()

    def take(self, rank: int) -> list[BlockRows]:
        """What there is for a worker, in order; waits until there is something. Raises DloptError when a file is damaged.

        It is held on to until the worker asks for more: a process that gives back one reference to a block while another one to it is
        on its way would be left without (Ray's ReferenceCountingAssertionError).
        """
        parts = self.parts[rank]
        while not parts:
            with self.lock:
                if not parts:
                    self._deal(*self._next_block())
        self.given[rank] = [parts.popleft() for _ in range(len(parts))]
        return self.given[rank]

    def _next_block(self) -> tuple[Any, int]:
        try:
            return next(self.blocks)
        except DloptError as error:  # of a task: its trace and Ray's advice are of no use to who can mend it
            raise DloptError(str(getattr(error, "cause", error)).splitlines()[0]) from None

    def _deal(self, block: Any, rows: int) -> None:
        """Rows of a block are those that the order has next."""
        begin = 0
        while begin < rows:
            end = min(rows, begin + self.left)
            self.parts[self.rank].append(BlockRows(block, begin, end))
            self.left -= end - begin
            begin = end
            self._next_count()

    def _next_count(self) -> None:
        """Whose rows come next; after the last, Ray Data's execution ends."""
        while not self.left:
            self.rank, self.left = next(self.counts, (0, -1))
        if self.left < 0:
            for _ in self.blocks:
                pass

    def _blocks(self) -> Iterator[tuple[Any, int]]:
        """(reference, rows) of what the tasks hand over, in their order."""
        import ray

        shared = ray.put(self.plan)
        for offset in range(0, len(self.plan), TASKS):
            for bundle in _executed(self.plan, SharedReader(shared, offset), min(TASKS, len(self.plan) - offset)):
                yield from ((entry.ref, entry.metadata.num_rows) for entry in bundle.blocks)


class DealerProcess(Dealer):
    """A dealer in an actor of Ray. Ray Data's execution, collected after Ray has gone, would start Ray anew and wait for ever: the
    process ends without that."""

    def __init__(self, plan: ReadPlan) -> None:
        atexit.register(os._exit, 0)
        super().__init__(plan)


class SharedReader:
    """A `Reader` whose plan lies in the object store: it may be of a million chunks, or hold the class of every row, so a process of Ray's
    loads it once, not for each of its tasks."""

    loaded: ClassVar[dict[str, ReadPlan]] = {}
    """Of this process: the plan that it works on, by its reference."""

    def __init__(self, plan: Any, offset: int) -> None:
        """plan: a reference of Ray's."""
        self.plan, self.offset = plan, offset

    def __call__(self, task: dict[str, np.ndarray]) -> Iterator[pa.Table]:
        import ray

        name = self.plan.hex()
        if name not in self.loaded:
            self.loaded.clear()
            self.loaded[name] = ray.get(self.plan)
        return Reader(self.loaded[name], self.offset)(task)


def _executed(plan: ReadPlan, reader: SharedReader, tasks: int) -> Iterator[Any]:
    """Ray Data's bundles of blocks."""
    import ray.data

    data_context(preserve_order=True, block_bytes=max(1, plan.read_bytes // BLOCKS))
    options = ray.data.DataContext.get_current().execution_options
    before = options.resource_limits
    options.resource_limits = ray.data.ExecutionResources(object_store_memory=plan.ahead_bytes)
    try:
        dataset = ray.data.range(tasks, override_num_blocks=tasks).map_batches(reader, batch_size=1)
        return iter(dataset.iter_internal_ref_bundles())
    finally:
        options.resource_limits = before
