"""Images: encoded bytes or nested numbers, as pixels."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pyarrow as pa

from dlopt.data.encode import MODES, decode_image
from dlopt.data.inputs.values import Reasons
from dlopt.data.moments import Moments, of_pixels
from dlopt.data.prepared import array_of, column_of
from dlopt.part import DloptError, Feature, Part, Statistics


class ImageInput(Part):
    """A column of images: encoded bytes (PNG, JPEG, ...) or nested numbers from 0 to 255."""

    kind: Literal["image"] = "image"
    column: str = "image"
    """The column; also the name of the model's input."""
    size: tuple[int, int] | None = None
    """Height and width to resize to; without it all images must have the size of the first one."""
    normalize: Literal["min_max", "symmetric", "standard", "max_abs", "none"] = "min_max"
    """How the model scales pixels, per channel by the training split: min_max to [0, 1], symmetric to [-1, 1], standard to mean 0
    and deviation 1, max_abs by the greatest value."""

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    @property
    def tensor(self) -> str:
        """The name of the model's input."""
        return self.column

    def feature(self, table: pa.Table) -> Feature:
        """The tensor, from the first rows that decode; raises DloptError when none does."""
        reason = ""
        for value in table[self.column].to_pylist():
            try:
                pixels = _pixels(value, None, self.size)
            except DloptError as error:
                reason = str(error)
                continue
            return Feature(
                name=self.column, kind="image", dtype="uint8", shape=pixels.shape, columns=(self.column,), resize=self.size is not None
            )
        raise DloptError(f"data.inputs: column {self.column!r} holds no image in its first {len(table)} rows: {reason or 'it is empty'}")

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
                pixels = _pixels(value, feature.shape[2], self.size)
                if pixels.shape != feature.shape:
                    raise DloptError(f"image of {_shape(pixels.shape)} where {_shape(feature.shape)} is needed (or set size)")
                values[row] = pixels
            except DloptError as error:
                reasons[row] = str(error)
        return values, reasons

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


def _pixels(value: object, channels: int | None, size: tuple[int, int] | None) -> np.ndarray:
    """One raw value as uint8 (height, width, channels)."""
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):  # as Hugging Face datasets keep images
        value = value["bytes"]
    if value is None:
        raise DloptError("no image")
    if isinstance(value, bytes):
        return decode_image(value, channels, size)
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
    if size and pixels.shape[:2] != tuple(size):
        raise DloptError(f"image of {_shape(pixels.shape)}: only encoded images are resized")
    return pixels.astype(np.uint8)


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(str(size) for size in shape)
