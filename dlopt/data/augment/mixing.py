"""What mixes a row with another one, its partner: inputs and, in the loss, targets. Comes after everything else.

A part says which share of the row stays; several parts mix with the same partner, and their shares multiply. Inputs of a kind that no
part mixes, and numbers that are missing on one side, are those of whichever row has the larger share. To add one: a class with
`mix`, and its name in the union.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from dlopt.data.augment.boxes import inside
from dlopt.data.augment.draw import Draw
from dlopt.data.augment.pixels import painted
from dlopt.part import Feature, Part

Inputs = dict[str, Tensor]
"""Feature name to values (n, *shape)."""
STEPS = 2**16
"""Shares are multiples of one in as many."""


class Mixing(Part):
    """An augmentation that mixes a row with its partner."""

    of: ClassVar[tuple[str, ...]] = ("pixels",)

    def mix(self, draw: Draw, features: Sequence[Feature], values: Inputs, partners: Inputs) -> tuple[Inputs, Tensor]:
        """The inputs `features`, mixed, and the share of the row in them, float32 (n,)."""
        raise NotImplementedError


class MixUp(Mixing):
    """A weighted mean of the row and its partner (Zhang et al. 2017, arXiv 1710.09412)."""

    of: ClassVar[tuple[str, ...]] = ("pixels", "numbers")

    kind: Literal["mixup"] = "mixup"
    alpha: float = Field(0.2, gt=0, le=100)
    """The row's share has the distribution Beta(alpha, alpha)."""
    p: float = Field(1.0, ge=0, le=1)
    """Probability to mix at all."""

    def mix(self, draw: Draw, features: Sequence[Feature], values: Inputs, partners: Inputs) -> tuple[Inputs, Tensor]:
        share = np.where(draw.uniform(0) < self.p, _shares(draw, self.alpha), STEPS).astype(np.int32)
        found = {}
        for feature in features:
            blend = _blend_images if feature.holds == "pixels" else _blend_numbers
            mine, other = values[feature.name], partners[feature.name]
            found[feature.name] = blend(mine, other, torch.from_numpy(share).to(mine.device))
        return found, torch.from_numpy(share.astype(np.float32) / STEPS)


class CutMix(Mixing):
    """A box of the partner's image in the row's (Yun et al. 2019, arXiv 1905.04899); the share is that of the pixels."""

    kind: Literal["cutmix"] = "cutmix"
    alpha: float = Field(1.0, gt=0, le=100)
    """The box's area, before it is cut off at the border, is 1 minus a number of the distribution Beta(alpha, alpha)."""
    p: float = Field(1.0, ge=0, le=1)
    """Probability to mix at all."""

    def mix(self, draw: Draw, features: Sequence[Feature], values: Inputs, partners: Inputs) -> tuple[Inputs, Tensor]:
        side = np.where(draw.uniform(0) < self.p, np.sqrt(1 - _shares(draw, self.alpha) / STEPS), 0.0)
        found, cut, pixels = {}, np.zeros(len(draw)), 0
        for feature in features:
            mine, (height, width) = values[feature.name], feature.shape[:2]
            down, across = self._lines(draw, 2, side, height), self._lines(draw, 3, side, width)
            cut, pixels = cut + down.sum(axis=1) * across.sum(axis=1), pixels + height * width
            rows, columns = (torch.from_numpy(chosen).to(mine.device) for chosen in (down, across))
            found[feature.name] = painted(mine, rows, columns, partners[feature.name])
        return found, torch.from_numpy((1 - cut / pixels).astype(np.float32))

    @staticmethod
    def _lines(draw: Draw, number: int, side: np.ndarray, size: int) -> np.ndarray:
        """Which lines of `size` the box covers, its centre anywhere, bool (n, size)."""
        length = np.rint(side * size)
        return inside(np.floor(draw.uniform(number) * size) - np.floor(length / 2), length, size)


def mix_with(partners: Inputs, values: Inputs, features: Sequence[Feature], parts: Sequence[tuple[Mixing, Draw]]) -> tuple[Inputs, Tensor]:
    """Rows mixed with their partners by all parts, and the share of the row, float32 (n,)."""
    share = torch.ones(len(parts[0][1]))
    found = dict(values)
    for part, draw in parts:
        mixed, kept = part.mix(draw, [feature for feature in features if feature.holds in part.of], found, partners)
        found, share = found | mixed, share * kept
    for feature in features:
        mine = values[feature.name]
        larger = _larger(mine, partners[feature.name], share.to(mine.device))
        if not any(feature.holds in part.of for part, _ in parts):
            found[feature.name] = larger
        elif feature.holds == "numbers":
            missing = mine.isnan() ^ partners[feature.name].isnan()
            found[feature.name] = torch.where(missing, larger, found[feature.name])
    return found, share


def _larger(mine: Tensor, other: Tensor, share: Tensor) -> Tensor:
    """The values of the row whose share is larger."""
    return torch.where((share >= 0.5).view(-1, *[1] * (mine.dim() - 1)), mine, other)


def _blend_images(mine: Tensor, other: Tensor, share: Tensor) -> Tensor:
    """uint8 (n, height, width, channels), rounded. share: int32 (n,), in 65,536ths."""
    weight = share[:, None, None, None]
    return (mine * weight).add_(other * (STEPS - weight)).add_(STEPS // 2).bitwise_right_shift_(16).to(torch.uint8)


def _blend_numbers(mine: Tensor, other: Tensor, share: Tensor) -> Tensor:
    """float32 (n, columns), NaN where either is missing; a share of 1 leaves the row as it is."""
    weight = share[:, None].float() / STEPS
    return torch.where(weight == 1, mine, mine * weight + other * (1 - weight))


def _shares(draw: Draw, alpha: float) -> np.ndarray:
    """Numbers of the distribution Beta(alpha, alpha) in 65,536ths, int32 (n,)."""
    return beta_table(alpha)[np.floor(draw.uniform(1) * STEPS).astype(np.int64)]


@functools.cache
def beta_table(alpha: float) -> np.ndarray:
    """Quantiles of Beta(alpha, alpha) in the middle of 65,536 equal steps of probability, in 65,536ths, int32.

    The density is summed up in t = x^alpha where that makes it finite at 0 (alpha < 1), on one side: it is symmetric.
    """
    power = min(1.0, alpha)
    t = np.linspace(0, 0.5**power, 2**18 + 1)
    middle = ((t[1:] + t[:-1]) / 2) ** (1 / power)
    density = (1 - middle) ** (alpha - 1) * middle ** (alpha - power)
    scale = math.exp(math.lgamma(2 * alpha) - 2 * math.lgamma(alpha)) / power
    cumulative = np.concatenate(([0.0], np.cumsum(density) * (t[1] * scale)))
    wanted = (np.arange(STEPS // 2) + 0.5) / STEPS
    lower = np.rint(np.interp(wanted, cumulative, t) ** (1 / power) * STEPS)
    return np.concatenate((lower, STEPS - lower[::-1])).astype(np.int32)
