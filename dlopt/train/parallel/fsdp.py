"""fsdp: weights, gradients and the state of the optimizer shared out, by torch's `fully_shard`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
from dlopt.train.parallel.agreement import agreed
from dlopt.train.parallel.base import Groups, Parallel
from dlopt.train.parallel.exchange import broadcast, collected

LEAST_BLOCK, LARGE = 1 / 64, 1 / 4
"""The share of all weights that makes a block worth gathering by itself, and that from which on it is divided further."""
CPU = torch.device("cpu")
BY_ROWS = ("model", "best", "average", "optimizer")
"""Parts of a training's state of which each worker holds rows."""


class FSDP(Parallel):
    """fsdp: the rows of each parameter are shared out, so many to each worker; the last ones may have fewer, or none.

    Optimizer, clipping and averages work on plain tensors of this worker's rows, which lie where torch's `fully_shard` has them.
    """

    local: ShardedNetwork

    in_step = True

    def __init__(self, network: nn.Module, rank: int, world: int, custom: bool = False, device: torch.device = CPU) -> None:
        """network: on worker 0 with its weights, on the host, or on all without; buffers are alike. device: where rows are to lie."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard

        super().__init__(network, rank, world)
        refuse_single_numbers(network)
        self.device, self.names, apart = device, list(network.state_dict()), custom or tied(network)
        given = {name: parameter.data for name, parameter in network.named_parameters()} if rank == 0 else {}
        with_weights = [bool(given) and not any(value.is_meta for value in given.values())]
        dist.broadcast_object_list(with_weights, src=0)
        let_go(network)
        mesh = init_device_mesh(device.type, (world,))
        for part in [*([] if apart else blocks(network)), network]:
            fully_shard(part, mesh=mesh)
        network._apply(lambda value: torch.empty_like(value, device=device) if value.is_meta else value.to(device))
        self.units = [module for module in network.modules() if isinstance(module, FSDPModule)]
        for unit in self.units:
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
        self.local = ShardedNetwork(network, self.names)
        if with_weights[0]:
            self._hand_out(given)
        broadcast([buffer for buffer in network.buffers() if buffer.numel()], 0)

    @torch.no_grad()
    def _hand_out(self, given: dict[str, Tensor]) -> None:
        """The rows of each weight of worker 0, one after the other, so that nobody else ever has it whole."""
        for name, share in self.local.named_parameters():
            if self.rank == 0:
                for other in range(1, self.world):
                    if len(rows := self._rows(given[name], other)):
                        dist.send(rows.to(self.device), other)
                share.copy_(self._rows(given[name]))
            elif share.numel():
                rows = torch.empty_like(share)
                dist.recv(rows, 0)
                share.copy_(rows)

    @property
    def copies(self) -> int:
        return 1

    @property
    def writes(self) -> bool:
        return True

    def module(self) -> nn.Module:
        return self.local

    def groups(self, groups: Groups) -> Groups:
        self.local.freeze()
        return [group | {"params": [self.share(parameter) for parameter in group["params"]]} for group in groups]

    def gradient(self, inner: Gradient) -> Gradient:
        def gradient(objective: Objective, model: nn.Module, batch: Batch) -> Losses:
            losses = inner(objective, model, batch)
            self.local.take_gradients()
            return losses

        return gradient

    def norms(self, held: Tensor) -> Tensor:
        squares = held.detach().double().square()  # of a float32, which may be too large for one
        dist.all_reduce(squares)
        return squares.sqrt().to(held.dtype)

    def share(self, parameter: Parameter) -> Parameter:
        return self.local.of[parameter]

    def all(self, here: bool) -> bool:
        return agreed(here, self.world, self.device)

    def alike(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.local.state_dict().items() if name not in self.local.shards}

    def mine(self, part: str, whole: dict[str, Any]) -> dict[str, Any]:
        if part == "optimizer":  # what has dimensions is of a weight each
            tensors, rest = pack(whole)
            return unpack({name: self._rows(value) if value.dim() else value for name, value in tensors.items()}, rest)
        if part not in BY_ROWS:
            return whole
        return {name: self._rows(value) if name in self.local.shards else value for name, value in whole.items()}

    def rows(self, part: str, tensors: Mapping[str, Tensor]) -> dict[str, int]:
        if part not in BY_ROWS:
            return {}
        there = {name: value.dim() > 0 if part == "optimizer" else name in self.local.shards for name, value in tensors.items()}
        return {name: len(value) for name, value in tensors.items() if there[name]}

    def gather(self, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        mine = {name: value for name, value in held.items() if name in self.local.shards}
        parts = collected(mine, self.rank, self.world, self.device)
        return dict(held) | {name: torch.cat([part[name] for part in parts]) for name in (parts[0] if parts else ())}

    def _rows(self, whole: Tensor, rank: int | None = None) -> Tensor:
        """A copy, so that the whole need not stay."""
        most, rank = -(-len(whole) // self.world), self.rank if rank is None else rank
        return whole[rank * most : (rank + 1) * most].clone(memory_format=torch.contiguous_format)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """A block's weights are gathered when it is computed, as in training, and all are let go of in the end."""
        try:
            yield
        finally:
            for unit in self.units:
                unit.reshard()


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
                gradient = parameter.grad.to_local()  # type: ignore[attr-defined]
                share.grad = gradient if share.grad is None else share.grad + gradient
                parameter.grad = None


@contextmanager
def without_weights() -> Iterator[None]:
    """Within it, modules are built with parameters that have a shape and no memory; buffers are as ever."""
    original = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: Parameter | None) -> None:
        original(self, name, param if param is None or param.is_meta else _empty(param))

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def let_go(network: nn.Module) -> None:
    """Put parameters without memory in place of those of a network; what two layers have in common stays so."""
    known: dict[Parameter, Parameter] = {}
    for module in list(network.modules()):
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                setattr(module, name, known.setdefault(parameter, _empty(parameter)))


def _empty(parameter: Parameter) -> Parameter:
    return Parameter(torch.empty(parameter.shape, dtype=parameter.dtype, device="meta"), parameter.requires_grad)


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
