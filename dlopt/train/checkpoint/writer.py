"""Writes checkpoints in a thread, from a copy, while training goes on."""

from __future__ import annotations

import errno
import json
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict
from hashlib import sha256
from typing import Any, NamedTuple

from torch import Tensor

from dlopt.part import DloptError
from dlopt.train.checkpoint.packing import Seen, pieces
from dlopt.train.checkpoint.state import Record, TrainingState
from dlopt.train.checkpoint.stores import RECORD, Buffer, Store, ends_epoch, name_parts


class Snapshot(NamedTuple):
    """What is written into one checkpoint; nobody else changes its tensors."""

    files: dict[str, dict[str, Tensor]]
    """By the name of a file, without its ending."""
    rest: Any
    record: dict[str, Any]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], rest: Any, record: Record) -> Snapshot:
        """Of what `TrainingState.packed` gave."""
        files: dict[str, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            file, _, key = name.partition(".")
            files.setdefault(file, {})[key] = value
        return cls(files, rest, asdict(record))

    def contents(self) -> Iterator[tuple[str, Iterator[Buffer]]]:
        """Name and content of each file, in pieces that are to be taken before the next file is, `state.json` last."""
        seal: dict[str, Any] = {"record": self.record, "optimizer": self.rest, "files": {}}
        for file, tensors in self.files.items():
            seen = Seen()
            yield f"{file}.safetensors", seen.through(pieces(tensors))
            seal["files"][f"{file}.safetensors"] = seen.as_json()
        yield RECORD, iter([json.dumps(seal | {"sha256": digest_of(seal)}).encode()])


class Writer:
    """Writes checkpoints, one at a time, in a thread of its own, and drops old ones. Training never waits for it: while one is written, the
    newest of those that must not be left out waits in memory for its turn, in place of the one that waited before.

    It claims the store. Raises DloptError when a checkpoint cannot be written or another writer has claimed the store since: at the
    next write, or at the end.
    """

    def __init__(self, store: Store, keep: int, owner: str) -> None:
        self.store, self.keep, self.owner = store, keep, store.claim(owner)
        self.serial = max((int(name_parts(name)[0]) for name in store.names()), default=0)
        self.pool, self.lock = ThreadPoolExecutor(1, "dlopt-checkpoint"), threading.Lock()
        self.writing: Future[None] | None = None
        self.busy, self.patient = False, True
        self.next: tuple[str, Snapshot] | None = None
        self.seconds = 0.0
        """How long training has waited for checkpoints."""
        self.skipped, self.longest = 0, 0.0
        """How many were left out, since the one before was still written, and the seconds that the slowest one has taken."""
        self.began = 0.0

    def ready(self, seconds: float = 0.0) -> bool:
        """Whether a checkpoint would be written at once; waits so long for that, once for each that is written. If not, the one that was
        due counts as skipped."""
        began = time.monotonic()
        if self.busy and self.patient and self.writing:
            wait([self.writing], seconds)
        self.seconds += time.monotonic() - began
        self.patient = not self.busy
        self.skipped += self.busy
        return not self.busy

    def write(self, state: TrainingState, tensors: Mapping[str, Tensor], rest: Any) -> None:
        """A checkpoint of what `state.packed()` gave; after the one that is written now, if there is one."""
        began, record = time.monotonic(), state.record
        self.serial += 1
        name, snapshot = f"{self.serial:06d}-epoch-{record.epoch:05d}-batch-{record.batch:06d}", Snapshot.of(tensors, rest, record)
        with self.lock:
            follows = self.busy
            if follows:
                self.skipped += self.next is not None
                self.next = name, snapshot
        if not follows:
            self.wait()
            self.busy = self.patient = True
            self.writing = self.pool.submit(self._write_all, name, snapshot)
        self.seconds += time.monotonic() - began

    def as_json(self) -> dict[str, float]:
        """What a line of speed.jsonl has of checkpoints."""
        longest = max(self.longest, time.monotonic() - self.began if self.busy else 0.0)
        return {"checkpoint_seconds": round(self.seconds, 4), "skipped_checkpoints": self.skipped, "longest_checkpoint": round(longest, 1)}

    def wait(self) -> None:
        """Until all that was given is there."""
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

    def _write_all(self, name: str, snapshot: Snapshot) -> None:
        """And what comes while it writes."""
        following: tuple[str, Snapshot] | None = (name, snapshot)
        try:
            while following:
                self.began = time.monotonic()
                self._write(*following)
                self.longest = max(self.longest, time.monotonic() - self.began)
                with self.lock:
                    following, self.next = self.next, None
                    self.busy = following is not None
        finally:
            self.busy = False

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
