"""What goes around optimizers, against its formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dlopt.optim.optimizers import Adam, AdamW, Lbfgs, Muon, Sgd
from dlopt.optim.optimizers_library import ScheduleFreeAdamW, ScheduleFreeSgd
from dlopt.optim.wrappers import Lookahead, centralize
from dlopt.part import DloptError
from tests.driven import Small, advance, batches, weights

pytestmark = pytest.mark.usefixtures("one_thread")


def test_lookahead_follows_its_formula() -> None:
    """Algorithm 1 of Zhang et al. 2019 around gradient descent on half the sum of c w^2."""
    curvature, start, lr, alpha = (1.0, 4.0, 0.25), (1.5, -0.7, 0.3), 0.1, 0.4
    parameter = nn.Parameter(torch.tensor(start, dtype=torch.float64))
    optimizer = Lookahead(steps=3, alpha=alpha).wrap(Sgd(lr=lr).build([parameter]))
    slow, fast = list(start), list(start)
    for step in range(1, 11):
        parameter.grad = torch.tensor(curvature, dtype=torch.float64) * parameter.detach()
        optimizer.step()
        fast = [w - lr * c * w for w, c in zip(fast, curvature, strict=True)]
        if step % 3 == 0:
            slow = [s + alpha * (w - s) for s, w in zip(slow, fast, strict=True)]
            fast = slow
        torch.testing.assert_close(parameter.detach(), torch.tensor(fast, dtype=torch.float64), rtol=0, atol=1e-12)


def test_lookahead_that_goes_all_the_way_changes_nothing() -> None:
    found = []
    for ahead in (None, Lookahead(steps=2, alpha=1.0)):
        network = Small(torch.float64)
        optimizer = Adam().build(network.parameters())
        advance(network, ahead.wrap(optimizer) if ahead else optimizer, batches(torch.float64), 7)
        found.append(weights(network))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=0, atol=1e-12)


def test_a_rate_set_outside_of_lookahead_is_that_of_the_optimizer_inside() -> None:
    parameter = nn.Parameter(torch.ones(2))
    optimizer = Lookahead(steps=5).wrap(Sgd(lr=0.1).build([parameter]))
    state = optimizer.state_dict()
    for loaded in (False, True):
        if loaded:
            optimizer.load_state_dict(state)
        before = parameter.detach().clone()
        for group in optimizer.param_groups:
            group["lr"] = 0.5
        parameter.grad = torch.ones(2)
        optimizer.step()
        torch.testing.assert_close(parameter.detach(), before - 0.5)


def test_lookahead_lowers_the_loss_around_optimizers_of_several_parts() -> None:
    network = Small()
    optimizer = Lookahead().wrap(Muon(companion=AdamW(lr=0.01)).build(network.parameters()))
    losses = advance(network, optimizer, batches(rows=32), 120)
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (Lbfgs(), "train.lookahead: lbfgs builds on its own steps: take lookahead out, or use another optimizer"),
        *(
            (part, "train.lookahead: schedule-free optimizers average weights themselves: take lookahead out")
            for part in (ScheduleFreeSgd(), ScheduleFreeAdamW())
        ),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_lookahead_is_refused_where_it_would_do_harm(part: Any, message: str) -> None:
    with pytest.raises(DloptError) as caught:
        Lookahead().wrap(part.build([nn.Parameter(torch.ones(2))]))
    assert str(caught.value) == message


def test_centralized_gradients_have_mean_0_for_every_unit_and_vectors_stay() -> None:
    shapes = [(3, 5), (4, 2, 3, 3), (6,), ()]
    parameters = [nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in shapes]
    without = nn.Parameter(torch.zeros(2, 2))
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, dtype=torch.float64) + 2
    before = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
    centralize([*parameters, without])
    for parameter, old in zip(parameters, before, strict=True):
        assert parameter.grad is not None
        if parameter.dim() < 2:
            assert torch.equal(parameter.grad, old)
            continue
        for unit, other in zip(parameter.grad.flatten(1), old.flatten(1), strict=True):
            torch.testing.assert_close(unit, other - sum(other.tolist()) / len(other), rtol=0, atol=1e-14)
    assert without.grad is None
