"""What checkpoints cost: the CNN on MNIST on all cores of this machine, in this process, with a checkpoint after every 40th step.

    python -m tests.bench.checkpoint --json

Each one is followed by 20 steps, in which it is written, and those by 20 steps without any, so that whatever else this machine does meets
both alike. `cost` is the share of a step's time that one every 20 steps adds: the mean difference of such neighbours over the mean of those
without, and `cost_error` its standard error; `cpu_cost` is the same of this process's CPU time; `blocked` is the part of `cost` in which
training itself stood still for a checkpoint, and `written_ms` how long it takes to be written meanwhile.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from dlopt import session
from dlopt.artifact import Artifact
from dlopt.models import Cnn
from dlopt.optim.optimizers import Adam
from dlopt.train.checkpoint.stores import Checkpointing, Every
from dlopt.train.checkpoint.writer import Writer
from dlopt.train.job import Fit, Resources, Train
from dlopt.train.training import Training
from dlopt.train.worker import Assignment, Worker
from tests.bench.train import prepare

EPOCHS, BATCH, STEPS, TURNS = 8, 256, 20, 3
SETTLED = 5
"""Steps of an epoch in which the checkpoint at the end of the one before may still be written."""


class Mark(NamedTuple):
    """The end of a step."""

    batch: int
    seconds: float
    cpu: float
    writing: bool


class Pair(NamedTuple):
    """Of the steps with a checkpoint, and of the same number of steps after them."""

    seconds: tuple[float, float]
    cpu: tuple[float, float]


class Run:
    """The ends of all steps, and the seconds that each checkpoint stopped training, and took to be written."""

    def __init__(self, data: Artifact) -> None:
        self.marks: list[Mark] = []
        self.stopped: list[float] = []
        self.written: list[float] = []
        between = Training._between_steps

        def marked(training: Training) -> None:
            between(training)
            assert training.writer
            writing = training.writer.writing
            busy = writing is not None and not writing.done()
            self.marks.append(Mark(training.state.record.batch, time.perf_counter(), time.process_time(), busy))

        fit = Fit(seed=1, model=Cnn(), augment=(), train=Train(epochs=EPOCHS, batch_size=BATCH, optimizer=Adam()))
        resources = Resources(checkpoint=Checkpointing(every=Every(steps=2 * STEPS)))
        with (
            tempfile.TemporaryDirectory(prefix="bench-") as out,
            mock.patch.object(Training, "_between_steps", marked),
            mock.patch.object(Training, "save", _timed(Training.save, self.stopped)),
            mock.patch.object(Writer, "_write", _timed(Writer._write, self.written)),
        ):
            given = Assignment(fit=fit, data=data.path, out=Path(out), feed="resident", resources=resources)
            Worker(given, 0, 1, torch.device("cpu")).run()

    def pairs(self) -> list[Pair]:
        """None of the first epoch, and none in which one ends."""
        found, first = [], next(step for step, mark in enumerate(self.marks, start=1) if step > mark.batch)
        for step in range(2 * STEPS, len(self.marks) - 2 * STEPS, 2 * STEPS):
            begin, middle, end = (self.marks[step - 2 + steps] for steps in (0, STEPS, 2 * STEPS))
            if step > first and begin.batch >= SETTLED and end.batch == begin.batch + 2 * STEPS:
                assert not middle.writing, "a checkpoint takes longer than so many steps: the difference says nothing"
                seconds = (middle.seconds - begin.seconds, end.seconds - middle.seconds)
                found.append(Pair(seconds, (middle.cpu - begin.cpu, end.cpu - middle.cpu)))
        return found


def _timed(work: Callable[..., None], seconds: list[float]) -> Callable[..., None]:
    def timed(*given: Any) -> None:
        began = time.perf_counter()
        work(*given)
        seconds.append(time.perf_counter() - began)

    return timed


def measure(data: Artifact, turns: int) -> dict[str, Any]:
    """So many runs."""
    Run(data)  # late imports and cold caches are nobody's
    runs = [Run(data) for _ in range(turns)]
    pairs = [pair for run in runs for pair in run.pairs()]
    step = statistics.mean(without for (_, without), _ in pairs)
    added = [(often - without) / step for (often, without), _ in pairs]
    stopped = statistics.median(seconds for run in runs for seconds in run.stopped)
    written = statistics.median(seconds for run in runs for seconds in run.written)
    return {
        "cost": round(statistics.mean(added), 4),
        "cost_error": round(statistics.stdev(added) / len(added) ** 0.5, 4),
        "cpu_cost": round(sum(often for _, (often, _) in pairs) / sum(without for _, (_, without) in pairs) - 1, 4),
        "blocked": round(stopped / step, 4),
        "pairs": len(pairs),
        "step_ms": round(step / STEPS * 1e3, 2),
        "written_ms": round(written * 1e3, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--turns", type=int, default=TURNS, help=f"runs that are measured (default: {TURNS})")
    options = parser.parse_args()
    with session.connected(None), tempfile.TemporaryDirectory(prefix="bench-") as folder:
        found = measure(prepare(Path(folder)), options.turns)
    print(json.dumps(found) if options.json else "\n".join(f"{name:>10}  {value}" for name, value in found.items()))


if __name__ == "__main__":
    main()
