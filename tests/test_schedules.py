"""Schedules against their closed forms, and against torch's schedulers where those do the same."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from dlopt.optim.schedules import Constant, Cosine, Exponential, Plateau, Warmup

EPOCHS = 8
POINTS = [EPOCHS * i / 100 for i in range(100)]
FORMS: list[tuple[Warmup, Callable[[float], float]]] = [
    (Constant(), lambda epoch: 1.0),
    (Exponential(decay=0.8), lambda epoch: 0.8**epoch),
    (Exponential(decay=0.8, staircase=True), lambda epoch: 0.8 ** int(epoch)),
    (Cosine(), lambda epoch: (1 + math.cos(math.pi * epoch / EPOCHS)) / 2),
    (Cosine(floor=0.1), lambda epoch: 0.1 + 0.9 * (1 + math.cos(math.pi * epoch / EPOCHS)) / 2),
    (Plateau(), lambda epoch: 1.0),
]


@pytest.mark.parametrize(("schedule", "form"), FORMS)
def test_a_schedule_is_its_closed_form(schedule: Warmup, form: Callable[[float], float]) -> None:
    assert [schedule.rate(epoch, EPOCHS) for epoch in POINTS] == pytest.approx([form(epoch) for epoch in POINTS], abs=1e-12)


@pytest.mark.parametrize(
    "schedule",
    [
        Constant(warmup_epochs=2.5),
        Exponential(decay=0.8, warmup_epochs=2.5),
        Cosine(floor=0.1, warmup_epochs=2.5),
        Plateau(warmup_epochs=2.5),
    ],
)
def test_warm_up_rises_from_0_in_a_line_and_the_schedule_then_runs_over_the_rest(schedule: Warmup) -> None:
    cold = type(schedule)(**schedule.model_dump(exclude={"warmup_epochs"}))
    for epoch in POINTS:
        rate = schedule.rate(epoch, EPOCHS)
        if epoch < 2.5:
            assert rate == pytest.approx(epoch / 2.5)
        elif isinstance(schedule, Cosine):  # squeezed into what is left
            assert rate == pytest.approx(cold.rate((epoch - 2.5) / (EPOCHS - 2.5) * EPOCHS, EPOCHS))
        else:
            assert rate == pytest.approx(cold.rate(epoch - 2.5, EPOCHS))
    assert schedule.rate(2.5, EPOCHS) == 1.0


def test_the_end_of_a_cosine_is_its_floor_and_a_warm_up_of_all_epochs_divides_by_nothing() -> None:
    assert Cosine(floor=0.25).rate(EPOCHS, EPOCHS) == pytest.approx(0.25)
    assert Cosine(warmup_epochs=EPOCHS).rate(EPOCHS - 0.5, EPOCHS) == pytest.approx(1 - 0.5 / EPOCHS)
    assert 0 <= Cosine(warmup_epochs=EPOCHS).rate(EPOCHS, EPOCHS) <= 1


def optimizer(lr: float = 0.3) -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)


def test_exponential_by_epochs_is_torchs() -> None:
    sgd = optimizer()
    theirs = torch.optim.lr_scheduler.ExponentialLR(sgd, gamma=0.7)
    for epoch in range(EPOCHS):
        for batch in range(3):  # torch's falls at the ends of epochs; with staircase so does ours
            assert 0.3 * Exponential(decay=0.7, staircase=True).rate(epoch + batch / 3, EPOCHS) == pytest.approx(theirs.get_last_lr()[0])
        assert 0.3 * Exponential(decay=0.7).rate(epoch, EPOCHS) == pytest.approx(theirs.get_last_lr()[0])
        sgd.step()
        theirs.step()


def test_cosine_at_the_starts_of_epochs_is_torchs() -> None:
    sgd = optimizer()
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, T_max=EPOCHS, eta_min=0.3 * 0.05)
    for epoch in range(EPOCHS + 1):
        assert 0.3 * Cosine(floor=0.05).rate(epoch, EPOCHS) == pytest.approx(theirs.get_last_lr()[0])
        sgd.step()
        theirs.step()


@pytest.mark.parametrize("patience", [0, 1, 3])
@pytest.mark.parametrize(
    "losses",
    [
        [1.0 - 0.01 * i for i in range(20)],
        [1.0] * 20,
        [1.0 + 0.1 * math.sin(i) for i in range(40)],
        [1.0, 0.5, 0.499999, 0.499998, 0.499997, 0.4, 0.41, 0.42, 0.43, 0.44, 0.45],
        [math.nan, 1.0, math.nan, math.nan, math.nan, math.inf, 0.5],
    ],
)
def test_plateau_falls_when_torchs_does(patience: int, losses: list[float]) -> None:
    sgd = optimizer(1.0)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(sgd, factor=0.5, patience=patience, threshold=1e-3, eps=0)
    ours = Plateau(decay=0.5, patience=patience, min_delta=1e-3)
    for seen in range(1, len(losses) + 1):
        theirs.step(losses[seen - 1])
        assert 0.5 ** ours.falls(losses[:seen]) == pytest.approx(sgd.param_groups[0]["lr"], rel=1e-12)


def test_plateau_has_fallen_in_the_cases_above() -> None:
    assert Plateau(patience=1).falls([1.0] * 20) == 9
    assert Plateau(patience=1).falls([1.0 - 0.01 * i for i in range(20)]) == 0
