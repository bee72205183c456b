"""Checkpoints: whole, finite, with checksums, or not there at all; written while training goes on, to a disk or an object store.

One is a folder, `000007-epoch-00002-batch-000040`: a serial number, epochs done, batches done of the epoch after them. Tensors are in
safetensors files; `state.json`, which is written last, has all that is no tensor, and the size and SHA-256 of each file.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from hashlib import sha256
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors.torch import load as load_tensors
from torch import Tensor

from dlopt.part import DloptError
from dlopt.train.checkpoint.packing import Tensors
from dlopt.train.checkpoint.state import Record, TrainingState
from dlopt.train.checkpoint.stores import RECORD, Store, ends_epoch
from dlopt.train.checkpoint.writer import digest_of
from dlopt.train.parallel.agreement import patiently


class Wanted(NamedTuple):
    """What of a checkpoint one of several workers needs."""

    rank: int = 0
    world: int = 1
    rows: bool = False
    """Whether it holds rows of weights alone."""
    best: bool = True
    """Whether it has a part of the best weights."""

    def span(self, rows: int) -> tuple[int, int]:
        """Which of so many rows it holds, from and up to."""
        if not self.rows:
            return 0, rows
        most = -(-rows // self.world)
        return min(self.rank * most, rows), min((self.rank + 1) * most, rows)


ALL = Wanted()


class Checkpoint(NamedTuple):
    """One that is whole."""

    name: str
    record: Record
    rest: dict[str, Any]
    """What of the parts' states is no tensor."""
    tensors: dict[str, Tensors]
    mine: bool
    """Whether tensors are the rows of this worker where it holds no more."""

    def load(self, state: TrainingState) -> None:
        """Put it into the state."""
        state.restore(asdict(self.record), self.rest, self.tensors, self.mine)


class Damaged(Exception):
    """A file of a checkpoint is not as it was written; says which."""


def newest(store: Store, epoch_ends: bool = False, wanted: Wanted = ALL) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is whole, and a line for every newer one that is damaged. epoch_ends: look at those alone that were
    made at the end of an epoch.

    Raises DloptError when there are checkpoints but none is whole.
    """
    damaged: list[str] = []
    for name in (names := _named(store, epoch_ends)):
        checkpoint, why = _tried(store, name, wanted)
        if checkpoint:
            return checkpoint, damaged
        damaged.append(why)
    _refuse_none(store, names, damaged)
    return None, damaged


def _named(store: Store, epoch_ends: bool) -> list[str]:
    """The newest first."""
    return [name for name in reversed(store.names()) if not epoch_ends or ends_epoch(name)]


def _tried(store: Store, name: str, wanted: Wanted) -> tuple[Checkpoint | None, str]:
    """A checkpoint, or what is damaged of it."""
    try:
        return read(store, name, wanted), ""
    except Damaged as why:
        return None, f"{why}: damaged checkpoint, not used"


def _refuse_none(store: Store, names: list[str], damaged: list[str]) -> None:
    if names:
        raise DloptError(f"{store.where()}: none of its {len(names)} checkpoints is whole ({damaged[0]}): run the job with --fresh")


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


def read(store: Store, name: str, wanted: Wanted = ALL) -> Checkpoint:
    """A checkpoint: each file of which something is wanted, once, and compared with its checksum. Raises Damaged."""
    seal = _seal(store, name)
    tensors: dict[str, Tensors] = {}
    pieces: dict[str, dict[str, list[Tensor]]] = {}
    for file, known in seal["files"].items():  # those of workers in their order
        part, *of = file.removesuffix(".safetensors").split(".")
        rows, rank = seal["rows"][part], int(of[0]) if of else None
        spans = {} if rank is None else {key: _overlap(wanted.span(sum(counts)), counts, rank) for key, counts in rows.items()}
        if (part == "best" and not wanted.best) or (rank is not None and not _needed(spans, rank, wanted, rows)):
            continue
        content = _checked(store, name, file, known)
        if rank is None:
            tensors.setdefault(part, {}).update(content)
        else:
            for key, value in content.items():
                some = value if spans[key] == (0, len(value)) else value[slice(*spans[key])].clone()
                pieces.setdefault(part, {}).setdefault(key, []).append(some)
    for part, named in pieces.items():
        tensors.setdefault(part, {}).update({key: some[0] if len(some) == 1 else torch.cat(some) for key, some in named.items()})
    rest = {part: said for part, said in seal["rest"].items() if part != "best" or wanted.best}
    return Checkpoint(name, Record(**seal["record"]), rest, tensors, wanted.rows and any(seal["rows"].values()))


def _checked(store: Store, name: str, file: str, known: dict[str, Any]) -> Tensors:
    try:
        content = store.read(name, file)
    except OSError:
        content = b""
    if {"size": len(content), "sha256": sha256(content).hexdigest()} != known:
        raise Damaged(f"{store.where(name)}/{file}")
    return load_tensors(content)


def _overlap(span: tuple[int, int], counts: list[int], rank: int) -> tuple[int, int]:
    """Which of the rows that worker `rank` wrote, of `counts` of each worker, lie within a span of all, from and up to."""
    start = sum(counts[:rank])
    low, high = (min(max(end - start, 0), counts[rank]) for end in span)
    return low, high


def _needed(spans: dict[str, tuple[int, int]], rank: int, wanted: Wanted, rows: dict[str, list[int]]) -> bool:
    """Whether anything of what worker `rank` wrote is wanted: rows, or the shape of what this one has no row of."""
    writers = len(next(iter(rows.values())))
    return any(low < high for low, high in spans.values()) or rank == min(wanted.rank, writers - 1)


def newest_of_all(store: Store, wanted: Wanted, device: torch.device, epoch_ends: bool = False) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is whole, the same on all workers, and a line for each damaged one. Each reads what it wants."""
    if wanted.world == 1:
        return newest(store, epoch_ends, wanted)
    told: list[Any] = [patiently(lambda: _named(store, epoch_ends) if wanted.rank == 0 else None, wanted.world, device)]
    dist.broadcast_object_list(told, src=0)
    names, damaged = told[0], list[str]()
    for name in names:
        checkpoint, why = patiently(partial(_tried, store, name, wanted), wanted.world, device)
        everyones: list[Any] = [None] * wanted.world
        dist.all_gather_object(everyones, why)
        if not any(everyones):
            return checkpoint, damaged
        damaged.append(next(filter(None, everyones)))
    _refuse_none(store, names, damaged)
    return None, damaged
