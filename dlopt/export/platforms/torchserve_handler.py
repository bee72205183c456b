"""What TorchServe calls. Its text is written into archives, after that of the estimators, and so imports nothing else of dlopt."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from dlopt.export.estimator import Classifier, Estimator, Regressor

LOADED: dict[str, Estimator] = {}
"""The model of a folder, in a worker of the server."""


def handle(data: list[Mapping[str, Any]] | None, context: Any) -> list[Any] | None:
    """Answers to requests, one each; None of data is only to load the model."""
    folder = context.system_properties["model_dir"]
    if folder not in LOADED:
        LOADED[folder] = loaded(folder)
    if data is None:
        return None
    bodies = [request.get("body", request.get("data")) for request in data]
    answers: list[Any] = []
    for place, body in enumerate(bodies):
        try:
            answers.append({"predictions": predictions(LOADED[folder], rows_of(body))})
        except ValueError as error:
            context.set_response_status(code=400, idx=place)
            answers.append({"error": str(error)})
    return answers


def rows_of(body: Any) -> list[Any]:
    """The rows of a request. Raises ValueError."""
    found = json.loads(bytes(body)) if isinstance(body, (bytes, bytearray)) else json.loads(body) if isinstance(body, str) else body
    rows = found["instances"] if isinstance(found, Mapping) and "instances" in found else found
    rows = rows if isinstance(rows, list) else [rows]
    if not rows or not all(isinstance(row, Mapping) for row in rows):
        raise ValueError('send {"instances": [row, ...]}, each row an object of columns')
    return rows


def predictions(model: Estimator, rows: list[Any]) -> list[Any]:
    """Of each row: its label and probabilities, or its numbers."""
    outputs = model.outputs(rows)
    if not isinstance(model, Classifier):
        return [row[0] if len(row) == 1 else row for row in outputs.tolist()]
    named = [str(label) for label in model.classes_]
    decided = model.decided(outputs).tolist()
    chances = [dict(zip(named, row, strict=True)) for row in outputs.tolist()]
    labels = [one if not isinstance(one, list) else [named[place] for place, yes in enumerate(one) if yes] for one in decided]
    return [{"label": label, "probabilities": row} for label, row in zip(labels, chances, strict=True)]


class _Scripted:
    """Computes by TorchScript, which takes codes of categories, in the order of the signature."""

    inputs_: list[dict[str, Any]]
    module: Any

    def compute(self, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
        import torch

        given = [torch.from_numpy(np.ascontiguousarray(codes_of(feature, tensors[feature["name"]]))) for feature in self.inputs_]
        with torch.no_grad():
            return np.asarray(self.module(*given).numpy())


def codes_of(feature: Mapping[str, Any], values: np.ndarray) -> np.ndarray:
    """Strings as their places in the vocabularies, from 1 on; "" as what is missing, and 0 for what is in none."""
    if values.dtype != object:
        return values
    codes = np.zeros(values.shape, np.int32)
    for column, (known, missing) in enumerate(zip(feature["vocabularies"], feature["missing"], strict=True)):
        table = {text: code for code, text in enumerate(known, start=1)} | {"": missing}
        codes[:, column] = [table.get(text, 0) for text in values[:, column]]
    return codes


class ScriptedClassifier(_Scripted, Classifier):
    """Of classes or labels."""


class ScriptedRegressor(_Scripted, Regressor):
    """Of numbers."""


def loaded(folder: str) -> Any:
    """The model of an unpacked archive."""
    import torch

    with open(os.path.join(folder, "signature.json"), encoding="utf-8") as file:  # noqa: PTH118
        signature = file.read()
    kind = ScriptedRegressor if json.loads(signature)["target"]["kind"] == "number" else ScriptedClassifier
    model = kind(b"", signature, " ")
    model.module = torch.jit.load(os.path.join(folder, "model.torchscript.pt"), map_location="cpu").eval()  # noqa: PTH118
    return model
