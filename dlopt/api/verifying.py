"""Whether a run is what it says: digests of its files, metrics of its model, and what each of its formats computes, all of it anew."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from dlopt.artifact import Artifact
from dlopt.data.prepared import Split
from dlopt.export import Format
from dlopt.export.base import ExportFormat
from dlopt.export.proof import DECISIVE, compare, loss_of_metric, metrics_of
from dlopt.export.trained import Trained
from dlopt.part import DloptError, Signature
from dlopt.progress import Progress, silent
from dlopt.runs import artifact, read
from dlopt.train.measure.evaluate import evaluate
from dlopt.train.start import fit_of, trained_network

CLOSE = 1e-6
"""How near to each other metrics of the same model are on two machines, relatively."""


def verify(folder: Path, progress: Progress = silent) -> list[str]:
    """A line for whatever differs; none when all is as it was sealed. Raises DloptError for what is no run."""
    record = read(folder)
    found: dict[str, Artifact] = {}
    wrong: list[str] = []
    for name in record["artifacts"]:
        progress("verify", None, f"{name}: digests")
        try:
            found[name] = artifact(folder, record, name)
        except DloptError as error:
            wrong.append(f"{name}: {error}")
            continue
        wrong += [f"{name}: {said}" for said in damaged(found[name])]
    if wrong or not {"data", "model"} <= set(found):
        return wrong
    progress("verify", None, "model: metrics")
    wrong += [f"model: {said}" for said in other_metrics(found["model"], found["data"])]
    trained = Trained.of(found.get("compress", found["model"]), found["data"])
    for name in (name for name in found if name.startswith("export.")):
        progress("verify", None, f"{name}: {len(trained.outputs):,} rows")
        wrong += [f"{name}: {said}" for said in other_outputs(found[name], trained)]
    return wrong


def damaged(found: Artifact) -> Iterator[str]:
    """Files whose content is not what was sealed."""
    for name in found.manifest.files:
        try:
            found.check(name)
        except DloptError as error:
            yield str(error)


def other_metrics(model: Artifact, data: Artifact) -> Iterator[str]:
    """Metrics of the model that are others when they are computed again."""
    network, loss = trained_network(model, data), fit_of(model).train.loss
    thresholds = Signature.model_validate_json(model.read("signature.json")).target.thresholds
    for split, known in model.info["metrics"].items():
        again = evaluate(network, Split.open(data, split), torch.device("cpu"), loss=loss, thresholds=thresholds)
        yield from (f"{split} {said}" for said in differing(known, again))


def differing(known: Mapping[str, Any], again: Mapping[str, Any]) -> Iterator[str]:
    """A line for each number that is another one."""
    for name, value in known.items():
        now = again.get(name)
        if (value is None) != (now is None) or (value is not None and abs(now - value) > CLOSE * max(1.0, abs(value))):
            yield f"{name} is {now}, and was {value}"


def other_outputs(found: Artifact, trained: Trained) -> Iterator[str]:
    """What a format says that is too far from torch."""
    part: ExportFormat = TypeAdapter(Format).validate_python(found.manifest.section)
    part.check()
    again = compare(part.load(found.path, trained), trained.signature, trained.split, trained.outputs, trained.unit, part.strings)
    if not (part.rounds or (part.of_onnx and trained.whole)):
        if not again.largest <= part.tolerance or again.other_labels:
            yield f"differs from torch by up to {again.largest:.2g} ({found.info['largest_difference']:.2g} when it was written)"
        return
    name = DECISIVE[trained.signature.target.kind]
    before, now = (metrics_of(trained, outputs)[name] for outputs in (trained.outputs, again.outputs))
    if not loss_of_metric(name, before, now) <= part.drop:
        yield f"{name} is {now}, and torch's {before} (it was {found.info['metric']['here']})"
