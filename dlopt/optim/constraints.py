"""What holds gradients and weights within bounds, in place: clipping by norm, by value or unit by unit before a step, and a largest norm
of each unit's weights after it. To add a way of clipping: a class with `apply`, and its name in the union at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import Parameter

from dlopt.part import Part

TINY = 1e-6
"""What norms are guarded with, so that nothing is divided by 0."""
NormOf = Callable[[list[Tensor]], Tensor]
"""The 2-norm of some tensors together, which workers may have rows of each."""


def total_norm(tensors: list[Tensor]) -> Tensor:
    """The 2-norm of all together, as torch.nn.utils.get_total_norm for those of one device, in two thirds of its time."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors)))


class ClipNorm(Part):
    """Scale the whole gradient down when its 2-norm is larger than the limit (Pascanu et al. 2013)."""

    kind: Literal["norm"] = "norm"
    limit: float = Field(1.0, gt=0)
    """Largest norm of the gradient of a step."""

    def apply(self, parameters: Sequence[Parameter], norm: Tensor, norm_of: NormOf = total_norm) -> None:
        """Clip `.grad` of these parameters, in place. norm: the 2-norm of all of it together, a tensor of one number."""
        factor = (self.limit / (norm + TINY)).clamp(max=1.0)
        torch._foreach_mul_(_gradients(parameters), factor)

    def factor(self, norm: float) -> float:
        """What `apply` multiplies a gradient of that norm by."""
        return min(1.0, self.limit / (norm + TINY))


class ClipValue(Part):
    """Bring every entry of the gradient into [-limit, limit]."""

    kind: Literal["value"] = "value"
    limit: float = Field(0.5, gt=0)
    """Largest absolute value of an entry."""

    def apply(self, parameters: Sequence[Parameter], norm: Tensor, norm_of: NormOf = total_norm) -> None:
        """Clip `.grad` of these parameters, in place. norm is not looked at."""
        clip_value(parameters, self.limit)

    def factor(self, norm: float) -> float:
        """1: each entry has its own."""
        return 1.0


class ClipAdaptive(Part):
    """Clip the gradient of each unit by the norm of the unit's weights (Brock et al. 2021): the longer these, the more it may move them."""

    kind: Literal["adaptive"] = "adaptive"
    limit: float = Field(0.01, gt=0)
    """Largest norm of a unit's gradient, as a share of the norm of its weights. The paper: 0.01 for batches of 4,096, up to 0.16 for
    those of 256."""
    eps: float = Field(1e-3, gt=0)
    """What the norm of a unit's weights counts for at least, so that weights that start at 0 can leave it."""
    last: bool = False
    """Whether the last layer is clipped too, which the paper advises against."""

    def apply(self, parameters: Sequence[Parameter], norm: Tensor, norm_of: NormOf = total_norm) -> None:
        """Clip `.grad` of these parameters, which come in the network's order, in place. norm is not looked at. norm_of: of a vector, which
        is one unit though workers may have a part of it each."""
        clip_adaptive(parameters if self.last else without_last(parameters), self.limit, self.eps, norm_of)

    def factor(self, norm: float) -> float:
        """1: each unit has its own."""
        return 1.0


class MaxNorm(Part):
    """A largest 2-norm of the weights that come into a unit (Srivastava et al. 2014), held after each step; biases are excepted."""

    limit: float = Field(3.0, gt=0)
    """Largest norm: of a row of a fully connected layer, a filter of a convolution, the embedding of a value."""

    def apply(self, network: nn.Module) -> None:
        """Scale down, in place, the weights of every unit whose norm is larger."""
        with torch.no_grad():
            for weight in weights(network):
                norms = unit_norms(weight)
                weight.mul_((self.limit / norms.clamp(min=TINY)).clamp_(max=1.0))


def clip_value(parameters: Iterable[Parameter], limit: float) -> None:
    """Bring every entry of `.grad` into [-limit, limit], in place."""
    gradients = _gradients(parameters)
    torch._foreach_clamp_min_(gradients, -limit)
    torch._foreach_clamp_max_(gradients, limit)


def clip_adaptive(parameters: Iterable[Parameter], factor: float, eps: float, norm_of: NormOf = total_norm) -> None:
    """Scale down, in place, the gradient g of each unit with weights w to a norm of factor * max(|w|, eps), where it is larger.

    A unit is a row of a weight's first dimension; a bias, or another parameter of one dimension, is one unit as a whole.
    """
    there = [parameter for parameter in parameters if parameter.grad is not None]
    gradients = _gradients(there)
    with torch.no_grad():
        pairs = zip(there, gradients, strict=True)
        factors = [_adapted(weight.detach(), gradient, factor, eps, norm_of) for weight, gradient in pairs]
        torch._foreach_mul_(gradients, factors)


def without_last(parameters: Sequence[Parameter]) -> list[Parameter]:
    """Parameters in the order of a network, without its last weights and what comes after them: their bias."""
    last = max((place for place, parameter in enumerate(parameters) if parameter.dim() > 1), default=0)
    return list(parameters[:last])


def weights(network: nn.Module) -> list[Parameter]:
    """What is learned of a network and has units: parameters named weight, attention's too, of two dimensions or more. Neither biases
    and scales of normalisation, nor class tokens and positions that belong to no layer."""
    named = network.named_parameters()
    return [parameter for name, parameter in named if parameter.requires_grad and parameter.dim() > 1 and name.endswith("weight")]


def unit_norms(values: Tensor, norm_of: NormOf = total_norm) -> Tensor:
    """2-norms of a tensor's units, shaped so that the tensor can be multiplied with them; of one dimension it is a single unit."""
    if values.dim() <= 1:
        return norm_of([values])
    return torch.linalg.vector_norm(values, dim=tuple(range(1, values.dim())), keepdim=True)


def _adapted(weight: Tensor, gradient: Tensor, factor: float, eps: float, norm_of: NormOf) -> Tensor:
    most = unit_norms(weight, norm_of).clamp_(min=eps).mul_(factor)
    return most.div_(unit_norms(gradient, norm_of).clamp_(min=TINY)).clamp_(max=1.0)


def _gradients(parameters: Iterable[Parameter]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


Clip = Annotated[ClipNorm | ClipValue | ClipAdaptive, Field(discriminator="kind")]
