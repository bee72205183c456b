"""The report stage: one self-contained page on a run. Importing this imports neither torch nor matplotlib."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from markupsafe import Markup


class Figure(NamedTuple):
    """A plot, its title and what it shows in words."""

    title: str
    svg: Markup
    alt: str


class Importance(NamedTuple):
    """What the model's error on the test split is, and how much it rises when a column says nothing of its row."""

    measure: str
    """What is measured, in words."""
    before: float
    rows: int
    columns: list[str]
    rises: np.ndarray
    """float64 (columns,)."""


class Samples(NamedTuple):
    """A few training images, and what augmentation makes of them."""

    original: np.ndarray
    """uint8 (images, height, width, channels)."""
    augmented: np.ndarray
    """The same images in one epoch after the other, uint8 (epochs, images, height, width, channels)."""
