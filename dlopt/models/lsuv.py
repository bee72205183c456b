"""Weights scaled on data until every layer gives numbers of deviation 1: layer-sequential unit variance (Mishkin, Matas 2016)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dlopt.models.layers import projections
from dlopt.models.spread import undisturbed

MOST = 10
"""Times that a layer is scaled at most, as in the paper; without a bias once is enough."""
CONSTANT = 1e-6
"""Below this share of the largest number, a deviation is that of rounding."""


def lsuv(network: nn.Module, inputs: Any, tolerance: float = 0.01) -> None:
    """Scale the weights of each Linear and convolution, in the order of the forward pass, until the standard deviation of its outputs
    on `inputs`, over all rows, units and places, is 1 within the tolerance; of attention, those of queries, keys, values and the end.

    The weights should have been initialised with orthogonal matrices ("lsuv" in INITS), the biases stay as they are: 0. All layers are
    scaled, the last one too, as in the paper, so that logits begin with deviation 1. A layer whose outputs are all the same number
    (zeros at a residual end) or not finite is left alone; of one that is used several times, the first time counts. `inputs` is what
    the network takes, on its device; the same inputs give the same weights, so workers who share a model need the same rows.
    Dropout is off meanwhile, and batch norm layers take the statistics of these rows; modes, buffers and random numbers are left alone.
    """
    hooks, done = [], set[nn.Module]()
    for layer in network.modules():
        if isinstance(layer, nn.MultiheadAttention):
            hooks.append(layer.register_forward_pre_hook(_projected(done), with_kwargs=True))
            hooks.append(layer.register_forward_hook(_scaled(layer.out_proj, done, tolerance), with_kwargs=True))
        elif isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            hooks.append(layer.register_forward_hook(_scaled(layer, done, tolerance), with_kwargs=True))
    try:
        with undisturbed(network), torch.no_grad():
            network(inputs)
    finally:
        for hook in hooks:
            hook.remove()


def _scaled(scaled: Any, done: set[nn.Module], tolerance: float) -> Callable[..., Any]:
    """A hook that divides the weight of `scaled` by the deviation of what the layer gives, and hands on what it gives then: so one
    forward pass does all layers."""
    weight = scaled.weight

    def scale(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> Any:
        if scaled in done:
            return outputs
        done.add(scaled)
        for _ in range(MOST):
            deviation = _deviation(outputs[0] if isinstance(outputs, tuple) else outputs)
            if deviation is None or abs(deviation - 1) <= tolerance:
                break
            weight.div_(deviation)
            outputs = layer.forward(*args, **kwargs)
        return outputs

    return scale


def _projected(done: set[nn.Module]) -> Callable[..., None]:
    """A hook that scales what makes queries, keys and values, each on what it will see, before attention begins."""

    def scale(layer: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        if layer.out_proj in done:
            return
        given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        for name, weight in zip(("query", "key", "value"), projections(layer), strict=True):
            deviation = _deviation(F.linear(given[name], weight))
            if deviation is not None:
                weight.div_(deviation)

    return scale


def _deviation(outputs: Tensor) -> float | None:
    """The standard deviation of all numbers; None where they are all the same but for rounding, or one is not finite."""
    values = outputs.double()
    deviation = float(values.std(correction=0))
    return deviation if math.isfinite(deviation) and deviation > CONSTANT * float(values.abs().max()) else None
