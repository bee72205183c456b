"""Writes checkpoints in a thread, from a copy, while training goes on."""

from __future__ import annotations

import errno
import json
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from hashlib import sha256
from typing import Any

from torch import Tensor

from dlopt.part import DloptError
from dlopt.train.checkpoint.packing import Seen, pieces
from dlopt.train.checkpoint.state import Packed
from dlopt.train.checkpoint.stores import RECORD, Buffer, Store, ends_epoch, name_parts

PATIENCE = 600.0
"""Seconds that worker 0 waits for what the others write of a checkpoint, once its own part is written."""


class Writer:
    """Writes checkpoints, one at a time, in a thread of its own, and drops old ones. Training never waits for it: while one is written, the
    newest of those that must not be left out waits in memory for its turn, in place of the one that waited before.

    It claims the store. Raises DloptError when a checkpoint cannot be written or another writer has claimed the store since: at the
    next write, or at the end.

    Where workers hold rows of weights, each writes its own, and worker 0 seals them all when they are there. Not by
    torch.distributed.checkpoint: its index is a pickle, it has no checksums, and it does not know our stores.
    """

    def __init__(self, store: Store, keep: int, owner: str, rank: int = 0, parts: int = 1, serial: int | None = None) -> None:
        """parts: how many workers write. serial: of the last checkpoint, for workers other than 0."""
        self.store, self.keep, self.owner, self.rank, self.parts = store, keep, owner, rank, parts
        if rank == 0:
            store.claim(owner)
            serial = max((int(name_parts(name)[0]) for name in store.names()), default=0)
        self.serial = serial or 0
        self.pool, self.lock = ThreadPoolExecutor(1, "dlopt-checkpoint"), threading.Lock()
        self.writing: Future[None] | None = None
        self.busy, self.patient = False, True
        self.next: tuple[str, Packed] | None = None
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

    def write(self, packed: Packed) -> None:
        """A checkpoint; after the one that is written now, if there is one."""
        began, record = time.monotonic(), packed.record
        self.serial += 1
        name = f"{self.serial:06d}-epoch-{record['epoch']:05d}-batch-{record['batch']:06d}"
        with self.lock:
            follows = self.busy
            if follows:
                self.skipped += self.next is not None
                self.next = name, packed
        if not follows:
            self.wait()
            self.busy = self.patient = True
            self.writing = self.pool.submit(self._write_all, name, packed)
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

    def _write_all(self, name: str, packed: Packed) -> None:
        """And what comes while it writes."""
        following: tuple[str, Packed] | None = (name, packed)
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

    def _write(self, name: str, packed: Packed) -> None:
        if self.store.claim() != self.owner:
            raise DloptError(f"{self.store.where()}: another run of this job goes on from here: this one ends")
        if self.rank:
            self._add(name, packed)
            return
        self.store.write(name, self._contents(name, packed))
        names = self.store.names()
        kept = {*names[-self.keep :], *[name for name in names if ends_epoch(name)][-1:]}
        for old in names:
            if old not in kept:
                self.store.remove(old)

    def _add(self, name: str, packed: Packed) -> None:
        """This worker's part of it."""
        try:
            self.store.add(name, self._contents(name, packed))
        except OSError as error:
            with suppress(OSError):
                self.store.add(name, [(_part(self.rank), [json.dumps({"error": str(error)}).encode()])])
            raise

    def _contents(self, name: str, packed: Packed) -> Iterator[tuple[str, Iterator[Buffer]]]:
        """Name and content of each file, in pieces that are to be taken before the next file is; last the one that says what is there."""
        files: dict[str, Any] = {}
        for file, tensors in _files(packed, self.rank):
            seen = Seen()
            yield file, seen.through(pieces(tensors))
            files[file] = seen.as_json()
        mine = {"files": files, "rows": packed.rows}
        if self.rank:
            yield _part(self.rank), iter([json.dumps(mine).encode()])
            return
        everyones = [mine, *(self._part_of(name, rank) for rank in range(1, self.parts))]
        files = {file: seen for one in everyones for file, seen in one["files"].items()}
        rows = {part: {key: [one["rows"][part][key] for one in everyones] for key in there} for part, there in packed.rows.items()}
        seal = {"record": packed.record, "rest": packed.rest, "rows": rows, "files": files}
        yield RECORD, iter([json.dumps(seal | {"sha256": digest_of(seal)}).encode()])

    def _part_of(self, name: str, rank: int) -> dict[str, Any]:
        """What another worker says that it has written. Raises OSError when that takes too long."""
        began = time.monotonic()
        while time.monotonic() - began < PATIENCE:
            part: dict[str, Any] = {}
            with suppress(OSError, ValueError):  # half of it, while it is written
                part = json.loads(self.store.part(name, _part(rank)))
            if "error" in part:
                raise ConnectionAbortedError(f"worker {rank}: {part['error']}")
            if part:
                return part
            time.sleep(0.02)
        raise TimeoutError(f"worker {rank} has not written its part in {PATIENCE:.0f} s")


def _files(packed: Packed, rank: int) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    """Names and tensors: of what all workers hold alike, and of this one's rows."""
    for part, tensors in packed.tensors.items():
        rows = packed.rows[part]
        for file, some in ((f"{part}.safetensors", tensors.keys() - rows), (f"{part}.{rank:05d}.safetensors", tensors.keys() & rows)):
            if some:
                yield file, {key: tensors[key] for key in some}


def _part(rank: int) -> str:
    """The file in which a worker says what it has written."""
    return f"worker-{rank:05d}.json"


def digest_of(seal: dict[str, Any]) -> str:
    """SHA-256 over all that a checkpoint says."""
    return sha256(json.dumps(seal, sort_keys=True).encode()).hexdigest()
