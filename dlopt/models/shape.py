"""Networks whose layers were made smaller after training: built as the job says, then given the shapes of the weights that there are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

AnyModule = TypeVar("AnyModule", bound=nn.Module)
SIZES = {
    nn.Linear: ("out_features", "in_features"),
    nn.Conv2d: ("out_channels", "in_channels"),
    nn.BatchNorm2d: ("num_features",),
    nn.BatchNorm1d: ("num_features",),
}
"""What layers call the dimensions of their weights."""


def shaped_like(network: AnyModule, tensors: Mapping[str, Tensor]) -> AnyModule:
    """The network with layers as wide as these weights are, and with two in place of one where the weights are those of two (`in_two`).
    Their values are not loaded."""
    for name, module in list(network.named_modules()):
        if f"{name}.weight" not in tensors and f"{name}.0.weight" in tensors and isinstance(module, nn.Linear | nn.Conv2d):
            put(network, name, in_two(module, len(tensors[f"{name}.0.weight"])))
    for name, module in network.named_modules():
        for kind, held in (("parameter", dict(module._parameters)), ("buffer", dict(module._buffers))):
            for key, value in held.items():
                given = tensors.get(f"{name}.{key}".removeprefix("."))
                if value is None or given is None or given.shape == value.shape:
                    continue
                made = torch.empty(given.shape, dtype=value.dtype, device=value.device)
                setattr(module, key, nn.Parameter(made) if kind == "parameter" else made)
                _resize(module, key, given)
    return network


def _resize(module: nn.Module, key: str, given: Tensor) -> None:
    """Take note of sizes where layers do."""
    for layer, names in SIZES.items():
        if key == "weight" and isinstance(module, layer):
            for name, size in zip(names, given.shape, strict=False):
                setattr(module, name, int(size))


def in_two(layer: nn.Linear | nn.Conv2d, rank: int) -> nn.Sequential:
    """Two layers in a row in place of one, with so many units, or channels, between them."""
    bias = layer.bias is not None
    like: dict[str, Any] = {"dtype": layer.weight.dtype, "device": layer.weight.device}
    if isinstance(layer, nn.Linear):
        return nn.Sequential(nn.Linear(layer.in_features, rank, bias=False, **like), nn.Linear(rank, layer.out_features, bias=bias, **like))
    size: dict[str, Any] = {"kernel_size": layer.kernel_size, "stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
    first = nn.Conv2d(layer.in_channels, rank, bias=False, **size, **like)
    return nn.Sequential(first, nn.Conv2d(rank, layer.out_channels, 1, bias=bias, **like))


def put(network: nn.Module, name: str, layer: nn.Module) -> None:
    """Another layer in the place of that name."""
    above, _, last = name.rpartition(".")
    setattr(network.get_submodule(above), last, layer)
