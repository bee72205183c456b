"""How fast training goes and what it waits for: a line about every second in speed.jsonl."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dlopt.data.feed.batches import Batch
from dlopt.models.clock import Clock, waits
from dlopt.train.checkpoint.state import Record
from dlopt.train.loop.objectives import Losses, Objective
from dlopt.train.watch.metrics_log import SPEED, MetricsWriter


class Pace:
    """One worker's clocks. Worker 0 writes them down."""

    SECONDS = 1.0
    """Between two lines."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.device, self.waited = device or torch.device("cpu"), 0.0
        self.forward, self.others = Clock(), Clock()
        self._computed = 0.0

    def waiting(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches, and how long they let wait is counted in `waited`."""
        feed = iter(batches)
        while True:
            began = time.perf_counter()
            try:
                batch = next(feed)
            except StopIteration:
                return
            finally:
                self.waited += time.perf_counter() - began
            yield batch

    def timed(self, objective: Objective) -> Objective:
        """The objective, and how long its forward passes take is counted in `computed`."""

        def timed(model: nn.Module, batch: Batch) -> Losses:
            waits.append(self.others)
            try:
                with self.forward.running(self.device):
                    return objective(model, batch)
            finally:
                waits.pop()

        return timed

    @property
    def computed(self) -> float:
        """Seconds of forward passes, but for what they have waited for other workers."""
        return self.forward.seconds - self.others.seconds

    def lap(self) -> float:
        """Seconds computed since the last time this was asked."""
        now = self.computed
        busy, self._computed = now - self._computed, now
        return busy


class Slowest:
    """Finds a worker that is slower than the others time after time. With one worker there is none, with two the slower one."""

    FACTOR, LAPS = 2.0, 4
    """So many times as slow as the middle of the others, in so many laps in a row."""

    def __init__(self, hosts: list[str]) -> None:
        self.hosts = hosts
        self.rank, self.laps = 0, 0

    def lap(self, busy: tuple[float, ...]) -> dict[str, Any] | None:
        """Take note of the seconds of each worker; {rank, host, times}, or None."""
        if len(busy) < 2:
            return None
        rank = max(range(len(busy)), key=busy.__getitem__)
        times = busy[rank] / max(statistics.median(busy[:rank] + busy[rank + 1 :]), 1e-9)
        slow = times >= self.FACTOR
        self.laps = (self.laps + 1 if rank == self.rank else 1) if slow else 0
        self.rank = rank
        return {"rank": rank, "host": self.hosts[rank], "times": round(times, 2)} if self.laps >= self.LAPS else None


class SpeedLog:
    """speed.jsonl."""

    def __init__(self, out: Path, record: Record, hosts: list[str]) -> None:
        self.log = MetricsWriter(out, record.epoch, record.step, SPEED)
        self.slowest = Slowest(hosts)
        self.slow: dict[str, Any] | None = None
        self.began = self.time = time.monotonic()
        self.step, self.rows, self.waited = record.step, record.rows, 0.0

    def lap(self, record: Record, pace: Pace, busy: tuple[float, ...], checkpoints: Mapping[str, float]) -> None:
        """Write a line if it is time for one. checkpoints: what their writer tells of them."""
        self.slow = self.slowest.lap(busy)
        seconds = time.monotonic() - self.time
        if seconds < Pace.SECONDS and self.time != self.began:
            return
        steps, rows = max(0, record.step - self.step), max(0, record.rows - self.rows)
        self.log.write(
            step=record.step,
            epoch=record.epoch + 1,
            rows=record.rows,
            time=round(time.time(), 3),
            rows_per_second=round(rows / seconds, 1),
            step_seconds=round(seconds / steps, 6) if steps else None,
            data_wait=round(min(1.0, (pace.waited - self.waited) / seconds), 4),
            **checkpoints,
            workers=len(busy),
            slow=self.slow,
        )
        self.log.flush()
        self.time, self.step, self.rows, self.waited = time.monotonic(), record.step, record.rows, pace.waited

    def close(self) -> None:
        self.log.close()
