"""Preprocessing as the first layers of the model, so that training, the exported graph and the server compute the same."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dlopt.part import Feature, Signature, Statistics


class Preprocess(nn.Module):
    """Raw tensors to scaled ones: {name: (rows, *shape)} to {name: (rows, channels, height, width) or (rows, columns)}."""

    def __init__(self, signature: Signature, statistics: Mapping[str, Statistics]) -> None:
        super().__init__()
        self.names = [feature.name for feature in signature.inputs]
        self.scale = nn.ModuleList(_Scale(feature, statistics[feature.name]) for feature in signature.inputs)  # a dict takes not all names

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: layer(inputs[name]) for name, layer in zip(self.names, self.scale, strict=True)}


class _Scale(nn.Module):
    """(where(isnan(x), fill, x) - shift) * scale, per channel or column."""

    fill: Tensor
    shift: Tensor
    factor: Tensor

    def __init__(self, feature: Feature, statistics: Statistics) -> None:
        super().__init__()
        self.image = feature.kind == "image"
        self.shifts = any(statistics.shift)  # pixels from 0 need no shift: one pass over them less
        shape = (-1, 1, 1) if self.image else (-1,)
        for name, values in (("fill", statistics.fill), ("shift", statistics.shift), ("factor", statistics.scale)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float64).reshape(shape))

    def forward(self, values: Tensor) -> Tensor:
        if self.image:
            values = values.permute(0, 3, 1, 2).to(self.shift.dtype)
        else:
            values = values.to(self.shift.dtype)
            values = torch.where(torch.isnan(values), self.fill, values)
        return (values - self.shift if self.shifts else values) * self.factor
