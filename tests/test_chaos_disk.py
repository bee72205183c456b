"""Fault T9: a disk fills up, under the checkpoints, under the whole home, and under what Ray spills. It is one of 64 MiB in memory."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dlopt import session
from dlopt.artifact import Artifact, once
from dlopt.models import Mlp
from dlopt.train.checkpoints import Disk, newest
from dlopt.train.fit import FIT
from dlopt.train.section import Fit, Resources, Train
from tests.commands import here
from tests.faults import (
    Strike,
    assert_same,
    left_over,
    models,
    new_home,
    oracle,
    outcome,
    prepared_rows,
    steps_of_log,
    steps_to_strike,
    tracing,
    wait,
    wait_for_step,
    write_job,
)

pytestmark = [pytest.mark.chaos, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """An empty disk of 64 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", place], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a disk cannot be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def fill(disk: Path) -> Path:
    """A file that leaves no byte free on a disk."""
    with open(disk / "full", "wb") as file:
        while free := os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize:
            try:
                os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), free)
            except OSError as error:  # somebody else was faster
                assert error.errno == errno.ENOSPC
    return disk / "full"


@pytest.fixture(scope="module")
def folder(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.getbasetemp()
    prepared_rows(found)
    return found


def test_a_disk_that_fills_up_under_the_checkpoints_ends_the_run_in_a_line_and_room_lets_it_go_on(
    folder: Path, disk: Path, tmp_path: Path, chance: random.Random, repeat: int, capsys: pytest.CaptureFixture[str]
) -> None:
    home, count = new_home(folder, tmp_path / "home", 0.01), min(repeat, 5)
    words = ("run", write_job(folder, workers=0), f"resources.checkpoint.path={disk / 'kept'}", "--home", home)
    since = 0.0
    for step in steps_to_strike(chance, count):

        def strike(step: int = step, since: float = since) -> None:
            wait_for_step(home, step, since)
            fill(disk)

        with Strike(strike), tracing():
            ended = here(capsys, *words)
        assert_said_in_one_line(ended, disk / "kept")
        (model,) = models(home)
        checkpoint, damaged = newest(Disk(disk / "kept" / model.name))
        assert checkpoint and checkpoint.record.step >= step - 10 and damaged == []
        since = (disk / "full").stat().st_mtime
        (disk / "full").unlink()
    with tracing():
        ended = here(capsys, *words)
    assert ended.returncode == 0, ended.stderr
    assert_same(outcome(home), oracle(folder, 0))
    assert left_over(home) + left_over(disk) == []


def test_a_disk_that_fills_up_under_the_home_ends_the_run_in_a_line_and_room_lets_it_go_on(
    folder: Path, disk: Path, chance: random.Random, repeat: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever writes first finds it full: a checkpoint, or a line of metrics.jsonl."""
    home = new_home(folder, disk / "home")
    words = ("run", write_job(folder, workers=0), "--home", home)
    for step in steps_to_strike(chance, min(repeat, 5)):

        def strike(step: int = step) -> None:
            wait(lambda: steps_of_log(home) >= step, f"step {step}")
            fill(disk)

        with Strike(strike):
            ended = here(capsys, *words)
        assert_said_in_one_line(ended, home)
        (disk / "full").unlink()
    ended = here(capsys, *words)
    assert ended.returncode == 0, ended.stderr
    assert_same(outcome(home), oracle(folder, 0))
    assert left_over(home) == []


def assert_said_in_one_line(ended: subprocess.CompletedProcess[str], folder: Path) -> None:
    assert ended.returncode != 0
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("dlopt: ")]
    assert str(folder) in line and "no space" in line.lower(), line
    assert line == ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr


def spill() -> None:
    """What a process of its own does: a stream feed on a Ray whose memory for objects is taken up, so that it must spill to the disk."""
    home, data, disk = (Path(word) for word in sys.argv[1:])
    store = {"object_store_memory": 80 * 2**20, "object_spilling_directory": str(disk / "spill")}
    with session.connected(None, cpus=4, **store):
        import ray

        taken = [ray.put(np.zeros(8 * 2**20, dtype=np.uint8)) for _ in range(9)]
        once(FIT, streamed(), home, Artifact.open(data), resources=Resources(workers=0, feed="stream", checkpoint={"every": {"steps": 5}}))
        assert len(taken) == 9


def streamed() -> Fit:
    return Fit(seed=1, model=Mlp(hidden=(8,)), augment=(), train=Train(epochs=2, batch_size=64, log_every=1))
