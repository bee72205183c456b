"""Random boxes by area and aspect ratio, as random resized crops and random erasing of torchvision draw them."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import numpy as np
from pydantic import AfterValidator, Field

from dlopt.data.augment.draw import Draw

ATTEMPTS = 10
"""How many boxes a row tries until one fits."""


def _rises(value: tuple[float, float]) -> tuple[float, float]:
    if value[0] > value[1]:
        raise ValueError(f"{list(value)}: the first must not be more than the second")
    return value


Range = Annotated[tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]], AfterValidator(_rises)]
"""Least and most."""


class Boxes(NamedTuple):
    """A box for each row, whole pixels, (n,) each."""

    left: np.ndarray
    top: np.ndarray
    width: np.ndarray
    height: np.ndarray
    fits: np.ndarray
    """Whether there is one: of the rows whose attempts were all too long for the image there is not."""


def boxes(draw: Draw, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]) -> Boxes:
    """The first of ten boxes that fits: area uniform between the shares `scale`, the logarithm of width / height between those
    of `ratio`, the place uniform. Takes the numbers 0 to 21 of the draw."""
    fits, across, down = np.zeros(len(draw), dtype=bool), np.ones(len(draw)), np.ones(len(draw))
    low, high = np.log(ratio)
    for attempt in range(ATTEMPTS):
        rows = np.flatnonzero(~fits)
        if not len(rows):
            break
        trial = Draw(draw.keys[rows])
        area = height * width * trial.uniform(2 + 2 * attempt, *scale)
        aspect = np.exp(trial.uniform(3 + 2 * attempt, low, high))
        across[rows], down[rows] = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
        fits = (across >= 1) & (across <= width) & (down >= 1) & (down <= height)
    left, top = np.floor(draw.uniform(0) * (width - across + 1)), np.floor(draw.uniform(1) * (height - down + 1))
    return Boxes(left, top, across, down, fits)


def inside(start: np.ndarray, length: np.ndarray, size: int) -> np.ndarray:
    """Which of `size` places lie in [start, start + length), bool (n, size)."""
    place = np.arange(size)
    return (place >= start[:, None]) & (place < (start + length)[:, None])
