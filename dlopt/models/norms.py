"""Normalisation layers by name, and a batch normalisation whose batch is that of all workers together.

| name  | what is brought to mean 0 and deviation 1                                                       | of                   |
|-------|-------------------------------------------------------------------------------------------------|----------------------|
| batch | each channel over the whole batch and all places; after training, by running statistics        | Ioffe, Szegedy 2015  |
| layer | the channels of each place of a row                                                             | Ba et al. 2016       |
| group | groups of channels of a row, over all places of an image; of each place of a sequence           | Wu, He 2018          |
| rms   | the channels of each place of a row are brought to root mean square 1, their mean is left       | Zhang, Sennrich 2019 |

All but `none` then multiply each channel by a learned weight, which starts at 1, and all but `rms` add a learned bias, which starts
at 0. A place is a pixel or a token; a row of plain numbers has one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dlopt.models.clock import waiting

Norm = Literal["none", "batch", "layer", "group", "rms"]
MOST_GROUPS, LEAST_GROUP = 32, 4
"""Of group normalisation: 32 groups, as in the paper, unless a group would have fewer than 4 channels or they do not come out even."""
EPS = 1e-5
"""Added to variances and mean squares, so that what does not vary stays 0."""

NORMS: dict[str, Callable[[int, int], nn.Module]] = {
    "none": lambda channels, dims: nn.Identity(),
    "batch": lambda channels, dims: _by_row(BatchNorm(channels), dims),
    "layer": lambda channels, dims: _by_place(nn.LayerNorm(channels, EPS), dims),
    "group": lambda channels, dims: _by_row(GroupNorm(groups(channels), channels, EPS), dims),
    "rms": lambda channels, dims: _by_place(RmsNorm(channels, EPS), dims),
}


def norm(name: Norm, channels: int, dims: int) -> nn.Module:
    """The layer of that name, for tensors of so many dimensions: 2 is (rows, channels), 3 is a sequence (rows, length, channels), 4 is
    an image (rows, channels, height, width)."""
    return NORMS[name](channels, dims)


def bias_before(name: Norm) -> bool:
    """Whether a layer that this norm follows needs a bias: not when the norm has one."""
    return name in ("none", "rms")


def groups(channels: int) -> int:
    """How many groups of channels group normalisation has."""
    return max(count for count in range(1, MOST_GROUPS + 1) if channels % count == 0 and (count == 1 or channels // count >= LEAST_GROUP))


class BatchNorm(nn.Module):
    """(rows, channels, ...), each channel normalised by its mean and variance over the whole batch: the rows of all workers.

    So N workers compute what one does, gradients included; every worker must make the same calls in training mode, and may have no
    rows. A batch with one value for a channel has no variance: it is normalised by the running statistics, and leaves them alone.
    Running statistics are (1 - momentum) * running + momentum * batch, with the unbiased variance, as torch's.
    """

    running_mean: Tensor
    running_var: Tensor
    alone = False
    """Whether the batch is this worker's rows only, where each trains a replica of its own."""

    def __init__(self, channels: int, eps: float = EPS, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, values: Tensor) -> Tensor:
        if self.training and not self.alone and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            return self._over_workers(values)
        if self.training and values.numel() > values.shape[1]:
            return self._normalized(values, by_batch=True)
        return self._normalized(values, by_batch=False)

    def _normalized(self, values: Tensor, by_batch: bool) -> Tensor:
        return F.batch_norm(values, self.running_mean, self.running_var, self.weight, self.bias, by_batch, self.momentum, self.eps)

    def _over_workers(self, values: Tensor) -> Tensor:
        if values.dtype != self.weight.dtype:  # autocast; counts and means of half precision would not do
            return self._over_workers(values.to(self.weight.dtype)).to(values.dtype)
        with torch.no_grad():
            mean, variance, count = _statistics(values)
            enough = count > 1
            mean, variance = torch.where(enough, mean, self.running_mean), torch.where(enough, variance, self.running_var)
            share = self.momentum * enough.to(mean.dtype)
            self.running_mean.lerp_(mean, share)
            self.running_var.lerp_(variance * count / (count - 1).clamp(min=1), share)
        outputs: Tensor = _Normalize.apply(values, self.weight, self.bias, mean, variance, count, self.eps)
        return outputs


def _statistics(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, population variance (channels,) and number of values of a channel (1,) over all workers, the same bits on each.

    The workers' means and variances are put together (Chan et al. 1979): the difference of the sums' squares would lose digits.
    """
    channels = values.shape[1]
    count = values.new_full((1,), values.numel() // channels)
    if len(values):
        mean, variance = torch.batch_norm_update_stats(values, None, None, 0.0)  # in training mode's own fused pass
    else:
        mean = variance = values.new_zeros(channels)
    everyones = values.new_empty(dist.get_world_size() * (1 + 2 * channels))
    mine = torch.cat((count, mean, variance))
    with waiting(values.device):
        dist.all_gather_into_tensor(everyones, mine)
    counts, means, variances = everyones.view(-1, 1 + 2 * channels).split((1, channels, channels), dim=1)
    count = counts.sum(dim=0)
    share = counts / count.clamp(min=1)
    mean = (share * means).sum(dim=0)
    return mean, (share * (variances + (means - mean).square())).sum(dim=0), count


class _Normalize(torch.autograd.Function):
    """Normalise by statistics of the batch over all workers, whose gradient runs through all workers too.

    With x' = (x - mean) / std, y = w x' + b and the sums over the n values of a channel on all workers (Ioffe, Szegedy 2015):
    dL/dx = w / std (dL/dy - (sum dL/dy) / n - x' (sum x' dL/dy) / n). The first term is the gradient when the statistics are given,
    which torch has; the sums are the gradients of b and w.
    """

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, count: Tensor, eps: float
    ) -> Tensor:
        ctx.save_for_backward(values, weight, mean, variance, count)
        ctx.eps = eps
        return F.batch_norm(values, mean, variance, weight, bias, training=False, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        values, weight, mean, variance, count = ctx.saved_tensors
        of_values, of_weight, of_bias = _given_statistics(gradient, values, weight, mean, variance, ctx.eps)
        sums = torch.stack((of_weight, of_bias))
        dist.all_reduce(sums)
        scale = (variance + ctx.eps).rsqrt()
        by_weight, by_bias = sums * (scale * weight * (count > 1) / count.clamp(min=1))
        shape = (-1, *[1] * (values.dim() - 2))
        centred = (values - mean.view(shape)) * (scale * by_weight).view(shape)
        return of_values - centred - by_bias.view(shape), of_weight, of_bias, None, None, None, None


def _given_statistics(
    gradient: Tensor, values: Tensor, weight: Tensor, mean: Tensor, variance: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of values, weight and bias where mean and variance are constants. torch's own ends the process when there are no rows."""
    if not len(values):
        return gradient, torch.zeros_like(weight), torch.zeros_like(weight)
    slopes: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.native_batch_norm_backward(
        gradient, values, weight, mean, variance, None, None, False, eps, [True, True, True]
    )
    return slopes


class GroupNorm(nn.GroupNorm):
    """torch's; in ONNX by its formula, since the exporter's way does not take a batch without rows."""

    def forward(self, values: Tensor) -> Tensor:
        if not torch.onnx.is_in_onnx_export():
            return super().forward(values)
        places = values.shape[2:]
        grouped = values.reshape(values.shape[0], self.num_groups, self.num_channels // self.num_groups, *places)
        over = tuple(range(2, grouped.dim()))
        centred = grouped - grouped.mean(over, keepdim=True)
        normed = centred * (centred.square().mean(over, keepdim=True) + self.eps).rsqrt()
        shape = (-1, *[1] * len(places))
        return normed.reshape(values.shape[0], self.num_channels, *places) * self.weight.view(shape) + self.bias.view(shape)


class RmsNorm(nn.RMSNorm):
    """torch's; in ONNX by its formula, which the exporter does not know."""

    def forward(self, values: Tensor) -> Tensor:
        if not torch.onnx.is_in_onnx_export():
            return super().forward(values.to(self.weight.dtype)).to(values.dtype)  # torch's is for one dtype, autocast or not
        assert self.eps is not None
        return values * (values.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight


class _ByRow(nn.Module):
    """A layer of (rows, channels) on (rows, length, channels): every place is a row to it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, values: Tensor) -> Tensor:
        outputs: Tensor = self.layer(values.flatten(0, 1))
        return outputs.reshape(values.shape)


class _ByPlace(nn.Module):
    """A layer of (..., channels) on (rows, channels, height, width)."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, values: Tensor) -> Tensor:
        outputs: Tensor = self.layer(values.permute(0, 2, 3, 1))
        return outputs.permute(0, 3, 1, 2)


def _by_row(layer: nn.Module, dims: int) -> nn.Module:
    return _ByRow(layer) if dims == 3 else layer


def _by_place(layer: nn.Module, dims: int) -> nn.Module:
    return _ByPlace(layer) if dims == 4 else layer
