"""Checkpoints: whole, finite, with checksums, or not there at all; written while training goes on, to a disk or an object store.

One is a folder, `000007-epoch-00002-batch-000040`: a serial number, epochs done, batches done of the epoch after them. Tensors are in
safetensors files; `state.json`, which is written last, has all that is no tensor, and the size and SHA-256 of each file.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from hashlib import sha256
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors.torch import load as load_tensors
from torch import Tensor

from dlopt.part import DloptError
from dlopt.train.checkpoint.state import Record, TrainingState
from dlopt.train.checkpoint.stores import RECORD, Store, ends_epoch
from dlopt.train.checkpoint.writer import digest_of
from dlopt.train.parallel.agreement import patiently


class Checkpoint(NamedTuple):
    """One that is whole."""

    name: str
    tensors: dict[str, Tensor]
    rest: Any
    """What of the optimizer's state is no tensor."""
    record: Record

    def load(self, state: TrainingState) -> None:
        """Put it into the state."""
        state.restore(self.tensors, self.rest, asdict(self.record))


class Damaged(Exception):
    """A file of a checkpoint is not as it was written; says which."""


def newest(store: Store, epoch_ends: bool = False) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is whole, and a line for every newer one that is damaged. epoch_ends: look at those alone that were
    made at the end of an epoch.

    Raises DloptError when there are checkpoints but none is whole.
    """
    damaged: list[str] = []
    names = [name for name in store.names() if not epoch_ends or ends_epoch(name)]
    for name in reversed(names):
        try:
            return read(store, name), damaged
        except Damaged as why:
            damaged.append(f"{why}: damaged checkpoint, not used")
    if names:
        raise DloptError(f"{store.where()}: none of its {len(names)} checkpoints is whole ({damaged[0]}): run the job with --fresh")
    return None, damaged


def glance(store: Store) -> tuple[str, Record] | None:
    """Name and record of the newest checkpoint that seems whole: no weights are read."""
    for name in reversed(store.names()):
        try:
            return name, Record(**_seal(store, name)["record"])
        except Damaged:
            continue
    return None


def _seal(store: Store, name: str) -> dict[str, Any]:
    """What its `state.json` says. Raises Damaged."""
    try:
        seal: dict[str, Any] = json.loads(store.read(name, RECORD))
        said = seal.pop("sha256")
        Record(**seal["record"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        said, seal = None, {}
    if not seal or digest_of(seal) != said:
        raise Damaged(f"{store.where(name)}/{RECORD}")
    return seal


def read(store: Store, name: str, best: bool = True) -> Checkpoint:
    """A checkpoint, each file compared with its checksum. best: with the best weights so far. Raises Damaged."""
    seal = _seal(store, name)
    tensors: dict[str, Tensor] = {}
    for file, known in seal["files"].items():
        if file == "best.safetensors" and not best:
            continue
        try:
            content = store.read(name, file)
        except OSError:
            content = b""
        if {"size": len(content), "sha256": sha256(content).hexdigest()} != known:
            raise Damaged(f"{store.where(name)}/{file}")
        tensors |= {f"{file.partition('.')[0]}.{key}": value for key, value in load_tensors(content).items()}
    return Checkpoint(name, tensors, seal["optimizer"], Record(**seal["record"]))


def newest_of_all(
    store: Store, rank: int, world: int, device: torch.device, best: bool, epoch_ends: bool = False
) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint, the same on all workers, since worker 0 chooses it, and a line for each damaged one. best: whether this
    worker has a part of the best weights."""
    found, damaged = patiently(lambda: newest(store, epoch_ends) if rank == 0 else (None, []), world, device)
    if world == 1:
        return found, damaged
    told: list[Any] = [(found and found.name, damaged)]
    dist.broadcast_object_list(told, src=0)
    name, damaged = told[0]
    return patiently(lambda: found or (read(store, name, best) if name else None), world, device), damaged
