"""What a job says of its input and target columns, and how raw columns become the tensors of the signature.

Encoding is vectorized where the raw type allows it; a row that cannot be encoded gets a reason instead of stopping the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from typing import Annotated, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, field_validator

from dlopt.data.encode import MODES, decode_image
from dlopt.part import DloptError, Feature, Part

Normalization = Literal["min_max", "standard", "none"]

NORMALIZATIONS: dict[str, Callable[..., tuple[np.ndarray, np.ndarray]]] = {
    "none": lambda min, max, mean, std: (np.zeros_like(min), np.ones_like(min)),
    "min_max": lambda min, max, mean, std: (min, 1 / _nonzero(max - min)),
    "standard": lambda min, max, mean, std: (mean, 1 / _nonzero(std)),
}
"""name: statistics of the training split to (shift, scale); the model computes (x - shift) * scale."""

MISSING = ("", "NA", "N/A", "n/a", "#N/A", "NaN", "nan", "NULL", "null", "None")
"""How a text file says that a number is missing."""
TRUTH = {"true": 1, "false": 0}

Encoded = tuple[np.ndarray, dict[int, str]]
"""Values of shape (rows, *feature.shape), and the reason why for every row that could not be encoded."""


class ImageInput(Part):
    """A column of images: encoded bytes (PNG, JPEG, ...) or nested numbers from 0 to 255."""

    kind: Literal["image"] = "image"
    column: str = "image"
    """The column; also the name of the model's input."""
    size: tuple[int, int] | None = None
    """Height and width to resize to; without it all images must have the size of the first one."""
    normalize: Normalization = "min_max"
    """How the model scales pixels: min_max to [0, 1] over the training split, standard to mean 0 and deviation 1 per channel."""

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,)

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

    def encode(self, table: pa.Table, feature: Feature) -> Encoded:
        column = table[self.column].combine_chunks()
        whole = _nested_pixels(column)
        if whole is not None and whole.shape[1:] == feature.shape and self.size is None:
            return whole, {}
        values = np.zeros((len(column), *feature.shape), dtype=np.uint8)
        reasons: dict[int, str] = {}
        for row, value in enumerate(column.to_pylist()):
            try:
                pixels = _pixels(value, feature.shape[2], self.size)
                if pixels.shape != feature.shape:
                    raise DloptError(f"image of {_shape(pixels.shape)} where {_shape(feature.shape)} is needed (or set size)")
                values[row] = pixels
            except DloptError as error:
                reasons[row] = str(error)
        return values, reasons


class NumberInput(Part):
    """Columns of numbers, put together as one input of the model."""

    kind: Literal["number"] = "number"
    columns: tuple[str, ...] = Field(min_length=1)
    """The columns."""
    name: str = "numbers"
    """The name of the model's input."""
    fill: Literal["mean", "zero"] = "mean"
    """What the model puts in place of a missing value: the mean over the training split, or 0."""
    normalize: Normalization = "standard"
    """How the model scales each column, by statistics of the training split."""

    @field_validator("columns")
    @classmethod
    def columns_differ(cls, columns: tuple[str, ...]) -> tuple[str, ...]:
        twice = [column for column in columns if columns.count(column) > 1]
        if twice:
            raise ValueError(f"column {twice[0]!r} is named twice")
        return columns

    def feature(self, table: pa.Table) -> Feature:
        return Feature(name=self.name, kind="number", dtype="float32", shape=(len(self.columns),), columns=self.columns)

    def encode(self, table: pa.Table, feature: Feature) -> Encoded:
        values = np.empty((len(table), len(self.columns)), dtype=np.float32)
        reasons: dict[int, str] = {}
        for index, name in enumerate(self.columns):
            values[:, index], wrong = _floats(table[name])
            reasons.update({row: f"{name}: {why}" for row, why in wrong.items() if row not in reasons})
        return values, reasons


Input = Annotated[ImageInput | NumberInput, Field(discriminator="kind")]


class CategoryTarget(Part):
    """A column of classes: whole numbers or strings."""

    kind: Literal["category"] = "category"
    column: str = "label"
    """The column."""

    def whole(self, table: pa.Table) -> bool:
        """Whether the classes are whole numbers, true and false being 1 and 0, or else strings, from the first rows. Raises DloptError."""
        kind = _plain(table[self.column]).type
        if _is_text(kind) or pa.types.is_null(kind):
            return False
        if pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
            return True
        raise DloptError(f"data.target.column: {self.column!r} is {kind}; classes must be whole numbers or strings")

    def encode(self, table: pa.Table, whole: bool) -> tuple[pa.Array, dict[int, str]]:
        """The labels as int64 or string, null where there is none, and the reason for each of those rows."""
        classes = _plain(table[self.column]).dictionary_encode()  # so that each class is looked at once
        names = [*classes.dictionary.to_pylist(), None]
        codes = classes.indices.fill_null(len(names) - 1)
        there = [not (name is None or name == "" or name != name) for name in names]
        values = [(_whole_number(name) if whole else str(name)) if is_there else None for name, is_there in zip(names, there, strict=True)]
        labels = pa.array(values, pa.int64() if whole else pa.string()).take(codes)
        why = [f"{names[code]!r:.40} is not a whole number" if there[code] else "no label" for code in range(len(names))]
        wrong = np.flatnonzero(labels.is_null().to_numpy(zero_copy_only=False)).tolist()
        return labels, {row: f"{self.column}: {why[codes[row].as_py()]}" for row in wrong}


def _nonzero(spread: np.ndarray) -> np.ndarray:
    """A column that never varies is divided by 1."""
    return np.where(spread > 0, spread, 1.0)


def _plain(column: pa.ChunkedArray) -> pa.Array:
    """One array without a dictionary."""
    array = column.combine_chunks()
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _whole_number(value: object) -> int | None:
    """7, 7.0, True and their spellings in a text file; None for anything else, and for more than 64 bits."""
    try:
        number = Decimal(str(TRUTH.get(str(value).lower(), value)))
        return int(number) if number == number.to_integral_value() and abs(number) < 2**63 else None
    except ArithmeticError:
        return None


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


def _floats(column: pa.ChunkedArray) -> tuple[np.ndarray, dict[int, str]]:
    """Values as float32, which is what the model sees, with NaN where missing; and the reason for each row that is no number."""
    array = _plain(column)
    if _is_text(array.type):
        array = pc.if_else(pc.is_in(array, pa.array(MISSING, array.type)), None, array)
    try:
        values, reasons = array.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False), dict[int, str]()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        values, reasons = _floats_by_row(array)
    with np.errstate(over="ignore"):
        values = values.astype(np.float32)
    infinite = np.isinf(values)
    return np.where(infinite, np.float32(np.nan), values), reasons | {int(row): "a number is too large" for row in np.flatnonzero(infinite)}


def _floats_by_row(column: pa.Array) -> tuple[np.ndarray, dict[int, str]]:
    values, reasons = np.full(len(column), np.nan), {}
    for row, value in enumerate(column.to_pylist()):
        if value is None:
            continue
        try:
            values[row] = float(TRUTH.get(str(value).lower(), value))
        except OverflowError:
            values[row] = np.inf
        except (TypeError, ValueError):
            reasons[row] = f"{value!r:.40} is not a number"
    return values, reasons


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(str(size) for size in shape)
