"""The Open Inference Protocol v2 over REST, as KServe and Triton speak it: JSON, and tensors in binary after it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from pydantic_core import from_json, to_json

from dlopt.part import Signature
from dlopt.serve.exchange import Answer, Call, Column, Handler, Json, Refusal, Reply, Request, inputs_of, json_reply, product_version
from dlopt.serve.models.model import Model
from dlopt.serve.models.registry import Models
from dlopt.serve.protocols.inference.tensors import (
    DATATYPES,
    NUMPY,
    Binary,
    Output,
    Wanted,
    asked_for,
    outputs_of,
    request_of,
    tensor_of,
    tensors_of,
    text_of,
    written,
)

NAME = "v2"
OPEN: tuple[str, ...] = ("/v2/health/live", "/v2/health/ready")
EXTENSIONS = ("binary_tensor_data", "model_configuration", "model_repository")
PLATFORM = "onnx_onnxv1"
HEADER = b"inference-header-content-length"
MODEL_PATH = re.compile(r"/v2/models/(?P<name>[^/]+)(?:/versions/(?P<version>[0-9]+))?(?P<verb>|/ready|/infer|/config)")
REPOSITORY_PATH = re.compile(r"/v2/repository/models/(?P<name>[^/]+)/(?P<verb>load|unload)")


def route(method: str, path: str) -> Handler | None:
    """What answers a request to /v2... Raises Refusal."""
    if path != "/v2" and not path.startswith("/v2/"):
        return None
    path = path.rstrip("/")
    if plain := PLAIN_PATHS.get(path):
        return _only(method, plain[0], plain[1])
    if found := REPOSITORY_PATH.fullmatch(path):
        name, load = found["name"], found["verb"] == "load"

        async def change(call: Call) -> Reply:
            return await _load(call, name) if load else await _unload(call, name)

        return _only(method, "POST", change)
    found = MODEL_PATH.fullmatch(path)
    if not found:
        raise Refusal(404, f"Not found: {path[:200]}")
    name, version, verb = found["name"], found["version"], found["verb"]
    handler, counted = VERBS[verb], verb == "/infer"

    async def answer(call: Call) -> Reply:
        call.counted = counted
        return await handler(call, call.find(name, version))

    return _only(method, "POST" if verb == "/infer" else "GET", answer)


def _only(method: str, wanted: str, handler: Handler) -> Handler:
    if method != wanted:
        raise Refusal(405, f"Method not allowed: {method[:20]}; use {wanted}")
    return handler


async def _server(call: Call) -> Reply:
    return json_reply({"name": "dlopt", "version": product_version(), "extensions": EXTENSIONS})


async def _live(call: Call) -> Reply:
    return json_reply({"live": True})


async def _ready(call: Call) -> Reply:
    await call.check_ready()
    return json_reply({"live": True, "ready": True})


async def _names(call: Call) -> Reply:
    return json_reply({"models": call.models.names()})


async def _index(call: Call) -> Reply:
    body = await call.read()
    ready_only = bool(_object(body).get("ready")) if body.strip() else False
    return json_reply(index_of(call.models, ready_only))


def index_of(models: Models, ready_only: bool) -> list[dict[str, str]]:
    """What could be served, and what of it is."""
    loaded = [{"name": model.name, "version": model.version, "state": "READY", "reason": ""} for model in models]
    away = [{"name": name, "state": "UNAVAILABLE", "reason": "unloaded"} for name in models.unloaded() if not ready_only]
    return [*loaded, *away]


async def _load(call: Call, name: str) -> Reply:
    call.needs_admin()
    await call.models.load(name, call.who)
    return Reply(200, b"")


async def _unload(call: Call, name: str) -> Reply:
    call.needs_admin()
    await call.models.unload(name, call.who)
    return Reply(200, b"")


PLAIN_PATHS: dict[str, tuple[str, Handler]] = {
    "/v2": ("GET", _server),
    "/v2/health/live": ("GET", _live),
    "/v2/health/ready": ("GET", _ready),
    "/v2/models": ("GET", _names),
    "/v2/repository/index": ("POST", _index),
}


async def _metadata(call: Call, model: Model) -> Reply:
    return json_reply(
        {
            "name": model.name,
            "versions": [one.version for one in call.models.versions(model.name)],
            "platform": PLATFORM,
            "inputs": [tensor_of(column) for column in inputs_of(model.signature)],
            "outputs": [tensor_of(column) for column in outputs_of(model.signature)],
            "parameters": {"digest": model.digest, "labels": list(model.signature.target.labels)},
        }
    )


async def _model_ready(call: Call, model: Model) -> Reply:
    await model.check_ready()
    return json_reply({"name": model.name, "ready": True})


async def _config(call: Call, model: Model) -> Reply:
    """As Triton's clients read it."""
    return json_reply(
        {
            "name": model.name,
            "platform": "onnxruntime_onnx",
            "backend": "onnxruntime",
            "version_policy": {"specific": {"versions": [int(model.version)]}},
            "max_batch_size": model.section.max_rows,
            "input": [_config_of(column) for column in inputs_of(model.signature)],
            "output": [_config_of(column) for column in outputs_of(model.signature)],
        }
    )


async def _infer(call: Call, model: Model) -> Reply:
    body = await call.read()
    length = _header_length(call, body)
    if length is None and (call.content_type == "application/octet-stream"):
        raise Refusal(400, "Inference-Header-Content-Length: is needed with binary tensors")

    def parse(body: bytes, signature: Signature) -> tuple[Request, Wanted]:
        return _raw(body, signature) if length == 0 else parsed(body, len(body) if length is None else length, model)

    images = body.count(b"BYTES") * model.section.max_rows
    answer, wanted = await call.models.predict(call, model, body, parse, images)
    return reply_of(answer, call.model or model, wanted)


VERBS: dict[str, Callable[[Call, Model], Any]] = {"": _metadata, "/ready": _model_ready, "/infer": _infer, "/config": _config}


def _header_length(call: Call, body: bytes) -> int | None:
    """How many bytes of the body are JSON; None for all."""
    text = call.headers.get(HEADER)
    if text is None:
        return None
    if not text.isdigit() or len(text) > 12 or int(text) > len(body):
        raise Refusal(400, f"Inference-Header-Content-Length: unexpected size for request JSON, expecting at most {len(body)} bytes")
    return int(text)


def _object(content: bytes) -> Json:
    try:
        found = from_json(content)
    except ValueError as error:
        raise Refusal(400, f"failed to parse the request JSON buffer: {str(error)[:200]}") from None
    if not isinstance(found, dict):
        raise Refusal(400, "the request must be a JSON object")
    return found


def parsed(body: bytes, length: int, model: Model) -> tuple[Request, Wanted]:
    """A request whose JSON is so many bytes long. Raises Refusal."""
    found = _object(body if length == len(body) else body[:length])
    return request_of(found, Binary(body, length), model), asked_for(found, model)


def _raw(body: bytes, signature: Signature) -> tuple[Request, Wanted]:
    """The whole body is one row of the only input."""
    columns = inputs_of(signature)
    if len(columns) != 1:
        raise Refusal(400, f"raw binary request: the model has {len(columns)} inputs: send JSON and binary tensors")
    (column,) = columns
    if column.dtype == "string":
        return Request({column.name: [text_of(body, column.name)]}, 1), Wanted(None, None, True)
    kind, size = np.dtype(NUMPY[DATATYPES[column.dtype]]), math.prod(column.shape)
    if len(body) != size * kind.itemsize:
        raise Refusal(400, f"raw binary request: unexpected size for input '{column.name}', expecting {size * kind.itemsize} bytes")
    return Request({column.name: np.frombuffer(body, kind).reshape(1, *column.shape)}, 1), Wanted(None, None, True)


def reply_of(answer: Answer, model: Model, wanted: Wanted) -> Reply:
    """An answer as JSON, and tensors in binary after it where they are asked for so."""
    arrays = tensors_of(answer)
    columns = {column.name: column for column in outputs_of(model.signature)}
    asked = wanted.outputs if wanted.outputs is not None else [Output(name, wanted.binary) for name in columns]
    tensors = [written(columns[name], arrays[name], binary) for name, binary in asked]
    head: Json = {"model_name": model.name, "model_version": model.version}
    if wanted.id is not None:
        head["id"] = wanted.id
    content = to_json(head | {"outputs": [tensor.head for tensor in tensors]})
    if not any(binary for _, binary in asked):
        return Reply(200, content)
    parts = b"".join([content, *(tensor.content for tensor in tensors)])
    return Reply(200, parts, "application/octet-stream", ((HEADER, str(len(content)).encode()),))


def _config_of(column: Column) -> Json:
    kind = DATATYPES[column.dtype]
    return {"name": column.name, "data_type": f"TYPE_{'STRING' if kind == 'BYTES' else kind}", "dims": list(column.shape) or [1]}


def describe(model: Model) -> Json:
    """The paths of a model in OpenAPI."""
    base = f"/v2/models/{model.name}"
    shape = {"type": "array", "items": {"type": "integer"}}
    properties = {"name": {"type": "string"}, "shape": shape, "datatype": {"type": "string"}}
    tensor = {"type": "object", "required": ["name", "shape", "datatype"], "properties": properties}
    tensors = {"type": "array", "items": tensor}
    body = {"type": "object", "required": ["inputs"], "properties": {"id": {"type": "string"}, "inputs": tensors, "outputs": {}}}
    example = {"inputs": [tensor_of(column) | {"shape": [1, *column.shape]} for column in inputs_of(model.signature)]}
    content = {"application/json": {"schema": body, "example": example}, "application/octet-stream": {"schema": {"format": "binary"}}}
    reply = {"type": "object", "properties": {"model_name": {"type": "string"}, "outputs": tensors}}

    def operation(summary: str, reply: Json) -> Json:
        found = {"description": "OK", "content": {"application/json": {"schema": reply}}}
        error = {"$ref": "#/components/responses/Error"}
        return {"summary": summary, "tags": ["Open Inference Protocol v2"], "responses": {"200": found, "default": error}}

    return {
        f"{base}/infer": {"post": operation("Infer", reply) | {"requestBody": {"required": True, "content": content}}},
        base: {"get": operation("Inputs and outputs", {"type": "object"})},
        f"{base}/ready": {"get": operation("Readiness of the model", {"type": "object"})},
    }
