"""What happens before the first step: the network of a job, data-dependent initialisation, the look at its layers, the range test."""

from __future__ import annotations

import importlib
import json
import threading
from collections.abc import Iterator, Mapping
from itertools import cycle, islice
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from dlopt.artifact import Artifact
from dlopt.data.feed.batches import Batch, shortened
from dlopt.data.prepared import Rows, Split
from dlopt.models import Network, build_network
from dlopt.models.lsuv import lsuv
from dlopt.models.shape import shaped_like
from dlopt.part import Signature, Statistics
from dlopt.train.job import Fit
from dlopt.train.loop.losses import loss_of
from dlopt.train.loop.objectives import Objective, class_weights, supervised
from dlopt.train.loop.pipeline import Pipeline
from dlopt.train.loop.range_test import STEPS, Sweep, sweep
from dlopt.train.loop.steps import peaked
from dlopt.train.parallel.base import Parallel

SAMPLE = 256
"""Rows that layers are measured and scaled on before the first step."""
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.float32, "float16": torch.float32}
"""Of weights, by the precision of a job: half precision is for what layers compute alone."""


def import_ahead(trains: bool) -> None:
    """If this process trains, import in a thread what torch imports when the first optimizer is made, which takes a second: Ray's start is
    a time to wait. Nothing of Ray: its packages import each other in circles, at which two threads deadlock."""
    if trains:
        threading.Thread(target=importlib.import_module, args=("torch._dynamo",), name="dlopt-import", daemon=True).start()


def load_network(fit: Fit, data: Artifact) -> Network:
    """The network of a job as it is built, its sizes and preprocessing from the prepared data."""
    signature = Signature.model_validate_json(data.read("signature.json"))
    return build_network(fit.model, signature, read_statistics(data), fit.seed, DTYPES[fit.train.precision])


def fit_of(model: Artifact) -> Fit:
    """The section that a model was fitted by, be it compressed since."""
    section = model.manifest.section
    return Fit.model_validate(section.get("fit", section))


def trained_network(model: Artifact, data: Artifact) -> Network:
    """The network of a model artifact with its trained weights, ready to predict."""
    return network_with(fit_of(model), data, load_tensors(model.read("weights.safetensors")))


def network_with(fit: Fit, data: Artifact, tensors: Mapping[str, Tensor]) -> Network:
    """The network of a job with these weights, and of their shapes, ready to predict."""
    network = shaped_like(load_network(fit, data), tensors)
    network.load_state_dict(tensors)
    return network.eval()


def scaled_by_data(network: Network, fit: Fit, split: Split, device: torch.device) -> None:
    """Layer-sequential unit-variance initialisation, where the model asks for it, on the first rows of the training split."""
    if "lsuv" in _named("init", fit.model.model_dump()):
        lsuv(network, first_rows(split, device))


def _named(name: str, section: dict[str, Any]) -> Iterator[Any]:
    """What a field of this name holds, in a part and in those within it."""
    for key, value in section.items():
        if key == name:
            yield value
        if isinstance(value, dict):
            yield from _named(name, value)


def peak_of(fit: Fit, rows: int) -> float | None:
    """The job's peak rate for its batch; None where it is to be found by trying."""
    rate, scale = fit.train.optimizer.lr, fit.train.scale_lr
    if rate == "auto":
        return None
    return rate * scale.factor(fit.train.rows_of_batch(rows)) if scale else rate


def optimizer_of(fit: Fit, network: nn.Module, peak: float, parallel: Parallel | None = None) -> torch.optim.Optimizer:
    """The job's optimizer, with what is wrapped around it, on the groups of the network's parameters. parallel: how they are shared out."""
    parallel, part = parallel or Parallel(network), fit.train.optimizer.model_copy(update={"lr": peak})
    optimizer = parallel.optimizer(part.build(parallel.groups(fit.train.parameters.of(network, part))))
    return peaked(fit.train.lookahead.wrap(optimizer) if fit.train.lookahead else optimizer)


def objective_of(fit: Fit, data: Artifact, network: Network, device: torch.device, copies: int = 1) -> Objective:
    """What the job minimises, each worker its part of it. copies: how many workers hold each weight."""
    train, split = fit.train, Split.open(data, "train")
    target, weights = split.signature.target, None
    if train.class_weights is not None:
        rows = data.info["labels"]["train"]
        by_class = class_weights(train.class_weights, target, rows, len(split), train.sampling == "balanced")
        weights = by_class.to(device, DTYPES[train.precision])
    return supervised(loss_of(train.loss, target, network.output, weights), train.l1, train.l2, copies)


def pipeline_of(fit: Fit, data: Artifact, network: Network, peak: float, device: torch.device) -> Pipeline:
    """The steps of a job on a network that this worker has for itself."""
    alone = Parallel(network)
    return Pipeline(fit.train, objective_of(fit, data, network, device), optimizer_of(fit, network, peak, alone), alone, fit.seed % 2**63)


def swept(fit: Fit, network: Network, data: Artifact, device: torch.device) -> Sweep:
    """The range test of a job, on copies of the network and the first rows of the training split."""
    split = Split.open(data, "train")
    batches = list(endless_batches(split, fit.train.rows_of_batch(len(split)), STEPS, device))
    return sweep(network, lambda model, rate: pipeline_of(fit, data, cast(Network, model), rate, device), batches, fit.seed % 2**63)


def read_statistics(data: Artifact) -> dict[str, Statistics]:
    """Of a prepared set, by the name of the input or the target."""
    return {name: Statistics.model_validate(one) for name, one in json.loads(data.read("statistics.json")).items()}


def first_rows(split: Split, device: torch.device) -> dict[str, Tensor]:
    """Inputs of at most SAMPLE rows. Rows lie in the order of their hashes, so the first ones are as good as drawn at random."""
    return next(first_batches(split, SAMPLE, 1, device)).inputs


def first_batches(split: Split, size: int, most: int, device: torch.device) -> Iterator[Batch]:
    """At most so many batches of the rows as they lie, not augmented: the same on all workers. Only the last one may be short."""
    rest: list[Rows] = []
    made = there = 0
    for chunk in split.chunks:
        rest.append(split.read([chunk]))
        there += chunk.rows
        while there >= size and made < most:
            rows, rest = _cut(rest, size)
            yield _batch(rows, split, device)
            made, there = made + 1, there - size
        if made == most:
            return
    if there:
        yield _batch(_cut(rest, there)[0], split, device)


def endless_batches(split: Split, size: int, most: int, device: torch.device) -> Iterator[Batch]:
    """So many batches: the first ones that are whole, again and again where the split has fewer."""
    batches = list(first_batches(split, size, most, device))
    return islice(cycle([batch for batch in batches if batch.total == size] or batches), most)


def _cut(rest: list[Rows], size: int) -> tuple[Rows, list[Rows]]:
    """The first `size` rows of some, and what is left."""
    whole = {name: np.concatenate([rows[name] for rows in rest]) for name in rest[0]}
    return {name: values[:size] for name, values in whole.items()}, [{name: values[size:] for name, values in whole.items()}]


def _batch(rows: Rows, split: Split, device: torch.device) -> Batch:
    values = {name: torch.from_numpy(array.copy()).to(device) for name, array in rows.items()}
    target = values.pop(split.signature.target.name)
    return Batch(shortened(values, split.signature.inputs), target, len(target))
