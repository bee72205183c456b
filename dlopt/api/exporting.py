"""A run's model in another format, and where the files go."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dlopt.artifact import Artifact, write_atomically
from dlopt.export import Format
from dlopt.export.base import ExportFormat
from dlopt.part import DloptError, Part
from dlopt.progress import Progress, silent


class _Chosen(Part):
    """Gives messages their beginning."""

    export: Format


def export(folder: Path, kind: str, fields: Mapping[str, Any], place: Path | None = None, progress: Progress = silent) -> Path:
    """Make the format if the run does not have it, and copy it. place: a file, or a folder that is there, which gets all files; without it
    they stay in the run's folder. Returns where the model is. Raises DloptError."""
    from dlopt import pipeline

    part = format_of(kind, fields)
    if place is not None and not place.parent.is_dir():
        raise DloptError(f"export: there is no folder {place.parent}")
    found = pipeline.export(folder, part, progress)
    if place is None:
        return folder / pipeline.plain_name(f"export.{part.name}", part.file)
    return copied(found, part, place)


def format_of(kind: str, fields: Mapping[str, Any]) -> ExportFormat:
    """One of those that there are. Raises DloptError."""
    part: ExportFormat = _Chosen.validated({"export": {"kind": kind, **fields}}).export
    return part


def copied(found: Artifact, part: ExportFormat, place: Path) -> Path:
    """The files of an export, each whole or not at all."""
    if place.is_dir():
        for name in found.manifest.files:
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(place / name, found.read(name))
        return place / part.file
    beside = [name for name in found.manifest.files if name != "signature.json" and not name.startswith(part.file)]
    if beside:
        raise DloptError(f"-o {place}: {part.kind} is several files ({part.file}, {', '.join(beside[:3])}): give a folder that is there")
    for name in found.manifest.files:
        if name.startswith(part.file):
            write_atomically(place.with_name(place.name + name.removeprefix(part.file)), found.read(name))
    return place
