"""What training must remember between epochs, and checkpoints of it: whole, finite, with checksums, or not there at all."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from dlopt.artifact import write_atomically
from dlopt.optim.averages import Average
from dlopt.part import DloptError
from dlopt.train.packing import optimizer_state, pack, restore_optimizer, unpack

CHECKPOINTS = "checkpoints"
"""The folder of checkpoints in a model's directory, while it is made."""
KEEP = 2
"""Checkpoints that are kept: the newest, and one to fall back on."""
TENSORS, RECORD = "state.safetensors", "state.json"


@dataclass
class Record:
    """Where training stands, in numbers."""

    epoch: int = 0
    """Epochs done."""
    step: int = 0
    rows: int = 0
    """Rows trained on so far."""
    history: list[float] = field(default_factory=list)
    """The monitored value of every epoch so far, the smaller the better; NaN where it was not finite."""
    best_epoch: int = 0
    best_value: float | None = None
    """The monitored value of the best epoch; the smaller the better."""
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


@dataclass
class State:
    """Model, optimizer, averages of the weights, the best epoch's weights, and the record."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    best: dict[str, Tensor]
    record: Record
    average: Average | None = None

    def keep_best(self) -> None:
        """Take the weights as they are now for the best ones."""
        self.best = {name: value.detach().cpu().clone() for name, value in self.model.state_dict().items()}

    def finite(self) -> bool:
        """Whether every weight is."""
        return all(bool(value.isfinite().all()) for value in self.model.state_dict().values() if value.is_floating_point())

    def packed(self) -> tuple[dict[str, Tensor], Any]:
        """Everything: what is a tensor, by names of one flat dictionary, and the rest, as JSON has it."""
        tensors, rest = pack(optimizer_state(self.optimizer))
        found = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        found |= {f"best.{name}": value for name, value in self.best.items()}
        found |= {f"optimizer.{name}": value for name, value in tensors.items()}
        found |= {f"average.{name}": value for name, value in (self.average.tensors() if self.average else {}).items()}
        return {name: value.detach().cpu().contiguous() for name, value in found.items()}, rest

    def restore(self, tensors: dict[str, Tensor], rest: Any, record: dict[str, Any]) -> None:
        self.model.load_state_dict(_under("model.", tensors))
        self.best = _under("best.", tensors)
        restore_optimizer(self.optimizer, unpack(_under("optimizer.", tensors), rest))
        if self.average:
            self.average.load(_under("average.", tensors))
        self.record = Record(**record)


def save(state: State, folder: Path) -> None:
    """Write a checkpoint under a temporary name, then rename it, then drop old ones."""
    final = folder / f"epoch-{state.record.epoch:05d}"
    temporary = folder / f".{final.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    (tensors, rest), record = state.packed(), asdict(state.record)
    content = save_tensors(tensors)
    write_atomically(temporary / TENSORS, content)
    write_atomically(temporary / RECORD, json.dumps({"record": record, "optimizer": rest, "sha256": _digest(record, rest, content)}))
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    for old in _checkpoints(folder)[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and a line for every newer one that is damaged.

    Raises DloptError when there are checkpoints but none is whole.
    """
    damaged: list[str] = []
    checkpoints = _checkpoints(folder)
    for path in reversed(checkpoints):
        try:
            seal = json.loads((path / RECORD).read_bytes())
            Record(**seal["record"])
            whole = _digest(seal["record"], seal["optimizer"], (path / TENSORS).read_bytes()) == seal["sha256"]
        except (OSError, ValueError, KeyError, TypeError):
            whole = False
        if whole:
            return path, damaged
        damaged.append(f"{path}: damaged checkpoint, not used")
    if checkpoints:
        raise DloptError(f"{folder}: none of its {len(checkpoints)} checkpoints is whole: delete the folder {folder.parent} to start over")
    return None, damaged


def record_of(path: Path) -> Record:
    """The record of a checkpoint that `newest` gave."""
    return Record(**json.loads((path / RECORD).read_bytes())["record"])


def load(state: State, path: Path) -> None:
    """Put a checkpoint that `newest` gave into the state."""
    seal = json.loads((path / RECORD).read_bytes())
    state.restore(load_tensors((path / TENSORS).read_bytes()), seal["optimizer"], seal["record"])


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("epoch-*"), key=lambda path: (len(path.name), path.name))


def _digest(record: dict[str, Any], rest: Any, tensors: bytes) -> str:
    """SHA-256 over all that a checkpoint says."""
    return sha256(json.dumps([record, rest], sort_keys=True).encode() + tensors).hexdigest()


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
