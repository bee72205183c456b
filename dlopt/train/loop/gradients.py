"""How gradients of an objective come about. A gradient function leaves them in `.grad`, those of the whole batch on every worker."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Annotated, Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dlopt.data.feed.batches import Batch, Mixed
from dlopt.models.layers import buffers_kept
from dlopt.optim.constraints import NormOf, total_norm
from dlopt.part import Part
from dlopt.train.loop.objectives import Losses, Objective
from dlopt.train.loop.precision import LossScale

Gradient = Callable[[Objective, nn.Module, Batch], Losses]
CURVATURE_SEED = 0x50F1A


class Sharpness(Part):
    """Sharpness-aware minimisation (Foret et al. 2021): the gradient from the worst place near by. A step costs two."""

    rho: Annotated[float, Field(gt=0)] = 0.05
    """How near: the norm of the way there. Adaptive ones are about ten times as far."""
    adaptive: bool = False
    """Measure the way of each weight in units of its size (Kwon et al. 2021)."""


@runtime_checkable
class Curved(Protocol):
    """An optimizer that wants estimates of the curvature, as `dlopt.optim.optimizers_sophia` has it."""

    @property
    def due(self) -> bool: ...

    @property
    def steps(self) -> int: ...

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...

    def take(self, estimate: list[Tensor]) -> None: ...


def plain(objective: Objective, model: nn.Module, batch: Batch) -> Losses:
    """Back-propagation."""
    losses = objective(model, batch)
    losses.loss.backward()
    return losses


def accumulated(rows: int, partly: Callable[[], AbstractContextManager[None]] = nullcontext) -> Gradient:
    """The same in parts of at most `rows` rows of each worker, whose sum is the gradient of the batch: for less memory.

    All workers take equally many parts, the last ones empty where a worker has fewer rows, and add up over workers after the last (where
    weights are shared out, after each: a whole gradient would take the memory that is short). Statistics that a network takes of its
    batch (batch norm) are of a part. partly: within it are those before the last.
    """

    def gradient(objective: Objective, model: nn.Module, batch: Batch) -> Losses:
        parts, all_losses = split(batch, rows, -(-max(batch.most, len(batch.target)) // rows)), []
        for place, part in enumerate(parts, start=1):
            with nullcontext() if place == len(parts) else partly():
                losses = plain(objective, model, part)
            all_losses.append(Losses(losses.loss.detach(), losses.correct))
        correct = [losses.correct for losses in all_losses if losses.correct is not None]
        return Losses(torch.stack([losses.loss for losses in all_losses]).sum(), torch.stack(correct).sum() if correct else None)

    return gradient


def split(batch: Batch, rows: int, parts: int) -> list[Batch]:
    """`parts` pieces of a batch, of `rows` rows each as long as there are any; their shares of it add up to 1."""
    there = len(batch.target)
    pieces = [slice(start, start + rows) for start in range(0, parts * rows, rows)] or [slice(0, rows)]
    shares = [len(range(there)[piece]) / there if there else float(piece.start == 0) for piece in pieces]
    return [_piece(batch, piece, share) for piece, share in zip(pieces, shares, strict=True)]


def _piece(batch: Batch, piece: slice, share: float) -> Batch:
    mixed = batch.mixed and Mixed(batch.mixed.target[piece], batch.mixed.share[piece])
    inputs = {name: values[piece] for name, values in batch.inputs.items()}
    return batch._replace(inputs=inputs, target=batch.target[piece], mixed=mixed, part=batch.part * share, first=batch.first + piece.start)


def unscaled(inner: Gradient, scale: LossScale | None) -> Gradient:
    """The gradient of an objective whose gradients are `scale` times as large, as that of the objective itself. What is not finite
    stays so."""
    if scale is None:
        return inner

    def gradient(objective: Objective, model: nn.Module, batch: Batch) -> Losses:
        losses = inner(objective, model, batch)
        there = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        torch._foreach_mul_(there, 1 / scale.scale)  # a power of two, which changes no digit
        return losses

    return gradient


def sharpness_aware(inner: Gradient, rho: float, adaptive: bool = False, norm_of: NormOf = total_norm) -> Gradient:
    """The gradient at the weights w + e, e = rho * g / |g| for the gradient g at w (Foret et al. 2021); the weights end as they were.

    adaptive: e = rho * w^2 * g / |w * g| (Kwon et al. 2021). Losses are those at w; buffers (a batch norm's averages) see w alone.
    norm_of: gives the norm of the whole gradient where a worker has a share of it.
    """

    def gradient(objective: Objective, model: nn.Module, batch: Batch) -> Losses:
        losses = inner(objective, model, batch)
        parameters: list[Tensor] = [parameter for parameter in model.parameters() if parameter.grad is not None]
        with torch.no_grad():
            before, ascent = [parameter.clone() for parameter in parameters], _ascent(parameters, rho, adaptive, norm_of)
            torch._foreach_add_(parameters, ascent)
        for parameter in parameters:
            parameter.grad = None
        with buffers_kept(model):
            inner(objective, model, batch)
        with torch.no_grad():
            torch._foreach_copy_(parameters, before)
        return losses

    return gradient


def _ascent(parameters: list[Tensor], rho: float, adaptive: bool, norm_of: NormOf) -> list[Tensor]:
    """The way to the worst place near by, for each parameter."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    scaled = list(torch._foreach_mul(gradients, torch._foreach_abs(parameters))) if adaptive else gradients
    norm = norm_of(scaled)
    ways = torch._foreach_mul(scaled, torch._foreach_abs(parameters)) if adaptive else scaled
    return list(torch._foreach_mul(ways, rho / (norm + 1e-12)))


def curved(inner: Gradient, optimizer: torch.optim.Optimizer, world: int, scale: LossScale | None = None) -> Gradient:
    """A gradient, and before a step that is due one an estimate of the Hessian's diagonal for the optimizer (Hutchinson 1989); for an
    optimizer that wants none, the gradient that was given.

    scale: of the objective's gradients. Where it is too large for the estimate, the gradient is made NaN, so that the step is left out.

    It is z * Hz for a z of normal random numbers, which follow from the number of the step alone, so that they are the same on all
    workers and after a restart. H is that of the whole batch.
    """
    wants = optimizer
    while hasattr(wants, "inner"):  # within slow weights, or shared out
        wants = wants.inner
    if not isinstance(wants, Curved):
        return inner

    def gradient(objective: Objective, model: nn.Module, batch: Batch) -> Losses:
        losses = inner(objective, model, batch)
        if wants.due:
            parameters = [parameter for group in wants.param_groups for parameter in group["params"]]
            noise = _noise(parameters, wants.steps)
            products = _curvature(objective, model, batch, parameters, noise)
            if world > 1:
                for product in products:
                    dist.all_reduce(product)
            estimate = list(torch._foreach_mul(noise, products))
            if scale is None:
                wants.take(estimate)
            elif _finite(estimate):
                wants.take(list(torch._foreach_mul(estimate, 1 / scale.scale)))
            else:
                torch._foreach_mul_([parameter.grad for parameter in parameters if parameter.grad is not None], math.nan)
        return losses

    return gradient


def _finite(tensors: list[Tensor]) -> bool:
    return math.isfinite(torch.stack(torch._foreach_norm(tensors)).sum().item())


def _noise(parameters: list[nn.Parameter], step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(CURVATURE_SEED + step)
    return [torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device) for p in parameters]


def _curvature(
    objective: Objective, model: nn.Module, batch: Batch, parameters: list[nn.Parameter], directions: list[Tensor]
) -> list[Tensor]:
    """This worker's part of the Hessian times the directions. Fused attention cannot be differentiated twice, so it is not used."""
    with buffers_kept(model), sdpa_kernel(SDPBackend.MATH):
        loss = objective(model, batch).loss
        first = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
        slope = torch.stack([(one * other).sum() for one, other in zip(first, directions, strict=True)]).sum()
        if not slope.requires_grad:
            return [torch.zeros_like(parameter) for parameter in parameters]
        return [product.contiguous() for product in torch.autograd.grad(slope, parameters, materialize_grads=True)]
