"""Faults T2 and T6: nodes of a cluster die and come. The cluster is several of Ray's node processes on this machine, under a process of its
own, since nodes are found dead by settings that stand when Ray starts."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import traceback
import uuid
from pathlib import Path
from typing import Any

import pytest

from tests.commands import ROOT, environment
from tests.faults import (
    Hit,
    Strike,
    assert_little_redone,
    assert_nothing_runs,
    assert_same,
    ended,
    hit,
    kill,
    latest,
    left_over,
    new_home,
    note,
    oracle,
    outcome,
    pace,
    prepared_rows,
    reached,
    recovered,
    redone,
    shared_out,
    steps_to_strike,
    tracing,
    train,
    wait,
    wait_for_step,
)
from tests.served import descendants

pytestmark = [pytest.mark.chaos, pytest.mark.slow]

HEALTH = {"initial_delay_ms": 1000, "period_ms": 1000, "timeout_ms": 2000, "failure_threshold": 3}
"""Of nodes: one that is gone is found within seconds."""
SMOOTH: dict[str, Any] = {"precision": "float64"}
"""A job whose curve is the same on any number of workers."""


class Nodes:
    """A head without CPUs to train on, and nodes of one CPU each."""

    def __init__(self, count: int) -> None:
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(initialize_head=True, shutdown_at_exit=False, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.raylets: dict[int, subprocess.Popen[bytes]] = {}
        for _ in range(count):
            self.add()

    def add(self) -> None:
        node = self.cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)
        raylet = node.all_processes["raylet"][0].process
        self.raylets[raylet.pid] = raylet

    def strike(self, worker: int, with_workers: bool) -> None:
        """Kill the node of a worker, as when the power fails; or its raylet alone, of whose death the rest must take note by itself."""
        pid = next(pid for pid in self.raylets if worker in descendants(pid))
        kill(pid, *(descendants(pid) if with_workers else ()))
        self.raylets.pop(pid).wait()  # as a zombie it would still be there for its workers


def act() -> None:
    """What a process of its own does: both faults on one cluster. The last line is what came of each, or why nothing did."""
    from dlopt import session

    folder, repeat = Path(sys.argv[1]), int(sys.argv[2])
    nodes, answers = Nodes(2), dict[str, Any]()
    try:
        with session.connected(nodes.cluster.address), tracing():
            for name, fault in {"resize": resize, "lose": lose}.items():
                try:
                    answers[name] = fault(nodes, folder, random.Random(f"{sys.argv[3]} {name}"), repeat)
                except Exception:
                    answers[name] = traceback.format_exc()
    finally:
        nodes.cluster.shutdown()
    print(json.dumps(answers))


@pytest.fixture(scope="module")
def folder(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.getbasetemp()
    prepared_rows(found)
    return found


@pytest.fixture(scope="module")
def answers(folder: Path, request: pytest.FixtureRequest) -> dict[str, Any]:
    """What came of the faults on a cluster, of which nothing may be left."""
    mark, options = uuid.uuid4().hex, request.config.option
    settings = {f"RAY_health_check_{name}": str(value) for name, value in HEALTH.items()}
    given = environment(DLOPT_CHAOS=mark, RAY_AUTH_MODE="disabled", **settings)
    words = [
        sys.executable,
        "-c",
        "from tests.chaos.test_chaos_nodes import act; act()",
        folder,
        str(options.repeat),
        str(options.chaos_seed),
    ]
    process = subprocess.Popen(
        words, cwd=ROOT, env=given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        done = ended(process, 300 + 300 * options.repeat)
    finally:
        assert_nothing_runs(mark, 60)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def lose(nodes: Nodes, folder: Path, chance: random.Random, repeat: int) -> list[list[Hit]]:
    """Two workers on three nodes; the node of one of them is killed, and another one joins."""
    nodes.add()
    found = []
    for place, count in enumerate(shared_out(repeat)):
        home, hits = new_home(folder, folder / "nodes" / str(place), 0.01), list[Hit]()

        def strike(home: Path = home, hits: list[Hit] = hits, count: int = count) -> None:
            for step in steps_to_strike(chance, count):
                since = hits[-1].time if hits else 0.0
                wait_for_step(home, step, since)
                victim, alone = chance.choice(list(latest(home, since).values()))["pid"], chance.random() < 0.5
                hits.append(hit(home, lambda victim=victim, alone=alone: nodes.strike(victim, not alone)))  # type: ignore[misc]
                pace(home, 0.5)  # a node takes seconds to join
                wait(lambda: reached(home, hits[-1].time), "recovery", 180)
                nodes.add()
                pace(home, 0.01)

        with Strike(strike):
            train(folder, home)
        found.append(hits)
    return found


def test_a_lost_node_costs_no_bit(folder: Path, answers: dict[str, Any], repeat: int, record_property: Any) -> None:
    """T6."""
    assert isinstance(answers["lose"], list), answers["lose"]
    undisturbed = oracle(folder, 2)
    seconds: list[float] = []
    again: list[int] = []
    for place, answer in enumerate(answers["lose"]):
        home, hits = folder / "nodes" / str(place), [Hit(*one) for one in answer]
        found = outcome(home)
        assert found.info["restarts"] == len(hits) == shared_out(repeat)[place]
        assert_same(found, undisturbed)
        assert_little_redone(hits, found.starts)
        assert left_over(home) == []
        seconds += [recovered(home, one.time) for one in hits]
        again += redone(hits, found.starts)
    record_property("T6 steps redone", again)
    note(record_property, "T6 seconds to recover from a lost node", seconds, 45)


def resize(nodes: Nodes, folder: Path, chance: random.Random, repeat: int) -> list[dict[str, float]]:
    """One to two workers on two nodes: one of them is lost, and later another one joins; for some seeds."""
    found = []
    for seed in range(repeat):
        home, marks = new_home(folder, folder / "elastic" / str(seed), 0.5), dict[str, float]()

        def strike(home: Path = home, marks: dict[str, float] = marks) -> None:
            wait(lambda: len(latest(home)) == 2, "second worker", 180)  # on what the run before is about to leave
            pace(home, 0.02)
            wait_for_step(home, reached(home) + chance.randrange(10, 80))
            lost = hit(home, lambda: nodes.strike(chance.choice(list(latest(home).values()))["pid"], True))
            marks["lost"] = lost.time
            alone = wait(lambda: reached(home, lost.time), "recovery", 180)
            wait_for_step(home, alone + chance.randrange(10, 80), lost.time)
            pace(home, 0.5)
            nodes.add()
            marks["joined"] = recovered_at(home)
            wait(lambda: len(latest(home)) == 2 and reached(home, marks["joined"]), "second worker", 180)
            pace(home, 0.0)

        with Strike(strike):
            train(folder, home, "[1, 2]", seed=seed, **SMOOTH)
        found.append(marks)
    return found


def recovered_at(home: Path) -> float:
    return max(line["time"] for line in latest(home).values())


def test_two_workers_one_and_two_again_follow_the_curve_of_one_on_the_same_rows(
    folder: Path, answers: dict[str, Any], record_property: Any
) -> None:
    """T2, with as many seeds as repetitions. The undisturbed run has one worker."""
    assert isinstance(answers["resize"], list), answers["resize"]
    lost: list[float] = []
    joined: list[float] = []
    for seed, marks in enumerate(answers["resize"]):
        home = folder / "elastic" / str(seed)
        found, undisturbed = outcome(home), oracle(folder, 0, seed=seed, **SMOOTH)
        assert [start["workers"] for start in found.starts][-3:] == [2, 1, 2]
        assert found.rows == undisturbed.rows
        assert largest_difference(found.lines, undisturbed.lines) < 1e-9
        assert abs(found.info["metrics"]["test"]["accuracy"] - undisturbed.info["metrics"]["test"]["accuracy"]) <= 0.002
        assert left_over(home) == []
        lost.append(recovered(home, marks["lost"]))
        joined.append(recovered(home, marks["joined"]))
    note(record_property, "T2 seconds to go on with one worker", lost, 45)
    note(record_property, "T2 seconds to go on with two again", joined, 60)


def largest_difference(found: list[dict[str, Any]], undisturbed: list[dict[str, Any]]) -> float:
    """Of the losses of the same steps, relative."""
    pairs = [(one, other) for one, other in zip(found, undisturbed, strict=True) if "loss" in other]
    assert [one["step"] for one, _ in pairs] == [other["step"] for _, other in pairs]
    return max(abs(one["loss"] - other["loss"]) / abs(other["loss"]) for one, other in pairs)
