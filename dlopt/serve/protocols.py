"""What clients say and hear: TensorFlow Serving's REST dialect, as pure functions from requests to rows and from
probabilities to replies. A model name's status also carries the keys that KServe's v1 client reads."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic_core import from_json, to_json

from dlopt.part import Feature, Signature

VERSION = "1"
"""A run's model never changes, so there is one version; the digest says which model it is."""
SIGNATURE_NAME = "serving_default"
MODEL_PATH = re.compile(r"/v1/models/(?P<name>[^/:]+)(?:/versions/(?P<version>[0-9]+))?(?P<rest>|:predict|/metadata)")
DTYPES = {"uint8": "DT_UINT8", "float32": "DT_FLOAT"}

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


def predictions(request: Request, probabilities: np.ndarray, best: Sequence[int], labels: Sequence[int | str]) -> bytes:
    """The reply's body for probabilities (rows, classes) and the best class of each row. Raises Refusal when they are not finite."""
    if not np.isfinite(probabilities).all():
        raise Refusal(500, "the model's output is not finite for this input")
    given = [labels[index] for index in best]
    values = probabilities.tolist()
    reply: Json
    if request.by_column:
        reply = {"outputs": {"label": given, "probabilities": values}}
    else:
        reply = {"predictions": [{"label": label, "probabilities": row} for label, row in zip(given, values, strict=True)]}
    return to_json(reply)


def status(model: str, digest: str) -> Json:
    """GET /v1/models/{name}: TensorFlow Serving's key, KServe's two, and which model it is."""
    one = {"version": VERSION, "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}
    return {"name": model, "ready": True, "model_version_status": [one], "digest": digest}


def metadata(model: str, digest: str, signature: Signature) -> Json:
    """GET /v1/models/{name}/metadata: TensorFlow Serving's, and the signature that the page draws its form from."""
    outputs = {
        "label": _tensor("label", _label_type(signature), []),
        "probabilities": _tensor("probabilities", "DT_FLOAT", [signature.num_outputs]),
    }
    signature_def = {
        "inputs": {feature.name: _tensor_of(feature) for feature in signature.inputs},
        "outputs": outputs,
        "method_name": "tensorflow/serving/predict",
    }
    return {
        "model_spec": {"name": model, "signature_name": "", "version": VERSION},
        "metadata": {"signature_def": {"signature_def": {SIGNATURE_NAME: signature_def}}},
        "signature": signature.model_dump(mode="json"),
        "digest": digest,
    }


def _tensor_of(feature: Feature) -> Json:
    return _tensor(feature.name, DTYPES[feature.dtype], feature.shape)


def _label_type(signature: Signature) -> str:
    return "DT_STRING" if isinstance(signature.target.labels[0], str) else "DT_INT64"


def _tensor(name: str, dtype: str, shape: Sequence[int]) -> Json:
    """A tensor in protobuf's JSON, where 64-bit integers are strings and -1 is any number of rows."""
    dimensions = [{"size": str(size), "name": ""} for size in (-1, *shape)]
    return {"name": name, "dtype": dtype, "tensor_shape": {"dim": dimensions, "unknown_rank": False}}
