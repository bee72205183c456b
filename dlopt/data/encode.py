"""What happens to raw values outside the model's graph: decoding. Both `prepare` and the server's replica use it, so
that training and serving see the same numbers. Imports neither torch nor Ray."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from dlopt.part import DloptError, Feature, Signature

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Pillow's name for an image with so many channels."""
GREY = ("1", "L", "LA", "I;16")
MOST_PIXELS = 64 * 1024 * 1024
"""A larger image is refused before it is decoded, instead of filling the memory."""


def decode_image(data: bytes, channels: int | None = None, size: tuple[int, int] | None = None) -> np.ndarray:
    """Pixels of an encoded image (PNG, JPEG, ...) as uint8 of shape (height, width, channels).

    channels: 1 grey, 3 colour, 4 with transparency; None keeps grey as 1 and makes the rest 3.
    size: (height, width) to resize to, bilinear. Raises DloptError saying why the bytes are no image.
    """
    try:
        with Image.open(io.BytesIO(data)) as file:
            if file.width * file.height > MOST_PIXELS:
                raise DloptError(f"image of {file.width}x{file.height} is too large")
            image = file.convert(MODES[channels or (1 if file.mode in GREY else 3)])
    except DloptError:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        raise DloptError(f"not an image: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from None
    if size and (image.height, image.width) != tuple(size):
        image = image.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def encode_rows(signature: Signature, rows: Sequence[Any]) -> dict[str, np.ndarray]:
    """Raw rows as a client sends them, as the tensors that the model takes: {name: (rows, *shape)}.

    A row is an object of columns; when the model has one input tensor, its bare value is a row as well. An image is nested
    numbers 0-255 of shape (height, width) or (height, width, channels), or {"b64": base64 of an encoded image}. A number may
    be null (missing). Raises DloptError naming the row and the column.
    """
    return {feature.name: _encode(signature, feature, rows) for feature in signature.inputs}


def _encode(signature: Signature, feature: Feature, rows: Sequence[Any]) -> np.ndarray:
    alone = len(signature.inputs) == 1
    if feature.kind == "image":
        return _images(feature, [_value(row, feature.columns[0], index, alone) for index, row in enumerate(rows)])
    return _numbers(feature, rows, alone)


def _value(row: Any, column: str, index: int, alone: bool) -> Any:
    if isinstance(row, Mapping) and not (alone and set(row) == {"b64"}):
        if column not in row:
            raise DloptError(f"row {index}: has no column {column!r}")
        return row[column]
    if not alone:
        raise DloptError(f"row {index}: must be an object of columns")
    return row


def _images(feature: Feature, values: list[Any]) -> np.ndarray:
    """Plain arrays take one conversion for the whole batch; anything else is looked at row by row."""
    height, width, channels = feature.shape
    try:
        whole = np.asarray(values)
    except ValueError:
        whole = np.empty(0, dtype=object)
    fits = whole.ndim > 1 and whole.shape[1:] in ((height, width, channels), (height, width) if channels == 1 else ())
    if whole.dtype.kind in "ui" and fits and whole.min(initial=0) >= 0 and whole.max(initial=0) <= 255:
        return whole.reshape(-1, *feature.shape).astype(np.uint8)
    return np.stack([_image(feature, value, index) for index, value in enumerate(values)]) if values else _empty(feature)


def _image(feature: Feature, value: Any, index: int) -> np.ndarray:
    where = f"row {index}: {feature.name}"
    height, width, channels = feature.shape
    if isinstance(value, Mapping):
        pixels = _from_base64(value, where, channels)
    else:
        pixels = _from_numbers(value, where)
        if pixels.ndim == 2 and channels == 1:
            pixels = pixels[:, :, None]
    if pixels.shape != feature.shape:
        raise DloptError(f"{where}: shape {list(pixels.shape)} where {[height, width, channels]} is needed")
    return pixels


def _from_base64(value: Mapping[str, Any], where: str, channels: int) -> np.ndarray:
    if set(value) != {"b64"} or not isinstance(value["b64"], str):
        raise DloptError(f'{where}: give nested numbers or {{"b64": "..."}}')
    try:
        return decode_image(base64.b64decode(value["b64"], validate=True), channels)
    except binascii.Error:
        raise DloptError(f"{where}: b64 is not base64") from None
    except DloptError as error:
        raise DloptError(f"{where}: {error}") from None


def _from_numbers(value: Any, where: str) -> np.ndarray:
    try:
        pixels = np.asarray(value)
    except ValueError:
        raise DloptError(f"{where}: nested numbers of uneven lengths") from None
    if pixels.dtype.kind not in "uif":
        raise DloptError(f'{where}: give nested numbers or {{"b64": "..."}}')
    with np.errstate(invalid="ignore"):
        if pixels.size and not (np.all(pixels >= 0) and np.all(pixels <= 255) and np.all(pixels == np.rint(pixels))):
            raise DloptError(f"{where}: pixels must be whole numbers from 0 to 255")
    return pixels.astype(np.uint8)


def _numbers(feature: Feature, rows: Sequence[Any], alone: bool) -> np.ndarray:
    if alone and rows and not isinstance(rows[0], Mapping):
        if any(not isinstance(row, (list, tuple)) or len(row) != feature.size for row in rows):
            raise DloptError(f"rows must be lists of {feature.size} numbers or objects with the columns {', '.join(feature.columns)}")
        values: list[Any] = list(rows)
    else:
        values = [[_value(row, column, index, alone=False) for column in feature.columns] for index, row in enumerate(rows)]
    if not values:
        return _empty(feature)
    for index, row in enumerate(values):
        for column, value in zip(feature.columns, row, strict=True):
            if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
                raise DloptError(f"row {index}: {column}: {value!r:.40} is not a number")
    try:
        return np.array([[np.nan if value is None else value for value in row] for row in values], dtype=np.float64).astype(np.float32)
    except OverflowError:
        raise DloptError(f"{feature.name}: a number is too large") from None


def _empty(feature: Feature) -> np.ndarray:
    return np.zeros((0, *feature.shape), dtype=feature.dtype)
