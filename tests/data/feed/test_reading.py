"""What Ray Data reads for a stream: each chunk once an epoch whatever the number of workers, no more ahead than there is room for, in
memory that does not grow."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
import uuid
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dlopt.artifact import Artifact, Stage, once
from dlopt.data.augment import MixUp, RandomHorizontalFlip
from dlopt.data.feed.batches import RemoteDealer, Stream
from dlopt.data.feed.dealer import ReadPlan
from dlopt.data.feed.sampler import Sampler
from dlopt.data.prepared import Split, as_table, write_part
from dlopt.part import Feature, Part, Signature, Target

CPU = torch.device("cpu")
SIGNATURE = Signature(
    inputs=(Feature(name="image", kind="image", dtype="uint8", shape=(32, 32, 3), columns=("image",)),),
    target=Target(name="label", labels=(0, 1, 2)),
)
ROW = 32 * 32 * 3 + 8
CHUNK = 341
"""Rows of a full chunk of such rows."""
FILE = 2000
"""Rows of a file."""


class Images(Part):
    """Random images."""

    files: int


def make(section: Images, out: Path) -> dict[str, Any]:
    random = np.random.default_rng(1)
    for number in range(section.files):
        rows = {"image": random.integers(0, 256, (FILE, 32, 32, 3), dtype=np.uint8), "label": random.integers(0, 3, FILE)}
        write_part(as_table(SIGNATURE, rows), SIGNATURE, out / "train" / f"part-{number:05d}.parquet")
    (out / "signature.json").write_text(SIGNATURE.model_dump_json())
    return {}


def made(home: Path, files: int) -> Artifact:
    return once(Stage("data", make), Images(files=files), home)


def recorded(sampler: Sampler, log: Path) -> Sampler:
    """The sampler, whose readers write a line for each read: the process, its memory, and which chunks."""

    class Recording(Split):  # here, so that it travels to the readers whole
        def read(self, chunks: Any = None) -> Any:
            rows = super().read(chunks)
            found = [[chunk.file, chunk.group, chunk.rows] for chunk in (self.chunks if chunks is None else chunks)]
            status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            with open(log, "a") as file:
                file.write(json.dumps({"pid": os.getpid(), "kib": int(status["RssAnon"].split()[0]), "chunks": found}) + "\n")
            return rows

    loaded: Any = {"a statistic": Loaded(log.with_suffix(".loaded"))}
    return replace(sampler, split=Recording(sampler.split.signature, sampler.split.chunks), statistics=loaded)


class Loaded:
    """Writes a line to a file each time it arrives in a process."""

    def __init__(self, log: Path) -> None:
        self.log = log

    def __reduce__(self) -> Any:
        return _arrived, (self.log,)


def _arrived(log: Path) -> Loaded:
    with open(log, "a") as file:
        file.write(f"{os.getpid()}\n")
    return Loaded(log)


def reads(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def sampler_of(data: Artifact, rank: int, world: int, window: int, parts: tuple[Any, ...] = (), batch_size: int = 64) -> Sampler:
    found = Sampler.of(Split.open(data, "train"), 3, batch_size, rank, world, parts)
    return replace(found, order=replace(found.order, window=window))


@pytest.mark.slow
@pytest.mark.parametrize(("world", "window", "mixes"), [(4, 7, True), (1, 1000, False), (1, 7, True), (2, 30, False), (4, 1000, False)])
def test_each_chunk_is_read_once_an_epoch_whatever_the_number_of_workers_and_windows(
    world: int, window: int, mixes: bool, tmp_path: Path, ray_cluster: None
) -> None:
    data, log = made(tmp_path, 3), tmp_path / "reads.jsonl"
    samplers = [sampler_of(data, rank, world, window, (MixUp(),) if mixes else ()) for rank in range(world)]
    dealer = RemoteDealer.start(ReadPlan(recorded(samplers[0], log), 1, 2, 0, read_bytes=2**20))
    streams = [Stream(sampler, 1, 2, CPU, 0, dealer) for sampler in samplers]
    for epoch in (1, 2):
        delivered = [batch.rows for stream in streams for batch in stream.epoch(epoch)]
        assert sorted(np.concatenate(delivered).tolist()) == list(range(3 * FILE))
    found = sorted((file, group) for line in reads(log) for file, group, _ in line["chunks"])
    chunks = samplers[0].split.chunks
    assert len(chunks) == 18
    assert found == sorted([(chunk.file, chunk.group) for chunk in chunks] * 2)
    arrived = Counter(log.with_suffix(".loaded").read_text().split())
    assert {str(line["pid"]) for line in reads(log)} <= set(arrived) and max(arrived.values()) == 1  # not once for each task


@pytest.mark.slow
def test_an_epoch_begun_late_reads_nothing_of_the_windows_before(tmp_path: Path, ray_cluster: None) -> None:
    data, log = made(tmp_path, 3), tmp_path / "reads.jsonl"
    sampler = sampler_of(data, 0, 1, window=16)
    last = sampler.order.windows - 1
    dealer = RemoteDealer.start(ReadPlan(recorded(sampler, log), 1, 1, last * 16, read_bytes=1))
    assert (
        sum(len(batch.target) for batch in Stream(sampler, 1, 1, CPU, last * 16, dealer).epoch(1, last * 16)) == 3 * FILE - last * 16 * 64
    )
    assert 1 <= sum(len(line["chunks"]) for line in reads(log)) <= 3


def memory() -> int:
    """KiB of this process, without what it shares with Ray's object store."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0])


WINDOW = 24
"""Batches of a window in the tests of memory: 4.5 MiB."""
AHEAD = 12 * 2**20


@pytest.mark.slow
def test_memory_is_flat_on_a_set_many_times_larger_than_a_window(tmp_path: Path, ray_cluster: None) -> None:
    """Of the process that trains and of the readers: 130 windows of two epochs, 600 MB."""
    data, log = made(tmp_path, 50), tmp_path / "reads.jsonl"
    sampler = sampler_of(data, 0, 1, WINDOW, (RandomHorizontalFlip(), MixUp()))
    dealer = RemoteDealer.start(ReadPlan(recorded(sampler, log), 1, 2, 0, read_bytes=2**20, ahead_bytes=AHEAD))
    stream, trained = Stream(sampler, 1, 2, CPU, 0, dealer), []
    for epoch in (1, 2):
        for number, _ in enumerate(stream.epoch(epoch)):
            if number % WINDOW == 0:
                trained.append(memory())
    assert len(trained) >= 130
    assert grown(trained) < 16 * 1024
    by_reader: dict[int, list[int]] = {}
    for line in reads(log):
        by_reader.setdefault(line["pid"], []).append(line["kib"])
    busy = [found for found in by_reader.values() if len(found) >= 20]
    assert busy and max(grown(found) for found in busy) < 16 * 1024


def grown(samples: list[int]) -> int:
    """How much larger the last quarter gets than the second."""
    quarter = len(samples) // 4
    return max(samples[-quarter:]) - max(samples[quarter : 2 * quarter])


@pytest.mark.slow
def test_a_slow_consumer_holds_the_readers_up(tmp_path: Path, ray_cluster: None) -> None:
    data, log = made(tmp_path, 20), tmp_path / "reads.jsonl"
    sampler = sampler_of(data, 0, 1, WINDOW)
    dealer = RemoteDealer.start(ReadPlan(recorded(sampler, log), 1, 1, 0, read_bytes=2**20, ahead_bytes=AHEAD))
    batches, consumed, ahead = Stream(sampler, 1, 1, CPU, 0, dealer).epoch(1), 0, []
    for _ in range(2):
        for _ in range(WINDOW):
            consumed += len(next(batches).target)
        ahead.append(settled(log) - consumed)
    assert sum(len(batch.target) for batch in batches) == 20 * FILE - consumed
    window = WINDOW * 64 * ROW
    assert all(window < rows * ROW < 2 * window + AHEAD + 8 * 2**20 for rows in ahead), ahead


def settled(log: Path) -> int:
    """Rows that have been read, once no more are."""
    before = -1
    while before != (now := sum(rows for line in reads(log) for _, _, rows in line["chunks"])):
        before = now
        time.sleep(2)
    return now


ABANDONED = """
import sys
from pathlib import Path
import torch
from dlopt import session
from dlopt.artifact import Artifact
from dlopt.data.feed.batches import Stream
from dlopt.data.prepared import Split
from dlopt.data.feed.sampler import Sampler

with session.connected(None, cpus=2, object_store_memory=100 * 2**20):
    sampler = Sampler.of(Split.open(Artifact.open(Path(sys.argv[1])), "train"), 3, 64, 0, 1)
    batches = Stream(sampler, 1, 1000, torch.device("cpu")).epoch(1)
    print(len(next(batches).target), flush=True)
    raise SystemExit(3)
"""


@pytest.mark.slow
def test_a_stream_that_is_abandoned_ends_with_its_process(tmp_path: Path, ray_cluster: None) -> None:
    """Whatever is still being read; nothing of it stays behind, and nothing hangs, nor joins the other cluster that is there."""
    data, mark = made(tmp_path, 3), f"DLOPT_TEST_MARK={uuid.uuid4().hex}"
    environment = os.environ | dict([mark.split("=")])
    done = subprocess.run(
        [sys.executable, "-c", ABANDONED, str(data.path)], env=environment, capture_output=True, text=True, timeout=180, check=False
    )
    assert (done.stdout.strip(), done.returncode) == ("64", 3), done.stderr
    for _ in range(60):
        if not (left := marked(mark)):
            break
        time.sleep(1)
    assert not left


@pytest.mark.slow
def test_the_dealer_ends_with_the_stream(tmp_path: Path, ray_cluster: None) -> None:
    import ray

    sampler = sampler_of(made(tmp_path, 3), 0, 1, 7)
    stream = Stream(sampler, 1, 1000, CPU)
    next(stream.epoch(1))
    assert isinstance(stream.dealer, RemoteDealer)
    actor = stream.dealer.actor
    del stream
    gc.collect()
    with pytest.raises(ray.exceptions.RayActorError):
        for _ in range(60):
            ray.get(actor.take.remote(0))
            time.sleep(1)


def marked(mark: str) -> list[str]:
    """The programs that run with this in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_bytes().decode())
        except OSError:  # it has ended, or is another's
            continue
    return found
