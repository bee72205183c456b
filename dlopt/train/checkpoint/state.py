"""What training must remember between two steps to go on as if nothing had happened."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import InitVar, asdict, dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from dlopt.optim.averages import Average
from dlopt.train.checkpoint.packing import Tensors, optimizer_state, pack, restore_optimizer, unpack
from dlopt.train.parallel.base import Parallel
from dlopt.train.watch.health import Watch


@dataclass
class Record:
    """Where training stands, in numbers."""

    epoch: int = 0
    """Epochs done."""
    batch: int = 0
    """Batches done of the epoch after them."""
    step: int = 0
    rows: int = 0
    """Rows trained on so far."""
    sums: list[float] = field(default_factory=list)
    """Of the batches done of the epoch under way: the sum of the rows' losses and, of classes, the right answers."""
    history: list[float] = field(default_factory=list)
    """The monitored value of every epoch so far, the smaller the better; infinite where the loss was not finite."""
    best_epoch: int = 0
    best_value: float | None = None
    """The monitored value of the best epoch; the smaller the better. None while no epoch's validation loss was finite."""
    bar: float | None = None
    """The value that early stopping wants bettered by its `min_delta`."""
    bar_epoch: int = 0
    """When it was set."""
    stopped: bool = False
    """Whether early stopping has ended it."""
    seconds: float = 0.0
    """Time spent in epochs."""
    peak: float = 0.0
    """The peak rate: the job's, or what the range test found."""
    rollbacks: int = 0
    """How often training has diverged and gone back to an earlier checkpoint."""
    start_loss: float | None = None
    """The loss that training began with."""
    careful: bool = False
    """Whether a gradient was not finite once where steps are taken before that is known: from then on each is waited for."""


class Stateful(Protocol):
    """A part of training that must be remembered."""

    def state_dict(self) -> dict[str, Any]:
        """What `pack` takes; {} says nothing. All workers ask at once."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Be what said this; {} is the start."""
        ...


class By(NamedTuple):
    """A part by two functions."""

    state_dict: Callable[[], dict[str, Any]]
    load_state_dict: Callable[[dict[str, Any]], None]


class Packed(NamedTuple):
    """What one worker writes of a checkpoint, by parts. Nobody else changes its tensors."""

    record: dict[str, Any]
    rest: dict[str, Any]
    """JSON that says where tensors belong."""
    tensors: dict[str, Tensors]
    rows: dict[str, dict[str, int]]
    """Which of them are this worker's rows of something, and how many."""


@dataclass
class TrainingState:
    """All that training must remember: the record, and parts that are asked for theirs. Here are those that every training has; others
    register."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    best: dict[str, Tensor]
    """Weights of the best epoch."""
    record: Record
    average: Average | None = None
    watch: Watch | None = None
    parallel: Parallel = field(init=False)
    """What of all this the worker holds."""
    on: InitVar[Parallel | None] = None

    def __post_init__(self, on: Parallel | None) -> None:
        self.parallel = parallel = on or Parallel(self.model)
        self.parts: dict[str, Stateful] = {
            "model": By(lambda: parallel.local.state_dict(), parallel.load),
            "best": By(lambda: self.best, self._take_best),
            "optimizer": By(lambda: optimizer_state(self.optimizer), lambda state: restore_optimizer(self.optimizer, state)),
            "exchange": By(lambda: parallel.memory(self.optimizer), lambda state: parallel.recall(state, self.optimizer)),
        }
        self.best_of: list[int] | None = None
        """`_versions` of which the best weights are a copy, if they are known."""
        self.waiting: dict[str, Any] = {}
        """What was restored of parts that have not registered yet."""
        for name, part in (("average", self.average), ("watch", self.watch)):
            if part:
                self.parts[name] = part

    def register(self, name: str, part: Stateful) -> None:
        """From now on a part is in checkpoints; it goes on from the one that was restored."""
        self.parts[name] = part
        part.load_state_dict(self.waiting.pop(name, {}))

    def keep_best(self) -> None:
        """Take the weights as they are now for the best ones."""
        if self.parallel.writes:
            self.best = {name: value.detach().to("cpu", copy=True) for name, value in self.parallel.local.state_dict().items()}
        self.best_of = self._versions()

    def finite(self) -> bool:
        """Whether every weight is. All workers ask at once."""
        held = self.parallel.local.state_dict().values()
        return self.parallel.all(all(bool(value.isfinite().all()) for value in held if value.is_floating_point()))

    def packed(self) -> Packed:
        """All of it, on the CPU: a copy, but for the best weights, which nobody changes, and which are the weights too where these are
        the best: those of Adam cost twice their size then, else three times. All workers ask at once; what they hold alike worker 0
        alone gets."""
        parallel, packed = self.parallel, Packed(asdict(self.record), {}, {}, {})
        copied = {"best", *parallel.gathers} | ({"model"} if self.best_of == self._versions() else set())
        for name, part in self.parts.items():
            state = parallel.whole(name, part.state_dict())
            if name == "model" and name in copied:
                state = self.best
            if parallel.writes:
                tensors, packed.rest[name] = pack(state, copied=name not in copied)
                packed.rows[name] = parallel.rows(name, tensors)
                packed.tensors[name] = {key: value for key, value in tensors.items() if parallel.rank == 0 or key in packed.rows[name]}
        return packed

    def restore(self, record: dict[str, Any], rest: dict[str, Any], tensors: dict[str, Tensors], mine: bool) -> None:
        """Become what a checkpoint said, whatever workers it was of. mine: whether tensors are this worker's rows already."""
        states = {name: unpack(tensors.get(name, {}), said) for name, said in rest.items()}
        for name, part in self.parts.items():
            state = states.pop(name, {})
            part.load_state_dict(state if mine else self.parallel.mine(name, state))
        self.waiting = states
        vars(self.record).update(vars(Record(**record)))

    def _take_best(self, state: dict[str, Tensor]) -> None:
        self.best, self.best_of = dict(state) if self.parallel.writes else {}, None

    def _versions(self) -> list[int]:
        """The step, and how often each weight and buffer has been written to: alike as long as none of them changes."""
        return [self.record.step, *(value._version for value in self.parallel.local.state_dict().values())]
