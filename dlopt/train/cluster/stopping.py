"""Whether training is asked to end: by a file that the driver writes, by a SIGTERM to the process of a worker, or by Ray, whose node goes
away. Knows no Ray; what does puts it in by `listen`."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Literal

Reason = Literal["stop", "preempted"]
STOP, RESIZE = "stop", "resize"
"""Files in a model's folder by which its workers are asked to save and end: for good, or since another number of them goes on."""


class Stopped(Exception):
    """Training has saved where it stands, and ends; its text says where, in a line for people."""


class Preempted(Exception):
    """Training has saved where it stands, since a worker has to go; others go on from there."""


class GaveUp(Exception):
    """Training cannot go on, for a cause outside of the job; its text says why, in a line for people."""


def reason(out: Path) -> Reason | None:
    """Why training into `out` is to end, as far as this worker knows; a few microseconds."""
    if (out / STOP).exists():
        return "stop"
    return "preempted" if _process.told or _process.leaving() or (out / RESIZE).exists() else None


def ask(out: Path, what: str = STOP) -> None:
    """Ask all workers that train into `out`, wherever they are; each looks about twice a second."""
    (out / what).touch()


def take_back(out: Path, what: str) -> None:
    """It is no longer asked for."""
    (out / what).unlink(missing_ok=True)


def listen(leaving: Callable[[], bool] = bool) -> None:
    """From now on the first SIGTERM to this process, if it trains, is a notice that it has to go; the second ends it, and so does the
    first when it does not train. For the main thread. leaving: whether the machine goes away, as far as its cluster says."""
    _process.leaving = leaving
    if signal.getsignal(signal.SIGTERM) is not _hear:
        _process.before = signal.signal(signal.SIGTERM, _hear)


@contextmanager
def training() -> Iterator[None]:
    """Within it, this process trains."""
    _process.trains, _process.told = True, False
    try:
        yield
    finally:
        _process.trains = False


class _Process:
    """What this process has been told."""

    told = trains = False
    leaving: Callable[[], bool] = staticmethod(bool)
    before: Callable[[int, FrameType | None], object] | int | None = None


_process = _Process()


def _hear(number: int, frame: FrameType | None) -> None:
    if _process.trains and not _process.told:
        _process.told = True
    elif callable(_process.before):
        _process.before(number, frame)
    else:
        os._exit(128 + number)
