"""What every way to train can be asked, and the plain one, of one worker."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
        self.local: nn.Module = network
        """Its parameters, by the names of the network's, and its state are what this worker holds."""

    @property
    def copies(self) -> int:
        """How many workers hold each weight."""
        return self.world

    @property
    def writes(self) -> bool:
        """Whether this worker has a part in what is written: of what all hold alike worker 0 alone has."""
        return self.rank == 0

    gathers: tuple[str, ...] = ()
    """Parts of training's state of which `whole` gives copies on the CPU."""
    in_step = False
    """Whether a worker can call the network only when all others do."""

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
        """A gradient function that leaves gradients in the parameters of `local`."""
        return inner

    def batches(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """This worker's shares of batches, as the objective is given them."""
        return batches

    def begin(self, step: int) -> None:
        """A step begins, before which there were `step`."""

    def undo(self) -> None:
        """The step that was begun is left out."""

    def memory(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """On worker 0, what a checkpoint must have beside the state of one worker; on others, anything. All call it at once."""
        return {}

    def recall(self, memory: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
        """Go on from a checkpoint that has this, whose weights and optimizer's state have been restored. {}: nothing."""

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
        return self.local.state_dict()

    def whole(self, part: str, held: dict[str, Any]) -> dict[str, Any]:
        """On workers that write, the state of a part of training as a checkpoint has it; on others, anything. All call it at once."""
        return held

    def mine(self, part: str, whole: dict[str, Any]) -> dict[str, Any]:
        """What this worker holds of it."""
        return whole

    def rows(self, part: str, tensors: Mapping[str, Tensor]) -> dict[str, int]:
        """Of which of a part's tensors this worker holds rows, and how many."""
        return {}

    @torch.no_grad()
    def load(self, held: Mapping[str, Tensor]) -> None:
        """Make these the weights and buffers that this worker holds."""
        for name, value in self.local.state_dict().items():
            value.copy_(held[name])

    def gather(self, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """On worker 0, all that workers hold, whole; on others, anything. All call it at once."""
        return dict(held)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Within it, workers call the network without gradients: each as often as it likes, or where they compute it `in_step`, all of
        them equally often."""
        yield
