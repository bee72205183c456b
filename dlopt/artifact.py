"""Artifacts: directories named by the digest of what made them, sealed by a manifest that is written last."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from dlopt import remote
from dlopt.part import DloptError
from dlopt.remote import MANIFEST

SEAL = "seal"


class File(BaseModel):
    """Size in bytes and SHA-256 of one file of an artifact."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    size: int
    sha256: str


class Manifest(BaseModel):
    """The seal of an artifact: what made it, from what, which files it has and what there is to say of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    stage: str
    digest: str
    section: dict[str, Any]
    parents: dict[str, str]
    """Digest of each parent, by its stage's name."""
    files: dict[str, File]
    info: dict[str, Any]
    """What the stage found: counts, metrics, timings (JSON)."""
    seconds: float
    versions: dict[str, str]


@dataclass(frozen=True)
class Artifact:
    """A sealed directory; read its files through `read` or `check`, so that a damaged one is never used."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path) -> Artifact:
        """Open a sealed directory, which is fetched if an object store has it; raises DloptError when it is not sealed or a file is missing
        or has the wrong size."""
        remote.take_artifact(path)
        manifest = _unsealed(path)
        for name, file in manifest.files.items():
            if not (path / name).is_file() or (path / name).stat().st_size != file.size:
                raise DloptError(f"{path / name}: missing or damaged: delete the folder {path} and run the job again")
        return cls(path, manifest)

    @property
    def info(self) -> dict[str, Any]:
        return self.manifest.info

    def check(self, name: str) -> Path:
        """Path of a file whose content is what was sealed; raises DloptError when it is not."""
        if name not in self.manifest.files:
            raise DloptError(f"{self.path}: has no file {name}: delete the folder and run the job again")
        if _file(self.path / name) != self.manifest.files[name]:
            raise DloptError(f"{self.path / name}: content differs from its seal: delete the folder {self.path} and run the job again")
        return self.path / name

    def read(self, name: str) -> bytes:
        """Content of a file, checked against its seal."""
        return self.check(name).read_bytes()


@dataclass(frozen=True)
class Stage:
    """A verb of the pipeline: `make(section, out, *parents)` fills the directory `out` and returns the manifest's info."""

    name: str
    make: Callable[..., dict[str, Any]]
    scratch: str | None = None
    """A folder within the artifact for what the next try of an unfinished one can use (checkpoints): a stage that has one finds a
    half-made directory as it was left. It is no part of the artifact, and goes once that is sealed. Without it each try starts empty."""
    version: int = 1
    """Raised when the same section would now give another result, so that old artifacts are not taken for it."""


def digest_of(value: Any) -> str:
    """Twelve hexadecimal digits of SHA-256 over the canonical JSON of a value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def place(stage: Stage, section: BaseModel, home: Path, parents: tuple[Artifact, ...], found: Any = None) -> Path:
    """Where the artifact of a stage is or will be: home/stage/digest. `found` is what else it depends on (source files)."""
    made_from = [parent.manifest.digest for parent in parents]
    return home / stage.name / digest_of([stage.name, stage.version, section.model_dump(mode="json"), made_from, found])


def is_sealed(path: Path) -> bool:
    """Whether the directory is a finished artifact."""
    return (path / MANIFEST).is_file() or remote.has(path / MANIFEST)


def once(stage: Stage, section: BaseModel, home: Path, *parents: Artifact, found: Any = None, **context: Any) -> Artifact:
    """Run a stage, or hand back what it left before. That alone gives restart, caching and lineage.

    `context` is passed on to the stage but does not name the result (resources, progress).
    """
    path = place(stage, section, home, parents, found)
    if is_sealed(path):
        return _stored(Artifact.open(path))
    with _lock(path):
        if is_sealed(path):
            return _stored(Artifact.open(path))
        if path.exists() and stage.scratch is None:
            shutil.rmtree(path)
        path.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        info = stage.make(section, path, *parents, **context)
        manifest = Manifest(
            stage=stage.name,
            digest=path.name,
            section=section.model_dump(mode="json"),
            parents={parent.manifest.stage: parent.manifest.digest for parent in parents},
            files=_files(path, stage.scratch),
            info=info,
            seconds=round(time.monotonic() - start, 3),
            versions=versions(),
        )
        write_atomically(path / MANIFEST, _sealed(manifest))
        if stage.scratch is not None:
            shutil.rmtree(path / stage.scratch, ignore_errors=True)
        artifact = _stored(Artifact(path, manifest))
        if stage.scratch is not None:
            remote.drop(path / stage.scratch)
        return artifact


def _stored(artifact: Artifact) -> Artifact:
    """In its home's object store too, if it has one: also what could not be put there when it was made."""
    remote.give_artifact(artifact.path, artifact.manifest.files)
    return artifact


def discard(path: Path) -> None:
    """Remove an artifact, finished or not; raises DloptError when another process makes it now."""
    with _lock(path):
        remote.drop(path)
        shutil.rmtree(path, ignore_errors=True)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all: to a temporary name, flushed to disk, then renamed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path):
        try:
            with open(temporary, "wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        flush_folder(path.parent)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within it, an error of the system says of which file it is; that a disk is full comes without."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def sweep(folder: Path) -> None:
    """Take away what a process that was killed in `write_atomically` has left in a folder."""
    for left in folder.glob(".*.[0-9]*"):
        left.unlink(missing_ok=True)


@cache
def versions() -> dict[str, str]:
    """Versions of the packages that decide a result."""
    found = {}
    for name in ("dlopt", "ray", "torch", "pyarrow", "numpy", "onnx", "onnxruntime", "pillow"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold the artifact's name while it is made, so that two runs of one job do not write over each other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DloptError(f"{path}: another dlopt process is making it now: wait for it, or stop it") from None
        yield


def is_locked(lock: Path) -> bool:
    """Whether another process holds the name that a lock file is for."""
    with open(lock) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _sealed(manifest: Manifest) -> str:
    """The manifest's JSON with a digest of itself, so that a flipped bit is seen here as in any other file."""
    value = json.loads(manifest.model_dump_json())
    return json.dumps(value | {SEAL: digest_of(value)}, indent=1)


def _unsealed(path: Path) -> Manifest:
    """The manifest of a directory; raises DloptError when there is none or when it is not as it was sealed."""
    try:
        value = json.loads((path / MANIFEST).read_bytes())
        if value.pop(SEAL) == digest_of(value):
            return Manifest.model_validate(value)
    except (FileNotFoundError, NotADirectoryError):
        raise DloptError(f"{path}: not a finished artifact (no {MANIFEST}): run its job again") from None
    except (ValueError, AttributeError, KeyError, TypeError, DloptError):  # no JSON, no mapping, no seal
        pass
    raise DloptError(f"{path / MANIFEST}: damaged: delete the folder {path} and run the job again")


def _files(path: Path, scratch: str | None) -> dict[str, File]:
    """All files but scratch and hidden ones, which are temporary and left by a crash; flushed to disk, since the seal vouches for them."""
    there = sorted(file for file in path.rglob("[!.]*") if file.is_file() and file.name != MANIFEST)
    found = [file for file in there if scratch is None or file.relative_to(path).parts[0] != scratch]
    for folder in {path, *(file.parent for file in found)}:
        flush_folder(folder)
    return {str(file.relative_to(path)): _file(file, flush=True) for file in found}


def _file(path: Path, flush: bool = False) -> File:
    with open(path, "rb") as file:
        if flush:
            os.fsync(file.fileno())
        return File(size=os.fstat(file.fileno()).st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())


def flush_folder(path: Path) -> None:
    """Make new names in a folder last."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
