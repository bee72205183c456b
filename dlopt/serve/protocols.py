"""What clients say and hear: TensorFlow Serving's REST dialect, as pure functions from requests to rows and from
outputs to replies. A model name's status also carries the keys that KServe's v1 client reads.

| target | a row's prediction | the reply to columns |
|---|---|---|
| category | {"label": "b", "probabilities": [0.1, 0.9]} | {"label": [...], "probabilities": [...]} |
| multi_label | {"labels": ["a", "c"], "probabilities": [0.7, 0.2, 0.5]} | {"labels": [...], "probabilities": [...]} |
| number, one | 3.2 | [3.2, ...] |
| number, several | {"height": 3.2, "width": 1.0} | {"height": [...], "width": [...]} |

Probabilities stand in the order of the signature's labels; of multi_label each is of its own. A row gets the likeliest class, and the
labels with more than THRESHOLD; or, where the signature has thresholds, the positive class or the labels that reach theirs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic_core import from_json, to_json

from dlopt.part import Feature, Signature, Target

VERSION = "1"
"""A run's model never changes, so there is one version; the digest says which model it is."""
SIGNATURE_NAME = "serving_default"
MODEL_PATH = re.compile(r"/v1/models/(?P<name>[^/:]+)(?:/versions/(?P<version>[0-9]+))?(?P<rest>|:predict|/metadata)")
DTYPES = {"uint8": "DT_UINT8", "float32": "DT_FLOAT", "float64": "DT_DOUBLE", "int32": "DT_INT32", "string": "DT_STRING"}
THRESHOLD = 0.5
"""A row gets every label of a multi_label target without thresholds that is more probable, in the metrics as in the replies."""

Json = dict[str, Any]


class Refusal(Exception):
    """A request that gets an error as its reply."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


@dataclass(frozen=True)
class Request:
    """The rows of a predict request, and how its reply is to be laid out."""

    rows: Sequence[Any]
    by_column: bool
    """Whether it came as `inputs` (the reply is columns, too) and not as `instances`."""


def action(method: str, path: str, model: str) -> Literal["predict", "status", "metadata"]:
    """What a request to /v1/models/... asks for. Raises Refusal in TensorFlow Serving's words (a wrong verb is its 400)."""
    found = MODEL_PATH.fullmatch(path)
    wanted = {"": "GET", "/metadata": "GET", ":predict": "POST"}
    if not found or method != wanted[found["rest"]]:
        raise Refusal(400, f"Malformed request: {method} {path[:200]}")
    name, version = found["name"], found["version"]
    if name != model or version not in (None, VERSION):
        which = f"Latest({name[:100]})" if version is None else f"Specific({name[:100]}, {version[:20]})"
        raise Refusal(404, f"Servable not found for request: {which}")
    return "predict" if found["rest"] == ":predict" else "metadata" if found["rest"] else "status"


def parse(body: bytes, signature: Signature, max_rows: int) -> Request:
    """The rows of a predict request's body. Raises Refusal."""
    try:
        found = from_json(body)  # pydantic's parser takes half the time of json's, and refuses nesting bombs
    except ValueError as error:
        raise Refusal(400, f"JSON Parse error: {str(error)[:200]}") from None
    if not isinstance(found, dict):
        raise Refusal(400, "JSON Value: must be an object with the key 'instances' or 'inputs'")
    if not isinstance(name := found.get("signature_name", SIGNATURE_NAME), str):
        raise Refusal(400, "'signature_name' key must be a string value.")
    if name != SIGNATURE_NAME:
        raise Refusal(400, f"Serving signature name: {name[:100]!r} not found in signature def; there is {SIGNATURE_NAME!r}")
    if ("instances" in found) == ("inputs" in found):
        raise Refusal(400, "give exactly one of the keys 'instances' and 'inputs'")
    by_column = "inputs" in found
    rows = _rows_of(found["inputs"], signature) if by_column else found["instances"]
    if not isinstance(rows, list) or not rows:
        raise Refusal(400, f"{'inputs' if by_column else 'instances'}: must be a list with at least one row")
    if len(rows) > max_rows:
        raise Refusal(400, f"{len(rows)} rows in one request, at most {max_rows} are taken (serve.max_rows)")
    return Request(rows, by_column)


def _rows_of(inputs: Any, signature: Signature) -> Any:
    """Columns as rows: {"a": [1, 2], "b": [3, 4]} is [{"a": 1, "b": 3}, {"a": 2, "b": 4}]; a lone tensor's rows stand bare."""
    if not isinstance(inputs, Mapping):
        return inputs
    if len(signature.inputs) == 1 and set(inputs) == {signature.inputs[0].name}:
        return inputs[signature.inputs[0].name]
    lengths = {len(values) if isinstance(values, list) else None for values in inputs.values()}
    if len(lengths) != 1 or None in lengths:
        raise Refusal(400, "inputs: every column must be a list, all of the same length")
    return [dict(zip(inputs, values, strict=True)) for values in zip(*inputs.values(), strict=True)]


def decisions(target: Target, outputs: np.ndarray) -> list[list[int]]:
    """The labels that each row of outputs gets, by their indices: one of classes, any number of labels, and of numbers none."""
    least = np.array(target.thresholds, np.float32)
    if target.kind == "category" and target.thresholds:
        positive = target.positive_index
        return [[positive] if reached else [1 - positive] for reached in (outputs[:, positive] >= least).tolist()]
    if target.kind == "category":
        return [[best] for best in outputs.argmax(axis=1).tolist()]
    if target.kind == "multi_label":
        return [np.flatnonzero(row).tolist() for row in (outputs >= least if target.thresholds else outputs > THRESHOLD)]
    return [[] for _ in outputs]


def predictions(request: Request, target: Target, outputs: np.ndarray, decided: Sequence[Sequence[int]]) -> bytes:
    """The reply's body for outputs (rows, target.size) and what was decided on each row. Raises Refusal when they are not finite."""
    if not np.isfinite(outputs).all():
        raise Refusal(500, "the model's output is not finite for this input")
    columns = columns_of(target, outputs, decided)
    if request.by_column:
        return to_json({"outputs": next(iter(columns.values())) if len(columns) == 1 else columns})
    return to_json({"predictions": rows_of(columns)})


def rows_of(columns: Mapping[str, list[Any]]) -> list[Any]:
    """A row's prediction each, of columns; of a lone column the bare values."""
    if len(columns) == 1:
        return next(iter(columns.values()))
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def columns_of(target: Target, outputs: np.ndarray, decided: Sequence[Sequence[int]]) -> dict[str, list[Any]]:
    """What the reply says, a list over the rows for each name."""
    labels = target.labels
    if target.kind == "category":
        return {"label": [labels[best] for (best,) in decided], "probabilities": outputs.tolist()}
    if target.kind == "multi_label":
        return {"labels": [[labels[index] for index in row] for row in decided], "probabilities": outputs.tolist()}
    shortest = outputs.T.astype(str).astype(np.float64)  # 3.2 and not 3.200000047683716, which is the same float32
    return dict(zip(target.columns, shortest.tolist(), strict=True))


def status(model: str, digest: str) -> Json:
    """GET /v1/models/{name}: TensorFlow Serving's key, KServe's two, and which model it is."""
    one = {"version": VERSION, "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}
    return {"name": model, "ready": True, "model_version_status": [one], "digest": digest}


def metadata(model: str, digest: str, signature: Signature) -> Json:
    """GET /v1/models/{name}/metadata: TensorFlow Serving's, and the signature that the page draws its form from.

    Tokenizers are left out: they are large, and clients send text.
    """
    signature_def = {
        "inputs": {feature.name: _tensor_of(feature) for feature in signature.inputs},
        "outputs": _outputs_of(signature.target),
        "method_name": "tensorflow/serving/predict",
    }
    return {
        "model_spec": {"name": model, "signature_name": "", "version": VERSION},
        "metadata": {"signature_def": {"signature_def": {SIGNATURE_NAME: signature_def}}},
        "signature": signature.model_dump(mode="json", exclude={"inputs": {"__all__": {"tokenizer"}}}),
        "thresholds": _thresholds(signature.target),
        "digest": digest,
    }


def _thresholds(target: Target) -> list[float]:
    """From where on a label is given: for each of multi_label, for the positive class of two; none where the likeliest is given."""
    return list(target.thresholds) or [THRESHOLD] * (target.size if target.kind == "multi_label" else 0)


def _tensor_of(feature: Feature) -> Json:
    return _tensor(feature.name, DTYPES[feature.dtype], (-1,) if feature.kind == "text" else feature.shape)


def _outputs_of(target: Target) -> Json:
    """The tensors of a reply, by name. Labels of a row, of which there may be any number, are a dimension of -1."""
    if target.kind == "number":
        return {column: _tensor(column, "DT_DOUBLE" if target.offsets else "DT_FLOAT", ()) for column in target.columns}
    kind = "DT_STRING" if isinstance(target.labels[0], str) else "DT_INT64"
    label = _tensor("label", kind, ()) if target.kind == "category" else _tensor("labels", kind, (-1,))
    return {label["name"]: label, "probabilities": _tensor("probabilities", "DT_FLOAT", (target.size,))}


def _tensor(name: str, dtype: str, shape: Sequence[int]) -> Json:
    """A tensor in protobuf's JSON, where 64-bit integers are strings and -1 is any number of rows (or tokens, or labels)."""
    dimensions = [{"size": str(size), "name": ""} for size in (-1, *shape)]
    return {"name": name, "dtype": dtype, "tensor_shape": {"dim": dimensions, "unknown_rank": False}}
