"""Rows of many requests in one run of the model: an idle server answers at once, a busy one fills batches."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from dlopt.serve.exchange import Refusal

Tensors = dict[str, np.ndarray]

INLINE_SECONDS = 0.001
"""A run that is expected to be shorter happens on the event loop: a thread would cost more than it frees."""
SWEEP_SECONDS = 0.25
"""How often requests that have waited too long are looked for."""


class Waiting:
    """A request that waits for the model."""

    __slots__ = ("answer", "rows", "since", "tensors")

    def __init__(self, tensors: Tensors, rows: int, answer: asyncio.Future[Any], since: float) -> None:
        self.tensors, self.rows, self.answer, self.since = tensors, rows, answer, since

    def fail(self, error: Exception) -> None:
        """Unless its client has gone."""
        if not self.answer.done():
            self.answer.set_exception(error)


class Rows(Protocol):
    """What a run gives: an array of as many rows as it was given, or whatever can be sliced like one."""

    def __len__(self) -> int: ...
    def __getitem__(self, rows: slice) -> Any: ...


T = TypeVar("T", bound=Rows)


class Batcher(Generic[T]):
    """Runs the model for all requests that are there when its turn comes: a short run at once, on the event loop, for all that came in
    with the same look at the network; a long one in a thread, where all that arrives meanwhile makes up the next. So batches grow with
    the load, and no request ever waits for a batch to fill.

    max_batch: rows of a batch. latency_target: nor does a batch take more rows than run in so many seconds. request_seconds: who has
    waited longer gets a 503. observe: is told of each run its rows, its seconds, and the seconds that each of its requests waited.
    seconds_per_row: what is known of the model before its first run; without it that run is in a thread.
    """

    def __init__(
        self,
        run: Callable[[Tensors], T],
        max_batch: int,
        observe: Callable[[int, float, list[float]], None],
        latency_target: float = 0.1,
        request_seconds: float = 30.0,
        seconds_per_row: float = INLINE_SECONDS,
    ) -> None:
        self.run, self.max_batch, self.observe = run, max_batch, observe
        self.latency_target, self.request_seconds = latency_target, request_seconds
        self.waiting: deque[Waiting] = deque()
        self.running: list[Waiting] = []
        self.worker: asyncio.Task[None] | None = None
        self.seconds_per_row = seconds_per_row
        self.due = False
        self.sweep: asyncio.TimerHandle | None = None

    async def __call__(self, tensors: Tensors) -> T:
        loop = asyncio.get_running_loop()
        one = Waiting(tensors, rows_in(tensors), loop.create_future(), time.perf_counter())
        self.waiting.append(one)
        if self.worker is None and not self.due:
            self.due = True
            loop.call_soon(self._turn)
        return await one.answer

    def _turn(self) -> None:
        """Run what waits: after all that the event loop had to do already has been done."""
        self.due = False
        if self.worker is not None or not (batch := self._take()):
            return
        if sum(one.rows for one in batch) * self.seconds_per_row < INLINE_SECONDS:
            self._answer(batch, self._tried(batch))
            if self.waiting:
                self.due = True
                asyncio.get_running_loop().call_soon(self._turn)
        else:
            self.worker = asyncio.create_task(self._work(batch))
            if self.sweep is None:
                self._sweep()

    async def _work(self, batch: list[Waiting]) -> None:
        try:
            while batch:
                self.running = batch
                self._answer(batch, await asyncio.to_thread(self._tried, batch))
                batch = self._take()
        finally:
            self.worker, self.running = None, []

    def _take(self) -> list[Waiting]:
        """The next requests whose rows fit into one batch, at least one; those whose clients have gone are dropped."""
        most = min(self.max_batch, int(self.latency_target / max(self.seconds_per_row, 1e-9)))
        batch: list[Waiting] = []
        rows = 0
        while self.waiting and (not batch or rows + self.waiting[0].rows <= most):
            one = self.waiting.popleft()
            if not one.answer.done():
                batch.append(one)
                rows += one.rows
        return batch

    def _tried(self, batch: list[Waiting]) -> list[T | Exception]:
        """What each request gets; one's failure is not its neighbours'."""
        try:
            outputs = self._timed(batch)
        except Exception as error:
            return [error] if len(batch) == 1 else list(chain.from_iterable(self._tried([one]) for one in batch))
        if len(batch) == 1:
            return [outputs]
        parts: list[T | Exception] = []
        start = 0
        for one in batch:
            parts.append(outputs[start : start + one.rows])
            start += one.rows
        return parts

    def _timed(self, batch: list[Waiting]) -> T:
        tensors = joined([one.tensors for one in batch])
        start = time.perf_counter()
        outputs = self.run(tensors)
        seconds, rows = time.perf_counter() - start, len(outputs)
        self.seconds_per_row += 0.1 * (seconds / max(rows, 1) - self.seconds_per_row)
        self.observe(rows, seconds, [start - one.since for one in batch])
        return outputs

    def _answer(self, batch: list[Waiting], parts: Iterable[T | Exception]) -> None:
        for one, part in zip(batch, parts, strict=True):
            if isinstance(part, Exception):
                one.fail(part)
            elif not one.answer.done():
                one.answer.set_result(part)

    def _sweep(self) -> None:
        """Answer those who have waited too long, be the model stuck; goes on while anybody waits."""
        late = time.perf_counter() - self.request_seconds
        for one in chain(self.running, self.waiting):
            if one.since < late:
                one.fail(Refusal(503, f"no answer within {self.request_seconds:g} seconds (serve.request_seconds)", "timeout"))
        again = self.worker is not None
        self.sweep = asyncio.get_running_loop().call_later(SWEEP_SECONDS, self._sweep) if again else None


def rows_in(tensors: Tensors) -> int:
    """How many rows tensors have."""
    return len(next(iter(tensors.values())))


def joined(parts: list[Tensors]) -> Tensors:
    """Rows of several requests below each other."""
    if len(parts) == 1:
        return parts[0]
    return {name: _stacked([tensors[name] for tensors in parts]) for name in parts[0]}


def _stacked(parts: list[np.ndarray]) -> np.ndarray:
    """Rows of all parts. Texts, which are as long as their request's longest one, are filled up with 0, which is padding."""
    lengths = {part.shape[1] for part in parts}
    if len(lengths) > 1:
        longest = max(lengths)
        parts = [np.pad(part, ((0, 0), (0, longest - part.shape[1]))) for part in parts]
    return np.concatenate(parts)
