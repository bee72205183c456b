"""Tensors of the Open Inference Protocol as columns of a request, and an answer's columns as tensors.

A model's inputs are the columns of a raw row: numbers, strings, and images as tensors or, of type BYTES, as files. An input of several
columns may come whole by its own name, (rows, columns). Outputs are `label` and `probabilities`; of several labels `labels`, true for each
that a row got; of numbers one for each column.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from dlopt.data.kinds import RawColumns
from dlopt.part import Signature
from dlopt.serve.exchange import Answer, Column, Json, Refusal, Request, inputs_of
from dlopt.serve.exchange import outputs_of as columns_of
from dlopt.serve.models.model import Model

NUMPY = {
    "BOOL": "?",
    **{f"UINT{bits}": f"<u{bits // 8}" for bits in (8, 16, 32, 64)},
    **{f"INT{bits}": f"<i{bits // 8}" for bits in (8, 16, 32, 64)},
    **{f"FP{bits}": f"<f{bits // 8}" for bits in (16, 32, 64)},
}
"""Types of tensors, and numpy's names of them; BYTES are elements of any length."""
DATATYPES = {"uint8": "UINT8", "float32": "FP32", "float64": "FP64", "int64": "INT64", "string": "BYTES", "bool": "BOOL"}
PLAIN: dict[str, set[type]] = {"BOOL": {bool}, "FP32": {int, float, type(None)}, "FP64": {int, float, type(None)}, "BYTES": {str}}
"""What JSON may hold of a type; of the rest whole numbers."""
MOST_DIMENSIONS = 8
LARGEST = 2**31


class Output(NamedTuple):
    """One output that a request asks for."""

    name: str
    binary: bool


class Wanted(NamedTuple):
    """What a request says of its reply: all outputs where it names none."""

    id: str | None
    outputs: tuple[Output, ...] | None
    binary: bool


def request_of(found: Json, reader: Binary, model: Model) -> Request:
    """What a request asks, of its JSON and of the tensors that came in binary. Raises Refusal."""
    inputs = found.get("inputs")
    if not isinstance(inputs, list) or not inputs:
        raise Refusal(400, "inputs: must be a list of at least one tensor")
    signature = model.signature
    known = {column.name: column for column in inputs_of(signature)} | {
        feature.name: None for feature in signature.inputs if feature.name not in feature.columns
    }
    columns: dict[str, Any] = {}
    rows = None
    for given in inputs:
        name, shape = _named(given, known, model.name)
        if name in columns:
            raise Refusal(400, f"input '{name}' is given twice")
        if rows not in (None, shape[0]):
            raise Refusal(400, f"input '{name}': shape {shape} where the tensors before have {rows} rows")
        rows = shape[0]
        if rows > model.section.max_rows:
            raise Refusal(400, f"{rows} rows in one request, at most {model.section.max_rows} are taken (serve.max_rows)")
        columns[name] = _values(given, name, shape, reader, known[name])
    reader.check_end()
    if not rows:
        raise Refusal(400, "inputs: must have at least one row")
    return Request(_checked(columns, signature, model.name), rows)


def _checked(columns: RawColumns, signature: Signature, model: str) -> RawColumns:
    whole = {feature.name for feature in signature.inputs if feature.name in columns and feature.name not in feature.columns}
    for feature in signature.inputs:
        lost = [name for name in feature.columns if name not in columns]
        if lost and feature.name not in whole:
            raise Refusal(400, f"expected input '{lost[0]}' of model '{model}', got {', '.join(map(repr, columns))}"[:300])
    return columns


def _named(given: Any, known: dict[str, Any], model: str) -> tuple[str, list[int]]:
    """Name and shape of an input."""
    if not isinstance(given, dict) or not isinstance(name := given.get("name"), str):
        raise Refusal(400, "inputs: each must be an object with name, shape, datatype and data")
    if name not in known:
        raise Refusal(400, f"unexpected inference input '{name[:100]}' for model '{model}'; there are {', '.join(known)}"[:400])
    shape = given.get("shape")
    if not isinstance(shape, list) or not 0 < len(shape) <= MOST_DIMENSIONS or not all(type(size) is int and size >= 0 for size in shape):
        raise Refusal(400, f"input '{name}': shape must be a list of 1 to {MOST_DIMENSIONS} whole numbers, 0 or more")
    if math.prod(size or 1 for size in shape) > LARGEST:
        raise Refusal(400, f"input '{name}': a shape of more than {LARGEST:,} elements")
    return name, shape


class Binary:
    """The tensors after a request's JSON, one after another."""

    def __init__(self, body: bytes, start: int) -> None:
        self.body, self.at = memoryview(body), start

    def take(self, size: Any, name: str) -> memoryview:
        """The next so many bytes. Raises Refusal."""
        if type(size) is not int or size < 0 or size > len(self.body) - self.at:
            raise Refusal(400, f"unexpected size for input '{name}': {len(self.body) - self.at} bytes are left")
        part = self.body[self.at : self.at + size]
        self.at += size
        return part

    def check_end(self) -> None:
        """Raises Refusal when there is more."""
        if self.at != len(self.body):
            raise Refusal(400, f"unexpected additional input data: {len(self.body) - self.at} bytes")


def _values(given: Json, name: str, shape: Sequence[int], reader: Binary, column: Column | None) -> Sequence[Any] | np.ndarray:
    """An input's values, as its kind of column takes them."""
    kind, parameters = given.get("datatype"), given.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise Refusal(400, f"input '{name}': parameters must be an object")
    if not isinstance(kind, str) or (kind not in NUMPY and kind != "BYTES"):
        raise Refusal(400, f"input '{name}': datatype {str(kind)[:20]!r} is none of {', '.join([*NUMPY, 'BYTES'])}")
    size, count = parameters.get("binary_data_size"), math.prod(shape)
    image = column is not None and column.is_image
    if size is not None:
        if "data" in given:
            raise Refusal(400, f"input '{name}': has data and binary_data_size: give one")
        content = reader.take(size, name)
        values = _elements(content, count, name) if kind == "BYTES" else _numbers(content, kind, count, name)
    else:
        values = _from_list(given.get("data"), kind, shape, count, name)
    if kind == "BYTES":
        if image:
            return [_file(value, name) for value in values]
        texts = [value if isinstance(value, str) else text_of(value, name) for value in values]
        return np.array(texts, dtype=object).reshape(shape) if len(shape) > 1 else texts
    return np.asarray(values).reshape(shape)


def _numbers(content: memoryview, kind: str, count: int, name: str) -> np.ndarray:
    dtype = np.dtype(NUMPY[kind])
    if len(content) != count * dtype.itemsize:
        raise Refusal(400, f"unexpected size for input '{name}', expecting {count * dtype.itemsize} bytes, got {len(content)}")
    return np.frombuffer(content, np.uint8).view(bool) if kind == "BOOL" else np.frombuffer(content, dtype)


def _elements(content: memoryview, count: int, name: str) -> list[bytes]:
    """Of BYTES: each has its length before it."""
    found: list[bytes] = []
    at = 0
    while at < len(content) and len(found) < count:
        if at + 4 > len(content):
            break
        (size,) = struct.unpack_from("<I", content, at)
        at += 4 + size
        if at > len(content):
            break
        found.append(bytes(content[at - size : at]))
    if at != len(content) or len(found) != count:
        raise Refusal(400, f"unexpected size for input '{name}', expecting {count} elements with their lengths before them")
    return found


def _from_list(data: Any, kind: str, shape: Sequence[int], count: int, name: str) -> Any:
    """Flat or nested JSON, row by row."""
    if kind == "FP16":
        raise Refusal(400, f"input '{name}': FP16 does not travel as JSON: send it in binary")
    if not isinstance(data, list):
        raise Refusal(400, f"input '{name}': data must be a list")
    flat = _flat(data, shape)
    if flat is None or len(flat) != count:
        raise Refusal(400, f"input '{name}': data must have {count} elements, flat or nested as shape {list(shape)} says")
    if not set(map(type, flat)) <= PLAIN.get(kind, {int}):
        raise Refusal(400, f"input '{name}': data must all be of type {kind}")
    if kind == "BYTES":
        return flat
    try:
        return np.array(flat, dtype=NUMPY[kind])
    except (OverflowError, ValueError):
        raise Refusal(400, f"input '{name}': a number does not fit {kind}") from None


def _flat(data: list[Any], shape: Sequence[int]) -> list[Any] | None:
    """None where lists are nested otherwise. numpy would make an array of strings as long as the longest one."""
    if not data or not isinstance(data[0], list):
        return data
    for size in shape[1:]:
        if set(map(type, data)) != {list} or set(map(len, data)) != {size}:
            return None
        data = list(chain.from_iterable(data))
    return data


def text_of(content: bytes, name: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise Refusal(400, f"input '{name}': a text is not UTF-8") from None


def _file(value: Any, name: str) -> Any:
    """An image's file: in JSON as base64."""
    return value if isinstance(value, bytes) else {"b64": value}


def asked_for(found: Json, model: Model) -> Wanted:
    """What the request says of its reply. Raises Refusal."""
    given, parameters, outputs = found.get("id"), found.get("parameters") or {}, found.get("outputs")
    if given is not None and not isinstance(given, str):
        raise Refusal(400, "id: must be a string")
    if not isinstance(parameters, dict) or not isinstance(binary := parameters.get("binary_data_output", False), bool):
        raise Refusal(400, "parameters: must be an object, and its binary_data_output true or false")
    if not outputs and outputs in (None, []):
        return Wanted(given, None, binary)
    if not isinstance(outputs, list) or not all(isinstance(one, dict) and isinstance(one.get("name"), str) for one in outputs):
        raise Refusal(400, "outputs: must be a list of objects with a name")
    known = [column.name for column in outputs_of(model.signature)]
    asked = []
    for one in outputs:
        settings = one.get("parameters") or {}
        if one["name"] not in known:
            raise Refusal(400, f"unexpected inference output '{one['name'][:100]}' for model '{model.name}'; there are {', '.join(known)}")
        if not isinstance(settings, dict) or not isinstance(its := settings.get("binary_data", binary), bool):
            raise Refusal(400, f"output '{one['name']}': parameters must be an object, and its binary_data true or false")
        if settings.get("classification"):
            raise Refusal(400, f"output '{one['name']}': classification is not offered: ask for 'label' or 'probabilities'")
        asked.append(Output(one["name"], its))
    return Wanted(given, tuple(asked), binary)


def outputs_of(signature: Signature) -> list[Column]:
    """The tensors of an answer: labels of a row, of which there may be any number, are true or false each."""
    target = signature.target
    return [Column("labels", "labels", "bool", (target.size,)) if column.kind == "labels" else column for column in columns_of(target)]


def tensors_of(answer: Answer) -> dict[str, np.ndarray]:
    """An answer's outputs as arrays."""
    target, outputs = answer.target, answer.outputs
    if target.kind == "number":
        return {column: outputs[:, place] for place, column in enumerate(target.columns)}
    if target.kind == "category":
        labels = np.array(target.labels, dtype=object if isinstance(target.labels[0], str) else np.int64)
        return {"label": labels[[best for (best,) in answer.decided]], "probabilities": outputs}
    given = np.zeros(outputs.shape, bool)
    for row, places in enumerate(answer.decided):
        given[row, places] = True
    return {"labels": given, "probabilities": outputs}


@dataclass(frozen=True)
class Tensor:
    """An output on its way: its JSON, and its bytes where they come after."""

    head: Json
    content: bytes = b""


def written(column: Column, values: np.ndarray, binary: bool) -> Tensor:
    """An output as it goes out."""
    kind = DATATYPES[column.dtype]
    head = {"name": column.name, "shape": list(values.shape), "datatype": kind}
    if not binary:
        return Tensor(head | {"data": values.reshape(-1).tolist()})
    if kind == "BYTES":
        encoded = [text.encode() for text in values.reshape(-1).tolist()]
        content = b"".join(part for one in encoded for part in (struct.pack("<I", len(one)), one))
    else:
        content = np.ascontiguousarray(values, NUMPY[kind]).tobytes()
    return Tensor(head | {"parameters": {"binary_data_size": len(content)}}, content)


def tensor_of(column: Column) -> Json:
    """A column in a model's metadata."""
    return {"name": column.name, "datatype": DATATYPES[column.dtype], "shape": [-1, *column.shape]}
