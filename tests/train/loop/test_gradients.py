"""How gradients come about: in parts, at the worst place near by, and their slopes; on one worker and on two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dlopt.data.feed.batches import Batch, Mixed
from dlopt.optim.optimizers import Adam
from dlopt.optim.optimizers_library import Sophia
from dlopt.optim.wrappers import Lookahead
from dlopt.part import Target
from dlopt.train.loop.gradients import Gradient, accumulated, curved, plain, sharpness_aware, split
from dlopt.train.loop.objectives import Loss, Losses, Objective, supervised
from dlopt.train.parallel.base import Parallel
from dlopt.train.parallel.ddp import DDP
from tests.driven import Small, batches, cross_entropy, weights
from tests.processes import together

pytestmark = pytest.mark.usefixtures("one_thread")

TARGET = Target(name="y", kind="category", labels=(0, 1, 2))
ROWS = 11


def loss(outputs: Tensor, wanted: Tensor, reduction: str) -> Tensor:
    return nn.functional.cross_entropy(outputs, wanted, reduction=reduction)


def objective(world: int = 1) -> Objective:
    """With penalties, which must not be counted once for each part."""
    found: Loss = loss
    return supervised(found, 1e-2, 1e-2, world)


def whole(mixes: bool = False) -> Batch:
    batch = next(batches(torch.float64, rows=ROWS))
    share = torch.linspace(0.2, 1, ROWS)
    return batch._replace(mixed=Mixed(batch.target.flip(0), share)) if mixes else batch


def network() -> Small:
    return Small(torch.float64)


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def assert_near(found: list[Tensor], expected: list[Tensor], most: float = 1e-12) -> None:
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=most)


@pytest.mark.parametrize("rows", [1, 2, 4, ROWS, 100])
@pytest.mark.parametrize("mixes", [False, True], ids=["plain", "mixed"])
def test_accumulated_gradients_are_those_of_the_batch(rows: int, mixes: bool) -> None:
    one, other = network(), network()
    expected, found = plain(objective(), one, whole(mixes)), accumulated(rows)(objective(), other, whole(mixes))
    assert_near(gradients(other), gradients(one))
    torch.testing.assert_close(found.loss, expected.loss.detach(), rtol=0, atol=1e-12)
    assert expected.correct is not None and found.correct is not None
    torch.testing.assert_close(found.correct, expected.correct)


def test_no_part_has_more_rows_than_asked_for() -> None:
    seen: list[int] = []
    model = network()
    model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0]["x"])))
    accumulated(4)(objective(), model, whole())
    assert seen == [4, 4, 3]


def test_parts_of_a_batch_add_up_also_where_there_are_none() -> None:
    found = split(whole(mixes=True), 4, 4)
    assert [len(part.target) for part in found] == [4, 4, 3, 0]
    assert [part.part for part in found] == pytest.approx([4 / 11, 4 / 11, 3 / 11, 0])
    assert all(part.total == ROWS and part.mixed is not None and len(part.mixed.target) == len(part.target) for part in found)
    assert torch.equal(torch.cat([part.inputs["x"] for part in found]), whole().inputs["x"])
    assert torch.equal(torch.cat([part.mixed.share for part in found if part.mixed]), torch.linspace(0.2, 1, ROWS))
    empty = Batch({"x": torch.zeros(0, 2, 4, 4)}, torch.zeros(0, dtype=torch.int64), ROWS)
    assert [part.part for part in split(empty, 4, 3)] == [1, 0, 0]
    assert [part.part for part in split(empty, 4, 0)] == [1]


def by_hand(adaptive: bool, rho: float) -> tuple[list[Tensor], Tensor]:
    """The gradient at w + e, and the loss at w, in the lines of the paper."""
    model = network()
    first = cross_entropy(model, whole()).loss
    slopes = torch.autograd.grad(first, list(model.parameters()))
    with torch.no_grad():
        sizes = [p.abs() if adaptive else torch.ones_like(p) for p in model.parameters()]
        norm = sum(float((t * g).square().sum()) for t, g in zip(sizes, slopes, strict=True)) ** 0.5
        for parameter, size, gradient in zip(model.parameters(), sizes, slopes, strict=True):
            parameter += rho * size**2 * gradient / norm
    return list(torch.autograd.grad(cross_entropy(model, whole()).loss, list(model.parameters()))), first.detach()


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("inner", [plain, accumulated(4)], ids=["plain", "accumulated"])
def test_sharpness_aware_gradients_follow_their_formula(inner: Gradient, adaptive: bool) -> None:
    model = network()
    before = weights(model)
    found = sharpness_aware(inner, 0.3, adaptive)(cross_entropy, model, whole())
    expected, expected_loss = by_hand(adaptive, 0.3)
    assert_near(gradients(model), expected, 1e-11)
    torch.testing.assert_close(found.loss.detach(), expected_loss)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    plainly = network()
    plain(cross_entropy, plainly, whole())
    assert max((one - other).abs().max().item() for one, other in zip(gradients(plainly), expected, strict=True)) > 1e-3


def test_batch_norms_averages_see_the_weights_as_they_are_and_once() -> None:
    models = [nn.Sequential(nn.Linear(32, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())

    def flat(model: nn.Module, batch: Batch) -> Losses:
        return Losses(loss(model(batch.inputs["x"].flatten(1).float()), batch.target, "sum") / batch.total, None)

    plain(flat, models[0], whole())
    sharpness_aware(plain, 0.5)(flat, models[1], whole())
    for one, other in zip(models[0].buffers(), models[1].buffers(), strict=True):
        assert torch.equal(one, other)
    assert int(models[0][1].num_batches_tracked) == 1  # type: ignore[arg-type]


def test_weights_come_back_from_a_gradient_that_is_not_finite() -> None:
    model = network()
    before = weights(model)

    def broken(model: nn.Module, batch: Batch) -> Losses:
        found = cross_entropy(model, batch)
        return found._replace(loss=found.loss * float("inf"))

    sharpness_aware(plain, 0.3)(broken, model, whole())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(bool(gradient.isfinite().all()) for gradient in gradients(model))


def estimates(model: nn.Module, gradient: Gradient, optimizer: Any, batch: Batch, steps: int = 1) -> list[list[Tensor]]:
    """What the optimizer was given for each of some steps at the same weights."""
    start, found = {name: value.clone() for name, value in model.state_dict().items()}, []
    for _ in range(steps):
        model.load_state_dict(start)
        for parameter in model.parameters():
            parameter.grad = None
        gradient(objective(dist.get_world_size() if dist.is_initialized() else 1), model, batch)
        found.append([one.clone() for one in optimizer.estimate])
        optimizer.step()
    model.load_state_dict(start)
    return found


def test_the_curvature_of_independent_weights_is_exact() -> None:
    """A Hessian that is a diagonal c: z * Hz is c * z^2, and the mean over many steps is c."""
    parameter = nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
    model, curvature = nn.ParameterList([parameter]), torch.tensor([1.0, 3.0, 0.2], dtype=torch.float64)

    def quadratic(model: nn.Module, batch: Batch) -> Losses:
        return Losses((curvature * parameter.square()).sum() / 2, None)

    optimizer: Any = Sophia(update_period=1).build([parameter])
    gradient, found = curved(plain, optimizer, 1), []
    for _ in range(400):
        parameter.grad = None
        gradient(quadratic, model, whole())
        found.append(optimizer.estimate[0] / curvature)
        optimizer.step()
    noise = torch.stack(found)
    assert bool((noise >= 0).all())
    assert (noise.mean(0) - 1).abs().max() < 0.2


def test_the_estimate_is_a_product_with_the_hessian_and_the_gradient_stays() -> None:
    model, plainly = network(), network()
    optimizer: Any = Sophia().build(model.parameters())
    (found,) = estimates(model, curved(plain, optimizer, 1), optimizer, whole())
    parameters, generator = list(plainly.parameters()), torch.Generator().manual_seed(0x50F1A)
    noise = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]

    def slopes(step: float) -> list[Tensor]:
        moved = network()
        with torch.no_grad():
            for parameter, way in zip(moved.parameters(), noise, strict=True):
                parameter += step * way
        return list(torch.autograd.grad(objective()(moved, whole()).loss, list(moved.parameters())))

    products = [(one - other) / 2e-6 for one, other in zip(slopes(1e-6), slopes(-1e-6), strict=True)]
    assert_near(found, [way * product for way, product in zip(noise, products, strict=True)], 1e-7)
    plain(objective(), plainly, whole())
    model.zero_grad()
    curved(plain, optimizer, 1)(objective(), model, whole())
    assert_near(gradients(model), gradients(plainly))


def test_only_an_optimizer_that_wants_curvature_gets_it_also_within_slow_weights() -> None:
    model, gradient = network(), plain
    assert curved(gradient, Adam().build(model.parameters()), 1) is gradient
    optimizer: Any = Sophia().build(model.parameters())
    curved(gradient, Lookahead().wrap(optimizer), 1)(objective(), model, whole())
    assert len(optimizer.estimate) == 6


def test_attention_can_be_looked_at_twice() -> None:
    attention = nn.MultiheadAttention(4, 2, batch_first=True, dtype=torch.float64)
    rows = torch.randn(3, 5, 4, dtype=torch.float64)

    def attended(model: nn.Module, batch: Batch) -> Losses:
        return Losses(model(rows, rows, rows, need_weights=False)[0].square().sum(), None)

    optimizer: Any = Sophia().build(attention.parameters())
    curved(plain, optimizer, 1)(attended, attention, whole())
    assert all(bool(one.isfinite().all()) for one in optimizer.estimate)
    assert optimizer.estimate[0].abs().max() > 0


SHARES = [slice(0, 8), slice(8, ROWS)]
"""Of a batch over two workers: one has 2 parts of 5 rows, the other 1."""
KINDS = ["plain", "accumulated", "sharp", "sharp and accumulated", "nothing for one"]


def made(kind: str, held: Parallel) -> Gradient:
    inner = accumulated(5, held.partly) if "accumulated" in kind or kind == "nothing for one" else plain
    inner = held.gradient(inner)
    return sharpness_aware(inner, 0.3, adaptive=True) if "sharp" in kind else inner


def _shared(rank: int, world: int, home: Path) -> None:
    found: dict[str, Any] = {}
    for kind in KINDS:
        share = (slice(0, ROWS), slice(ROWS, ROWS))[rank] if kind == "nothing for one" else SHARES[rank]
        batch = whole(mixes=True)
        assert batch.mixed is not None
        mixed = Mixed(batch.mixed.target[share], batch.mixed.share[share])
        mine = Batch({"x": batch.inputs["x"][share]}, batch.target[share], ROWS, mixed)
        held = DDP(network(), rank, world)
        model = held.module()
        most = max(len(range(ROWS)[one]) for one in SHARES) if share in SHARES else ROWS
        losses = made(kind, held)(objective(2), model, mine._replace(most=most))
        found[kind] = (gradients(model), losses.loss.detach())
    model = network()
    optimizer: Any = Sophia(update_period=1).build(model.parameters())
    found["curvature"] = estimates(model, curved(plain, optimizer, 2), optimizer, mine, steps=2)
    torch.save(found, f"{home}/found-{rank}")


@pytest.mark.slow
def test_two_workers_have_the_gradients_of_one(tmp_path: Path) -> None:
    together(2, _shared, tmp_path)
    found = [torch.load(tmp_path / f"found-{rank}") for rank in range(2)]
    for kind in KINDS:
        model = network()
        losses = made(kind, Parallel(model))(objective(), model, whole(mixes=True))
        for rank in range(2):
            assert_near(found[rank][kind][0], gradients(model))
        torch.testing.assert_close(found[0][kind][1] + found[1][kind][1], losses.loss.detach(), rtol=0, atol=1e-12)
    model = network()
    optimizer: Any = Sophia(update_period=1).build(model.parameters())
    expected = estimates(model, curved(plain, optimizer, 1), optimizer, whole(mixes=True), steps=2)
    assert not torch.equal(expected[0][0], expected[1][0])  # another direction at each step
    for rank in range(2):
        for mine, theirs in zip(found[rank]["curvature"], expected, strict=True):
            assert_near(mine, theirs)
