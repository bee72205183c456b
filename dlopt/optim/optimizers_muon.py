"""What torch.optim lacks of Muon and L-BFGS: filters as matrices, several optimizers as one, parameters in any memory format."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

EPS = 1e-7
"""Least norm that a matrix is divided by."""


class HiddenMuon(torch.optim.Muon):
    """torch's Muon, for filters too, and in the parameters' own precision but for float32 on a GPU, where bfloat16 is as published.

    bfloat16 would turn a last digit's difference between one worker and several into the third digit's.
    """

    def __init__(self, params: list[dict[str, Any]], **settings: Any) -> None:
        torch.optim.Optimizer.__init__(self, params, settings)  # Muon's own refuses all but matrices

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)

    def _move(self, parameter: Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        state, rate, momentum = self.state[parameter], group["lr"], group["momentum"]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        velocity = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        ahead = gradient.lerp(velocity, momentum) if group["nesterov"] else velocity
        update = orthogonal(ahead.flatten(1), group["ns_coefficients"], group["ns_steps"])
        parameter.mul_(1 - rate * group["weight_decay"])
        parameter.add_(update.view(parameter.shape), alpha=-rate * adjustment(update.shape, group["adjust_lr_fn"]))


def orthogonal(matrix: Tensor, coefficients: Sequence[float], steps: int) -> Tensor:
    """About U V' of a matrix U S V', (rows, columns), by the quintic iteration of Newton and Schulz as Jordan et al. 2024 tuned it."""
    a, b, c = coefficients
    tall = matrix.shape[0] > matrix.shape[1]
    near = matrix.T if tall else matrix
    if near.is_cuda and near.dtype == torch.float32:
        near = near.bfloat16()
    near = near / near.norm().clamp(min=EPS)
    for _ in range(steps):
        gram = near @ near.T
        near = torch.addmm(near, torch.addmm(gram, gram, gram, beta=b, alpha=c), near, beta=a)
    return (near.T if tall else near).to(matrix.dtype).contiguous()


def adjustment(shape: Sequence[int], rule: str) -> float:
    """The factor on a matrix's rate by its shape, (rows, columns)."""
    rows, columns = shape
    return math.sqrt(max(1.0, rows / columns)) if rule == "original" else 0.2 * math.sqrt(max(rows, columns))


class Together(torch.optim.Optimizer):
    """Several optimizers, each with parameters of its own, as one: one list of groups and one state, in their order."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = tuple(parts)
        super().__init__([group for part in parts for group in part.param_groups], {})
        for part in parts:
            self.state.update(part.state)
        self._share()

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    def _share(self) -> None:
        """The parts work on this optimizer's groups and state."""
        rest = list(self.param_groups)
        for part in self.parts:
            part.param_groups, rest = rest[: len(part.param_groups)], rest[len(part.param_groups) :]
            part.state = self.state


class FullLbfgs(torch.optim.LBFGS):
    """torch's L-BFGS, for parameters in any memory format."""

    def _gather_flat_grad(self) -> Tensor:
        """All gradients side by side, 0 where there is none."""
        return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in self.param_groups[0]["params"]])
