"""--profile: where the time of a step goes is found where it was spent, and adds up; traces are there to be opened."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dlopt.cli import main
from dlopt.data.feed.batches import Batch
from dlopt.models import Mlp
from dlopt.progress import BLOCK
from dlopt.train.job import Fit, Resources, Train
from dlopt.train.loop.gradients import Gradient, plain
from dlopt.train.loop.losses import loss_of
from dlopt.train.loop.objectives import Losses, supervised
from dlopt.train.loop.steps import Step, peaked, steps
from dlopt.train.watch.profile import BREAKDOWN, FOLDER, PHASES, TRACED, WARM, Clock, Profile, Unprofiled, drawn, say
from dlopt.train.worker import Assignment, Worker
from tests import sets
from tests.processes import together
from tests.train.loop.test_worker import CPU

OBJECTIVE = supervised(loss_of(None, sets.TWO, nn.Identity()), 0, 0, 1)
NAP = 0.005


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.linear = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.linear(torch.relu(self.hidden(inputs["x"])))


def batches(count: int, nap: float = 0.0) -> Iterator[Batch]:
    for _ in range(count):
        time.sleep(nap)
        yield Batch({"x": torch.ones(8, 4)}, torch.zeros(8, dtype=torch.int64), 8)


class Drowsy(torch.optim.SGD):
    """Sleeps before each step."""

    def step(self, closure: Any = None) -> Any:
        time.sleep(NAP)
        return super().step(closure)


def trained(
    profile: Unprofiled,
    model: nn.Module,
    feed: Iterator[Batch],
    optimizer: torch.optim.Optimizer | None = None,
    forward: Callable[[], None] = lambda: None,
    backward: Callable[[], None] = lambda: None,
    world: int = 1,
) -> list[Step]:
    """As Training puts it together."""
    optimizer = peaked(optimizer or torch.optim.SGD(model.parameters(), lr=0.1))
    optimizer.step = profile.timed("optimizer", optimizer.step)  # type: ignore[method-assign]

    def objective(model: nn.Module, batch: Batch) -> Losses:
        forward()
        return OBJECTIVE(model, batch)

    def gradient(*given: Any) -> Losses:
        backward()
        return plain(*given)

    found: Gradient = profile.timed("backward", profile.reduced(gradient))
    return list(steps(model, optimizer, profile.batches(feed), profile.timed("forward", objective), found, lambda _: 1.0))


def breakdown(folder: Path) -> dict[str, Any]:
    return json.loads((folder / FOLDER / BREAKDOWN).read_text())


def ms(found: dict[str, Any]) -> dict[str, float]:
    return {name: part["ms"] for name, part in found["parts"].items()}


CULPRITS: dict[str, dict[str, Any]] = {
    "data wait": {"feed": batches(80, NAP)},
    "optimizer": {"feed": batches(80)},
    "forward": {"feed": batches(80), "forward": lambda: time.sleep(NAP)},
    "backward": {"feed": batches(80), "backward": lambda: time.sleep(NAP)},
}


@pytest.mark.parametrize("culprit", CULPRITS)
def test_whoever_sleeps_is_found_and_the_parts_add_up_to_the_step(culprit: str, tmp_path: Path) -> None:
    model = Two()
    profile = Profile(tmp_path, model, 0, 1, CPU, 80)
    optimizer = Drowsy(model.parameters(), lr=0.1) if culprit == "optimizer" else None
    began = time.perf_counter()
    done = trained(profile, model, optimizer=optimizer, **CULPRITS[culprit])
    wall = 1e3 * (time.perf_counter() - began)
    profile.close()
    (found,) = breakdown(tmp_path)["workers"]
    parts = ms(found)
    assert list(parts) == list(PHASES) and len(done) == 80
    assert found["steps"] == 80 - WARM - TRACED
    assert parts[culprit] >= 1e3 * NAP
    assert sum(parts.values()) == pytest.approx(found["step_ms"], rel=0.02)
    assert sum(part["share"] for part in found["parts"].values()) == pytest.approx(1, abs=0.02)
    assert 1e3 * NAP * found["steps"] <= found["step_ms"] * found["steps"] <= wall
    assert all(parts[name] > 0 for name in ("data wait", "forward", "backward", "optimizer", "other"))
    assert parts["all-reduce"] == parts["checkpoint"] == 0


def test_the_trace_has_the_parts_of_the_steps_after_the_first_ones(tmp_path: Path) -> None:
    model = Two()
    profile = Profile(tmp_path, model, 0, 1, CPU, 80)
    trained(profile, model, batches(80))
    profile.close()
    events = json.loads((tmp_path / FOLDER / "worker-00000.json").read_text())["traceEvents"]
    names = [event.get("name") for event in events if event.get("cat") == "user_annotation"]
    for part in ("data wait", "forward", "backward", "optimizer"):
        assert names.count(part) == TRACED if part != "backward" else names.count(part) == 2 * TRACED  # of all workers, within all of it
    assert "aten::linear" in [event.get("name") for event in events]


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_a_short_training_is_traced_and_what_is_left_is_measured(count: int, tmp_path: Path) -> None:
    model = Two()
    profile = Profile(tmp_path, model, 0, 1, CPU, count)
    assert len(trained(profile, model, batches(count))) == count
    profile.close()
    assert (tmp_path / FOLDER / "worker-00000.json").is_file()
    warm, traced = count // 4, -(-count // 4)
    left = count - warm - traced
    assert [worker["steps"] for worker in (breakdown(tmp_path)["workers"] if left else [])] == [left] * bool(left)


def test_nothing_is_put_around_what_is_not_profiled() -> None:
    idle, feed = Unprofiled(), batches(1)
    gradient = plain
    assert idle.timed("forward", OBJECTIVE) is OBJECTIVE and idle.batches(feed) is feed and idle.reduced(gradient) is gradient


def test_time_within_a_part_is_the_inner_parts_alone_and_what_is_outside_counts_if_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = Clock(CPU)

    def later(seconds: float) -> None:
        now[0] += seconds

    with clock.within("other"):
        later(1)
        with clock.within("backward"):
            later(2)
            with clock.within("forward"):
                later(4)
            later(8)
            clock.move("all-reduce", now[0] - 3)
    later(16)
    with clock.within("checkpoint"):
        later(32)
    clock.steps = 2
    found = clock.found()
    assert found["step_ms"] == 1e3 * (1 + 2 + 4 + 8 + 32) / 2
    expected = {"data wait": 0, "forward": 4, "backward": 7, "all-reduce": 3, "optimizer": 0, "checkpoint": 32, "other": 1}
    assert ms(found) == {name: 1e3 * seconds / 2 for name, seconds in expected.items()}


def worker(rank: int, world: int, folder: Path) -> None:
    """One of two; the second one computes for longer."""
    torch.manual_seed(0)
    model = Two()
    profile = Profile(Path(folder), model, rank, 2, CPU, 60)
    trained(profile, nn.parallel.DistributedDataParallel(model), batches(60), forward=lambda: time.sleep(4 * NAP * rank), world=2)
    profile.close()


def test_waiting_for_another_worker_is_told_from_the_way_back(tmp_path: Path) -> None:
    together(2, worker, tmp_path)
    found = breakdown(tmp_path)
    zero, one = found["workers"]
    assert (zero["worker"], one["worker"]) == (0, 1) and zero["steps"] == one["steps"] == 60 - 15 - 10
    assert ms(zero)["all-reduce"] > 1e3 * NAP and ms(one)["forward"] > 4e3 * NAP
    for each in (zero, one):
        assert sum(ms(each).values()) == pytest.approx(each["step_ms"], rel=0.02)
        assert each["communication_ms"] > 0
        assert (tmp_path / FOLDER / f"worker-{each['worker']:05d}.json").is_file()
    assert "workers exchange for" in drawn(found) and "steps of the other workers" in drawn(found)


def test_a_job_is_profiled_with_its_checkpoints_and_gives_the_same_bits(tmp_path: Path) -> None:
    data = sets.prepared(tmp_path, sets.signature(sets.NUMBERS), train=1000)
    fit = Fit(seed=1, model=Mlp(hidden=(16,)), augment=(), train=Train(epochs=4, batch_size=32))
    weights = []
    for profiled in (False, True):
        out = tmp_path / str(profiled)
        out.mkdir()
        resources = Resources.model_validate({"profile": profiled, "checkpoint": {"every": {"steps": 10}}})
        Worker(Assignment(fit=fit, data=data.path, out=out, feed="resident", resources=resources), 0, 1, CPU).run()
        weights.append((out / "weights.safetensors").read_bytes())
    assert weights[0] == weights[1] and not (tmp_path / "False" / FOLDER).exists()
    (found,) = breakdown(tmp_path / "True")["workers"]
    assert found["steps"] == 4 * 32 - WARM - TRACED
    assert all(ms(found)[name] > 0 for name in PHASES if name != "all-reduce")
    assert sum(ms(found).values()) == pytest.approx(found["step_ms"], rel=0.02)
    told: list[tuple[str, float | None, str]] = []
    say(tmp_path / "True", lambda *line: told.append(line))
    ((stage, share, text),) = told
    assert (stage, share) == ("fit", 1.0) and text.startswith(BLOCK) and len(text.splitlines()) < 24
    assert all(name in text for name in PHASES) and "ui.perfetto.dev" in text
    say(tmp_path / "False", lambda *line: told.append(line))
    assert len(told) == 1


JOB = """
name: sides
data:
  source: {kind: csv, path: PATH}
  inputs: [{kind: number, columns: [a, b]}]
  target: {kind: category, column: side}
model: {kind: mlp, hidden: [8]}
train: {epochs: 2, batch_size: 16}
resources: {workers: 0}
"""


@pytest.mark.usefixtures("ray_cluster")
def test_the_command_line_draws_it_and_says_when_there_is_nothing_to_be_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [f"{a},{b},{'left' if a > b else 'right'}" for a in range(20) for b in range(20)]
    (tmp_path / "rows.csv").write_text("\n".join(["a,b,side", *rows]))
    (tmp_path / "job.yaml").write_text(JOB.replace("PATH", str(tmp_path / "rows.csv")))
    command = ["run", str(tmp_path / "job.yaml"), "--home", str(tmp_path / "runs"), "--profile"]
    assert main(command) == 0
    told = capsys.readouterr().err
    assert all(f"\n  {name} " in told for name in PHASES) and "profile has traces" in told
    (folder,) = (tmp_path / "runs" / "model").glob(f"*/{FOLDER}")
    assert {path.name for path in folder.iterdir()} == {BREAKDOWN, "worker-00000.json"}
    assert main(command) == 0
    told = capsys.readouterr().err
    assert "resources.profile: nothing is measured, since this model is trained already: add --fresh" in told
