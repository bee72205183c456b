"""A thread that notices when training no longer moves, and says where it hangs."""

from __future__ import annotations

import json
import os
import socket
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import dlopt

HUNG = "hung.jsonl"
"""Beside metrics.jsonl: a line for each time that a worker hung: {rank, host, pid, time, seconds, where}."""
LOOKS = 20
"""How often the thread looks within the time that training may stand still: so much later, at most, is it noticed."""
EXIT_CODE = 70
"""Of a process that is ended since it hangs."""


class Watchdog:
    """Watches over the thread that makes it. Once no beat has come for so many seconds, it writes a line into hung.jsonl of the folder, and
    if that is fatal, which it is in the process of a worker, which will be replaced, it ends the process.

    A hang that holds on to Python's lock stops this thread, too; Ray Train notices that, since such a process does not answer.
    """

    def __init__(self, out: Path, rank: int, seconds: float, fatal: bool) -> None:
        self.out, self.rank, self.seconds, self.fatal = out, rank, seconds, fatal
        self.beats, self.pauses = 0, 0
        self._watched, self._closed = threading.get_ident(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="dlopt-watchdog", daemon=True)
        self._thread.start()

    def beat(self) -> None:
        """Training moves."""
        self.beats += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within it, training may take its time."""
        self.pauses += 1
        try:
            yield
        finally:
            self.beats += 1
            self.pauses -= 1

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        beats, moved, said = self.beats, time.monotonic(), False
        while not self._closed.wait(self.seconds / LOOKS):
            now = time.monotonic()
            if self.beats != beats or self.pauses:
                beats, moved, said = self.beats, now, False
            elif now - moved >= self.seconds and not said:
                self._say(now - moved)
                said = True
                if self.fatal:
                    os._exit(EXIT_CODE)

    def _say(self, seconds: float) -> None:
        where = whereabouts(sys._current_frames().get(self._watched))
        line = {"rank": self.rank, "host": socket.gethostname(), "pid": os.getpid(), "time": round(time.time(), 3)}
        line |= {"seconds": round(seconds, 1), "where": where}
        with open(self.out / HUNG, "a") as file:
            file.write(json.dumps(line) + "\n")


def whereabouts(frame: FrameType | None) -> str:
    """The innermost line of dlopt or of the user's own code, as `dlopt/train/loop/steps.py:72 in steps`; of a library where none is."""
    inner = _said(frame)
    while frame is not None:
        if _ours(frame.f_code.co_filename):
            return _said(frame)
        frame = frame.f_back
    return inner


_PACKAGE = Path(dlopt.__file__).parent
_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})


def _ours(file: str) -> bool:
    """Whether a source file is of dlopt or the user's."""
    return file.startswith(str(_PACKAGE)) or (file.startswith("/") and not file.startswith(_LIBRARIES))


def _said(frame: FrameType | None) -> str:
    if frame is None:
        return "nowhere: its thread has ended"
    file = frame.f_code.co_filename
    name = str(Path(file).relative_to(_PACKAGE.parent)) if file.startswith(str(_PACKAGE)) else file
    return f"{name}:{frame.f_lineno} in {frame.f_code.co_name}"
