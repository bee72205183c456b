"""The health of training as figures and tables: what the looks at layers showed, how they began, and the test of learning rates."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dlopt.artifact import Artifact
from dlopt.report import Figure, layered, words
from dlopt.train.watch import metrics_log

KINDS = {
    "vanishing": "vanishing gradient",
    "exploding": "exploding gradient",
    "dead": "dead units",
    "saturated": "saturated units",
    "update": "too large steps",
    "not_finite": "gradient not finite",
    "spike": "loss spike",
}
ROLLED_BACK = "went back"
TITLES = {"gradient": "Gradient norm by layer", "ratio": "Size of a step against the weights"}
"""What is drawn of every layer over the steps, by its name in a look."""


class Finding(NamedTuple):
    """Something that was wrong with training."""

    step: str
    what: str
    layers: str
    says: str


class Start(NamedTuple):
    """A layer before the first step. Bars are shares, from 0 to 1, of the widest of their column."""

    layer: str
    kind: str
    weights: str
    weights_bar: float
    activations: str
    activations_bar: float
    zero: str
    saturated: str


def read(model: Artifact) -> dict[str, Any] | None:
    """What health_part.html shows as `health`, from the files of a model that has them. Raises DloptError when one is damaged."""
    files = model.manifest.files
    lines = list(metrics_log.read(model.check(metrics_log.HEALTH))) if metrics_log.HEALTH in files else []
    starts, sweep = (json.loads(model.read(name)) if name in files else None for name in (metrics_log.LAYERS, metrics_log.RANGE))
    return context(lines, starts or [], sweep)


def context(
    lines: Sequence[Mapping[str, Any]], starts: Sequence[Mapping[str, Any]], sweep: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    """lines: of health.jsonl. starts: layers.json, a layer's spread at step 0 each. sweep: range.json, of a range test. None where
    nothing is there to be shown."""
    looks = [line for line in lines if line.get("layers")]
    if not (looks or starts or sweep or lines):
        return None
    return {
        "looks": len(looks),
        "steps": (looks[0]["step"], looks[-1]["step"]) if looks else None,
        "findings": findings(lines),
        "figures": figures(looks),
        "many": bool(looks) and len(looks[0]["layers"]) > layered.MOST_LINES,
        "starts": starting(starts),
        "sweep": _sweep(sweep) if sweep else None,
    }


def findings(lines: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """In the order of the steps; what was said twice, because training went on from a checkpoint, once."""
    found: dict[tuple[Any, ...], Finding] = {}
    for line in lines:
        for one in line.get("findings") or ():
            key = (one["kind"], *one["layers"]) if one["layers"] else (one["kind"], one["step"])
            found.setdefault(key, Finding(f"{one['step']:,}", KINDS.get(one["kind"], one["kind"]), ", ".join(one["layers"]), one["says"]))
        if "rollback" in line:
            says = f"{line['rollback']}: back to the end of epoch {line['epoch']}, and on at a rate of {line['rate']:.3g}"
            found[ROLLED_BACK, len(found)] = Finding(f"{line['step']:,}", ROLLED_BACK, "", says)
    return list(found.values())


def figures(looks: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """Norms of gradients, and updates against weights, of every layer over the steps; none where no step was looked at."""
    return [figure(key, looks) for key in TITLES] if looks else []


def figure(key: str, looks: Sequence[Mapping[str, Any]], run: str = "", between: tuple[float, float] | None = None) -> Figure:
    """One of TITLES, of one look at least. run: tells figures of several runs apart. between: the ends of the scale, the same in all of
    them, which then are heat maps."""
    title = TITLES[key]
    steps, (layers, values) = [look["step"] for look in looks], _table(key, looks)
    return Figure(title, layered.by_layer(title + run, steps, layers, values, between), _said(title, steps, layers, values))


def extent(key: str, runs: Sequence[Sequence[Mapping[str, Any]]]) -> tuple[float, float]:
    """The ends of a scale for the looks of all these runs."""
    return layered.extent(np.concatenate([np.zeros(0), *(_table(key, looks)[1].ravel() for looks in runs)]))


def starting(starts: Sequence[Mapping[str, Any]]) -> list[Start]:
    """A row a layer, in the order of the forward pass."""
    widest = {of: max((start[of]["std"] or 0.0 for start in starts), default=0.0) or 1.0 for of in ("weights", "activations")}
    return [
        Start(
            start["layer"],
            start["kind"],
            _spread(start["weights"]),
            (start["weights"]["std"] or 0.0) / widest["weights"],
            _spread(start["activations"]),
            (start["activations"]["std"] or 0.0) / widest["activations"],
            words.percent(start["activations"]["zero"]),
            words.percent(start["activations"]["saturated"]),
        )
        for start in starts
    ]


def _table(key: str, looks: Sequence[Mapping[str, Any]]) -> tuple[list[str], np.ndarray]:
    """The layers in the order of the forward pass, and their values, (layers, looks)."""
    layers = list(dict.fromkeys(layer for look in looks for layer in look["layers"]))
    return layers, np.array([_column(look, key, layers) for look in looks], dtype=np.float64).reshape(len(looks), len(layers)).T


def _column(look: Mapping[str, Any], key: str, layers: Sequence[str]) -> list[float]:
    """A look's values in the order of these layers, NaN for what is not there or not finite."""
    there = dict(zip(look["layers"], look[key], strict=True))
    return [np.nan if (value := there.get(layer)) is None else value for layer in layers]


def _said(title: str, steps: Sequence[int], layers: Sequence[str], values: np.ndarray) -> str:
    last = values[:, -1]
    lost = int(np.isnan(values).sum())
    said = f"{title}, {len(layers)} layer{'s' if len(layers) > 1 else ''}, steps {steps[0]} to {steps[-1]}"
    if np.isfinite(last).any():
        low, high = int(np.nanargmin(last)), int(np.nanargmax(last))
        said += f"; at the last one from {last[low]:.2g} ({layers[low]}) to {last[high]:.2g} ({layers[high]})"
    return f"{said}{f'; {lost} values not finite' if lost else ''}."


def _spread(found: Mapping[str, Any]) -> str:
    return f"{words.figure(found['mean'], 2)} ± {words.figure(found['std'], 3)}"


def _sweep(sweep: Mapping[str, Any]) -> Figure:
    rates, losses = np.array(sweep["rates"]), np.array(sweep["losses"])
    said = f"Loss at learning rates from {rates[0]:.2g} to {rates[-1]:.2g}: least {losses.min():.3g} at {rates[losses.argmin()]:.2g}"
    svg = layered.sweep("Range test", rates, losses, sweep["suggested"])
    return Figure(f"Range test: a learning rate of {sweep['suggested']:.2g}", svg, f"{said}; suggested {sweep['suggested']:.2g}.")
