"""What a model looks at: how much worse it is on the test split when one column's values are dealt out anew among the rows (Breiman 2001,
"Random Forests", section 10). The network is asked on prepared rows, as the metrics are."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from dlopt.artifact import Artifact
from dlopt.data.prepared import Split
from dlopt.part import Feature, Target
from dlopt.report import Importance
from dlopt.report.rows import read_rows
from dlopt.train.measure.metrics import activated
from dlopt.train.start import trained_network

ROWS = 1000
"""Test rows that are asked, spread over the split."""
COLUMNS = 200
"""Of a table with more, none is asked: each costs a pass."""
SEED = 11
LEAST = 1e-7
MEASURES = {"category": "cross-entropy", "multi_label": "cross-entropy", "number": "error in standard deviations"}
"""kind of target: what rises."""


@torch.no_grad()
def importance(model: Artifact, data: Artifact) -> Importance | None:
    """Of each column, or of an image or a text as a whole; None where there is no test split, a single column, or too many."""
    split = Split.open(data, "test")
    features = split.signature.inputs
    names = [name for feature in features for name, _ in _columns(feature)]
    if not len(split) or not 1 < len(names) <= COLUMNS:
        return None
    network = trained_network(model, data)
    chosen = np.unique(np.linspace(0, len(split) - 1, min(ROWS, len(split))).astype(int))
    rows = {name: torch.from_numpy(values.copy()) for name, values in read_rows(data, "test", chosen).items()}
    wanted, target = rows.pop(split.signature.target.name), split.signature.target

    def error() -> float:
        return _error(target, activated(target, network(rows).double()), wanted)

    before, rises = error(), []
    order = torch.from_numpy(np.random.default_rng(SEED).permutation(len(chosen)))
    for feature in features:
        whole = rows[feature.name]
        for _, places in _columns(feature):
            changed = whole.clone()
            changed[:, places] = whole[order][:, places]
            rows[feature.name] = changed
            rises.append(error() - before)
        rows[feature.name] = whole
    found = np.array(rises)
    return Importance(MEASURES[target.kind], before, len(chosen), names, found) if np.isfinite([before, *found]).all() else None


def _columns(feature: Feature) -> Iterator[tuple[str, slice]]:
    """Each column of an input, and where its numbers are; an image and a text are one."""
    if feature.holds in ("pixels", "tokens") or feature.is_vector:
        yield feature.name, slice(None)
        return
    width = feature.size // len(feature.columns)
    for place, name in enumerate(feature.columns):
        yield name, slice(place * width, (place + 1) * width)


def _error(target: Target, outputs: Tensor, wanted: Tensor) -> float:
    """The mean over the rows: of classes and labels the cross-entropy, of numbers the absolute error by their spread."""
    if target.kind == "category":
        return float(-outputs.gather(1, wanted[:, None]).clamp_min(LEAST).log().mean())
    if target.kind == "multi_label":
        so = torch.where(wanted > 0, outputs, 1 - outputs)
        return float(-so.clamp_min(LEAST).log().mean())
    spread = wanted.double().std(dim=0, correction=0).clamp_min(LEAST)
    return float(((outputs - wanted).abs() / spread).mean())
