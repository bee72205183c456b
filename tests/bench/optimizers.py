"""Time and epochs to 97 % and 99 % of the test digits, for pairs of optimizer and schedule: the median of three seeds.

    python -m tests.bench.optimizers [--json FILE] [--plot FILE.svg] [--pair NAME ...] [--tuning 3] [--seeds 3] [--epochs 3]

All pairs train the same convolutional network (batch normalization, no augmentation) on all of MNIST through the product's own feed,
objective, optimizer, schedule and loop. Each may try the same number of peak rates, a factor of 3 apart, around what its kind of
optimizer is usually given, for one epoch and one seed of its own; the rate with the least training loss at the end of it goes on. No test
digit is looked at in tuning. Then `--epochs` epochs are scheduled: after every quarter of one the test digits are measured with the clock
stopped, and a seed that has not got there in time counts as infinity, as AlgoPerf has it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import TypeAdapter

from dlopt import session
from dlopt.artifact import Artifact, once
from dlopt.data.kinds import CategoryTarget, ImageInput
from dlopt.data.prepare import PREPARE
from dlopt.data.prepared import Split
from dlopt.data.section import Data
from dlopt.data.sources import Parquet
from dlopt.data.table.split import RandomSplit
from dlopt.models import Model
from dlopt.optim.optimizers import Optimizer
from dlopt.optim.schedules import Schedule
from dlopt.train.job import Fit, Train
from dlopt.train.measure.evaluate import evaluate
from dlopt.train.training import Training
from dlopt.train.worker import Assignment, Worker

DIGITS = Path(__file__).resolve().parents[3] / "shared" / "data" / "mnist"
CPU = torch.device("cpu")
MODEL: dict[str, Any] = {"kind": "cnn", "channels": [16, 32], "hidden": 128, "norm": "batch", "dropout": 0}
BATCH = 128
GOALS = (0.97, 0.99)
LOOKS = 4
"""Looks at the test digits in an epoch."""
COSINE = {"kind": "cosine", "warmup": {"share": 0.05}}
PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sgd + momentum, cosine": ({"kind": "sgd", "lr": 0.05, "momentum": 0.9, "nesterov": True}, COSINE),
    "sgd + momentum, one cycle": ({"kind": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": True}, {"kind": "one_cycle"}),
    "sgd + momentum, step": ({"kind": "sgd", "lr": 0.05, "momentum": 0.9}, {"kind": "step", "step_size": {"share": 0.34}, "decay": 0.3}),
    "rmsprop, exponential": ({"kind": "rmsprop", "lr": 1e-3}, {"kind": "exponential", "decay": 0.7}),
    "adam, constant": ({"kind": "adam", "lr": 1e-3}, {"kind": "constant"}),
    "adam, inverse square root": ({"kind": "adam", "lr": 2e-3}, {"kind": "inverse_sqrt", "warmup": {"share": 0.05}}),
    "adamw, cosine": ({"kind": "adamw", "lr": 2e-3}, COSINE),
    "adamw, one cycle": ({"kind": "adamw", "lr": 4e-3}, {"kind": "one_cycle"}),
    "nadam, linear": ({"kind": "nadam", "lr": 2e-3}, {"kind": "linear"}),
    "lion, cosine": ({"kind": "lion", "lr": 3e-4}, COSINE),
    "lamb, cosine": ({"kind": "lamb", "lr": 1e-2}, COSINE),
    "muon, linear": ({"kind": "muon", "lr": 0.02}, {"kind": "linear"}),
    "schedule-free adamw": ({"kind": "schedule_free_adamw", "lr": 5e-3}, {"kind": "constant"}),
    "soap, cosine": ({"kind": "soap", "lr": 3e-3}, COSINE),
}


class Run(NamedTuple):
    """One training: seconds and epochs to each goal, infinite where it was not reached, and the best accuracy seen."""

    seconds: list[float]
    epochs: list[float]
    best: float


def prepare(home: Path) -> Artifact:
    """60,000 digits for training, the 10,000 test digits as the validation split."""
    source, validation = Parquet(path=str(DIGITS / "train.parquet")), Parquet(path=str(DIGITS / "test.parquet"))
    section = Data(
        source=source,
        validation=validation,
        inputs=(ImageInput(normalize="standard"),),
        target=CategoryTarget(),
        split=RandomSplit(train=1, validation=0, test=0),
    )
    return once(PREPARE, section, home, found={"source": source.found(), "validation": validation.found()})


def training(data: Artifact, optimizer: Mapping[str, Any], schedule: Mapping[str, Any], seed: int, epochs: int, home: Path) -> Training:
    """The product's own training, at its start."""
    model: Any = TypeAdapter(Model).validate_python(MODEL)
    train = Train(
        epochs=epochs,
        batch_size=BATCH,
        optimizer=TypeAdapter(Optimizer).validate_python(optimizer),
        schedule=TypeAdapter(Schedule).validate_python(schedule),
    )
    fit = Fit(seed=seed, model=model, augment=(), train=train)
    worker = Worker(Assignment(fit=fit, data=data.path, out=home, feed="resident"), 0, 1, CPU)
    return worker.training(data, worker.state(data)[0])


def parts(run: Training, epochs: int) -> Iterator[tuple[float, float, float]]:
    """(epochs, seconds of training, mean loss of the steps) after each part of an epoch."""
    seconds, batches = 0.0, run.sampler.order.batches
    ends = [round(batches * look / LOOKS) for look in range(1, LOOKS + 1)]
    for epoch in range(1, epochs + 1):
        losses: list[torch.Tensor] = []
        began = time.perf_counter()
        for done, (step, _) in enumerate(run.steps(epoch), start=1):
            losses.append(step.loss)
            if done in ends:
                seconds += time.perf_counter() - began
                yield epoch - 1 + done / batches, seconds, torch.stack(losses).mean().item()
                losses, began = [], time.perf_counter()
        run.state.record.epoch = epoch


def measure(data: Artifact, optimizer: Mapping[str, Any], schedule: Mapping[str, Any], seed: int, epochs: int) -> Run:
    """Train until the last goal is reached."""
    reached: list[tuple[float, float]] = []
    best, split = 0.0, Split.open(data, "validation")
    with tempfile.TemporaryDirectory(prefix="bench-") as home:
        run = training(data, optimizer, schedule, seed, epochs, Path(home))
        for epoch, seconds, _ in parts(run, epochs):
            with run.measured():
                accuracy = evaluate(run.network, split, CPU)["accuracy"] or 0.0
            run.network.train()
            best = max(best, accuracy)
            reached += [(seconds, epoch)] * sum(len(reached) <= place and best >= goal for place, goal in enumerate(GOALS))
            if len(reached) == len(GOALS):
                break
    reached += [(math.inf, math.inf)] * (len(GOALS) - len(reached))
    return Run([seconds for seconds, _ in reached], [epoch for _, epoch in reached], best)


def tune(data: Artifact, optimizer: dict[str, Any], schedule: Mapping[str, Any], tries: int) -> tuple[float, float]:
    """The rate with the least training loss at the end of one epoch, and the seconds that the search took."""
    found, began = [], time.perf_counter()
    for place in range(tries):
        rate = optimizer["lr"] * 3.0 ** (place - tries // 2)
        with tempfile.TemporaryDirectory(prefix="bench-") as home:
            run = training(data, optimizer | {"lr": rate}, schedule, 100, 1, Path(home))
            *_, (_, _, loss) = parts(run, 1)
        found.append((loss if math.isfinite(loss) else math.inf, rate))
    return min(found)[1], time.perf_counter() - began


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """As the README has it, the quickest to the last goal first."""
    head = "| optimizer, schedule | peak rate | epochs to 97 % | seconds to 97 % | epochs to 99 % | seconds to 99 % | tuning, s |\n"
    lines = [head + "|---|---|---|---|---|---|---|"]
    for name, one in sorted(found.items(), key=lambda item: (item[1]["seconds"][1], item[1]["seconds"][0])):
        cells = [
            f"{value:.3g}" if math.isfinite(value) else "not" for pair in zip(one["epochs"], one["seconds"], strict=True) for value in pair
        ]
        lines.append(f"| {name} | {one['lr']:.2g} | {' | '.join(cells)} | {one['tuning']:.0f} |")
    return "\n".join(lines)


def plot(found: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """A bar for each pair: seconds to 97 % and to 99 %."""
    import matplotlib
    from matplotlib.figure import Figure

    names = sorted(found, key=lambda name: (found[name]["seconds"][1], found[name]["seconds"][0]), reverse=True)
    longest = max(value for one in found.values() for value in one["seconds"] if math.isfinite(value))
    figure = Figure(figsize=(8, 0.34 * len(names) + 1), layout="constrained")
    axes = figure.add_subplot()
    for goal, colour, height in ((1, "#8db4e2", 0.72), (0, "#1f4e8c", 0.36)):
        values = [min(found[name]["seconds"][goal], 1.08 * longest) for name in names]
        axes.barh(names, values, height=height, color=colour, label=f"{100 * GOALS[goal]:.0f} % of the test digits")
    for place, name in enumerate(names):
        value = found[name]["seconds"][1]
        axes.text(min(value, 1.08 * longest), place, f" {value:.0f} s" if math.isfinite(value) else " not reached", va="center", fontsize=8)
    axes.set_xlim(0, 1.2 * longest)
    axes.set_xlabel("seconds of training on two cores, median of three seeds")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper right", frameon=False)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": path.name}):  # text stays text
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--plot", type=Path, help="draw them here")
    parser.add_argument("--pair", action="append", choices=list(PAIRS), help="only this one (may be given several times)")
    parser.add_argument("--tuning", type=int, default=3, help="rates that each pair may try")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3)
    options = parser.parse_args()
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        with session.connected(None, cpus=os.cpu_count() or 1):
            data = prepare(Path(folder))
        for name in options.pair or PAIRS:
            optimizer, schedule = PAIRS[name]
            rate, seconds = tune(data, optimizer, schedule, options.tuning)
            runs = [measure(data, optimizer | {"lr": rate}, schedule, seed, options.epochs) for seed in range(options.seeds)]
            found[name] = {
                "lr": rate,
                "tuning": seconds,
                "seconds": [statistics.median(run.seconds[goal] for run in runs) for goal in range(len(GOALS))],
                "epochs": [statistics.median(run.epochs[goal] for run in runs) for goal in range(len(GOALS))],
                "best": statistics.median(run.best for run in runs),
            }
            print(name, found[name], file=sys.stderr, flush=True)
            if options.json:
                options.json.write_text(json.dumps(found))
    if options.plot:
        plot(found, options.plot)
    print(table(found))


if __name__ == "__main__":
    main()
