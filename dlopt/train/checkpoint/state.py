"""What training must remember between two steps to go on as if nothing had happened."""

from __future__ import annotations

from dataclasses import InitVar, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dlopt.optim.averages import Average
from dlopt.train.checkpoint.packing import optimizer_state, pack, restore_optimizer, unpack
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
    diverging: dict[str, Any] = field(default_factory=dict)
    """What the judgement whether training diverges has seen; empty at the start and after going back."""
    watched: dict[str, Any] = field(default_factory=dict)
    """What the watch over the layers has said and heard."""
    careful: bool = False
    """Whether a gradient was not finite once where steps are taken before that is known: from then on each is waited for."""
    loss_scale: dict[str, float] = field(default_factory=dict)
    """What losses are multiplied with in float16, and for how many steps it has been so."""


@dataclass
class TrainingState:
    """Model, optimizer, averages of the weights, the best epoch's weights, the watch over the layers, and the record."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    best: dict[str, Tensor]
    record: Record
    average: Average | None = None
    watch: Watch | None = None
    parallel: Parallel = field(init=False)
    """What of all this the worker holds."""
    on: InitVar[Parallel | None] = None

    def __post_init__(self, on: Parallel | None) -> None:
        self.parallel = on or Parallel(self.model)

    def keep_best(self) -> None:
        """Take the weights as they are now for the best ones."""
        if self.parallel.writes:
            self.best = {name: value.detach().to("cpu", copy=True) for name, value in self.parallel.held.state_dict().items()}

    def finite(self) -> bool:
        """Whether every weight is. All workers ask at once."""
        held = self.parallel.held.state_dict().values()
        return self.parallel.all(all(bool(value.isfinite().all()) for value in held if value.is_floating_point()))

    def packed(self) -> tuple[dict[str, Tensor], Any]:
        """Everything but the record: what is a tensor, by names of one flat dictionary, on the CPU, and the rest, as JSON has it. It is a
        copy, but for the best weights, which nobody changes. All workers ask at once, and worker 0 gets it whole, the others nothing."""
        whole = self.parallel.whole
        tensors, rest = pack(self.parallel.whole_state(optimizer_state(self.optimizer)))
        found = {f"model.{name}": value for name, value in whole(self.parallel.held.state_dict()).items()}
        found |= {f"best.{name}": value for name, value in whole(self.best).items()}
        found |= {f"optimizer.{name}": value for name, value in tensors.items()}
        found |= {f"average.{name}": value for name, value in whole(self.average.tensors() if self.average else {}).items()}
        found |= {f"watch.{name}": value for name, value in (self.watch.tensors() if self.watch else {}).items()}
        found |= self.parallel.memory(self.optimizer)
        if self.parallel.rank:
            return {}, None
        for name, value in found.items():
            found[name] = value if name.startswith("best.") else value.detach().to("cpu", copy=True).contiguous()
        return found, rest

    def restore(self, tensors: dict[str, Tensor], rest: Any, record: dict[str, Any]) -> None:
        """Become what `packed` of worker 0 said of a state, whatever workers it was of."""
        mine = self.parallel.mine
        self.parallel.load(under("model.", tensors))
        self.best = mine(under("best.", tensors)) if self.parallel.writes else {}
        restore_optimizer(self.optimizer, self.parallel.my_state(unpack(under("optimizer.", tensors), rest)))
        if self.average:
            self.average.load(mine(under("average.", tensors)))
        self.parallel.recall(tensors, self.optimizer)
        self.record = Record(**record)
        if self.watch:
            self.watch.recall(self.record.watched, under("watch.", tensors))


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
