"""What moves the pixels of an image. However many of these a job has, they are one affine map a row and one resampling, in the
order of the job and before anything that changes pixels. To add one: a class with `matrix`, and its name in the union."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from dlopt.data.augment.boxes import Range, boxes
from dlopt.data.augment.draw import Draw
from dlopt.data.augment.resample import Affine
from dlopt.part import Part


class Geometric(Part):
    """An augmentation that moves pixels."""

    of: ClassVar[tuple[str, ...]] = ("pixels",)

    def matrix(self, draw: Draw, height: int, width: int) -> Affine:
        """Where each pixel of the result comes from, for each row. height, width: of the image, in pixels."""
        raise NotImplementedError


class Filled(Geometric):
    """One that may need what lies outside of the image."""

    fill: int = Field(0, ge=0, le=255)
    """Grey level outside of the image, in every channel; the same for all parts, since they are one resampling."""


class RandomHorizontalFlip(Geometric):
    """Mirror left and right."""

    kind: Literal["random_horizontal_flip"] = "random_horizontal_flip"
    p: float = Field(0.5, ge=0, le=1)
    """Probability."""

    def matrix(self, draw: Draw, height: int, width: int) -> Affine:
        return Affine(xx=np.where(draw.uniform(0) < self.p, -1.0, 1.0))


class RandomVerticalFlip(Geometric):
    """Mirror top and bottom."""

    kind: Literal["random_vertical_flip"] = "random_vertical_flip"
    p: float = Field(0.5, ge=0, le=1)
    """Probability."""

    def matrix(self, draw: Draw, height: int, width: int) -> Affine:
        return Affine(yy=np.where(draw.uniform(0) < self.p, -1.0, 1.0))


class RandomRotation(Filled):
    """Turn about the centre."""

    kind: Literal["random_rotation"] = "random_rotation"
    degrees: float = Field(10.0, ge=0, le=180)
    """The angle is uniform between minus and plus this."""

    def matrix(self, draw: Draw, height: int, width: int) -> Affine:
        return rotation(draw.uniform(0, -self.degrees, self.degrees))


class RandomScale(Filled):
    """Make larger or smaller about the centre."""

    kind: Literal["random_scale"] = "random_scale"
    scale: Range = (0.8, 1.2)
    """The factor is uniform between these."""

    def matrix(self, draw: Draw, height: int, width: int) -> Affine:
        factor = draw.uniform(0, *self.scale)
        return Affine(xx=1 / factor, yy=1 / factor)


class RandomShear(Filled):
    """Slant, about the centre."""

    kind: Literal["random_shear"] = "random_shear"
    horizontal: float = Field(10.0, ge=0, le=80)
    """Degrees by which vertical lines slant: uniform between minus and plus this."""
    vertical: float = Field(0.0, ge=0, le=80)
    """Degrees by which horizontal lines slant: uniform between minus and plus this."""

    def matrix(self, draw: Draw, height: int, width: int) -> Affine:
        across, down = draw.uniform(0, -self.horizontal, self.horizontal), draw.uniform(1, -self.vertical, self.vertical)
        return Affine(xy=np.tan(np.deg2rad(across))) @ Affine(yx=np.tan(np.deg2rad(down)))


class RandomTranslation(Filled):
    """Shift by a part of the image's size."""

    kind: Literal["random_translation"] = "random_translation"
    horizontal: float = Field(0.1, ge=0, le=1)
    """The shift to the side is uniform between minus and plus this share of the width."""
    vertical: float = Field(0.1, ge=0, le=1)
    """The shift up or down is uniform between minus and plus this share of the height."""

    def matrix(self, draw: Draw, height: int, width: int) -> Affine:
        across, down = draw.uniform(0, -self.horizontal, self.horizontal), draw.uniform(1, -self.vertical, self.vertical)
        return Affine(x=across * width, y=down * height)


class RandomCrop(Filled):
    """Shift by whole pixels, as padding on all sides and cropping back to size does."""

    kind: Literal["random_crop"] = "random_crop"
    padding: int = Field(2, ge=0)
    """Most pixels to shift by, in each direction."""

    def matrix(self, draw: Draw, height: int, width: int) -> Affine:
        x, y = (np.floor(draw.uniform(axis) * (2 * self.padding + 1)) - self.padding for axis in range(2))
        return Affine(x=x, y=y)


class RandomResizedCrop(Geometric):
    """Cut out a box and enlarge it to the size of the image, its corner pixels onto the image's; the boxes are those of
    torchvision's RandomResizedCrop."""

    kind: Literal["random_resized_crop"] = "random_resized_crop"
    scale: Range = (0.08, 1.0)
    """The box's area as a share of the image's, uniform between these."""
    ratio: Range = (3 / 4, 4 / 3)
    """Its width over its height, its logarithm uniform between these."""

    @model_validator(mode="after")
    def box_lies_inside(self) -> Self:
        if self.scale[1] > 1:
            raise ValueError(f"scale {list(self.scale)}: the box cannot be larger than the image, so give at most 1")
        return self

    def matrix(self, draw: Draw, height: int, width: int) -> Affine:
        box = boxes(draw, height, width, self.scale, self.ratio)
        most = min(width, round(height * self.ratio[1])), min(height, round(width / self.ratio[0]))
        across, down = (np.where(box.fits, found, least) for found, least in zip((box.width, box.height), most, strict=True))
        left, top = np.where(box.fits, box.left, (width - across) // 2), np.where(box.fits, box.top, (height - down) // 2)
        return Affine(
            xx=(across - 1) / max(1, width - 1),
            x=left + (across - width) / 2,
            yy=(down - 1) / max(1, height - 1),
            y=top + (down - height) / 2,
        )


def rotation(degrees: np.ndarray) -> Affine:
    """A turn about the centre."""
    angle = np.deg2rad(degrees)
    cos, sin = np.cos(angle), np.sin(angle)
    return Affine(xx=cos, xy=-sin, yx=sin, yy=cos)
