"""What is wrong with layers, in words: vanishing, exploding, dead, saturated, too large steps; each said once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from dlopt.train.watch.layers import Finding, Health, Kind, Layer

SETTLED, LOOKS = 20, 2
"""From which step on, and after how many looks in a row that show it, a gradient is said to vanish: behind layers that start at 0
gradients have yet to come."""
RUN = 4
"""So many layers in a row make a vanishing gradient anywhere; at the beginning of the network one is enough."""
JUMP = 10.0
"""So many times the size of the weights, an update is no step any more."""
NAMED = 3
"""Layers that are named one by one in a line."""


class Reported:
    """What has been said already: each kind of finding once a layer, until a look shows none of its kind."""

    def __init__(self) -> None:
        self.layers: dict[Kind, set[str]] = {}
        self.times: dict[Kind, int] = {}

    def state_dict(self) -> dict[str, Any]:
        return {kind: [times, sorted(self.layers[kind])] for kind, times in self.times.items()}

    def load_state_dict(self, state: Mapping[Kind, Any]) -> None:
        self.times = {kind: times for kind, (times, _) in state.items()}
        self.layers = {kind: set(layers) for kind, (_, layers) in state.items()}

    def new(self, step: int, told: Sequence[Symptom]) -> list[Finding]:
        """What of it has not been said."""
        findings = []
        for kind in {*self.times} - {one.kind for one in told}:
            del self.times[kind], self.layers[kind]
        for one in told:
            self.times[one.kind] = self.times.get(one.kind, 0) + 1
            said = self.layers.setdefault(one.kind, set())
            layers = [layer for layer in one.layers if layer.name not in said]
            if layers and step >= one.since and self.times[one.kind] >= one.looks:
                said.update(layer.name for layer in layers)
                findings.append(Finding(step, one.kind, tuple(layer.name for layer in layers), one.says(layers)))
        return findings


class Symptom(NamedTuple):
    """What a look shows, be it new or not."""

    kind: Kind
    layers: list[Layer]
    says: Callable[[list[Layer]], str]
    """The line for some of these layers."""
    since: int = 0
    """From which step on it may be said."""
    looks: int = 1
    """In how many looks in a row it must be seen before."""


def symptoms(layers: Sequence[Layer], gradient_norm: float, health: Health) -> list[Symptom]:
    if not math.isfinite(gradient_norm):
        lost = [layer for layer in layers if layer.gradient is not None and not math.isfinite(layer.gradient)]
        return [Symptom("not_finite", lost or list(layers), _says_not_finite)]
    dead = _dead(layers, health.dead)
    gone = [] if any(layer.dead == 1 for layer in dead) else vanishing(layers, health.vanishing)  # which is why nothing comes through
    shown = [
        Symptom("vanishing", gone, lambda some: _says_vanishing(some, layers), SETTLED, LOOKS),
        Symptom("exploding", [layer for layer in layers if layer.pull > health.exploding], _says_exploding),
        Symptom("dead", [layer for layer in dead if not layer.saturates], _says_dead),
        Symptom("saturated", [layer for layer in dead if layer.saturates], _says_saturated),
        Symptom("update", [layer for layer in layers if layer.ratio > JUMP], _says_update),
    ]
    return [one for one in shown if one.layers]


def _dead(layers: Sequence[Layer], share: float) -> list[Layer]:
    """The layers of which so large a share of units is dead; of several in a row that are wholly so the first, whose doing it is."""
    dead, before = [], 0.0
    for layer in layers:
        if layer.dead is not None:
            if layer.dead >= share and not layer.dead == before == 1:
                dead.append(layer)
            before = layer.dead
    return dead


def vanishing(layers: Sequence[Layer], share: float) -> list[Layer]:
    """The layers whose gradient's norm is less than so large a share of that of a layer behind them; all, where none has any.

    Only runs of layers count that begin with the network's first one or are RUN long: gradients vanish with depth. Some layers have
    small ones by their nature, as queries and keys of attention that is still even.
    """
    there = [(layer, layer.gradient) for layer in layers if layer.gradient is not None]
    behind = [max((gradient for _, gradient in there[place + 1 :]), default=0.0) for place in range(len(there))]
    small = [gradient < share * most for (_, gradient), most in zip(there, behind, strict=True)]
    if not any(gradient for _, gradient in there):
        small = [True] * len(there)
    gone: list[Layer] = []
    for is_small, run in groupby(range(len(there)), key=small.__getitem__):
        places = list(run)
        if is_small and (places[0] == 0 or len(places) >= RUN):
            gone += [there[place][0] for place in places]
    return gone


def names(layers: Sequence[Layer]) -> str:
    """a, b and c; of many, the first and the last."""
    shown = [layer.name for layer in layers]
    if len(shown) > NAMED:
        return f"{shown[0]}, {shown[1]}, ... {shown[-1]} ({len(shown)} layers)"
    return " and ".join(filter(None, (", ".join(shown[:-1]), shown[-1])))


def _says_vanishing(some: list[Layer], layers: Sequence[Layer]) -> str:
    least, most = min(layer.gradient or 0.0 for layer in some), max(layer.gradient or 0.0 for layer in layers)
    against = f"its norm is down to {least:.2g}, of other layers up to {most:.2g}" if most else "it is 0 everywhere"
    cure = "use activation relu with init kaiming_normal, norm layers or residual connections, or fewer layers"
    return f"vanishing gradient: hardly any of it reaches {names(some)}: {against}; {cure}"


def _says_exploding(some: list[Layer]) -> str:
    worst = max(some, key=lambda layer: layer.pull)
    cure = "use a smaller init (xavier or kaiming) or norm layers, set train.clip, or lower train.optimizer.lr"
    return f"exploding gradient: {worst.pull:.2g} times the weights in {worst.name}, large in {names(some)}; {cure}"


def _says_not_finite(some: list[Layer]) -> str:
    return f"gradient not finite: in {names(some)}; lower train.optimizer.lr, set train.clip, or use a smaller init"


def _says_dead(some: list[Layer]) -> str:
    shares = f"{_percent(some)} of the units of {names(some)} give 0 for every row"
    return f"dead units: {shares}; lower train.optimizer.lr, use init kaiming_normal, norm layers, or activation leaky_relu or gelu"


def _says_saturated(some: list[Layer]) -> str:
    shares = f"{_percent(some)} of the units of {names(some)} are at their bounds for every row"
    return f"saturated units: {shares}; use a smaller init (xavier), norm layers or scaled inputs, or activation relu"


def _says_update(some: list[Layer]) -> str:
    worst = max(some, key=lambda layer: layer.ratio)
    size = f"an update of {worst.ratio:.2g} times the weights in {worst.name}, large in {names(some)}"
    return f"too large steps: {size}; lower train.optimizer.lr"


def _percent(some: list[Layer]) -> str:
    shares = sorted(round(100 * (layer.dead or 0.0)) for layer in some)
    return f"{shares[0]} %" if shares[0] == shares[-1] else f"{shares[0]} to {shares[-1]} %"
