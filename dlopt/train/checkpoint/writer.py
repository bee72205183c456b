"""Writes checkpoints in a thread, from a copy, while training goes on."""

from __future__ import annotations

import errno
import json
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from hashlib import sha256
from typing import Any, NamedTuple

from safetensors.torch import save as save_tensors
from torch import Tensor

from dlopt.part import DloptError
from dlopt.train.checkpoint.state import Record, TrainingState
from dlopt.train.checkpoint.stores import RECORD, Store, ends_epoch, name_parts


class Snapshot(NamedTuple):
    """What is written into one checkpoint; nobody else changes its tensors."""

    files: dict[str, dict[str, Tensor]]
    """By the name of a file, without its ending."""
    rest: Any
    record: dict[str, Any]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], rest: Any, record: Record) -> Snapshot:
        """Of what `State.packed` gave, copied where training goes on to change it; the best epoch's weights stay as they are."""
        files: dict[str, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            file, _, key = name.partition(".")
            files.setdefault(file, {})[key] = value if file == "best" else value.clone()
        return cls(files, rest, asdict(record))

    def contents(self) -> Iterator[tuple[str, bytes]]:
        """Name and content of each file, `state.json` last."""
        seal: dict[str, Any] = {"record": self.record, "optimizer": self.rest, "files": {}}
        for file, tensors in self.files.items():
            content = save_tensors(tensors)
            seal["files"][f"{file}.safetensors"] = {"size": len(content), "sha256": sha256(content).hexdigest()}
            yield f"{file}.safetensors", content
        yield RECORD, json.dumps(seal | {"sha256": digest_of(seal)}).encode()


class Writer:
    """Writes checkpoints, one at a time, in a thread of its own, and drops old ones.

    It claims the store. Raises DloptError when a checkpoint cannot be written or another writer has claimed the store since: at the
    next write, or at the end.
    """

    def __init__(self, store: Store, keep: int, owner: str) -> None:
        self.store, self.keep, self.owner = store, keep, store.claim(owner)
        self.serial = max((int(name_parts(name)[0]) for name in store.names()), default=0)
        self.pool = ThreadPoolExecutor(1, "dlopt-checkpoint")
        self.writing: Future[None] | None = None
        self.seconds = 0.0
        """How long training has waited for checkpoints."""

    def write(self, state: TrainingState, tensors: Mapping[str, Tensor], rest: Any) -> None:
        """A checkpoint of what `state.packed()` gave. Waits for the one before."""
        began = time.monotonic()
        self.wait()
        self.serial += 1
        record = state.record
        name = f"{self.serial:06d}-epoch-{record.epoch:05d}-batch-{record.batch:06d}"
        self.writing = self.pool.submit(self._write, name, Snapshot.of(tensors, rest, record))
        self.seconds += time.monotonic() - began

    def wait(self) -> None:
        """Until what is being written is there."""
        writing, self.writing = self.writing, None
        if writing is None:
            return
        try:
            writing.result()
        except OSError as error:
            why = "no space is left" if error.errno in (errno.ENOSPC, errno.EDQUOT) else (error.strerror or str(error))
            raise DloptError(
                f"{self.store.where()}: the checkpoint cannot be written: {why}: make room or set resources.checkpoint.path, and run "
                "the same command again, which goes on from the last one"
            ) from error

    def close(self) -> None:
        """Wait for the last one; the writer is of no more use."""
        try:
            self.wait()
        finally:
            self.pool.shutdown()

    def _write(self, name: str, snapshot: Snapshot) -> None:
        if self.store.claim() != self.owner:
            raise DloptError(f"{self.store.where()}: another run of this job goes on from here: this one ends")
        self.store.write(name, snapshot.contents())
        names = self.store.names()
        kept = {*names[-self.keep :], *[name for name in names if ends_epoch(name)][-1:]}
        for old in names:
            if old not in kept:
                self.store.remove(old)


def digest_of(seal: dict[str, Any]) -> str:
    """SHA-256 over all that a checkpoint says."""
    return sha256(json.dumps(seal, sort_keys=True).encode()).hexdigest()
