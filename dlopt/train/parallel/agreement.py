"""What workers must decide alike between two steps, though only one of them may know of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist

from dlopt.train.cluster.stopping import Reason

Made = TypeVar("Made")
REASONS: tuple[Reason | None, ...] = (None, "preempted", "stop")
"""The later, the stronger."""


class Agreed(NamedTuple):
    """The same on all workers."""

    stop: Reason | None
    """Why training is to end here, if it is."""
    checkpoint: bool
    """Whether worker 0 wants one, by its clock."""
    busy: tuple[float, ...]
    """How many seconds each worker has computed since the last time."""


class Agreement:
    """One small all-reduce about twice a second, at steps that all workers know from the one before; nothing in between."""

    SECONDS = 0.5

    def __init__(self, rank: int, world: int, device: torch.device, step: int = 0) -> None:
        self.rank, self.world, self.device = rank, world, device
        self.next = self.step = step
        self.time = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether to exchange after this step; every worker gets the same answer."""
        return step >= self.next if self.world > 1 else time.monotonic() - self.time >= self.SECONDS

    def exchange(self, step: int, stop: Reason | None, checkpoint: bool, busy: float) -> Agreed:
        """Tell the others and hear what they tell."""
        seconds, steps = time.monotonic() - self.time, step - self.step
        self.time, self.step = time.monotonic(), step
        told = torch.zeros(3 + self.world, dtype=torch.float64)
        told[0], told[3 + self.rank] = REASONS.index(stop), busy
        if self.rank == 0:
            told[1], told[2] = checkpoint, step + max(1, int(steps / max(seconds, 1e-9) * self.SECONDS))
        if self.world > 1:
            told = told.to(self.device)
            dist.all_reduce(told, dist.ReduceOp.MAX)
        reason, wanted, following, *each = told.tolist()
        self.next = int(following)
        return Agreed(REASONS[int(reason)], bool(wanted), tuple(each))


def patiently(work: Callable[[], Made], world: int, device: torch.device) -> Made:
    """What `work` gives on this worker, however long it takes on any of them: a thread tells the others every second that it still does, so
    that no exchange waits longer. All call it at once; work exchanges nothing."""
    if world == 1:
        return work()
    done = threading.Event()
    with ThreadPoolExecutor(1, "dlopt-patient") as pool:  # not for the work: libraries keep memory for each thread that computes
        others = pool.submit(_until_all, done, world, device)
        try:
            result = work()
        finally:
            done.set()
        others.result()
    return result


def _until_all(done: threading.Event, world: int, device: torch.device) -> None:
    while not agreed(done.wait(1.0), world, device):
        pass


def agreed(here: bool, world: int, device: torch.device) -> bool:
    """Whether all say so. All call it at once."""
    if world == 1:
        return here
    said = torch.tensor(int(here), device=device)
    dist.all_reduce(said, dist.ReduceOp.MIN)
    return bool(said.item())
