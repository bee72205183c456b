"""Optimizers against their published formulas, written out in plain numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from dlopt.optim.optimizers import Adam, AdamW, Optimizer, Sgd

STEPS = 10
START = (1.5, -0.7, 0.3)
CURVATURE = (1.0, 4.0, 0.25)
"""The function to minimise is half the sum of curvature times w squared, so its gradient is curvature times w."""


def sgd(weights: list[float], lr: float, momentum: float, nesterov: bool, decay: float) -> Iterator[list[float]]:
    """Sutskever et al. 2013, with the velocity in units of gradients, as torch documents it."""
    velocity: list[float] | None = None
    while True:
        gradient = [c * w + decay * w for c, w in zip(CURVATURE, weights, strict=True)]
        velocity = gradient if velocity is None else [momentum * v + g for v, g in zip(velocity, gradient, strict=True)]
        ahead = [g + momentum * v for g, v in zip(gradient, velocity, strict=True)] if nesterov else velocity
        weights = [w - lr * (v if momentum else g) for w, v, g in zip(weights, ahead, gradient, strict=True)]
        yield weights


def adam(weights: list[float], lr: float, betas: tuple[float, float], eps: float, decay: float, decoupled: bool) -> Iterator[list[float]]:
    """Algorithm 1 of Kingma, Ba 2015; decoupled: algorithm 2 of Loshchilov, Hutter 2019."""
    first, second, t = [0.0] * len(weights), [0.0] * len(weights), 0
    while True:
        t += 1
        gradient = [c * w + (0 if decoupled else decay * w) for c, w in zip(CURVATURE, weights, strict=True)]
        first = [betas[0] * m + (1 - betas[0]) * g for m, g in zip(first, gradient, strict=True)]
        second = [betas[1] * v + (1 - betas[1]) * g * g for v, g in zip(second, gradient, strict=True)]
        step = [m / (1 - betas[0] ** t) / (math.sqrt(v / (1 - betas[1] ** t)) + eps) for m, v in zip(first, second, strict=True)]
        weights = [w - lr * s - (lr * decay * w if decoupled else 0) for w, s in zip(weights, step, strict=True)]
        yield weights


def trajectory(part: Sgd | Adam | AdamW) -> Iterator[Tensor]:
    weights = nn.Parameter(torch.tensor(START, dtype=torch.float64))
    optimizer = part.build([weights])
    while True:
        weights.grad = torch.tensor(CURVATURE, dtype=torch.float64) * weights.detach()
        optimizer.step()
        yield weights.detach()


def assert_follows(part: Sgd | Adam | AdamW, formula: Iterator[list[float]]) -> None:
    moved = torch.tensor(START, dtype=torch.float64)
    for _, found, expected in zip(range(STEPS), trajectory(part), formula, strict=False):
        assert (found - torch.tensor(expected, dtype=torch.float64)).abs().max() < 1e-9
        moved = found
    assert (moved - torch.tensor(START)).abs().min() > 1e-3


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_sgd_follows_its_formula(momentum: float, nesterov: bool, decay: float) -> None:
    part = Sgd(lr=0.05, momentum=momentum, nesterov=nesterov, weight_decay=decay)
    assert_follows(part, sgd(list(START), 0.05, momentum, nesterov, decay))


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("eps", [1e-8, 1e-2])
def test_adam_follows_its_formula(decay: float, eps: float) -> None:
    assert_follows(
        Adam(lr=0.02, betas=(0.8, 0.99), eps=eps, weight_decay=decay), adam(list(START), 0.02, (0.8, 0.99), eps, decay, decoupled=False)
    )


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("eps", [1e-8, 1e-2])
def test_adamw_follows_its_formula(decay: float, eps: float) -> None:
    assert_follows(
        AdamW(lr=0.02, betas=(0.8, 0.99), eps=eps, weight_decay=decay), adam(list(START), 0.02, (0.8, 0.99), eps, decay, decoupled=True)
    )


def test_an_optimizer_is_found_by_its_kind() -> None:
    adapter: TypeAdapter[Optimizer] = TypeAdapter(Optimizer)
    kinds = {kind: adapter.validate_python({"kind": kind}) for kind in ("sgd", "adam", "adamw")}
    assert {kind: type(part) for kind, part in kinds.items()} == {"sgd": Sgd, "adam": Adam, "adamw": AdamW}
    built = {kind: type(part.build([nn.Parameter(torch.zeros(1))])) for kind, part in kinds.items()}
    assert built == {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


@pytest.mark.parametrize(
    "given",
    [
        {"kind": "sgd", "nesterov": True},
        {"kind": "sgd", "momentum": 1.0},
        {"kind": "sgd", "lr": 0},
        {"kind": "sgd", "lr": True},
        {"kind": "adam", "lr": float("inf")},
        {"kind": "adam", "lr": float("nan")},
        {"kind": "adam", "betas": [0.9, 1.0]},
        {"kind": "adam", "betas": [-0.1, 0.9]},
        {"kind": "adamw", "eps": 0},
        {"kind": "adamw", "weight_decay": -1},
    ],
)
def test_hyperparameters_that_torch_would_choke_on_are_refused_before_it_sees_them(given: dict[str, object]) -> None:
    adapter: TypeAdapter[Optimizer] = TypeAdapter(Optimizer)
    with pytest.raises(ValidationError):
        adapter.validate_python(given)


def test_a_rate_written_3e_4_which_yaml_reads_as_text_is_a_number() -> None:
    assert Adam.model_validate({"lr": "3e-4"}).lr == 3e-4
