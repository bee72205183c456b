"""zero: weights on each worker, the state of the optimizer shared out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import Parameter

from dlopt.train.checkpoint.packing import pack, unpack
from dlopt.train.parallel.ddp import DDP
from dlopt.train.parallel.exchange import broadcast, collected


class Zero(DDP):
    """zero: the state of the optimizer is shared out by parameters."""

    gathers = ("optimizer",)

    def optimizer(self, built: torch.optim.Optimizer) -> torch.optim.Optimizer:
        parameters = [parameter for group in built.param_groups for parameter in group["params"]]
        self.owners = owners([parameter.numel() for parameter in parameters], self.world)
        kind = ZeroScheduleFree if hasattr(built, "eval") else ZeroOptimizer
        return kind(built, self.owners, self.rank)

    def whole(self, part: str, held: dict[str, Any]) -> dict[str, Any]:
        if part != "optimizer":
            return held
        tensors, rest = pack(self.mine(part, held)["state"], copied=self.rank == 0)
        rests: list[Any] = [None] * self.world
        dist.all_gather_object(rests, rest)
        everyones = collected(tensors, self.rank, self.world, next(self.network.parameters()).device)
        states: dict[int, Any] = {}
        for its, said in zip(everyones, rests, strict=False):
            states |= unpack(its, said)
        others = pack({key: value for key, value in held.items() if key != "state"}, copied=True)
        return unpack(*others) | {"state": dict(sorted(states.items()))}

    def mine(self, part: str, whole: dict[str, Any]) -> dict[str, Any]:
        if part != "optimizer":
            return whole
        return whole | {"state": {index: state for index, state in whole["state"].items() if self.owners[index] == self.rank}}


class ZeroOptimizer(torch.optim.Optimizer):
    """An optimizer of which each worker steps the parameters that it owns, and then gets all others from their owners."""

    def __init__(self, inner: torch.optim.Optimizer, owned_by: Sequence[int], rank: int) -> None:
        """owned_by: the worker of each parameter, in the order of the groups."""
        self.inner = inner
        super().__init__(inner.param_groups, {})
        self._share()
        owned = list(zip(owned_by, self._parameters(), strict=True))
        self.owned = [[parameter for owner, parameter in owned if owner == one] for one in range(max(owned_by) + 1)]
        self.others = [parameter for owner, parameter in owned if owner != rank]
        self._let_go()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        gradients = [parameter.grad for parameter in self.others]
        for parameter in self.others:
            parameter.grad = None  # which all optimizers take for none of their business
        self.inner.step()
        for parameter, gradient in zip(self.others, gradients, strict=True):
            parameter.grad = gradient
        self._let_go()
        self._exchange()

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.inner.load_state_dict(state_dict)
        self._share()

    def _let_go(self) -> None:
        for parameter in self.others:
            self.inner.state.pop(parameter, None)

    def _exchange(self) -> None:
        for owner, parameters in enumerate(self.owned):
            broadcast(parameters, owner)

    def _share(self) -> None:
        self.param_groups, self.state = self.inner.param_groups, self.inner.state

    def _parameters(self) -> list[Parameter]:
        return [parameter for group in self.inner.param_groups for parameter in group["params"]]


class ZeroScheduleFree(ZeroOptimizer):
    """Of a schedule-free optimizer, whose weights in training are not those of its result."""

    inner: Any

    @torch.no_grad()
    def eval(self) -> None:
        self.inner.eval()
        self._let_go()  # what it has asked for, and so made empty
        self._exchange()

    @torch.no_grad()
    def train(self) -> None:
        self.inner.train()
        self._let_go()
        self._exchange()


def owners(sizes: Sequence[int], world: int) -> list[int]:
    """A worker for each parameter, so that all have about as many numbers: the largest first, each to who has the fewest so far."""
    chosen, held = [0] * len(sizes), [0] * world
    for place in sorted(range(len(sizes)), key=lambda place: -sizes[place]):
        chosen[place] = held.index(min(held))
        held[chosen[place]] += sizes[place]
    return chosen
