"""Two feeds, one order: `Resident` gathers batches from memory; `Stream` lets Ray Data read, shuffle and augment ahead,
across the cluster's CPUs, while training runs. Both give each worker the same rows of the same batches, to the bit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from dlopt.data.order import row_of
from dlopt.data.prepared import Rows, array_of, as_rows, empty_rows
from dlopt.data.share import BLOCK_BYTES, EPOCH, KEPT, PARTNER, ROW, START, WINDOW, Reader, Share
from dlopt.part import DloptError, Feature, Signature
from dlopt.session import data_context


class Mixed(NamedTuple):
    """What a batch of rows is mixed with."""

    target: Tensor
    """The second target of each row, like the first."""
    share: Tensor
    """How much of each row is of the first target, float32 (rows,) in [0, 1]."""


class Batch(NamedTuple):
    """One worker's share of a batch."""

    inputs: dict[str, Tensor]
    """Feature name to values (rows, *shape); texts only as wide as the longest of them."""
    target: Tensor
    """Class indices int64 (rows,), labels uint8 (rows, labels), or numbers float32 (rows, numbers)."""
    total: int
    """Rows of the whole batch, over all workers."""
    mixed: Mixed | None = None
    """Where augmentation mixes rows: with what, and how much."""
    part: float = 1.0
    """The share of the worker's rows of the batch that this is, where gradients are accumulated."""
    rows: np.ndarray | None = None
    """Which rows of the split a feed delivered, int64 (rows,): how the order can be told afterwards. The batches of all workers, by rank,
    are the order of the whole batch."""


class Feed(Protocol):
    """Gives a worker its share of every batch of an epoch, from batch number `start` on; epochs are numbered from 1 and asked for in
    order, batches are numbered from 0."""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]: ...


class Resident:
    """The whole split in memory, gathered by index."""

    def __init__(self, share: Share, device: torch.device) -> None:
        self.share, self.device = share, device
        self.values = {name: torch.from_numpy(values.copy()).to(device) for name, values in share.split.read().items()}

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        order = self.share.order
        sizes = iter(self.share.sizes()[start:])
        for window, skipped in order.windows_from(start):
            picks, partners = self.share.picks(epoch, window, skipped)
            done = 0
            for mine, total in itertools.islice(sizes, order.window - skipped):
                part = slice(done, done + mine)
                yield self._batch(picks[part], None if partners is None else partners[part], epoch, total)
                done += mine

    def _batch(self, picks: np.ndarray, partners: np.ndarray | None, epoch: int, total: int) -> Batch:
        inputs, target = self._gather(picks, epoch)
        mixed = None
        if partners is not None:
            theirs, their_target = self._gather(partners, epoch)
            inputs, share = self.share.mixed(inputs, theirs, picks, epoch)
            mixed = Mixed(their_target, share.to(self.device))
        return Batch(shortened(inputs, self.share.split.signature.inputs), target, total, mixed, rows=row_of(picks))

    def _gather(self, picks: np.ndarray, epoch: int) -> tuple[dict[str, Tensor], Tensor]:
        """Augmented inputs and the target of some picks."""
        index = torch.from_numpy(row_of(picks)).to(self.device)
        values = {name: tensor.index_select(0, index) for name, tensor in self.values.items()}  # ten times as fast as tensor[index]
        target = values.pop(self.share.split.signature.target.name)
        return self.share.augmented(values, picks, epoch), target


class Stream:
    """Blocks from Ray Data, cut into batches. One execution covers all epochs from `first`, of which it reads no batch before number
    `start`, to `last`, so that the next epoch is being read while this one ends."""

    def __init__(self, share: Share, first: int, last: int, device: torch.device, start: int = 0) -> None:
        import ray.data

        data_context(preserve_order=True, block_bytes=BLOCK_BYTES)
        tasks = [
            {EPOCH: epoch, WINDOW: window, START: skipped}
            for epoch in range(first, last + 1)
            for window, skipped in share.order.windows_from(start if epoch == first else 0)
        ]
        self.share, self.device, self.next = share, device, (first, start)
        self.rest = pa.table({})
        self.blocks: Iterator[pa.Table] = iter(())
        if tasks:
            dataset = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map_batches(Reader(share), batch_size=1)
            self.blocks = iter(dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=4))

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        if (epoch, start) != self.next:
            raise ValueError(f"a stream gives its epochs in order: epoch {self.next[0]} from batch {self.next[1]} is next")
        self.next = (epoch + 1, 0)
        for mine, total in self.share.sizes()[start:]:
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
        parts = [_block_rows(signature, table) for table in tables] or [_no_rows(signature, self.share.mixes)]
        rows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        ids = rows.pop(ROW)
        values = {name: _moved(torch.from_numpy(array), self.device) for name, array in rows.items()}
        mixed = Mixed(values.pop(PARTNER), values.pop(KEPT)) if self.share.mixes else None
        target = values.pop(signature.target.name)
        return Batch(shortened(values, signature.inputs), target, total, mixed, rows=ids)


def shortened(inputs: Mapping[str, Tensor], features: Sequence[Feature]) -> dict[str, Tensor]:
    """Inputs, texts without the columns in which all rows have padding; one column stays."""
    found = dict(inputs)
    for feature in features:
        if feature.kind == "text":
            longest = int((inputs[feature.name] != 0).any(dim=0).sum())
            found[feature.name] = inputs[feature.name][:, : max(1, longest)].contiguous()
    return found


def _block_rows(signature: Signature, table: pa.Table) -> Rows:
    """The arrays of a block, which rows of the split they are and what they are mixed with included."""
    rows = as_rows(signature, table) | {ROW: table[ROW].to_numpy()}
    if PARTNER in table.column_names:
        rows[PARTNER] = array_of(table[PARTNER], signature.target.stored, signature.target.shape)
        rows[KEPT] = array_of(table[KEPT], "float32", ())
    return rows


def _no_rows(signature: Signature, mixes: bool) -> Rows:
    rows = empty_rows(signature) | {ROW: np.zeros(0, dtype=np.int64)}
    return rows | {PARTNER: rows[signature.target.name], KEPT: np.zeros(0, dtype=np.float32)} if mixes else rows


def _moved(values: Tensor, device: torch.device) -> Tensor:
    """On the device; a copy to a GPU does not wait."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)
