"""Sophia with its curvature from outside. Imported when one is built, since its library may not be there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pytorch_optimizer import SophiaH
from torch import Tensor

NEVER = 2**62
"""Steps between estimates of the library's own, which needs gradients that can be differentiated again: those of several workers cannot."""


class EstimatedSophia(SophiaH):
    """pytorch-optimizer's SophiaH. `dlopt.train.loop.gradients.curved` gives it an estimate before each step that is due one."""

    def __init__(self, params: list[dict[str, Any]], period: int, **settings: Any) -> None:
        super().__init__(params, update_period=NEVER, **settings)
        self.period, self.estimate = period, list[Tensor]()

    @property
    def due(self) -> bool:
        """Whether the next step needs an estimate."""
        return self.steps % self.period == 0

    @property
    def steps(self) -> int:
        """Steps done."""
        return int(self.param_groups[0].get("step", 0))

    def take(self, estimate: list[Tensor]) -> None:
        """The diagonal of the Hessian, for each parameter in the order of the groups."""
        self.estimate = estimate

    def step(self, closure: Callable[[], float] | None = None) -> None:
        if self.due and not self.estimate:
            raise RuntimeError(
                "sophia: this step is due an estimate of the curvature: wrap the gradient by dlopt.train.loop.gradients.curved"
            )
        super().step(hessian=self.estimate if self.due else None)
        self.estimate = []
