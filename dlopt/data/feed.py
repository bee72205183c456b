"""Two feeds, one order: `Resident` gathers batches from memory; `Stream` lets Ray Data read, shuffle and augment ahead,
across the cluster's CPUs, while training runs. Both give each worker the same rows of the same batches, to the bit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from dlopt.data.prepared import as_rows, empty_rows
from dlopt.data.share import BLOCK_BYTES, EPOCH, WINDOW, Reader, Share
from dlopt.part import DloptError
from dlopt.session import data_context


class Batch(NamedTuple):
    """One worker's share of a batch."""

    inputs: dict[str, Tensor]
    """Feature name to values (rows, *shape)."""
    target: Tensor
    """Class indices, int64 (rows,)."""
    total: int
    """Rows of the whole batch, over all workers."""


class Feed(Protocol):
    """Gives a worker its share of every batch of an epoch; epochs are numbered from 1 and asked for in order."""

    def epoch(self, epoch: int) -> Iterator[Batch]: ...


class Resident:
    """The whole split in memory, gathered by index."""

    def __init__(self, share: Share, device: torch.device) -> None:
        self.share, self.device = share, device
        self.values = {name: torch.from_numpy(values.copy()).to(device) for name, values in share.split.read().items()}

    def epoch(self, epoch: int) -> Iterator[Batch]:
        order = self.share.order
        sizes = iter(self.share.sizes())
        for window in range(order.windows):
            rows = self.share.rows(epoch, window)
            done = 0
            for mine, total in itertools.islice(sizes, order.window):
                yield self._gather(rows[done : done + mine], epoch, total)
                done += mine

    def _gather(self, rows: np.ndarray, epoch: int, total: int) -> Batch:
        index = torch.from_numpy(rows).to(self.device)
        values = {name: tensor.index_select(0, index) for name, tensor in self.values.items()}  # ten times as fast as tensor[index]
        for name in self.share.augmented_inputs:
            values[name] = self.share.augmented(values[name], rows, epoch)
        return Batch(values, values.pop(self.share.split.signature.target.name), total)


class Stream:
    """Blocks from Ray Data, cut into batches. One execution covers all epochs from `first` to `last`, so that the next
    epoch is being read while this one ends."""

    def __init__(self, share: Share, first: int, last: int, device: torch.device) -> None:
        import ray.data

        data_context(preserve_order=True, block_bytes=BLOCK_BYTES)
        tasks = [{EPOCH: epoch, WINDOW: window} for epoch in range(first, last + 1) for window in range(share.order.windows)]
        self.share, self.device, self.next = share, device, first
        self.rest = pa.table({})
        self.blocks: Iterator[pa.Table] = iter(())
        if tasks:
            dataset = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map_batches(Reader(share), batch_size=1)
            self.blocks = iter(dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=4))

    def epoch(self, epoch: int) -> Iterator[Batch]:
        if epoch != self.next:
            raise ValueError(f"a stream gives its epochs in order: epoch {self.next} is next, not {epoch}")
        self.next += 1
        for mine, total in self.share.sizes():
            yield self._batch(self._take(mine), total)

    def _take(self, rows: int) -> list[pa.Table]:
        """The next rows, whatever blocks they came in."""
        taken = []
        while rows:
            if not len(self.rest):
                self.rest = self._next_block()
            part, self.rest = self.rest.slice(0, rows), self.rest.slice(rows)
            rows -= len(part)
            taken.append(part)
        return taken

    def _next_block(self) -> pa.Table:
        try:
            return next(self.blocks)
        except DloptError as error:  # of a worker: its trace and Ray's advice are of no use to who can mend it
            raise DloptError(str(getattr(error, "cause", error)).splitlines()[0]) from None

    def _batch(self, tables: list[pa.Table], total: int) -> Batch:
        signature = self.share.split.signature
        parts = [as_rows(signature, table) for table in tables] or [empty_rows(signature)]
        values = {name: torch.from_numpy(np.concatenate([part[name] for part in parts])).to(self.device) for name in parts[0]}
        return Batch(values, values.pop(signature.target.name), total)
