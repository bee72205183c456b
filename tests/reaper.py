"""Nothing outlives a run of tests, however it ends: what it starts bears its mark, and is ended after it.

`python -I reaper.py MARK` waits until its standard input is closed, which the kernel does for a process that was killed, too. Whatever
bears the mark then may end by itself for a while, is asked to, and at last is killed. Knows nothing of the project.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Collection
from pathlib import Path

VARIABLE = "PYTEST_MARKS"
"""An environment variable with the marks of all runs that a process belongs to: a test may run pytest itself."""
GRACE = 5.0
"""Seconds that processes are given before each stronger word."""


def bearing(mark: str) -> dict[int, str]:
    """Command lines of processes whose environment, as it was when they began, has a mark; wherever they hang. Zombies have none."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                if mark.encode() in (entry / "environ").read_bytes():
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
    return found


def left_of(mark: str, seconds: float, but: Collection[int | None] = ()) -> dict[int, str]:
    """Those that bear the mark and have not ended after so many seconds at most."""
    deadline = time.monotonic() + seconds
    while (left := {pid: line for pid, line in bearing(mark).items() if pid not in but}) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


class Reaper:
    """Marks this process's children from now on; `Reaper.mark` is theirs."""

    def __init__(self) -> None:
        self.mark = f"run-{uuid.uuid4().hex}"
        environment = dict(os.environ)
        os.environ[VARIABLE] = f"{environment.get(VARIABLE, '')} {self.mark}".strip()
        words = [sys.executable, "-I", __file__, self.mark]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, start_new_session=True, env=environment)


def main(mark: str) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()
    for number in (0, signal.SIGTERM, signal.SIGKILL):
        for pid in bearing(mark):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue
        if not left_of(mark, GRACE):
            return


if __name__ == "__main__":
    main(sys.argv[1])
