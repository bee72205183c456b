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


class Stopped(BaseException):
    """Ctrl-C or SIGTERM; not an Exception, so that no library takes it for a failure of its own."""


@contextmanager
def handlers_restored() -> Iterator[None]:
    """Afterwards SIGINT and SIGTERM do what they did before."""
    before = {number: signal.getsignal(number) for number in STOPS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def stop_later() -> list[int]:
    """From now on signals are only noted, in the list that is returned: Ray's start does not stand an exception in its midst.

    SIGINT is blocked, too, which Ray's processes inherit: a terminal sends Ctrl-C to them all, and half-started they would die of it.
    Ray takes SIGTERM for itself meanwhile, and answers it with SystemExit.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    noted: list[int] = []
    for number in STOPS:
        signal.signal(number, lambda number, frame: noted.append(number))
    return noted


def stop_now(noted: list[int]) -> None:
    """From now on a signal raises Stopped, once; so does one that was noted earlier."""

    def stop(number: int, frame: Any) -> None:
        stop_never()
        raise Stopped

    for number in STOPS:
        signal.signal(number, stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    if noted:
        stop(noted[0], None)


def stop_never() -> None:
    """While all is taken down a second Ctrl-C would leave half of it behind."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)


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
