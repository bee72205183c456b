"""Fault T9: a disk fills up, under the checkpoints, under the whole home, and under what Ray spills. It is one of 64 MiB in memory."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dlopt import session
from dlopt.cli import main
from dlopt.train.checkpoint.checkpoints import newest
from dlopt.train.checkpoint.stores import Disk
from tests.commands import ROOT, environment, here
from tests.conftest import missing
from tests.faults import (
    Strike,
    assert_nothing_runs,
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
        missing(f"a disk cannot be mounted here: {mounted.stderr.strip()}")
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
        assert_said_in_one_line(ended, disk / "kept", "no space")
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
        assert_said_in_one_line(ended, home, "o space")
        (disk / "full").unlink()
    ended = here(capsys, *words)
    assert ended.returncode == 0, ended.stderr
    assert_same(outcome(home), oracle(folder, 0))
    assert left_over(home) == []


def assert_said_in_one_line(ended: subprocess.CompletedProcess[str], *words: object) -> None:
    assert ended.returncode != 0
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("dlopt: ")]
    assert all(str(word) in line for word in words), line
    assert line == ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr


WIDE = """
name: wide
data:
  source: {{kind: parquet, path: {path}}}
  inputs: [{{kind: number, columns: [{columns}]}}]
  target: {{kind: category, column: label}}
model: {{kind: mlp, hidden: [8], dropout: 0}}
train: {{epochs: 1, batch_size: 64, log_every: 1}}
resources: {{workers: 0, checkpoint: {{every: {{steps: 5}}}}}}
export: []
"""


def wide_job(folder: Path) -> Path:
    """A job on 32 MiB of numbers, which are more than what Ray has room for below."""
    generator = np.random.default_rng(3)
    table = {f"c{column}": generator.normal(size=16384).astype(np.float32) for column in range(512)}
    pq.write_table(pa.table(table | {"label": np.array(["x", "y"])[(table["c0"] > 0).astype(int)]}), folder / "wide.parquet")
    (folder / "wide.yaml").write_text(WIDE.format(path=folder / "wide.parquet", columns=", ".join(table)))
    return folder / "wide.yaml"


def spill() -> None:
    """What a process of its own does: `dlopt run` with a stream feed, on a Ray of which others have taken up nearly all memory for objects,
    so that it must spill to the disk."""
    disk, taken, *words = sys.argv[1:]
    store = {"object_store_memory": 80 * 2**20, "object_spilling_directory": f"{disk}/spill"}
    with session.connected(None, cpus=4, **store):
        import ray

        held = [ray.put(np.zeros(8 * 2**20, dtype=np.uint8)) for _ in range(int(taken))]
        code = main(words)
        assert len(held) == int(taken)
    sys.exit(code)


@pytest.mark.slow
def test_a_disk_that_is_full_when_ray_spills_ends_the_run_in_a_line_and_room_lets_it_go_on(
    disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job, mark = wide_job(tmp_path), uuid.uuid4().hex
    assert here(capsys, "prepare", job, "--home", tmp_path / "home").returncode == 0
    shutil.copytree(tmp_path / "home", tmp_path / "undisturbed")
    assert here(capsys, "run", job, "--home", tmp_path / "undisturbed").returncode == 0
    words = [sys.executable, "-c", "from tests.chaos.test_chaos_disk import spill; spill()", disk]
    command = ["run", job, "resources.feed=stream", "--home", tmp_path / "home"]
    given = environment(DLOPT_CHAOS=mark, RAY_AUTH_MODE="disabled")
    fill(disk)
    ended = subprocess.run([*words, "9", *command], capture_output=True, text=True, cwd=ROOT, env=given, timeout=300)
    assert_said_in_one_line(ended, "disk", "full")
    (disk / "full").unlink()
    ended = subprocess.run([*words, "0", *command], capture_output=True, text=True, cwd=ROOT, env=given, timeout=300)
    assert ended.returncode == 0, ended.stderr
    found, undisturbed = outcome(tmp_path / "home"), outcome(tmp_path / "undisturbed")
    assert (found.weights, found.lines) == (undisturbed.weights, undisturbed.lines)
    assert_nothing_runs(mark)
