"""How a server ends: Ctrl-C or SIGTERM at any moment, and no process left behind."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

STOPS = (signal.SIGINT, signal.SIGTERM)
LINGER_SECONDS = 3.0
"""How long processes that Ray has left may take to notice by themselves that it is gone."""
PR_SET_CHILD_SUBREAPER = 36


class Stopped(Exception):
    """Ctrl-C or SIGTERM."""


class Stops:
    """Notes SIGINT and SIGTERM when they come, and raises Stopped at `pause` alone: Ray's calls stand no exception in their midst.

    A second signal cuts the waiting for clients short, and else changes nothing: half of what is being taken down would stay.
    """

    def __init__(self) -> None:
        self.number = 0
        """The first that came."""
        self.count = 0

    def listen(self) -> None:
        """From now on; again when somebody else has taken a signal meanwhile."""
        for number in STOPS:
            signal.signal(number, self._note)

    def pause(self, seconds: float) -> None:
        """Sleep. Raises Stopped."""
        time.sleep(seconds)
        if self.count:
            raise Stopped

    def wait(self) -> None:
        """Until one comes."""
        while not self.count:
            time.sleep(0.1)

    def linger(self, seconds: float) -> None:
        """Sleep after the first one, until another comes."""
        deadline = time.monotonic() + seconds
        while self.count < 2 and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(0.1, left))

    def _note(self, number: int, frame: Any) -> None:
        self.number = self.number or number
        self.count += 1


@contextmanager
def stops_noted() -> Iterator[Stops]:
    """Inside, signals are noted; afterwards they do what they did before."""
    before = {number: signal.getsignal(number) for number in STOPS}
    stops = Stops()
    stops.listen()
    try:
        yield stops
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def children_deaf_to_ctrl_c() -> Iterator[None]:
    """What is started inside inherits that SIGINT is blocked: a terminal sends Ctrl-C to all, and Ray's processes would end before us."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


@contextmanager
def nothing_left() -> Iterator[None]:
    """Ends every process that was started inside, theirs too, however it was left.

    Linux gives orphans to the nearest ancestor that asks for them. Elsewhere Ray's own tidying must do.
    """
    if sys.platform != "linux":
        yield
        return
    before = set(_children())
    _adopt_orphans(True)
    try:
        yield
    finally:
        _end(before)
        _adopt_orphans(False)


def _adopt_orphans(wanted: bool) -> None:
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, int(wanted), 0, 0, 0)


def _end(spared: set[int]) -> None:
    """Wait for the children of this process, and kill those that stay; each may leave children of its own to this process."""
    deadline = time.monotonic() + LINGER_SECONDS
    while left := set(_children()) - spared:
        for pid in left:
            with suppress(ProcessLookupError, ChildProcessError):
                if time.monotonic() > deadline:
                    os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.02)


def _children() -> list[int]:
    """Process ids of this process's children, ended ones too until they are waited for."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):
                if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == os.getpid():
                    found.append(int(entry.name))
    return found
