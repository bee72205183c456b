"""Faults T1, T5, T7, T8 and T9: workers, the controller and the driver are killed, stopped and told to end, and disks fill up. What comes
of it is compared with an undisturbed run on as many workers."""

from __future__ import annotations

import os
import random
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dlopt.artifact import Artifact
from dlopt.train.cluster.stopping import STOP
from tests.commands import here, refused_here
from tests.faults import (
    LOAD,
    Hit,
    Outcome,
    Strike,
    assert_little_redone,
    assert_nothing_runs,
    assert_same,
    ended,
    hit,
    kill,
    latest,
    left_over,
    models,
    new_home,
    newest_step,
    note,
    oracle,
    outcome,
    pace,
    prepared_rows,
    reached,
    recovered,
    redone,
    shared_out,
    start_run,
    steps_to_strike,
    tracing,
    train,
    wait,
    wait_for_step,
    workers_of,
    write_job,
)
from tests.served import alive

pytestmark = [pytest.mark.chaos, pytest.mark.slow]

HEALTH_SECONDS = 4
"""How long Ray Train lets a worker that does not answer hang, in the test of that."""
Record = Callable[[str, object], None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture(scope="module")
def data(ray_cluster: None, folder: Path) -> Artifact:
    return prepared_rows(folder)


@pytest.fixture(scope="module")
def oracles(folder: Path, data: Artifact) -> dict[int, Outcome]:
    """By the number of workers."""
    return {workers: oracle(folder, workers) for workers in (0, 2)}


@pytest.fixture(autouse=True)
def traced() -> Iterator[None]:
    with tracing():
        yield


def strike_workers(home: Path, chance: random.Random, steps: list[int], act: Callable[[int], None], hits: list[Hit]) -> Strike:
    """At each of the steps, one of the workers is struck."""

    def strike() -> None:
        for step in steps:
            since = hits[-1].time if hits else 0.0
            wait_for_step(home, step, since)
            time.sleep(chance.uniform(0, 0.03))
            pid = chance.choice([line["pid"] for line in latest(home, since).values()])
            hits.append(hit(home, lambda pid=pid: act(pid)))

    return Strike(strike)


def assert_no_worker_is_left(seconds: float = 60) -> None:
    """Below this process, on the shared cluster."""
    left = alive({pid: "" for name in ("RayTrainWorker", "TrainController") for pid in workers_of(os.getpid(), name)}, seconds)
    kill(*left)
    assert not left


def test_a_killed_worker_costs_no_bit_no_row_and_at_most_a_checkpoint_interval(
    folder: Path,
    oracles: dict[int, Outcome],
    tmp_path: Path,
    chance: random.Random,
    repeat: int,
    record_property: Record,
) -> None:
    """T1."""
    seconds: list[float] = []
    again: list[int] = []
    for place, count in enumerate(shared_out(repeat)):
        home, hits = new_home(folder, tmp_path / str(place), 0.005), []
        with strike_workers(home, chance, steps_to_strike(chance, count), kill, hits):
            found = train(folder, home)
        assert found.info["restarts"] == count == len(hits)
        assert_same(found, oracles[2])
        assert_little_redone(hits, found.starts)
        assert left_over(home) == []
        seconds += [recovered(home, one.time) for one in hits]
        again += redone(hits, found.starts)
    record_property("T1 steps redone", again)
    note(record_property, "T1 seconds to recover from a killed worker", seconds, 20)
    assert_no_worker_is_left()


def test_a_hung_worker_is_found_replaced_and_gone(
    folder: Path,
    oracles: dict[int, Outcome],
    tmp_path: Path,
    chance: random.Random,
    repeat: int,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Record,
) -> None:
    """T5. That it was found shows in that the other worker, which waits for it, is ended."""
    monkeypatch.setenv("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", str(HEALTH_SECONDS))
    found_after: list[float] = []
    back_after: list[float] = []
    for place, count in enumerate(shared_out(repeat)):
        home, hits, stopped = new_home(folder, tmp_path / str(place), 0.005), [], []

        def stop(pid: int, home: Path = home, stopped: list[int] = stopped) -> None:
            others = {line["pid"]: "" for line in latest(home).values() if line["pid"] != pid}
            stopped.append(pid)
            os.kill(pid, signal.SIGSTOP)
            began = time.monotonic()
            assert alive(others, (HEALTH_SECONDS + 10) * LOAD) == {}
            found_after.append(time.monotonic() - began)

        try:
            with strike_workers(home, chance, steps_to_strike(chance, count), stop, hits):
                found = train(folder, home)
            assert alive(dict.fromkeys(stopped, ""), 30) == {}
        finally:
            kill(*alive(dict.fromkeys(stopped, ""), 0))
        assert found.info["restarts"] == count == len(stopped)
        assert_same(found, oracles[2])
        assert left_over(home) == []
        back_after += [recovered(home, one.time) for one in hits]
    note(record_property, "T5 seconds to find a hung worker", found_after, HEALTH_SECONDS + 10, 1.5)
    note(record_property, "T5 seconds from then to the next step", back_after, 20)
    assert_no_worker_is_left()


def test_a_killed_controller_is_replaced_by_itself(
    folder: Path,
    oracles: dict[int, Outcome],
    tmp_path: Path,
    chance: random.Random,
    repeat: int,
    record_property: Record,
) -> None:
    """T7, the first half."""
    seconds: list[float] = []
    for place, count in enumerate(shared_out(repeat)):
        home, hits = new_home(folder, tmp_path / str(place), 0.01), []

        def controller(pid: int) -> None:
            (found,) = workers_of(os.getpid(), "TrainController")
            kill(found)

        with strike_workers(home, chance, steps_to_strike(chance, count), controller, hits):
            found = train(folder, home)
        assert found.info["restarts"] == count == len(hits)
        assert_same(found, oracles[2])
        assert left_over(home) == []
        seconds += [recovered(home, one.time) for one in hits]
    note(record_property, "T7 seconds to recover from a killed controller", seconds, 30)
    assert_no_worker_is_left()


def test_a_storm_of_kills_at_any_time_costs_no_bit(
    folder: Path, oracles: dict[int, Outcome], tmp_path: Path, chance: random.Random, repeat: int
) -> None:
    """Also while a new group of workers is about to start. Three kills a storm."""
    for place in range(max(1, repeat // 3)):
        home = new_home(folder, tmp_path / str(place), 0.02)

        def storm(home: Path = home) -> None:
            wait(lambda: reached(home) >= 5, "step 5")
            for _ in range(3):
                pids = wait(lambda: workers_of(os.getpid()), "worker", 180)
                kill(*chance.sample(pids, chance.randint(1, len(pids))))
                time.sleep(chance.uniform(0.2, 12))

        with Strike(storm):
            found = train(folder, home)
        assert_same(found, oracles[2])
        assert left_over(home) == []
    assert_no_worker_is_left()


def test_a_killed_driver_and_the_same_command_again_cost_no_bit_and_repeat_no_step(
    folder: Path, oracles: dict[int, Outcome], tmp_path: Path, chance: random.Random, repeat: int, record_property: Record
) -> None:
    """T7, the second half. Each command is given at once, while the killed one's workers may still be at work."""
    mark, seconds = uuid.uuid4().hex, []
    for place, count in enumerate(shared_out(repeat)):
        home, hits = new_home(folder, tmp_path / str(place), 0.02), []
        process = start_run(home, write_job(folder), mark)
        for step in steps_to_strike(chance, count):
            wait_for_step(home, step, hits[-1].time if hits else 0.0, process)
            pace(home, 0.5)  # what is left of the run goes on for a while, but must not come to the end
            hits.append(hit(home, process.kill))
            process.wait()
            process = start_run(home, write_job(folder), mark)
            wait_for_step(home, 1, hits[-1].time, process)
            pace(home, 0.02)
        done = ended(process)
        assert done.returncode == 0, done.stderr
        found = outcome(home)
        assert_same(found, oracles[2])
        assert found.info["restarts"] == count == len(hits)
        assert left_over(home) == []
        seconds += [recovered(home, one.time) for one in hits]
    note(record_property, "T7 seconds from a killed driver to the next step", seconds, 30)
    assert_nothing_runs(mark)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_is_told_to_end_saves_where_it_is_and_ends_in_time(
    workers: int, folder: Path, oracles: dict[int, Outcome], tmp_path: Path, chance: random.Random, repeat: int, record_property: Record
) -> None:
    """T8; with two workers, which take long to start, a third as often."""
    mark, seconds, lost = uuid.uuid4().hex, [], []
    for place, count in enumerate(shared_out(max(1, repeat // 3) if workers else repeat)):
        home = new_home(folder, tmp_path / str(place), 0.02)
        process = start_run(home, write_job(folder, workers=workers), mark)
        for step in steps_to_strike(chance, count):
            wait_for_step(home, step, process=process)
            began = time.monotonic()
            process.send_signal(signal.SIGTERM)
            said = ended(process)
            seconds.append(time.monotonic() - began)
            assert said.returncode == 143, said.stderr
            assert "Traceback" not in said.stderr and said.stderr.splitlines()[-1].startswith("dlopt: "), said.stderr
            assert newest_step(home) >= step
            lost.append(reached(home) - newest_step(home))
            process = start_run(home, write_job(folder, workers=workers), mark)
        done = ended(process)
        assert done.returncode == 0, done.stderr
        found = outcome(home)
        assert_same(found, oracles[workers])
        assert [start["step"] for start in found.starts][1:] == sorted({start["step"] for start in found.starts})[1:]
        assert left_over(home) == []
    record_property(f"T8 steps lost, workers {workers}", lost)
    assert max(lost) <= 1
    note(record_property, f"T8 seconds from SIGTERM to the end, workers {workers}", seconds, 10)
    assert_nothing_runs(mark)


def test_when_no_checkpoint_is_whole_the_command_fails_with_a_line_and_fresh_starts_over(
    folder: Path, oracles: dict[int, Outcome], tmp_path: Path, chance: random.Random, capsys: pytest.CaptureFixture[str]
) -> None:
    """T4, as the command line has it."""
    home, (step,) = new_home(folder, tmp_path / "home", 0.005), steps_to_strike(chance, 1)
    words = ("run", write_job(folder, workers=0), "--home", home)

    def stop() -> None:
        wait_for_step(home, step)
        (models(home)[0] / STOP).touch()

    with Strike(stop):
        assert here(capsys, *words).returncode == 143
    files = list(home.glob("model/*/checkpoints/0*/model.safetensors"))
    assert len(files) >= 2
    for file in files:
        file.write_bytes(file.read_bytes()[:-1])
    said = refused_here(capsys, *words)
    assert "model.safetensors" in said and "--fresh" in said
    assert said == refused_here(capsys, *words)
    assert here(capsys, *words, "--fresh").returncode == 0
    assert_same(outcome(home), oracles[0])
