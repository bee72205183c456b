"""Averages of the weights against their formulas, and batch norm statistics made anew."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from dlopt.models.norms import BatchNorm
from dlopt.optim.averages import Average, Averaging, Ema, Swa, reestimate
from dlopt.optim.schedules import Course, Span

COURSE = Course(steps=100, epoch=20, batch=32)


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).to(dtype)


def trained(net: nn.Module, average: Average, steps: int, first: int = 1) -> Iterator[dict[str, Tensor]]:
    """The state after each step, of which the average has been told."""
    dtype = next(net.parameters()).dtype
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        net(torch.randn(16, 6, generator=generator, dtype=dtype)).square().sum().backward()
        with torch.no_grad():
            for parameter in net.parameters():
                parameter -= 0.01 * parameter.grad
        net.zero_grad()
        average.update(step)
        yield {name: value.clone() for name, value in net.state_dict().items()}


def near(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-12) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=rtol, atol=1e-14)


def held(average: Average, net: nn.Module) -> dict[str, Tensor]:
    """What the network holds within `swapped`."""
    with average.swapped():
        return {name: value.clone() for name, value in net.state_dict().items()}


@pytest.mark.parametrize("warmup", [False, True])
def test_an_exponential_average_follows_its_formula(warmup: bool) -> None:
    net = network()
    average = Ema(decay=0.9, warmup=warmup).build(net, COURSE)
    expected = {name: value.clone().double() for name, value in net.state_dict().items()}
    for update, state in enumerate(trained(net, average, 40)):
        decay = min(0.9, (1 + update) / (10 + update)) if warmup else 0.9
        expected = {name: decay * mean + (1 - decay) * state[name] for name, mean in expected.items()}
        expected["1.num_batches_tracked"] = state["1.num_batches_tracked"]
        near(average.state_dict(), expected)
    assert Ema(decay=0.9, warmup=True).decay_after(10_000) == 0.9
    assert average.state_dict()["updates"] == 40


def test_a_stochastic_average_is_the_mean_at_its_moments() -> None:
    net = network()
    average = Swa(start=Span(share=0.5), every=Span(steps=15)).build(net, COURSE)
    states = dict(enumerate(trained(net, average, 100), start=1))
    moments = [50, 65, 80, 95]
    near(average.state_dict(), {name: torch.stack([states[step][name] for step in moments]).mean(dim=0) for name in ("0.weight", "3.bias")})
    near(average.state_dict(), {"1.running_var": torch.stack([states[step]["1.running_var"] for step in moments]).mean(dim=0)})
    assert average.state_dict()["1.num_batches_tracked"].item() == 95
    assert average.state_dict()["updates"] == 4


@pytest.mark.parametrize(
    ("start", "every", "moments"),
    [
        ({"share": 0.75}, {"epochs": 1}, [75, 95]),
        ({"share": 0.7}, {"share": 0.1}, [70, 80, 90, 100]),  # 0.7 * 100 is a little less than 70, 0.1 * 100 a little more than 10
        ({"epochs": 4.5}, {"steps": 2.5}, [90, 93, 95, 98, 100]),
        ({"steps": 97}, {"steps": 0}, [97, 98, 99, 100]),
        ({"steps": 0}, {"steps": 40}, [1, 41, 81]),
        ({"share": 1}, {"epochs": 1}, [100]),
        ({"steps": 101}, {"epochs": 1}, []),
    ],
)
def test_moments_come_where_the_spans_say(start: dict[str, float], every: dict[str, float], moments: list[int]) -> None:
    average = Swa(start=Span(**start), every=Span(**every)).build(network(), COURSE)
    found = []
    for step in range(1, 101):
        before = average.updates
        average.update(step)
        found += [step] if average.updates > before else []
    assert found == moments
    assert average.started == bool(moments)


@pytest.mark.parametrize("part", [Ema(decay=0.9), Swa(start=Span(share=0.2), every=Span(steps=7))], ids=["ema", "swa"])
def test_an_average_that_is_saved_and_loaded_goes_on_to_the_same_bits(part: Any) -> None:
    net, other = network(torch.float32), network(torch.float32)
    whole, first = part.build(net, COURSE), part.build(other, COURSE)
    list(trained(net, whole, 60))
    list(trained(other, first, 31))
    saved = copy.deepcopy(first.state_dict())
    again = part.build(other, COURSE)
    again.load_state_dict(saved)
    list(trained(other, again, 29, first=32))
    assert whole.state_dict().keys() == again.state_dict().keys()
    assert all(torch.equal(torch.as_tensor(value), torch.as_tensor(again.state_dict()[name])) for name, value in whole.state_dict().items())


@pytest.mark.parametrize("part", [Ema(decay=0.9), Swa(start=Span(share=0.2), every=Span(steps=7))], ids=["ema", "swa"])
def test_the_network_holds_the_average_for_a_while_and_then_what_it_held(part: Any) -> None:
    net = network(torch.float32)
    average = part.build(net, COURSE)
    *_, last = trained(net, average, 40)
    inside = held(average, net)
    assert all(torch.equal(value, average.state_dict()[name]) for name, value in inside.items())
    assert not torch.equal(inside["0.weight"], last["0.weight"])
    assert not torch.equal(inside["1.running_mean"], last["1.running_mean"])
    with pytest.raises(RuntimeError, match="in between"), average.swapped():
        raise RuntimeError("in between")
    assert all(torch.equal(value, last[name]) for name, value in net.state_dict().items())


def test_an_average_that_has_not_started_leaves_the_network_alone() -> None:
    net = network()
    average = Swa(start=Span(share=0.9)).build(net, COURSE)
    *_, last = trained(net, average, 40)
    assert not average.started
    assert all(torch.equal(value, last[name]) for name, value in held(average, net).items())


def test_what_does_not_change_stays_to_the_bit() -> None:
    net = nn.Linear(3, 3)
    net.register_buffer("scale", torch.tensor([1 / 255, 0.1, 1 / 3]))
    for part in (Ema(decay=0.97), Swa(start=Span(steps=0), every=Span(steps=1))):
        average = part.build(net, COURSE)
        for step in range(1, 60):
            average.update(step)
        assert all(torch.equal(average.state_dict()[name], value) for name, value in net.state_dict().items())


def test_the_memory_format_of_a_weight_stays() -> None:
    net = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    average = Ema().build(net, COURSE)
    average.update(1)
    assert average.state_dict()["weight"].is_contiguous(memory_format=torch.channels_last)


def test_averages_are_chosen_by_kind() -> None:
    adapter = TypeAdapter(Averaging)
    assert adapter.validate_python({"kind": "ema", "decay": 0.99}) == Ema(decay=0.99)
    assert adapter.validate_python({"kind": "swa", "start": {"share": 0.8}, "every": 2}) == Swa(start=Span(share=0.8), every=Span(epochs=2))


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, BatchNorm], ids=["torch", "ours"])
def test_statistics_made_anew_are_those_of_all_rows(norm: Any) -> None:
    torch.manual_seed(3)
    rows = torch.randn(50, 6, dtype=torch.float64) * 3 + 100
    net = nn.Sequential(nn.Dropout(0.5), norm(6), nn.Linear(6, 3)).double()
    net.train()
    list(trained_statistics(net))
    reestimate(net, rows.split(8))  # the last has two rows
    torch.testing.assert_close(net[1].running_mean, rows.mean(dim=0), rtol=1e-12, atol=0)
    torch.testing.assert_close(net[1].running_var, rows.var(dim=0), rtol=1e-12, atol=0)


def trained_statistics(net: nn.Module) -> Iterator[Tensor]:
    """Other statistics than those to be found."""
    for _ in range(3):
        yield net(torch.randn(10, 6, dtype=torch.float64))


def test_statistics_of_images_and_of_later_layers_are_of_what_comes_into_them() -> None:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.BatchNorm2d(2)).double()
    images = torch.randn(12, 1, 8, 8, dtype=torch.float64)
    reestimate(net, [images])  # one batch: it is normalised by the statistics that are found
    first = net[0](images)
    second = net[3](net[2](nn.functional.batch_norm(first, None, None, net[1].weight, net[1].bias, training=True)))
    for layer, values in ((net[1], first), (net[4], second)):
        torch.testing.assert_close(layer.running_mean, values.mean(dim=(0, 2, 3)), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(layer.running_var, values.transpose(0, 1).flatten(1).var(dim=1), rtol=1e-10, atol=0)


def test_modes_and_momenta_are_as_they_were_and_weights_untouched() -> None:
    net = network()
    net.train()
    net[0].eval()
    before = {name: value.clone() for name, value in net.state_dict().items() if "running" not in name and "num" not in name}
    reestimate(net, [torch.randn(9, 6, dtype=torch.float64)])
    assert [layer.training for layer in net] == [False, True, True, True]
    assert net[1].momentum == 0.1
    assert len(net[1]._forward_pre_hooks) == 0
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())


def test_a_network_without_batch_norm_asks_for_no_batches() -> None:
    def batches() -> Iterator[Tensor]:
        raise AssertionError("asked")
        yield

    reestimate(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)), batches())
