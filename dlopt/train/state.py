"""What training must remember between epochs, and checkpoints of it: whole, with checksums, or not there at all."""

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
from dlopt.part import DloptError

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
    validation_losses: list[float] = field(default_factory=list)
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


@dataclass
class State:
    """Model, optimizer, the best epoch's weights, and the record."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    best: dict[str, Tensor]
    record: Record

    def keep_best(self) -> None:
        """Take the weights as they are now for the best ones."""
        self.best = {name: value.detach().cpu().clone() for name, value in self.model.state_dict().items()}

    def tensors(self) -> dict[str, Tensor]:
        """Everything that is a tensor, by names of one flat dictionary."""
        found = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        found |= {f"best.{name}": value for name, value in self.best.items()}
        for index, entries in self.optimizer.state_dict()["state"].items():
            found |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in entries.items() if value is not None}
        return {name: value.detach().cpu().contiguous() for name, value in found.items()}

    def restore(self, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        self.model.load_state_dict(_under("model.", tensors))
        self.best = _under("best.", tensors)
        entries: dict[int, dict[str, Tensor]] = {}
        for name, value in _under("optimizer.", tensors).items():
            index, _, key = name.partition(".")
            entries.setdefault(int(index), {})[key] = value
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": entries})
        self.record = Record(**record)


def save(state: State, folder: Path) -> None:
    """Write a checkpoint under a temporary name, then rename it, then drop old ones."""
    final = folder / f"epoch-{state.record.epoch:05d}"
    temporary = folder / f".{final.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    content, record = save_tensors(state.tensors()), asdict(state.record)
    write_atomically(temporary / TENSORS, content)
    write_atomically(temporary / RECORD, json.dumps({"record": record, "sha256": _digest(record, content)}))
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
            whole = _digest(seal["record"], (path / TENSORS).read_bytes()) == seal["sha256"]
        except (OSError, ValueError, KeyError, TypeError):
            whole = False
        if whole:
            return path, damaged
        damaged.append(f"{path}: damaged checkpoint, not used")
    if checkpoints:
        raise DloptError(f"{folder}: none of its {len(checkpoints)} checkpoints is whole: delete the folder {folder.parent} to start over")
    return None, damaged


def load(state: State, path: Path) -> None:
    """Put a checkpoint that `newest` gave into the state."""
    state.restore(load_tensors((path / TENSORS).read_bytes()), json.loads((path / RECORD).read_bytes())["record"])


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("epoch-*"), key=lambda path: (len(path.name), path.name))


def _digest(record: dict[str, Any], tensors: bytes) -> str:
    """SHA-256 over all that a checkpoint says."""
    return sha256(json.dumps(record, sort_keys=True).encode() + tensors).hexdigest()


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
