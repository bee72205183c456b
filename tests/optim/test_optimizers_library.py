"""Optimizers of libraries against their published formulas, in plain numbers where that is sensible, else in plain matrices."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dlopt.optim.groups import Parameters
from dlopt.optim.optimizers import Muon
from dlopt.optim.optimizers_library import (
    AdEmaMix,
    Lamb,
    Lars,
    Lion,
    Prodigy,
    ScheduleFreeAdamW,
    ScheduleFreeSgd,
    Shampoo,
    Soap,
    Sophia,
)
from dlopt.part import DloptError
from tests.driven import Small
from tests.optim.test_optimizers import (
    CURVATURE,
    DECAYS,
    MATRIX,
    SHAPES,
    START,
    STEPS,
    VECTOR,
    Steps,
    assert_follows,
    each,
    slope,
    zeros,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def norm(values: list[float]) -> float:
    return math.sqrt(sum(v * v for v in values))


def averaged(average: list[float], values: list[float], beta: float) -> list[float]:
    return [beta * a + (1 - beta) * v for a, v in zip(average, values, strict=True)]


def lars(weights: list[float], matrix: bool, lr: float, momentum: float, nesterov: bool, trust: float, decay: float) -> Steps:
    """Algorithm 1 of You, Gitman, Ginsburg 2017, with the velocity in units of gradients."""
    velocity = zeros()
    while True:
        update = slope(weights)
        if matrix:
            ratio = trust * norm(weights) / (norm(update) + decay * norm(weights))
            update = [ratio * (g + decay * w) for g, w in zip(update, weights, strict=True)]
        velocity = [momentum * v + u for v, u in zip(velocity, update, strict=True)]
        ahead = [u + momentum * v for u, v in zip(update, velocity, strict=True)] if nesterov else velocity
        weights = [w - lr * a for w, a in zip(weights, ahead, strict=True)]
        yield weights


@SHAPES
@DECAYS
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_lars_follows_its_formula(momentum: float, nesterov: bool, decay: float, shape: tuple[int, ...]) -> None:
    part = Lars(lr=0.05, momentum=momentum, nesterov=nesterov, trust_coefficient=0.3, weight_decay=decay)
    assert_follows(part, lars(list(START), shape == MATRIX, 0.05, momentum, nesterov, 0.3, decay), shape)


def lamb(weights: list[float], matrix: bool, lr: float, betas: tuple[float, float], eps: float, decay: float) -> Steps:
    """Algorithm 2 of You et al. 2020, version 3, with phi(z) = min(z, 10)."""
    first, second = zeros(), zeros()
    while True:
        gradient = slope(weights)
        first, second = averaged(first, gradient, betas[0]), averaged(second, each(lambda g: g * g, gradient), betas[1])
        step = [m / (math.sqrt(v) + eps) + decay * w for m, v, w in zip(first, second, weights, strict=True)]
        ratio = min(norm(weights), 10) / (norm(step) + eps) if matrix else 1
        weights = [w - lr * ratio * s for w, s in zip(weights, step, strict=True)]
        yield weights


@SHAPES
@DECAYS
def test_lamb_follows_its_formula(decay: float, shape: tuple[int, ...]) -> None:
    part = Lamb(lr=0.02, betas=(0.8, 0.99), weight_decay=decay)
    assert_follows(part, lamb(list(START), shape == MATRIX, 0.02, (0.8, 0.99), 1e-6, decay), shape)


def test_lamb_scales_matrices_and_not_vectors_of_one_group_each_by_its_own_norm() -> None:
    group = [nn.Parameter(torch.full(shape, 2.0)) for shape in ((3, 3), (3,), (2, 2))]
    optimizer = Lamb(lr=0.1, weight_decay=0.0).build(group)
    for parameter in group:
        parameter.grad = torch.full_like(parameter, 5.0)
    optimizer.step()
    moved = [float((2 - parameter.detach()).max()) for parameter in group]
    assert moved == pytest.approx([0.2, 0.1 * 0.1 / math.sqrt(0.001), 0.2], rel=1e-4)


def lion(weights: list[float], lr: float, betas: tuple[float, float], decay: float) -> Steps:
    """Program 1 of Chen et al. 2023."""
    average = zeros()
    while True:
        gradient = slope(weights)
        sign = [math.copysign(1, u) for u in averaged(average, gradient, betas[0])]
        weights = [w - lr * (s + decay * w) for w, s in zip(weights, sign, strict=True)]
        average = averaged(average, gradient, betas[1])
        yield weights


@SHAPES
@DECAYS
def test_lion_follows_its_formula(decay: float, shape: tuple[int, ...]) -> None:
    assert_follows(Lion(lr=0.15, betas=(0.5, 0.8), weight_decay=decay), lion(list(START), 0.15, (0.5, 0.8), decay), shape)


def ademamix(weights: list[float], lr: float, betas: tuple[float, float, float], alpha: float, rise: int | None, decay: float) -> Steps:
    """Algorithm 1 of Pagliardini, Ablin, Grangier 2025, with its schedules of alpha and beta 3."""
    fast, slow, second, t = zeros(), zeros(), zeros(), 0
    while True:
        gradient, t = slope(weights), t + 1
        share, beta = alpha, betas[2]
        if rise:
            share, one, three = min(alpha, t * alpha / rise), math.log(betas[0]), math.log(betas[2])
            beta = min(betas[2], math.exp(one * three / ((1 - t / rise) * three + t / rise * one)))
        fast, slow = averaged(fast, gradient, betas[0]), averaged(slow, gradient, beta)
        second = averaged(second, each(lambda g: g * g, gradient), betas[1])
        roots = [math.sqrt(v / (1 - betas[1] ** t)) + 1e-8 for v in second]
        step = [(f / (1 - betas[0] ** t) + share * s) / r for f, s, r in zip(fast, slow, roots, strict=True)]
        weights = [w - lr * (s + decay * w) for w, s in zip(weights, step, strict=True)]
        yield weights


@SHAPES
@DECAYS
@pytest.mark.parametrize("rise", [None, 5, 100])
def test_ademamix_follows_its_formula(rise: int | None, decay: float, shape: tuple[int, ...]) -> None:
    part = AdEmaMix(lr=0.02, betas=(0.8, 0.99, 0.95), alpha=3.0, t_alpha_beta3=rise, weight_decay=decay)
    assert_follows(part, ademamix(list(START), 0.02, (0.8, 0.99, 0.95), 3.0, rise, decay), shape)


def prodigy(
    weights: list[float], betas: tuple[float, float], d: float, coefficient: float, growth: float, corrected: bool, decay: float
) -> Steps:
    """Algorithm 4 of Mishchenko, Defazio 2024, with the rate 1 and beta 3 the root of beta 2."""
    start, d0, most, t, beta3 = weights, d, d, 0, math.sqrt(betas[1])
    first, second, sums, r = zeros(), zeros(), zeros(), 0.0
    while True:
        gradient, t = slope(weights), t + 1
        rate = d * (math.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t) if corrected else 1)
        r = beta3 * r + d / d0 * rate * sum(g * (s - w) for g, s, w in zip(gradient, start, weights, strict=True))
        first = [betas[0] * m + (1 - betas[0]) * d * g for m, g in zip(first, gradient, strict=True)]
        second = [betas[1] * v + (1 - betas[1]) * d * d * g * g for v, g in zip(second, gradient, strict=True)]
        sums = [beta3 * s + d / d0 * rate * g for s, g in zip(sums, gradient, strict=True)]
        found = coefficient * r / sum(map(abs, sums))
        now = max(d, found) if d == d0 else d
        most = max(most, found)
        d = min(most, now * growth)
        weights = [w * (1 - rate * decay) for w in weights]
        weights = [w - rate * m / (math.sqrt(v) + d * 1e-8) for w, m, v in zip(weights, first, second, strict=True)]
        yield weights


@SHAPES
@DECAYS
@pytest.mark.parametrize(("growth", "corrected"), [(None, False), (1.2, True)])
def test_prodigy_follows_its_formula(growth: float | None, corrected: bool, decay: float, shape: tuple[int, ...]) -> None:
    part = Prodigy(betas=(0.8, 0.99), d0=0.01, d_coef=1.5, growth_rate=growth, bias_correction=corrected, weight_decay=decay)
    formula = prodigy(list(START), (0.8, 0.99), 0.01, 1.5, growth or math.inf, corrected, decay)
    assert_follows(part, formula, shape, most=1e-6)  # the library sums in float32


def test_prodigys_rate_rises_by_itself() -> None:
    weights = nn.Parameter(torch.tensor(START))
    optimizer = Prodigy().build([weights])
    for _ in range(200):
        weights.grad = torch.tensor(CURVATURE) * weights.detach()
        optimizer.step()
    assert optimizer.param_groups[0]["d"] > 1e-2
    assert weights.abs().max() < 1.0


def sophia(weights: list[float], lr: float, betas: tuple[float, float], rho: float, period: int, decay: float) -> Steps:
    """Algorithm 3 of Liu et al. 2024, with the curvature known: eta is lr * rho and gamma is rho there."""
    average, curvature, t = zeros(), zeros(), 0
    while True:
        average = averaged(average, slope(weights), betas[0])
        curvature = averaged(curvature, list(CURVATURE), betas[1]) if t % period == 0 else curvature
        clipped = [max(-1, min(1, m / max(rho * h, 1e-12))) for m, h in zip(average, curvature, strict=True)]
        weights = [w - lr * decay * w for w in weights]
        weights = [w - lr * rho * u for w, u in zip(weights, clipped, strict=True)]
        t += 1
        yield weights


@SHAPES
@DECAYS
def test_sophia_follows_its_formula(decay: float, shape: tuple[int, ...]) -> None:
    part = Sophia(lr=0.05, betas=(0.8, 0.9), rho=0.9, update_period=3, weight_decay=decay)
    weights = nn.Parameter(torch.tensor(START, dtype=torch.float64).view(shape))
    optimizer: Any = part.build([weights])
    true, due = torch.tensor(CURVATURE, dtype=torch.float64).view(shape), []
    for _, expected in zip(range(STEPS), sophia(list(START), 0.05, (0.8, 0.9), 0.9, 3, decay), strict=False):
        due.append(optimizer.due)
        if optimizer.due:
            optimizer.take([true])
        weights.grad = true * weights.detach()
        optimizer.step()
        torch.testing.assert_close(weights.detach().flatten(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9)
    assert due == [step % 3 == 0 for step in range(STEPS)]


def test_sophia_takes_no_step_without_the_estimate_that_it_is_due() -> None:
    weights = nn.Parameter(torch.ones(2))
    optimizer = Sophia().build([weights])
    weights.grad = torch.ones(2)
    with pytest.raises(RuntimeError, match="due an estimate of the curvature"):
        optimizer.step()


def schedule_free_sgd(start: list[float], lr: float, beta: float, decay: float) -> Iterator[tuple[list[float], list[float]]]:
    """Equations 3 to 5 of Defazio et al. 2024: where gradients are taken, and the average."""
    z, x, y, t = start, start, start, 0
    while True:
        t += 1
        z = [a - lr * g for a, g in zip(z, slope(y, decay), strict=True)]
        x = [(1 - 1 / t) * a + b / t for a, b in zip(x, z, strict=True)]
        y = [(1 - beta) * a + beta * b for a, b in zip(z, x, strict=True)]
        yield y, x


def schedule_free_adamw(
    start: list[float], lr: float, betas: tuple[float, float], decay: float, r: float
) -> Iterator[tuple[list[float], list[float]]]:
    """Algorithm 1 of Defazio et al. 2024 without a warm-up, later steps counting for more by a power r."""
    z, x, y, second, t, total = start, start, start, zeros(), 0, 0.0
    while True:
        gradient, t = slope(y), t + 1
        second = averaged(second, each(lambda g: g * g, gradient), betas[1])
        roots = [math.sqrt(v / (1 - betas[1] ** t)) + 1e-8 for v in second]
        z = [a - lr * (g / s + decay * b) for a, g, s, b in zip(z, gradient, roots, y, strict=True)]
        total += t**r
        x = [(1 - t**r / total) * a + t**r / total * b for a, b in zip(x, z, strict=True)]
        y = [(1 - betas[0]) * a + betas[0] * b for a, b in zip(z, x, strict=True)]
        yield y, x


@SHAPES
@DECAYS
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_schedule_free_optimizers_follow_their_formulas_and_end_at_the_average(kind: str, decay: float, shape: tuple[int, ...]) -> None:
    if kind == "sgd":
        part: Any = ScheduleFreeSgd(lr=0.1, momentum=0.8, weight_decay=decay)
        formula = schedule_free_sgd(list(START), 0.1, 0.8, decay)
    else:
        part = ScheduleFreeAdamW(lr=0.05, betas=(0.8, 0.99), weight_decay=decay, r=1.0)
        formula = schedule_free_adamw(list(START), 0.05, (0.8, 0.99), decay, 1.0)
    weights = nn.Parameter(torch.tensor(START, dtype=torch.float64).view(shape))
    optimizer = part.build([weights])
    expected: list[float] = []
    for _, (here, expected) in zip(range(STEPS), formula, strict=False):  # noqa: B007
        weights.grad = torch.tensor(CURVATURE, dtype=torch.float64).view(shape) * weights.detach()
        optimizer.step()
        torch.testing.assert_close(weights.detach().flatten(), torch.tensor(here, dtype=torch.float64), rtol=0, atol=1e-9)
    optimizer.eval()
    torch.testing.assert_close(weights.detach().flatten(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9)
    assert (weights.detach().flatten() - torch.tensor(here)).abs().max() > 1e-3


def root(matrix: Tensor, power: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values**power) @ vectors.T


def gradients(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(STEPS, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("every", [1, 4])
def test_shampoo_follows_its_formula_on_a_matrix(every: int) -> None:
    """Algorithm 1 of Gupta, Koren, Singer 2018; roots are computed at the first step and then every so many."""
    start = torch.tensor(START, dtype=torch.float64).view(MATRIX)
    weights, expected = nn.Parameter(start.clone()), start.clone()
    optimizer = Shampoo(lr=0.3, matrix_eps=1e-3, preconditioning_compute_steps=every).build([weights])
    left, right = 1e-3 * torch.eye(2, dtype=torch.float64), 1e-3 * torch.eye(3, dtype=torch.float64)
    roots: list[Tensor] = []
    for step, gradient in enumerate(gradients(MATRIX)):
        left, right = left + gradient @ gradient.T, right + gradient.T @ gradient
        if step % every == 0:
            roots = [root(left, -1 / 4), root(right, -1 / 4)]
        expected = expected - 0.3 * roots[0] @ gradient @ roots[1]
        weights.grad = gradient.clone()
        optimizer.step()
        torch.testing.assert_close(weights.detach(), expected, rtol=0, atol=1e-9)
    assert (expected - start).abs().min() > 1e-3


@pytest.mark.parametrize("shape", [(4,), (3, 2, 2), (4, 3, 2, 2)], ids=str)
def test_shampoo_follows_its_formula_on_vectors_and_tensors(shape: tuple[int, ...]) -> None:
    """Algorithm 2: for each of k dimensions, the 2k-th root."""
    last = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    weights, expected = (
        nn.Parameter(torch.zeros(shape, dtype=torch.float64).to(memory_format=last)),
        torch.zeros(shape, dtype=torch.float64),
    )
    optimizer = Shampoo(lr=0.3, preconditioning_compute_steps=1).build([weights])
    sums = [1e-4 * torch.eye(size, dtype=torch.float64) for size in shape]
    for gradient in gradients(shape):
        update = gradient
        for dimension, total in enumerate(sums):
            unfolded = gradient.movedim(dimension, 0).flatten(1) if len(shape) > 1 else gradient[:, None]
            total += unfolded @ unfolded.T
            update = torch.tensordot(root(total, -1 / (2 * len(shape))), update.movedim(dimension, 0), 1).movedim(0, dimension)
        expected = expected - 0.3 * update
        weights.grad = torch.empty_like(weights).copy_(gradient)
        optimizer.step()
        torch.testing.assert_close(weights.detach(), expected, rtol=0, atol=1e-8, check_stride=False)


def test_shampoo_names_the_parameter_that_is_too_large_for_it() -> None:
    network, part = nn.Sequential(nn.Embedding(5000, 2), nn.Linear(2, 2)), Shampoo()
    with pytest.raises(DloptError, match=r"^train.optimizer: shampoo takes no dimension above 4096, and 0.weight has one: use soap$"):
        part.build(Parameters().of(network, part))


@DECAYS
@pytest.mark.parametrize("beta", [None, 0.7])
def test_soap_follows_its_formula(beta: float | None, decay: float) -> None:
    """Algorithm 3 of Vyas et al. 2025: Adam in the eigenbasis, which a power iteration and QR follow every other step (algorithm 4)."""
    start = torch.tensor(START, dtype=torch.float64).view(MATRIX)
    weights, expected = nn.Parameter(start.clone()), start.clone()
    part = Soap(lr=0.05, betas=(0.8, 0.9), shampoo_beta=beta, weight_decay=decay, precondition_frequency=2)
    optimizer, kept = part.build([weights]), 0.9 if beta is None else beta
    found = gradients(MATRIX)
    products = [(1 - kept) * found[0] @ found[0].T, (1 - kept) * found[0].T @ found[0]]
    bases = [torch.linalg.eigh(product).eigenvectors.flip(1) for product in products]
    first, second = torch.zeros(MATRIX, dtype=torch.float64), torch.zeros(MATRIX, dtype=torch.float64)
    for step, gradient in enumerate(found):
        weights.grad = gradient.clone()
        optimizer.step()
        if step == 0:  # which only begins the bases
            assert torch.equal(weights, start)
            continue
        first = 0.8 * first + 0.2 * gradient
        second = 0.9 * second + 0.1 * (bases[0].T @ gradient @ bases[1]) ** 2
        rate = 0.05 * math.sqrt(1 - 0.9**step) / (1 - 0.8**step)
        turned = bases[0].T @ first @ bases[1] / (second.sqrt() + 1e-8)
        expected = (expected - rate * bases[0] @ turned @ bases[1].T) * (1 - 0.05 * decay)
        torch.testing.assert_close(weights.detach(), expected, rtol=0, atol=1e-6)
        products = [
            kept * one + (1 - kept) * new for one, new in zip(products, (gradient @ gradient.T, gradient.T @ gradient), strict=True)
        ]
        if step % 2 == 0:
            orders = [
                torch.argsort((basis * (product @ basis)).sum(0), descending=True) for basis, product in zip(bases, products, strict=True)
            ]
            second = second[orders[0]][:, orders[1]]
            bases = [torch.linalg.qr((product @ basis)[:, order]).Q for product, basis, order in zip(products, bases, orders, strict=True)]
    assert (expected - start).abs().min() > 1e-3


def test_soap_is_adam_from_its_second_step_on_where_no_dimension_is_small_enough() -> None:
    start, found = torch.tensor(START, dtype=torch.float64).view(MATRIX), gradients(MATRIX)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizer = Soap(lr=0.05, betas=(0.9, 0.99), weight_decay=0.0, max_precondition_dim=1).build([ours])
    reference = torch.optim.Adam([theirs], lr=0.05, betas=(0.9, 0.99), eps=1e-12)
    for step, gradient in enumerate(found):
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        if step:
            reference.step()
    torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("part", "module", "package"),
    [
        *(
            (part, "pytorch_optimizer", "pytorch-optimizer")
            for part in (Lars(), Lamb(), Lion(), Soap(), Shampoo(), Sophia(), Prodigy(), AdEmaMix())
        ),
        *((part, "schedulefree", "schedulefree") for part in (ScheduleFreeSgd(), ScheduleFreeAdamW())),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_a_library_that_is_missing_is_named_with_how_to_get_it(
    part: Any, module: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DloptError) as caught:
        part.build([nn.Parameter(torch.zeros(VECTOR))])
    assert str(caught.value) == f"train.optimizer: {part.kind} needs {package}: pip install 'dlopt[optimizers]'"


def test_a_companion_of_a_library_works_as_one_of_torch() -> None:
    network, part = Small(), Muon(companion=Lion(lr=0.01, weight_decay=0.0))
    optimizer = part.build(Parameters().of(network, part))
    before = network.output.bias.detach().clone()
    for parameter in network.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    optimizer.step()
    torch.testing.assert_close(network.output.bias.detach(), before - 0.01)
