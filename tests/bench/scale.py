"""What it costs to train on many workers: how long the start takes and where it goes, what coordination costs as workers become more, and
whether two workers of a thread each are as fast as one of two threads.

    python -m tests.bench.scale --json

`start`: from the command to the first step, on prepared data, in seconds that add up: the interpreter and imports; the job read and
checked; Ray started; the group of workers set out; the first step done (known within half a second, when the first line of speed.jsonl
comes). `load` is the machine's load average, without which no time here says anything.

`two_by_one`: rows/s of the CNN on MNIST, batch 256, an epoch of one after an epoch of the other, by the fastest of each.

`growth.step`: a tiny network and tiny batches, so that a step is nothing but its own cost, on 1 to 16 processes that share this
machine's cores. Seconds of a step say how they queue for the cores: with c cores they cannot be less than n / c times the CPU seconds of
one worker. So what is fitted and carried on to more workers is a worker's CPU time, which does not depend on who else runs; and of it,
`exchange`, what a step takes more than on one worker.

    What is sent: one all-reduce a step (the gradients' bucket; a large network has one for every 25 MiB, which overlap with the way back)
    and nothing else, but one of 3 + n numbers twice a second, one of at most 1000 losses every 1000 steps, and two at an epoch's end.
    Gloo's is a ring: each worker sends 2 (n - 1) / n times the bytes of the gradients, which hardly grows, in 2 (n - 1) messages after one
    another, which does: a + b n, not a + b log n.
    With a core each a step costs a worker's own CPU time and 2 (n - 1) times what a message is on its way, NETWORK_SECONDS in a
    machine room; here, over loopback and with all in one queue for two cores, the way is free and the queue is dear. `with_a_core_each`
    has that sum for 64 and 512. A tiny network on 512 workers so waits for the ring nearly all the time: there a step should have more to
    compute (tenths of a second), or be exchanged rarely (train.synchronization); on GPUs NCCL takes trees, whose messages grow with log n.

`growth.start`: from Ray Train's `fit()` to the first line of the loop on all workers, which this machine's cores start one after another
as well: n workers import torch n times, so seconds here are at least n / c times the CPU seconds of a worker. `others_cpu_seconds` is what
all other processes spend meanwhile (driver, Ray Train's controller, raylet, GCS): the part that does not spread out over nodes. With a
core each a start is: a worker's CPU time, as long as it is with one, plus what the others do, one worker after another. Of that the
raylet's part, which here serves all workers, has a node of its own on a cluster, so the sum is an upper bound. (dlopt shares rows out to
at most 64 workers; 512 is what Ray and the ring would cost.)

Each is fitted by least squares by a + b n and a + b log2 n; `best` is the one that leaves less. Points of more workers are left out
once the time for them is spent.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dlopt import session
from dlopt.artifact import Artifact, write_atomically
from dlopt.data.prepared import Split
from dlopt.models import Cnn, Mlp
from dlopt.optim.optimizers import Adam
from dlopt.train import metrics_log
from dlopt.train.checkpoints import Checkpointing, Every
from dlopt.train.section import Fit, Resources, Train
from dlopt.train.worker import Assignment, _Worker
from tests import sets
from tests.bench.train import prepare

JOB = Path(__file__).resolve().parents[2] / "jobs" / "mnist.yaml"
COUNTS = (1, 2, 4, 8, 16)
LARGER = (64, 512)
NETWORK_SECONDS = 50e-6
"""From one machine to another over TCP, in a machine room."""
SECONDS = 60.0
"""After so long nothing more is begun of a part."""
LAST = 10**6
"""More epochs than are ever trained."""


# ---- from the command to the first step

COMMAND = """
import sys
from dlopt.session import set_environment
set_environment(None)
from dlopt import pipeline, spec
from dlopt.terminal import Terminal
print("imported", file=sys.stderr, flush=True)
from dlopt.cli import main
sys.exit(main())
"""
"""`dlopt`, which says when its imports are done."""
MARKS = {"imports": "imported", "checks": ": ray ", "ray": ": fit "}
"""The parts of a start that end with the first line on stderr that has this text."""


def start(home: Path, workers: int) -> dict[str, float]:
    """Seconds of each part of one start, and in all."""
    arguments = ["run", "--fresh", "--home", str(home), str(JOB), f"train.epochs={LAST}", f"resources.workers={workers}"]
    began = time.time()
    run = subprocess.Popen([sys.executable, "-c", COMMAND, *arguments], stderr=subprocess.PIPE, text=True)
    try:
        marks = dict(_marks(run))
        threading.Thread(target=run.communicate, daemon=True).start()  # what else it says is of no interest
        marks |= {"group": _line(home, metrics_log.STARTS, began, run), "first_step": _line(home, metrics_log.SPEED, began, run)}
    finally:
        run.send_signal(signal.SIGTERM)
        run.wait(120)
    times = [began, *marks.values()]
    parts = {name: round(after - before, 2) for name, before, after in zip(marks, times, times[1:], strict=False)}
    return parts | {"total": round(times[-1] - began, 2)}


def _marks(run: subprocess.Popen[str]) -> Iterator[tuple[str, float]]:
    assert run.stderr
    for name, text in MARKS.items():
        line = next((line for line in run.stderr if text in line), None)
        if line is None:
            raise RuntimeError(f"dlopt run has ended before it said {text!r}")
        yield name, time.time()


def _line(home: Path, name: str, began: float, run: subprocess.Popen[str]) -> float:
    """The `time` of the first line of that file of the model that is made since, once there is one."""
    while run.poll() is None:
        for path in home.glob(f"model/*/{name}"):
            times = [line["time"] for line in metrics_log.read(path) if line["time"] > began]
            if times:
                return min(times)
        time.sleep(0.02)
    raise RuntimeError(f"dlopt run has ended before there was a line in {name}")


def starts(turns: int, seconds: float) -> dict[str, Any]:
    """Of 0 and 2 workers: the fastest of some turns, and the seconds in all of each."""
    found: dict[int, list[dict[str, float]]] = {0: [], 2: []}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        command = [sys.executable, "-m", "dlopt.cli", "prepare", str(JOB), "--home", folder]
        subprocess.run(command, check=True, capture_output=True)
        for _ in _within(seconds, range(turns)):
            for workers, turn in found.items():
                turn.append(start(Path(folder), workers))
    each = {
        f"workers_{n}": min(turn, key=lambda one: one["total"]) | {"totals": [one["total"] for one in turn]} for n, turn in found.items()
    }
    return each | {"load": _load()}


# ---- groups of processes that train


class Turn(NamedTuple):
    """Of an epoch, or of some exchanges."""

    seconds: float
    """Until the last worker was through."""
    cpu: float
    """Seconds that one worker has computed, on the average."""


class Group:
    """Some processes that train one network over gloo, an epoch each time that they are told to."""

    def __init__(self, world: int, threads: int, fit: Fit, data: Artifact, folder: Path) -> None:
        given = Assignment(
            fit=fit,
            data=data.path,
            out=folder,
            feed="resident",
            threads=threads,
            resources=Resources(checkpoint=Checkpointing(every=Every(epochs=LAST))),
        )
        folder.mkdir(parents=True)
        context = mp.get_context("spawn")
        pipes = [context.Pipe() for _ in range(world)]
        self.pipes = [mine for mine, _ in pipes]
        self.processes = [
            context.Process(target=_serve, args=(rank, world, given.model_dump_json(), theirs)) for rank, (_, theirs) in enumerate(pipes)
        ]
        for process, (_, theirs) in zip(self.processes, pipes, strict=True):
            process.start()
            theirs.close()  # so that one that ends early is seen
        self.parameters = max(int(pipe.recv()) for pipe in self.pipes)

    def epoch(self) -> Turn:
        return self._all("epoch")

    def exchanges(self) -> Turn:
        """Of one all-reduce of as many numbers as the network has."""
        return self._all("exchanges")

    def _all(self, what: str) -> Turn:
        for pipe in self.pipes:
            pipe.send(what)
        found = [pipe.recv() for pipe in self.pipes]
        return Turn(max(seconds for seconds, _ in found), statistics.mean(cpu for _, cpu in found))

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join()


@contextmanager
def group(world: int, threads: int, fit: Fit, data: Artifact) -> Iterator[Group]:
    """Within it, a group is there; its first epoch, which is slower than others, is over."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        found = Group(world, threads, fit, data, Path(folder) / "out")
        try:
            found.epoch()
            yield found
        finally:
            found.close()


EXCHANGES = 300


def _serve(rank: int, world: int, given: str, pipe: Connection) -> None:
    """A process of a group."""
    assignment = Assignment.model_validate_json(given)
    torch.set_num_threads(assignment.threads or 1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{assignment.out}/rendezvous", rank=rank, world_size=world)
    data, worker = Artifact.open(assignment.data), _Worker(assignment, rank, world, torch.device("cpu"))
    state, _ = worker.state(data)
    training = worker.training(data, state)
    gradients = torch.zeros(sum(parameter.numel() for parameter in state.model.parameters()))
    pipe.send(gradients.numel())
    while what := pipe.recv():
        began, computed = time.perf_counter(), time.process_time()
        if what == "epoch":
            training._epoch()
        else:
            for _ in range(EXCHANGES):
                dist.all_reduce(gradients)
        pipe.send((time.perf_counter() - began, time.process_time() - computed))
    if world > 1:
        dist.barrier()  # a process that ends while another still talks to it may abort on its way out
        dist.destroy_process_group()


def two_by_one(turns: int, seconds: float) -> dict[str, Any]:
    """Two workers of a thread each, and one of two, in turn."""
    fit = Fit(seed=1, model=Cnn(), augment=(), train=Train(epochs=LAST, batch_size=256, optimizer=Adam()))
    with session.connected(None), tempfile.TemporaryDirectory(prefix="bench-") as folder:
        data = prepare(Path(folder))
        with group(2, 1, fit, data) as two, group(1, 2, fit, data) as one:
            found = [(two.epoch(), one.epoch()) for _ in _within(seconds, range(turns))]
        rows = len(Split.open(data, "train"))
    best = [rows / min(turn.seconds for turn in side) for side in zip(*found, strict=True)]
    return {
        "rows_per_s": round(best[0]),
        "one_worker_rows_per_s": round(best[1]),
        "best_ratio": round(best[0] / best[1], 3),
        "ratios": [round(b.seconds / a.seconds, 3) for a, b in found],
        "cpu_ratio": round(statistics.median(b.cpu / (2 * a.cpu) for a, b in found), 3),
        "load": _load(),
    }


# ---- growth

STEPS, EPOCHS = 200, 3


def growth_of_step(seconds: float) -> dict[str, Any]:
    """A step of a tiny network on more and more workers."""
    fit = Fit(seed=1, model=Mlp(hidden=(16,)), augment=(), train=Train(epochs=LAST, batch_size=64, optimizer=Adam()))
    points: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        data = sets.prepared(Path(folder), sets.signature(sets.NUMBERS, target=sets.TWO), train=64 * STEPS, validation=0, test=0)
        for workers in _within(seconds, COUNTS):
            with group(workers, 1, fit, data) as found:
                epochs = [found.epoch() for _ in range(EPOCHS)]
                exchange = found.exchanges() if workers > 1 else Turn(0, 0)
                point = {"workers": workers, "seconds": min(turn.seconds for turn in epochs) / STEPS}
                point |= {"cpu_seconds": min(turn.cpu for turn in epochs) / STEPS, "load": _load()}
                point |= {"all_reduce_seconds": exchange.seconds / EXCHANGES, "all_reduce_cpu_seconds": exchange.cpu / EXCHANGES}
                points.append(point | {"gradient_bytes": 4 * found.parameters, "messages": 2 * (workers - 1)})
    alone, several = points[0], points[1:]
    exchange = {point["workers"]: point["cpu_seconds"] - alone["cpu_seconds"] for point in several}
    carried = _carried_on(exchange)
    ring = {n: 2 * (n - 1) * NETWORK_SECONDS for n in LARGER}
    each = {n: alone["cpu_seconds"] + max(0.0, carried[carried["best"]][str(n)]) + ring[n] for n in LARGER}
    return {"points": _rounded(points), "exchange_cpu_seconds": carried, "with_a_core_each": _rounded(each)}


def growth_of_start(seconds: float) -> dict[str, Any]:
    """The start of a group of Ray Train of more and more workers."""
    with session.connected(None), tempfile.TemporaryDirectory(prefix="bench-") as folder:
        points = [start_of_group(Path(folder) / f"{n}", n) for n in _within(seconds, COUNTS)]
    took = {point["workers"]: point["seconds"] for point in points}
    others = {point["workers"]: point["others_cpu_seconds"] for point in points}
    carried, alone = _carried_on(others), min(point["cpu_seconds"] for point in points)
    each = {n: alone + carried[carried["best"]][str(n)] for n in LARGER}
    found = {"points": _rounded(points), "seconds": _carried_on(took), "others_cpu_seconds": carried}
    return found | {"with_a_core_each": _rounded(each)}


def start_of_group(folder: Path, workers: int) -> dict[str, Any]:
    """From Ray Train's start of so many workers to the first line of the loop on all of them."""
    from dlopt.train import group as groups

    folder.mkdir()
    computed, began = _cpu_of_tree(), time.time()
    found: list[float] = []
    watcher = threading.Thread(target=lambda: found.append(_when_all_are_there(folder, workers)))
    watcher.start()
    groups.train(_arrive, {"folder": str(folder)}, workers, {"CPU": 0.01}, folder / "ray", 300)
    watcher.join()
    there = [json.loads((folder / str(rank)).read_text()) for rank in range(workers)]
    theirs = [one["cpu"] for one in there]
    return {
        "workers": workers,
        "seconds": max(one["time"] for one in there) - began,
        "cpu_seconds": statistics.mean(theirs),
        "others_cpu_seconds": found[0] - computed - sum(theirs),
        "load": _load(),
    }


def _arrive(config: dict[str, Any]) -> dict[str, Any]:
    """The loop on each worker: note when its first line ran, and wait until all have."""
    import ray.train

    import dlopt.train.worker  # noqa: F401 - what training needs

    folder, rank = Path(config["folder"]), ray.train.get_context().get_world_rank()
    write_atomically(folder / str(rank), json.dumps({"time": time.time(), "cpu": time.process_time()}))
    while not (folder / "go").exists():
        time.sleep(0.05)
    return {}


def _when_all_are_there(folder: Path, workers: int) -> float:
    """CPU seconds of this process and those below it at that time."""
    while not all((folder / str(rank)).exists() for rank in range(workers)):
        time.sleep(0.05)
    computed = _cpu_of_tree()
    (folder / "go").touch()
    return computed


def _cpu_of_tree() -> float:
    """CPU seconds of this process and of all that it has started, and those have, that are alive. By /proc."""
    parents, seconds = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        pid = int(path.parent.name)
        parents[pid], seconds[pid] = int(fields[1]), (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    ours = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in ours} - ours:
        ours |= more
    return sum(seconds[pid] for pid in ours)


def _carried_on(points: dict[int, float]) -> dict[str, Any]:
    """Of a cost by the number of workers: a, b and what is left over of both fits, and what each says of more workers."""
    costs = np.array(list(points.values()))
    found: dict[str, Any] = {}
    for name, of in (("linear", float), ("logarithmic", math.log2)):
        columns = np.array([[1.0, of(n)] for n in points])
        (a, b), *_ = np.linalg.lstsq(columns, costs, rcond=None)
        left = float(np.sqrt(np.mean((columns @ [a, b] - costs) ** 2)))
        found[name] = _rounded({"a": a, "b": b, "left": left} | {n: a + b * of(n) for n in LARGER})
    return found | {"best": min(found, key=lambda name: found[name]["left"])}


# ---- all of it


def _within(seconds: float, things: Sequence[int]) -> Iterator[int]:
    """The things, the first two always, as long as there is time."""
    began = time.monotonic()
    for index, thing in enumerate(things):
        if index < 2 or time.monotonic() - began < seconds:
            yield thing


def _rounded(value: Any) -> Any:
    """Numbers with four digits."""
    if isinstance(value, dict):
        return {str(name): _rounded(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_rounded(inner) for inner in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _load() -> float:
    return round(os.getloadavg()[0], 1)


PARTS = {
    "start": starts,
    "two_by_one": two_by_one,
    "growth_step": lambda turns, seconds: growth_of_step(seconds),
    "growth_start": lambda turns, seconds: growth_of_start(seconds),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--turns", type=int, default=3, help="of what is measured in turn (default: 3)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"after which no more of a part is begun (default: {SECONDS:g})")
    parser.add_argument("--part", action="append", choices=PARTS, help="only this one (may be given several times)")
    options = parser.parse_args()
    found = {name: PARTS[name](options.turns, options.seconds) for name in options.part or PARTS}
    print(json.dumps(found | {"cores": os.cpu_count()}) if options.json else json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
