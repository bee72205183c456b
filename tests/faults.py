"""The harness of the chaos tests: a small job and the workers that train it, which write down every row that they are given; faults that
strike a process at a step, at a moment or at one of its calls of the operating system; and what has come of a run, to compare with that of
an undisturbed one.

The product is as it is. What is added to a worker is a note of each batch it takes from its feed, and a pause before it where a run must
last long enough to be hit.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dlopt import pipeline
from dlopt.artifact import Artifact, once
from dlopt.cli import main
from dlopt.data.feed import batches as feed
from dlopt.data.feed.batches import Batch
from dlopt.spec import load
from dlopt.train import worker
from dlopt.train.checkpoint.stores import CHECKPOINTS, Store
from dlopt.train.stage import FIT
from dlopt.train.watch import metrics_log
from tests.commands import ROOT, environment
from tests.reaper import bearing
from tests.served import alive, descendants

LOAD = 3.0
"""A bound of seconds, which holds on two idle cores, is asserted times so much: tests share their cores with others."""
EVERY = 5
"""Steps between two checkpoints of the job."""
ROWS, EPOCHS = 2000, 6
STEPS = EPOCHS * 50
"""In all: 1,600 rows are for training, 32 a step."""
TRACE, PAUSE = "trace.jsonl", "pause"
"""In a run's home: what workers were given, and how many seconds they wait before each batch."""
JOB = """
name: chaos
seed: {seed}
data:
  source: {{kind: parquet, path: {path}}}
  inputs: [{{kind: number, columns: [row, a, b, c]}}]
  target: {{kind: category, column: label}}
  split: {{kind: given, column: split}}
model: {{kind: mlp, hidden: [64, 64], dropout: {dropout}}}
train: {{epochs: 6, batch_size: 32, log_every: 1, optimizer: {{kind: adam, lr: 2e-3}}, precision: {precision}}}
resources: {{workers: {workers}, checkpoint: {{every: {{steps: 5}}}}, max_failures: 20, resize_seconds: 2, wait_seconds: 120}}
export: []
"""


# The job and what comes of it


def write_rows(path: Path) -> None:
    """2,000 rows of three classes; `row` is the number of each, by which it is known again wherever it is met."""
    generator = np.random.default_rng(11)
    values = generator.normal(size=(ROWS, 3))
    score = values @ generator.normal(size=(3, 3)) + 0.1 * generator.normal(size=(ROWS, 3))
    table = {name: values[:, place] for place, name in enumerate("abc")}
    label = np.array(["x", "y", "z"])[score.argmax(axis=1)]
    split = np.repeat(["train", "validation", "test"], [1600, 200, 200])
    pq.write_table(pa.table({"row": np.arange(ROWS)} | table | {"label": label, "split": split}), path)


def write_job(folder: Path, seed: int = 3, dropout: float = 0.2, precision: str = "float32", workers: str | int = 2) -> Path:
    """The job file, beside its rows."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "rows.parquet").exists():
        write_rows(folder / "rows.parquet")
    path = folder / f"job-{seed}-{dropout}-{precision}-{workers}.yaml"
    path.write_text(JOB.format(path=folder / "rows.parquet", seed=seed, dropout=dropout, precision=precision, workers=workers))
    return path


class Outcome(NamedTuple):
    """What a run has left."""

    weights: str
    """SHA-256 of the file."""
    lines: list[dict[str, Any]]
    """Of metrics.jsonl, without seconds."""
    starts: list[dict[str, Any]]
    info: dict[str, Any]
    rows: dict[tuple[int, int], tuple[int, ...]]
    """By (epoch, batch): the rows of the batch, over all workers. Empty where workers left no trace."""


def outcome(home: Path) -> Outcome:
    """Of the one model in a home; it must be whole."""
    (path,) = models(home)
    artifact = Artifact.open(path)
    weights = hashlib.sha256(artifact.read("weights.safetensors")).hexdigest()
    return Outcome(weights, lines_of(path), starts_of(path), artifact.info, rows_of(home))


def models(home: Path) -> list[Path]:
    return sorted(path for path in home.glob("model/*") if path.is_dir())


def lines_of(out: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name != "seconds"} for line in metrics_log.read(out / metrics_log.NAME)]


def starts_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / worker.STARTS).read_text().splitlines()]


def assert_same(found: Outcome, oracle: Outcome) -> None:
    """To the last bit: weights, every line of the curve, and, where both left traces, every row of every batch."""
    assert [line["step"] for line in found.lines if "loss" in line] == list(range(1, STEPS + 1))
    assert found.lines == oracle.lines
    assert found.weights == oracle.weights
    if found.rows and oracle.rows:
        assert found.rows == oracle.rows
    assert found.info["metrics"] == oracle.info["metrics"]


def left_over(folder: Path) -> list[str]:
    """Temporary files in a folder or below it; locks stay by design."""
    return sorted(str(path) for path in folder.rglob("*") if re.search(r"(^\.|\.tmp|~$)", path.name) and path.suffix != ".lock")


# Runs on the Ray that this process is connected to


def prepared_rows(folder: Path) -> Artifact:
    """The rows, prepared once for all that give the same folder."""
    return pipeline.prepare(load(write_job(folder)), folder / "home")


def new_home(folder: Path, path: Path, pause: float = 0.0) -> Path:
    """A home in which the rows are prepared, and workers wait for so long before each batch."""
    shutil.copytree(folder / "home" / "data", path / "data", dirs_exist_ok=True)
    pace(path, pause)
    return path


def train(folder: Path, home: Path, workers: Any = 2, **job: Any) -> Outcome:
    """The model of a home, made or made before."""
    found = load(write_job(folder, workers=workers, **job))
    once(FIT, found.fit, home, prepared_rows(folder), resources=found.resources)
    return outcome(home)


def oracle(folder: Path, workers: int, **job: Any) -> Outcome:
    """What comes of an undisturbed run, which is made once for all that give the same folder."""
    name = "-".join(map(str, ("oracle", workers, *job.values())))
    with tracing():
        found = train(folder, new_home(folder, folder / name), workers, **job)
    assert found.info["restarts"] == 0
    return found


def shared_out(count: int, most: int = 5) -> list[int]:
    """So many faults over runs that bear `most` each."""
    return [min(most, count - done) for done in range(0, count, most)]


def note(record: Callable[[str, object], None], what: str, values: list[float], bound: float, load: float = LOAD) -> None:
    """Tell what was measured, and hold it against its bound, times what a loaded machine may cost."""
    record(what, f"{', '.join(f'{value:.1f}' for value in values)} s (bound {bound:g} s; fails above {bound * load:g} s)")
    assert max(values) <= bound * load


# What workers were given


def traced_worker(config: dict[str, Any], factory: Any = None, store: Store | None = None) -> dict[str, Any] | None:
    """`train_worker` that notes each batch: in a process of Ray Train, which sees none of the test's own fixtures."""
    trace(Path(config["out"]).parent.parent)
    return original(config, factory, store)


original = worker.train_worker


def trace(home: Path) -> None:
    """From now on both feeds of this process note in the home what they give, and pause."""
    began = time.time()
    file = os.open(home / TRACE, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for kind in (feed.Resident, feed.Stream):
        given = getattr(kind, "untraced", kind.epoch)
        kind.untraced = given  # type: ignore[attr-defined]
        kind.epoch = _noting(given, file, home / PAUSE, began)  # type: ignore[method-assign, assignment]


def untrace() -> None:
    for kind in (feed.Resident, feed.Stream):
        kind.epoch = getattr(kind, "untraced", kind.epoch)  # type: ignore[method-assign]


def _noting(given: Callable[..., Iterator[Batch]], file: int, pause: Path, began: float) -> Callable[..., Iterator[Batch]]:
    def epoch(self: Any, number: int, start: int = 0) -> Iterator[Batch]:
        for place, batch in enumerate(given(self, number, start), start):
            (values,) = batch.inputs.values()
            line = {"time": time.time(), "rank": self.sampler.rank, "world": self.sampler.world, "pid": os.getpid(), "began": began}
            line |= {"epoch": number, "batch": place, "rows": values[:, 0].int().tolist()}
            os.write(file, json.dumps(line).encode() + b"\n")
            time.sleep(float(pause.read_text() or 0))
            yield batch

    return epoch


def traces(home: Path) -> list[dict[str, Any]]:
    """Lines of the trace, in the order in which they were written; the last may be half written."""
    if not (home / TRACE).exists():
        return []
    text = (home / TRACE).read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def rows_of(home: Path) -> dict[tuple[int, int], tuple[int, ...]]:
    """The rows of each batch, those of rank 0 first. A batch that was given again after a fault must have had the same rows, from whatever
    number of workers; one that only some of the workers took is not counted."""
    parts: dict[tuple[int, int, int], dict[int, tuple[int, ...]]] = {}
    for line in traces(home):
        part = parts.setdefault((line["epoch"], line["batch"], line["world"]), {})
        assert part.setdefault(line["rank"], tuple(line["rows"])) == tuple(line["rows"]), line
    found: dict[tuple[int, int], tuple[int, ...]] = {}
    for (epoch, batch, world), part in parts.items():
        if len(part) == world:
            rows = tuple(row for rank in range(world) for row in part[rank])
            assert found.setdefault((epoch, batch), rows) == rows, (epoch, batch)
    return dict(sorted(found.items()))


def latest(home: Path, since: float = 0.0) -> dict[int, dict[str, Any]]:
    """The last line of each rank, of the group of workers that is at work. since: of workers that set out after that moment."""
    try:
        with open(home / TRACE, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 16384))
            lines = [json.loads(line) for line in file.read().split(b"\n")[1:-1]]  # the first and the last may not be whole
    except FileNotFoundError:
        return {}
    found = {line["rank"]: line for line in lines if line["began"] > since}
    return {rank: line for rank, line in found.items() if line["world"] == lines[-1]["world"]}


def reached(home: Path, since: float = 0.0) -> int:
    """The number of the last step that a worker has begun, from 1; 0 before. since: of workers that set out after that
    moment."""
    return max(map(step_of, latest(home, since).values()), default=0)


def steps_of_log(home: Path) -> int:
    """The last step of metrics.jsonl; 0 before there is one."""
    return max((line["step"] for out in models(home) for line in metrics_log.read(out / metrics_log.NAME)), default=0)


def step_of(line: dict[str, Any]) -> int:
    return (line["epoch"] - 1) * (STEPS // EPOCHS) + line["batch"] + 1


@contextmanager
def tracing() -> Iterator[None]:
    """Within it, workers that this process starts leave a trace."""
    worker.train_worker = traced_worker
    try:
        yield
    finally:
        worker.train_worker = original
        untrace()


def pace(home: Path, seconds: float) -> None:
    """Workers wait for so long before each batch from now on."""
    (home / PAUSE).write_text(str(seconds))


# When and how a fault strikes


def wait(until: Callable[[], Any], what: str, seconds: float = 120) -> Any:
    """The first true answer. Raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while not (found := until()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"no {what} within {seconds} seconds")
        time.sleep(0.02)  # reading the traces costs more than that
    return found


def wait_for_step(home: Path, step: int, since: float = 0.0, process: subprocess.Popen[str] | None = None, seconds: float = 180) -> None:
    """Until workers that set out after a moment have begun it, or the process that they work for has ended, which is a failure."""
    wait(lambda: _all_at(home, step, since) or (process and process.poll() is not None), f"step {step}", seconds)
    assert process is None or process.poll() is None, ended(process).stderr


def _all_at(home: Path, step: int, since: float) -> bool:
    """Whether all workers have taken a batch, and one of them is so far."""
    found = latest(home, since)
    return any(step_of(line) >= step and len(found) == line["world"] for line in found.values())


class Strike(threading.Thread):
    """Does something to a run from outside while the run goes on; what it raises is raised again on leaving."""

    def __init__(self, act: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self.act, self.error = act, None

    def run(self) -> None:
        try:
            self.act()
        except BaseException as error:
            self.error: BaseException | None = error

    def __enter__(self) -> Strike:
        self.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.join(timeout=5 if error else 300)
        if self.error and not error:
            raise self.error


class Hit(NamedTuple):
    """A fault that has struck."""

    time: float
    """By the clock of the machine, as in a trace."""
    reached: int
    """The step that the run was in."""
    saved: int
    """The step of the newest checkpoint that was there just after."""


def hit(home: Path, act: Callable[[], None]) -> Hit:
    act()
    now = time.time()
    return Hit(now, reached(home), newest_step(home))


def newest_step(home: Path) -> int:
    """How many steps the newest checkpoint has, by its name."""
    names = sorted(path.name for path in home.glob(f"model/*/{CHECKPOINTS}/[0-9]*"))
    return step_of_name(names[-1]) if names else 0


def step_of_name(name: str) -> int:
    _, epoch, batch = (int(part) for part in re.findall(r"\d+", name))
    return epoch * (STEPS // EPOCHS) + batch


def redone(hits: list[Hit], starts: list[dict[str, Any]]) -> list[int]:
    """For each fault, how many steps that had been done were done again: each set-out but the first is from one of the hits."""
    return [max(0, one.reached - 1 - start["step"]) for one, start in zip(hits, starts[1:], strict=True)]


def assert_little_redone(hits: list[Hit], starts: list[dict[str, Any]]) -> None:
    """Whatever was saved is used; and no more is done again than a checkpoint interval, and what was done while the newest one was still
    being written."""
    for one, start, again in zip(hits, starts[1:], redone(hits, starts), strict=True):
        assert start["step"] >= one.saved, (one, start)
        in_flight = max(0, (one.reached - 1) // EVERY * EVERY - one.saved)
        assert again <= EVERY + in_flight, (one, start)
        assert in_flight <= EVERY, one  # a checkpoint waits for the one before it


def recovered(home: Path, after: float) -> float:
    """Seconds from a moment to the first batch that a process which was not there yet has taken since."""
    return min(line["time"] for line in traces(home) if line["began"] > after) - after


def steps_to_strike(chance: random.Random, count: int, low: int = 8, high: int = STEPS - 20) -> list[int]:
    """Random steps of a run, in order, and at least 15 apart."""
    room = high - low - 15 * (count - 1)
    return [step + 15 * place for place, step in enumerate(sorted(chance.randrange(low, low + room) for _ in range(count)))]


def workers_of(pid: int, name: str = "RayTrainWorker") -> list[int]:
    """Processes of Ray below one, the oldest first."""
    return sorted(found for found, line in descendants(pid).items() if line.startswith(f"ray::{name}"))


def kill(*pids: int) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


# Processes and what is left of them


RUN = "from tests.faults import run; run()"


def run() -> None:
    """`dlopt WORDS`, whose workers leave a trace."""
    worker.train_worker = traced_worker
    sys.exit(main())


def start_run(home: Path, job: Path, mark: str, *overrides: str) -> subprocess.Popen[str]:
    """`dlopt run JOB`, which leaves a trace, in a process of its own."""
    words = [sys.executable, "-c", RUN, "run", str(job), *overrides, "--home", str(home)]
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    return subprocess.Popen(words, cwd=ROOT, env=environment(DLOPT_CHAOS=mark, RAY_AUTH_MODE="disabled"), **options)


def ended(process: subprocess.Popen[str], seconds: float = 240) -> subprocess.CompletedProcess[str]:
    """Wait for the end of a process; it is killed, and all that bears its mark, when it takes longer."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"the run has not ended after {seconds} seconds: {out}{err}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def assert_nothing_runs(mark: str, seconds: float = 120) -> None:
    """Ray's processes take a minute to notice that theirs was killed. What is left then is ended, and told."""
    left = alive(bearing(mark), seconds)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == {}


# A process that dies at one of its own calls of the operating system


class Call(NamedTuple):
    """Before which call of the operating system under a folder a process is; and, where what was written has not been flushed, whether the
    machine dies with it, so that half of it is lost."""

    number: int
    torn: bool = False


class Calls:
    """Counts calls that change what is under a folder, notes each, and kills this process before one of them."""

    CHANGE = {"os.rename": (0, 1), "os.remove": (0,), "os.rmdir": (0,), "os.mkdir": (0,), "os.truncate": (0,), "os.link": (0, 1)}
    """Audit events, and which of their arguments are paths."""

    def __init__(self, folder: Path, notes: Path, at: Call | None) -> None:
        self.folder, self.at, self.count = str(folder), at, 0
        self.notes = os.open(notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.lock = threading.Lock()
        sys.addaudithook(self._hear)
        fsync = os.fsync

        def heard(descriptor: Any) -> None:
            number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
            self._note("fsync", str(Path(f"/proc/self/fd/{number}").readlink()), number)
            fsync(descriptor)

        os.fsync = heard

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            self._note(event, arguments[0])
        elif event in self.CHANGE:
            self._note(event, *(_whole(arguments[place], arguments[-1]) for place in self.CHANGE[event]))

    def _note(self, event: str, *paths: Any) -> None:
        names = [os.fspath(path) for path in paths if isinstance(path, (str, os.PathLike))]
        if not any(str(name).startswith(self.folder) for name in names):
            return
        with self.lock:
            self.count += 1
            os.write(self.notes, json.dumps([event, *(str(name).removeprefix(self.folder + "/") for name in names)]).encode() + b"\n")
            if self.at and self.count == self.at.number:
                if self.at.torn:
                    os.ftruncate(paths[1], os.fstat(paths[1]).st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)


def _whole(path: Any, folder: Any) -> Any:
    """A path, also where it is given against an open folder, as rmtree does."""
    if isinstance(path, str) and not path.startswith("/") and isinstance(folder, int) and folder >= 0:
        return str(Path(f"/proc/self/fd/{folder}").readlink() / path)
    return path
