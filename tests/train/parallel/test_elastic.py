"""Nodes that come and go on notice, and those that others hold: a job uses what there is, waits for what there will be, and does no step
twice. What is lost without notice is for the chaos tests."""

from __future__ import annotations

import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from dlopt.train.watch.metrics_log import STARTS
from tests.commands import ROOT, environment, line_of
from tests.faults import (
    RUN,
    Outcome,
    assert_nothing_runs,
    ended,
    latest,
    models,
    outcome,
    pace,
    starts_of,
    traces,
    wait,
    write_job,
)
from tests.nodes import Nodes, cluster

pytestmark = pytest.mark.slow

RARELY = "resources.checkpoint.every={epochs: 9}"
"""No checkpoint but the one that is asked for: without it, everything would be done again."""
MARK = uuid.uuid4().hex


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """Two nodes of one CPU."""
    with cluster(2, MARK) as found:
        yield found
    assert_nothing_runs(MARK, 60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("elastic")


def begin(nodes: Nodes, folder: Path, home: Path, *overrides: str, pause: float = 0.0) -> subprocess.Popen[str]:
    """`dlopt run` on the cluster, whose workers wait so long before each batch, and leave a trace."""
    home.mkdir()
    if (folder / "undisturbed" / "data").exists():
        shutil.copytree(folder / "undisturbed" / "data", home / "data")
    pace(home, pause)
    job = write_job(folder, precision="float64")
    words = [sys.executable, "-c", RUN, "run", job, *overrides, "--home", home, "--address", nodes.address]
    settings = {"RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1", "DLOPT_CHAOS": MARK, "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5"}
    return subprocess.Popen(
        list(map(str, words)),
        cwd=ROOT,
        env=environment(**settings),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def whole(process: subprocess.Popen[str], home: Path) -> Outcome:
    """What comes of a run that must end well."""
    done = ended(process)
    assert done.returncode == 0, done.stderr
    return outcome(home)


def done_twice(home: Path) -> int:
    """How many steps more than one group of workers has done, or begun."""
    groups: dict[tuple[int, int], set[int]] = {}
    for line in traces(home):
        if line["rank"] == 0:
            groups.setdefault((line["epoch"], line["batch"]), set()).add(line["pid"])
    return sum(len(pids) - 1 for pids in groups.values())


def set_out(process: subprocess.Popen[str], home: Path, groups: int) -> None:
    """Until so many groups of workers have set out, and the last of them has begun a step."""

    def there() -> bool:
        found = [start for out in models(home) if (out / STARTS).exists() for start in starts_of(out)]
        before = found[-2]["time"] if groups > 1 and len(found) >= groups else 0.0
        return len(found) >= groups and sum(line["began"] > before for line in latest(home).values()) == found[-1]["workers"]

    wait(lambda: process.poll() is not None or there(), f"group {groups}", 240)
    assert process.poll() is None, ended(process).stderr


def assert_nearly(found: Outcome, other: Outcome) -> None:
    """The same rows in the same order, and the same losses but for the order in which workers add up."""
    assert found.rows == other.rows
    for line, known in zip(found.lines, other.lines, strict=True):
        assert line["step"] == known["step"]
        if "loss" in known:
            assert line["loss"] == pytest.approx(known["loss"], rel=1e-9)


@pytest.fixture(scope="module")
def undisturbed(nodes: Nodes, folder: Path) -> Outcome:
    """On one worker, from the start to the end."""
    return whole(begin(nodes, folder, folder / "undisturbed", "resources.workers=1"), folder / "undisturbed")


def test_a_job_that_no_node_can_ever_hold_is_refused(nodes: Nodes, folder: Path, undisturbed: Outcome, tmp_path: Path) -> None:
    """Two CPUs a worker, on nodes of one, which have two together."""
    said = line_of(ended(begin(nodes, folder, tmp_path / "home", "resources.workers=1", "resources.cpus_per_worker=2")))
    assert said.startswith("resources.workers: 1 worker of 2 CPUs cannot be placed on the nodes (")


def test_a_job_waits_for_what_others_hold_and_starts_by_itself(nodes: Nodes, folder: Path, undisturbed: Outcome, tmp_path: Path) -> None:
    home = tmp_path / "home"
    nodes.take(1)
    process = begin(nodes, folder, home, "resources.workers=2")
    assert process.stderr
    heard = []
    for line in process.stderr:
        heard.append(line)
        if "waiting for" in line:
            nodes.give_back()
            break
    assert "waiting for 2 CPUs: 1 of 2 is free" in heard[-1], "".join(heard)
    found = whole(process, home)
    assert [start["workers"] for start in found.starts] == [2]
    assert_nearly(found, undisturbed)


def test_a_job_that_has_waited_long_enough_says_for_what(nodes: Nodes, folder: Path, undisturbed: Outcome, tmp_path: Path) -> None:
    nodes.take(1)
    try:
        done = ended(begin(nodes, folder, tmp_path / "home", "resources.workers=2", "resources.wait_seconds=2"))
    finally:
        nodes.give_back()
    assert done.returncode in (1, 2)
    assert "2 CPUs: 1 of 2 is free" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_node_more_trains_along_from_the_step_that_is_reached(nodes: Nodes, folder: Path, undisturbed: Outcome, tmp_path: Path) -> None:
    home = tmp_path / "home"
    given = ("resources.workers=[2, 3]", "resources.resize_seconds=1", "resources.max_failures=0", RARELY)
    process = begin(nodes, folder, home, *given, pause=0.5)
    set_out(process, home, 1)
    nodes.add()
    set_out(process, home, 2)
    pace(home, 0.0)
    found = whole(process, home)
    assert [start["workers"] for start in found.starts] == [2, 3]
    assert found.starts[1]["step"] > 0
    assert done_twice(home) == 0
    assert_nearly(found, undisturbed)


def test_a_node_that_is_about_to_go_away_costs_no_step(nodes: Nodes, folder: Path, undisturbed: Outcome, tmp_path: Path) -> None:
    """There are more nodes than its two workers need; nor is it one of the failures that a run may have."""
    home = tmp_path / "home"
    if nodes.count < 3:
        nodes.add()
    process = begin(nodes, folder, home, "resources.workers=2", "resources.max_failures=0", RARELY, pause=0.5)
    set_out(process, home, 1)
    nodes.drain(latest(home)[1]["pid"], 300)
    set_out(process, home, 2)
    pace(home, 0.0)
    found = whole(process, home)
    assert [start["workers"] for start in found.starts] == [2, 2]
    assert found.starts[1]["step"] > 0
    assert done_twice(home) == 0
    assert_nearly(found, undisturbed)
