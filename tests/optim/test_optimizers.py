"""Optimizers against their published formulas, written out in plain numbers; those of libraries are in test_optimizers_library.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import repeat
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from dlopt.optim.groups import Parameters
from dlopt.optim.optimizers import (
    Adadelta,
    Adafactor,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    Asgd,
    Lbfgs,
    Muon,
    NAdam,
    Optimizer,
    RAdam,
    RmsProp,
    Rprop,
    Sgd,
)
from dlopt.part import DloptError
from dlopt.train.loop.gradients import Curved
from tests.cases import few
from tests.driven import KINDS, PARTS, Small, advance, batches, named

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 10
START = (1.5, -0.7, 0.3, 0.9, -1.1, 0.2)
CURVATURE = (1.0, 4.0, 0.25, 2.0, 0.5, 3.0)
"""The function to minimise is half the sum of curvature times w squared, so its gradient is curvature times w."""
VECTOR, MATRIX = (6,), (2, 3)

Steps = Iterator[list[float]]


def slope(weights: list[float], decay: float = 0.0) -> list[float]:
    return [c * w + decay * w for c, w in zip(CURVATURE, weights, strict=True)]


def each(formula: Callable[..., float], *lists: list[float]) -> list[float]:
    return [formula(*values) for values in zip(*lists, strict=True)]


def zeros() -> list[float]:
    return [0.0] * len(START)


def rms(values: list[float]) -> float:
    return math.sqrt(sum(v * v for v in values) / len(values))


def sgd(weights: list[float], lr: float, momentum: float, nesterov: bool, decay: float) -> Steps:
    """Sutskever et al. 2013, with the velocity in units of gradients, as torch documents it."""
    velocity: list[float] | None = None
    while True:
        gradient = slope(weights, decay)
        velocity = gradient if velocity is None else each(lambda v, g: momentum * v + g, velocity, gradient)
        ahead = each(lambda g, v: g + momentum * v, gradient, velocity) if nesterov else velocity
        weights = each(lambda w, a, g: w - lr * (a if momentum else g), weights, ahead, gradient)
        yield weights


def adagrad(weights: list[float], lr: float, lr_decay: float, start: float, eps: float, decay: float) -> Steps:
    """Duchi, Hazan, Singer 2011, figure 1, diagonal."""
    total, t = [start] * len(weights), 0
    while True:
        gradient, t = slope(weights, decay), t + 1
        total = each(lambda s, g: s + g * g, total, gradient)
        weights = each(lambda w, g, s: w - lr / (1 + (t - 1) * lr_decay) * g / (math.sqrt(s) + eps), weights, gradient, total)  # noqa: B023
        yield weights


def adadelta(weights: list[float], lr: float, rho: float, eps: float, decay: float) -> Steps:
    """Algorithm 1 of Zeiler 2012."""
    squares, moves = zeros(), zeros()
    while True:
        gradient = slope(weights, decay)
        squares = each(lambda v, g: rho * v + (1 - rho) * g * g, squares, gradient)
        step = each(lambda u, v, g: math.sqrt(u + eps) / math.sqrt(v + eps) * g, moves, squares, gradient)
        moves = each(lambda u, s: rho * u + (1 - rho) * s * s, moves, step)
        weights = each(lambda w, s: w - lr * s, weights, step)
        yield weights


def rmsprop(weights: list[float], lr: float, alpha: float, eps: float, momentum: float, centered: bool, decay: float) -> Steps:
    """Tieleman, Hinton 2012; centered: equations 38 to 40 of Graves 2013."""
    squares, mean, velocity = zeros(), zeros(), zeros()
    while True:
        gradient = slope(weights, decay)
        squares = each(lambda v, g: alpha * v + (1 - alpha) * g * g, squares, gradient)
        mean = each(lambda a, g: alpha * a + (1 - alpha) * g, mean, gradient) if centered else mean
        step = each(lambda g, v, a: g / (math.sqrt(v - a * a) + eps), gradient, squares, mean)
        velocity = each(lambda v, s: momentum * v + s, velocity, step)
        weights = each(lambda w, v: w - lr * v, weights, velocity)
        yield weights


def rprop(weights: list[float], lr: float, etas: tuple[float, float], sizes: tuple[float, float]) -> Steps:
    """Riedmiller, Braun 1993, without going back: where the sign has changed, that weight waits a step."""
    before, length = zeros(), [lr] * len(weights)
    while True:
        gradient = slope(weights)
        signs = each(lambda g, b: g * b, gradient, before)
        length = each(lambda s, d: min(max(d * (etas[1] if s > 0 else etas[0] if s < 0 else 1), sizes[0]), sizes[1]), signs, length)
        gradient = each(lambda s, g: 0.0 if s < 0 else g, signs, gradient)
        weights = each(lambda w, g, d: w - math.copysign(d, g) * (g != 0), weights, gradient, length)
        before = gradient
        yield weights


def asgd(weights: list[float], lr: float, lambd: float, alpha: float, decay: float) -> Steps:
    """Stochastic gradient descent of Bottou, by which torch moves the weights."""
    t = 0
    while True:
        rate, t = lr / (1 + lambd * lr * t) ** alpha, t + 1
        weights = each(lambda w, g: w * (1 - lambd * rate) - rate * g, weights, slope(weights, decay))  # noqa: B023
        yield weights


def adam(
    weights: list[float], lr: float, betas: tuple[float, float], eps: float, decay: float, decoupled: bool, amsgrad: bool = False
) -> Steps:
    """Algorithm 1 of Kingma, Ba 2015; decoupled: algorithm 2 of Loshchilov, Hutter 2019; amsgrad: of Reddi, Kale, Kumar 2018."""
    first, second, greatest, t = zeros(), zeros(), zeros(), 0
    while True:
        gradient, t = slope(weights, 0 if decoupled else decay), t + 1
        first = each(lambda m, g: betas[0] * m + (1 - betas[0]) * g, first, gradient)
        second = each(lambda v, g: betas[1] * v + (1 - betas[1]) * g * g, second, gradient)
        greatest = each(max, greatest, second) if amsgrad else second
        step = [m / (1 - betas[0] ** t) / (math.sqrt(v / (1 - betas[1] ** t)) + eps) for m, v in zip(first, greatest, strict=True)]
        weights = [w - lr * s - (lr * decay * w if decoupled else 0) for w, s in zip(weights, step, strict=True)]
        yield weights


def adamax(weights: list[float], lr: float, betas: tuple[float, float], eps: float, decay: float) -> Steps:
    """Algorithm 2 of Kingma, Ba 2015."""
    first, largest, t = zeros(), zeros(), 0
    while True:
        gradient, t = slope(weights, decay), t + 1
        first = each(lambda m, g: betas[0] * m + (1 - betas[0]) * g, first, gradient)
        largest = each(lambda u, g: max(betas[1] * u, abs(g) + eps), largest, gradient)
        weights = [w - lr / (1 - betas[0] ** t) * m / u for w, m, u in zip(weights, first, largest, strict=True)]
        yield weights


def nadam(weights: list[float], lr: float, betas: tuple[float, float], eps: float, decay: float, psi: float, decoupled: bool) -> Steps:
    """Algorithm 2 of Dozat 2016, with the momentum's schedule of section 3.2."""
    first, second, product, t = zeros(), zeros(), 1.0, 0
    while True:
        gradient, t = slope(weights, 0 if decoupled else decay), t + 1
        now, then = (betas[0] * (1 - 0.5 * 0.96 ** (step * psi)) for step in (t, t + 1))
        product *= now
        first = each(lambda m, g: betas[0] * m + (1 - betas[0]) * g, first, gradient)
        second = each(lambda v, g: betas[1] * v + (1 - betas[1]) * g * g, second, gradient)
        ahead = [then * m / (1 - product * then) + (1 - now) * g / (1 - product) for m, g in zip(first, gradient, strict=True)]
        weights = [w * (1 - lr * decay) if decoupled else w for w in weights]
        weights = [w - lr * a / (math.sqrt(v / (1 - betas[1] ** t)) + eps) for w, a, v in zip(weights, ahead, second, strict=True)]
        yield weights


def radam(weights: list[float], lr: float, betas: tuple[float, float], eps: float, decay: float, decoupled: bool) -> Steps:
    """Algorithm 2 of Liu et al. 2020, rectified from an average of 5 steps on, as torch has it."""
    first, second, t, most = zeros(), zeros(), 0, 2 / (1 - betas[1]) - 1
    while True:
        gradient, t = slope(weights, 0 if decoupled else decay), t + 1
        first = each(lambda m, g: betas[0] * m + (1 - betas[0]) * g, first, gradient)
        second = each(lambda v, g: betas[1] * v + (1 - betas[1]) * g * g, second, gradient)
        length, start = most - 2 * t * betas[1] ** t / (1 - betas[1] ** t), math.sqrt(1 - betas[1] ** t)
        rectified = math.sqrt((length - 4) * (length - 2) * most / ((most - 4) * (most - 2) * length)) if length > 5 else None
        weights = [w * (1 - lr * decay) if decoupled else w for w in weights]
        step = [m / (1 - betas[0] ** t) for m in first]
        if rectified:
            step = [s * rectified * start / (math.sqrt(v) + eps) for s, v in zip(step, second, strict=True)]
        weights = each(lambda w, s: w - lr * s, weights, step)
        yield weights


def adafactor(weights: list[float], shape: tuple[int, ...], lr: float, power: float, least: float, d: float, decay: float) -> Steps:
    """Algorithms 4 and 5 of Shazeer, Stern 2018, with means in place of sums, and lr in place of their 0.01."""
    rows, columns, squares, t = [0.0] * 2, [0.0] * 3, zeros(), 0
    while True:
        gradient, t = slope(weights), t + 1
        new, rate = t**power, max(least, rms(weights)) * min(lr, 1 / math.sqrt(t))
        if shape == MATRIX:
            rows = [(1 - new) * r + new * rms(gradient[3 * i : 3 * i + 3]) ** 2 for i, r in enumerate(rows)]
            columns = [(1 - new) * c + new * rms(gradient[i::3]) ** 2 for i, c in enumerate(columns)]
            squares = [r * c / (sum(rows) / 2) for r in rows for c in columns]
        else:
            squares = [(1 - new) * v + new * g * g for v, g in zip(squares, gradient, strict=True)]
        update = [g / math.sqrt(v) for g, v in zip(gradient, squares, strict=True)]
        weights = [w * (1 - lr * decay) - rate * u / max(1, rms(update) / d) for w, u in zip(weights, update, strict=True)]
        yield weights


def muon(weights: list[float], lr: float, momentum: float, nesterov: bool, factor: float, decay: float) -> Steps:
    """Jordan et al. 2024 on 2 x 3: the quintic iteration a X + (b A + c A A) X with A = X X'."""
    velocity = zeros()
    while True:
        gradient = slope(weights)
        velocity = each(lambda v, g: momentum * v + (1 - momentum) * g, velocity, gradient)
        ahead = each(lambda g, v: (1 - momentum) * g + momentum * v, gradient, velocity) if nesterov else velocity
        norm = math.sqrt(sum(a * a for a in ahead))
        found = [[a / norm for a in ahead[:3]], [a / norm for a in ahead[3:]]]
        for _ in range(5):
            gram = product(found, [list(column) for column in zip(*found, strict=True)])
            power = product(gram, gram)
            inner = [[-4.775 * gram[i][j] + 2.0315 * power[i][j] for j in range(2)] for i in range(2)]
            moved = product(inner, found)
            found = [[3.4445 * found[i][j] + moved[i][j] for j in range(3)] for i in range(2)]
        weights = each(lambda w, u: w * (1 - lr * decay) - lr * factor * u, weights, found[0] + found[1])
        yield weights


def product(one: list[list[float]], other: list[list[float]]) -> list[list[float]]:
    return [[sum(a * b for a, b in zip(row, column, strict=True)) for column in zip(*other, strict=True)] for row in one]


def trajectory(part: Any, shape: tuple[int, ...]) -> Iterator[Tensor]:
    weights = nn.Parameter(torch.tensor(START, dtype=torch.float64).view(shape))
    optimizer = part.build([weights])
    while True:
        weights.grad = torch.tensor(CURVATURE, dtype=torch.float64).view(shape) * weights.detach()
        optimizer.step()
        yield weights.detach().flatten()


def assert_follows(part: Any, formula: Steps, shape: tuple[int, ...] = VECTOR, most: float = 1e-9) -> None:
    moved = torch.tensor(START, dtype=torch.float64)
    for _, found, expected in zip(range(STEPS), trajectory(part, shape), formula, strict=False):
        assert (found - torch.tensor(expected, dtype=torch.float64)).abs().max() < most
        moved = found
    assert (moved - torch.tensor(START)).abs().min() > 1e-3


DECAYS = pytest.mark.parametrize("decay", [0.0, 0.1])
SHAPES = pytest.mark.parametrize("shape", [VECTOR, MATRIX], ids=["vector", "matrix"])


@SHAPES
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
@DECAYS
def test_sgd_follows_its_formula(momentum: float, nesterov: bool, decay: float, shape: tuple[int, ...]) -> None:
    part = Sgd(lr=0.05, momentum=momentum, nesterov=nesterov, weight_decay=decay)
    assert_follows(part, sgd(list(START), 0.05, momentum, nesterov, decay), shape)


@SHAPES
@DECAYS
def test_adagrad_follows_its_formula(decay: float, shape: tuple[int, ...]) -> None:
    part = Adagrad(lr=0.05, lr_decay=0.1, initial_accumulator_value=0.2, eps=1e-3, weight_decay=decay)
    assert_follows(part, adagrad(list(START), 0.05, 0.1, 0.2, 1e-3, decay), shape)


@SHAPES
@DECAYS
def test_adadelta_follows_its_formula(decay: float, shape: tuple[int, ...]) -> None:
    part = Adadelta(lr=2, rho=0.8, eps=1e-4, weight_decay=decay)
    assert_follows(part, adadelta(list(START), 2, 0.8, 1e-4, decay), shape)


@SHAPES
@pytest.mark.parametrize(("momentum", "centered"), [(0.0, False), (0.5, False), (0.5, True)])
@DECAYS
def test_rmsprop_follows_its_formula(momentum: float, centered: bool, decay: float, shape: tuple[int, ...]) -> None:
    part = RmsProp(lr=0.01, alpha=0.9, eps=1e-3, momentum=momentum, centered=centered, weight_decay=decay)
    assert_follows(part, rmsprop(list(START), 0.01, 0.9, 1e-3, momentum, centered, decay), shape)


@SHAPES
@pytest.mark.parametrize("sizes", [(1e-6, 50.0), (0.15, 0.25)])
def test_rprop_follows_its_formula(sizes: tuple[float, float], shape: tuple[int, ...]) -> None:
    assert_follows(Rprop(lr=0.2, etas=(0.4, 1.3), step_sizes=sizes), rprop(list(START), 0.2, (0.4, 1.3), sizes), shape)


@SHAPES
@DECAYS
def test_asgd_follows_its_formula(decay: float, shape: tuple[int, ...]) -> None:
    part = Asgd(lr=0.1, lambd=0.05, alpha=0.6, weight_decay=decay)
    assert_follows(part, asgd(list(START), 0.1, 0.05, 0.6, decay), shape, most=1e-6)  # torch keeps the rate in float32


@SHAPES
@DECAYS
@pytest.mark.parametrize("eps", [1e-8, 1e-2])
def test_adam_follows_its_formula(decay: float, eps: float, shape: tuple[int, ...]) -> None:
    part = Adam(lr=0.02, betas=(0.8, 0.99), eps=eps, weight_decay=decay)
    assert_follows(part, adam(list(START), 0.02, (0.8, 0.99), eps, decay, decoupled=False), shape)


@SHAPES
@DECAYS
@pytest.mark.parametrize("eps", [1e-8, 1e-2])
def test_adamw_follows_its_formula(decay: float, eps: float, shape: tuple[int, ...]) -> None:
    part = AdamW(lr=0.02, betas=(0.8, 0.99), eps=eps, weight_decay=decay)
    assert_follows(part, adam(list(START), 0.02, (0.8, 0.99), eps, decay, decoupled=True), shape)


@pytest.mark.parametrize("kind", [Adam, AdamW])
def test_amsgrad_follows_its_formula_and_is_another_one(kind: type[Adam] | type[AdamW]) -> None:
    """With rates at which gradients fall, so that the greatest average is not the last one."""
    part = kind(lr=0.3, betas=(0.5, 0.6), weight_decay=0.1, amsgrad=True)
    formulas = [adam(list(START), 0.3, (0.5, 0.6), 1e-8, 0.1, kind is AdamW, greatest) for greatest in (True, False)]
    assert_follows(part, adam(list(START), 0.3, (0.5, 0.6), 1e-8, 0.1, kind is AdamW, amsgrad=True))
    one, other = ([next(formula) for _ in range(STEPS)][-1] for formula in formulas)
    assert max(abs(a - b) for a, b in zip(one, other, strict=True)) > 1e-2


@SHAPES
@DECAYS
def test_adamax_follows_its_formula(decay: float, shape: tuple[int, ...]) -> None:
    assert_follows(Adamax(lr=0.02, betas=(0.8, 0.9), weight_decay=decay), adamax(list(START), 0.02, (0.8, 0.9), 1e-8, decay), shape)


@SHAPES
@DECAYS
@pytest.mark.parametrize("decoupled", [False, True])
def test_nadam_follows_its_formula(decay: float, decoupled: bool, shape: tuple[int, ...]) -> None:
    part = NAdam(lr=0.02, betas=(0.8, 0.99), momentum_decay=0.1, weight_decay=decay, decoupled_weight_decay=decoupled)
    assert_follows(part, nadam(list(START), 0.02, (0.8, 0.99), 1e-8, decay, 0.1, decoupled), shape)


@SHAPES
@DECAYS
@pytest.mark.parametrize("decoupled", [False, True])
def test_radam_follows_its_formula(decay: float, decoupled: bool, shape: tuple[int, ...]) -> None:
    part = RAdam(lr=0.02, betas=(0.8, 0.999), weight_decay=decay, decoupled_weight_decay=decoupled)
    assert_follows(part, radam(list(START), 0.02, (0.8, 0.999), 1e-8, decay, decoupled), shape)


@SHAPES
@DECAYS
@pytest.mark.parametrize("d", [1.0, 1.5])
def test_adafactor_follows_its_formula(decay: float, d: float, shape: tuple[int, ...]) -> None:
    part = Adafactor(lr=0.4, beta2_decay=-0.7, eps=(None, 1e-3), d=d, weight_decay=decay)
    assert_follows(part, adafactor(list(START), shape, 0.4, -0.7, 1e-3, d, decay), shape)


@DECAYS
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(("rule", "factor"), [("original", 1.0), ("match_rms_adamw", 0.2 * math.sqrt(3))])
def test_muon_follows_its_formula(decay: float, nesterov: bool, rule: Any, factor: float) -> None:
    part = Muon(lr=0.05, momentum=0.9, nesterov=nesterov, adjust_lr_fn=rule, weight_decay=decay)
    assert_follows(part, muon(list(START), 0.05, 0.9, nesterov, factor, decay), MATRIX)


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (6, 2, 3, 3)])
def test_muon_is_torchs_in_full_precision_and_takes_filters_as_matrices(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "bfloat16", lambda self: self)
    start, gradients = torch.randn(shape, dtype=torch.float64), torch.randn(STEPS, *shape, dtype=torch.float64)
    ours = nn.Parameter(start.clone(memory_format=torch.channels_last) if len(shape) == 4 else start.clone())
    theirs = nn.Parameter(start.clone().flatten(1))
    optimizers = (Muon(lr=0.1, weight_decay=0.1).build([ours]), torch.optim.Muon([theirs], lr=0.1, weight_decay=0.1))
    for gradient in gradients:
        ours.grad, theirs.grad = torch.empty_like(ours).copy_(gradient), gradient.flatten(1)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours.detach().flatten(1), theirs.detach(), rtol=0, atol=1e-12)
    assert (ours.detach() - start).abs().max() > 0.1


def test_muon_makes_a_step_of_nearly_equal_singular_values() -> None:
    weights = nn.Parameter(torch.zeros(20, 30))
    weights.grad = torch.randn(20, 3, generator=torch.Generator().manual_seed(1)) @ torch.randn(3, 30) + 0.1 * torch.randn(20, 30)
    before = torch.linalg.svdvals(weights.grad)
    Muon(lr=1.0).build([weights]).step()
    after = torch.linalg.svdvals(weights.detach())
    assert before.max() / before.min() > 50
    assert after.min() > 0.5 and after.max() < 1.3


def test_muon_takes_hidden_matrices_and_its_companion_the_rest() -> None:
    network, part = Small(), Muon(lr=0.5, companion=Sgd(lr=0.01, weight_decay=0.3), weight_decay=0.2)
    optimizer = part.build(Parameters(layer_decay=0.5).of(network, part))
    found = {name: group for group in optimizer.param_groups for name in group["names"]}
    assert {name for name, group in found.items() if "ns_steps" in group} == {"convolution.weight", "hidden.weight"}
    assert {name: group["lr"] for name, group in found.items()} == {
        "convolution.weight": 0.125,
        "convolution.bias": 0.0025,
        "hidden.weight": 0.25,
        "hidden.bias": 0.005,
        "output.weight": 0.01,
        "output.bias": 0.01,
    }
    assert [found[name]["weight_decay"] for name in ("hidden.weight", "output.weight", "output.bias")] == [0.2, 0.3, 0.0]
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    after = dict(network.named_parameters())
    torch.testing.assert_close(after["output.weight"], before["output.weight"] * (1 - 0.003) - 0.01)
    torch.testing.assert_close(after["output.bias"], before["output.bias"] - 0.01)
    assert not torch.equal(after["hidden.weight"], before["hidden.weight"])


def quadratic(weights: Tensor) -> Tensor:
    return (torch.tensor(CURVATURE, dtype=weights.dtype) * weights.flatten().square()).sum() / 2


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_lbfgs_is_torchs_and_finds_the_minimum_of_a_quadratic_function(line_search: Any) -> None:
    part = Lbfgs(lr=0.5, max_iter=4, history_size=5, line_search_fn=line_search)
    ours, theirs = (nn.Parameter(torch.tensor(START, dtype=torch.float64)) for _ in range(2))
    reference = torch.optim.LBFGS([theirs], lr=0.5, max_iter=4, history_size=5, line_search_fn=line_search)
    for weights, optimizer in ((ours, part.build([ours])), (theirs, reference)):

        def closure(weights: nn.Parameter = weights) -> Tensor:
            weights.grad = None
            loss = quadratic(weights)
            loss.backward()
            return loss

        for _ in range(STEPS):
            optimizer.step(closure)  # type: ignore[arg-type]
    assert torch.equal(ours, theirs)
    assert quadratic(ours.detach()) < 1e-9


def test_lbfgs_sees_no_difference_between_memory_formats_and_groups() -> None:
    losses = []
    for format, grouped in ((torch.contiguous_format, False), (torch.channels_last, True)):
        network, part = Small(torch.float64), Lbfgs(max_iter=4)
        network.convolution.to(memory_format=format)
        optimizer = part.build(Parameters().of(network, part) if grouped else network.parameters())
        assert len(optimizer.param_groups) == 1
        losses.append(advance(network, optimizer, batches(torch.float64), 4))
    assert losses[1] == pytest.approx(losses[0], rel=1e-8)


@pytest.mark.parametrize("part", few(14, PARTS), ids=named)
def test_every_optimizer_lowers_the_loss_of_a_small_network(part: Any) -> None:
    network = Small()
    optimizer = part.build(Parameters().of(network, part))
    whole = part.kind in ("lbfgs", "rprop")  # made for the same rows in every step
    feed = repeat(next(batches(rows=64))) if whole else batches(rows=32)
    losses = advance(network, optimizer, feed, 30 if whole else 150)
    assert sum(losses[-10:]) < 0.95 * sum(losses[:10])


@pytest.mark.parametrize("part", PARTS, ids=named)
def test_gradients_are_there_and_whole_after_a_step(part: Any) -> None:
    """Who watches over layers looks at them."""
    network = Small()
    optimizer = part.build(Parameters().of(network, part))
    advance(network, optimizer, batches(), 2)
    if isinstance(optimizer, Curved):
        optimizer.take([torch.rand_like(p) for group in optimizer.param_groups for p in group["params"]])
    expected = [torch.randn_like(parameter) for parameter in network.parameters()]
    for parameter, gradient in zip(network.parameters(), expected, strict=True):
        parameter.grad = gradient.clone()
    optimizer.step(lambda: torch.tensor(0.5))  # type: ignore[arg-type]
    for parameter, gradient in zip(network.parameters(), expected, strict=True):
        assert parameter.grad is not None and torch.equal(parameter.grad, gradient)


def test_an_optimizer_is_found_by_its_kind() -> None:
    adapter: TypeAdapter[Optimizer] = TypeAdapter(Optimizer)
    assert {kind: type(adapter.validate_python({"kind": kind})) for kind in KINDS} == KINDS
    assert list(KINDS) == [
        *(
            "sgd",
            "adagrad",
            "adadelta",
            "rmsprop",
            "rprop",
            "asgd",
            "adam",
            "adamw",
            "adamax",
            "nadam",
            "radam",
            "adafactor",
            "lbfgs",
            "muon",
        ),
        *("lars", "lamb", "lion", "soap", "shampoo", "sophia", "prodigy", "ademamix", "schedule_free_sgd", "schedule_free_adamw"),
    ]


WRONG: list[dict[str, object]] = [
    {"kind": "sgd", "nesterov": True},
    {"kind": "sgd", "momentum": 1.0},
    {"kind": "sgd", "lr": 0},
    {"kind": "sgd", "lr": True},
    {"kind": "sgd", "lr": "fast"},
    {"kind": "sgd", "betas": [0.9, 0.99]},
    {"kind": "adam", "lr": float("inf")},
    {"kind": "adam", "lr": float("nan")},
    {"kind": "adam", "betas": [0.9, 1.0]},
    {"kind": "adam", "betas": [-0.1, 0.9]},
    {"kind": "adamw", "eps": 0},
    {"kind": "adamw", "weight_decay": -1},
    {"kind": "adagrad", "lr_decay": -1},
    {"kind": "adadelta", "rho": 1},
    {"kind": "rmsprop", "alpha": 1},
    {"kind": "rprop", "etas": [1.1, 1.2]},
    {"kind": "rprop", "etas": [0.5, 1]},
    {"kind": "rprop", "step_sizes": [1, 0.5]},
    {"kind": "asgd", "lambd": -1},
    {"kind": "adamax", "betas": [0.9]},
    {"kind": "nadam", "momentum_decay": -1},
    {"kind": "radam", "eps": -1},
    {"kind": "adafactor", "beta2_decay": 0.8},
    {"kind": "adafactor", "d": 0.5},
    {"kind": "lbfgs", "max_iter": 0},
    {"kind": "lbfgs", "line_search_fn": "armijo"},
    {"kind": "lbfgs", "weight_decay": 0.1},
    {"kind": "muon", "ns_steps": 100},
    {"kind": "muon", "adjust_lr_fn": "other"},
    {"kind": "muon", "companion": {"kind": "lbfgs"}},
    {"kind": "muon", "companion": {"kind": "adamw", "lr": "auto"}},
    {"kind": "lars", "trust_coefficient": 0},
    {"kind": "lamb", "eps": 0},
    {"kind": "lion", "betas": [0.9, 1]},
    {"kind": "soap", "precondition_frequency": 0},
    {"kind": "shampoo", "matrix_eps": 0},
    {"kind": "sophia", "rho": 0},
    {"kind": "prodigy", "growth_rate": 1},
    {"kind": "ademamix", "betas": [0.9, 0.99]},
    {"kind": "ademamix", "betas": [0.0, 0.99, 0.999], "t_alpha_beta3": 10},
    {"kind": "schedule_free_sgd", "momentum": 0},
    {"kind": "schedule_free_adamw", "betas": [0, 0.9]},
]


@pytest.mark.parametrize("given", WRONG, ids=str)
def test_hyperparameters_that_torch_would_choke_on_are_refused_before_it_sees_them(given: dict[str, object]) -> None:
    adapter: TypeAdapter[Optimizer] = TypeAdapter(Optimizer)
    with pytest.raises(ValidationError):
        adapter.validate_python(given)


def test_something_is_refused_of_every_optimizer() -> None:
    assert {given["kind"] for given in WRONG} == set(KINDS)


def test_a_rate_written_3e_4_which_yaml_reads_as_text_is_a_number_and_auto_stays() -> None:
    assert Adam.model_validate({"lr": "3e-4"}).lr == 3e-4
    assert Adam.model_validate({"lr": "auto"}).lr == "auto"


@pytest.mark.parametrize("kind", ["lbfgs", "prodigy"])
def test_an_optimizer_of_one_rate_takes_no_others(kind: str) -> None:
    part = KINDS[kind]()
    with pytest.raises(DloptError, match=f"^train.parameters: {kind} has one rate for all parameters: take out lr_scale and layer_decay$"):
        part.build(Parameters(layer_decay=0.9).of(Small(), part))
