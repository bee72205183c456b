"""What changes numbers and dates: float32 (n, columns), NaN where missing. To add one: a class with `change`, and its name in the union."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from dlopt.data.augment.draw import Draw
from dlopt.part import Part


class Change(Part):
    """An augmentation of numbers."""

    of: ClassVar[tuple[str, ...]] = ("numbers",)

    def change(self, draw: Draw, values: Tensor, std: Tensor) -> Tensor:
        """float32 (n, columns), changed. std: the columns' standard deviations in the training split, float32 (columns,)."""
        raise NotImplementedError


class FeatureNoise(Change):
    """Add a normally distributed number to every value; missing ones stay missing."""

    kind: Literal["feature_noise"] = "feature_noise"
    std: float = Field(0.1, ge=0)
    """Its standard deviation, in standard deviations of the column in the training split."""

    def change(self, draw: Draw, values: Tensor, std: Tensor) -> Tensor:
        noise = torch.from_numpy(draw.normals(0, values.shape[1])).to(values.device)
        return values + noise * (std * self.std)


class FeatureDropout(Change):
    """Make values missing: the model sees what stands in for those."""

    kind: Literal["feature_dropout"] = "feature_dropout"
    p: float = Field(0.1, ge=0, le=1)
    """Probability, of each value."""

    def change(self, draw: Draw, values: Tensor, std: Tensor) -> Tensor:
        dropped = torch.from_numpy(draw.uniforms(0, values.shape[1]) < self.p).to(values.device)
        return values.masked_fill(dropped, torch.nan)
