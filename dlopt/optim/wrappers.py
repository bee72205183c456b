"""What goes around any optimizer: slow weights that follow the fast ones, and gradients without their mean."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import Parameter

from dlopt.part import DloptError, Part


class Lookahead(Part):
    """k steps forward, one step back (Zhang et al. 2019): every so often, slow weights go part of the way to the fast ones, which then
    go on from there."""

    steps: Annotated[int, Field(ge=1)] = 5
    """Steps of the optimizer between two of the slow weights."""
    alpha: Annotated[float, Field(gt=0, le=1)] = 0.5
    """How far the slow weights go."""

    def wrap(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Raises DloptError for optimizers that must know where the weights are."""
        if isinstance(optimizer, torch.optim.LBFGS):
            raise DloptError("train.lookahead: lbfgs builds on its own steps: take lookahead out, or use another optimizer")
        if hasattr(optimizer, "eval"):
            raise DloptError("train.lookahead: schedule-free optimizers average weights themselves: take lookahead out")
        return SlowWeights(optimizer, self.steps, self.alpha)


class SlowWeights(torch.optim.Optimizer):
    """An optimizer with slow weights beside it; its groups and its state are those of the optimizer inside."""

    def __init__(self, inner: torch.optim.Optimizer, steps: int, alpha: float) -> None:
        self.inner, self.steps, self.alpha, self.done = inner, steps, alpha, 0
        super().__init__(inner.param_groups, {})
        self.slow = [parameter.detach().clone() for parameter in self._parameters()]
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        self.inner.step()
        self.done += 1
        if self.done % self.steps == 0:
            torch._foreach_lerp_(self.slow, self._parameters(), self.alpha)
            torch._foreach_copy_(self._parameters(), self.slow)

    def state_dict(self) -> dict[str, Any]:
        """That of the optimizer inside, and `lookahead`: steps done and slow weights, in the order of the groups."""
        return self.inner.state_dict() | {"lookahead": {"done": self.done, "slow": list(self.slow)}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.inner.load_state_dict({key: value for key, value in state_dict.items() if key != "lookahead"})
        kept = state_dict["lookahead"]
        self.done = kept["done"]
        torch._foreach_copy_(self.slow, kept["slow"])
        self._share()

    def _share(self) -> None:
        self.param_groups, self.state = self.inner.param_groups, self.inner.state

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.inner.param_groups for parameter in group["params"]]


@torch.no_grad()
def centralize(parameters: Iterable[Parameter]) -> None:
    """Take from the gradient of every unit's weights its mean, in place (Yong et al. 2020): of all with two dimensions or more."""
    gradients: list[Tensor] = [p.grad for p in parameters if p.grad is not None and p.grad.dim() > 1]
    means = [gradient.mean(dim=tuple(range(1, gradient.dim())), keepdim=True) for gradient in gradients]
    if gradients:
        torch._foreach_sub_(gradients, means)
