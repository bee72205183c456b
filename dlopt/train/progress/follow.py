"""What the driver says of training while it runs: it follows the files that workers, wherever they are, write.

A thread reads what is new in starts.jsonl, speed.jsonl, metrics.jsonl and health.jsonl, says it to people as progress and warnings,
and gives each line to the trackers. When nothing comes, it says for how long, and why if that is known.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlopt.data.prepared import Split
from dlopt.part import Target
from dlopt.progress import WARNING, Progress
from dlopt.train.job import Fit, Resources, Train
from dlopt.train.measure.metric import names
from dlopt.train.progress.forecast import Forecast, clock, rounded
from dlopt.train.progress.track.courier import Courier, complaints, couriers
from dlopt.train.progress.track.tracker import Line, What
from dlopt.train.watch.metrics_log import HEALTH, NAME, SPEED, STARTS, MetricsReader

EVERY = 0.25
"""Seconds between two looks at the files."""
QUIET, STEPS = 10.0, 4
"""After so many seconds without a step, and so many times the usual time of one, it is said that there is none."""
RECOVERED = 30
"""Lines of speed.jsonl, about as many seconds, in which a slow worker is not slow: if it is later, that is said again."""

Waiting = Callable[[], str | None]
"""Why nothing comes, if that is known."""


@contextmanager
def followed(
    out: Path,
    section: Fit,
    split: Split,
    resources: Resources,
    progress: Progress,
    waiting: Waiting = lambda: None,
) -> Iterator[None]:
    """Within it, the files of the model in `out` are followed. split: the training rows. Raises DloptError when a tracker cannot be
    opened."""
    train = section.train
    steps = -(-len(split) // train.rows_of_batch(len(split)))
    metric = _shown(train, split.signature.target)
    status = Status(train.epochs, steps, metric, Forecast(len(split), train.epochs), waiting)
    trackers: list[Courier] = []
    try:
        with couriers(resources.track, out, section.model_dump(mode="json")) as trackers:
            follower = ProgressReader(out, status, progress, trackers)
            with _repeated(follower):
                yield
    finally:
        for complaint in complaints(trackers):
            progress("fit", status.share, WARNING + complaint)


@contextmanager
def _repeated(follower: ProgressReader) -> Iterator[None]:
    """Within it, the follower looks every now and then, on a thread of its own, and once at the end."""
    done = threading.Event()

    def repeat() -> None:
        ended = False
        while not ended:
            ended = done.wait(EVERY)
            follower.look(time.monotonic())
            if not ended:
                follower.again()

    thread = threading.Thread(target=repeat, name="dlopt-follow", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=5)


class NewLines:
    """Each line of a file once, also when a restart of training has replaced it by one that says the same again: to three digits, since
    another number of workers adds up in another order."""

    def __init__(self, path: Path) -> None:
        self.tail = MetricsReader(path)
        self.known: list[int] = []
        self.place = 0

    def new(self) -> tuple[int | None, list[Line]]:
        """(step, lines): what has come. Where lines of this step and of later ones had been given out and are other ones now, their step
        comes with them, else None."""
        before, offset = self.tail.file, self.tail.offset
        lines = self.tail.new()
        if self.tail.file != before or self.tail.offset < offset:
            self.place = 0
        back: int | None = None
        new: list[Line] = []
        same: list[Line] = []
        for line in lines:
            mark = hash(repr(_worn({name: value for name, value in line.items() if name != "seconds"})))
            if self.place < len(self.known) and self.known[self.place] == mark:
                same = [*(known for known in same if known["step"] == line["step"]), line]
            else:
                if self.place < len(self.known):
                    back = line["step"]
                    new += [known for known in same if known["step"] == back]
                    del self.known[self.place :]
                self.known.append(mark)
                new.append(line)
            self.place += 1
        return back, new


def _worn(value: Any) -> Any:
    """With floats of three digits."""
    if isinstance(value, dict):
        return {name: _worn(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_worn(inner) for inner in value]
    return float(f"{value:.3g}") if isinstance(value, float) else value


class ProgressReader:
    """Reads what is new, and says it. Lines of an earlier process are for the trackers alone."""

    def __init__(self, out: Path, status: Status, progress: Progress, trackers: Sequence[Courier] = ()) -> None:
        self.starts, self.speeds, self.lines, self.watched = (NewLines(out / name) for name in (STARTS, SPEED, NAME, HEALTH))
        self.status, self.progress, self.trackers = status, progress, trackers
        self.slow: dict[int, int] = {}
        self.skipped = False
        self.finite = True
        self.told = ("", 0.0)
        self._read(0.0, quiet=True)
        status.forget()

    def look(self, now: float) -> None:
        """Say what has come since the last look. now: seconds of a clock."""
        self._read(now)
        for complaint in complaints(self.trackers):
            self._warn(complaint)
        text, share = self.status.text(now), self.status.share
        if text and (text, share) != self.told:
            self.told = (text, share)
            self.progress("fit", share, text)

    def again(self) -> None:
        """Say what still holds once more: who writes a line now and then has left it out, maybe."""
        text, share = self.told
        if text:
            self.progress("fit", share, text)

    def _read(self, now: float, quiet: bool = False) -> None:
        for line in self.starts.new()[1]:
            self._tell("start", line)
            if not quiet:
                self._set_out(line)
        for line in self.speeds.new()[1]:
            self._tell("speed", line)
            self.status.speed(line, now)
            if not quiet:
                self._slow(line)
                self._skipped(line)
        back, lines = self.lines.new()
        if back is not None:
            self._tell("undone", {"step": back})
        for line in lines:
            self._tell("epoch" if "train" in line else "step", line)
            self.status.line(line, now)
            if "train" in line and line["validation"]:
                self._finite(line["epoch"], line["validation"]["loss"] is not None, quiet)
        for line in self.watched.new()[1]:
            self._tell("health", line)
            if not quiet:
                self._watch(line)

    def _tell(self, what: What, line: Line) -> None:
        for tracker in self.trackers:
            tracker.tell(what, line)

    def _warn(self, text: str) -> None:
        self.progress("fit", self.status.share, WARNING + text)

    def _set_out(self, line: Line) -> None:
        """A group of workers sets out: the first of this process, or one in place of another, of whose end the stage has said why."""
        before, workers, step = self.status.workers, line["workers"], line["step"]
        self.status.set_out(line)
        self.slow = {}
        for warning in [*line["damaged"], *line.get("warnings", ())]:
            self._warn(warning)
        if before is None:
            return
        now = " with" if workers == before else ", now with"
        self._warn(f"training goes on from step {step}{now} {counted(workers)}")

    def _slow(self, line: Line) -> None:
        """Once for each worker that is slow, until it has not been for a while."""
        self.slow = {rank: lines + 1 for rank, lines in self.slow.items() if lines < RECOVERED}
        if slow := line["slow"]:
            if slow["rank"] not in self.slow:
                self._warn(f"worker {slow['rank']} on {slow['host']} is slow: its steps take {slow['times']:.1f} times as long as others'")
            self.slow[slow["rank"]] = 0

    def _skipped(self, line: Line) -> None:
        """Once, that checkpoints take longer than the time between two of them."""
        if line.get("skipped_checkpoints") and not self.skipped:
            self.skipped = True
            self._warn(
                f"a checkpoint takes {line['longest_checkpoint']:.0f} s to write, longer than the time between two: training goes on and "
                "some are left out, so that a crash costs more steps (resources.checkpoint: every, path)"
            )

    def _finite(self, epoch: int, finite: bool, quiet: bool) -> None:
        """Once for each row of epochs whose validation loss is not finite."""
        if self.finite and not finite and not quiet:
            self._warn(
                f"epoch {epoch}: the loss of the validation split is not finite, so that no such epoch is the best one: "
                "lower train.optimizer.lr or set train.clip, or look for extreme values in the validation split"
            )
        self.finite = finite

    def _watch(self, line: Line) -> None:
        for warning in warned([line]):
            self._warn(warning)
        if "rollback" in line:
            self.status.go_back(line["step"])


@dataclass
class Status:
    """The newest of all there is to say, in a few words."""

    epochs: int
    steps: int
    """Of an epoch."""
    metric: str
    """Which one of the validation split to say."""
    forecast: Forecast
    waiting: Waiting = lambda: None
    workers: int | None = None
    """Of the group that has set out, if one has."""
    start: int = 0
    """The step that they set out from."""
    step: int = 0
    epoch: int = 1
    loss: float | None = None
    validation: float | None = None
    step_seconds: float = 0.0
    moved: float | None = None
    """When the last line has come, since the group has set out."""
    set_out_at: float | None = None

    @property
    def share(self) -> float:
        """Of all steps."""
        return min(1.0, self.step / (self.epochs * self.steps))

    def forget(self) -> None:
        """What was read so far is of an earlier process."""
        self.moved = None
        self.forecast.restart()

    def set_out(self, line: Line) -> None:
        """A group of workers begins."""
        self.workers, self.moved, self.set_out_at = line["workers"], None, None
        self.go_back(line["step"])

    def go_back(self, step: int) -> None:
        """Training goes on from a step."""
        self.start = self.step = step
        self.forecast.restart()

    def speed(self, line: Line, now: float) -> None:
        """A line of speed.jsonl."""
        self.forecast.add(line, now)
        self.step_seconds = line["step_seconds"] or self.step_seconds
        self._move(line["step"], now)

    def line(self, line: Line, now: float) -> None:
        """A line of metrics.jsonl."""
        if "train" in line:
            self.epoch = min(line["epoch"] + 1, self.epochs)
            self.validation = (line["validation"] or {}).get(self.metric)
        else:
            self.epoch, self.loss = line["epoch"], line["loss"]
        self._move(line["step"], now)

    def _move(self, step: int, now: float) -> None:
        self.step, self.moved = max(step, self.step), now

    def text(self, now: float) -> str | None:
        """One line; None where there is nothing to say yet."""
        if self.workers is None:
            return self.waiting()
        if self.moved is None:
            return self._beginning(now)
        quiet = now - self.moved
        if quiet < max(QUIET, STEPS * self.step_seconds):
            return f"{self}{self._speed(now)}"
        what = "measuring" if self.step % self.steps == 0 else "no step"
        return f"{self}  {self.waiting() or f'{what} for {_for(quiet)}'}"

    def _beginning(self, now: float) -> str:
        """Between the time that workers are there and their first step."""
        self.set_out_at = now if self.set_out_at is None else self.set_out_at
        text = f"{counted(self.workers or 0)} set out" + (f" from step {self.step}" if self.step else "")
        quiet = now - self.set_out_at
        return text if quiet < QUIET else f"{text}, {self.waiting() or f'no step for {_for(quiet)}'}"

    def __str__(self) -> str:
        text = f"epoch {self.epoch}/{self.epochs}"
        text += "" if self.loss is None else f"  loss {self.loss:.4f}"
        return text + ("" if self.validation is None else f"  validation {self.metric} {self.validation:.4g}")

    def _speed(self, now: float) -> str:
        speed, left = self.forecast.speed(), self.forecast.left(now) if self.share < 1 else None
        text = "" if speed is None else f"  {rounded(speed)} rows/s"
        return text if left is None else f"{text}  {clock(left)} left"


def warned(lines: list[dict[str, Any]]) -> Iterator[str]:
    """What lines of health.jsonl say that a person should know."""
    for line in lines:
        yield from (finding["says"] for finding in line.get("findings", ()))
        if "rollback" in line:
            yield f"went back to step {line['step']} and on at a rate of {line['rate']:.3g}: {line['rollback']}"


def counted(workers: int) -> str:
    """1 worker, 2 workers."""
    return f"{workers} worker{'s' * (workers != 1)}"


def _for(seconds: float) -> str:
    """42 s, or 2:05."""
    return f"{seconds:.0f} s" if round(seconds) < 100 else clock(seconds)


def _shown(train: Train, target: Target) -> str:
    """The metric that decides, or if that is the loss, which is shown anyhow, the one that says most to people."""
    return train.monitor if train.monitor != "loss" else names(target.kind)[1]
