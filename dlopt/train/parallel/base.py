"""What every way to train can be asked, and the plain one, of one worker."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from dlopt.data.feed.batches import Batch
from dlopt.optim.constraints import total_norm
from dlopt.train.loop.gradients import Gradient

Groups = list[dict[str, Any]]
OptimizerState = dict[str, Any]
"""What an optimizer's `state_dict` gives."""


class Parallel:
    """One worker, which holds the network as it is."""

    def __init__(self, network: nn.Module, rank: int = 0, world: int = 1) -> None:
        self.network, self.rank, self.world = network, rank, world
        self.held: nn.Module = network
        """Its parameters, by the names of the network's, and its state are what this worker holds."""

    @property
    def copies(self) -> int:
        """How many workers hold each weight."""
        return self.world

    @property
    def writes(self) -> bool:
        """Whether this worker has a part in what is written: of what all hold alike worker 0 alone has."""
        return self.rank == 0

    @property
    def together(self) -> int:
        """How many workers compute each batch together, so that they exchange something at each step."""
        return self.world

    def module(self) -> nn.Module:
        """What is called in training."""
        return self.network

    def partly(self) -> AbstractContextManager[None]:
        """Within it, gradients are not all that a batch has: they need not be exchanged."""
        return nullcontext()

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

    def whole_state(self, held: OptimizerState) -> OptimizerState:
        """On worker 0, the state of the optimizer of one worker; on others, anything. All call it at once."""
        return held

    def my_state(self, whole: OptimizerState) -> OptimizerState:
        """What this worker holds of it."""
        return whole

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Within it, each worker can call the network, without gradients, as often as it likes."""
        yield

    def alone(self, build: Callable[[], nn.Module]) -> nn.Module:
        """A network that one worker can call without the others, its weights anything. build: makes one."""
        return self.network
