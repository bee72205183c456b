"""Preprocessing as the first layers of the model, so that training, the exported graph and the server compute the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from dlopt.part import Feature, Signature, Statistics


class Preprocess(nn.Module):
    """Raw tensors to scaled ones, by name: images (rows, height, width, channels) to (rows, channels, height, width), numbers
    (rows, columns) to (rows, width); codes of categories and ids of tokens stay as they are."""

    def __init__(self, signature: Signature, statistics: Mapping[str, Statistics]) -> None:
        super().__init__()
        self.names = [feature.name for feature in signature.inputs]
        layers = [_layer(feature, statistics.get(feature.name), signature) for feature in signature.inputs]
        self.scale = nn.ModuleList(layers)  # a dict of modules takes not all names

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: layer(inputs[name], inputs) for name, layer in zip(self.names, self.scale, strict=True)}

    @staticmethod
    def width(feature: Feature) -> int:
        """How many numbers a row of a number or date input has after preprocessing."""
        return feature.size * (2 if feature.indicators else 1)


def _layer(feature: Feature, statistics: Statistics | None, signature: Signature) -> nn.Module:
    if statistics is None:
        return _AsItIs()
    return _Pixels(statistics) if feature.holds == "pixels" else _Numbers(feature, statistics, signature)


class _AsItIs(nn.Module):
    def forward(self, values: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        return values


class _Pixels(nn.Module):
    """(x - shift) * scale, per channel."""

    shift: Tensor
    factor: Tensor

    def __init__(self, statistics: Statistics) -> None:
        super().__init__()
        self.shifts = any(statistics.shift)  # pixels from 0 need no shift: one pass over them less
        self.register_buffer("shift", _buffer(statistics.shift).reshape(-1, 1, 1))
        self.register_buffer("factor", _buffer(statistics.scale).reshape(-1, 1, 1))

    def forward(self, values: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        values = values.permute(0, 3, 1, 2).to(self.shift.dtype)
        return (values - self.shift if self.shifts else values) * self.factor


class _Numbers(nn.Module):
    """What `Statistics` says, in its order: outliers, missing values, logarithm, scale or place among the quantiles, clipping."""

    fill: Tensor
    shift: Tensor
    factor: Tensor
    lower: Tensor
    upper: Tensor
    group_fill: Tensor
    knots: Tensor

    def __init__(self, feature: Feature, statistics: Statistics, signature: Signature) -> None:
        super().__init__()
        self.statistics, self.indicators = statistics, feature.indicators
        for name, values in (("fill", statistics.fill), ("shift", statistics.shift), ("factor", statistics.scale)):
            self.register_buffer(name, _buffer(values))
        if statistics.lower:
            self.register_buffer("lower", _buffer([-torch.inf if bound is None else bound for bound in statistics.lower]))
            self.register_buffer("upper", _buffer([torch.inf if bound is None else bound for bound in statistics.upper]))
        if statistics.group_fill:
            category = next(other for other in signature.inputs if other.holds == "codes" and statistics.fill_by in other.columns)
            self.by, self.place = category.name, category.columns.index(statistics.fill_by)
            self.register_buffer("group_fill", _buffer(statistics.group_fill))
        if statistics.knots:
            self.register_buffer("knots", _buffer(statistics.knots))

    def forward(self, values: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        values = self._within(values.to(self.shift.dtype))
        missing = torch.isnan(values)
        values = self._scaled(torch.where(missing, self._fill(inputs), values))
        if self.statistics.clip is not None:
            values = values.clamp(-self.statistics.clip, self.statistics.clip)
        return torch.cat((values, missing.to(values.dtype)), dim=1) if self.indicators else values

    def _within(self, values: Tensor) -> Tensor:
        if not self.statistics.lower:
            return values
        if self.statistics.outside == "missing":
            nothing = torch.full((), torch.nan, dtype=values.dtype, device=values.device)
            return torch.where((values < self.lower) | (values > self.upper), nothing, values)
        return torch.where(torch.isnan(values), values, torch.minimum(torch.maximum(values, self.lower), self.upper))

    def _fill(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.group_fill[inputs[self.by][:, self.place].long()] if self.statistics.group_fill else self.fill

    def _scaled(self, values: Tensor) -> Tensor:
        if self.statistics.log:
            values = torch.sign(values) * torch.log1p(torch.abs(values))
        if not self.statistics.knots:
            return (values - self.shift) * self.factor
        below, above = self.knots[:, :-1], self.knots[:, 1:]
        gap = above - below
        within = ((values[:, :, None] - below) / torch.where(gap > 0, gap, 1.0)).clamp(0, 1)
        steps = torch.where(gap > 0, within, (values[:, :, None] >= above).to(values.dtype))
        return steps.mean(dim=2)


def _buffer(values: Sequence[float] | Sequence[Sequence[float]]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
