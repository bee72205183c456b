"""What one worker knows, all workers act on at the same step; and what is said of the pace."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dlopt.models.clock import Clock
from dlopt.models.norms import BatchNorm
from dlopt.train.checkpoint.state import Record
from dlopt.train.loop.objectives import Losses
from dlopt.train.parallel.agreement import Agreed, Agreement, patiently
from dlopt.train.watch import metrics_log
from dlopt.train.watch.metrics_log import SPEED
from dlopt.train.watch.speed import Pace, Slowest, SpeedLog
from tests.processes import together

CPU = torch.device("cpu")


def _talk(rank: int, world: int, folder: Path) -> None:
    """Worker 2 is told to stop after its step 40, worker 0's clock asks for a checkpoint after step 20; steps take 1 ms."""
    agreement, heard = Agreement(rank, 3, CPU), []
    agreement.SECONDS = 0.01  # type: ignore[misc]
    for step in itertools.count(1):
        time.sleep(0.001 * (1 + rank))
        if agreement.due(step):
            late = rank == 0 and step >= 20 and not any(agreed.checkpoint for _, agreed in heard)
            agreed = agreement.exchange(step, "stop" if rank == 2 and step >= 40 else None, late, busy=float(rank))
            heard.append((step, agreed))
            if agreed.stop:
                break
    Path(folder, f"heard-{rank}").write_text(json.dumps(heard))


def test_all_workers_hear_the_same_at_the_same_steps(tmp_path: Path) -> None:
    together(3, _talk, tmp_path)
    one, two, three = (json.loads((tmp_path / f"heard-{rank}").read_text()) for rank in range(3))
    assert one == two == three
    steps = [step for step, _ in one]
    assert len(steps) < steps[-1]  # not after every step
    said = [Agreed(*agreed) for _, agreed in one]
    assert [agreed.stop for agreed in said] == [None] * (len(said) - 1) + ["stop"] and steps[-1] >= 40
    (asked,) = [step for step, agreed in zip(steps, said, strict=True) if agreed.checkpoint]
    assert asked >= 20
    assert all(agreed.busy == [0.0, 1.0, 2.0] for agreed in said)


def _patiently(rank: int, world: int, folder: Path) -> None:
    """Worker 0 takes longer than an exchange among workers may, which here is a second and a half."""
    with mock.patch.object(dist, "all_reduce", partial(_in_time, dist.all_reduce)):
        began = time.monotonic()
        found = patiently(lambda: time.sleep(3 * (rank == 0)) or rank, world, CPU)  # type: ignore[func-returns-value]
    assert found == rank and time.monotonic() - began >= 2.9


def _in_time(exchange: Any, *given: Any) -> None:
    began = time.monotonic()
    exchange(*given)
    assert time.monotonic() - began < 1.5


@pytest.mark.slow
def test_what_takes_long_on_one_worker_makes_no_exchange_wait(tmp_path: Path) -> None:
    together(2, _patiently, tmp_path)


def test_the_stronger_reason_wins_and_one_worker_asks_itself() -> None:
    agreement = Agreement(0, 1, CPU)
    assert not agreement.due(1)
    agreement.SECONDS = 0.0  # type: ignore[misc]
    assert agreement.due(1)
    assert agreement.exchange(1, "preempted", True, 0.5) == Agreed("preempted", True, (0.5,))
    assert agreement.exchange(2, None, False, 0.0) == Agreed(None, False, (0.0,))


def test_a_worker_that_is_slow_again_and_again_is_named_with_its_host() -> None:
    slowest = Slowest(["a", "b", "c"])
    assert [slowest.lap((1.0, 1.1, 5.0)) for _ in range(3)] == [None] * 3
    assert slowest.lap((1.0, 1.0, 3.5)) == {"rank": 2, "host": "c", "times": 3.5}
    assert slowest.lap((1.0, 1.0, 1.5)) is None
    assert slowest.lap((1.0, 1.0, 3.5)) is None
    assert [slowest.lap((5.0, 1.0, 1.0)) for _ in range(4)] == [None] * 3 + [{"rank": 0, "host": "a", "times": 5.0}]
    assert Slowest(["a"]).lap((1.0,)) is None


class Event:
    """Of an accelerator whose work goes on for two seconds after it was begun."""

    waited = 0

    def __init__(self, device: torch.device, enable_timing: bool) -> None:
        assert device.type == "meta" and enable_timing

    def record(self) -> None: ...

    def synchronize(self) -> None:
        Event.waited += 1

    def elapsed_time(self, other: Event) -> float:
        return 2000.0


def test_an_accelerator_notes_what_it_does_and_is_waited_for_when_somebody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "Event", Event)
    monkeypatch.setattr(Event, "waited", 0)
    clock = Clock()
    for _ in range(3):
        with clock.running(torch.device("meta")):
            pass
    assert Event.waited == 0
    assert (clock.seconds, clock.seconds, Event.waited) == (6.0, 6.0, 3)


def test_waiting_for_batches_and_computing_are_told_apart() -> None:
    def slow() -> Iterator[Any]:
        for batch in range(4):
            time.sleep(0.02)
            yield batch

    pace, began = Pace(), time.perf_counter()
    objective = pace.timed(lambda model, batch: time.sleep(0.01))  # type: ignore[arg-type, return-value]
    for batch in pace.waiting(slow()):
        time.sleep(0.03)
        objective(nn.Linear(1, 1), batch)
    assert pace.waited >= 4 * 0.02 and pace.computed >= 4 * 0.01
    assert pace.waited + pace.computed <= time.perf_counter() - began - 4 * 0.03
    assert pace.lap() == pace.computed and pace.lap() == 0.0


def _batch_norm(rank: int, world: int, folder: Path) -> None:
    """Worker 1 is slow before a layer that waits for all of them."""
    network = nn.Sequential(nn.Linear(3, 3), BatchNorm(3))
    network[0].register_forward_hook(lambda *_: time.sleep(0.05 * rank))
    pace = Pace()
    objective = pace.timed(lambda model, batch: Losses(model(batch).sum(), None))  # type: ignore[arg-type]
    for _ in range(6):
        objective(network, torch.randn(4, 3))  # type: ignore[arg-type]
    (folder / f"{rank}").write_text(json.dumps([pace.computed, pace.others.seconds]))


def test_waiting_for_other_workers_within_a_forward_pass_is_not_computing(tmp_path: Path) -> None:
    together(2, _batch_norm, tmp_path)
    (fast, waited), (slow, _) = (json.loads((tmp_path / f"{rank}").read_text()) for rank in range(2))
    assert slow >= 6 * 0.05 and slow > 2 * fast and waited > 0.2


def test_a_line_of_speed_says_how_fast_and_how_long_data_were_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    record, pace = Record(step=10, rows=1000, epoch=1), Pace()
    log = SpeedLog(tmp_path, record, ["here"])
    for seconds, waited in ((2.0, 0.5), (0.25, 0.0), (1.75, 1.0)):
        now[0] += seconds
        record.step, record.rows, pace.waited = record.step + 20, record.rows + 640, pace.waited + waited
        log.lap(record, pace, (0.1,), {"checkpoint_seconds": 0.125})
    log.close()
    first, second = metrics_log.read(tmp_path / SPEED)
    common = {"epoch": 2, "checkpoint_seconds": 0.125, "workers": 1, "slow": None}
    assert {key: first[key] for key in common} == common
    assert (first["step"], first["rows_per_second"], first["step_seconds"], first["data_wait"]) == (30, 320.0, 0.1, 0.25)
    assert (second["step"], second["rows_per_second"], second["step_seconds"], second["data_wait"]) == (70, 640.0, 0.05, 0.5)


def test_after_a_restart_steps_that_others_have_taken_are_not_taken_for_speed() -> None:
    agreement = Agreement(0, 1, CPU, step=1000)
    time.sleep(0.05)
    agreement.exchange(1001, None, False, 0.0)
    assert 1002 <= agreement.next <= 1011  # a step in 0.05 s is at most ten of them in half a second
