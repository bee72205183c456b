"""Images: encoded bytes or nested numbers, as pixels."""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from PIL import ImageColor
from pydantic import field_validator

from dlopt.data.encode import MODES, decode_image, image_shape
from dlopt.data.prepared import array_of, column_of
from dlopt.data.stats.moments import Moments, of_pixels
from dlopt.data.types.values import Reasons
from dlopt.part import DloptError, Feature, Part, Statistics


class ImageInput(Part):
    """A column of images: encoded bytes (PNG, JPEG, WEBP, GIF, BMP or TIFF; the first frame, turned as its EXIF says) or nested numbers
    from 0 to 255."""

    kind: Literal["image"] = "image"
    column: str = "image"
    """The column; also the name of the model's input."""
    size: tuple[int, int] | None = None
    """Height and width to resize to; without it all images must have the size that most of the first rows have."""
    channels: Literal[1, 3, 4] | None = None
    """1 grey, 3 colour, 4 colour with transparency, whatever encoded images have; without it 3 if any of the first rows has colour,
    else 1."""
    background: str = "white"
    """The colour behind transparent pixels, unless channels is 4: a name as in HTML, or "#rrggbb"."""
    normalize: Literal["min_max", "symmetric", "standard", "max_abs", "none"] = "min_max"
    """How the model scales pixels, per channel by the training split: min_max to [0, 1], symmetric to [-1, 1], standard to mean 0
    and deviation 1, max_abs by the greatest value."""

    @field_validator("background")
    @classmethod
    def background_is_a_colour(cls, background: str) -> str:
        try:
            if len(ImageColor.getrgb(background)) == 3:
                return background
        except ValueError:
            pass
        raise ValueError(f'{background!r} is no colour: give a name as in HTML (white, black, gray), or "#rrggbb"')

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    @property
    def tensor(self) -> str:
        """The name of the model's input."""
        return self.column

    def feature(self, table: pa.Table) -> Feature:
        """The tensor: the size that most of the first rows have, and colour if any of them has; raises DloptError when none decodes."""
        values = table[self.column].to_pylist()
        shapes, reason = self._shapes(values)
        size = self.size or next(iter(Counter(shape[:2] for shape in shapes.values()).most_common(1)), ((0, 0), 0))[0]
        for row, shape in shapes.items():
            try:
                if self.size or shape[:2] == size:
                    self._pixels(values[row], None)
                    break
            except DloptError as error:
                reason = str(error)
        else:
            raise DloptError(
                f"data.inputs: column {self.column!r} holds no image in its first {len(table)} rows: {reason or 'it is empty'}"
            )
        return Feature(
            name=self.column,
            kind="image",
            dtype="uint8",
            shape=(*size, self.channels or max(shape[2] for shape in shapes.values())),
            columns=(self.column,),
            resize=self.size is not None,
            background=self._behind,
        )

    def decided(self, table: pa.Table) -> str:
        """What the first rows have decided of encoded images, in one line; "" when there was nothing to decide."""
        values = table[self.column].to_pylist()
        shapes = [shape for row, shape in self._shapes(values)[0].items() if _encoded(values[row]) is not None]
        sizes, coloured = Counter(shape[:2] for shape in shapes).most_common(), sum(shape[2] == 3 for shape in shapes)
        said = []
        if shapes and self.channels is None:
            of = f"{coloured or len(shapes)} of the first {len(shapes)} images {'have colour' if coloured else 'are grey'}"
            said.append(f"channels: {3 if coloured else 1}, since {of}")
        if len(sizes) > 1 and self.size is None:
            said.append(f"images of another size than {_shape(sizes[0][0])} are set aside (size: resizes them)")
        return f"{self.column}: {'; '.join(said)}" if said else ""

    @property
    def _behind(self) -> tuple[int, int, int]:
        red, green, blue = ImageColor.getrgb(self.background)[:3]
        return red, green, blue

    def _shapes(self, values: list[Any]) -> tuple[dict[int, tuple[int, ...]], str]:
        """The shape of each row that begins as an image does, (height, width, channels), by row; and why the last other one does not."""
        shapes, reason = dict[int, tuple[int, ...]](), ""
        for row, value in enumerate(values):
            try:
                encoded = _encoded(value)
                shapes[row] = self._pixels(value, None).shape if encoded is None else image_shape(encoded, self._behind)
            except DloptError as error:
                reason = str(error)
        return shapes, reason

    def read(self, table: pa.Table, feature: Feature) -> tuple[dict[str, pa.Array], Reasons]:
        """Decoded pixels, and the reason for every row that is no image of the right size."""
        values, reasons = self._decode(table[self.column].combine_chunks(), feature)
        return {feature.name: column_of(values)}, reasons

    def _decode(self, column: pa.Array, feature: Feature) -> tuple[np.ndarray, Reasons]:
        whole = _nested_pixels(column)
        if whole is not None and whole.shape[1:] == feature.shape and self.size is None:
            return whole, {}
        values = np.zeros((len(column), *feature.shape), dtype=np.uint8)
        reasons: Reasons = {}
        for row, value in enumerate(column.to_pylist()):
            try:
                pixels = self._pixels(value, feature.shape[2])
                if pixels.shape != feature.shape:
                    raise DloptError(f"image of {_shape(pixels.shape)} where {_shape(feature.shape)} is needed (or set size)")
                values[row] = pixels
            except DloptError as error:
                reasons[row] = str(error)
        return values, reasons

    def _pixels(self, value: object, channels: int | None) -> np.ndarray:
        """One raw value as uint8 (height, width, channels)."""
        if value is None:
            raise DloptError("no image")
        if (encoded := _encoded(value)) is not None:
            return decode_image(encoded, channels, self.size, background=self._behind)
        pixels = _nested(value)
        if self.size and pixels.shape[:2] != tuple(self.size):
            raise DloptError(f"image of {_shape(pixels.shape)}: only encoded images are resized")
        if self.channels and pixels.shape[2] != self.channels:
            raise DloptError(f"image of {_shape(pixels.shape)}: only encoded images get other channels than they have")
        return pixels

    def observe(self, table: pa.Table, feature: Feature, bounds: Any) -> Moments:
        """What training rows say of each channel; exact, since pixels are summed as integers."""
        return of_pixels(array_of(table[feature.name], "uint8", feature.shape).reshape(-1, feature.shape[2]))

    def fit(self, seen: Moments, feature: Feature, features: dict[str, Feature]) -> tuple[Feature, Statistics | None]:
        return feature, seen.statistics(self.normalize)

    def finish(self, table: pa.Table, feature: Feature) -> np.ndarray:
        """Pixels, uint8 (rows, height, width, channels)."""
        return array_of(table[feature.name], "uint8", feature.shape)


def _nested_pixels(column: pa.Array) -> np.ndarray | None:
    """(rows, height, width, channels) of a column of nested fixed-size lists of bytes without nulls; else None."""
    shape: list[int] = []
    rows = len(column)
    while pa.types.is_fixed_size_list(column.type) and column.null_count == 0:
        shape.append(column.type.list_size)
        column = column.flatten()
    if column.type != pa.uint8() or column.null_count or len(shape) not in (2, 3):
        return None
    pixels = column.to_numpy().reshape(rows, *shape)
    return pixels if len(shape) == 3 else pixels[..., None]


def _encoded(value: object) -> bytes | None:
    """The bytes of an encoded image."""
    if isinstance(value, dict):  # as Hugging Face datasets keep images
        value = value.get("bytes")
    return value if isinstance(value, bytes) else None


def _nested(value: object) -> np.ndarray:
    """One image of nested numbers as uint8 (height, width, channels)."""
    if not isinstance(value, list):
        raise DloptError(f"a {type(value).__name__} is no image")
    try:
        pixels = np.asarray(value)
    except ValueError:
        raise DloptError("nested numbers of uneven lengths are no image") from None
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    if pixels.dtype.kind not in "iuf" or pixels.ndim != 3 or pixels.shape[2] not in MODES:
        raise DloptError(f"nested numbers of shape {_shape(pixels.shape)} are no image")
    if not np.all((pixels >= 0) & (pixels <= 255) & (pixels == np.rint(pixels))):
        raise DloptError("pixels must be whole numbers from 0 to 255")
    return pixels.astype(np.uint8)


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(str(size) for size in shape)
