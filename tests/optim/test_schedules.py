"""Schedules against their closed forms, and against torch's schedulers, step by step, where those do the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn
from torch.optim import lr_scheduler as theirs

from dlopt.optim.schedules import (
    Chain,
    Constant,
    Cosine,
    CosineRestarts,
    Course,
    Cyclic,
    Exponential,
    InverseSqrt,
    InverseTime,
    Linear,
    MultiStep,
    OneCycle,
    Plateau,
    Polynomial,
    ScaleLr,
    Schedule,
    Scheduled,
    Span,
    StepDecay,
    WarmupStableDecay,
    refuse_too_long,
)
from dlopt.part import DloptError

EPOCHS, EPOCH = 8, 100
COURSE = Course(EPOCHS * EPOCH, EPOCH, 32)
POINTS = [EPOCHS * i / 100 for i in range(100)]
"""In epochs, which are so many hundreds of steps."""


def half(progress: float) -> float:
    return (1 + math.cos(math.pi * progress)) / 2


def doubled(epoch: float) -> float:
    """Cycles of 1, 2, 4 ... epochs, each half as high as the one before."""
    cycles = 2.0 ** int(math.log2(epoch + 1))
    return half((epoch + 1 - cycles) / cycles) / cycles


def skewed(epoch: float) -> float:
    """The height of a cycle that rises for one epoch and falls for half of one."""
    place = epoch - 1.5 * (epoch // 1.5)
    return place if place <= 1 else (1.5 - place) / 0.5


FORMS: list[tuple[Scheduled, Callable[[float], float]]] = [
    (Constant(), lambda epoch: 1.0),
    (Constant(level=0.3), lambda epoch: 0.3),
    (StepDecay(step_size=Span(epochs=2.5), decay=0.5), lambda epoch: 0.5 ** (epoch // 2.5)),
    (StepDecay(), lambda epoch: 0.1 ** int(epoch / 2.4)),
    (MultiStep(milestones=(Span(steps=123), Span(rows=12800), Span(share=0.9))), lambda e: 0.1 ** ((e >= 1.23) + (e >= 4) + (e >= 7.2))),
    (Exponential(decay=0.8), lambda epoch: 0.8**epoch),
    (Exponential(decay=0.8, staircase=True), lambda epoch: 0.8 ** int(epoch)),
    (Exponential(decay=0.5, every=Span(share=0.5)), lambda epoch: 0.5 ** (epoch / 4)),
    (InverseTime(decay=0.7), lambda epoch: 1 / (1 + 0.7 * epoch)),
    (InverseTime(decay=2, every=Span(epochs=2), staircase=True), lambda epoch: 1 / (1 + 2 * (epoch // 2))),
    (InverseSqrt(), lambda epoch: 1 / math.sqrt(1 + epoch)),
    (InverseSqrt(timescale=Span(rows=6400)), lambda epoch: math.sqrt(2 / (2 + epoch))),
    (Linear(), lambda epoch: 1 - epoch / 8),
    (Linear(start_factor=0.1, end_factor=0.5, length=Span(epochs=3)), lambda epoch: 0.1 + 0.4 * min(epoch / 3, 1)),
    (Polynomial(power=2, end_factor=0.1), lambda epoch: 0.1 + 0.9 * (1 - epoch / 8) ** 2),
    (Cosine(), lambda epoch: half(epoch / 8)),
    (Cosine(floor=0.1), lambda epoch: 0.1 + 0.9 * half(epoch / 8)),
    (CosineRestarts(floor=0.2), lambda epoch: 0.2 + 0.8 * half(epoch % 2 / 2)),
    (CosineRestarts(period=Span(epochs=1), multiplier=2, decay=0.5), doubled),
    (Cyclic(), lambda epoch: 0.1 + 0.9 * (1 - abs(epoch % 2 - 1))),
    (Cyclic(step_size_up=Span(epochs=1), step_size_down=Span(epochs=0.5)), lambda epoch: 0.1 + 0.9 * skewed(epoch)),
    (Cyclic(base=0.2, mode="triangular2"), lambda epoch: 0.2 + 0.8 * (1 - abs(epoch % 2 - 1)) / 2 ** (epoch // 2)),
    (Cyclic(mode="exp_range", gamma=0.99), lambda epoch: 0.1 + 0.9 * (1 - abs(epoch % 2 - 1)) * 0.99 ** (100 * epoch)),
    (WarmupStableDecay(warmup=Span(epochs=0)), lambda epoch: min(1.0, (8 - epoch) / 1.6)),
    (WarmupStableDecay(warmup=Span(epochs=1), floor=0.5), lambda epoch: epoch if epoch < 1 else 0.5 + 0.5 * min(1.0, (8 - epoch) / 1.4)),
    (WarmupStableDecay(warmup=Span(epochs=0), form="cosine"), lambda epoch: half(max(0, (epoch - 6.4) / 1.6))),
    (WarmupStableDecay(warmup=Span(epochs=0), form="one_minus_sqrt"), lambda epoch: 1 - math.sqrt(max(0, (epoch - 6.4) / 1.6))),
    (Plateau(), lambda epoch: 1.0),
    (
        OneCycle(),
        lambda epoch: (
            1 - 0.96 * half(100 * epoch / 239) if epoch <= 2.39 else 4e-6 + (1 - 4e-6) * half(min(1.0, (epoch - 2.39) / (7.99 - 2.39)))
        ),
    ),
    (
        Chain(parts=(Constant(length=Span(epochs=2)), Linear(length=Span(share=0.25)), Cosine(warmup=Span(epochs=1)))),
        lambda e: 1.0 if e < 2 else 1 - (e - 2) / 2 if e < 4 else e - 4 if e < 5 else half((e - 5) / 3),
    ),
]


@pytest.mark.parametrize(("schedule", "form"), [pytest.param(*case, id=f"{case[0].kind}-{at}") for at, case in enumerate(FORMS)])
def test_a_schedule_is_its_closed_form(schedule: Scheduled, form: Callable[[float], float]) -> None:
    found = [schedule.factor(EPOCH * epoch, COURSE) for epoch in POINTS]
    assert found == pytest.approx([form(round(epoch, 9)) for epoch in POINTS], abs=1e-12)


def test_every_kind_of_schedule_has_a_closed_form_here() -> None:
    mapping = TypeAdapter(Schedule).json_schema()["discriminator"]["mapping"]
    assert {schedule.kind for schedule, _ in FORMS} == set(mapping)


COLD = [one for one, _ in FORMS if not one.warmup.steps_of(COURSE) and one != InverseSqrt()]  # whose scale is its warm-up


@pytest.mark.parametrize("schedule", COLD, ids=lambda one: one.kind)
@pytest.mark.parametrize("start", [0.0, 0.25])
def test_warm_up_rises_in_a_line_to_where_the_schedule_begins_and_that_runs_over_the_rest(schedule: Scheduled, start: float) -> None:
    warm = schedule.model_copy(update={"warmup": Span(epochs=2.5), "warmup_from": start})
    cold = schedule.model_copy(update={"length": None})
    rest = Course(schedule.course(COURSE).steps - 250, EPOCH, 32, begin=250)
    for epoch in POINTS:
        rise = min(start + (1 - start) * epoch / 2.5, 1.0)
        wanted = rise * cold.factor(max(EPOCH * epoch - 250, 0), rest)
        assert warm.factor(EPOCH * epoch, COURSE) == pytest.approx(wanted, abs=1e-12)


def test_an_inverse_root_goes_on_from_its_warm_up_as_that_of_the_transformer() -> None:
    """Vaswani et al. 2017, equation 3, over its peak."""
    schedule = InverseSqrt(warmup=Span(steps=100))
    for step in range(0, 800, 8):
        formula = min(max(step, 1) ** -0.5, step * 100**-1.5) * 100**0.5
        assert schedule.factor(step, COURSE) == pytest.approx(formula, abs=1e-12)


def test_the_end_of_a_cosine_is_its_floor_and_a_warm_up_of_all_epochs_divides_by_nothing() -> None:
    assert Cosine(floor=0.25).factor(800, COURSE) == pytest.approx(0.25)
    whole = Cosine(warmup=Span(epochs=EPOCHS))
    assert Constant(warmup=Span(epochs=EPOCHS)).factor(750, COURSE) == pytest.approx(750 / 800)
    assert 0 <= whole.factor(800, COURSE) <= 1


@pytest.mark.parametrize("schedule", [schedule for schedule, _ in FORMS], ids=lambda one: one.kind)
def test_a_run_of_one_step_and_the_step_after_the_last_have_a_rate(schedule: Scheduled) -> None:
    for course, step in ((Course(1, 1, 5.0), 0), (Course(1, 1, 5.0), 1), (COURSE, 800), (COURSE, 900)):
        assert 0 <= schedule.factor(step, course) <= 1


STEPS = 60
RUN = Course(STEPS, 6, 10)
PEAK = 0.3


def sgd(lr: float = PEAK) -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)


def span(steps: float) -> Span:
    return Span(steps=steps)


def sequential(optimizer: Any) -> Any:
    parts = [
        theirs.LinearLR(optimizer, start_factor=0.1, end_factor=1.0, total_iters=7),
        theirs.ConstantLR(optimizer, factor=0.5, total_iters=5),
        theirs.StepLR(optimizer, step_size=4, gamma=0.7),
        theirs.CosineAnnealingLR(optimizer, T_max=24, eta_min=0.1 * PEAK),
    ]
    return theirs.SequentialLR(optimizer, parts, milestones=[7, 22, 36])


CHAINED = Chain(
    parts=(
        Linear(start_factor=0.1, end_factor=1.0, length=span(7)),
        Chain(parts=(Constant(level=0.5, length=span(5)), Constant()), length=span(15)),
        StepDecay(step_size=span(4), decay=0.7, length=span(14)),
        Cosine(floor=0.1),
    )
)
TORCHS: list[tuple[Scheduled, Callable[[Any], Any]]] = [
    (StepDecay(step_size=span(7), decay=0.6), lambda o: theirs.StepLR(o, 7, gamma=0.6)),
    (MultiStep(milestones=(span(5), Span(epochs=4), span(41)), decay=0.5), lambda o: theirs.MultiStepLR(o, [5, 24, 41], gamma=0.5)),
    (Exponential(decay=0.9, every=span(1)), lambda o: theirs.ExponentialLR(o, gamma=0.9)),
    (Constant(), lambda o: theirs.ConstantLR(o, factor=1.0)),
    (Chain(parts=(Constant(level=1 / 3, length=span(5)), Constant())), lambda o: theirs.ConstantLR(o, factor=1 / 3, total_iters=5)),
    (Linear(start_factor=1 / 3, end_factor=0.9, length=span(23)), lambda o: theirs.LinearLR(o, 1 / 3, 0.9, total_iters=23)),
    (Linear(), lambda o: theirs.LinearLR(o, 1.0, 0.0, total_iters=STEPS)),
    (Polynomial(power=1.7, length=span(40)), lambda o: theirs.PolynomialLR(o, total_iters=40, power=1.7)),
    (Polynomial(power=0.5), lambda o: theirs.PolynomialLR(o, total_iters=STEPS, power=0.5)),
    (Cosine(floor=0.05), lambda o: theirs.CosineAnnealingLR(o, T_max=STEPS, eta_min=PEAK * 0.05)),
    (CosineRestarts(period=span(9), floor=0.1), lambda o: theirs.CosineAnnealingWarmRestarts(o, T_0=9, eta_min=PEAK * 0.1)),
    (CosineRestarts(period=span(8), multiplier=2), lambda o: theirs.CosineAnnealingWarmRestarts(o, T_0=8, T_mult=2)),
    (CosineRestarts(period=span(2), multiplier=3), lambda o: theirs.CosineAnnealingWarmRestarts(o, T_0=2, T_mult=3)),
    (OneCycle(), lambda o: theirs.OneCycleLR(o, PEAK, total_steps=STEPS, cycle_momentum=False)),
    (
        OneCycle(pct_start=0.25, div_factor=10, final_div_factor=50, anneal="linear"),
        lambda o: theirs.OneCycleLR(
            o,
            PEAK,
            total_steps=STEPS,
            cycle_momentum=False,
            pct_start=0.25,
            div_factor=10,
            final_div_factor=50,
            anneal_strategy="linear",
        ),
    ),
    (
        OneCycle(pct_start=0.37, three_phase=True),
        lambda o: theirs.OneCycleLR(o, PEAK, total_steps=STEPS, cycle_momentum=False, pct_start=0.37, three_phase=True),
    ),
    (
        Cyclic(base=0.1, step_size_up=span(6), step_size_down=span(9)),
        lambda o: theirs.CyclicLR(o, 0.1 * PEAK, PEAK, step_size_up=6, step_size_down=9, cycle_momentum=False),
    ),
    (
        Cyclic(base=0.1, step_size_up=span(5), mode="triangular2"),
        lambda o: theirs.CyclicLR(o, 0.1 * PEAK, PEAK, step_size_up=5, mode="triangular2", cycle_momentum=False),
    ),
    (
        Cyclic(base=0.1, step_size_up=span(5), mode="exp_range", gamma=0.97),
        lambda o: theirs.CyclicLR(o, 0.1 * PEAK, PEAK, step_size_up=5, mode="exp_range", gamma=0.97, cycle_momentum=False),
    ),
    (CHAINED, sequential),
    (
        Cosine(warmup=span(12), warmup_from=0.2),
        lambda o: theirs.SequentialLR(
            o, [theirs.LinearLR(o, 0.2, total_iters=12), theirs.CosineAnnealingLR(o, T_max=STEPS - 12)], milestones=[12]
        ),
    ),
]


@pytest.mark.parametrize(("schedule", "make"), [pytest.param(*case, id=f"{case[0].kind}-{at}") for at, case in enumerate(TORCHS)])
def test_a_schedule_is_torchs_at_every_step(schedule: Scheduled, make: Callable[[Any], Any]) -> None:
    optimizer = sgd()
    scheduler = make(optimizer)
    for step in range(STEPS):
        assert PEAK * schedule.factor(step, RUN) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9, abs=1e-15), step
        optimizer.step()
        if step < STEPS - 1:
            scheduler.step()


def test_exponential_in_stairs_is_torchs_by_epochs() -> None:
    optimizer = sgd()
    scheduler = theirs.ExponentialLR(optimizer, gamma=0.7)
    for epoch in range(EPOCHS):
        for batch in range(3):  # torch's falls at the ends of epochs; with staircase so does ours
            rate = Exponential(decay=0.7, staircase=True).factor(3 * epoch + batch, Course(3 * EPOCHS, 3, 10))
            assert PEAK * rate == pytest.approx(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()


CURVES: list[list[float]] = [
    [1.0 - 0.01 * i for i in range(20)],
    [1.0] * 20,
    [1.0 + 0.1 * math.sin(i) for i in range(40)],
    [1.0, 0.5, 0.499999, 0.499998, 0.499997, 0.4, 0.41, 0.42, 0.43, 0.44, 0.45],
    [math.nan, 1.0, math.nan, math.nan, math.nan, math.inf, 0.5],
]


@pytest.mark.parametrize("patience", [0, 1, 3])
@pytest.mark.parametrize("cooldown", [0, 2])
@pytest.mark.parametrize("losses", CURVES)
def test_plateau_falls_when_torchs_does(patience: int, cooldown: int, losses: list[float]) -> None:
    optimizer = sgd(1.0)
    settings: dict[str, Any] = {"factor": 0.5, "patience": patience, "threshold": 1e-3, "eps": 0, "cooldown": cooldown, "min_lr": 0.1}
    scheduler = theirs.ReduceLROnPlateau(optimizer, **settings)
    ours = Plateau(decay=0.5, patience=patience, min_delta=1e-3, cooldown=cooldown, floor=0.1)
    for seen in range(1, len(losses) + 1):
        scheduler.step(losses[seen - 1])
        found = ours.factor(10 * seen, Course(1000, 10, 1), losses[:seen])
        assert found == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)


def test_plateau_of_a_value_that_should_grow_is_torchs_of_mode_max() -> None:
    scores = [0.5, 0.6, 0.6004, 0.6004, 0.601, 0.6, 0.6, 0.6, 0.7, 0.7, 0.7, 0.7]
    optimizer = sgd(1.0)
    scheduler = theirs.ReduceLROnPlateau(optimizer, mode="max", factor=0.5, patience=1, threshold=1e-3)
    ours = Plateau(decay=0.5, patience=1, min_delta=1e-3)
    for seen, score in enumerate(scores, start=1):
        scheduler.step(score)
        assert 0.5 ** ours.falls([-value for value in scores[:seen]]) == pytest.approx(optimizer.param_groups[0]["lr"])
    assert optimizer.param_groups[0]["lr"] < 0.5


def test_plateau_has_fallen_in_the_cases_above() -> None:
    assert Plateau(patience=1).falls([1.0] * 20) == 9
    assert Plateau(patience=1).falls([1.0 - 0.01 * i for i in range(20)]) == 0
    assert Plateau(patience=1, cooldown=3).falls([1.0] * 20) < 9


def test_plateau_in_a_chain_counts_only_the_epochs_of_its_part() -> None:
    chain = Chain(parts=(Constant(length=Span(epochs=4)), Plateau(decay=0.5, patience=1, length=Span(epochs=3)), Constant(level=0.2)))
    flat = [1.0] * 8
    found = [chain.factor(EPOCH * epoch, COURSE, flat[:epoch]) for epoch in range(EPOCHS)]
    assert found == [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.2]  # alone: falls after 3 epochs, at 7, when the next part begins
    assert Plateau(decay=0.5, patience=1).factor(600, COURSE, flat[:6]) == 0.25
    longer = Chain(
        parts=(Chain(parts=(Constant(length=Span(epochs=1)), Constant()), length=Span(epochs=1.5)), Plateau(decay=0.5, patience=1))
    )
    found = [longer.factor(EPOCH * epoch, COURSE, flat[:epoch]) for epoch in range(EPOCHS)]
    assert found == [1.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.25]  # its first whole epoch is the third


def test_plateau_in_a_chain_has_fallen_in_a_warm_up_of_its_own_too() -> None:
    assert Plateau(decay=0.5, patience=0, warmup=Span(epochs=4)).factor(200, COURSE, [1.0, 1.0]) == 0.5 * 0.5


def test_durations_in_all_units_are_the_same_duration() -> None:
    spans = [Span(steps=200), Span(epochs=2), Span(rows=6400), Span(share=0.25)]
    assert [one.steps_of(COURSE) for one in spans] == [200.0] * 4
    part = COURSE.part(100, 400)
    assert [one.steps_of(part) for one in spans] == [200.0, 200.0, 200.0, 100.0]
    assert Course.of(3, 1000, 128) == Course(24, 8, 125.0)


def test_shares_in_a_chain_are_of_the_chain_for_lengths_and_of_the_part_within() -> None:
    chain = Chain(parts=(Constant(length=Span(share=0.5)), Linear(length=Span(share=0.25), warmup=Span(share=0.5)), Constant(level=0.1)))
    found = [chain.factor(step, COURSE) for step in (399, 400, 450, 500, 550, 599, 600, 799)]
    assert found == pytest.approx([1.0, 0.0, 0.5, 1.0, 0.5, 0.01, 0.1, 0.1])


@pytest.mark.parametrize(
    ("given", "span"),
    [
        (0.5, Span(epochs=0.5)),
        ("3e-1", Span(epochs=0.3)),
        ({"share": 0.05}, Span(share=0.05)),
        ({"steps": 100}, Span(steps=100)),
        ({"rows": "1e4"}, Span(rows=10000)),
    ],
)
def test_a_duration_as_a_job_has_it(given: Any, span: Span) -> None:
    found = TypeAdapter(Schedule).validate_python({"kind": "cosine", "warmup": given})
    assert found.warmup == span
    assert TypeAdapter(Schedule).validate_json(found.model_dump_json()) == found


@pytest.mark.parametrize("given", [True, None, [1], -1, "abc", {}, {"steps": 1, "epochs": 1}, {"share": 1.5}, {"minutes": 3}])
def test_a_duration_that_is_none_is_refused(given: Any) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(Schedule).validate_python({"kind": "cosine", "warmup": given})


def test_the_schema_lets_editors_know_that_a_bare_number_will_do() -> None:
    schema = TypeAdapter(Span).json_schema()
    assert schema["type"] == ["number", "object"] and schema["properties"].keys() == {"steps", "epochs", "rows", "share"}


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ({"kind": "step", "step_size": 0}, "must be more than 0"),
        ({"kind": "chain", "parts": [{"kind": "linear"}, {"kind": "cosine"}]}, "parts.0 has no length"),
        ({"kind": "chain", "parts": []}, "at least 1"),
        ({"kind": "one_cycle", "three_phase": True, "pct_start": 0.5}, "three_phase needs pct_start below 0.5"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(part: Any, says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        TypeAdapter(Schedule).validate_python(part)


@pytest.mark.parametrize(
    ("schedule", "says"),
    [
        (Cosine(warmup=Span(epochs=9)), "warmup: 9 epochs (900 steps) is more than the 800 steps that there are"),
        (Linear(length=Span(rows=32000)), "length: 32,000 rows (1,000 steps) is more than the 800 steps that there are"),
        (MultiStep(milestones=(Span(epochs=2), Span(steps=801))), "milestones.1: 801 steps is more than the 800 steps that there are"),
        (MultiStep(milestones=(Span(epochs=7),), warmup=Span(epochs=2)), "milestones.0: 7 epochs (700 steps) is more than the 600 steps"),
        (StepDecay(step_size=Span(epochs=30)), "step_size: 30 epochs (3,000 steps) is more than"),
        (CosineRestarts(period=Span(epochs=9)), "period: 9 epochs (900 steps) is more than"),
        (Cyclic(step_size_down=Span(epochs=9)), "step_size_down: 9 epochs"),
        (WarmupStableDecay(cooldown=Span(epochs=8)), "cooldown: 8 epochs (800 steps) is more than the 760 steps"),
        (
            Chain(parts=(Constant(length=Span(epochs=8)), Cosine())),
            "parts: the last one has no step left, for those before it take 800 of 800",
        ),
        (
            Chain(parts=(Constant(length=Span(epochs=6)), Cosine(warmup=Span(epochs=3)))),
            "parts.1.warmup: 3 epochs (300 steps) is more than the 200",
        ),
    ],
)
def test_what_cannot_fit_in_the_run_is_one_line_that_names_it(schedule: Scheduled, says: str) -> None:
    with pytest.raises(DloptError) as error:
        refuse_too_long(schedule, COURSE)
    assert str(error.value).startswith(f"train.schedule.{says}")
    assert str(error.value).endswith(": make it shorter or raise train.epochs")


def test_what_just_fits_is_not_refused() -> None:
    for schedule, _ in FORMS:
        refuse_too_long(schedule, COURSE)
    for one in (Cosine(warmup=Span(share=1)), MultiStep(milestones=(Span(epochs=8),)), Exponential(every=Span(epochs=100))):
        refuse_too_long(one, COURSE)


def test_only_plateau_looks_at_the_validation_split_be_it_deep_in_a_chain() -> None:
    assert [schedule.kind for schedule, _ in FORMS if schedule.watches_validation()] == ["plateau"]
    inner = Chain(parts=(Plateau(length=Span(epochs=1)), Cosine()), length=Span(share=0.5))
    assert Chain(parts=(inner, Constant())).watches_validation()


def test_the_peak_rate_scales_with_the_batch() -> None:
    assert [ScaleLr(base=256).factor(rows) for rows in (64, 256, 4096)] == [0.25, 1.0, 16.0]
    assert [ScaleLr(rule="sqrt", base=256).factor(rows) for rows in (64, 256, 4096)] == [0.5, 1.0, 4.0]
