"""Gradients added up in buckets: the sums, what some or all workers have not used, and when an exchange begins."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dlopt.train.parallel import reducer
from dlopt.train.parallel.reducer import Bucket, Finish, Reducer, bucketed
from tests.processes import together


def summed(bucket: Bucket) -> Finish:
    work = dist.all_reduce(bucket.flat, async_op=True)
    assert work is not None
    return work.wait


class Apart(nn.Module):
    """Layers of which worker 0 uses the first and the last, worker 1 all but one, which nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.some, self.none, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(2, 2), nn.Conv2d(4, 2, 1)
        self.last.to(memory_format=torch.channels_last)
        self.double()

    def forward(self, inputs: Tensor, all_of_them: bool) -> Tensor:
        values = torch.tanh(self.first(inputs))
        values = self.some(values) if all_of_them else values
        return self.last(values[:, :, None, None]).square().sum()  # type: ignore[no-any-return]


def inputs_of(rank: int, step: int) -> Tensor:
    return torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(10 * step + rank))


def _added(rank: int, world: int, folder: Path) -> None:
    network, alone = Apart(), [Apart() for _ in range(world)]
    with mock.patch.object(reducer, "BYTES", 100):
        added = Reducer(list(network.parameters()), summed)
    assert len(added.buckets) == 3
    for step in range(3):
        for parameter in network.parameters():
            parameter.grad = None
        with added.collecting():
            network(inputs_of(rank, step), rank == 1).backward()
        network(inputs_of(rank, step + 7), rank == 1).backward()
        added.finish()
        for one, its in enumerate(alone):
            its.zero_grad()
            for part in (step, step + 7):
                its(inputs_of(one, part), one == 1).backward()
        for name, parameter in network.named_parameters():
            whole = [dict(its.named_parameters())[name].grad for its in alone]
            there = [value for value in whole if value is not None]
            if not there:
                assert parameter.grad is None and name.startswith("none")
                continue
            assert parameter.grad is not None and parameter.grad.stride() == parameter.stride()
            torch.testing.assert_close(parameter.grad, torch.stack(there).sum(dim=0), rtol=1e-12, atol=1e-14)


def test_gradients_are_added_up_also_of_what_a_worker_has_not_used(tmp_path: Path) -> None:
    together(2, _added, tmp_path)


@pytest.fixture
def begun() -> tuple[list[int], Callable[[Bucket], Finish]]:
    """Buckets, by their place, as their exchange begins."""
    seen: list[int] = []

    def exchange(bucket: Bucket) -> Finish:
        seen.append(bucket.gradients[0].numel())
        return lambda: None

    return seen, exchange


def test_an_exchange_begins_while_the_way_back_goes_on_and_always_in_the_same_order(
    begun: tuple[list[int], Callable[[Bucket], Finish]],
) -> None:
    seen, exchange = begun
    layers = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 4, bias=False), nn.Linear(4, 5, bias=False))
    with mock.patch.object(reducer, "BYTES", 1):
        added = Reducer(list(layers.parameters()), exchange)
    before: list[list[int]] = []
    layers[0].weight.register_hook(lambda _: before.append(list(seen)))
    layers(torch.ones(1, 2)).sum().backward()
    added.finish()
    assert before == [[20, 12]] and seen == [20, 12, 6]
    layers[1](torch.ones(1, 3)).sum().backward()  # the last one has no part in it
    assert seen == [20, 12, 6]
    added.finish()
    assert seen == [20, 12, 6] * 2


def test_a_bucket_has_numbers_of_one_type() -> None:
    parameters = [nn.Parameter(torch.zeros(2, dtype=dtype)) for dtype in (torch.float32, torch.float32, torch.float64, torch.float32)]
    assert [[id(one) for one in bucket] for bucket in bucketed(parameters)] == [
        [id(parameters[0]), id(parameters[1])], [id(parameters[2])], [id(parameters[3])]
    ]  # fmt: skip
