"""The Open Inference Protocol v2 over gRPC: the same requests, limits, keys and counts as over HTTP, on a port of its own.

A key is sent as metadata, `authorization: Bearer KEY` or `x-api-key: KEY`. Errors are gRPC's codes with the words that HTTP has for them.
"""

from __future__ import annotations

import logging
import struct
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from dlopt.part import DloptError, Signature
from dlopt.serve.exchange import Call, Refusal, Request, inputs_of, product_version
from dlopt.serve.models.model import Model
from dlopt.serve.protocols.inference import rest
from dlopt.serve.protocols.inference.messages import SERVICE, messages
from dlopt.serve.protocols.inference.tensors import Binary, Wanted, asked_for, outputs_of, request_of, tensor_of, tensors_of, written

if TYPE_CHECKING:
    from dlopt.serve.front.application import Application

NAME = "grpc"
OPEN = ("ServerLive", "ServerReady")
CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
}
"""What HTTP's statuses are called; all others are INTERNAL."""
CONTENTS = {
    "BOOL": "bool_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    "INT64": "int64_contents",
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
"""Where a tensor's values are that do not come as raw bytes."""
logger = logging.getLogger(__name__)
Method = Callable[[Call, Any], Awaitable[Any]]


def server_of(application: Application, host: str, port: int, credentials: grpc.ServerCredentials | None = None) -> grpc.aio.Server:
    """A server that is yet to be started. Raises DloptError when the port is in use."""
    most = application.section.max_bytes
    options = [("grpc.max_receive_message_length", most), ("grpc.max_send_message_length", -1), ("grpc.so_reuseport", 0)]
    server = grpc.aio.server(options=options, maximum_concurrent_rpcs=None)
    found = messages()
    handlers = {
        name: grpc.unary_unary_rpc_method_handler(
            _handler(application, name, method, found[f"{name}Request"].FromString),
            response_serializer=found[f"{name}Response"].SerializeToString,
        )
        for name, method in METHODS.items()
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    where = f"{f'[{host}]' if ':' in host else host}:{port}"
    try:
        bound = server.add_secure_port(where, credentials) if credentials else server.add_insecure_port(where)
    except RuntimeError:
        bound = 0
    if not bound:
        raise DloptError(f"--grpc-port: {port} is in use: stop what listens there or give another")
    return server


def credentials_of(certificate: Path, key: Path) -> grpc.ServerCredentials:
    """For TLS."""
    return grpc.ssl_server_credentials([(key.read_bytes(), certificate.read_bytes())])


def _handler(
    application: Application, name: str, method: Method, read: Callable[[bytes], Any]
) -> Callable[[bytes, grpc.aio.ServicerContext], Awaitable[Any]]:
    """A method with the guard before it, and its errors and counts after it."""

    async def handle(request: bytes, context: grpc.aio.ServicerContext) -> Any:
        start = time.perf_counter()
        headers = {
            key.encode(): value if isinstance(value, bytes) else value.encode() for key, value in context.invocation_metadata() or ()
        }
        call = application.call(name, f"/{SERVICE}/{name}", b"", headers, _no_body)
        call.counted = name == "ModelInfer"
        status, said = 499, "the client has gone"
        application.in_flight += 1
        try:
            if name not in OPEN:
                application.let_in(call)
            reply = await method(call, read(request))
            status = 200
            return reply
        except Refusal as refusal:
            application.counts.rejected.labels(refusal.reason).inc()
            status, said = refusal.status, refusal.message
        except DecodeError:
            application.counts.rejected.labels("request").inc()
            status, said = 400, f"the message is no {name}Request"
        except DloptError as error:
            application.counts.rejected.labels("request").inc()
            status, said = 400, str(error)
        except Exception:
            logger.exception("the request %s failed", call.id.decode())
            status, said = 500, "internal error; the server's log has the cause"
        finally:
            application.in_flight -= 1
            application.count(call, NAME, status, start)
            application.note(call, NAME, status, start, 0)
        await context.abort(CODES.get(status, grpc.StatusCode.INTERNAL), said)

    return handle


async def _no_body(call: Call) -> bytes:
    return b""


async def _live(call: Call, request: Any) -> Any:
    return messages()["ServerLiveResponse"](live=True)


async def _ready(call: Call, request: Any) -> Any:
    try:
        await call.check_ready()
    except Refusal:
        return messages()["ServerReadyResponse"](ready=False)
    return messages()["ServerReadyResponse"](ready=True)


async def _model_ready(call: Call, request: Any) -> Any:
    try:
        await _model(call, request.name, request.version).check_ready()
    except Refusal as refusal:
        if refusal.status == 404:
            return messages()["ModelReadyResponse"](ready=False)
        raise
    return messages()["ModelReadyResponse"](ready=True)


async def _server_metadata(call: Call, request: Any) -> Any:
    return messages()["ServerMetadataResponse"](name="dlopt", version=product_version(), extensions=rest.EXTENSIONS)


async def _metadata(call: Call, request: Any) -> Any:
    model = _model(call, request.name, request.version)
    return messages()["ModelMetadataResponse"](
        name=model.name,
        versions=[one.version for one in call.models.versions(model.name)],
        platform=rest.PLATFORM,
        inputs=[tensor_of(column) for column in inputs_of(model.signature)],
        outputs=[tensor_of(column) for column in outputs_of(model.signature)],
    )


async def _infer(call: Call, request: Any) -> Any:
    model = _model(call, request.model_name, request.model_version)
    body = b"".join(request.raw_input_contents)
    inputs = _inputs(request)
    found = {"inputs": [given for given, _ in inputs], "parameters": _parameters(request.parameters)}
    found["outputs"] = [{"name": one.name, "parameters": _parameters(one.parameters)} for one in request.outputs]
    body = body or b"".join(content for _, content in inputs)

    def parse(body: bytes, signature: Signature) -> tuple[Request, Wanted]:
        return request_of(found, Binary(body, 0), model), asked_for(found, model)

    images = sum(1 for one in request.inputs if one.datatype == "BYTES") * model.section.max_rows
    answer, wanted = await call.models.predict(call, model, body, parse, images)
    model = call.model or model
    reply = messages()["ModelInferResponse"](model_name=model.name, model_version=model.version, id=request.id)
    arrays, columns = tensors_of(answer), {column.name: column for column in outputs_of(model.signature)}
    for name in [one.name for one in wanted.outputs] if wanted.outputs is not None else columns:
        tensor = written(columns[name], arrays[name], binary=True)
        reply.outputs.add(name=name, datatype=tensor.head["datatype"], shape=tensor.head["shape"])
        reply.raw_output_contents.append(tensor.content)
    return reply


def _inputs(request: Any) -> list[tuple[dict[str, Any], bytes]]:
    """Each input as REST's binary extension has it, and its bytes. Raises Refusal."""
    raw = list(request.raw_input_contents)
    if raw and len(raw) != len(request.inputs):
        raise Refusal(400, f"raw_input_contents: {len(raw)} where there are {len(request.inputs)} inputs")
    found = []
    for place, one in enumerate(request.inputs):
        given: dict[str, Any] = {"name": one.name, "shape": list(one.shape), "datatype": one.datatype}
        there = one.HasField("contents")
        if raw and there:
            raise Refusal(400, f"input '{one.name}': has contents and raw_input_contents: give one")
        if not raw and one.datatype != "BYTES":
            field = CONTENTS.get(one.datatype)
            given["data"] = list(getattr(one.contents, field)) if field else []
            if field is None and there:
                raise Refusal(400, f"input '{one.name}': {one.datatype[:20]!r} has no contents: send raw_input_contents")
            found.append((given, b""))
            continue
        content = raw[place] if raw else b"".join(struct.pack("<I", len(one)) + one for one in one.contents.bytes_contents)
        found.append((given | {"parameters": {"binary_data_size": len(content)}}, content))
    return found


def _parameters(given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: getattr(value, kind) for name, value in given.items() if (kind := value.WhichOneof("parameter_choice"))}


async def _index(call: Call, request: Any) -> Any:
    return messages()["RepositoryIndexResponse"](models=rest.index_of(call.models, bool(request.ready)))


async def _load(call: Call, request: Any) -> Any:
    call.needs_admin()
    await call.models.load(request.model_name, call.who)
    return messages()["RepositoryModelLoadResponse"]()


async def _unload(call: Call, request: Any) -> Any:
    call.needs_admin()
    await call.models.unload(request.model_name, call.who)
    return messages()["RepositoryModelUnloadResponse"]()


METHODS: dict[str, Method] = {
    "ServerLive": _live,
    "ServerReady": _ready,
    "ModelReady": _model_ready,
    "ServerMetadata": _server_metadata,
    "ModelMetadata": _metadata,
    "ModelInfer": _infer,
    "RepositoryIndex": _index,
    "RepositoryModelLoad": _load,
    "RepositoryModelUnload": _unload,
}


def _model(call: Call, name: str, version: str) -> Model:
    if version and not version.isdigit():
        raise Refusal(404, f"Servable not found for request: Specific({name[:100]}, {version[:20]})", "model")
    return call.find(name, version or None)
