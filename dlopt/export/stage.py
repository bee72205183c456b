"""The export stage: a trained network in a format, and the proof that the format says what the network does."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dlopt.artifact import Artifact, Stage, write_atomically
from dlopt.export.base import ExportFormat
from dlopt.export.proof import DECISIVE, Comparison, agreement, compare, facts, loss_of_metric, metrics_of, refuse_mixing
from dlopt.export.trained import Trained
from dlopt.part import DloptError
from dlopt.progress import Progress, silent


def export(section: ExportFormat, out: Path, model: Artifact, data: Artifact, *, progress: Progress = silent) -> dict[str, Any]:
    """Write the format's files and signature.json; returns what was measured: among it the largest difference from torch, of a probability
    or of a number in standard deviations.

    Raises RuntimeError when the outputs differ from torch's by more than the tolerance, are not finite, or give another class or label on a
    row that is no tie, or where a coarser precision costs more of the metric than it may; DloptError when rows change each other's
    outputs, or the format cannot say what the model does.
    """
    section.check()
    if "model.onnx" in model.manifest.files and not section.of_onnx:
        raise DloptError(f"export: {section.kind}: the model is quantized in ONNX alone: export it as onnx, pickle or joblib")
    progress("export", None, f"writing {section.name}")
    trained = Trained.of(model, data)
    with nothing_half_written(out):
        info = section.write(trained, out)
        write_atomically(out / "signature.json", model.read("signature.json"))
        progress("export", None, f"comparing {len(trained.outputs):,} rows with torch")
        compute = section.load(out, trained)
        unit = (trained.unit, section.strings)
        found = compare(compute, trained.signature, trained.split, trained.outputs, *unit)
        coarse = section.rounds or (section.of_onnx and trained.whole)
        info |= facts(trained, found) | (_coarser(section, trained, found) if coarse else _equal(section, trained, found))
        if section.of_onnx and trained.whole:
            info |= {"exact_difference": _exact(section, trained)}
        refuse_mixing(compute, trained.signature, trained.split, max(section.tolerance, found.largest if coarse else 0), *unit)
        return info | {
            "use": section.use,
            "bytes": sum(file.stat().st_size for file in out.rglob("*") if file.is_file() and file.name != "signature.json"),
        }


EXPORT = Stage("export", export)


def _equal(section: ExportFormat, trained: Trained, found: Comparison) -> dict[str, Any]:
    """Refuse what differs."""
    if found.other_labels or not found.largest <= section.tolerance:
        rows, target = len(found.outputs), trained.signature.target
        other = f" and gives another label on {found.other_labels} of {rows} rows" if target.kind != "number" else ""
        raise RuntimeError(
            f"export refused: on the {trained.split_name} split the {section.name} file differs from torch by up to {found.largest:.2g} "
            f"(export.tolerance is {section.tolerance:g}){other}"
        )
    return {}


def _exact(section: ExportFormat, trained: Trained) -> float:
    """The difference of a graph of whole numbers that is computed as it stands, which is refused as any is."""
    from dlopt.export.graph import session_of, written

    compute = session_of(written(trained), trained.signature, exact=True)
    found = compare(compute, trained.signature, trained.split, trained.outputs, trained.unit)
    _equal(section, trained, found)
    return found.largest


def _coarser(section: ExportFormat, trained: Trained, found: Comparison) -> dict[str, Any]:
    """Refuse what costs too much of the metric, and tell what it costs."""
    target, most = trained.signature.target, section.drop
    name = DECISIVE[target.kind]
    before, after = (metrics_of(trained, outputs)[name] for outputs in (trained.outputs, found.outputs))
    lost = loss_of_metric(name, before, after)
    if not lost <= most + 1e-9 or not found.largest < float("inf"):
        raise RuntimeError(
            f"export refused: on the {trained.split_name} split the {section.name} file has {name} {after}, where torch has {before}, "
            f"and export.drop allows {most:g}"
        )
    return {"metric": {"name": name, "torch": before, "here": after}, "agreement": agreement(target, found.outputs, trained.outputs)}


@contextmanager
def nothing_half_written(out: Path) -> Iterator[None]:
    """Whatever ends what is done within it, a folder is empty then."""
    try:
        yield
    except BaseException:
        for left in out.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        raise
