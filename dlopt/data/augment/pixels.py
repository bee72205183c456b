"""What changes the pixels of an image where they are: after everything that moves them, in the order of the job.

Each takes and gives uint8 images (n, height, width, channels) and leaves those that it was given as they were. Factors are
integers in 65,536ths, so that the result is the same to the bit everywhere. To add one: a class with `pixels`, and its name in the union.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from dlopt.data.augment.boxes import Range, boxes, inside
from dlopt.data.augment.draw import Draw
from dlopt.part import Part

ONE = 2**16
"""The factor 1."""
GREY = (19595, 38470, 7471)
"""Red, green and blue in the lightness of a colour (ITU-R 601-2), in 65,536ths, as Pillow has them."""
BLUR = 2**15
"""What the weights of a blur add up to."""
LONGEST = 256
"""Most pixels that a blur looks at to each side."""


class Pixels(Part):
    """An augmentation that changes pixels."""

    of: ClassVar[tuple[str, ...]] = ("pixels",)

    def pixels(self, draw: Draw, images: Tensor) -> Tensor:
        """uint8 (n, height, width, channels) images, changed."""
        raise NotImplementedError


class RandomErasing(Pixels):
    """Paint a box over; the boxes are those of torchvision's RandomErasing."""

    kind: Literal["random_erasing"] = "random_erasing"
    p: float = Field(0.5, ge=0, le=1)
    """Probability."""
    scale: Range = (0.02, 0.33)
    """The box's area as a share of the image's, uniform between these."""
    ratio: Range = (0.3, 3.3)
    """Its width over its height, its logarithm uniform between these."""
    fill: int = Field(0, ge=0, le=255)
    """Its grey level, in every channel."""

    def pixels(self, draw: Draw, images: Tensor) -> Tensor:
        height, width = images.shape[1:3]
        box = boxes(draw, height, width, self.scale, self.ratio)
        erased = box.fits & (draw.uniform(22) < self.p)
        down, across = inside(box.top, box.height, height) & erased[:, None], inside(box.left, box.width, width)
        return painted(images, _to(images, down), _to(images, across), self.fill)


class Brightness(Pixels):
    """Multiply by a factor."""

    kind: Literal["brightness"] = "brightness"
    amount: float = Field(0.2, ge=0, le=1)
    """The factor is uniform between 1 minus and 1 plus this."""

    def pixels(self, draw: Draw, images: Tensor) -> Tensor:
        return brighten(images, draw.uniform(0, 1 - self.amount, 1 + self.amount))


class Contrast(Pixels):
    """Multiply the distance to the image's mean lightness by a factor."""

    kind: Literal["contrast"] = "contrast"
    amount: float = Field(0.2, ge=0, le=1)
    """The factor is uniform between 1 minus and 1 plus this."""

    def pixels(self, draw: Draw, images: Tensor) -> Tensor:
        return contrast(images, draw.uniform(0, 1 - self.amount, 1 + self.amount))


class Saturation(Pixels):
    """Multiply the distance to the pixel's own grey by a factor; nothing happens to images without colour."""

    kind: Literal["saturation"] = "saturation"
    amount: float = Field(0.2, ge=0, le=1)
    """The factor is uniform between 1 minus and 1 plus this."""

    def pixels(self, draw: Draw, images: Tensor) -> Tensor:
        return saturate(images, draw.uniform(0, 1 - self.amount, 1 + self.amount))


class GaussianNoise(Pixels):
    """Add a normally distributed number to every value."""

    kind: Literal["gaussian_noise"] = "gaussian_noise"
    std: float = Field(0.05, ge=0, le=1)
    """Its standard deviation as a share of the range from black to white."""

    def pixels(self, draw: Draw, images: Tensor) -> Tensor:
        noise = _to(images, draw.normals(0, images[0].numel())).view(images.shape)
        return (noise * (255 * self.std)).add_(images).round_().clamp_(0, 255).to(torch.uint8)


class GaussianBlur(Pixels):
    """Blur with a Gaussian; the border goes on outside."""

    kind: Literal["gaussian_blur"] = "gaussian_blur"
    p: float = Field(0.5, ge=0, le=1)
    """Probability."""
    sigma: Range = (0.1, 2.0)
    """Its standard deviation in pixels, uniform between these."""

    def pixels(self, draw: Draw, images: Tensor) -> Tensor:
        sigma = draw.uniform(1, *self.sigma)
        return changed(images, draw.uniform(0) < self.p, lambda some, rows: blur(some, sigma[rows], self.sigma[1]))


def changed(images: Tensor, which: np.ndarray, change: Callable[[Tensor, np.ndarray], Tensor]) -> Tensor:
    """The images, those of the chosen rows changed. which: bool (n,); change takes some images and the numbers of their rows."""
    rows = np.flatnonzero(which)
    if not len(rows):
        return images
    index = _to(images, rows)
    return images.index_copy(0, index, change(images.index_select(0, index), rows))


def painted(images: Tensor, rows: Tensor, columns: Tensor, paint: int | Tensor) -> Tensor:
    """Images, painted over where a row and a column are both chosen, bool (n, height) and (n, width). paint: a grey level, or
    images. With bits, which is ten times as fast as a mask."""
    planes, (down, across) = images.permute(0, 3, 1, 2), (chosen.to(torch.uint8).neg_() for chosen in (rows, columns))
    spread = (down[:, :, None] & across[:, None, :])[:, None]
    other = spread & (paint if isinstance(paint, int) else paint.permute(0, 3, 1, 2))
    return (planes & ~spread).bitwise_or_(other).permute(0, 2, 3, 1)


def brighten(images: Tensor, factors: np.ndarray) -> Tensor:
    """Values times the row's factor. factors: (n,), at most 100."""
    return _rounded(images * _factors(images, factors))


def contrast(images: Tensor, factors: np.ndarray) -> Tensor:
    """Values away from the mean lightness of the image, rounded, by the row's factor."""
    total = _grey(images).flatten(1).sum(dim=1, dtype=torch.int64)
    pixels = images.shape[1] * images.shape[2]
    mean = ((2 * total + pixels) // (2 * pixels)).int()[:, None, None, None]
    return _away(images, mean, factors)


def saturate(images: Tensor, factors: np.ndarray) -> Tensor:
    """Values away from the pixel's grey by the row's factor; of four channels the first three are colours."""
    if images.shape[3] < 3:
        return images
    colours = _away(images[..., :3], _grey(images)[..., None], factors)
    return torch.cat((colours, images[..., 3:]), dim=3)


def blur(images: Tensor, sigma: np.ndarray, most: float) -> Tensor:
    """Blurred by each row's Gaussian, first to the sides, then up and down. sigma: (n,), pixels; most: the largest there can be."""
    radius = min(LONGEST, int(np.ceil(3 * most)))
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma[:, None]) ** 2)
    whole = np.rint(weights / weights.sum(axis=1, keepdims=True) * BLUR)
    whole[:, radius] += BLUR - whole.sum(axis=1)
    kernel = _to(images, whole.astype(np.int32))
    wide = _convolved(images.int(), kernel, dim=2).add_(1 << 7).bitwise_right_shift_(8)
    return _convolved(wide, kernel, dim=1).add_(1 << 21).bitwise_right_shift_(22).to(torch.uint8)


def _convolved(images: Tensor, kernel: Tensor, dim: int) -> Tensor:
    """int32 (n, height, width, channels), weighted sums along a dimension. kernel: int32 (n, 2 * radius + 1)."""
    size, radius = images.shape[dim], kernel.shape[1] // 2
    place = torch.arange(-radius, size + radius, device=images.device).clamp_(0, size - 1)
    wider, found = images.index_select(dim, place), torch.zeros_like(images)
    for number in range(kernel.shape[1]):
        found.addcmul_(wider.narrow(dim, number, size), kernel[:, number, None, None, None])
    return found


def _grey(images: Tensor) -> Tensor:
    """The lightness of every pixel, int32 (n, height, width), rounded as Pillow does."""
    if images.shape[3] < 3:
        return images[..., 0].int()
    red, green, blue = (images[..., channel].int() * weight for channel, weight in enumerate(GREY))
    return red.add_(green).add_(blue).add_(1 << 15).bitwise_right_shift_(16)


def _away(images: Tensor, centre: Tensor, factors: np.ndarray) -> Tensor:
    return _rounded((images - centre) * _factors(images, factors) + (centre << 16))


def _rounded(values: Tensor) -> Tensor:
    """uint8 from int32 in 65,536ths."""
    return values.add_(1 << 15).bitwise_right_shift_(16).clamp_(0, 255).to(torch.uint8)


def _factors(images: Tensor, factors: np.ndarray) -> Tensor:
    """int32 (n, 1, 1, 1), in 65,536ths."""
    return _to(images, np.rint(factors * ONE).astype(np.int32))[:, None, None, None]


def _to(images: Tensor, values: np.ndarray) -> Tensor:
    return torch.from_numpy(values).to(images.device)
