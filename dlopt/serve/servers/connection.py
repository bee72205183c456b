"""HTTP/1.1 for the embedded server: a connection of one client, straight to the app. ASGI in between would cost a third of a small request.

httptools parses; uvicorn listens, and keeps connections. What a request may take is the app's to say: it reads the body when it wants it,
within its limits. Here is only what a connection may do before there is a request: take long, or send a head without an end.
"""

from __future__ import annotations

import asyncio
import http
import json
from collections import deque
from functools import lru_cache
from typing import Any
from urllib.parse import unquote

import httptools
from uvicorn.config import Config
from uvicorn.server import ServerState

from dlopt.serve.exchange import Call, Refusal
from dlopt.serve.front.application import Answered, Application
from dlopt.serve.front.bodies import ClientGone, late, limit_of, too_large, unpacked

KEEP_ALIVE_SECONDS = 75
"""How long a connection may be idle: longer than what proxies in front keep theirs, which else meet a closed one."""
LINGER_SECONDS = 3.0
"""What a connection that ends may take for it."""
MOST_HEAD = 64 * 1024
HIGH = 256 * 1024
"""Bytes of a body that wait to be read; from then on no more are taken from the network."""
WRITTEN_APART = 64 * 1024
"""Bodies from here on are not copied behind their head."""


@lru_cache(600)
def _status_line(status: int) -> bytes:
    try:
        return f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\n".encode()
    except ValueError:
        return f"HTTP/1.1 {status} \r\n".encode()


@lru_cache(512)
def _target_of(url: bytes) -> tuple[str, bytes]:
    """Path and query. Raises httptools.HttpParserInvalidURLError."""
    parts = httptools.parse_url(url)
    path = (parts.path or b"/").decode("ascii")
    return unquote(path) if "%" in path else path, parts.query or b""


class Asked:
    """One request as it comes in."""

    __slots__ = ("call", "complete", "gone", "keep_alive", "parts", "size", "waiter", "waits_for_100", "wrong")

    def __init__(self, keep_alive: bool, waits_for_100: bool) -> None:
        self.keep_alive, self.waits_for_100 = keep_alive, waits_for_100
        self.parts: list[bytes] = []
        self.size = 0
        self.complete = self.gone = False
        self.wrong: Refusal | None = None
        """Why its rest will never come."""
        self.waiter: asyncio.Future[None] | None = None
        self.call: Call | None = None

    def wake(self) -> None:
        """There is more to read, or there never will be."""
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)


class Connection(asyncio.Protocol):
    """Of one client; its requests are answered one after another."""

    def __init__(
        self, config: Config, server_state: ServerState, app_state: dict[str, Any], _loop: asyncio.AbstractEventLoop | None = None
    ) -> None:
        self.app: Application = config.app  # type: ignore[assignment]
        self.loop = _loop or asyncio.get_event_loop()
        self.state = server_state
        self.parser = httptools.HttpRequestParser(self)
        self.transport: asyncio.Transport = None  # type: ignore[assignment]
        self.url = b""
        self.headers: dict[bytes, bytes] = {}
        self.size = 0
        self.incoming: Asked | None = None
        """The request whose bytes are coming in."""
        self.current: Asked | None = None
        """The one that is being answered."""
        self.queue: deque[Asked] = deque()
        self.began: float | None = None
        """Since when a head is waited for; None while there is a request."""
        self.idle = False
        """Whether nothing of that head has come yet, and there was a request before."""
        self.blocked = self.paused = False
        self.closed: float | None = None
        """Since when it is being closed."""

    def connection_made(self, transport: Any) -> None:
        """A client that connects should say something."""
        self.state.connections.add(self)  # type: ignore[arg-type]
        self.transport = transport
        self.began = self.loop.time()

    def connection_lost(self, error: Exception | None) -> None:
        """Who reads a body hears of it; what is computed is computed to its end."""
        self.state.connections.discard(self)
        for asked in (self.incoming, self.current, *self.queue):
            if asked is not None:
                asked.gone = True
                asked.wake()
        self.queue.clear()

    def data_received(self, data: bytes) -> None:
        """Some bytes, of which the head may be too long or none."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:  # no other protocol is spoken here: it is answered as if it had not asked for one
            self._last()
        except httptools.HttpParserError:
            self.refuse(400, "Invalid HTTP request received.")
        if self.began is not None:
            self.idle = False
            self.size += len(data)
            if self.size > MOST_HEAD:
                self.refuse(431, "the request's head has more than 64 KiB")

    def eof_received(self) -> bool | None:
        """A client that has said all and closes its half of the connection still waits for its answer."""
        last = self.queue[-1] if self.queue else self.current
        if last is None or not last.complete:
            return None
        last.keep_alive = False
        return True

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        self.url, self.headers, self.size = b"", {}, 0
        self.began, self.idle = self.loop.time(), False

    def on_url(self, url: bytes) -> None:
        """Some of it."""
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """One of them; of several of a name the last counts. What comes behind a body in pieces is none."""
        if self.incoming is None:
            self.headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        """The head is whole: the app may begin, and reads the body by itself."""
        self.began = None
        path, query = _target_of(self.url)
        waits = b"expect" in self.headers and self.headers[b"expect"].lower() == b"100-continue"
        asked = Asked(self.parser.get_http_version() != "1.0" and self.parser.should_keep_alive(), waits)

        async def body(call: Call) -> bytes:
            return await self._body(asked, call)

        asked.call = self.app.call(self.parser.get_method().decode("ascii"), path, query, self.headers, body)
        self.incoming = asked
        self.queue.append(asked)
        if self.current is None and not self.blocked:
            self._next()
        else:
            self._pause()

    def on_body(self, body: bytes) -> None:
        """Some of it."""
        asked = self.incoming
        assert asked is not None
        asked.parts.append(body)
        asked.size += len(body)
        if asked.size > HIGH:
            self._pause()
        asked.wake()

    def on_message_complete(self) -> None:
        """The request is whole."""
        if self.incoming is not None:
            self.incoming.complete = True
            self.incoming.wake()
            self.incoming = None
        self.began, self.size = None, 0

    def pause_writing(self) -> None:
        """The client does not take its answers: it gets no more of them meanwhile."""
        self.blocked = True
        self._pause()

    def resume_writing(self) -> None:
        """It does again."""
        self.blocked = False
        if self.current is None and self.queue:
            self._next()
        self._resume()

    def shutdown(self) -> None:
        """The server ends: an answer that is due is still given."""
        if self.current is None and not self.queue:
            self._close()
        else:
            (self.queue[-1] if self.queue else self.current).keep_alive = False  # type: ignore[union-attr]

    def refuse(self, status: int, message: str) -> None:
        """End the connection with an error in JSON, or after the answers to what was asked before."""
        if self.incoming is not None:
            self.incoming.wrong = Refusal(status, message)
            self.incoming.wake()
        if self.transport.is_closing() or self._last():
            return
        body = json.dumps({"error": message}).encode()
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        self.transport.write(_status_line(status) + head + body)
        self._close()

    def _last(self) -> bool:
        """Take no more requests; whether some are yet to be answered."""
        last = self.queue[-1] if self.queue else self.current
        if last is not None:
            last.keep_alive = False
            self._pause()
        return last is not None

    def sweep(self, now: float, seconds: float) -> None:
        """Called now and then: end it when the client takes longer than that with the head of a request, or says nothing for long."""
        if self.closed is not None and now - self.closed > LINGER_SECONDS:
            self.transport.abort()
        if self.began is None:
            return
        if self.idle:
            if now - self.began > KEEP_ALIVE_SECONDS:
                self._close()
        elif now - self.began > seconds:
            self.refuse(408, f"the request did not arrive within {seconds:g} seconds")

    def _next(self) -> None:
        self.current = asked = self.queue.popleft()
        task = self.loop.create_task(self._answer(asked))
        self.state.tasks.add(task)
        task.add_done_callback(self.state.tasks.discard)

    async def _answer(self, asked: Asked) -> None:
        call, asked.call = asked.call, None  # it knows its body, and so the request: a circle would wait for garbage to be looked for
        assert call is not None
        try:
            answered = await self.app.answer(call)
        except ClientGone:
            self._close()
            return
        except BaseException:
            self.transport.abort()
            raise
        self.state.total_requests += 1
        if asked.gone:
            return
        if not asked.complete or answered.last:  # what is still to come of it is not read
            asked.keep_alive = False
        self._write(asked, answered)
        self.current = None
        if not asked.keep_alive:
            self._close()
        elif self.queue:
            if not self.blocked:
                self._next()
        else:
            self._resume()
            if self.began is None:
                self.began, self.idle = self.loop.time(), True

    def _write(self, asked: Asked, answered: Answered) -> None:
        parts = [_status_line(answered.status)]
        for name, value in answered.headers:
            parts += (name, b": ", value, b"\r\n")
        if not asked.keep_alive:
            parts.append(b"connection: close\r\n")
        parts.append(b"\r\n")
        if answered.head_only:
            self.transport.write(b"".join(parts))
        elif len(answered.body) < WRITTEN_APART:
            parts.append(answered.body)
            self.transport.write(b"".join(parts))
        else:
            self.transport.writelines([b"".join(parts), answered.body])

    async def _body(self, asked: Asked, call: Call) -> bytes:
        """Raises Refusal or ClientGone."""
        most, seconds = self.app.limits_of(call)
        limit_of(call.headers, most)
        if not asked.complete:
            await self._rest(asked, most, seconds)
        if asked.size > most:
            raise too_large(most)
        body = asked.parts[0] if len(asked.parts) == 1 else b"".join(asked.parts)
        asked.parts = []
        return await unpacked(call.headers, body, most)

    async def _rest(self, asked: Asked, most: int, seconds: float) -> None:
        """Until the body is whole. Raises Refusal or ClientGone."""
        if asked.waits_for_100:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        try:
            async with asyncio.timeout(seconds):
                while not asked.complete:
                    if asked.gone:
                        raise ClientGone
                    if asked.wrong:
                        raise asked.wrong
                    if asked.size > most:
                        raise too_large(most)
                    self._resume()
                    asked.waiter = self.loop.create_future()
                    await asked.waiter
        except TimeoutError:
            raise late(seconds) from None

    def _close(self) -> None:
        """When what was written is on its way. Over TLS the client is to agree, which it may not."""
        self.closed = self.closed or self.loop.time()
        self.transport.close()

    def _pause(self) -> None:
        if not self.paused:
            self.paused = True
            self.transport.pause_reading()

    def _resume(self) -> None:
        if self.paused and not self.blocked and not self.transport.is_closing():
            self.paused = False
            self.transport.resume_reading()
