"""Every loss against its formula in plain floats, row by row, and its gradient against finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.nn import functional as F

from dlopt.data.feed.batches import Batch, Mixed
from dlopt.models import Units
from dlopt.part import Target
from dlopt.train.loop.losses import (
    DEFAULTS,
    LOSSES,
    Absolute,
    Binary,
    CrossEntropy,
    Focal,
    Huber,
    LossPart,
    Quantile,
    Squared,
    loss_of,
    losses_for,
    unsmoothed,
)
from dlopt.train.loop.objectives import class_weights, supervised
from tests.sets import LABELS, NUMBER, PAIR, THREE, TWO, spread
from tests.train.loop.test_objectives import Given, drawn

STD = (30.0, 4.0)
UNITS = Units(spread(np.array([[1000.0, -3.0], [1060.0, 5.0]])))  # of deviations STD
ROWS = 24
COUNTS = {"no": 150, "yes": 50, "cat": 100, "dog": 60, "owl": 40, "art": 30, "law": 100, "sea": 7, "war": 150}
ALL = [
    (None, THREE),
    (CrossEntropy(label_smoothing=0.2), THREE),
    (Focal(), THREE),
    (Focal(gamma=0.5, label_smoothing=0.2), TWO),
    (Focal(gamma=3, label_smoothing=0.1), THREE),
    (None, LABELS),
    (Binary(label_smoothing=0.2), LABELS),
    (Focal(gamma=1.5), LABELS),
    (Focal(gamma=2, label_smoothing=0.3), LABELS),
    (None, PAIR),
    (Absolute(), PAIR),
    (Huber(delta=0.7), PAIR),
    (Quantile(quantile=0.9), PAIR),
]


def output_of(target: Target) -> nn.Module:
    return UNITS if target.kind == "number" else nn.Identity()


def weights_of(target: Target) -> Tensor | None:
    return None if target.kind == "number" else class_weights("balanced", target, COUNTS, 200)


def number_by_hand(part: LossPart, error: float) -> float:
    match part:
        case Squared():
            return error * error
        case Absolute():
            return abs(error)
        case Huber(delta=delta):
            return error * error / 2 if abs(error) <= delta else delta * (abs(error) - delta / 2)
        case Quantile(quantile=quantile):
            return quantile * -error if error < 0 else (1 - quantile) * error
    raise AssertionError


def term(part: LossPart, probability: float) -> float:
    gamma = part.gamma if isinstance(part, Focal) else 0.0
    return -((1 - probability) ** gamma) * math.log(probability)


def row_by_hand(part: LossPart, target: Target, outputs: list[float], wanted: object, weights: list | None) -> float:
    """A row's loss in plain floats."""
    if target.kind == "number":
        return sum(number_by_hand(part, (one - true) / std) for one, true, std in zip(outputs, wanted, STD, strict=True)) / 2  # type: ignore[call-overload]
    smoothing, size = part.label_smoothing, len(outputs)  # type: ignore[union-attr]
    if target.kind == "category":
        total = sum(math.exp(value) for value in outputs)
        shares = [smoothing / size + (1 - smoothing) * (index == wanted) for index in range(size)]
        return sum(
            share * (weights[index] if weights else 1) * term(part, math.exp(outputs[index]) / total) for index, share in enumerate(shares)
        )
    found = 0.0
    for index, (value, has) in enumerate(zip(outputs, wanted, strict=True)):  # type: ignore[call-overload]
        absent, present = (weights[0][index], weights[1][index]) if weights else (1.0, 1.0)
        share, probability = has * (1 - smoothing) + smoothing / 2, 1 / (1 + math.exp(-value))
        found += present * share * term(part, probability) + absent * (1 - share) * term(part, 1 - probability)
    return found / size


def by_hand(part: LossPart | None, target: Target, outputs: Tensor, wanted: Tensor, weights: Tensor | None = None) -> Tensor:
    named, known = part or DEFAULTS[target.kind], None if weights is None else weights.tolist()
    rows = zip(outputs.tolist(), wanted.tolist(), strict=True)
    return torch.tensor([row_by_hand(named, target, values, true, known) for values, true in rows], dtype=torch.float64)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("part", "target"), ALL, ids=lambda value: getattr(value, "kind", str(value)))
def test_a_loss_is_its_formula_in_rows_and_in_sum(part: LossPart | None, target: Target, weighted: bool) -> None:
    outputs, wanted = drawn(target, ROWS)
    weights = weights_of(target) if weighted else None
    loss, expected = loss_of(part, target, output_of(target), weights), by_hand(part, target, outputs, wanted, weights)
    torch.testing.assert_close(loss(outputs, wanted, "none"), expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(loss(outputs, wanted, "sum"), expected.sum(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("part", "target"), ALL, ids=lambda value: getattr(value, "kind", str(value)))
def test_the_gradient_of_a_loss_is_that_of_finite_differences(part: LossPart | None, target: Target) -> None:
    outputs, wanted = drawn(target, ROWS)
    loss, leaf = loss_of(part, target, output_of(target), weights_of(target)), outputs.clone().requires_grad_()
    loss(leaf, wanted, "sum").backward()
    assert leaf.grad is not None
    step = 1e-5 * (1 if target.kind != "number" else 10)
    for column in range(target.size):
        shift = torch.zeros(target.size, dtype=torch.float64)
        shift[column] = step
        slope = (loss(outputs + shift, wanted, "none") - loss(outputs - shift, wanted, "none")) / (2 * step)
        torch.testing.assert_close(leaf.grad[:, column], slope, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("smoothing", [0.0, 0.15])
@pytest.mark.parametrize("target", [TWO, THREE, LABELS])
def test_focal_loss_of_gamma_0_is_cross_entropy(target: Target, smoothing: float) -> None:
    outputs, wanted = drawn(target, ROWS)
    other = CrossEntropy(label_smoothing=smoothing) if target.kind == "category" else Binary(label_smoothing=smoothing)
    for weights in (None, weights_of(target)):
        found, expected = (
            loss_of(part, target, nn.Identity(), weights)(outputs, wanted, "none")
            for part in (Focal(gamma=0, label_smoothing=smoothing), other)
        )
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("target", [TWO, LABELS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_focal_loss_of_a_row_that_is_beyond_doubt_is_0_and_so_is_its_gradient(gamma: float, target: Target, dtype: torch.dtype) -> None:
    outputs = torch.tensor([[-200.0, 200.0, -200.0, 200.0][: target.size]], dtype=dtype, requires_grad=True)
    wanted = torch.tensor([1]) if target.kind == "category" else torch.tensor([[0, 1, 0, 1]], dtype=torch.uint8)
    loss = loss_of(Focal(gamma=gamma), target, nn.Identity())(outputs, wanted, "sum")
    loss.backward()
    assert abs(loss.item()) < 1e-12
    assert outputs.grad is not None and outputs.grad.abs().max() < 1e-6
    wrong = loss_of(Focal(gamma=gamma), target, nn.Identity())(-outputs.detach(), wanted, "none")
    assert wrong.item() == pytest.approx(400 if target.kind == "category" else 200)


def test_label_smoothing_is_that_of_torch_with_weights_and_without() -> None:
    outputs, wanted = drawn(THREE, ROWS)
    uniform = torch.full((ROWS, 3), 0.1 / 3, dtype=torch.float64).scatter(1, wanted[:, None], 0.9 + 0.1 / 3)
    found = loss_of(CrossEntropy(label_smoothing=0.1), THREE, nn.Identity())(outputs, wanted, "none")
    torch.testing.assert_close(found, F.cross_entropy(outputs, uniform, reduction="none"), rtol=1e-12, atol=0)


def test_huber_is_squared_and_absolute_error_on_its_two_sides_and_smooth_between() -> None:
    def at(error: float) -> float:
        wanted = torch.tensor([[1000.0, 0.0]])
        return loss_of(Huber(delta=2), PAIR, UNITS)(wanted.double() + torch.tensor([[30 * error, 0.0]]), wanted, "sum").item() * 2

    assert [at(error) for error in (0, 1, -1, 2, -2)] == pytest.approx([0, 0.5, 0.5, 2, 2])
    assert [at(error) for error in (3, -5)] == pytest.approx([2 * (3 - 1), 2 * (5 - 1)])
    assert at(2 + 1e-4) - at(2) == pytest.approx(at(2) - at(2 - 1e-4), rel=1e-3)


def fitted(part: LossPart, values: Tensor) -> float:
    """The constant that costs the least."""
    units = Units(spread(values.numpy()))
    loss = loss_of(part, NUMBER, units)
    low, high = values.min().item(), values.max().item()
    for _ in range(200):  # of a convex function
        left, right = low + (high - low) / 3, high - (high - low) / 3
        costs = [loss(torch.full_like(values, constant), values, "sum").item() for constant in (left, right)]
        low, high = (low, right) if costs[0] < costs[1] else (left, high)
    return (low + high) / 2


def test_the_best_constant_is_the_quantile_the_median_and_the_mean() -> None:
    values = torch.randn(1001, 1, dtype=torch.float64, generator=torch.manual_seed(5)).exp()
    for quantile in (0.1, 0.5, 0.9):
        assert fitted(Quantile(quantile=quantile), values) == pytest.approx(np.quantile(values, quantile), rel=1e-6)
    assert fitted(Absolute(), values) == pytest.approx(np.median(values), rel=1e-6)
    assert fitted(Squared(), values) == pytest.approx(values.mean().item(), rel=1e-6)
    assert values.median().item() < fitted(Huber(delta=0.5), values) < values.mean().item()


SMOOTHED: list[tuple[LossPart, Target]] = [
    (CrossEntropy(label_smoothing=0.1), THREE),
    (Focal(label_smoothing=0.1), THREE),
    (Binary(label_smoothing=0.1), LABELS),
    (Focal(label_smoothing=0.1), LABELS),
    (Huber(), PAIR),
    (Quantile(quantile=0.2), PAIR),
]


@pytest.mark.parametrize(("part", "target"), SMOOTHED, ids=lambda value: getattr(value, "kind", str(value)))
@pytest.mark.parametrize("cuts", [[0, 24], [0, 3, 24], [0, 0, 17, 24]])
def test_weights_mixing_and_smoothing_together_add_up_over_workers(part: LossPart, target: Target, cuts: list[int]) -> None:
    (outputs, wanted), (_, second) = drawn(target, ROWS), drawn(target, ROWS, seed=1)
    share, weights = torch.rand(ROWS, generator=torch.manual_seed(2)), weights_of(target)
    objective = supervised(loss_of(part, target, output_of(target), weights), 0, 0, 1)
    found, gradient = 0.0, torch.zeros(0)
    for low, high in pairwise(cuts):
        rows = slice(low, high)
        leaf = outputs[rows].clone().requires_grad_()
        losses = objective(Given(), Batch({"x": leaf}, wanted[rows], ROWS, Mixed(second[rows], share[rows])))
        losses.loss.backward()
        assert leaf.grad is not None
        found, gradient = found + losses.loss.item(), torch.cat([gradient, leaf.grad])
    expected = share * by_hand(part, target, outputs, wanted, weights) + (1 - share) * by_hand(part, target, outputs, second, weights)
    assert found == pytest.approx(expected.mean().item(), rel=1e-12)
    whole = outputs.clone().requires_grad_()
    objective(Given(), Batch({"x": whole}, wanted, ROWS, Mixed(second, share))).loss.backward()
    torch.testing.assert_close(gradient, whole.grad, rtol=1e-12, atol=1e-16)


def test_splits_are_measured_without_smoothing_by_the_same_loss() -> None:
    assert unsmoothed(Focal(gamma=1.5, label_smoothing=0.2)) == Focal(gamma=1.5)
    assert unsmoothed(CrossEntropy(label_smoothing=0.2)) == CrossEntropy()
    assert unsmoothed(Huber(delta=3)) == Huber(delta=3)
    assert unsmoothed(None) is None


def test_each_kind_of_target_has_its_losses_and_the_first_is_its_own() -> None:
    assert losses_for("category") == ("cross_entropy", "focal")
    assert losses_for("multi_label") == ("binary", "focal")
    assert losses_for("number") == ("squared", "absolute", "huber", "quantile")
    assert all(losses_for(kind)[0] == part.kind for kind, part in DEFAULTS.items())
    in_union: Callable[[object], LossPart] = TypeAdapter(LossPart).validate_python
    assert [type(in_union({"kind": loss.model_fields["kind"].default})) for loss in LOSSES] == list(LOSSES)  # type: ignore[attr-defined]
