"""The ASGI app that both servers run: guards, routes, reads bodies within limits, and answers everything, errors too, in JSON. Imports
neither torch nor Ray, and runs under any ASGI server."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from dlopt.artifact import Artifact
from dlopt.part import DloptError
from dlopt.serve import Serve
from dlopt.serve.exchange import Call, Handler, Refusal, Reply
from dlopt.serve.front.access import AccessLog, Note, request_id
from dlopt.serve.front.auth import Guard, Key, token_of
from dlopt.serve.front.bodies import ClientGone, Receive, compressed, read_body
from dlopt.serve.models.board import Board, FileBoard
from dlopt.serve.models.lineup import Entry, begun
from dlopt.serve.models.registry import Models
from dlopt.serve.protocols import DIALECTS
from dlopt.serve.watch.metrics import Registry
from dlopt.serve.watch.traces import Traces

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

FOLLOW_SECONDS = 0.5
"""How often a replica looks for what others have changed, and at canaries."""
GARBAGE = 20_000
"""New objects until garbage is looked for; a request of 784 numbers in lists has nearly Python's 700."""
ROUTES = 512
"""Paths whose handlers are remembered."""
DRAINING = "draining"
"""A file of this name beside the metrics says to all replicas of this machine that the server is about to end."""
OPEN = frozenset(path for dialect in DIALECTS for path in dialect.OPEN)
"""Paths that an orchestrator asks without a key: they tell nothing."""
ERROR_HEADERS = {
    401: ((b"www-authenticate", b"Bearer"),),
    405: ((b"allow", b"GET, HEAD, POST"),),
    429: ((b"retry-after", b"1"),),
    503: ((b"retry-after", b"1"),),
}
JSON_TYPE = b"application/json"
logger = logging.getLogger(__name__)


class Answered(NamedTuple):
    """What goes back on the wire."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes
    last: bool
    """Whether the client should make a new connection for its next request, since this server ends."""
    head_only: bool
    """Whether its body is not sent, but only how long it is."""


class Application:
    """One app of any number of models; ASGI is one way to reach it, `call` and `answer` are another."""

    def __init__(
        self,
        models: Models,
        guard: Guard,
        section: Serve,
        counts: Registry,
        drains: Path | None = None,
        notes: Sequence[Note] = (),
    ) -> None:
        """drains: the file whose being there says that the server is about to end. notes: what is told of each request."""
        self.notes = notes
        self.models, self.guard, self.section, self.counts, self.drains = models, guard, section, counts, drains
        self.draining = False
        self.in_flight = 0
        self.watching: asyncio.Task[None] | None = None
        self.route = lru_cache(ROUTES)(_route)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            self._begin_to_watch()
            await _lifespan(receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1003})
        else:
            await self._serve(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", ""))

        async def body(call: Call) -> bytes:
            return await read_body(call.headers, receive, *self.limits_of(call))

        try:
            answered = await self.answer(self.call(scope["method"], path, scope["query_string"], dict(scope["headers"]), body))
        except ClientGone:
            return
        headers = [*answered.headers, *(((b"connection", b"close"),) if answered.last else ())]
        await send({"type": "http.response.start", "status": answered.status, "headers": headers})
        await send({"type": "http.response.body", "body": answered.body})

    async def answer(self, call: Call) -> Answered:
        """What a client gets for its request, whatever comes of it. Raises ClientGone."""
        start, protocol = time.perf_counter(), ""
        self.in_flight += 1
        if self.watching is None or self.watching.done():
            self._begin_to_watch()
        try:
            if call.path not in OPEN:
                self.let_in(call)
            protocol, handler = self.route("GET" if call.method == "HEAD" else call.method, call.path)
            reply = await handler(call)
        except ClientGone:
            raise
        except Refusal as refusal:
            reply = self._refused(refusal)
        except DloptError as error:
            reply = self._refused(Refusal(400, str(error)))
        except Exception:
            logger.exception("the request %s failed", call.id.decode())
            reply = _error(500, "internal error; the server's log has the cause")
        finally:
            self.in_flight -= 1
        self.count(call, protocol, reply.status, start)  # before it is sent: who has a reply finds it counted
        if self.notes:
            self.note(call, protocol, reply.status, start, len(reply.body))
        return await _answered(reply, call, self.draining)

    def _begin_to_watch(self) -> None:
        self.watching = asyncio.get_running_loop().create_task(self._watch())

    async def _watch(self) -> None:
        """Follow what is to be served, as long as the app runs."""
        while True:
            await self.models.follow()
            await asyncio.sleep(FOLLOW_SECONDS)

    def limits_of(self, call: Call) -> tuple[int, float]:
        """How many bytes a body may have, and how many seconds it may take."""
        section = call.model.section if call.model else self.section
        return section.max_bytes, section.body_seconds

    def call(self, method: str, path: str, query: bytes, headers: Mapping[bytes, bytes], body: Callable[[Call], Awaitable[bytes]]) -> Call:
        """A request of a client, before anything is known of it."""
        found = Call(method, path, query, headers, self.models, self.counts, body, self._check_ready, self.models.only)
        found.id = request_id(headers.get(b"x-request-id"))
        return found

    def let_in(self, call: Call) -> None:
        """Raises Refusal for a client without a key, or with one that asks too often."""
        if (key := self.guard.admit(call.headers, call.query)) is None:
            return
        call.role, call.who = key.role, key.name or key.digest[:8]
        if call.path == "/" and (token := token_of(call.query)):
            call.cookie = self.guard.cookie(token)

    def count(self, call: Call, protocol: str, status: int, start: float) -> None:
        """Note a request to predict. start: when it came, by time.perf_counter."""
        if call.counted:
            name, version = (call.model.name, call.model.version) if call.model else ("", "")
            requests, seconds = self.counts.request(name, version, protocol, status)
            requests.inc()
            seconds.observe(time.perf_counter() - start)

    def note(self, call: Call, protocol: str, status: int, start: float, size: int) -> None:
        """Leave word of a request, where that is wanted. size: of its answer, in bytes."""
        for one in self.notes:
            one.note(call, protocol, status, time.perf_counter() - start, size)

    def _refused(self, refusal: Refusal) -> Reply:
        self.counts.rejected.labels(refusal.reason).inc()
        return _error(refusal.status, refusal.message)

    async def _check_ready(self) -> None:
        """Raises Refusal."""
        if self.drains and self.drains.exists():
            self.draining = True
        if self.draining:
            raise Refusal(503, "the server is about to end", "unready")
        for model in self.models.answering():
            await model.check_ready()


def _route(method: str, path: str) -> tuple[str, Handler]:
    for dialect in DIALECTS:
        if handler := dialect.route(method, path):
            return dialect.NAME, handler
    raise Refusal(404, f"Not found: {path[:200]}", "path")


def application_of(
    export: Artifact, name: str, section: Serve, guard: Guard | None = None, drains: Path | None = None, counts: Registry | None = None
) -> Application:
    """The app of one model, which may be unloaded and loaded again. Raises DloptError."""
    return application_for([Entry.of(export, name, section)], section, guard, drains, counts)


def application_for(
    entries: Sequence[Entry],
    section: Serve,
    guard: Guard | None = None,
    drains: Path | None = None,
    counts: Registry | None = None,
    board: Path | Board | None = None,
    log: Path | None = None,
) -> Application:
    """The app of several models and versions, each with its own limits. board: what is served and who changed it, or a folder for it, where
    several processes are to follow it, or this one is to find it again. log: a file for a line on each request. Raises DloptError."""
    counts, state = counts or Registry(), begun(entries)
    models = Models(FileBoard(board, state) if isinstance(board, Path) else board or Board(state), counts)
    notes: list[Note | None] = [AccessLog(log) if log else None, Traces.from_environment()]
    return Application(models, guard or Guard(), section, counts, drains, [one for one in notes if one])


def settle() -> None:
    """What is there when a server begins stays: looking for garbage among it costs a tenth of the throughput, and holds up requests."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(GARBAGE)


class Replica:
    """What Ray Serve makes in each replica's process."""

    def __init__(
        self,
        entries: tuple[Entry, ...],
        section: Serve,
        keys: tuple[Key, ...] = (),
        keys_file: Path | None = None,
        log: Path | None = None,
        board: Board | None = None,
    ) -> None:
        """board: that of replicas on several machines; without it those of one share a folder."""
        from os import environ

        from dlopt.serve.watch.metrics import DIRECTORY

        shared = Path(environ[DIRECTORY]) if environ.get(DIRECTORY) else None
        path = keys_file if keys_file and keys_file.is_file() else None
        guard = Guard(keys, path, section.rate, shared / "rates" if shared else None)
        drains, folder = (shared / DRAINING, shared / "board") if shared else (None, None)
        self.application = application_for(entries, section, guard, drains, board=board or folder, log=log)

    def __serve_build_asgi_app__(self) -> Application:
        """Where Ray Serve gets the app from, in the replica's process."""
        settle()
        return self.application


def _error(status: int, message: str) -> Reply:
    return Reply(status, json.dumps({"error": message}).encode(), headers=ERROR_HEADERS.get(status, ()))


async def _answered(reply: Reply, call: Call, last: bool) -> Answered:
    body, encoding = reply.body, b""
    if b"accept-encoding" in call.headers:
        body, encoding = await compressed_in_time(body, call.headers[b"accept-encoding"])
    kind = JSON_TYPE if reply.content_type == "application/json" else reply.content_type.encode()
    headers = [(b"content-type", kind), (b"content-length", b"%d" % len(body)), (b"x-request-id", call.id), *reply.headers]
    if call.model:
        headers += call.model.headers
    if encoding:
        headers += [(b"content-encoding", encoding), (b"vary", b"accept-encoding")]
    return Answered(reply.status, headers, body, last, call.method == "HEAD")


LARGE_REPLY = 256 * 1024
"""Replies from here on are compressed in a thread."""


async def compressed_in_time(body: bytes, accepts: bytes) -> tuple[bytes, bytes]:
    """As dlopt.serve.front.bodies.compressed, without holding up others."""
    if len(body) < LARGE_REPLY:
        return compressed(body, accepts)
    return await asyncio.to_thread(compressed, body, accepts)


async def _lifespan(receive: Receive, send: Send) -> None:
    while (message := await receive())["type"] != "lifespan.shutdown":
        await send({"type": f"{message['type']}.complete"})
    await send({"type": "lifespan.shutdown.complete"})
