"""Where checkpoints lie, a disk or an object store, and how they are called there."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Protocol, Self

import pyarrow.fs as fs
from pydantic import Field, model_validator

from dlopt.artifact import flush_folder, write_atomically, writing
from dlopt.data.sources.places import Place, place_of
from dlopt.part import Part
from dlopt.remote import remote_of

Buffer = bytes | memoryview
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

    def write(self, name: str, files: Iterable[tuple[str, Iterable[Buffer]]]) -> None:
        """All files, beside those that were added, or no checkpoint of that name. Raises OSError."""
        ...

    def add(self, name: str, files: Iterable[tuple[str, Iterable[Buffer]]]) -> None:
        """Files of a checkpoint that another worker writes. Raises OSError."""
        ...

    def part(self, name: str, file: str) -> bytes:
        """What was added to a checkpoint that is not written yet. Raises OSError."""
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
        return by_serial(path.name for path in self.folder.glob("*-epoch-*"))

    def read(self, name: str, file: str) -> bytes:
        return (self.folder / name / file).read_bytes()

    def write(self, name: str, files: Iterable[tuple[str, Iterable[Buffer]]]) -> None:
        temporary = self.folder / f".{name}"
        try:
            self.add(name, files)
            flush_folder(temporary)
            temporary.rename(self.folder / name)
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)  # above all where the disk is full
            raise
        flush_folder(self.folder)

    def add(self, name: str, files: Iterable[tuple[str, Iterable[Buffer]]]) -> None:
        temporary = self.folder / f".{name}"
        temporary.mkdir(parents=True, exist_ok=True)
        for file, content in files:
            with writing(temporary / file), open(temporary / file, "wb") as sink:
                sink.writelines(content)
                sink.flush()
                os.fsync(sink.fileno())

    def part(self, name: str, file: str) -> bytes:
        return (self.folder / f".{name}" / file).read_bytes()

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
        return by_serial(self._folders(with_record=True))

    def read(self, name: str, file: str) -> bytes:
        return self.place.read(f"{self.path}/{name}/{file}")

    def write(self, name: str, files: Iterable[tuple[str, Iterable[Buffer]]]) -> None:
        self.add(name, files)

    def add(self, name: str, files: Iterable[tuple[str, Iterable[Buffer]]]) -> None:
        for file, content in files:
            self._put(f"{name}/{file}", content)

    def part(self, name: str, file: str) -> bytes:
        return self.read(name, file)

    def remove(self, name: str) -> None:
        self.place.filesystem.delete_file(f"{self.path}/{name}/{RECORD}")
        self.place.filesystem.delete_dir(f"{self.path}/{name}")

    def clear(self) -> None:
        self.place.filesystem.delete_dir_contents(self.path, missing_dir_ok=True)

    def claim(self, owner: str | None = None) -> str:
        if owner is None:
            return self.place.read(f"{self.path}/{OWNER}").decode()
        self._put(OWNER, [owner.encode()])
        for name in self._folders(with_record=False):
            self.place.filesystem.delete_dir(f"{self.path}/{name}")
        return owner

    def _put(self, path: str, content: Iterable[Buffer]) -> None:
        with self.place.filesystem.open_output_stream(f"{self.path}/{path}") as sink:
            for piece in content:
                sink.write(piece)

    def _folders(self, with_record: bool) -> list[str]:
        files_of: dict[str, set[str]] = {}
        for info in self.place.filesystem.get_file_info(fs.FileSelector(self.path, recursive=True, allow_not_found=True)):
            if info.type == fs.FileType.File:
                *folders, file = info.path.removeprefix(f"{self.path}/").split("/")
                if len(folders) == 1:
                    files_of.setdefault(folders[0], set()).add(file)
        return [name for name, files in files_of.items() if (RECORD in files) == with_record]


def store_of(out: Path, checkpointing: Checkpointing) -> Store:
    """Where the checkpoints of the model in `out` lie; opened by the process that reads the job, with its keys, it travels to workers.
    Raises DloptError."""
    if checkpointing.path is None:
        home, folder = remote_of(out), out / CHECKPOINTS
        if home is None:
            return Disk(folder)
        return Bucket(Place(home.filesystem, home.address.partition("://")[0] + "://"), home.key(folder))
    place, path = place_of(checkpointing.path)
    if place.is_local:
        return Disk(Path(path).resolve() / out.name)
    return Bucket(place, f"{path.rstrip('/')}/{out.name}")


def ends_epoch(name: str) -> bool:
    """Whether the checkpoint of this name was made at the end of an epoch."""
    return int(name_parts(name)[2]) == 0


def said(name: str) -> str:
    """A checkpoint's name in words: after epoch 3, batch 40."""
    _, epoch, batch = (int(part) for part in name_parts(name))
    return f"after epoch {epoch}" if batch == 0 else f"after batch {batch} of epoch {epoch + 1}"


def name_parts(name: str) -> tuple[str, ...]:
    match = NAME.fullmatch(name)
    return match.groups() if match else ("0", "0", "0")


def by_serial(names: Iterable[str]) -> list[str]:
    return sorted((name for name in names if NAME.fullmatch(name)), key=lambda name: int(name_parts(name)[0]))
