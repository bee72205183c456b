"""Brings lines to trackers, each on a thread of its own: a tracker that is slow or broken costs its lines and a warning, and no more."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Protocol

from dlopt.train.progress.track.tracker import Line, Tracker, What

EVERY = 1.0
"""Seconds between two deliveries, so that a server is not asked for every line."""
PATIENCE = 10.0
"""Seconds that the end of training waits for a tracker to take its last lines."""


class Opens(Protocol):
    """A Part of the union."""

    @property
    def kind(self) -> str:
        """Its name in a job."""
        ...

    def open(self, out: Path, settings: Mapping[str, Any]) -> Tracker:
        """The tracker of a model that is made in `out`. settings: of the fit section. Raises DloptError."""
        ...


class Courier:
    """The thread that feeds one tracker."""

    def __init__(self, name: str, tracker: Tracker) -> None:
        self.name, self.tracker = name, tracker
        self.queue: SimpleQueue[tuple[What, Line]] = SimpleQueue()
        self.ended, self.finished = threading.Event(), False
        self.complaint: str | None = None
        self.complained = False
        self.thread = threading.Thread(target=self._run, name=f"dlopt-{name}", daemon=True)
        self.thread.start()

    def tell(self, what: What, line: Line) -> None:
        """Never waits, never raises."""
        self.queue.put((what, line))

    def close(self, finished: bool) -> None:
        """Bring what is left, and end; gives up after PATIENCE."""
        self.finished = finished
        self.ended.set()
        self.thread.join(PATIENCE)
        if self.thread.is_alive():
            self._failed(f"has not taken its last lines within {PATIENCE:.0f} s")

    def _run(self) -> None:
        ended = False
        while not ended:
            ended = self.ended.wait(EVERY)
            lines = list(self._waiting())
            for what, line in lines:
                self._attempt(partial(self.tracker.tell, what, line))
            if lines or ended:
                self._attempt(self.tracker.flush)
        self._attempt(partial(self.tracker.close, self.finished))

    def _waiting(self) -> Iterator[tuple[What, Line]]:
        while True:
            try:
                yield self.queue.get_nowait()
            except Empty:
                return

    def _attempt(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            said = str(error).strip().splitlines() or [""]
            self._failed(f"{type(error).__name__}: {said[0]}")

    def _failed(self, why: str) -> None:
        self.complaint = self.complaint or f"{self.name} does not get all numbers, training goes on: {why}"


def complaints(couriers: Sequence[Courier]) -> Iterator[str]:
    """What a user should hear and has not: one line for each tracker that fails."""
    for courier in couriers:
        if courier.complaint and not courier.complained:
            courier.complained = True
            yield courier.complaint


@contextmanager
def couriers(parts: Sequence[Opens], out: Path, settings: Mapping[str, Any]) -> Iterator[list[Courier]]:
    """Trackers that are open within it, and closed at its end, be it a good one or not. Raises DloptError when one cannot be opened."""
    begun: list[Courier] = []
    finished = False
    try:
        for part in parts:
            begun.append(Courier(part.kind, part.open(out, settings)))
        yield begun
        finished = True
    finally:
        for courier in begun:
            courier.close(finished)
