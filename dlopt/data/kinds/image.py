"""Images: encoded bytes or nested numbers, as pixels."""

from __future__ import annotations

import base64
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, Literal

import numpy as np
from PIL import ImageColor
from pydantic import field_validator

from dlopt.data.kinds.base import Bound, InputKind, RawColumns, no_rows, side_by_side
from dlopt.data.kinds.pixels import MODES, decode_image, encode_png, image_shape
from dlopt.data.stats import column as profile
from dlopt.data.stats.moments import Moments, of_pixels
from dlopt.data.types.arrow import pa
from dlopt.data.types.tensors import array_of, column_of
from dlopt.data.types.values import Reasons, plain
from dlopt.part import DloptError, Feature, Statistics

DATA_URI = re.compile(r"data:[^,;]*(;[^,;]*)*;base64,", re.IGNORECASE)
"""What stands before the base64 of a file in a data URI."""
BLANKS = re.compile(r"\s+")
"""What base64 may have in between, as MIME breaks it into lines."""
LOOK_IMAGES = 64
"""Encoded images that the profile decodes of a piece."""
KEPT_SHAPES = 100
"""Most frequent shapes that the profile keeps."""


class ImageInput(InputKind):
    """A column of images: encoded bytes (PNG, JPEG, WEBP, GIF, BMP or TIFF; the first frame, turned as its EXIF says) or nested numbers
    from 0 to 255."""

    holds = "pixels"
    marked = alone = together = False
    rich = nested = True
    unit = "brightness, 0 to 255"
    checks = ()
    countable = False

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

    def fit(
        self, seen: Moments, feature: Feature, features: Mapping[str, Feature], bounds: Mapping[str, Bound] = {}
    ) -> tuple[Feature, Statistics | None]:
        return feature, seen.statistics(self.normalize)

    def finish(self, table: pa.Table, feature: Feature) -> np.ndarray:
        """Pixels, uint8 (rows, height, width, channels)."""
        return array_of(table[feature.name], "uint8", feature.shape)

    @staticmethod
    def words(feature: Feature, table: pa.Table) -> list[np.ndarray]:
        return [array_of(table[feature.name], feature.stored, feature.shape)]

    @classmethod
    def profiled(cls, feature: Feature, table: pa.Table) -> dict[str, tuple[str, Any]]:
        return {feature.name: ("image", array_of(table[feature.name], "uint8", feature.shape))}

    @staticmethod
    def readable(feature: Feature, table: pa.Table) -> dict[str, Any]:
        images = array_of(table[feature.name], feature.stored, feature.shape)
        return {feature.name: pa.array([encode_png(image) for image in images], pa.binary())}

    @classmethod
    def encode(cls, feature: Feature, columns: RawColumns) -> np.ndarray:
        """Whole numbers in plain lists take one conversion for the whole batch; anything else is looked at row by row."""
        side_by_side(feature, columns)
        values = columns[feature.columns[0]]
        if not len(values):
            return no_rows(feature)
        if isinstance(values, np.ndarray):
            if values.dtype.kind != "O":
                return _of_array(feature, values)
            values = values.reshape(len(values)).tolist()
        for shape in _nestings(feature):
            try:
                numbers = _flat(values, shape)
                pixels = bytes(numbers)  # takes whole numbers from 0 to 255, and true and false
            except (TypeError, ValueError):
                continue
            if bool in set(map(type, numbers)):
                continue
            return np.frombuffer(pixels, np.uint8).reshape(-1, *feature.shape)
        return np.stack([_of_request(feature, value, index) for index, value in enumerate(values)])

    @classmethod
    def told(cls, feature: Feature) -> Sequence[str]:
        return (feature.name,)

    @classmethod
    def measured(cls, feature: Feature, values: np.ndarray) -> dict[str, np.ndarray]:
        return {feature.name: _brightness(values)}

    @staticmethod
    def sent(feature: Feature) -> tuple[str, tuple[int, ...]]:
        return feature.dtype, feature.shape

    @staticmethod
    def example(feature: Feature, place: int) -> Any:
        height, width, channels = (1, 1, feature.shape[2]) if feature.resize else feature.shape
        return {"b64": base64.b64encode(encode_png(np.zeros((height, width, channels), np.uint8))).decode()}

    @staticmethod
    def describe(feature: Feature) -> str:
        return " \N{MULTIPLICATION SIGN} ".join(map(str, feature.shape)) + f" {feature.dtype}"

    @classmethod
    def headings(cls, feature: Feature) -> Sequence[str]:
        return ()

    @staticmethod
    def widgets(feature: Feature) -> list[dict[str, Any]]:
        return [{"column": feature.columns[0], "widget": "image", "shape": feature.shape}]

    @staticmethod
    def recognises(values: Sequence[Any]) -> bool:
        return any(_looks_like_one(value) for value in values)

    @staticmethod
    def summary(column: Any, step: int, points: int) -> profile.Column:
        bright, shapes, missing, unreadable = _looked_at(column)
        found = profile.Column("image", kept=KEPT_SHAPES, rows=len(column), missing=missing + unreadable, unreadable=unreadable)
        return profile.measured(replace(found, seen=len(bright), counts=shapes, whole=False), bright, points)

    @staticmethod
    def typical(figures: Mapping[str, Any]) -> str:
        return f"{figures['frequent'][0][0]}, brightness {figures['mean']:.0f}" if figures["frequent"] else ""

    @staticmethod
    def sampled(column: Any) -> np.ndarray:
        """The brightness of pixels; encoded images are not decoded for it, they are missing."""
        pixels = _as_pixels(column)
        return np.full(len(column), np.nan) if pixels is None else _brightness(pixels)


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


def _nestings(feature: Feature) -> list[tuple[int, ...]]:
    """How a row's numbers may be nested: a grey image needs no lists of one."""
    return [feature.shape[:2], feature.shape] if feature.shape[2] == 1 else [feature.shape]


def _flat(values: Sequence[Any], shape: tuple[int, ...]) -> Sequence[Any]:
    """The numbers of nested lists that have exactly this shape. Raises TypeError or ValueError.

    numpy would make an array of strings as long as the longest one: a request of some megabytes could ask for terabytes.
    """
    for size in shape:
        if not set(map(type, values)) <= {list, tuple} or set(map(len, values)) != {size}:
            raise ValueError(f"lists of {size} are needed")
        values = list(chain.from_iterable(values))
    return values


def _of_array(feature: Feature, values: np.ndarray) -> np.ndarray:
    if values.shape[1:] not in _nestings(feature):
        raise DloptError(f"{feature.name}: shape {list(values.shape)} where {[len(values), *feature.shape]} is needed")
    if values.dtype != np.uint8:
        with np.errstate(invalid="ignore"):
            pixels = values.astype(np.uint8)
        if values.dtype.kind == "b" or (wrong := np.flatnonzero((pixels != values).reshape(len(values), -1).any(axis=1))).size:
            row = 0 if values.dtype.kind == "b" else wrong[0]
            raise DloptError(f"row {row}: {feature.name}: pixels must be whole numbers from 0 to 255")
        values = pixels
    return values.reshape(-1, *feature.shape)


def _of_request(feature: Feature, value: Any, index: int) -> np.ndarray:
    where = f"row {index}: {feature.name}"
    if isinstance(value, bytes):
        return _from_file(value, where, feature)
    if isinstance(value, Mapping):
        return _from_base64(value, where, feature)
    for shape in reversed(_nestings(feature)):  # the deepest first: it does not fit lists of numbers
        try:
            return _whole(_flat([value], shape), where).reshape(feature.shape)
        except ValueError:
            continue
    raise DloptError(f'{where}: give nested numbers of shape {list(feature.shape)} or {{"b64": "..."}}')


def _from_base64(value: Mapping[str, Any], where: str, feature: Feature) -> np.ndarray:
    if set(value) != {"b64"} or not isinstance(value["b64"], str):
        raise DloptError(f'{where}: give nested numbers or {{"b64": "..."}}')
    text = DATA_URI.sub("", value["b64"]) if value["b64"][:5].lower() == "data:" else value["b64"]
    try:
        data = base64.b64decode(BLANKS.sub("", text), validate=True)
    except ValueError:  # binascii.Error is one
        raise DloptError(f"{where}: b64 is not base64") from None
    return _from_file(data, where, feature)


def _from_file(data: bytes, where: str, feature: Feature) -> np.ndarray:
    height, width, channels = feature.shape
    limits = {"size": (height, width)} if feature.resize else {"only": (height, width)}
    try:
        return decode_image(data, channels, **limits, background=feature.background)
    except DloptError as error:
        raise DloptError(f"{where}: {error}") from None


def _whole(numbers: Sequence[Any], where: str) -> np.ndarray:
    if any(type(number) not in (int, float) or not 0 <= number <= 255 or number != int(number) for number in numbers):
        raise DloptError(f"{where}: pixels must be whole numbers from 0 to 255")
    return np.array(numbers, dtype=np.uint8)


def _looked_at(column: Any) -> tuple[np.ndarray, dict[str, int], int, int]:
    """Brightness of some images, how many have which shape (height, width, channels), and how many are missing or unreadable."""
    pixels = _as_pixels(column)
    if pixels is not None:
        some = pixels[:: max(1, math.ceil(pixels.nbytes / profile.LOOK_BYTES))]
        return _brightness(some), {_shape(pixels.shape[1:]): len(some)} if len(some) else {}, 0, 0
    found, shapes, unreadable = [], dict[str, int](), 0
    array = plain(column)
    for value in array[:: max(1, math.ceil(len(array) / LOOK_IMAGES))].to_pylist():
        if value is None:
            continue
        try:
            image = _any_image(value)
        except DloptError:
            unreadable += 1
            continue
        found.append(image.mean())
        shapes[_shape(image.shape)] = shapes.get(_shape(image.shape), 0) + 1
    return np.array(found, dtype=np.float64), shapes, array.null_count, unreadable


def _any_image(value: Any) -> np.ndarray:
    """An image as Hugging Face data sets keep it, encoded, or as nested numbers. Raises DloptError when it is none."""
    value = value["bytes"] if isinstance(value, dict) and "bytes" in value else value
    if isinstance(value, bytes):
        return decode_image(value)
    try:
        pixels = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise DloptError("no image") from None
    if pixels.ndim not in (2, 3):
        raise DloptError("no image")
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _as_pixels(column: Any) -> np.ndarray | None:
    """(rows, height, width, channels) of numpy arrays and of nested lists of one size; else None."""
    if isinstance(column, np.ndarray):
        return column
    array, shape, rows = plain(column), list[int](), len(column)
    while pa.types.is_fixed_size_list(array.type) and array.null_count == 0:
        shape.append(array.type.list_size)
        array = array.flatten()
    if len(shape) not in (2, 3) or array.null_count or not pa.types.is_integer(array.type):
        return None
    pixels = array.to_numpy().reshape(rows, *shape)
    return pixels if len(shape) == 3 else pixels[..., None]


def _brightness(pixels: np.ndarray) -> np.ndarray:
    return pixels.reshape(len(pixels), -1).mean(axis=1, dtype=np.float64) if len(pixels) else np.zeros(0)


def _looks_like_one(value: Any) -> bool:
    """Whether bytes can be decoded, by their header, or lists nest as pixels do."""
    if (encoded := _encoded(value)) is not None:
        try:
            return len(image_shape(encoded)) == 3
        except DloptError:
            return False
    try:
        numbers = np.asarray(value)
    except ValueError:  # lists of uneven lengths
        return False
    return isinstance(value, list) and numbers.ndim in (2, 3) and numbers.dtype.kind in "iuf"
