"""RandAugment (Cubuk et al. 2019, arXiv 1909.13719): for every row a few operations at random, all of one strength."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field
from torch import Tensor

from dlopt.data.augment.draw import Draw
from dlopt.data.augment.geometric import Filled, rotation
from dlopt.data.augment.pixels import Pixels, brighten, changed, contrast, saturate
from dlopt.data.augment.resample import Affine

STRONGEST = {
    "identity": 0.0,
    "rotate": 30.0,
    "shear_x": 0.3,
    "shear_y": 0.3,
    "translate_x": 0.45,
    "translate_y": 0.45,
    "brightness": 0.9,
    "contrast": 0.9,
    "saturation": 0.9,
}
"""What there is to choose from, and how much of it the magnitude 1 is: degrees, the tangent of the angle, a share of the size, a
distance of the factor from 1. Of the paper's list, what is a movement or a factor."""
OPERATIONS = tuple(STRONGEST)
COLOURS = {"brightness": brighten, "contrast": contrast, "saturation": saturate}


class RandAugment(Filled, Pixels):
    """A few operations for each row, chosen from: nothing, rotation, shear and translation in either direction, brightness, contrast
    and saturation, each with either sign. Movements join the one resampling; colours follow in the order in which they were chosen."""

    kind: Literal["rand_augment"] = "rand_augment"
    num_ops: int = Field(2, ge=1, le=16)
    """How many operations; one may be chosen twice."""
    magnitude: float = Field(0.3, ge=0, le=1)
    """How strong they are: 1 is a rotation by 30 degrees, a shear by 0.3, a translation by 45 % of the size, a factor of 0.1 or 1.9."""

    def matrix(self, draw: Draw, height: int, width: int) -> Affine:
        total = Affine()
        for turn in range(self.num_ops):
            amount = self._amounts(draw, turn)
            shear = Affine(xy=amount["shear_x"], yx=amount["shear_y"])
            shift = Affine(x=amount["translate_x"] * width, y=amount["translate_y"] * height)
            total = total @ rotation(amount["rotate"]) @ shear @ shift
        return total

    def pixels(self, draw: Draw, images: Tensor) -> Tensor:
        for turn in range(self.num_ops):
            amount = self._amounts(draw, turn)
            for name, colour in COLOURS.items():
                factors = 1 + amount[name]
                images = changed(images, factors != 1, lambda some, rows, f=factors, do=colour: do(some, f[rows]))  # type: ignore[misc]
        return images

    def _amounts(self, draw: Draw, turn: int) -> dict[str, np.ndarray]:
        """How much of each operation every row gets in this turn, (n,) each: of one operation all, with either sign, of the rest 0."""
        chosen = np.floor(draw.uniform(2 * turn) * len(OPERATIONS))
        signed = np.where(draw.uniform(2 * turn + 1) < 0.5, -self.magnitude, self.magnitude)
        return {name: np.where(chosen == number, signed * STRONGEST[name], 0.0) for number, name in enumerate(OPERATIONS)}
