"""Faults T10 and T11: losses that are no numbers, rows that poison a batch, and gradients that explode or vanish. Without Ray."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load as load_tensors
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from dlopt.artifact import Artifact
from dlopt.data.feed.batches import Batch, Resident
from dlopt.models import Mlp
from dlopt.optim.constraints import ClipNorm
from dlopt.optim.optimizers import Adam, Sgd
from dlopt.part import DloptError
from dlopt.train.checkpoint.stores import CHECKPOINTS
from dlopt.train.job import Fit, Resources
from dlopt.train.watch import metrics_log
from dlopt.train.watch.divergence import Divergence
from dlopt.train.watch.metrics_log import HEALTH
from dlopt.train.worker import Assignment, Worker
from tests import sets
from tests.processes import together
from tests.train.loop.test_worker import CPU, section, work

pytestmark = [pytest.mark.chaos, pytest.mark.usefixtures("one_thread")]

STEPS, PER_EPOCH = 126, 63
ALL = {"every": {"steps": 1}, "keep": 10**6}
"""A checkpoint after every step, and each is kept, so that what was ever written can be looked at."""
UNDISTURBED: dict[str, float] = {}
"""The accuracy of undisturbed trainings, by their sections."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """So many rows that the choice of the best epoch and its accuracy say little of what they happen to be."""
    rows = {"train": 2000, "validation": 2000, "test": 10_000}
    return sets.prepared(tmp_path_factory.mktemp("data"), sets.signature(sets.NUMBERS, target=sets.TWO), **rows)


def fitted(epochs: int = 2, **train: Any) -> Fit:
    return section(epochs=epochs, **train).model_copy(update={"model": Mlp(hidden=(32, 32), dropout=0.0)})


def assert_as_accurate(info: dict[str, Any], fit: Fit, data: Artifact, out: Path) -> None:
    """As the same training undisturbed, within half a point."""
    key = fit.model_dump_json()
    UNDISTURBED[key] = UNDISTURBED.get(key) or work(fit, data, out)["metrics"]["test"]["accuracy"]
    assert abs(info["metrics"]["test"]["accuracy"] - UNDISTURBED[key]) <= 0.005


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """From now on the n-th batches that a feed gives, counted over the whole run and through roll-backs, have a row of this value for
    either class, so that the model is wrong at one of them."""

    def poison(at: set[int], value: float, ranks: tuple[int, ...] = (0,)) -> None:
        spoil(monkeypatch.setattr, at, value, ranks)

    return poison


def spoil(put: Callable[[Any, str, Any], None], at: set[int], value: float, ranks: tuple[int, ...]) -> None:
    given, count = Resident.epoch, 0

    def epoch(self: Resident, number: int, start: int = 0) -> Iterator[Batch]:
        nonlocal count
        for batch in given(self, number, start):
            count += 1
            if count in at and self.sampler.rank in ranks:
                for values in batch.inputs.values():
                    values[:2] = value
                batch.target[0], batch.target[1] = 0, 1
            yield batch

    put(Resident, "epoch", epoch)


def steps(out: Path) -> list[dict[str, Any]]:
    return [line for line in metrics_log.read(out / metrics_log.NAME) if "loss" in line]


def assert_all_checkpoints_are_finite(out: Path, least: int) -> None:
    """Weights, averages and the optimizer's state, in every file there is."""
    files = list((out / CHECKPOINTS).rglob("*.safetensors"))
    assert len({path.parent for path in files}) >= least
    for path in files:
        for name, value in load_tensors(path.read_bytes()).items():
            assert not value.is_floating_point() or bool(value.isfinite().all()), (path, name)


def some_steps(chance: random.Random, count: int) -> list[int]:
    """Not the first ones, from which nothing can be told yet, no two in a row, and none whose batch is the short one at the end of an
    epoch, of which one of two workers has no row."""
    whole = [step for step in range(15, STEPS - 5, 2) if step % PER_EPOCH]
    return sorted(chance.sample(whole, min(count, 30)))


@pytest.mark.parametrize("value", [math.inf, -math.inf], ids=str)
def test_a_batch_whose_gradient_is_not_finite_is_noted_at_its_step_and_left_out(
    value: float, data: Artifact, tmp_path: Path, chance: random.Random, repeat: int, poison: Any
) -> None:
    """T10, policy skip, which is the one without settings."""
    at = some_steps(chance, repeat)
    poison(set(at), value)
    info = work(fitted(), data, tmp_path / "out", checkpoint=ALL)
    lines = steps(tmp_path / "out")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines if line["gradient_norm"] is None] == at
    assert info["rollbacks"] == 0
    assert_all_checkpoints_are_finite(tmp_path / "out", STEPS)
    assert_as_accurate(info, fitted(), data, tmp_path / "undisturbed")


def test_a_batch_whose_gradient_is_not_finite_sends_training_back_and_on_at_half_the_rate(
    data: Artifact, tmp_path: Path, chance: random.Random, poison: Any
) -> None:
    """T10, policy roll back."""
    (at,) = some_steps(chance, 1)
    poison({at}, math.inf)
    info = work(fitted(divergence=Divergence(patience=1, factor=0.5)), data, tmp_path / "out", checkpoint=ALL)
    (back,) = [line for line in metrics_log.read(tmp_path / "out" / HEALTH) if "rollback" in line]
    assert f"step {at}: " in back["rollback"] and "not finite" in back["rollback"]
    assert info["rollbacks"] == 1
    lines, again = steps(tmp_path / "out"), (at - 1) // PER_EPOCH * PER_EPOCH
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert {line["rate"] for line in lines[:again]} <= {0.01}
    assert {line["rate"] for line in lines[again:]} == {0.005}
    assert all(line["gradient_norm"] is not None for line in lines)
    assert_all_checkpoints_are_finite(tmp_path / "out", STEPS)
    assert_as_accurate(info, fitted(), data, tmp_path / "undisturbed")


def test_a_batch_whose_gradient_is_not_finite_ends_training_where_that_is_wanted(
    data: Artifact, tmp_path: Path, chance: random.Random, poison: Any
) -> None:
    """T10, policy stop."""
    (at,) = some_steps(chance, 1)
    poison({at}, math.inf)
    with pytest.raises(DloptError, match=rf"^train: training diverges .* step {at}: the gradient was not finite"):
        work(fitted(divergence=Divergence(patience=1, most=0)), data, tmp_path / "out", checkpoint=ALL)
    assert not (tmp_path / "out" / "weights.safetensors").exists()
    assert_all_checkpoints_are_finite(tmp_path / "out", at - 1)


@pytest.mark.parametrize("optimizer", [Adam(lr=1e-2), Sgd(lr=0.1, momentum=0.9)], ids=["adam", "sgd"])
def test_a_row_of_huge_values_is_told_of_at_its_step_and_costs_hardly_any_accuracy_with_clipping(
    optimizer: Any,
    data: Artifact,
    tmp_path: Path,
    chance: random.Random,
    repeat: int,
    poison: Any,
) -> None:
    """T10: a poisoned batch whose gradient is finite; after the last there are two epochs more to make up for it."""
    at, fit = some_steps(chance, repeat), fitted(epochs=4, optimizer=optimizer, clip=ClipNorm(limit=0.2))
    poison(set(at), 10 ** chance.uniform(4, 15))
    info = work(fit, data, tmp_path / "out", checkpoint=ALL)
    told = [found["step"] for line in metrics_log.read(tmp_path / "out" / HEALTH) for found in line.get("findings", ())]
    assert at[0] in told  # of spikes close together the first is told of
    assert_all_checkpoints_are_finite(tmp_path / "out", 2 * STEPS)
    assert_as_accurate(info, fit, data, tmp_path / "undisturbed")


def _train(rank: int, world: int, home: Path, data: Path, at: int) -> None:
    spoil(setattr, {at}, math.inf, (1,))
    (Path(home) / "out").mkdir(exist_ok=True)
    resources = Resources.model_validate({"checkpoint": ALL})
    assignment = Assignment(fit=fitted(), resources=resources, data=Path(data), out=Path(home) / "out", feed="resident", threads=1)
    info = Worker(assignment, rank, 2, CPU).run()
    if rank == 0:
        (Path(home) / "info.json").write_text(json.dumps(info))


@pytest.mark.slow
def test_two_workers_leave_out_the_batch_that_poisons_one_of_them(data: Artifact, tmp_path: Path, chance: random.Random) -> None:
    """T10: all decide alike, or their weights would drift apart, which is refused."""
    (at,) = some_steps(chance, 1)
    together(2, _train, tmp_path, data.path, at)
    lines = steps(tmp_path / "out")
    assert [line["step"] for line in lines if line["gradient_norm"] is None] == [at]
    assert_all_checkpoints_are_finite(tmp_path / "out", STEPS)
    info = json.loads((tmp_path / "info.json").read_text())
    assert_as_accurate(info, fitted(), data, tmp_path / "undisturbed")


@pytest.mark.parametrize("optimizer", [Adam(lr=1e-2 * 1000), Sgd(lr=0.1 * 1000, momentum=0.9)], ids=["adam", "sgd"])
def test_a_rate_a_thousand_times_too_high_is_told_of_within_fifty_steps_with_the_layers(
    optimizer: Any, data: Artifact, tmp_path: Path
) -> None:
    """T11; tests/train/loop/test_training.py has what comes of it, and the vanishing gradients of deep sigmoids."""
    try:
        work(fitted(optimizer=optimizer), data, tmp_path / "out")
    except DloptError as error:
        assert "lower train.optimizer.lr" in str(error)
    lines = list(metrics_log.read(tmp_path / "out" / HEALTH))
    backs = [re.search(r"step (\d+): .* in (body[.\w]+)", line["rollback"]) for line in lines if "rollback" in line]
    told = [(int(back[1]), back[2]) for back in backs if back]
    told += [(found["step"], layer) for line in lines for found in line.get("findings", ()) for layer in found["layers"]]
    step, layer = min(told)
    assert step <= 50
    assert layer in {name for line in lines for name in line.get("layers", ())}


@pytest.mark.parametrize("rate", [1e-2, 10.0])
def test_clipping_holds_the_norm_of_every_step(rate: float, data: Artifact, tmp_path: Path, poison: Any) -> None:
    """T11: also with a row of huge values, whose gradient is as good as infinite."""
    norms: list[float] = []

    def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        gradients: list[Tensor] = [value.grad for group in optimizer.param_groups for value in group["params"] if value.grad is not None]
        norms.append(float(torch.linalg.vector_norm(torch.cat([value.flatten().double() for value in gradients]))))

    poison({20, 40}, 1e12)
    hook = register_optimizer_step_pre_hook(look)
    try:
        work(fitted(optimizer=Sgd(lr=rate), clip=ClipNorm(limit=0.5), divergence=Divergence(most=50)), data, tmp_path / "out")
    finally:
        hook.remove()
    assert len(norms) >= STEPS - 5
    assert max(norms) <= 0.5 * (1 + 1e-5)
    assert max(norms) > 0.49  # it was clipped
