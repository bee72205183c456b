"""One replica: a model in onnxruntime behind a plain ASGI app. Imports neither torch nor Ray: it starts fast and stays small,
and runs under any ASGI server as it does under Ray Serve."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime

from dlopt.artifact import Artifact
from dlopt.data.kinds import encode_rows
from dlopt.data.kinds.pixels import MOST_PIXELS
from dlopt.part import DloptError, Feature, Signature
from dlopt.serve import Serve, metrics, protocols
from dlopt.serve.auth import Guard, Headers, token_of
from dlopt.serve.protocols import Refusal

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Tensors = dict[str, np.ndarray]

INLINE_SECONDS = 0.001
"""A run that is expected to be shorter happens on the event loop: a thread would cost more than it frees."""
LARGE = 256 * 1024
"""Bodies from here on are decoded in a thread, so that other requests go on meanwhile."""
INLINE_PIXELS = 2**14
"""And so are bodies whose images may have more pixels than this together, about a millisecond's work."""
DECODERS = 2
"""Threads for this, or as many as the model has: one large image does not hold up all others, and few are in memory at a time."""
FLUSH_SECONDS = 0.1
FRESH_SECONDS, ANSWER_SECONDS = 1.0, 5.0
"""Whoever asks for readiness has the model asked, at most once in so many seconds; and how long the model may take to answer."""
PAGE_HEADERS = (
    (b"cache-control", b"no-store"),
    (b"content-security-policy", b"default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
)
logger = logging.getLogger(__name__)


class Predictor:
    """Tensors to outputs, `max_batch` rows at a time, so that a large request needs no more memory than a small one."""

    def __init__(self, content: bytes, signature: Signature, threads: int = 1, max_batch: int = 64) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # spinning threads starve the other replicas
        self.session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        self.signature, self.max_batch = signature, max_batch
        self.output = [signature.target.output]
        self.blank = {feature.name: _blank(feature) for feature in signature.inputs}
        """A row that every model takes, to see whether it answers."""
        self(self.blank)

    @classmethod
    def load(cls, export: Artifact, section: Serve) -> Predictor:
        """From an export artifact, its files checked against their seal. Raises DloptError."""
        signature = Signature.model_validate_json(export.read("signature.json"))
        return cls(export.read("model.onnx"), signature, section.threads, section.max_batch)

    def __call__(self, tensors: Tensors) -> np.ndarray:
        """Outputs (rows, target.size) of encoded rows: probabilities, or numbers."""
        rows = _rows(tensors)
        if rows <= self.max_batch:
            return self.session.run(self.output, tensors)[0]
        starts = range(0, rows, self.max_batch)
        parts = ({name: values[start : start + self.max_batch] for name, values in tensors.items()} for start in starts)
        return np.concatenate([self.session.run(self.output, part)[0] for part in parts])


class Waiting(NamedTuple):
    """A request that waits for the model."""

    tensors: Tensors
    rows: int
    answer: asyncio.Future[np.ndarray]


class Batcher:
    """Runs the model for many requests: a fast one at once; a slow one in a thread, where all that arrives during a run makes up the
    next batch. So batches grow with the load, and no request ever waits for a batch to fill."""

    def __init__(self, run: Callable[[Tensors], np.ndarray], max_batch: int, observe: Callable[[int, float], None]) -> None:
        self.run, self.max_batch, self.observe = run, max_batch, observe
        self.waiting: deque[Waiting] = deque()
        self.worker: asyncio.Task[None] | None = None
        self.seconds_per_row = 0.0

    async def __call__(self, tensors: Tensors) -> np.ndarray:
        rows = _rows(tensors)
        if self.worker is None and rows * self.seconds_per_row < INLINE_SECONDS:
            return self._timed(tensors)
        answer = asyncio.get_running_loop().create_future()
        self.waiting.append(Waiting(tensors, rows, answer))
        if self.worker is None:
            self.worker = asyncio.create_task(self._work())
        return await answer

    async def _work(self) -> None:
        try:
            while batch := self._take():
                await self._answer(batch)
        finally:
            self.worker = None

    def _take(self) -> list[Waiting]:
        """The next requests whose rows fit into one batch, at least one; those whose clients have gone are dropped."""
        batch: list[Waiting] = []
        rows = 0
        while self.waiting and (not batch or rows + self.waiting[0].rows <= self.max_batch):
            request = self.waiting.popleft()
            if not request.answer.done():
                batch.append(request)
                rows += request.rows
        return batch

    async def _answer(self, batch: list[Waiting]) -> None:
        try:
            outputs = await asyncio.to_thread(self._timed, _joined(batch))
        except Exception as error:
            if len(batch) > 1:  # one request's failure is not its neighbours'
                for request in batch:
                    await self._answer([request])
            elif not batch[0].answer.done():
                batch[0].answer.set_exception(error)
            return
        ends = np.cumsum([request.rows for request in batch])
        for request, part in zip(batch, np.split(outputs, ends[:-1]), strict=True):
            if not request.answer.done():
                request.answer.set_result(part)

    def _timed(self, tensors: Tensors) -> np.ndarray:
        start = time.perf_counter()
        outputs = self.run(tensors)
        seconds, rows = time.perf_counter() - start, _rows(tensors)
        self.seconds_per_row += 0.1 * (seconds / rows - self.seconds_per_row)
        self.observe(rows, seconds)
        return outputs


class Reply(NamedTuple):
    """What goes back to the client."""

    status: int
    body: bytes
    content_type: str = "application/json"
    headers: tuple[tuple[bytes, bytes], ...] = ()


class ClientGone(Exception):
    """The client hung up before its request was whole."""


class Application:
    """The ASGI app of one model: guards, routes, reads bodies within limits, and answers everything, errors too, in JSON."""

    def __init__(self, export: Artifact, name: str, section: Serve, guard: Guard) -> None:
        self.predictor = Predictor.load(export, section)
        self.signature = self.predictor.signature
        self.name, self.digest, self.section, self.guard = name, export.manifest.digest, section, guard
        self.metrics = metrics.Metrics(name, self.digest, self.signature.target)
        self.batcher = Batcher(self.predictor, section.max_batch, self._observe)
        self.digest_header = ((b"x-model-digest", self.digest.encode()),)
        self.page = files("dlopt.serve").joinpath("page.html").read_bytes()
        self.most_pixels = sum(_most_pixels(feature) for feature in self.signature.inputs)
        self.decoders = ThreadPoolExecutor(max(DECODERS, section.threads), "decode")
        self.in_flight = 0
        self.answered = time.monotonic()
        self.flush: asyncio.TimerHandle | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1003})
        else:
            await self._serve(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = time.perf_counter()
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        try:
            reply = await self._reply(scope, path, receive)
        except ClientGone:
            return
        except Refusal as refusal:
            reply = _error(refusal.status, refusal.message)
        except DloptError as error:
            reply = _error(400, str(error))
        except Exception:
            logger.exception("a request failed")
            reply = _error(500, "internal error; the server's log has the cause")
        if path.endswith(":predict"):  # before it is sent: who has a reply finds it counted
            self.metrics.request(reply.status).inc()
            self.metrics.seconds.observe(time.perf_counter() - start)
        await _send(send, reply)

    async def _reply(self, scope: Scope, path: str, receive: Receive) -> Reply:
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        if path in ("/healthz", "/readyz"):  # open: an orchestrator asks them without a key, and they tell nothing
            _needs_get(method)
            return _json({"status": "alive"}) if path == "/healthz" else await self._ready()
        if not self.guard.lets_in(scope["headers"], scope["query_string"]):
            raise Refusal(401, "missing or wrong key: send 'Authorization: Bearer KEY' or 'X-API-Key: KEY', or open /?token=KEY")
        if path.startswith("/v1/models/"):
            return await self._model(method, path, scope["headers"], receive)
        if path not in ("/", "/metrics", "/v1/models"):
            raise Refusal(404, f"Not found: {path[:200]}")
        _needs_get(method)
        if path == "/metrics":
            return Reply(200, self.metrics.exposition(), metrics.CONTENT_TYPE)
        return self._page(scope["query_string"]) if path == "/" else _json({"models": [self.name]})

    async def _ready(self) -> Reply:
        """Ready means that the model answers now, not that it once did."""
        if time.monotonic() - self.answered > FRESH_SECONDS:
            try:
                await asyncio.wait_for(asyncio.to_thread(self.predictor, self.predictor.blank), ANSWER_SECONDS)
            except Exception as error:
                logger.warning("not ready", exc_info=True)
                raise Refusal(503, f"the model does not answer: {type(error).__name__}") from error
            self.answered = time.monotonic()
        return _json({"ready": True})

    async def _model(self, method: str, path: str, headers: Headers, receive: Receive) -> Reply:
        match protocols.action(method, path, self.name):
            case "status":
                return _json(protocols.status(self.name, self.digest), self.digest_header)
            case "metadata":
                return _json(protocols.metadata(self.name, self.digest, self.signature), self.digest_header)
            case "predict":
                return await self._predict(headers, receive)

    async def _predict(self, headers: Headers, receive: Receive) -> Reply:
        if self.in_flight >= self.section.max_waiting:
            raise Refusal(429, "too many requests at once: try again in a moment")
        self.in_flight += 1
        if self.flush is None:
            self._flush_in_flight()
        try:
            body = await read_body(headers, receive, self.section)
            if self._is_quick(body):
                request, tensors = self._decode(body)
            else:
                request, tensors = await asyncio.get_running_loop().run_in_executor(self.decoders, self._decode, body)
            outputs = await self.batcher(tensors)
            decided = protocols.decisions(self.signature.target, outputs)
            reply = protocols.predictions(request, self.signature.target, outputs, decided)
        finally:
            self.in_flight -= 1
        self.metrics.count(outputs, decided)
        return Reply(200, reply, headers=self.digest_header)

    def _flush_in_flight(self) -> None:
        """Write the gauge while there are requests: ten times a second is enough, and costs them nothing."""
        self.metrics.in_flight.set(self.in_flight)
        loop = asyncio.get_running_loop()
        self.flush = loop.call_later(FLUSH_SECONDS, self._flush_in_flight) if self.in_flight else None

    def _is_quick(self, body: bytes) -> bool:
        """Whether a body is decoded in less time than a thread would cost: it is small, and so are its images."""
        if len(body) >= LARGE or not self.most_pixels:
            return len(body) < LARGE
        images = body.count(b"b64") + body.count(b"\\")  # an escape may stand for any letter of b64
        return images * self.most_pixels <= INLINE_PIXELS

    def _decode(self, body: bytes) -> tuple[protocols.Request, Tensors]:
        request = protocols.parse(body, self.signature, self.section.max_rows)
        return request, encode_rows(self.signature, request.rows)

    def _page(self, query: bytes) -> Reply:
        """The page; a key in the URL moves into a cookie, so that it stays neither in the address bar nor in the history."""
        if self.guard.digests and (token := token_of(query)):
            return Reply(303, b"", "text/plain", ((b"location", b"./"), (b"set-cookie", self.guard.cookie(token).encode())))
        return Reply(200, self.page.replace(b"{{model}}", self.name.encode()), "text/html; charset=utf-8", PAGE_HEADERS)

    def _observe(self, rows: int, seconds: float) -> None:
        self.metrics.batch_seconds.observe(seconds)


class Replica:
    """What Ray Serve makes in each replica's process."""

    def __init__(self, export: Path, name: str, section: Serve, key_digests: tuple[str, ...]) -> None:
        self.application = Application(Artifact.open(export), name, section, Guard(key_digests))

    def __serve_build_asgi_app__(self) -> Application:
        """Where Ray Serve gets the app from."""
        return self.application


async def read_body(headers: Headers, receive: Receive, section: Serve) -> bytes:
    """A request's body, within the section's limits of size and time. Raises Refusal or ClientGone."""
    given = dict(headers)
    if given.get(b"content-encoding", b"identity") != b"identity":
        raise Refusal(415, "Content-Encoding: send the body as it is")
    too_large = Refusal(413, f"the body has more than {section.max_bytes:,} bytes (serve.max_bytes)")
    if int(given.get(b"content-length", 0)) > section.max_bytes:  # the server has refused what is no number
        raise too_large
    chunks, size = [], 0
    try:
        async with asyncio.timeout(section.body_seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                chunks.append(message.get("body", b""))
                size += len(chunks[-1])
                if size > section.max_bytes:
                    raise too_large
                if not message.get("more_body", False):
                    return b"".join(chunks)
    except TimeoutError:
        raise Refusal(408, f"the body did not arrive within {section.body_seconds:g} seconds") from None


def _rows(tensors: Tensors) -> int:
    return len(next(iter(tensors.values())))


def _joined(batch: list[Waiting]) -> Tensors:
    if len(batch) == 1:
        return batch[0].tensors
    return {name: _stacked([request.tensors[name] for request in batch]) for name in batch[0].tensors}


def _stacked(parts: list[np.ndarray]) -> np.ndarray:
    """Rows of all parts. Texts, which are as long as their request's longest one, are filled up with 0, which is padding."""
    lengths = {part.shape[1] for part in parts}
    if len(lengths) > 1:
        longest = max(lengths)
        parts = [np.pad(part, ((0, 0), (0, longest - part.shape[1]))) for part in parts]
    return np.concatenate(parts)


def _most_pixels(feature: Feature) -> int:
    """How many pixels an encoded image may have that is sent for an input."""
    if feature.holds != "pixels":
        return 0
    return MOST_PIXELS if feature.resize else feature.shape[0] * feature.shape[1]


def _blank(feature: Feature) -> np.ndarray:
    """One row of zeros, or of missing categories."""
    if feature.dtype == "string":
        return np.full((1, *feature.shape), "", dtype=object)
    return np.zeros((1, *feature.shape), feature.dtype)


def _needs_get(method: str) -> None:
    if method != "GET":
        raise Refusal(405, f"Method not allowed: {method[:20]}; use GET")


def _json(value: dict[str, Any], headers: tuple[tuple[bytes, bytes], ...] = ()) -> Reply:
    return Reply(200, json.dumps(value).encode(), headers=headers)


def _error(status: int, message: str) -> Reply:
    headers = {401: ((b"www-authenticate", b"Bearer"),), 405: ((b"allow", b"GET, HEAD"),), 429: ((b"retry-after", b"1"),)}
    return Reply(status, json.dumps({"error": message}).encode(), headers=headers.get(status, ()))


async def _send(send: Send, reply: Reply) -> None:
    headers = [
        (b"content-type", reply.content_type.encode()),
        (b"content-length", str(len(reply.body)).encode()),
        *reply.headers,
    ]
    await send({"type": "http.response.start", "status": reply.status, "headers": headers})
    await send({"type": "http.response.body", "body": reply.body})


async def _lifespan(receive: Receive, send: Send) -> None:
    while (message := await receive())["type"] != "lifespan.shutdown":
        await send({"type": f"{message['type']}.complete"})
    await send({"type": "lifespan.shutdown.complete"})
