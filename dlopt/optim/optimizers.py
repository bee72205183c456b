"""Optimizers. To add one: a class, and its name in the union at the end."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch.nn import Parameter

from dlopt.part import Part

Decay = Annotated[float, Field(ge=0, lt=1)]


class Sgd(Part):
    """Stochastic gradient descent, with momentum if asked for (Sutskever et al. 2013)."""

    kind: Literal["sgd"] = "sgd"
    lr: float = Field(0.1, gt=0)
    """Peak learning rate."""
    momentum: Decay = 0.0
    """Share of the last step that goes on in this one; 0 is plain descent."""
    nesterov: bool = False
    """Look ahead along the momentum."""
    weight_decay: float = Field(0.0, ge=0)
    """Added to the gradient, times the weight."""

    @model_validator(mode="after")
    def nesterov_has_momentum(self) -> Self:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs momentum above 0: set momentum, 0.9 say")
        return self

    def build(self, parameters: Iterable[Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, fused=True, **self.model_dump(exclude={"kind"}))


class Adam(Part):
    """Adam (Kingma, Ba 2015)."""

    kind: Literal["adam"] = "adam"
    lr: float = Field(1e-3, gt=0)
    """Peak learning rate."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay of the averages of the gradient and of its square."""
    eps: float = Field(1e-8, gt=0)
    """Added to the root of the averaged square, so that nothing is divided by 0."""
    weight_decay: float = Field(0.0, ge=0)
    """Added to the gradient, times the weight, before the averages."""

    def build(self, parameters: Iterable[Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, fused=True, **self.model_dump(exclude={"kind"}))


class AdamW(Part):
    """Adam with decoupled weight decay (Loshchilov, Hutter 2019)."""

    kind: Literal["adamw"] = "adamw"
    lr: float = Field(1e-3, gt=0)
    """Peak learning rate."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay of the averages of the gradient and of its square."""
    eps: float = Field(1e-8, gt=0)
    """Added to the root of the averaged square, so that nothing is divided by 0."""
    weight_decay: float = Field(0.01, ge=0)
    """Share of each weight, times the rate, that a step takes away."""

    def build(self, parameters: Iterable[Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, fused=True, **self.model_dump(exclude={"kind"}))


Optimizer = Annotated[Sgd | Adam | AdamW, Field(discriminator="kind")]
