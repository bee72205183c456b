"""Two feeds, one order: `Resident` gathers batches from memory; `Stream` lets Ray Data read, shuffle and augment ahead,
across the cluster's CPUs, while training runs. Both give each worker the same rows of the same batches, to the bit."""

from __future__ import annotations

import itertools
import math
import uuid
import weakref
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor

from dlopt.data.feed.dealer import PARTNER, PICK, PLACE, BlockRows, DealerProcess, ReadPlan
from dlopt.data.feed.order import row_of
from dlopt.data.feed.sampler import Sampler
from dlopt.data.prepared import Rows, as_rows, empty_rows
from dlopt.part import DloptError, Feature, Signature


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
    first: int = 0
    """The place in the whole batch of its first row; the others follow."""
    most: int = 0
    """Rows of the worker that has the most of the batch; 0 where that is this one."""
    rows: np.ndarray | None = None
    """Which rows of the split a feed delivered, int64 (rows,): how the order can be told afterwards. The batches of all workers, by rank,
    are the order of the whole batch."""


class Feed(Protocol):
    """Gives a worker its share of every batch of an epoch, from batch number `start` on; epochs are numbered from 1 and asked for in
    order, batches are numbered from 0."""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]: ...


class Resident:
    """The whole split in memory, gathered by index. Each worker has all of it, since in every epoch any row can be any worker's: what is
    too large for that is streamed (`resources.resident_bytes`).

    Texts stay in the memory of the host until they are cut, for which it must know how long they are."""

    def __init__(self, sampler: Sampler, device: torch.device) -> None:
        self.sampler, self.device = sampler, device
        texts = {feature.name for feature in sampler.split.signature.inputs if feature.holds == "tokens"}
        read = {name: torch.from_numpy(values.copy()) for name, values in sampler.split.read().items()}
        self.values = {name: values if name in texts else values.to(device) for name, values in read.items()}

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        order = self.sampler.order
        sizes, (low, _) = iter(self.sampler.sizes()[start:]), order.slots(self.sampler.rank, self.sampler.world)
        for window, skipped in order.windows_from(start):
            picks, partners = self.sampler.picks(epoch, window, skipped)
            done = 0
            for mine, total in itertools.islice(sizes, order.window - skipped):
                part = slice(done, done + mine)
                batch = self._batch(picks[part], None if partners is None else partners[part], epoch, total)
                yield batch._replace(first=low, most=order.most(total, self.sampler.world))
                done += mine

    def _batch(self, picks: np.ndarray, partners: np.ndarray | None, epoch: int, total: int) -> Batch:
        inputs, target = self._gather(picks, epoch)
        mixed = None
        if partners is not None:
            theirs, their_target = self._gather(partners, epoch)
            inputs, share = self.sampler.mixed(inputs, theirs, picks, epoch)
            mixed = Mixed(their_target, moved(share, self.device))
        cut = shortened(inputs, self.sampler.split.signature.inputs)
        there = {name: moved(values, self.device) for name, values in cut.items()}
        return Batch(there, target, total, mixed, rows=row_of(picks))

    def _gather(self, picks: np.ndarray, epoch: int) -> tuple[dict[str, Tensor], Tensor]:
        """Augmented inputs and the target of some picks."""
        index = torch.from_numpy(row_of(picks))
        places = {torch.device("cpu"): index, self.device: moved(index, self.device)}
        # index_select is ten times as fast as tensor[index]
        values = {name: tensor.index_select(0, places[tensor.device]) for name, tensor in self.values.items()}
        target = values.pop(self.sampler.split.signature.target.name)
        return self.sampler.augmented(values, picks, epoch), target


class Stream:
    """Rows from a `Dealer`, put in order a window ahead by a thread, so that a batch is a slice of what is there. One dealer covers all
    epochs from `first`, of which nothing is read that only batches before number `start` have, to `last`, so that the next epoch is being
    read while this one ends."""

    def __init__(
        self, sampler: Sampler, first: int, last: int, device: torch.device, start: int = 0, dealer: Dealing | None = None
    ) -> None:
        """dealer: of all workers; without it those of the process group get one together."""
        plan = ReadPlan(sampler, first, last, start)
        self.sampler, self.device, self.next = sampler, device, (first, start)
        self.windows = plan.windows()
        self.dealer = dealer or dealer_of_group(plan)
        self.tables = self.dealer.tables(sampler.rank)
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="stream")
        self.coming = self._order_window()

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        if (epoch, start) != self.next:
            raise ValueError(f"a stream gives its epochs in order: epoch {self.next[0]} from batch {self.next[1]} is next")
        self.next = (epoch + 1, 0)
        order = self.sampler.order
        sizes = iter(self.sampler.sizes()[start:])
        low, high = order.slots(self.sampler.rank, self.sampler.world)
        for _, skipped in order.windows_from(start):
            rows, done = self._window(), skipped * (high - low)
            for mine, total in itertools.islice(sizes, order.window - skipped):
                batch = self._batch(rows, slice(done, done + mine), epoch, total)
                yield batch._replace(first=low, most=order.most(total, self.sampler.world))
                done += mine

    def _window(self) -> Rows:
        assert self.coming
        try:
            rows = self.coming.result()
        except DloptError as error:
            raise DloptError(str(getattr(error, "cause", error)).splitlines()[0]) from None
        self.coming = self._order_window()
        return rows

    def _order_window(self) -> Future[Rows] | None:
        """Begin to put together the next window, if there is one."""
        found = next(self.windows, None)
        return found and self.pool.submit(_ordered, self.tables, self.sampler, *found)

    def _batch(self, rows: Rows, part: slice, epoch: int, total: int) -> Batch:
        signature, picks = self.sampler.split.signature, rows[PICK][part]
        inputs, target, mixed = self._inputs(rows, part), torch.from_numpy(rows[signature.target.name]), None
        if PARTNER in rows:
            partners = rows[PARTNER][part]
            inputs, share = self.sampler.mixed(inputs, self._inputs(rows, partners), picks, epoch)
            mixed = Mixed(moved(target[partners], self.device), moved(share, self.device))
        cut = {name: moved(values, self.device) for name, values in shortened(inputs, signature.inputs).items()}
        return Batch(cut, moved(target[part], self.device), total, mixed, rows=row_of(picks))

    def _inputs(self, rows: Rows, some: slice | np.ndarray) -> dict[str, Tensor]:
        """On the device, but for texts, which have yet to be cut."""
        features = self.sampler.split.signature.inputs
        found = {feature.name: torch.from_numpy(rows[feature.name][some]) for feature in features}
        return {
            feature.name: found[feature.name] if feature.holds == "tokens" else moved(found[feature.name], self.device)
            for feature in features
        }


def moved(values: Tensor, device: torch.device) -> Tensor:
    """On the device; a copy to a GPU does not wait."""
    if device.type == "cuda" and values.device.type == "cpu":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


def ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The same. On an accelerator each is begun before the one before it is trained on: on a GPU beside that, in a stream of its own."""
    if device.type == "cpu":
        yield from batches
        return
    beside = torch.cuda.Stream(device) if device.type == "cuda" else None
    if beside:
        beside.wait_stream(torch.cuda.current_stream(device))
    coming = _begun(batches, beside)
    while coming is not None:
        batch = coming
        if beside:
            _arrived(batch, beside, torch.cuda.current_stream(device))
        coming = _begun(batches, beside)
        yield batch


def _begun(batches: Iterator[Batch], beside: torch.cuda.Stream | None) -> Batch | None:
    with torch.cuda.stream(beside) if beside else nullcontext():
        return next(batches, None)


def _arrived(batch: Batch, beside: torch.cuda.Stream, here: torch.cuda.Stream) -> None:
    """What comes in the stream `here` can use a batch, whose memory is not given to another one before."""
    here.wait_stream(beside)
    for values in (*batch.inputs.values(), batch.target, *(batch.mixed or ())):
        values.record_stream(here)


class Dealing(Protocol):
    """Gives a worker its rows in the order of the windows, in tables none of which has rows of two windows."""

    def tables(self, rank: int) -> Iterator[pa.Table]: ...


class RemoteDealer:
    """A dealer in a process of its own, which ends with this one or when nobody needs it any more."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    @classmethod
    def start(cls, plan: ReadPlan, name: str | None = None) -> RemoteDealer:
        """Beside this process."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        options = {"name": name, "num_cpus": 0, "max_concurrency": plan.sampler.world + 1, "scheduling_strategy": here}
        started = cls(ray.remote(DealerProcess).options(**options).remote(plan))
        weakref.finalize(started, _end, started.actor).atexit = False  # Ray ends what belongs to a process that ends
        return started

    def tables(self, rank: int) -> Iterator[pa.Table]:
        import ray

        while True:
            parts: list[BlockRows] = ray.get(self.actor.take.remote(rank))
            ray.wait(list({part.block for part in parts}), timeout=0)  # those on other nodes set out all at once
            for part in parts:
                yield ray.get(part.block).slice(part.begin, part.end - part.begin)


def dealer_of_group(plan: ReadPlan) -> RemoteDealer:
    """One for all workers of the process group; worker 0's."""
    import ray

    if plan.sampler.world == 1:
        return RemoteDealer.start(plan)
    name = [f"dlopt-dealer-{uuid.uuid4().hex}"]
    mine = RemoteDealer.start(plan, name[0]) if plan.sampler.rank == 0 else None
    dist.broadcast_object_list(name, src=0)
    return mine or RemoteDealer(ray.get_actor(name[0]))


def _end(actor: Any) -> None:
    import ray

    if ray.is_initialized():
        ray.kill(actor)


def _ordered(tables: Iterator[pa.Table], sampler: Sampler, epoch: int, window: int, start: int) -> Rows:
    """A worker's rows of a window, batch after batch; those that only batches before number `start` have are not filled in."""
    found: Rows = {}
    left = sampler.needed(epoch, window, start)
    while left:
        rows = _block_rows(sampler.split.signature, next(tables))
        places = rows.pop(PLACE)
        if not found:
            count = sampler.needed(epoch, window)
            found = {name: np.empty((count, *values.shape[1:]), values.dtype) for name, values in rows.items()}
        for name, values in rows.items():
            _as_items(found[name])[places] = _as_items(values)
        left -= len(places)
    return found or _no_rows(sampler)


def _as_items(values: np.ndarray) -> np.ndarray:
    """Values (n, ...) as n items: copying them one by one is several times as fast as numpy's way with rows."""
    size = math.prod(values.shape[1:]) * values.itemsize
    return values.reshape(len(values), -1).view(f"V{size}")[:, 0] if values.ndim > 1 else values


def _block_rows(signature: Signature, table: pa.Table) -> Rows:
    """The arrays of a block, picks and places included."""
    extra = {name: table[name].to_numpy() for name in (PICK, PLACE, PARTNER) if name in table.column_names}
    return as_rows(signature, table) | extra


def _no_rows(sampler: Sampler) -> Rows:
    none = np.zeros(0, dtype=np.int64)
    return empty_rows(sampler.split.signature) | {PICK: none} | ({PARTNER: none} if sampler.mixes else {})


def shortened(inputs: Mapping[str, Tensor], features: Sequence[Feature]) -> dict[str, Tensor]:
    """Inputs, texts without the columns in which all rows have padding; one column stays."""
    found = dict(inputs)
    for feature in features:
        if feature.holds == "tokens":
            longest = int((inputs[feature.name] != 0).any(dim=0).sum())
            found[feature.name] = inputs[feature.name][:, : max(1, longest)].contiguous()
    return found
