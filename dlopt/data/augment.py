"""Augmentation of images in training. Geometric ones compose into one affine matrix a row and one resampling.

A row's random numbers come from (seed, epoch, row) alone. To add one: a class with `matrix`, and its name in the union.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from dlopt.data.counter import uniform
from dlopt.part import Part

PURPOSE = 3  # apart from the numbers that order rows
Draw = Callable[[int], np.ndarray]
"""draw(i): the i-th uniform number in [0, 1) of each row, (rows,)."""


class RandomCrop(Part):
    """Shift by whole pixels, as padding with black on all sides and cropping back to size does."""

    kind: Literal["random_crop"] = "random_crop"
    padding: int = Field(2, ge=0)
    """Most pixels to shift by, in each direction."""

    def matrix(self, draw: Draw, height: int, width: int) -> np.ndarray:
        shift = [np.floor(draw(axis) * (2 * self.padding + 1)) - self.padding for axis in range(2)]
        return _affine(len(shift[0]), x=shift[0], y=shift[1])


class RandomHorizontalFlip(Part):
    """Mirror left and right."""

    kind: Literal["random_horizontal_flip"] = "random_horizontal_flip"
    p: float = Field(0.5, ge=0, le=1)
    """Probability."""

    def matrix(self, draw: Draw, height: int, width: int) -> np.ndarray:
        flip = np.where(draw(0) < self.p, -1.0, 1.0)
        return _affine(len(flip), xx=flip)


class RandomRotation(Part):
    """Turn about the centre, bilinear, black outside."""

    kind: Literal["random_rotation"] = "random_rotation"
    degrees: float = Field(10.0, ge=0, le=180)
    """The angle is uniform between minus and plus this."""

    def matrix(self, draw: Draw, height: int, width: int) -> np.ndarray:
        angle = np.deg2rad((2 * draw(0) - 1) * self.degrees)
        cos, sin = np.cos(angle), np.sin(angle)
        return _affine(len(angle), xx=cos, xy=-sin, yx=sin, yy=cos)


Augmentation = Annotated[RandomCrop | RandomHorizontalFlip | RandomRotation, Field(discriminator="kind")]


def augment(images: Tensor, rows: np.ndarray, seed: int, epoch: int, parts: Sequence[Augmentation]) -> Tensor:
    """Augmented copies of images, the same to the bit however rows are put into batches.

    images: uint8 (n, height, width, channels); rows: int64 (n,), numbers of the rows in the training split.
    """
    if not parts or not len(images):
        return images
    height, width = images.shape[1:3]
    total = np.broadcast_to(np.eye(3), (len(rows), 3, 3))
    for index, part in enumerate(parts):
        total = total @ part.matrix(_drawer(rows, seed, epoch, index), height, width)
    return _resample(images, total)


def _drawer(rows: np.ndarray, seed: int, epoch: int, index: int) -> Draw:
    return lambda number: uniform(rows, seed, epoch, PURPOSE, index, number)


def _affine(rows: int, **entries: np.ndarray) -> np.ndarray:
    """Matrices (rows, 3, 3) that take a pixel of the result to where it comes from; coordinates in pixels from the centre."""
    places = {"xx": (0, 0), "xy": (0, 1), "x": (0, 2), "yx": (1, 0), "yy": (1, 1), "y": (1, 2)}
    matrix = np.tile(np.eye(3), (rows, 1, 1))
    for name, values in entries.items():
        matrix[:, *places[name]] = values
    return matrix


def _resample(images: Tensor, matrices: np.ndarray) -> Tensor:
    """One bilinear resampling. Coordinates are computed element by element, not by a matrix product, whose rounding may
    depend on the batch."""
    n, height, width, _ = images.shape
    entry = torch.from_numpy(np.ascontiguousarray(matrices[:, :2].reshape(n, 6))).to(images.device)[:, :, None, None]
    y = (torch.arange(height, dtype=torch.float64, device=images.device) - (height - 1) / 2)[None, :, None]
    x = (torch.arange(width, dtype=torch.float64, device=images.device) - (width - 1) / 2)[None, None, :]
    from_x = (entry[:, 0] * x + entry[:, 1] * y) + entry[:, 2]
    from_y = (entry[:, 3] * x + entry[:, 4] * y) + entry[:, 5]
    grid = torch.stack((from_x * (2 / width), from_y * (2 / height)), dim=-1).float()
    pixels = images.permute(0, 3, 1, 2).float()
    found = F.grid_sample(pixels, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return found.round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
