"""fsdp: weights, gradients and the state of the optimizer shared out, by torch's `fully_shard`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter

from dlopt.data.feed.batches import Batch
from dlopt.part import DloptError
from dlopt.train.checkpoint.packing import pack, unpack
from dlopt.train.loop.gradients import Gradient
from dlopt.train.loop.objectives import Losses, Objective
from dlopt.train.parallel.base import Groups, OptimizerState, Parallel
from dlopt.train.parallel.exchange import broadcast, collected

LEAST_BLOCK, LARGE = 1 / 64, 1 / 4
"""The share of all weights that makes a block worth gathering by itself, and that from which on it is divided further."""


class FSDP(Parallel):
    """fsdp: the rows of each parameter are shared out, so many to each worker; the last ones may have fewer, or none.

    Optimizer, clipping and averages work on plain tensors of this worker's rows, which lie where torch's `fully_shard` has them.
    """

    held: ShardedNetwork

    def __init__(self, network: nn.Module, rank: int, world: int, custom: bool = False) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard

        super().__init__(network, rank, world)
        parameters, self.names = list(network.parameters()), list(network.state_dict())
        refuse_single_numbers(network)
        for parameter in parameters:
            parameter.data = parameter.data.contiguous()
        broadcast(parameters, 0)
        self.device = parameters[0].device
        mesh = init_device_mesh(self.device.type, (world,))
        for part in [*([] if custom or tied(network) else blocks(network)), network]:
            fully_shard(part, mesh=mesh)
        self.units = [module for module in network.modules() if isinstance(module, FSDPModule)]
        for unit in self.units:
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
        self.held = ShardedNetwork(network, self.names)

    @property
    def copies(self) -> int:
        return 1

    @property
    def writes(self) -> bool:
        return True

    def module(self) -> nn.Module:
        return self.held

    def groups(self, groups: Groups) -> Groups:
        self.held.freeze()
        return [group | {"params": [self.share(parameter) for parameter in group["params"]]} for group in groups]

    def gradient(self, inner: Gradient) -> Gradient:
        def gradient(objective: Objective, model: nn.Module, batch: Batch) -> Losses:
            losses = inner(objective, model, batch)
            self.held.take_gradients()
            return losses

        return gradient

    def norms(self, held: Tensor) -> Tensor:
        squares = held.detach().double().square()  # of a float32, which may be too large for one
        dist.all_reduce(squares)
        return squares.sqrt().to(held.dtype)

    def share(self, parameter: Parameter) -> Parameter:
        return self.held.of[parameter]

    def all(self, here: bool) -> bool:
        found = torch.tensor(int(here), device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MIN)
        return bool(found)

    def alike(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.held.state_dict().items() if name not in self.held.shards}

    def whole(self, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(held) | self._together({name: value for name, value in held.items() if name in self.held.shards})

    def mine(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self._rows(value) if name in self.held.shards else value for name, value in whole.items()}

    def whole_state(self, held: OptimizerState) -> OptimizerState:
        """What has dimensions is of a weight each: of these rows."""
        tensors, rest = pack(held)
        return unpack(tensors | self._together({name: value for name, value in tensors.items() if value.dim()}), rest)

    def my_state(self, whole: OptimizerState) -> OptimizerState:
        tensors, rest = pack(whole)
        return unpack({name: self._rows(value) if value.dim() else value for name, value in tensors.items()}, rest)

    def _together(self, held: dict[str, Tensor]) -> dict[str, Tensor]:
        parts = collected(held, self.rank, self.world, self.device)
        return {name: torch.cat([part[name] for part in parts]) for name in (parts[0] if parts else ())}

    def _rows(self, whole: Tensor) -> Tensor:
        """A copy, so that the whole need not stay."""
        most = -(-len(whole) // self.world)
        return whole[self.rank * most : (self.rank + 1) * most].clone()

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Each worker has all weights in its memory meanwhile."""
        for unit in self.units:
            unit.unshard()
            unit.set_reshard_after_forward(False, recurse=False)
        try:
            yield
        finally:
            for unit in self.units:
                unit.reshard()
                unit.set_reshard_after_forward(unit is not self.network, recurse=False)

    def alone(self, build: Callable[[], nn.Module]) -> nn.Module:
        return build()


class ShardedNetwork(nn.Module):
    """A network to be called, whose parameters are the rows that this worker holds of the network's."""

    def __init__(self, network: nn.Module, names: Sequence[str]) -> None:
        """network: after `fully_shard`. names: of its state."""
        super().__init__()
        self.network, self.names = network, names
        self.of = {parameter: Parameter(parameter.detach().to_local()) for parameter in network.parameters()}  # type: ignore[attr-defined]
        self.shards = {name: self.of[parameter] for name, parameter in network.named_parameters(remove_duplicate=False)}
        self.freeze()

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        outputs: Tensor = self.network(inputs)
        return outputs

    def named_parameters(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True) -> Iterator[tuple[str, Parameter]]:
        """All of them, by the names of the network's."""
        seen: set[Parameter] = set()
        for name, share in self.shards.items():
            if not (remove_duplicate and share in seen):
                seen.add(share)
                yield (f"{prefix}.{name}" if prefix else name), share

    def state_dict(self, *args: Any, **settings: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """Rows of parameters, and buffers."""
        buffers = dict(self.network.named_buffers())
        return {name: self.shards[name].detach() if name in self.shards else buffers[name] for name in self.names}

    def freeze(self) -> None:
        """What is frozen of the network, is so here."""
        for parameter, share in self.of.items():
            share.requires_grad_(parameter.requires_grad)

    def take_gradients(self) -> None:
        """From the network's parameters, to those of penalties that are here already."""
        for parameter, share in self.of.items():
            if parameter.grad is not None:
                found = parameter.grad.to_local()  # type: ignore[attr-defined]
                share.grad = found if share.grad is None else share.grad + found
                parameter.grad = None


def blocks(network: nn.Module) -> list[nn.Module]:
    """Parts that are called one after the other, elements of lists of layers, each with a good part of the weights."""
    whole = _size(network)
    return [part for part in _elements(network, LARGE * whole) if _size(part) >= LEAST_BLOCK * whole]


def _elements(module: nn.Module, large: float) -> Iterator[nn.Module]:
    lists = (nn.Sequential, nn.ModuleList)
    for child in module.children():
        inner = _elements(child, large)
        if isinstance(module, lists) and not isinstance(child, lists):
            yield from (list(inner) if _size(child) > large else []) or [child]
        else:
            yield from inner


def tied(network: nn.Module) -> bool:
    """Whether two layers have a parameter in common: divided between blocks, each would get its own."""
    return len(list(network.named_parameters(remove_duplicate=False))) > len(list(network.parameters()))


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def refuse_single_numbers(network: nn.Module) -> None:
    """Raises DloptError where a parameter has no rows that could be shared out."""
    for name, parameter in network.named_parameters():
        if parameter.dim() == 0:
            raise DloptError(f"resources.parallelism: fsdp cannot share out {name}, a single number: use ddp or zero, or the shape (1,)")
