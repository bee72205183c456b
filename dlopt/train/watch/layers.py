"""What a look at a step's layers has: a layer's numbers, and what is wrong with it in words."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

from pydantic import Field

from dlopt.part import Part

LEAST_SCALE = 0.03
"""The root mean square that weights count for at least when gradients and updates are compared with them: zeros have no size."""
Kind = Literal["vanishing", "exploding", "dead", "saturated", "update", "not_finite", "spike"]


class Health(Part):
    """How closely the layers are watched in training, and what counts as ill."""

    every: int = Field(100, ge=0)
    """Steps between two looks at all layers, after those at steps 1, 2, 5, 10, 20 and 50; 0 never looks, at losses neither."""
    vanishing: float = Field(1e-4, gt=0, lt=1)
    """A layer's gradient has vanished when its norm is less than this share of that of a later layer."""
    exploding: float = Field(100.0, gt=1)
    """A layer's gradient explodes when its norm is more than so many times that of the weights."""
    dead: float = Field(0.5, gt=0, le=1)
    """The share of a layer's units from which on it is said that they give 0 for every row, or are stuck at the bounds of a sigmoid
    or tanh."""


class Finding(NamedTuple):
    """Something that is wrong, in one line that names layers and says what to try."""

    step: int
    kind: Kind
    layers: tuple[str, ...]
    says: str

    def as_json(self) -> dict[str, Any]:
        return self._asdict() | {"layers": list(self.layers)}


class Layer(NamedTuple):
    """A layer at one step. Norms are 2-norms over its weights, biases not among them."""

    name: str
    size: int
    """How many weights it has."""
    gradient: float | None
    """None of a layer that has had no part in the step."""
    weights: float
    """Before the step."""
    update: float
    """Of what the step has changed."""
    dead: float | None
    """The share of units that have given nothing for many rows; None where no activation that can be dead follows."""
    saturates: bool
    """Whether dead means stuck at the bounds, as of a sigmoid, not 0."""

    @property
    def ratio(self) -> float:
        """Update to weights; about 1e-3 is usual."""
        return self.update / max(self.weights, self.floor)

    @property
    def pull(self) -> float:
        """Gradient to weights."""
        return (self.gradient or 0.0) / max(self.weights, self.floor)

    @property
    def floor(self) -> float:
        return LEAST_SCALE * math.sqrt(self.size)


class Look(NamedTuple):
    """What one step shows."""

    step: int
    loss: float
    gradient_norm: float
    layers: tuple[Layer, ...]
    """In the order of the forward pass."""
    findings: tuple[Finding, ...]
    """What is said for the first time."""

    def as_json(self) -> dict[str, Any]:
        """A line of health.jsonl: a list of numbers for each norm, in the order of `layers`; null is what is not finite or not there."""
        columns = ("gradient", "weights", "update", "ratio", "dead")
        numbers = {name: [rounded(getattr(layer, name)) for layer in self.layers] for name in columns}
        return {
            "step": self.step,
            "loss": rounded(self.loss),
            "gradient_norm": rounded(self.gradient_norm),
            "layers": [layer.name for layer in self.layers],
            **numbers,
            "findings": [finding.as_json() for finding in self.findings],
        }

    @property
    def worst(self) -> str | None:
        """The layer whose gradient is not finite, or else largest against its weights; None where there is none."""
        there = [layer for layer in self.layers if layer.gradient is not None]
        lost = [layer for layer in there if not math.isfinite(layer.gradient or 0.0)]
        return (lost[0] if lost else max(there, key=lambda layer: layer.pull)).name if there else None


def rounded(value: float | None) -> float | None:
    """Four significant digits, for JSON; None for what is not finite."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")
