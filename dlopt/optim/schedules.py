"""Schedules: the factor on the learning rate as a function of progress. To add one: a class with `factor`, and its name
in the union at the end. Plateau is the only one with memory."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from dlopt.part import Part


class Warmup(Part):
    """What all schedules share: a linear rise from 0 at the start; the schedule itself runs over the rest."""

    warmup_epochs: float = Field(0.0, ge=0)
    """Length of the rise, in epochs."""

    def rate(self, epoch: float, epochs: int) -> float:
        """The factor after `epoch` epochs (0 at the start, fractions within) of `epochs`."""
        if epoch < self.warmup_epochs:
            return epoch / self.warmup_epochs
        rest = max(epochs - self.warmup_epochs, 1e-12)
        return self.factor(min((epoch - self.warmup_epochs) / rest, 1.0), rest)

    def factor(self, progress: float, epochs: float) -> float:
        """The factor at a progress from 0 to 1 through `epochs` epochs after the warm-up."""
        raise NotImplementedError


class Constant(Warmup):
    """The peak rate all along."""

    kind: Literal["constant"] = "constant"

    def factor(self, progress: float, epochs: float) -> float:
        return 1.0


class Exponential(Warmup):
    """decay to the power of the epochs done."""

    kind: Literal["exponential"] = "exponential"
    decay: float = Field(0.9, gt=0, le=1)
    """Factor an epoch."""
    staircase: bool = False
    """Fall at the ends of epochs instead of smoothly, as torch's ExponentialLR."""

    def factor(self, progress: float, epochs: float) -> float:
        done = progress * epochs
        return self.decay ** (math.floor(done + 1e-9) if self.staircase else done)


class Cosine(Warmup):
    """Half a cosine, from 1 down to `floor` (Loshchilov, Hutter 2017)."""

    kind: Literal["cosine"] = "cosine"
    floor: float = Field(0.0, ge=0, le=1)
    """Where it ends, as a share of the peak rate."""

    def factor(self, progress: float, epochs: float) -> float:
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * progress))


class Plateau(Warmup):
    """Fall when the validation loss stops improving, as torch's ReduceLROnPlateau."""

    kind: Literal["plateau"] = "plateau"
    decay: float = Field(0.1, gt=0, lt=1)
    """Factor at each fall."""
    patience: int = Field(2, ge=0)
    """Epochs without improvement before a fall."""
    min_delta: float = Field(1e-4, ge=0, lt=1)
    """The share of the best loss by which a smaller one counts as improvement."""

    def factor(self, progress: float, epochs: float) -> float:
        return 1.0

    def falls(self, losses: list[float]) -> int:
        """How often the rate has fallen, given the validation loss of every epoch so far."""
        best, bad, falls = math.inf, 0, 0
        for loss in losses:
            if loss < best * (1 - self.min_delta):
                best, bad = loss, 0
            else:
                bad += 1
            if bad > self.patience:
                falls, bad = falls + 1, 0
        return falls


Schedule = Annotated[Constant | Exponential | Cosine | Plateau, Field(discriminator="kind")]
