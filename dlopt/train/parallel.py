"""Where the numbers of training lie when several workers train one network: one word of a job, and the same curve whichever it is.

| word | weights        | gradients      | optimizer's state | of                                                |
|------|----------------|----------------|-------------------|---------------------------------------------------|
| ddp  | on each worker | on each worker | on each worker    | Li et al. 2020                                    |
| zero | on each worker | on each worker | shared out        | Rajbhandari et al. 2020, its first stage          |
| fsdp | shared out     | shared out     | shared out        | Zhao et al. 2023: a block's weights are gathered  |
|      |                |                |                   | when it is computed, and let go of afterwards     |

A checkpoint is whole whatever the word: worker 0 gathers it, and each takes its share of it again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel

from dlopt.data.feed.batches import Batch
from dlopt.optim.constraints import total_norm
from dlopt.part import DloptError
from dlopt.train.gradients import Gradient
from dlopt.train.neighbour import Neighbour, meet
from dlopt.train.objectives import Losses, Objective
from dlopt.train.packing import pack, unpack

Parallelism = Literal["ddp", "zero", "fsdp"]
Groups = list[dict[str, Any]]
State = dict[str, Any]
"""What an optimizer's `state_dict` gives."""
ACROSS = {"lbfgs", "prodigy"}
"""Optimizers whose state is of all parameters together."""
BY_PARAMETER = {"adafactor", "muon", "lars", "lamb", "soap", "shampoo", "sophia"}
"""Optimizers that look at a parameter as a whole."""
LEAST_BLOCK, LARGE = 1 / 64, 1 / 4
"""The share of all weights that makes a block worth gathering by itself, and that from which on it is divided further."""


class Replicated:
    """ddp: each worker holds everything. Of one worker it is the plain network."""

    exchanged = True
    """Whether gradients are added up as they are."""

    def __init__(self, network: nn.Module, rank: int = 0, world: int = 1, own: bool = False) -> None:
        """own: whether the network is a user's, of whose parts nothing is known."""
        self.network, self.rank, self.world, self.own = network, rank, world, own
        self.held: nn.Module = network
        """Its parameters, by the names of the network's, and its state are what this worker holds."""

    @property
    def factor(self) -> int:
        """What a worker's part of the loss is multiplied with for the way back, so that gradients are those of the sum of all parts."""
        return self.world

    @property
    def copies(self) -> int:
        """How many workers hold each weight."""
        return self.world

    @property
    def together(self) -> int:
        """How many workers compute each batch together, so that they exchange something at each step."""
        return self.world

    def module(self) -> nn.Module:
        """What is called in training. A user's network may leave parameters out of a step, which takes time to find.

        It is looked for with more than two workers, too: only then gradients lie in the same buckets at the first step after a restart as
        later, and on where they lie depends in which order three numbers are added up.
        """
        if self.world == 1:
            return self.network
        seek = self.own or self.world > 2
        found = DistributedDataParallel(self.network, gradient_as_bucket_view=True, broadcast_buffers=False, find_unused_parameters=seek)
        if self.exchanged and self.world == 2 and next(self.network.parameters()).device.type == "cpu":
            size = sum(parameter.nbytes for parameter in self.network.parameters() if parameter.requires_grad)
            other = meet(self.rank, size)
            found.register_comm_hook(other, lambda other, bucket: _averaged(bucket, other))  # torch wants no annotations that are words
        return found

    def groups(self, groups: Groups) -> Groups:
        """Groups of the network's parameters, as the optimizer is given them."""
        return groups

    def optimizer(self, built: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """The optimizer that was built for these groups, as training steps it."""
        return built

    def gradient(self, inner: Gradient) -> Gradient:
        """A gradient function that leaves gradients in the parameters of `held`."""
        return inner

    def batches(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """This worker's shares of batches, as the objective is given them."""
        return batches

    def begin(self, step: int) -> None:
        """A step begins, before which there were `step`."""

    def undo(self) -> None:
        """The step that was begun is left out."""

    def memory(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """On worker 0, what a checkpoint must have beside the state of one worker; on others, anything. All call it at once. Names begin
        with `exchange`, or with `worker` and its rank."""
        return {}

    def recall(self, tensors: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
        """Go on from a checkpoint with these tensors, whose weights and optimizer's state have been restored."""

    def norm(self, gradients: list[Tensor]) -> Tensor:
        """The 2-norm of the whole gradient, the same on all workers. gradients: those of this worker's parameters."""
        return self.norms(total_norm(gradients))

    def norms(self, held: Tensor) -> Tensor:
        """2-norms of what lies on all workers, of those of what this one holds."""
        return held

    def share(self, parameter: Parameter) -> Parameter:
        """What this worker holds of a parameter of the network."""
        return parameter

    def all(self, here: bool) -> bool:
        """Whether it is so on all workers, of which each knows about what it holds."""
        return here

    def alike(self) -> dict[str, Tensor]:
        """What must be the same on all workers."""
        return self.held.state_dict()

    def whole(self, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """On worker 0, what all workers hold by the names of the network's state; on others, anything. All call it at once."""
        return dict(held)

    def mine(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What this worker holds of it."""
        return dict(whole)

    @torch.no_grad()
    def load(self, whole: Mapping[str, Tensor]) -> None:
        """Make these the network's weights and buffers."""
        mine = self.mine(whole)
        for name, value in self.held.state_dict().items():
            value.copy_(mine[name])

    def whole_state(self, held: State) -> State:
        """On worker 0, the state of the optimizer of one worker; on others, anything. All call it at once."""
        return held

    def my_state(self, whole: State) -> State:
        """What this worker holds of it."""
        return whole

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Within it, each worker can call the network, without gradients, as often as it likes."""
        yield

    def alone(self, build: Callable[[], nn.Module]) -> nn.Module:
        """A network that one worker can call without the others, its weights anything. build: makes one."""
        return self.network


def _averaged(bucket: dist.GradBucket, other: Neighbour | None) -> Future[Tensor]:
    """The mean of the gradients of two workers, through memory where they are neighbours. Elsewhere each gets those of the other in one
    message: the same bits as from a ring, which takes several."""
    mine = bucket.buffer()
    if other:
        other.average(mine)
        done = Future[Tensor]()
        done.set_result(mine)
        return done
    both = mine.new_empty(2 * len(mine))
    work = dist.all_gather_into_tensor(both, mine, async_op=True)
    assert work is not None

    def mean(_: Future[list[Tensor]]) -> Tensor:
        return torch.add(both[: len(mine)], both[len(mine) :], out=mine).mul_(0.5)

    return work.get_future().then(mean)


class Summed(Replicated):
    """ddp, whose gradients of a user's network are added up after the way back, all at once. It may leave parameters out of a step, and
    DistributedDataParallel looks for them in what comes out of the network alone, so that it is lost where a penalty reaches them."""

    def __init__(self, network: nn.Module, rank: int, world: int, own: bool = False) -> None:
        super().__init__(network, rank, world, own)
        if own:
            broadcast([value for value in network.state_dict().values() if isinstance(value, Tensor)], 0)

    @property
    def factor(self) -> int:
        return 1 if self.own else self.world

    def module(self) -> nn.Module:
        return self.network if self.own else super().module()

    def gradient(self, inner: Gradient) -> Gradient:
        def gradient(objective: Objective, model: nn.Module, batch: Batch) -> Losses:
            losses = inner(objective, model, batch)
            at_once(self._gradients(), dist.all_reduce)
            return losses

        return gradient if self.own else inner

    def _gradients(self) -> list[Tensor]:
        """Of what any worker has used in this step; 0 where this one has not."""
        parameters = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        there = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.uint8, device=parameters[0].device)
        dist.all_reduce(there, dist.ReduceOp.MAX)
        used = [parameter for parameter, one in zip(parameters, there.tolist(), strict=True) if one]
        for parameter in used:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [parameter.grad for parameter in used if parameter.grad is not None]


class Zero(Summed):
    """zero: the state of the optimizer is shared out by parameters."""

    def optimizer(self, built: torch.optim.Optimizer) -> torch.optim.Optimizer:
        parameters = [parameter for group in built.param_groups for parameter in group["params"]]
        self.owners = owners([parameter.numel() for parameter in parameters], self.world)
        kind = SharedSwapping if hasattr(built, "eval") else Shared
        return kind(built, self.owners, self.rank)

    def whole_state(self, held: State) -> State:
        tensors, rest = pack(self.my_state(held)["state"])
        rests: list[Any] = [None] * self.world
        dist.all_gather_object(rests, rest)
        found: dict[int, Any] = {}
        for part, said in zip(self._collected(tensors), rests, strict=False):
            found |= unpack(part, said)
        return held | {"state": dict(sorted(found.items()))}

    def _collected(self, tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        return collected(tensors, self.rank, self.world, next(self.network.parameters()).device)

    def my_state(self, whole: State) -> State:
        mine = {index: state for index, state in whole["state"].items() if self.owners[index] == self.rank}
        return whole | {"state": mine}


class Shared(torch.optim.Optimizer):
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


class SharedSwapping(Shared):
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


class Sharded(Replicated):
    """fsdp: the rows of each parameter are shared out, so many to each worker; the last ones may have fewer, or none.

    Optimizer, clipping and averages work on plain tensors of this worker's rows, which lie where torch's `fully_shard` has them.
    """

    held: Shares

    def __init__(self, network: nn.Module, rank: int, world: int, own: bool = False) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard

        super().__init__(network, rank, world, own)
        parameters, self.names = list(network.parameters()), list(network.state_dict())
        refuse_single_numbers(network)
        for parameter in parameters:
            parameter.data = parameter.data.contiguous()
        broadcast(parameters, 0)
        self.device = parameters[0].device
        mesh = init_device_mesh(self.device.type, (world,))
        for part in [*([] if own or tied(network) else blocks(network)), network]:
            fully_shard(part, mesh=mesh)
        self.units = [module for module in network.modules() if isinstance(module, FSDPModule)]
        for unit in self.units:
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
        self.held = Shares(network, self.names)

    @property
    def factor(self) -> int:
        return 1

    @property
    def copies(self) -> int:
        return 1

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
        return {name: value for name, value in self.held.state_dict().items() if name not in self.held.own}

    def whole(self, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(held) | self._together({name: value for name, value in held.items() if name in self.held.own})

    def mine(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self._rows(value) if name in self.held.own else value for name, value in whole.items()}

    def whole_state(self, held: State) -> State:
        """What has dimensions is of a weight each: of these rows."""
        tensors, rest = pack(held)
        return unpack(tensors | self._together({name: value for name, value in tensors.items() if value.dim()}), rest)

    def my_state(self, whole: State) -> State:
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


class Shares(nn.Module):
    """A network to be called, whose parameters are the rows that this worker holds of the network's."""

    def __init__(self, network: nn.Module, names: Sequence[str]) -> None:
        """network: after `fully_shard`. names: of its state."""
        super().__init__()
        self.network, self.names = network, names
        self.of = {parameter: Parameter(parameter.detach().to_local()) for parameter in network.parameters()}  # type: ignore[attr-defined]
        self.own = {name: self.of[parameter] for name, parameter in network.named_parameters(remove_duplicate=False)}
        self.freeze()

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        outputs: Tensor = self.network(inputs)
        return outputs

    def named_parameters(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True) -> Iterator[tuple[str, Parameter]]:
        """All of them, by the names of the network's."""
        seen: set[Parameter] = set()
        for name, share in self.own.items():
            if not (remove_duplicate and share in seen):
                seen.add(share)
                yield (f"{prefix}.{name}" if prefix else name), share

    def state_dict(self, *args: Any, **settings: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """Rows of parameters, and buffers."""
        buffers = dict(self.network.named_buffers())
        return {name: self.own[name].detach() if name in self.own else buffers[name] for name in self.names}

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


def parallel_of(kind: Parallelism, network: nn.Module, rank: int, world: int, own: bool = False) -> Replicated:
    """The network of a job on several workers, or on one. own: whether it is a user's, of whose parts nothing is known."""
    made = Replicated if world == 1 else {"ddp": Summed, "zero": Zero, "fsdp": Sharded}[kind]
    return made(network, rank, world, own)


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


def owners(sizes: Sequence[int], world: int) -> list[int]:
    """A worker for each parameter, so that all have about as many numbers: the largest first, each to who has the fewest so far."""
    found, held = [0] * len(sizes), [0] * world
    for place in sorted(range(len(sizes)), key=lambda place: -sizes[place]):
        found[place] = held.index(min(held))
        held[found[place]] += sizes[place]
    return found


def broadcast(tensors: Sequence[Tensor], source: int) -> None:
    """From one worker to all, in place."""
    at_once(tensors, lambda flat: dist.broadcast(flat, source))


@torch.no_grad()
def at_once(tensors: Sequence[Tensor], exchange: Callable[[Tensor], Any]) -> None:
    """Exchange them in place, those of a type as one tensor (numbers,)."""
    for dtype in sorted({tensor.dtype for tensor in tensors}, key=str):
        some = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in some])
        exchange(flat)
        found = flat.split([tensor.numel() for tensor in some])
        torch._foreach_copy_(some, [part.view(tensor.shape) for part, tensor in zip(found, some, strict=True)])


def collected(tensors: Mapping[str, Tensor], rank: int, world: int, device: torch.device) -> list[dict[str, Tensor]]:
    """On worker 0, the tensors of each worker, on the CPU; on the others, nothing. One after the other crosses over, so that nobody needs
    the memory of all. device: through whose memory."""
    told: list[Any] = [None] * world
    dist.all_gather_object(told, [(name, tuple(value.shape), value.dtype) for name, value in tensors.items()])
    if rank:
        for value in tensors.values():
            if value.numel():
                dist.send(value.detach().to(device).contiguous().reshape(-1).view(torch.uint8), 0)
        return []
    mine = {name: value.detach().cpu() for name, value in tensors.items()}
    return [mine, *({name: _received(shape, dtype, source, device) for name, shape, dtype in told[source]} for source in range(1, world))]


def _received(shape: tuple[int, ...], dtype: torch.dtype, source: int, device: torch.device) -> Tensor:
    found = torch.empty(shape, dtype=dtype, device=device)
    if found.numel():
        dist.recv(found.view(-1).view(torch.uint8), source)
    return found.cpu()


def refuse_single_numbers(network: nn.Module) -> None:
    """Raises DloptError where a parameter has no rows that could be shared out."""
    for name, parameter in network.named_parameters():
        if parameter.dim() == 0:
            raise DloptError(f"resources.parallelism: fsdp cannot share out {name}, a single number: use ddp or zero, or the shape (1,)")


def refuse_parallelism(kind: Parallelism, optimizer: str) -> None:
    """Raises DloptError where workers cannot share out the state of an optimizer, by its kind."""
    if kind != "ddp" and optimizer in ACROSS:
        raise DloptError(f"resources.parallelism: {kind} cannot shard the state of optimizer {optimizer}: use ddp")
    if kind == "fsdp" and optimizer in BY_PARAMETER:
        raise DloptError(f"resources.parallelism: fsdp cannot shard the state of optimizer {optimizer}: use zero or ddp")
