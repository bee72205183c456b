"""TensorFlow Serving's REST dialect. A model name's status also carries the keys that KServe's v1 client reads.

| target | a row's prediction | the reply to columns |
|---|---|---|
| category | {"label": "b", "probabilities": [0.1, 0.9]} | {"label": [...], "probabilities": [...]} |
| multi_label | {"labels": ["a", "c"], "probabilities": [0.7, 0.2, 0.5]} | {"labels": [...], "probabilities": [...]} |
| number, one | 3.2 | [3.2, ...] |
| number, several | {"height": 3.2, "width": 1.0} | {"height": [...], "width": [...]} |

Probabilities stand in the order of the signature's labels; of multi_label each is of its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

import numpy as np
from pydantic_core import from_json, to_json

from dlopt.data.kinds import columns_of, kinds
from dlopt.part import Feature, Signature, Target
from dlopt.serve.exchange import (
    Answer,
    Call,
    Column,
    Handler,
    Json,
    Refusal,
    Reply,
    Request,
    form_of,
    inputs_of,
    json_reply,
    outputs_of,
    thresholds_of,
)
from dlopt.serve.models.model import Model
from dlopt.serve.protocols import files
from dlopt.serve.protocols.example import example_row

NAME = "tensorflow"
OPEN: tuple[str, ...] = ()
SIGNATURE_NAME = "serving_default"
MODEL_PATH = re.compile(
    r"/v1/models/(?P<name>[^/:]+)(?:/versions/(?P<version>[0-9]+)|/labels/(?P<label>[A-Za-z0-9_]+))?(?P<verb>|:[a-z]+|/metadata)"
)
DTYPES = {"uint8": "DT_UINT8", "float32": "DT_FLOAT", "float64": "DT_DOUBLE", "int64": "DT_INT64", "string": "DT_STRING"}
Parsed = tuple[Request, bool]
"""A request, and whether it came by column, as its reply is to be laid out then."""


def route(method: str, path: str) -> Handler | None:
    """What answers a request to /v1/models... Raises Refusal in TensorFlow Serving's words (a wrong verb is its 400)."""
    if path == "/v1/models" and method == "GET":
        return _names
    if path != "/v1/models" and not path.startswith("/v1/models/"):
        return None
    found = MODEL_PATH.fullmatch(path)
    handler = VERBS.get((method, found["verb"])) if found else None
    if not found or not handler:
        raise Refusal(400, f"Malformed request: {method} {path[:200]}")
    name, version, label, counted = found["name"], found["version"], found["label"], found["verb"] in PREDICTING

    async def answer(call: Call) -> Reply:
        call.counted = counted
        return await handler(call, call.find(name, version, label))

    return answer


async def _names(call: Call) -> Reply:
    return json_reply({"models": call.models.names()})


async def _status(call: Call, model: Model) -> Reply:
    """TensorFlow Serving's key, KServe's two, and which model it is."""
    which = [model] if "/versions/" in call.path or "/labels/" in call.path else call.models.versions(model.name)
    states = [{"version": one.version, "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}} for one in which]
    return json_reply({"name": model.name, "ready": True, "model_version_status": states, "digest": model.digest})


async def _metadata(call: Call, model: Model) -> Reply:
    """TensorFlow Serving's, and the signature that the page draws its form from.

    Tokenizers are left out: they are large, and clients send text.
    """
    signature, target = model.signature, model.signature.target
    signature_def = {
        "inputs": {column.name: _tensor(column) for column in inputs_of(signature)},
        "outputs": {column.name: _tensor(column) for column in outputs_of(target)},
        "method_name": "tensorflow/serving/predict",
    }
    return json_reply(
        {
            "model_spec": {"name": model.name, "signature_name": "", "version": model.version},
            "metadata": {"signature_def": {"signature_def": {SIGNATURE_NAME: signature_def}}},
            "signature": signature.model_dump(mode="json", exclude={"inputs": {"__all__": {"tokenizer"}}}),
            "form": form_of(signature),
            "thresholds": thresholds_of(target),
            "digest": model.digest,
        }
    )


def _tensor(column: Column) -> Json:
    """A tensor in protobuf's JSON, where 64-bit integers are strings and -1 is any number of rows (or labels)."""
    dimensions = [{"size": str(size), "name": ""} for size in (-1, *column.shape)]
    return {"name": column.name, "dtype": DTYPES[column.dtype], "tensor_shape": {"dim": dimensions, "unknown_rank": False}}


async def _predict(call: Call, model: Model) -> Reply:
    body = await call.read()
    if parser := files.parser_of(call.content_type):
        answer, _ = await call.models.predict(call, model, body, parser, files.most_images(call.content_type))
        return Reply(200, predictions(answer, by_column=False))
    answer, by_column = await call.models.predict(call, model, body, parse, _images_in(body))
    return Reply(200, predictions(answer, by_column))


async def _classify(call: Call, model: Model) -> Reply:
    target = model.signature.target
    if target.kind == "number":
        raise Refusal(400, "classify: the model predicts numbers: use :predict or :regress")
    body = await call.read()
    answer, _ = await call.models.predict(call, model, body, parse_examples, _images_in(body))
    rows = [[[str(label), score] for label, score in zip(answer.target.labels, row, strict=True)] for row in answer.outputs.tolist()]
    return _results(rows)


async def _regress(call: Call, model: Model) -> Reply:
    target = model.signature.target
    if target.kind != "number" or len(target.columns) != 1:
        raise Refusal(400, "regress: the model does not predict one number: use :predict")
    body = await call.read()
    answer, _ = await call.models.predict(call, model, body, parse_examples, _images_in(body))
    return _results(answer.columns()[target.columns[0]])


def _results(rows: list[Any]) -> Reply:
    return Reply(200, to_json({"result": rows, "results": rows}))  # its documentation has the one, what it says has the other


PREDICTING = {":predict": _predict, ":classify": _classify, ":regress": _regress}
VERBS: dict[tuple[str, str], Callable[[Call, Model], Any]] = {
    ("GET", ""): _status,
    ("GET", "/metadata"): _metadata,
    **{("POST", verb): handler for verb, handler in PREDICTING.items()},
}


def _images_in(body: bytes) -> int:
    """How many encoded images a body may hold at most."""
    if b"b64" not in body and b"\\" not in body:
        return 0
    return body.count(b"b64") + body.count(b"\\")  # an escape may stand for any letter of b64


def parse(body: bytes, signature: Signature) -> Parsed:
    """A predict request's body. Raises Refusal or DloptError."""
    found = _object(body)
    if ("instances" in found) == ("inputs" in found):
        raise Refusal(400, "give exactly one of the keys 'instances' and 'inputs'")
    if "inputs" in found:
        return _by_column(found["inputs"], signature), True
    rows = found["instances"]
    if not isinstance(rows, list) or not rows:
        raise Refusal(400, "instances: must be a list with at least one row")
    first = signature.inputs[0]
    if kinds[first.kind].holds == "pixels" and len(signature.inputs) == 1 and (pixels := _dense(rows, first, body)) is not None:
        return Request({first.columns[0]: pixels}, len(rows)), False
    return Request(columns_of(signature, rows), len(rows)), False


def _dense(rows: list[Any], feature: Feature, body: bytes) -> np.ndarray | None:
    """Images of whole numbers in plain lists, as most clients send them, in one conversion; None where anything is else, which is then
    looked at value by value."""
    for size in feature.shape[:2] if feature.shape[2] == 1 else feature.shape:
        try:
            if set(map(len, rows)) != {size}:
                return None
        except TypeError:
            return None
        rows = list(chain.from_iterable(rows))
    try:
        pixels = bytes(rows)  # takes whole numbers from 0 to 255, and true and false
    except (TypeError, ValueError):
        return None
    if b"true" in body or b"false" in body:
        return None
    return np.frombuffer(pixels, np.uint8).reshape(-1, *feature.shape)


def parse_examples(body: bytes, signature: Signature) -> tuple[Request, None]:
    """A classify or regress request's body, whose context stands for what an example does not say. Raises Refusal or DloptError."""
    found = _object(body)
    examples, context = found.get("examples"), found.get("context", {})
    if not isinstance(examples, list) or not examples or not all(isinstance(one, dict) for one in examples):
        raise Refusal(400, "examples: must be a list of at least one object of columns")
    if not isinstance(context, dict):
        raise Refusal(400, "context: must be an object of columns")
    return Request(columns_of(signature, [context | example for example in examples]), len(examples)), None


def _object(body: bytes) -> Json:
    """A body's JSON, its signature name checked."""
    try:
        found = from_json(body)  # pydantic's parser takes half the time of json's, and refuses nesting bombs
    except ValueError as error:
        raise Refusal(400, f"JSON Parse error: {str(error)[:200]}") from None
    if not isinstance(found, dict):
        raise Refusal(400, "JSON Value: must be an object with the key 'instances' or 'inputs'")
    name = found.get("signature_name", "")
    if not isinstance(name, str):
        raise Refusal(400, "'signature_name' key must be a string value.")
    if name not in ("", SIGNATURE_NAME):
        raise Refusal(400, f"Serving signature name: {name[:100]!r} not found in signature def; there is {SIGNATURE_NAME!r}")
    return found


def _by_column(inputs: Any, signature: Signature) -> Request:
    """Columns, or the rows of a lone input, bare or by its name."""
    if isinstance(inputs, Mapping):
        lengths = {len(values) if isinstance(values, list) else None for values in inputs.values()}
        if len(lengths) != 1 or None in lengths:
            raise Refusal(400, "inputs: every column must be a list, all of the same length")
        rows = lengths.pop() or 0
    else:
        rows = len(inputs) if isinstance(inputs, list) else 0
    if not rows:
        raise Refusal(400, "inputs: must be a list with at least one row")
    return Request(inputs if isinstance(inputs, Mapping) else columns_of(signature, inputs), rows)


def predictions(answer: Answer, by_column: bool) -> bytes:
    """The body of a reply."""
    columns = answer.columns()
    if len(columns) == 1:
        (found,) = columns.values()
    elif by_column:
        return to_json({"outputs": columns})
    else:
        found = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return to_json({"outputs" if by_column else "predictions": found})


def describe(model: Model) -> Json:
    """The paths of a model in OpenAPI."""
    base = f"/v1/models/{model.name}"
    row = {"type": "object", "properties": {column.name: _schema(column) for column in inputs_of(model.signature)}}
    rows = {"type": "array", "minItems": 1, "maxItems": model.section.max_rows, "items": row if len(row["properties"]) > 1 else {}}
    body = {
        "type": "object",
        "description": "Exactly one of `instances` (rows) and `inputs` (columns).",
        "properties": {"signature_name": {"type": "string"}, "instances": rows, "inputs": {"type": ["object", "array"]}},
    }
    content: Json = {"application/json": {"schema": body, "example": {"instances": [example_row(model.signature)]}}}
    content |= {kind: {"schema": {"type": "string", "format": "binary"}} for kind in files.types_of(model.signature)}
    reply = {"type": "object", "properties": {"predictions": {"type": "array"}, "outputs": {}}}
    target: Target = model.signature.target
    return {
        f"{base}:predict": {"post": _operation(f"Predict {target.name}", content, reply)},
        base: {"get": _operation("Status", None, {"type": "object"})},
        f"{base}/metadata": {"get": _operation("What the model takes and gives", None, {"type": "object"})},
    }


def _schema(column: Column) -> Json:
    kinds = {"image": ["array", "object"], "number": ["number", "string", "null"], "category": ["string", "number", "boolean", "null"]}
    return {"type": kinds.get(column.kind, ["string", "null"])}


def _operation(summary: str, content: Json | None, reply: Json) -> Json:
    found: Json = {"summary": summary, "tags": ["TensorFlow Serving"], "responses": {"200": _json_of(reply), "default": ERROR}}
    return found | ({"requestBody": {"required": True, "content": content}} if content else {})


def _json_of(schema: Json) -> Json:
    return {"description": "OK", "content": {"application/json": {"schema": schema}}}


ERROR: Json = {"$ref": "#/components/responses/Error"}
