"""What distributed training costs beside the arithmetic: from the command to the first step, and how it grows with the number of workers.

    python -m tests.bench.scale --json [--part start|split|growth]

`start`: seconds from `dlopt run` with prepared data to the end of the first optimizer step, in the process of the run (`workers_0`) and
with two workers (`workers_2`), in parts that add up; the fastest of some turns, and the CPU seconds of all processes until then.

`split`: rows/s of the CNN on MNIST, batch 256, of 2 workers with 1 thread each over those of 1 worker with 2 threads, in turn.

`growth`: groups of 1, 2, 4, 8 and 16 workers on this machine, with a network of 1,400 numbers. A group's start; a whole step of training;
an all-reduce of the gradient; the poll by which workers agree about twice a second. To each a + b * n is fitted by least squares, for which
there is a cause below, and extrapolated to 64 and 512 workers. How to read it:

* n workers here queue for the cores: with c cores a step takes no less than n / c times the CPU seconds of one worker, whatever it waits
  for. So seconds by the clock say what so many workers on one machine cost, and it is the CPU time of one worker, `step_cpu` and
  `all_reduce_cpu`, that carries over to machines of their own.
* In a step there is one all-reduce (of more than 25 MiB there are several, which overlap with the way back), and nothing else but a poll
  of 3 + n numbers twice a second, losses every 1000 steps, and two small ones at the end of an epoch. Gloo's is a ring, which here two
  workers have, too, as on two machines: each sends 2 (n - 1) / n times the bytes of the gradient, which hardly grows, in 2 (n - 1) rounds
  one after another, which does: a + b n.
* With a core each and a real network a step costs the CPU time of one worker and 2 (n - 1) times NETWORK_SECONDS, which a message is on its
  way; `with_a_core_each` has that sum. A tiny network so waits for the ring nearly all the time on 512 workers: there a step should have
  more to compute, or be exchanged rarely (train.synchronization). On GPUs NCCL takes trees, whose rounds grow with log n.
* A start is importing torch in each worker, which here goes on n / c times as long as with a core each, and Ray Train's controller, which
  starts workers from one process: the slope that remains where nobody queues. (dlopt itself shares rows out to at most 64 workers.)
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist

from dlopt import session
from dlopt.artifact import Artifact, once
from dlopt.data.kinds import CategoryTarget, NumberInput
from dlopt.data.prepare import PREPARE
from dlopt.data.section import Data
from dlopt.data.sources import Parquet
from dlopt.data.table.split import RandomSplit
from dlopt.models import Cnn, Mlp
from dlopt.optim.optimizers import Adam
from dlopt.train import worker
from dlopt.train.job import Fit, Resources, Train
from dlopt.train.parallel import base
from dlopt.train.parallel.agreement import Agreement
from dlopt.train.stage import FIT
from dlopt.train.watch import metrics_log
from tests.bench import train as feeds
from tests.bench.noted import FIRST
from tests.commands import ROOT, environment
from tests.served import descendants

SIZES = (1, 2, 4, 8, 16)
FAR = (64, 512)
REPEATED = 200
"""Exchanges that are timed, after a tenth of them that are not."""
NETWORK_SECONDS = 50e-6
"""That a message takes from one machine to another over TCP, in a machine room."""
TURNS = 3
TICKS = os.sysconf("SC_CLK_TCK")


# From the command to the first step

JOB = """
name: start
data:
  source: {{kind: parquet, path: {path}}}
  inputs: [{{kind: number, columns: [a, b, c]}}]
  target: {{kind: category, column: label}}
model: {{kind: mlp, hidden: [16]}}
train: {{epochs: 1000, batch_size: 256}}
export: []
"""


def start(workers: int, turns: int) -> dict[str, Any]:
    """The fastest of some turns."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        home, job = Path(folder), Path(folder) / "job.yaml"
        values = np.random.default_rng(1).normal(size=(4000, 3))
        label = np.where(values.sum(axis=1) > 0, "yes", "no")
        pq.write_table(pa.table({name: values[:, place] for place, name in enumerate("abc")} | {"label": label}), home / "rows.parquet")
        job.write_text(JOB.format(path=home / "rows.parquet"))
        subprocess.run([sys.executable, "-m", "dlopt", "prepare", job, "--home", home], cwd=ROOT, env=environment(), check=True, stdout=-3)
        found = [_started(home, job, workers) for _ in range(turns)]
    return min(found, key=lambda parts: parts["all"])


def _started(home: Path, job: Path, workers: int) -> dict[str, Any]:
    """One turn: the run is told to stop as soon as it has done its first step."""
    words = [sys.executable, "-m", "tests.bench.noted", "run", str(job), f"resources.workers={workers}", "--home", str(home), "--fresh"]
    began = time.time()
    errors = home / "errors"
    with open(errors, "w") as file:
        process = subprocess.Popen(words, cwd=ROOT, env=environment(), stdout=file, stderr=file, start_new_session=True)
        seen: list[tuple[float, str]] = []
        while not (first := list(home.glob(f"model/*/{FIRST}"))) and process.poll() is None:
            lines = errors.read_text().splitlines()
            seen += [(time.time(), line) for line in lines[len(seen) :]]
            time.sleep(0.02)
        cpu = _cpu_seconds(process.pid)
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    if not first:
        raise RuntimeError(errors.read_text())
    python = float(re.findall(rf"{FIRST} python (\S+)", errors.read_text())[0])
    set_out, done = json.loads(first[0].read_text())
    first[0].unlink()
    fit = next(when for when, line in seen if ": fit " in line)
    ray = next((when for when, line in seen if ": ray " in line), fit)
    marks = {"python": python, "imports": ray, "ray": fit, "workers": set_out, "first_step": done}
    parts, before = {}, began
    for name, when in marks.items():
        parts[name], before = round(when - before, 2), when
    return parts | {"all": round(done - began, 2), "cpu_seconds": round(sum(cpu.values()), 1), "cpu_seconds_by": cpu}


def _cpu_seconds(pid: int) -> dict[str, float]:
    """Of a process and of those below it that are still there, by what they are."""
    found: dict[str, float] = {}
    for one, line in ({pid: "dlopt"} | descendants(pid)).items():
        try:
            fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        name = _named(line)
        found[name] = round(found.get(name, 0.0) + (int(fields[11]) + int(fields[12])) / TICKS, 2)
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _named(line: str) -> str:
    """RayTrainWorker of ray::RayTrainWorker.run, raylet of /a/b/raylet --c, log_monitor of python -u /a/log_monitor.py."""
    words = line.split()
    path = next((word for word in words if word.endswith(".py")), words[0])
    return re.split(r"[.\s]", Path(path.removeprefix("ray::")).name)[0]


# Two workers with a thread each against one with two


def split(pairs: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        data = feeds.prepare(Path(folder))
        found = [(_rows_per_second(data, 2, 1), _rows_per_second(data, 1, 2)) for _ in range(pairs)]
    return {
        "rows_per_s": round(statistics.median(two for two, _ in found)),
        "one_worker_rows_per_s": round(statistics.median(one for _, one in found)),
        "ratio": round(statistics.median(two / one for two, one in found), 3),
        "best_ratio": round(max(two for two, _ in found) / max(one for _, one in found), 3),
        "ratios": [round(two / one, 3) for two, one in found],
    }


def _rows_per_second(data: Artifact, workers: int, threads: int) -> float:
    """Of the fastest epoch but the first."""
    section = Fit(seed=1, model=Cnn(), augment=(), train=Train(epochs=feeds.EPOCHS, batch_size=256, optimizer=Adam()))
    with tempfile.TemporaryDirectory(prefix="bench-") as home:
        resources = Resources(workers=workers, cpus_per_worker=threads, feed="resident")
        out = once(FIT, section, Path(home), data, resources=resources).path
        seconds = [line["seconds"] for line in metrics_log.read(out / metrics_log.NAME) if "train" in line]
    return data.info["counts"]["train"] / min(seconds[1:])


# Groups of more and more workers


def growth(sizes: tuple[int, ...]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        data = _tiny(Path(folder))
        found = {size: _group(Path(folder), data, size) for size in sizes}
    measured = {name: {size: found[size][name] for size in sizes} for name in found[sizes[0]]}
    fits = {name: fitted({size: value for size, value in by.items() if size > 1}) for name, by in measured.items()}
    return {"measured": measured, "fitted": fits, "with_a_core_each": {n: round(fits["step_cpu"][n] + ring(n), 6) for n in FAR}}


def ring(workers: int) -> float:
    """Seconds that the messages of one all-reduce are on their way, one after another."""
    return 2 * (workers - 1) * NETWORK_SECONDS


def _tiny(folder: Path) -> Artifact:
    values = np.random.default_rng(1).normal(size=(16384, 16))
    table = {f"x{place}": values[:, place] for place in range(16)} | {"label": np.where(values.sum(axis=1) > 0, "yes", "no")}
    pq.write_table(pa.table(table), folder / "rows.parquet")
    source = Parquet(path=str(folder / "rows.parquet"))
    inputs = (NumberInput(columns=tuple(f"x{place}" for place in range(16))),)
    everything = RandomSplit(train=1, validation=0, test=0)
    section = Data(source=source, inputs=inputs, target=CategoryTarget(column="label"), split=everything)
    return once(PREPARE, section, folder, found=source.found())


def _group(folder: Path, data: Artifact, size: int) -> dict[str, float]:
    """What a group of so many workers takes, in seconds."""
    from dlopt.train.cluster import group, room  # which import Ray, whose settings must stand before

    out = folder / f"group-{size}"
    out.mkdir()
    config = {"data": str(data.path), "out": str(out), "began": time.time()}
    return group.train(measured, config, size, room.Need(size, size, {"CPU": 0.1}), out / "ray", 300)


def measured(config: dict[str, Any]) -> dict[str, float]:
    """What each worker does; worker 0 tells."""
    import ray.train

    torch.set_num_threads(1)
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    started = time.time() - config["began"]
    fit = Fit(seed=1, model=Mlp(hidden=(64,)), augment=(), train=Train(epochs=1, batch_size=64, log_every=1000))
    assignment = worker.Assignment(fit=fit, data=Path(config["data"]), out=Path(config["out"]), feed="resident")
    mine = worker.Worker(assignment, rank, world, torch.device("cpu"))
    base.meet = lambda rank, size: None  # type: ignore[assignment]  # as between machines
    training = mine.training(Artifact.open(assignment.data), mine.state(Artifact.open(assignment.data))[0])
    steps, gradient, agreement = training.steps(1), torch.zeros(1400), Agreement(rank, world, torch.device("cpu"))
    found = {"start": round(started, 2)}
    found |= _timed("step", lambda: next(steps))
    found |= _timed("all_reduce", lambda: dist.all_reduce(gradient) if world > 1 else None)
    return found | _timed("poll", lambda: agreement.exchange(1, None, False, 0.0))


def _timed(name: str, act: Callable[[], Any]) -> dict[str, float]:
    """The mean of many, by the clock and by the CPU time of this process."""
    for _ in range(REPEATED // 10):
        act()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(REPEATED):
        act()
    seconds = {name: time.perf_counter() - wall, f"{name}_cpu": time.process_time() - cpu}
    return {key: round(value / REPEATED, 7) for key, value in seconds.items()}


def fitted(found: dict[int, float]) -> dict[str, Any]:
    """a + b * n by least squares, the largest difference from it as a share of the largest value, and where it leads."""
    sizes, values = np.array(list(found), dtype=float), np.array(list(found.values()))
    matrix = np.stack([np.ones(len(sizes)), sizes], axis=1)
    (a, b), *_ = np.linalg.lstsq(matrix, values, rcond=None)
    error = float(np.abs(matrix @ [a, b] - values).max() / np.abs(values).max())
    return {"a": round(float(a), 7), "b": round(float(b), 7), "error": round(error, 4)} | {n: round(float(a + b * n), 6) for n in FAR}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--part", action="append", choices=["start", "split", "growth"], help="only this one (may be given several times)")
    parser.add_argument("--turns", type=int, default=TURNS, help=f"of each (default: {TURNS})")
    parser.add_argument("--most", type=int, default=SIZES[-1], help=f"workers of the largest group (default: {SIZES[-1]})")
    options = parser.parse_args()
    parts, found = options.part or ["start", "split", "growth"], {}
    if "start" in parts:
        found["start"] = {f"workers_{workers}": start(workers, options.turns) for workers in (0, 2)}
    if {"split", "growth"} & set(parts):
        with session.connected(None, cpus=8):
            if "split" in parts:
                found["split"] = split(options.turns)
            if "growth" in parts:
                found["growth"] = growth(tuple(size for size in SIZES if size <= options.most))
    found |= {"cores": os.cpu_count(), "load": os.getloadavg()[0], "torch": torch.__version__}
    print(json.dumps(found) if options.json else json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
