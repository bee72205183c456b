"""serve.yaml: several models and versions in one server."""

from __future__ import annotations

from pathlib import Path

import yaml
from pydantic import Field

from dlopt import runs
from dlopt.artifact import Artifact
from dlopt.part import DloptError, Part, Signature
from dlopt.serve import Serve
from dlopt.serve.models.lineup import Entry

PROFILE = "profile.json"


class Served(Part):
    """One version of a model."""

    run: str
    """A run's folder, as seen from this file, or the name of a job for its newest run."""
    name: str | None = Field(None, pattern=r"^[A-Za-z0-9._-]+$")
    """What clients call the model; the job's name without it."""
    version: int = Field(1, ge=1)
    """Its number among the versions of the name."""
    labels: tuple[str, ...] = ()
    """Names of this version, such as champion: /v1/models/NAME/labels/champion."""
    default: bool = True
    """Whether it answers where a client names no version; of several the last in the file."""


class Plan(Part):
    """What one server serves."""

    models: tuple[Served, ...] = Field(min_length=1)
    """Versions of models, in any order."""
    serve: Serve = Serve()
    """Replicas and limits of the server; each model keeps the limits of its own job."""


def entries_of(run: str, home: Path) -> tuple[tuple[Entry, ...], Serve]:
    """What to serve: a run's model, or all that a serve.yaml names. Raises DloptError."""
    path = Path(run)
    if path.suffix not in (".yaml", ".yml"):
        entry = _entry(Served(run=run), home, Path())
        return (entry,), entry.section
    plan = _read(path)
    entries = tuple(_entry(one, home, path.parent) for one in plan.models)
    seen: set[tuple[str, str]] = set()
    for place, entry in enumerate(entries):
        if (entry.name, entry.version) in seen:
            raise DloptError(f"{path}: models.{place}: version {entry.version} of {entry.name} is there twice: give it another version")
        seen.add((entry.name, entry.version))
    return entries, plan.serve


def _entry(served: Served, home: Path, base: Path) -> Entry:
    near = base / served.run
    folder = near if (near / runs.RUN).is_file() else runs.find(served.run, home)
    name, export = runs.exported(folder)
    section = Serve.model_validate(yaml.safe_load((folder / runs.JOB).read_text())["serve"])
    check(export)
    place = export.path.resolve(), served.name or name, section, str(served.version)
    return Entry(*place, served.labels, served.default, _profile(folder))


def _profile(folder: Path) -> Path | None:
    """Of the data that a run's model was trained on, unless the job wants none or they are gone."""
    record = runs.read(folder)
    if "data" not in record["artifacts"]:
        return None
    path = (folder / record["artifacts"]["data"]).resolve() / PROFILE
    return path if path.is_file() else None


def check(export: Artifact) -> None:
    """A damaged export is refused before anything is started. Raises DloptError."""
    export.check("model.onnx")
    Signature.model_validate_json(export.read("signature.json"))


def _read(path: Path) -> Plan:
    try:
        given = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        said = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
        raise DloptError(f"{path}: {said}") from None
    return Plan.validated(given, f"{path}: ")
