"""Rows of any kind to what a model says of them, by onnxruntime and as the server says it. Imports neither torch nor Ray."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import numpy as np
import pyarrow as pa

from dlopt.artifact import Artifact
from dlopt.client.values import plain_row, plain_value
from dlopt.data.kinds import encode_rows
from dlopt.data.sources.memory import table_of
from dlopt.data.types.values import doubles
from dlopt.part import DloptError, Signature
from dlopt.serve.exchange import Answer, decisions
from dlopt.serve.models.model import Predictor

ROWS = 2048
"""Rows that are decoded at a time."""


class Model:
    """An exported model in this process."""

    def __init__(self, content: bytes, signature: Signature) -> None:
        threads = max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
        self.run = Predictor(content, signature, threads, ROWS)

    @classmethod
    def load(cls, export: Artifact) -> Self:
        """From an export artifact, its files checked against their seal. Raises DloptError."""
        return cls(export.read("model.onnx"), Signature.model_validate_json(export.read("signature.json")))

    @property
    def signature(self) -> Signature:
        """Its inputs and outputs."""
        return self.run.signature

    def outputs(self, data: Any) -> np.ndarray:
        """Probabilities of classes or labels, or numbers, (rows, outputs). Raises DloptError naming the row and the column."""
        rows = rows_of(data, self.signature)
        if not len(rows):
            return np.zeros((0, self.signature.target.size), np.float32)
        found = []
        for start in range(0, len(rows), ROWS):
            try:
                found.append(self.run(encode_rows(self.signature, rows[start : start + ROWS])))
            except DloptError as error:
                raise DloptError(f"predict: {_counted(str(error), start)}") from None
        return np.concatenate(found)

    def __call__(self, data: Any) -> Any:
        """A DataFrame for a DataFrame (pandas or polars, with pandas' index) and a Table for a Table, with a column for what is
        predicted and one for each probability; for rows, images and arrays a list, as the server's predictions are."""
        outputs, target = self.outputs(data), self.signature.target
        decided = decisions(target, outputs)
        shape = _frame_of(data)
        if shape is None:
            return _by_row(Answer(target, outputs, decided).columns())
        labels, numbers = target.labels, outputs.T
        if target.kind == "number":
            return shape(dict(zip(target.columns, numbers, strict=True)))
        chances = {f"probability.{label}": numbers[place] for place, label in enumerate(labels)}
        if target.kind == "multi_label":
            return shape({"labels": [[labels[index] for index in row] for row in decided], **chances})
        best = [index for (index,) in decided]
        return shape({"label": [labels[index] for index in best], "probability": outputs[np.arange(len(best)), best], **chances})


def _by_row(columns: dict[str, list[Any]]) -> list[Any]:
    """A row's prediction each; of a lone number the bare values."""
    if len(columns) == 1:
        return next(iter(columns.values()))
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _counted(said: str, start: int) -> str:
    """A message that begins with the row of a piece, with the row of the whole."""
    row, colon, rest = said.removeprefix("row ").partition(":")
    return f"row {int(row) + start}:{rest}" if said.startswith("row ") and colon and row.isdecimal() else said


def _frame_of(data: Any) -> Callable[[dict[str, Any]], Any] | None:
    """What makes a table like the one that was given out of columns; None where it was none."""
    module = type(data).__module__.partition(".")[0]
    if module == "pandas" and hasattr(data, "index"):
        import pandas

        return lambda columns: pandas.DataFrame(columns, index=data.index)
    if module == "polars":
        import polars

        return polars.DataFrame
    return pa.table if isinstance(data, pa.Table) else None


def rows_of(data: Any, signature: Signature) -> Sequence[Any]:
    """What `encode_rows` takes, of a DataFrame, a Table, a dict of arrays, a list of rows or images, or an array. Raises DloptError."""
    if isinstance(data, (str, bytes)) or (isinstance(data, Mapping) and data and not _is_columns(data)):
        raise DloptError("predict: give a list of rows, even for a single one: predict([row])")
    if isinstance(data, np.ndarray):
        return list(data.tolist())
    if isinstance(data, Sequence):
        return [plain_row(row) for row in data]
    table = table_of(data)
    known = [column for feature in signature.inputs for column in feature.columns]
    for column in known:
        if column not in table.column_names:
            raise DloptError(f"predict: there is no column {column!r}; the model takes {', '.join(known)}")
    columns = {column: _values(feature.kind, column, table[column]) for feature in signature.inputs for column in feature.columns}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _is_columns(data: Mapping[Any, Any]) -> bool:
    return all(isinstance(values, (list, tuple)) or (hasattr(values, "__array__") and np.ndim(values)) for values in data.values())


def _values(kind: str, name: str, column: pa.ChunkedArray) -> list[Any]:
    """The values of a column of a table as a request would have them."""
    if kind == "number":
        numbers, wrong = doubles(column)
        if wrong:
            raise DloptError(f"predict: row {min(wrong)}: {name}: {column[min(wrong)].as_py()!r:.40} is not a number")
        return list(numbers.tolist())
    return [plain_value(value) for value in column.to_pylist()]
