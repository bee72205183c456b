"""The proof of an export, the same for every format: what its own runtime says of the whole test split is what torch says, or, of a coarser
precision, costs no more of the metric than is allowed; and a row's answer does not depend on the rows beside it."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch

from dlopt.data.prepared import Rows, Split
from dlopt.export.base import Compute
from dlopt.export.trained import Trained
from dlopt.part import DloptError, Feature, Signature, Target
from dlopt.train.loop.losses import loss_of, unsmoothed
from dlopt.train.measure.metric import METRICS
from dlopt.train.measure.metrics import Metrics, decided, tally

TIE = 1e-6
"""Two classes whose probabilities in torch are as close as float32 rounds: either is the label, as the order of a sum has it."""
MOST_TOGETHER, MOST_ALONE, SMALLER = 64, 16, 7
"""Rows that are run in several ways to see whether they mix."""
UNKNOWN = "?"
"""Stands for a string that is in no vocabulary; doubled until it is in none."""
DECISIVE = {"category": "accuracy", "multi_label": "micro_f1", "number": "rmse"}
"""The metric that a coarser precision may cost so much of, by the kind of the target."""


class Comparison(NamedTuple):
    """What a format says of a split, beside torch."""

    largest: float
    """The largest difference in units, NaN when an output is."""
    other_labels: int
    """How many rows get other labels."""
    outputs: np.ndarray
    """What it said, less the target's offsets."""


def compare(
    compute: Compute, signature: Signature, split: Split, expected: np.ndarray, unit: np.ndarray | float = 1.0, strings: bool = True
) -> Comparison:
    """Run a format on a split. expected: torch's probabilities, or numbers less the target's offsets, float64 (rows, outputs). strings:
    whether it takes categories as such."""
    largest, other_labels, start = 0.0, 0, 0
    offsets, outputs = np.array(signature.target.offsets or 0.0), []
    for chunk in split.chunks:
        found = compute(fed(signature, split.read([chunk]), strings))
        found, part = found - offsets if signature.target.offsets else found, expected[start : start + len(found)]
        largest = float(np.maximum(largest, differences(found, part, signature, unit).max()))  # Python's max would lose a NaN
        other_labels += count_other_labels(found, part, signature.target) if signature.target.kind != "number" else 0
        start += len(found)
        outputs.append(found)
    return Comparison(largest, other_labels, np.concatenate(outputs))


def refuse_mixing(
    compute: Compute, signature: Signature, split: Split, tolerance: float, unit: np.ndarray | float = 1.0, strings: bool = True
) -> None:
    """Run rows of a split together, alone, in another order and in other batches: what a row gets must not depend on its neighbours, which
    are strangers' when the model is served. Raises DloptError."""
    rows = {name: values[:MOST_TOGETHER] for name, values in split.read(split.chunks[:1]).items()}
    count = len(next(iter(rows.values())))

    def run(places: np.ndarray) -> np.ndarray:
        found = compute(fed(signature, {name: values[places] for name, values in rows.items()}, strings))
        return np.asarray(found) - np.array(signature.target.offsets or 0.0)

    order = np.arange(count)
    together = run(order)
    ways = {
        "alone": np.concatenate([run(order[[place]]) for place in order[:MOST_ALONE]]),
        "in another order": run(order[::-1])[::-1],
        "in smaller batches": np.concatenate([run(part) for part in np.array_split(order, range(SMALLER, count, SMALLER))]),
    }
    for way, found in ways.items():
        difference = float(differences(found, together[: len(found)], signature, unit).max())
        if not difference <= tolerance:
            raise DloptError(
                f"export: the model mixes rows: {way}, a row gets another answer (by {difference:.2g}) than among {count}, so a client's "
                "rows would change another's: compute means and the like over a row's own values, and over a batch only in training"
            )


def differences(found: np.ndarray, expected: np.ndarray, signature: Signature, unit: np.ndarray | float) -> np.ndarray:
    """In units; of numbers, whose size has nothing to do with their spread, what is beyond the two last places of float32."""
    difference = np.abs(found - expected)
    if signature.target.kind == "number":
        rounding = 2 * np.spacing(np.abs(expected).astype(np.float32)) + np.spacing(np.abs(signature.target.offsets or 0.0))
        difference = np.maximum(difference - rounding, 0)
    return np.asarray(difference / unit)


def count_other_labels(found: np.ndarray, expected: np.ndarray, target: Target) -> int:
    """Rows to which `found` gives a label that `expected` does not, be it as one of a tie or of one that is as close to its threshold."""
    if target.kind == "category" and not target.thresholds:
        given = np.take_along_axis(expected, found.argmax(axis=1)[:, None], axis=1)[:, 0]
        return int((expected.max(axis=1) - given > TIE).sum())
    if target.kind == "category":
        found, expected = found[:, [target.positive_index]], expected[:, [target.positive_index]]
    least = np.array(target.thresholds or 0.5)
    other = ((found >= least) != (expected >= least)) & (np.abs(expected - least) > TIE)
    return int(other.any(axis=1).sum())


def metrics_of(trained: Trained, outputs: np.ndarray) -> Metrics:
    """The metrics of a split of which a format says this: probabilities, or numbers less the target's offsets, (rows, outputs)."""
    target, found = trained.signature.target, torch.from_numpy(np.asarray(outputs)).double()
    if target.kind != "number":
        found = found.clamp(min=1e-38).log() - (0.0 if target.kind == "category" else (1 - found).clamp(min=1e-38).log())
    counted = tally(target, trained.network.output, len(found), torch.device("cpu"))
    losses = loss_of(unsmoothed(trained.fit.train.loss), target, trained.network.output)
    counted.add(found, trained.targets, losses(found, trained.targets, "none"))
    return counted.metrics(len(found))


def agreement(target: Target, outputs: np.ndarray, expected: np.ndarray) -> float | None:
    """The share of rows that are decided alike; of numbers there is none."""
    if target.kind == "number":
        return None
    alike = decided(target, torch.from_numpy(np.asarray(outputs))) == decided(target, torch.from_numpy(expected))
    return float((alike if alike.dim() == 1 else alike.all(dim=1)).double().mean())


def loss_of_metric(name: str, before: float | None, after: float | None) -> float:
    """What was lost of a metric: of a share the difference, of an error the relative increase; infinite where it cannot be told."""
    if before is None or after is None or not math.isfinite(after):
        return math.inf
    metric = METRICS[name]
    if metric.is_share:
        return after - before if metric.smaller_is_better else before - after
    return (after - before if metric.smaller_is_better else before - after) / (abs(before) or 1.0)


def fed(signature: Signature, rows: Rows, strings: bool = True) -> Rows:
    """Prepared rows as the graph takes them: codes of categories as strings again, numbers with their offsets, and texts as long as the
    longest of them."""
    return {feature.name: _fed(feature, rows[feature.name], strings) for feature in signature.inputs}


def _fed(feature: Feature, values: np.ndarray, strings: bool) -> np.ndarray:
    if feature.dtype == "string":
        return _strings(feature, values) if strings else values
    if feature.offsets:
        return values + np.array(feature.offsets)
    return values[:, : max(1, int(np.count_nonzero(values, axis=1).max()))] if feature.holds == "tokens" else values


def _strings(feature: Feature, codes: np.ndarray) -> np.ndarray:
    """Codes (rows, columns) to strings that have them: of the code that stands for missing values, "" in every second row."""
    columns = []
    for column, (known, missing) in enumerate(zip(feature.vocabularies, feature.missing, strict=True)):
        unknown = UNKNOWN
        while unknown in known:
            unknown += UNKNOWN
        strings = np.array([unknown, *known], dtype=object)[codes[:, column]]
        strings[(codes[:, column] == missing) & (np.arange(len(codes)) % 2 == 0)] = ""
        columns.append(strings)
    return np.stack(columns, axis=1)


def facts(trained: Trained, found: Comparison) -> dict[str, Any]:
    """For the manifest."""
    where = {"split": trained.split_name, "rows": len(found.outputs)}
    return {"largest_difference": found.largest, "other_labels": found.other_labels, **where}
