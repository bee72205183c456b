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


class Samples(NamedTuple):
    """A few training images, and what augmentation makes of them."""

    original: np.ndarray
    """uint8 (images, height, width, channels)."""
    augmented: np.ndarray
    """The same images in one epoch after the other, uint8 (epochs, images, height, width, channels)."""
