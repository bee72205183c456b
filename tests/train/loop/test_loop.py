"""The training loop: what it does to weights, step by step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn

from dlopt.data.feed.batches import Batch
from dlopt.optim.constraints import ClipNorm
from dlopt.optim.optimizers import Lbfgs
from dlopt.train.loop.gradients import plain
from dlopt.train.loop.losses import loss_of
from dlopt.train.loop.objectives import Losses, supervised
from dlopt.train.loop.steps import Step, peaked, steps
from tests.sets import TWO

OBJECTIVE = supervised(loss_of(None, TWO, nn.Identity()), 0, 0, 1)


class Linear(nn.Module):
    """Logits of two classes from one input called x."""

    def __init__(self, inputs: int = 2) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, 2, dtype=torch.float64)
        nn.init.constant_(self.linear.weight, 0.5)
        nn.init.constant_(self.linear.bias, 0.0)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.linear(inputs["x"])


def batches(count: int, rows: int = 32, seed: int = 0) -> list[Batch]:
    """Points on two sides of a line."""
    generator = torch.manual_seed(seed)
    found = []
    for _ in range(count):
        x = torch.randn(rows, 2, dtype=torch.float64, generator=generator)
        found.append(Batch({"x": x}, (x[:, 0] > x[:, 1]).long(), rows))
    return found


def sgd(model: nn.Module, lr: float = 1.0) -> torch.optim.Optimizer:
    return peaked(torch.optim.SGD(model.parameters(), lr=lr))


def train(
    model: nn.Module, data: Iterable[Batch], rate: Callable[[int], float] = lambda batch: 0.5, clip_norm: float | None = None
) -> list[Step]:
    clip = None if clip_norm is None else ClipNorm(limit=clip_norm)
    return list(steps(model, sgd(model), data, OBJECTIVE, plain, rate, clip))


def gradient(model: nn.Module, batch: Batch) -> Tensor:
    model.zero_grad()
    OBJECTIVE(model, batch).loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


def weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten().clone() for parameter in model.parameters()])


def poison(batch: Batch) -> Batch:
    return batch._replace(inputs={"x": batch.inputs["x"] * torch.inf})


def test_it_learns_what_can_be_told_apart() -> None:
    model = Linear()
    done = train(model, batches(80))
    assert done[-1].loss < 0.5 * done[0].loss
    (unseen,) = batches(1, rows=1000, seed=1)
    assert (model(unseen.inputs).argmax(dim=1) == unseen.target).double().mean() > 0.95


def test_a_step_tells_the_loss_and_the_right_answers_before_it_and_is_made_at_the_rate_of_its_batch() -> None:
    model, data = Linear(), batches(5)
    rates = [0.1, 0.0, 1.0, 0.3, 0.2]
    stream = steps(model, sgd(model), data, OBJECTIVE, plain, rates.__getitem__)
    for batch, rate in zip(data, rates, strict=True):
        before, expected = weights(model), gradient(model, batch)
        losses = OBJECTIVE(model, batch)
        step = next(stream)
        torch.testing.assert_close(weights(model), before - rate * expected, rtol=1e-12, atol=1e-15)
        assert (step.factor, step.loss.item(), step.correct) == (rate, losses.loss.item(), losses.correct)
        assert step.norm.item() == pytest.approx(expected.norm().item(), rel=1e-12)
        assert not step.loss.requires_grad
    assert next(stream, None) is None


@pytest.mark.parametrize("clip_norm", [0.01, 0.1])
def test_a_gradient_that_is_too_long_is_scaled_to_the_norm_and_tells_its_own(clip_norm: float) -> None:
    model, (batch,) = Linear(), batches(1)
    before, whole = weights(model), gradient(model, batch)
    assert whole.norm() > 0.1
    (step,) = train(model, [batch], lambda _: 1.0, clip_norm)
    moved = before - weights(model)
    torch.testing.assert_close(moved, whole * clip_norm / (whole.norm() + 1e-6), rtol=1e-9, atol=0)  # torch's guard against 0/0
    assert moved.norm() <= clip_norm
    assert step.norm.item() == pytest.approx(whole.norm().item(), rel=1e-12)


def test_a_gradient_that_is_short_enough_is_left_as_it_is_to_the_bit() -> None:
    clipped, free, data = Linear(), Linear(), batches(3)
    train(clipped, data, clip_norm=1e3)
    train(free, data)
    assert torch.equal(weights(clipped), weights(free))


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_a_step_whose_gradient_is_not_finite_changes_nothing_and_the_next_one_does(clip_norm: float | None) -> None:
    model, data = Linear(), batches(3)
    spoilt = [data[0], poison(data[1]), data[2]]
    done = train(model, spoilt, clip_norm=clip_norm)
    assert [math.isfinite(step.norm.item()) for step in done] == [step.taken for step in done] == [True, False, True]
    other = Linear()
    train(other, [data[0], data[2]], clip_norm=clip_norm)
    assert torch.equal(weights(model), weights(other))


def test_each_group_of_parameters_has_its_own_peak() -> None:
    model, (batch,) = Linear(), batches(1)
    groups = [{"params": [model.linear.weight], "lr": 2.0}, {"params": [model.linear.bias], "lr": 0.5}]
    optimizer = peaked(torch.optim.SGD(groups))
    expected = gradient(model, batch)
    list(steps(model, optimizer, [batch], OBJECTIVE, plain, lambda _: 0.1))
    torch.testing.assert_close(model.linear.weight.detach().flatten(), 0.5 - 0.2 * expected[:4])
    torch.testing.assert_close(model.linear.bias.detach(), -0.05 * expected[4:])


def test_centralized_gradients_have_no_mean_over_a_units_inputs() -> None:
    model, (batch,) = Linear(), batches(1)
    before, whole = weights(model), gradient(model, batch)
    list(steps(model, sgd(model), [batch], OBJECTIVE, plain, lambda _: 1.0, centralized=True))
    weight = whole[:4].reshape(2, 2)
    expected = torch.cat([(weight - weight.mean(dim=1, keepdim=True)).flatten(), whole[4:]])
    torch.testing.assert_close(before - weights(model), expected)


def test_lbfgs_searches_along_a_line_and_is_torchs_own_on_the_same_batch() -> None:
    model, other, (batch,) = Linear(), Linear(), batches(1)
    part = Lbfgs(lr=1.0, max_iter=5, line_search_fn="strong_wolfe")
    done = list(steps(model, peaked(part.build(list(model.parameters()))), [batch] * 3, OBJECTIVE, plain, lambda _: 1.0))
    reference = torch.optim.LBFGS(other.parameters(), lr=1.0, max_iter=5, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        reference.zero_grad()
        loss = OBJECTIVE(other, batch).loss
        loss.backward()
        return loss

    for _ in range(3):
        reference.step(closure)
    torch.testing.assert_close(weights(model), weights(other), rtol=1e-9, atol=1e-9)
    assert done[2].loss < 0.05 * done[0].loss


def test_training_is_in_training_mode_and_frozen_parameters_stay() -> None:
    model = Linear().eval()
    model.linear.bias.requires_grad_(False)
    seen = []

    def objective(model: nn.Module, batch: Batch) -> Losses:
        seen.append(model.training)
        return OBJECTIVE(model, batch)

    before = weights(model)
    list(steps(model, sgd(model), batches(2), objective, plain, lambda _: 0.1, ClipNorm(limit=1.0)))
    assert seen == [True, True]
    assert torch.equal(model.linear.bias, torch.zeros(2, dtype=torch.float64))
    assert not torch.equal(weights(model), before)
