"""What each test file may cost: CPU seconds of its tests that are neither slow nor chaos, their processes' included.

A run that spends more than `FACTOR` times a file's budget and `SPARE` seconds fails, so that the suite cannot grow back unnoticed.
CPU time instead of the clock's: it hardly depends on what else the machine does. `pytest --write-budgets` stores what a run has spent.
"""

from __future__ import annotations

import json
import os
import resource
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

FILE = Path(__file__).with_suffix(".json")
FACTOR, SPARE = 3.0, 10.0
"""Machines differ, and a file's first test may pay for imports that in another order another file pays for."""
NAME = "cpu seconds"
"""Of the property of a test's report."""
TICK = os.sysconf("SC_CLK_TCK")


def budgets() -> dict[str, float]:
    """By the name of the file."""
    found: dict[str, float] = json.loads(FILE.read_text())
    return found


def exceeded(spent: Mapping[str, float], allowed: Mapping[str, float]) -> list[str]:
    """A line for each file that costs too much."""
    return [
        f"{file}: {seconds:.0f} CPU seconds, where {FACTOR:g} x {allowed.get(file, 0):g} + {SPARE:g} are allowed: make its tests smaller, "
        "mark what must be large as slow, or state the new cost (pytest --write-budgets) and why"
        for file, seconds in sorted(spent.items())
        if seconds > FACTOR * allowed.get(file, 0) + SPARE
    ]


def write(spent: Mapping[str, float]) -> None:
    """Keep the budgets of files that did not run."""
    new = {file: round(seconds, 1) for file, seconds in spent.items()}
    FILE.write_text(json.dumps(dict(sorted((budgets() | new).items())), indent=0) + "\n")


class Meter:
    """CPU seconds of this process and all below it, but for what was excused."""

    def __init__(self) -> None:
        self.excused = 0.0
        self.last = self._spent()

    def lap(self) -> float:
        """Since the last lap."""
        now = self._spent() - self.excused
        spent, self.last = now - self.last, now
        return max(spent, 0.0)  # what a process has spent that nobody waited for is gone with it

    @contextmanager
    def excuse(self) -> Iterator[None]:
        """What is shared by all tests is not the first one's cost."""
        before = self._spent()
        try:
            yield
        finally:
            self.excused += self._spent() - before

    @staticmethod
    def _spent() -> float:
        mine = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(usage.ru_utime + usage.ru_stime for usage in mine) + sum(map(_of, _below(os.getpid())))


def _of(pid: int) -> float:
    """Of a process and of those of its children that have ended."""
    try:
        return sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:15])) / TICK
    except OSError:
        return 0.0


def _below(pid: int) -> Iterator[int]:
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
    except OSError:
        return
    for thread in threads:
        try:
            children = (thread / "children").read_text().split()
        except OSError:
            continue
        for child in children:
            yield int(child)
            yield from _below(int(child))


def by_file(reports: list[object]) -> dict[str, float]:
    """What the reports of tests say that was spent."""
    spent: defaultdict[str, float] = defaultdict(float)
    for report in reports:
        for name, value in getattr(report, "user_properties", ()):
            if name == NAME and getattr(report, "when", "") == "teardown":
                spent[Path(report.nodeid.partition("::")[0]).name] += value  # type: ignore[attr-defined]
    return dict(spent)


METER = Meter()
"""Of this process."""
