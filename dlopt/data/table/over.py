"""Where the passes over ranges of rows are computed: on Ray's workers, or, when there is one range alone, in this process."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dlopt.data.stats.pairwise import merged
from dlopt.data.table.ranges import Run
from dlopt.part import DloptError
from dlopt.progress import Progress


class Ranges:
    """Runs a pass over all ranges: in this process, if there is one, else wherever `run` does; results come in the order of the ranges."""

    def __init__(self, power: int, run: Run, progress: Progress) -> None:
        self.count, self.progress = 2**power, progress
        self.run: Run = run if power else one_by_one

    def each(self, task: Callable[..., Any], doing: str) -> Iterator[Any]:
        """What a task, a function of a range's number, finds in each range."""
        for done, found in enumerate(self.run(task, range(self.count)), start=1):
            if self.count > 1:
                self.progress("prepare", done / self.count, f"{doing}: {done} of {self.count} parts")
            yield found

    def merged(self, task: Callable[..., Any], doing: str) -> Any:
        """All that is found, merged in the order of the ranges; None when nothing is."""
        return merged(found for found in self.each(task, doing) if found is not None)


def one_by_one(task: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """Run a task on each item in this process."""
    return map(task, items)


def on_cluster(task: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """Run a task on each item on Ray's workers; results in the order of the items, and never many more at a time than are worked on."""
    import ray

    shared, work = ray.put(task), ray.remote(_work)
    ahead = max(2, 2 * int(ray.cluster_resources().get("CPU", 1)))
    waiting = deque(work.remote(shared, item) for item in items[:ahead])
    try:
        for later in range(ahead, len(items) + ahead):
            if not waiting:
                return
            yield ray.get(waiting.popleft())
            waiting.extend(work.remote(shared, item) for item in items[later : later + 1])
    except DloptError as error:  # with Ray's account of where it was
        raise DloptError(str(getattr(error, "cause", error)).splitlines()[0]) from None


def _work(task: Callable[[Any], Any], item: Any) -> Any:
    return task(item)


class Clock:
    """Seconds of one part after the other, by its name."""

    def __init__(self) -> None:
        self.start, self.seconds = time.monotonic(), dict[str, float]()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name], self.start = round(now - self.start, 3), now
