"""Runs in a home: finding one by name, and listing them. Imports neither torch nor Ray."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dlopt import remote
from dlopt.artifact import Artifact
from dlopt.part import DloptError

RUN, JOB, REPORT = "run.json", "job.yaml", "report.html"
"""The files of a run's folder; run.json is written last."""
STAGES = ("rows", "data", "model", "compress", "export")
"""The folders of a home that hold artifacts."""


@dataclass(frozen=True)
class Outcome:
    """What a run left, or what was there already."""

    folder: Path
    """With report.html, job.yaml, run.json, model.onnx and the other results under plain names."""
    name: str
    """The job's name."""
    metrics: dict[str, dict[str, float | None]]
    """Of each split: metric to value."""
    spread: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    """Of a cross-validation: split to metric to {mean, std} over the folds; empty without one."""
    seconds: float = 0.0
    """That this call took."""
    made: tuple[str, ...] = ()
    """The stages that had anything to do in it."""
    compressed: tuple[dict[str, Any], ...] = ()
    """Of a model that was made small: a row for what it was, and one for what it is (see dlopt/compress/measure.py)."""


def listing(home: Path) -> list[dict[str, Any]]:
    """The records of all runs in a home, newest first, each with its folder."""
    found = []
    remote.take(*(home / name / RUN for name in remote.folders(home) if name not in STAGES), anew=True)
    for path in home.glob(f"*/{RUN}"):
        record = _read(path)
        if record:
            found.append(record | {"run": str(path.parent)})
    return sorted(found, key=lambda record: str(record.get("created", "")), reverse=True)


def find(run: str, home: Path) -> Path:
    """A run's folder, from its path, its address in an object store, or a job's name (its newest run). Raises DloptError."""
    if "://" in run:
        return _fetched(run)
    if (Path(run) / RUN).is_file():
        return Path(run)
    named = [record["run"] for record in listing(home) if record.get("name") == run]
    if named:
        remote.take(Path(named[0]) / JOB, Path(named[0]) / REPORT)
        return Path(named[0])
    known = sorted({str(record.get("name")) for record in listing(home)})
    there = f"; there are runs of {', '.join(known)}" if known else ""
    raise DloptError(f"{run}: neither a run's folder nor the name of a job that was run in {home}{there}")


def _fetched(address: str) -> Path:
    """The folder that stands for a run in an object store."""
    home, _, name = address.rstrip("/").rpartition("/")
    folder = remote.home_path(home) / name
    remote.take(*(folder / file for file in (JOB, REPORT, RUN)), anew=True)
    if not (folder / RUN).is_file():
        raise DloptError(f"{address}: there is no run: `dlopt runs --home {home}` lists those that there are")
    return folder


def exported(folder: Path, kind: str = "onnx") -> tuple[str, Artifact]:
    """The name of a run's model and its artifact in a format, in float32 if it is there. Raises DloptError."""
    record = read(folder)
    there = [name for name in record["artifacts"] if name == f"export.{kind}" or name.startswith(f"export.{kind}.")]
    if not there:
        raise DloptError(f"{folder}: has no {kind} export: dlopt export {folder} --format {kind}")
    return str(record["name"]), artifact(folder, record, f"export.{kind}" if f"export.{kind}" in there else there[0])


def artifact(folder: Path, record: Mapping[str, Any], name: str) -> Artifact:
    """One of those that a run's record names: data, model, or export.KIND. Raises DloptError."""
    return Artifact.open((folder / record["artifacts"][name]).resolve())


def read(folder: Path) -> dict[str, Any]:
    """A run's record: its name, metrics, and the places of its artifacts, as seen from the folder. Raises DloptError."""
    record = _read(folder / RUN)
    if not record or not isinstance(record.get("artifacts"), dict):
        raise DloptError(f"{folder / RUN}: damaged: run the job again")
    return record


def _read(path: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None
