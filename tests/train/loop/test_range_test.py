"""The range test: the rate that it suggests, on quadratics whose best rate is known and on digits; and that it leaves no trace."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dlopt.data.feed.batches import Batch
from dlopt.data.sources import Sample
from dlopt.optim.constraints import MaxNorm
from dlopt.optim.optimizers import Adam, AdamW, Sgd
from dlopt.part import DloptError
from dlopt.train.job import Train
from dlopt.train.loop.gradients import Sharpness
from dlopt.train.loop.losses import loss_of
from dlopt.train.loop.objectives import Losses, Objective, supervised
from dlopt.train.loop.pipeline import Pipeline
from dlopt.train.loop.range_test import HIGH, LOW, Build, Sweep, range_test, sweep
from dlopt.train.loop.steps import peaked
from dlopt.train.parallel.base import Parallel
from tests.cases import few
from tests.driven import KINDS, Small, batches
from tests.sets import THREE

pytestmark = pytest.mark.usefixtures("one_thread")
OBJECTIVE = supervised(loss_of(None, THREE, nn.Identity()), 0, 0, 1)


def descent(curvatures: np.ndarray) -> Callable[[float], float]:
    """Gradient descent on sum(curvature * x^2) / 2 from ones: takes a step at a rate, gives the loss before it."""
    x = np.ones(len(curvatures))

    def loss_at(rate: float) -> float:
        nonlocal x
        with np.errstate(over="ignore", invalid="ignore"):
            loss = 0.5 * float((curvatures * x**2).sum())
            x = x - rate * curvatures * x
        return loss

    return loss_at


def after(curvatures: np.ndarray, rate: float, count: int = 200) -> float:
    """The loss that so many steps at a rate end in."""
    loss_at = descent(curvatures)
    return [loss_at(rate) for _ in range(count)][-1]


@pytest.mark.parametrize(
    "curvatures", few(2, [[10, 1, 0.1], [0.05, 0.02], [1.0], [1, 0.1, 0.01], [200.0, 3.0], list(np.logspace(-3, 1, 20))]), ids=str
)
def test_on_a_quadratic_the_suggested_rate_is_stable_and_within_ten_times_of_the_best(curvatures: list[float]) -> None:
    matrix = np.array(curvatures)
    found = range_test(descent(matrix)).suggested
    best = min(np.geomspace(1e-4, 100, 400), key=lambda rate: after(matrix, rate))
    assert found < 2 / matrix.max()
    assert best / 10 < found < best * 10


def test_the_sweep_rises_by_equal_factors_and_ends_where_the_loss_diverges() -> None:
    found = range_test(descent(np.array([200.0])))
    assert found.rates[0] == pytest.approx(LOW) and found.rates[-1] < HIGH
    assert np.ptp(np.diff(np.log(found.rates))) < 1e-9
    assert len(found.rates) == len(found.losses) and all(map(math.isfinite, found.losses))
    assert found.losses[-1] > found.losses[0]
    assert Sweep(*json.loads(json.dumps(found))) == found


def test_a_loss_that_is_no_number_ends_the_sweep_and_is_not_kept() -> None:
    loss_at = descent(np.array([1.0]))
    found = range_test(lambda rate: loss_at(rate) if rate < 0.5 else math.nan)
    assert max(found.rates) < 0.5 and found.suggested < 0.5


@pytest.mark.parametrize("form", [lambda rate: 1.0, lambda rate: 1.0 + rate, lambda rate: math.nan])
def test_where_the_loss_never_falls_there_is_no_rate_to_suggest(form: Callable[[float], float]) -> None:
    with pytest.raises(DloptError, match=r"train\.optimizer\.lr: auto has found no rate at which the loss falls"):
        range_test(form)


@pytest.mark.parametrize("seed", range(5))
def test_noise_moves_the_suggestion_by_less_than_a_factor_of_three(seed: int) -> None:
    quiet = range_test(descent(np.array([1.0, 0.3]))).suggested
    noise, loss_at = np.random.default_rng(seed), descent(np.array([1.0, 0.3]))
    noisy = range_test(lambda rate: loss_at(rate) + 0.05 * noise.standard_normal()).suggested
    assert quiet / 3 < noisy < 3 * quiet


class Digits(nn.Module):
    """784-64-10, with dropout if it is asked for."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.body = nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Dropout(dropout), nn.Linear(64, 10))

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.body(inputs["image"])


@cache
def digits(rows: int = 50) -> list[Batch]:
    """100 batches of all digits, shuffled."""
    table = Sample().peek(5000)
    images = torch.tensor(np.array(table["image"].to_pylist(), dtype=np.float32).reshape(5000, 784) / 255)
    labels = torch.tensor(table["label"].to_pylist())
    order = torch.randperm(5000, generator=torch.Generator().manual_seed(1))
    return [Batch({"image": images[some]}, labels[some], rows) for some in order.split(rows)]


def pipeline(model: nn.Module, optimizer: torch.optim.Optimizer, objective: Objective = OBJECTIVE, **train: Any) -> Pipeline:
    return Pipeline(Train(**train), objective, peaked(optimizer), Parallel(model))


def built(part: Any, **train: Any) -> Build:
    return lambda model, rate: pipeline(model, part.model_copy(update={"lr": rate}).build(model.parameters()), **train)


def trained(part: Any, rate: float, data: list[Batch]) -> float:
    """The mean loss of the last twenty batches of two epochs."""
    model = Digits()
    losses = [step.loss.item() for step in built(part)(model, rate).steps(data * 2, lambda _: 1.0)]
    return float(np.mean(losses[-20:]))


@pytest.mark.parametrize(
    "part",
    few(1, [Adam(), Sgd(), Sgd(momentum=0.9), AdamW(), KINDS["muon"]()]),
    ids=["sgd", "adam", "momentum", "adamw", "muon"],
)
def test_on_digits_training_at_the_suggested_rate_beats_one_thirty_times_lower_and_does_not_diverge(mnist: None, part: Any) -> None:
    data = digits()
    rate = sweep(Digits(), built(part), data).suggested
    found, lower, higher = (trained(part, rate * factor, data) for factor in (1, 1 / 30, 30))
    assert found < 0.5 and found < 0.8 * lower
    assert not higher < found  # thirty times higher is no better, either


def test_a_sweep_is_the_same_each_time_and_leaves_the_network_and_random_numbers_as_they_were(mnist: None) -> None:
    model = Digits(dropout=0.5).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(5)
    numbers = torch.get_rng_state()
    first = sweep(model, built(Sgd()), digits())
    assert torch.equal(torch.get_rng_state(), numbers)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not model.training and all(parameter.grad is None for parameter in model.parameters())
    torch.manual_seed(6)
    assert sweep(model, built(Sgd()), digits()) == first
    assert sweep(model, built(Sgd()), digits(), seed=1) != first


@pytest.mark.parametrize(
    ("train", "most"),
    [
        ({"micro_batch_size": 7}, 7),
        ({"precision": "bfloat16"}, 50),
        ({"precision": "float16"}, 50),
        ({"sharpness": Sharpness(rho=0.5)}, 50),
        ({"centralize_gradients": True}, 50),
        ({"max_norm": MaxNorm(limit=0.2)}, 50),
    ],
    ids=str,
)
def test_the_steps_of_a_sweep_are_those_of_training(mnist: None, train: dict[str, Any], most: int) -> None:
    """As many rows at a time, in its precision, and with all else that its steps have."""
    seen = set[tuple[int, torch.dtype]]()

    def noted(model: nn.Module, batch: Batch) -> Losses:
        losses = OBJECTIVE(model, batch)
        seen.add((len(batch.target), model.body[1](model.body[0](batch.inputs["image"])).dtype))  # type: ignore[index]
        return losses

    def build(model: nn.Module, rate: float) -> Pipeline:
        return pipeline(model, Sgd(lr=rate).build(model.parameters()), noted, **train)

    found = sweep(Digits(), build, digits()[:40])
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(train.get("precision", ""), torch.float32)
    assert max(rows for rows, _ in seen) == most and {one for _, one in seen} == {dtype}
    assert LOW < found.suggested < HIGH
    plainly = sweep(Digits(), built(Sgd()), digits()[:40])
    assert (found.losses == pytest.approx(plainly.losses, rel=1e-3)) == ("micro_batch_size" in train)


class Pair(nn.Module):
    """Two numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.ones((), dtype=torch.float64)) for _ in range(2))

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.first.square() / 2 + self.second.square() / 2


def bowl(model: nn.Module, batch: Batch) -> Losses:
    return Losses(model(batch.inputs), None)


def test_a_group_with_a_rate_of_its_own_keeps_it_all_along() -> None:
    def build(model: nn.Module, rate: float) -> Pipeline:
        first, second = model.parameters()
        return pipeline(model, torch.optim.SGD([{"params": [first], "lr": rate}, {"params": [second], "lr": 0.1}]), bowl)

    found = sweep(Pair(), build, [Batch({}, torch.zeros(1), 1)] * 100)
    first = second = 1.0
    for rate, loss in zip(found.rates, found.losses, strict=True):
        assert loss == pytest.approx((first**2 + second**2) / 2, rel=1e-9)
        first, second = first * (1 - rate), second * 0.9


@pytest.mark.parametrize(
    "kind",  # prodigy finds its own rate
    few(7, [*sorted(set(KINDS) - {"prodigy", "lbfgs"}), "lbfgs"]),
)
def test_every_optimizer_has_a_rate_that_is_suggested(kind: str) -> None:
    model, source = Small(), batches(rows=64)
    data = [next(source) for _ in range(30 if kind == "lbfgs" else 100)]  # which looks at each many times
    found = sweep(model, built(KINDS[kind]()), data)
    assert LOW < found.suggested < HIGH
    assert min(found.losses) < found.losses[0]
