"""The suite itself: nothing outlives it, its cost has bounds, and of its slow tests each has its turn."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.budgets import FACTOR, SPARE, Meter, exceeded
from tests.commands import ROOT
from tests.conftest import SHARES, share_of
from tests.processes import run, together
from tests.reaper import GRACE, VARIABLE, bearing, left_of

ALONE = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", ".", "."]
TREE = os.environ | {"PYTHONPATH": str(ROOT)}
"""A run of the tests of the working folder, with this one's fixtures."""
ENDLESS = """
import os, subprocess, time
from pathlib import Path
from tests.processes import context, fork

def test_it({fixture}):
    subprocess.Popen(["sleep", "300"], start_new_session=True)
    context.set_forkserver_preload([])
    fork(time.sleep, 300)
    Path("marks").write_text(os.environ["PYTEST_MARKS"])
    time.sleep(300)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "ray"),
    [(signal.SIGTERM, False), (signal.SIGTERM, True), (signal.SIGKILL, True)],
)
def test_an_ended_run_leaves_nothing_running(number: signal.Signals, ray: bool, tmp_path: Path) -> None:
    """Neither its Ray, nor forked processes, nor what has left its session."""
    (tmp_path / "test_endless.py").write_text(ENDLESS.format(fixture="ray_cluster" if ray else ""))
    process = subprocess.Popen(ALONE, cwd=tmp_path, env=TREE, stdout=subprocess.PIPE, text=True, start_new_session=True)
    marks, deadline, written = tmp_path / "marks", time.monotonic() + 240, ""
    while not (marks.exists() and (written := marks.read_text())) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert written
    mark = written.split()[-1]
    assert mark not in os.environ[VARIABLE]
    running = " ".join(bearing(mark).values())
    assert "sleep 300" in running and "forkserver" in running and ("raylet" in running) is ray
    process.send_signal(number)
    said, _ = process.communicate(timeout=120)
    if number == signal.SIGTERM:
        assert process.returncode == pytest.ExitCode.INTERRUPTED
        assert [line.split(maxsplit=3)[3].strip() for line in said.splitlines() if line.startswith("left running")] == ["sleep 300"]
    assert left_of(mark, 4 * GRACE) == {}


TERMINATED = """
import signal, sys, pytest
from pathlib import Path

@pytest.fixture
def starting():
    sys.exit(signal.SIGTERM)  # as Ray's own handler does while it starts

def test_one(starting): pass
def test_two(): Path("two").touch()
"""


def test_a_sigterm_that_ray_hears_while_it_starts_ends_the_run(tmp_path: Path) -> None:
    (tmp_path / "test_terminated.py").write_text(TERMINATED)
    ended = subprocess.run(ALONE, cwd=tmp_path, env=TREE, capture_output=True, text=True, timeout=120)
    assert ended.returncode == pytest.ExitCode.INTERRUPTED, ended.stdout
    assert not (tmp_path / "two").exists()


def test_a_file_that_costs_more_than_its_budget_is_told() -> None:
    allowed = {"test_a.py": 4.0}
    assert exceeded({"test_a.py": FACTOR * 4 + SPARE, "test_b.py": SPARE}, allowed) == []
    (one, two) = exceeded({"test_a.py": FACTOR * 4 + SPARE + 0.1, "test_new.py": SPARE + 0.1}, allowed)
    assert one.startswith("test_a.py: 22 CPU seconds") and two.startswith("test_new.py: 10 CPU seconds")


def spin(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_the_cost_of_a_test_has_its_processes_too_but_for_what_is_excused() -> None:
    run(spin, 0.0)  # the server of processes is excused
    meter = Meter()
    spin(0.2)
    assert 0.15 < meter.lap() < 0.5
    assert run(spin, 0.3) == 0
    subprocess.run([sys.executable, "-S", "-c", "sum(range(10**7))"], check=True)
    assert 0.4 < meter.lap() < 3
    with meter.excuse():
        spin(0.5)
    assert meter.lap() < 0.3


def test_slow_tests_fall_into_shares_by_function() -> None:
    def share(name: str) -> int:
        item: Any = SimpleNamespace(nodeid=name)
        return share_of(item)

    counts = Counter(share(f"tests/test_a.py::test_{number}") for number in range(400))
    assert sorted(counts) == list(range(1, SHARES + 1)) and min(counts.values()) > 60
    assert len({share(f"tests/test_a.py::test_it[{case}-x]") for case in range(20)}) == 1


def _fails(rank: int, world: int, folder: Path) -> None:
    if rank == 1:
        raise ValueError("the reason")
    time.sleep(60)


def test_a_process_that_fails_ends_the_others_and_says_why(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=r"(?s)process 1 ended with 1:.*ValueError: the reason"):
        together(2, _fails, tmp_path)
    assert time.monotonic() - began < 50


def _sleeps(rank: int, world: int, folder: Path) -> None:
    time.sleep(60)


def test_processes_that_do_not_end_in_time_are_ended(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError, match="2 of 2 processes"):
        together(2, _sleeps, tmp_path, seconds=1)
