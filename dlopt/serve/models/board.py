"""Where the state of a server stands for all its replicas to read, and who changed it when: in memory for one process, in a folder for
all processes that see it."""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dlopt.artifact import write_atomically
from dlopt.part import DloptError
from dlopt.serve.models.lineup import State
from dlopt.serve.watch.metrics import SILENT_SECONDS, Family, Told

Line = dict[str, Any]
"""Of the log: when, who, what, and what it was about."""
MOST_LINES = 1000


class Board:
    """In memory."""

    far = False
    """Whether asking it takes so long that nobody should wait for it on the event loop."""

    def __init__(self, state: State, told: Told | None = None) -> None:
        """told: what hosts have counted, as far as is known."""
        self.state = state
        self.told: Told = told or {}
        self.heard: dict[str, float] = {}
        self.log: list[Line] = [_line("dlopt", "start", {"models": list(state.models)})]

    def read(self, seen: int) -> State | None:
        """The state, unless it is the one of this revision."""
        return self.state if self.state.revision != seen else None

    def now(self) -> State:
        """The state as it is."""
        return self.state

    def change(self, how: Callable[[State], State], who: str, what: str, **about: Any) -> State:
        """Make the next state of the one that is there, and note it. Raises what `how` does; then nothing has changed."""
        found = how(self.state)
        self.state = found.model_copy(update={"revision": self.state.revision + 1})
        self.log.append(_line(who, what, about))
        return self.state

    def lines(self) -> list[Line]:
        """The last ones of the log."""
        return self.log[-MOST_LINES:]

    def tell(self, host: str, moment: float, found: list[Family]) -> Told:
        """Note what a host has counted, unless it is older than what is known; and what all hosts have."""
        now = time.monotonic()
        if host not in self.told or self.told[host][0] <= moment:
            self.told[host] = moment, True, found
            self.heard[host] = now
        lately = {name for name, when in self.heard.items() if now - when < SILENT_SECONDS}
        self.told = {name: (when, name in lately, counted) for name, (when, _, counted) in self.told.items()}
        return self.told


class FileBoard(Board):
    """In a folder, which may outlive the server: one that is started with the same models goes on with what was deployed since."""

    def __init__(self, folder: Path, state: State) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.journal, self.folder = folder / "state.json", folder / "log.jsonl", folder
        self.stamp: tuple[int, int, int] | None = None
        with self._locked():
            there = self._stored()
            if there is None or there.begun != state.begun:
                revision = there.revision + 1 if there else 1
                self._store(state.model_copy(update={"revision": revision}))
                self._note(_line("dlopt", "start", {"models": list(state.models)}))

    def read(self, seen: int) -> State | None:
        """The state, unless it is the one of this revision."""
        found = self.path.stat()
        stamp = (found.st_mtime_ns, found.st_size, found.st_ino)
        if stamp == self.stamp:
            return None
        state = self._stored()
        if state is not None and state.revision == seen:
            self.stamp = stamp  # who asks has it; who could not take it over asks for it again
            return None
        return state

    def now(self) -> State:
        """The state as it is."""
        return self._stored() or State()

    def change(self, how: Callable[[State], State], who: str, what: str, **about: Any) -> State:
        """Make the next state of the one that is there, and note it. Raises what `how` does; then nothing has changed."""
        with self._locked():
            there = self._stored() or State()
            state = how(there).model_copy(update={"revision": there.revision + 1})
            self._note(_line(who, what, about))
            self._store(state)
        return state

    def lines(self) -> list[Line]:
        """The last ones of the log."""
        return [json.loads(line) for line in self.journal.read_text().splitlines()[-MOST_LINES:]] if self.journal.is_file() else []

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self.folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _stored(self) -> State | None:
        try:
            return State.model_validate_json(self.path.read_bytes())
        except (OSError, ValueError, DloptError):
            return None

    def _store(self, state: State) -> None:
        write_atomically(self.path, state.model_dump_json(indent=1))

    def _note(self, line: Line) -> None:
        with open(self.journal, "a") as journal:
            journal.write(json.dumps(line) + "\n")


def _line(who: str, what: str, about: Line) -> Line:
    return {"when": datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="milliseconds"), "who": who, "what": what, **about}
