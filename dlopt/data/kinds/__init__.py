"""Kinds of inputs and targets. A kind is one file here, which holds all that is special about it (see `base.InputKind`), and its name in
the union; the rest of dlopt asks `kinds[feature.kind]`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, get_args

import numpy as np
from pydantic import Field

from dlopt.data.kinds.base import InputKind, RawColumns
from dlopt.data.kinds.category import CategoryInput
from dlopt.data.kinds.date import DateInput
from dlopt.data.kinds.image import ImageInput
from dlopt.data.kinds.number import NumberInput
from dlopt.data.kinds.targets import AnyTarget, CategoryTarget, LabelLists, MultiLabelTarget, NumberTarget, ThresholdTarget
from dlopt.data.kinds.text import TextInput
from dlopt.data.kinds.vector import VectorInput
from dlopt.part import DloptError, Signature

Input = Annotated[NumberInput | CategoryInput | DateInput | TextInput | ImageInput | VectorInput, Field(discriminator="kind")]


class Kinds(dict[str, type[InputKind]]):
    """name to kind."""

    def __missing__(self, name: str) -> type[InputKind]:
        raise DloptError(
            f"signature.json: this dlopt knows no input of kind {name!r}, only {', '.join(self)}: it was made by another version"
        )


kinds = Kinds({part.model_fields["kind"].default: part for part in get_args(get_args(Input)[0])})
"""Of inputs."""
column_kinds = Kinds({**kinds, "multi_label": LabelLists})
"""And what else a column of the profile can be."""


def encode_rows(signature: Signature, rows: Sequence[Any]) -> dict[str, np.ndarray]:
    """Raw rows as a client sends them, as the tensors that the model takes: {name: (rows, *shape)}.

    A row is an object of columns; when the model has one input tensor, its bare value is a row as well. An image is nested
    numbers 0-255 of shape (height, width) or (height, width, channels), or {"b64": base64 of an encoded image}. A number, a date
    (ISO 8601), a category (a string, a number, true or false), a text and a vector (a list of numbers) may be null (missing). Strings
    come back as an array of objects. Raises DloptError naming the row and the column.
    """
    return encode_columns(signature, columns_of(signature, rows))


def columns_of(signature: Signature, rows: Sequence[Any]) -> RawColumns:
    """Rows as `encode_rows` takes them, by column. Raises DloptError."""
    alone, first = len(signature.inputs) == 1, signature.inputs[0]
    if alone and len(first.columns) > 1 and rows and not isinstance(rows[0], Mapping):
        return {first.name: rows}
    bare = alone and len(first.columns) == 1
    names = dict.fromkeys(name for feature in signature.inputs for name in feature.columns)
    return {name: [_value(row, name, index, bare) for index, row in enumerate(rows)] for name in names}


def encode_columns(signature: Signature, columns: RawColumns) -> dict[str, np.ndarray]:
    """Raw values by column, all of the same length, as the tensors that the model takes. Values are those of `encode_rows`, lists of one
    of them, or arrays of such; an image may be the bytes of a file. Raises DloptError naming the row and the column."""
    return {feature.name: kinds[feature.kind].encode(feature, columns) for feature in signature.inputs}


def _value(row: Any, column: str, index: int, bare: bool) -> Any:
    if isinstance(row, Mapping) and not (bare and set(row) == {"b64"}):
        if column not in row:
            raise DloptError(f"row {index}: has no column {column!r}")
        return row[column]
    if not bare:
        raise DloptError(f"row {index}: must be an object of columns")
    return row


__all__ = [
    "AnyTarget",
    "CategoryInput",
    "CategoryTarget",
    "DateInput",
    "ImageInput",
    "Input",
    "InputKind",
    "MultiLabelTarget",
    "NumberInput",
    "NumberTarget",
    "RawColumns",
    "TextInput",
    "ThresholdTarget",
    "VectorInput",
    "column_kinds",
    "columns_of",
    "encode_columns",
    "encode_rows",
    "kinds",
]
