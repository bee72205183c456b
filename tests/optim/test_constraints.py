"""Clipping and the largest norm of weights, against their formulas computed unit by unit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from dlopt.optim.constraints import Clip, ClipAdaptive, ClipNorm, ClipValue, MaxNorm, clip_adaptive, clip_value, unit_norms, weights


class Net(nn.Module):
    """A parameter of every shape that there is."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.token = nn.Parameter(torch.randn(1, 1, 6) * 9)
        self.convolution, self.norm = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)
        self.table, self.attention = nn.Embedding(5, 6), nn.MultiheadAttention(6, 2)
        self.hidden, self.head = nn.Linear(16, 5), nn.Linear(5, 3)
        self.double()


def network(seed: int = 2, size: float = 1.0) -> Net:
    """With gradients of about this size."""
    net = Net()
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.grad = size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return net


def gradients(net: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in net.named_parameters() if parameter.grad is not None}


def total(found: dict[str, Tensor]) -> Tensor:
    return torch.stack([gradient.norm() for gradient in found.values()]).norm()


def apply(clip: Any, net: nn.Module) -> None:
    clip.apply(list(net.parameters()), total(gradients(net)))


@pytest.mark.parametrize(("limit", "scaled"), [(0.5, True), (1e6, False)])
def test_a_gradient_that_is_too_long_is_scaled_to_the_limit_and_another_is_left_alone(limit: float, scaled: bool) -> None:
    net, clip = network(), ClipNorm(limit=limit)
    before = gradients(net)
    apply(clip, net)
    factor = limit / (total(before).item() + 1e-6) if scaled else 1.0
    assert clip.factor(total(before).item()) == pytest.approx(factor, rel=1e-12)
    for name, gradient in gradients(net).items():
        torch.testing.assert_close(gradient, before[name] * factor, rtol=1e-12, atol=0)
    assert (total(gradients(net)) < limit).item()


def test_clipping_by_norm_is_that_of_torch() -> None:
    ours, other = network(), network()
    apply(ClipNorm(limit=0.1), ours)
    nn.utils.clip_grad_norm_(other.parameters(), 0.1)
    for mine, theirs in zip(ours.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-12, atol=0)


def test_every_entry_is_brought_within_the_limit() -> None:
    net, part = network(), ClipValue(limit=0.3)
    before = gradients(net)
    apply(part, net)
    for name, gradient in gradients(net).items():
        assert torch.equal(gradient, before[name].clamp(-0.3, 0.3))
    assert part.factor(100.0) == 1.0
    clip_value(net.parameters(), 0.1)
    assert max(gradient.abs().max().item() for gradient in gradients(net).values()) == 0.1


def adapted(weight: Tensor, gradient: Tensor, factor: float, eps: float) -> Tensor:
    """Brock et al. 2021, equation 3, a unit after the other."""
    if weight.dim() <= 1:
        most = factor * max(weight.norm().item(), eps)
        return gradient * min(1.0, most / gradient.norm().item())
    found = gradient.clone()
    for unit in range(len(weight)):
        most = factor * max(weight[unit].norm().item(), eps)
        if gradient[unit].norm().item() > most:
            found[unit] = gradient[unit] * most / gradient[unit].norm()
    return found


@pytest.mark.parametrize("last", [False, True])
def test_the_gradient_of_each_unit_is_clipped_by_its_weights_but_for_the_last_layer(last: bool) -> None:
    net = network(size=0.02)
    before, values = gradients(net), {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    apply(ClipAdaptive(limit=0.05, eps=1e-3, last=last), net)
    clipped = 0
    for name, gradient in gradients(net).items():
        left_alone = name.startswith("head.") and not last
        expected = before[name] if left_alone else adapted(values[name], before[name], 0.05, 1e-3)
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=0)
        clipped += not torch.equal(gradient, before[name])
    assert 4 < clipped < len(before) + last  # some units had a gradient that was small enough


def test_weights_that_start_at_zero_can_leave_it() -> None:
    weight = nn.Parameter(torch.zeros(2, 3, dtype=torch.float64))
    weight.grad = torch.tensor([[3.0, 0.0, 4.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    clip_adaptive([weight], factor=0.1, eps=0.01)
    torch.testing.assert_close(weight.grad, torch.tensor([[0.0006, 0.0, 0.0008], [0.0, 0.0, 0.0]], dtype=torch.float64), rtol=1e-12, atol=0)


def test_what_has_no_gradient_is_passed_over() -> None:
    net = network()
    net.hidden.weight.grad = None
    for clip in (ClipNorm(limit=0.1), ClipValue(limit=0.1), ClipAdaptive()):
        apply(clip, net)
    assert net.hidden.weight.grad is None


def test_a_norm_that_is_not_finite_stays_to_be_seen() -> None:
    net = network()
    ClipNorm().apply(list(net.parameters()), torch.tensor(math.nan, dtype=torch.float64))
    assert total(gradients(net)).isnan()


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"kind": "norm", "limit": 2}, ClipNorm(limit=2.0)),
        ({"kind": "value"}, ClipValue(limit=0.5)),
        ({"kind": "adaptive", "limit": 0.1}, ClipAdaptive(limit=0.1)),
    ],
)
def test_clipping_is_chosen_by_kind(given: dict[str, Any], part: Any) -> None:
    assert TypeAdapter(Clip).validate_python(given) == part


@pytest.mark.parametrize("given", [{"kind": "norm", "limit": 0}, {"kind": "value", "limit": -1}, {"kind": "median"}])
def test_limits_that_are_none_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(Clip).validate_python(given)


def test_the_weights_of_each_unit_are_held_to_the_norm_and_nothing_else_is() -> None:
    net = network()
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    MaxNorm(limit=0.9).apply(net)
    touched = {
        "convolution.weight",
        "table.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "hidden.weight",
        "head.weight",
    }
    for name, parameter in net.named_parameters():
        if name not in touched:
            assert torch.equal(parameter, before[name]), name
            continue
        for now, was in zip(parameter, before[name], strict=True):
            expected = was * min(1.0, 0.9 / was.norm().item())
            torch.testing.assert_close(now, expected, rtol=1e-12, atol=0)
    assert unit_norms(net.table.weight).max().item() == pytest.approx(0.9, rel=1e-12)
    assert any(torch.equal(net.head.weight[unit], before["head.weight"][unit]) for unit in range(3))  # one that was short enough


def test_what_is_frozen_is_not_held() -> None:
    net = network()
    net.hidden.weight.requires_grad_(False)
    before = net.hidden.weight.clone()
    MaxNorm(limit=0.01).apply(net)
    assert torch.equal(net.hidden.weight, before)
    assert len(weights(net)) == 5
