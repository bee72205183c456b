"""The compress stage: one compressor on a model, or on what another has left of it, and what that has cost and brought."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save as save_tensors

from dlopt.artifact import Artifact, Stage, write_atomically
from dlopt.compress import Compression
from dlopt.compress.measure import BATCHES, comparison
from dlopt.compress.model import WEIGHTS, Model
from dlopt.export.coding import FILE, write
from dlopt.part import Part
from dlopt.progress import Progress, silent
from dlopt.train.checkpoint.stores import CHECKPOINTS
from dlopt.train.job import Fit, Resources


class Compress(Part):
    """What a step of compression is decided by."""

    fit: Fit
    """The section of the model."""
    part: Compression
    """What is done."""


def compress(
    section: Compress,
    out: Path,
    before: Artifact,
    data: Artifact,
    *,
    original: Artifact,
    resources: Resources,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write a model's artifact that is smaller than `before`; returns its metrics, and a table of what it is beside `original`."""
    section.part.check()
    progress("compress", None, section.part.kind)
    model = Model.of(before, data, original, out, resources, progress)
    section.part.apply(model)
    model.settle()
    progress("compress", None, "measuring")
    info = comparison(model) | ({"tried": model.tried} if model.tried else {})
    progress("compress", None, said(*info["table"]))
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in model.network.state_dict().items()}
    write_atomically(out / WEIGHTS, save_tensors(tensors))
    for name in ("signature.json", "statistics.json"):
        write_atomically(out / name, original.read(name))
    if model.coding:
        write_atomically(out / FILE, write(model.coding))
    if model.graph:
        write_atomically(out / "model.onnx", model.graph)
    return info


def said(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """What came of it, in a line: among it that a file is slower here, as whole numbers are on some processors."""
    fast = {batch: before[f"seconds_{batch}"] / after[f"seconds_{batch}"] for batch in BATCHES}
    times = ", ".join(f"{ratio:.2f} times as fast at {batch} row{'s' * (batch > 1)}" for batch, ratio in fast.items())
    slower = "; on this processor float32 is faster" if max(fast.values()) < 1 else ""
    return f"{after['bytes'] / before['bytes']:.2f} of the bytes, {after['zlib'] / before['zlib']:.2f} packed, {times}{slower}"


COMPRESS = Stage("compress", compress, scratch=CHECKPOINTS)
