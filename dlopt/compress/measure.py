"""What a compressed model is beside the one that it was made of: bytes, packed and not, numbers, work, time, and metrics."""

from __future__ import annotations

import statistics
import time
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dlopt.compress.model import Model
from dlopt.data.prepared import Rows, Split
from dlopt.export.base import Compute
from dlopt.export.graph import onnx_file, session_of
from dlopt.export.proof import DECISIVE, agreement, compare, fed, metrics_of
from dlopt.export.trained import Trained, examples
from dlopt.models import Network
from dlopt.part import Signature
from dlopt.train.start import trained_network

BATCHES = (1, 32)
SECONDS, LEAST_RUNS = 0.6, 20
"""How long two files are run in turn for each batch size, and how often at least."""


def comparison(model: Model) -> dict[str, Any]:
    """Metrics of every split, and the table: a row for the original in float32, and one for the model as it is now. All is computed by
    onnxruntime, on one thread."""
    plain = trained_network(model.original, model.data).float()
    files = {"float32": onnx_file(plain, model.signature, model.original.manifest.digest), "compressed": model.onnx()}
    computes = {name: session_of(content, model.signature, threads=1) for name, content in files.items()}
    times = {batch: in_turn(computes, rows_of(model, batch)) for batch in BATCHES}
    table, metrics = [], dict[str, Any]()
    outputs: dict[str, np.ndarray] = {}
    for name, compute in computes.items():
        found = {split: said_of(model, compute, split) for split in ("validation", "test")}
        known = {split: measured for split, (measured, _) in found.items() if measured}
        last = list(known)[-1] if known else None
        outputs[name] = found[last][1] if last else np.zeros((0, 1))
        network = plain if name == "float32" else model.network
        row = {"what": name, "bytes": len(files[name]), "zlib": len(zlib.compress(files[name], 9))} | counted(network, model.signature)
        row |= {f"seconds_{batch}": times[batch][name] for batch in BATCHES}
        row |= {"split": last, "metric": DECISIVE[model.signature.target.kind]}
        row |= {"value": known[last][str(row["metric"])] if last else None, "metrics": known}
        row["agreement"] = agreement(model.signature.target, outputs[name], outputs["float32"]) if last else None
        table.append(row)
        metrics = known
    return {"metrics": metrics, "table": table}


def decisive(model: Model) -> tuple[str, float | None, float | None]:
    """The metric that counts on the validation split (or the test split where it has no rows): of the original, and of the model."""
    plain = trained_network(model.original, model.data).float()
    files = (onnx_file(plain, model.signature, model.original.manifest.digest), model.onnx())
    split = "validation" if len(Split.open(model.data, "validation")) else "test"
    before, after = (said_of(model, session_of(content, model.signature), split)[0] for content in files)
    assert before and after
    name = DECISIVE[model.signature.target.kind]
    return name, before[name], after[name]


def said_of(model: Model, compute: Compute, name: str) -> tuple[dict[str, float | None] | None, np.ndarray]:
    """Metrics of a split, and the outputs; None of one without rows."""
    split = Split.open(model.data, name)
    if not len(split):
        return None, np.zeros((0, 1))
    target = model.signature.target
    wanted = torch.from_numpy(np.concatenate([split.read([chunk])[target.name] for chunk in split.chunks]))
    given = Trained(model.network, model.signature, model.original, split, name, np.zeros((len(split), target.size)), wanted)
    outputs = compare(compute, model.signature, split, given.outputs).outputs
    return metrics_of(given, outputs), outputs


def rows_of(model: Model, count: int) -> Rows:
    """So many training rows as the graph takes them, some of them again where there are fewer."""
    split = Split.open(model.data, "train")
    rows = fed(model.signature, split.read(split.chunks[:1]))
    places = np.arange(count) % len(next(iter(rows.values())))
    return {name: values[places] for name, values in rows.items()}


def in_turn(computes: dict[str, Compute], rows: Rows) -> dict[str, float]:
    """The median of the seconds that each takes, run one after the other, again and again: what else the machine does hits both."""
    taken: dict[str, list[float]] = {name: [] for name in computes}
    end = time.perf_counter() + SECONDS
    for compute in computes.values():
        compute(rows)
    while time.perf_counter() < end or len(taken["float32"]) < LEAST_RUNS:
        for name, compute in computes.items():
            start = time.perf_counter()
            compute(rows)
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in taken.items()}


def counted(network: Network, signature: Signature) -> dict[str, int]:
    """How many numbers a network has learned, how many are not 0, and the multiplications of one row, of all of them and of those."""
    work = {"multiply_adds": 0, "nonzero_multiply_adds": 0}
    hooks = []

    def listen(layer: nn.Module) -> Callable[[nn.Module, Any, Tensor], None]:
        weight = dict(layer.named_parameters(recurse=False))["weight"].detach()
        share = float((weight != 0).double().mean())

        def count(_module: nn.Module, _inputs: Any, outputs: Tensor) -> None:
            times = outputs.numel() * weight[0].numel()
            work["multiply_adds"] += times
            work["nonzero_multiply_adds"] += round(times * share)

        return count

    for layer in network.modules():
        if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            hooks.append(layer.register_forward_hook(listen(layer)))
    inputs = {feature.name: values for feature, values in zip(signature.inputs, examples(signature, rows=1), strict=True)}
    with torch.no_grad():
        network.eval()({name: values.float() if values.dtype == torch.float64 else values for name, values in inputs.items()})
    for hook in hooks:
        hook.remove()
    learned = list(network.parameters())
    return {"parameters": sum(one.numel() for one in learned), "nonzero": sum(int((one != 0).sum()) for one in learned)} | work
