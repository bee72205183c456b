"""What of a folder goes to a cluster with a job: the job and the files that it names, nothing else."""

from __future__ import annotations

import glob
import io
import json
import os
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dlopt.artifact import versions
from dlopt.data.sources.places import SENT
from dlopt.disk import written
from dlopt.part import DloptError
from dlopt.spec import Job

MOST = 48 * 2**20
"""Bytes that are sent, packed or not: half of what a head of Ray takes."""
TIMES = ".dlopt-times.json"
"""A file of the package: when each of the others has changed, in nanoseconds, which Ray forgets as it unpacks them."""
SENDER = "DLOPT_SENDER"
"""The environment variable that says which version of dlopt has sent a job."""
FIELDS = ("path", "folder")
"""Of sources: what names files."""
EPOCH = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class Package:
    """A zip archive with the same bytes for the same files."""

    content: bytes
    files: list[str]
    """Their paths within the working folder, sorted; the job first."""


def package_of(job: Job, file: Path, folder: Path) -> Package:
    """The job's file and what its sources name by relative paths. folder: the working folder, from which these count.

    Raises DloptError when a file lies elsewhere, or all are too large to be sent.
    """
    folder = folder.resolve()
    if not file.resolve().is_relative_to(folder):
        raise DloptError(f"{file}: not below the working folder {folder}, so the cluster would not get it: give --working-dir")
    named = {str(path.relative_to(folder)): path for field, given in _named(job) for path in _files(field, given, folder)}
    _refuse_large(named)
    first = str(file.resolve().relative_to(folder))
    chosen = {first: file.resolve()} | {name: named[name] for name in sorted(named) if name != first}
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        times = {name: path.stat().st_mtime_ns for name, path in chosen.items() if name != first}
        for name, content in [*((name, path.read_bytes()) for name, path in chosen.items()), (TIMES, json.dumps(times).encode())]:
            info = zipfile.ZipInfo(name, EPOCH)
            info.compress_type, info.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive.writestr(info, content)
    return Package(packed.getvalue(), list(chosen))


def arrived(folder: Path) -> None:
    """On the cluster, in the folder that Ray has made of a package: files get their times back, and are known by their paths within it, so
    that the same files are the same data whenever they are sent. Raises DloptError when another dlopt has sent it."""
    sender, here = os.environ.get(SENDER), versions()["dlopt"]
    if sender not in (None, here):
        raise DloptError(f"dlopt {sender} has sent this job, and the cluster's head has {here}: pip install dlopt=={sender} on every node")
    try:
        times = json.loads((folder / TIMES).read_bytes())
    except OSError:
        return
    for name, changed in times.items():
        os.utime(folder / name, ns=(changed, changed))
    os.environ[SENT] = str(folder.resolve())


def _named(job: Job) -> Iterator[tuple[str, str]]:
    """(field, path) of all that the job's sources name on a disk by relative paths."""

    def within(field: str, value: object) -> Iterator[tuple[str, str]]:
        for name, inner in value.items() if isinstance(value, dict) else ():
            here = f"{field}.{name}"
            given = inner if isinstance(inner, (list, tuple)) else [inner]
            if name in FIELDS:
                yield from ((here, path) for path in given if isinstance(path, str))
            else:
                yield from within(here, inner)

    for name in ("source", "validation", "test"):
        part = getattr(job.data, name)
        for field, path in within(f"data.{name}", part.model_dump(mode="json") if part else None):
            if "://" not in path and not Path(path).expanduser().is_absolute():
                yield field, path


def _files(field: str, given: str, folder: Path) -> list[Path]:
    """All files of a path, a folder or a glob."""
    found = [Path(path) for path in glob.glob(str(folder / given), recursive=True)]
    if not found:
        raise DloptError(f"{field}: there is no {given} in {folder}, from where relative paths go: name one that all nodes see, or mend it")
    files = [file for path in found for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()]
    for file in files:
        if not file.resolve().is_relative_to(folder):
            raise DloptError(f"{field}: {given} leads out of the working folder {folder}, so it cannot be sent: give an absolute path")
    return [Path(os.path.normpath(file)) for file in files]


def _refuse_large(named: dict[str, Path]) -> None:
    sizes = {name: path.stat().st_size for name, path in named.items()}
    if sum(sizes.values()) <= MOST:
        return
    folders = Counter[str]()
    for name, size in sizes.items():
        folders[name if "/" not in name else name.rpartition("/")[0] + "/"] += size
    largest = ", ".join(f"{name} ({written(size)})" for name, size in folders.most_common(3))
    raise DloptError(
        f"data.source: {len(sizes):,} file{'s' * (len(sizes) != 1)} of {written(sum(sizes.values()))} are too large to send, "
        f"at most {written(MOST)}: {largest}: put them where all nodes see them (a shared disk, s3://, gs://) and name that place"
    )
