"""Checkpoints: whole, finite, with checksums, or not there at all; written while training goes on, to a disk or an object store.

One is a folder, `000007-epoch-00002-batch-000040`: a serial number, epochs done, batches done of the epoch after them. Tensors are in
safetensors files; `state.json`, which is written last, has all that is no tensor, and the size and SHA-256 of each file.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Protocol, Self

import pyarrow.fs as fs
from pydantic import Field, model_validator
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from dlopt.artifact import flush_folder, write_atomically
from dlopt.data.sources.places import Place, place_of
from dlopt.part import DloptError, Part
from dlopt.train.state import Record, State

CHECKPOINTS = "checkpoints"
"""The folder of checkpoints in a model's directory, while it is made."""
RECORD, OWNER = "state.json", "owner"
NAME = re.compile(r"(\d{6,})-epoch-(\d{5,})-batch-(\d{6,})")


class Every(Part):
    """How often: one of these."""

    steps: Annotated[int, Field(ge=1)] | None = None
    """So many steps; also at the end of every epoch."""
    seconds: Annotated[float, Field(gt=0)] | None = None
    """So many seconds, looked at about twice a second; also at the end of every epoch."""
    epochs: Annotated[int, Field(ge=1)] | None = None
    """At the end of every so manyth epoch. Training that diverges goes back to the last checkpoint at the end of an epoch, so that more
    than 1 can change what comes of it then."""

    @model_validator(mode="after")
    def one_of_them(self) -> Self:
        if sum(value is not None for value in (self.steps, self.seconds, self.epochs)) != 1:
            raise ValueError("give one of steps, seconds and epochs")
        return self


class Checkpointing(Part):
    """When checkpoints are written, where, and how many are kept. Each also has the weights of the best epoch so far."""

    every: Every = Every(seconds=60)
    """How often; at most so much is done again after a crash. A run that is told to end (SIGTERM, preemption) writes one first."""
    keep: int = Field(2, ge=1)
    """So many of the last ones, and the last one at the end of an epoch."""
    path: str | None = None
    """A folder for them on another disk that all nodes see, or in an object store (s3://, gs://, abfs://), where they stay after
    training. Without it they are in the model's folder until it is done."""


class Store(Protocol):
    """Where the checkpoints of a run lie."""

    def where(self, name: str = "") -> str:
        """The address of a checkpoint, or of all, for people."""
        ...

    def names(self) -> list[str]:
        """Of all checkpoints, the oldest first."""
        ...

    def read(self, name: str, file: str) -> bytes:
        """Raises OSError."""
        ...

    def write(self, name: str, files: Iterable[tuple[str, bytes]]) -> None:
        """All files, or no checkpoint of that name. Raises OSError."""
        ...

    def remove(self, name: str) -> None: ...

    def clear(self) -> None:
        """Remove all that is here."""
        ...

    def claim(self, owner: str | None = None) -> str:
        """Become the one who writes here, and sweep up what a killed one has left; or who that is."""
        ...


@dataclass(frozen=True)
class Disk:
    """A folder that all nodes see. A checkpoint is written under another name, flushed to disk, and renamed."""

    folder: Path

    def where(self, name: str = "") -> str:
        return str(self.folder / name)

    def names(self) -> list[str]:
        return _sorted(path.name for path in self.folder.glob("*-epoch-*"))

    def read(self, name: str, file: str) -> bytes:
        return (self.folder / name / file).read_bytes()

    def write(self, name: str, files: Iterable[tuple[str, bytes]]) -> None:
        temporary = self.folder / f".{name}"
        try:
            temporary.mkdir(parents=True)
            for file, content in files:
                write_atomically(temporary / file, content)
            temporary.rename(self.folder / name)
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)  # above all where the disk is full
            raise
        flush_folder(self.folder)

    def remove(self, name: str) -> None:
        gone = self.folder / f".{name}"
        (self.folder / name).rename(gone)  # at once: half a checkpoint would be told of as damaged
        shutil.rmtree(gone, ignore_errors=True)

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def claim(self, owner: str | None = None) -> str:
        if owner is None:
            return (self.folder / OWNER).read_text()
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / OWNER, owner)
        for left in self.folder.glob(".*"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        return owner


@dataclass(frozen=True)
class Bucket:
    """A folder of an object store, which has no renaming: a checkpoint is there once its `state.json` is, which comes last."""

    place: Place
    path: str

    def where(self, name: str = "") -> str:
        return f"{self.place.prefix}{self.path}/{name}".rstrip("/")

    def names(self) -> list[str]:
        return _sorted(self._folders(with_record=True))

    def read(self, name: str, file: str) -> bytes:
        return self.place.read(f"{self.path}/{name}/{file}")

    def write(self, name: str, files: Iterable[tuple[str, bytes]]) -> None:
        for file, content in files:
            self._put(f"{name}/{file}", content)

    def remove(self, name: str) -> None:
        self.place.filesystem.delete_file(f"{self.path}/{name}/{RECORD}")
        self.place.filesystem.delete_dir(f"{self.path}/{name}")

    def clear(self) -> None:
        self.place.filesystem.delete_dir_contents(self.path, missing_dir_ok=True)

    def claim(self, owner: str | None = None) -> str:
        if owner is None:
            return self.place.read(f"{self.path}/{OWNER}").decode()
        self._put(OWNER, owner.encode())
        for name in self._folders(with_record=False):
            self.place.filesystem.delete_dir(f"{self.path}/{name}")
        return owner

    def _put(self, path: str, content: bytes) -> None:
        with self.place.filesystem.open_output_stream(f"{self.path}/{path}") as sink:
            sink.write(content)

    def _folders(self, with_record: bool) -> list[str]:
        found: dict[str, set[str]] = {}
        for info in self.place.filesystem.get_file_info(fs.FileSelector(self.path, recursive=True, allow_not_found=True)):
            if info.type == fs.FileType.File:
                *folders, file = info.path.removeprefix(f"{self.path}/").split("/")
                if len(folders) == 1:
                    found.setdefault(folders[0], set()).add(file)
        return [name for name, files in found.items() if (RECORD in files) == with_record]


def store_of(out: Path, checkpointing: Checkpointing) -> Store:
    """Where the checkpoints of the model in `out` lie; opened by the process that reads the job, with its keys, it travels to workers.
    Raises DloptError."""
    if checkpointing.path is None:
        return Disk(out / CHECKPOINTS)
    place, path = place_of(checkpointing.path)
    if place.is_local:
        return Disk(Path(path).resolve() / out.name)
    return Bucket(place, f"{path.rstrip('/')}/{out.name}")


class Checkpoint(NamedTuple):
    """One that is whole."""

    name: str
    tensors: dict[str, Tensor]
    rest: Any
    """What of the optimizer's state is no tensor."""
    record: Record

    def load(self, state: State) -> None:
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


def read(store: Store, name: str) -> Checkpoint:
    """A checkpoint, each file compared with its checksum. Raises Damaged."""
    try:
        seal = json.loads(store.read(name, RECORD))
        said = seal.pop("sha256")
        record = Record(**seal["record"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        said = seal = None
    if seal is None or _digest(seal) != said:
        raise Damaged(f"{store.where(name)}/{RECORD}")
    tensors: dict[str, Tensor] = {}
    for file, known in seal["files"].items():
        try:
            content = store.read(name, file)
        except OSError:
            content = b""
        if {"size": len(content), "sha256": sha256(content).hexdigest()} != known:
            raise Damaged(f"{store.where(name)}/{file}")
        tensors |= {f"{file.partition('.')[0]}.{key}": value for key, value in load_tensors(content).items()}
    return Checkpoint(name, tensors, seal["optimizer"], record)


def ends_epoch(name: str) -> bool:
    """Whether the checkpoint of this name was made at the end of an epoch."""
    return int(_parts(name)[2]) == 0


def said(name: str) -> str:
    """A checkpoint's name in words: after epoch 3, batch 40."""
    _, epoch, batch = (int(part) for part in _parts(name))
    return f"after epoch {epoch}" if batch == 0 else f"after batch {batch} of epoch {epoch + 1}"


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
        yield RECORD, json.dumps(seal | {"sha256": _digest(seal)}).encode()


class Writer:
    """Writes checkpoints, one at a time, in a thread of its own, and drops old ones.

    It claims the store. Raises DloptError when a checkpoint cannot be written or another writer has claimed the store since: at the
    next write, or at the end.
    """

    def __init__(self, store: Store, keep: int, owner: str) -> None:
        self.store, self.keep, self.owner = store, keep, store.claim(owner)
        self.serial = max((int(_parts(name)[0]) for name in store.names()), default=0)
        self.pool = ThreadPoolExecutor(1, "dlopt-checkpoint")
        self.writing: Future[None] | None = None
        self.seconds = 0.0
        """How long training has waited for checkpoints."""

    def write(self, state: State, tensors: Mapping[str, Tensor], rest: Any) -> None:
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


def _parts(name: str) -> tuple[str, ...]:
    found = NAME.fullmatch(name)
    return found.groups() if found else ("0", "0", "0")


def _sorted(names: Iterable[str]) -> list[str]:
    return sorted((name for name in names if NAME.fullmatch(name)), key=lambda name: int(_parts(name)[0]))


def _digest(seal: dict[str, Any]) -> str:
    """SHA-256 over all that a checkpoint says."""
    return sha256(json.dumps(seal, sort_keys=True).encode()).hexdigest()
