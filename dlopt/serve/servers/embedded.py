"""The server for one machine: the app under uvicorn in this process, without Ray."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from dlopt.serve import Serve
from dlopt.serve.front.application import Application
from dlopt.serve.servers.stopping import STOPS

KEEP_ALIVE_SECONDS = 75
"""How long a connection may be idle: longer than what proxies in front keep theirs, which else meet a closed one."""
SWEEP_SECONDS = 1.0
BACKLOG = 2048
GARBAGE = 20_000
"""New objects until garbage is looked for; a request of 784 numbers in lists has nearly Python's 700."""
MOST_HEAD = 64 * 1024


class Connection(HttpToolsProtocol):
    """uvicorn's, but that it says what it refuses in JSON, and knows since when it waits for the head of a request."""

    began: float | None = None
    size = 0

    def connection_made(self, transport: Any) -> None:
        """A client that connects should say something."""
        super().connection_made(transport)
        self.began = self.loop.time()

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        self.began, self.size = self.loop.time(), 0
        super().on_message_begin()

    def data_received(self, data: bytes) -> None:
        """Some of a request, whose head may be too long."""
        super().data_received(data)
        if self.began is not None:
            self.size += len(data)
            if self.size > MOST_HEAD:
                self.refuse(431, "Request Header Fields Too Large", "the request's head has more than 64 KiB")

    def on_headers_complete(self) -> None:
        """Its head is whole."""
        self.began = None
        super().on_headers_complete()

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """A client that has said all and closes its half of the connection still waits for its answer."""
        if self.cycle is None or self.cycle.response_complete or self.cycle.more_body:
            return None
        self.cycle.keep_alive = False
        return True

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP."""
        self.refuse(400, "Bad Request", msg)

    def refuse(self, status: int, phrase: str, message: str) -> None:
        """End the connection with an error in JSON."""
        if self.transport.is_closing():
            return
        body = json.dumps({"error": message}).encode()
        head = f"HTTP/1.1 {status} {phrase}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        self.transport.write(head.encode() + body)
        self.transport.close()


class Server(uvicorn.Server):
    """uvicorn's, whose signals are the caller's."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Nothing: who runs the server knows when it ends."""
        yield


def serve(
    application: Application, section: Serve, listener: socket.socket, on_ready: Callable[[], None], rpc: tuple[str, int] | None = None
) -> None:
    """Serve until SIGINT or SIGTERM; then say that the server is not ready, go on for serve.drain_seconds after SIGTERM, and end when all
    that was asked is answered. on_ready: is called when the server answers. rpc: host and port for gRPC. Raises DloptError."""
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    config = uvicorn.Config(
        application,
        http=Connection,
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=round(section.request_seconds) + 1,
        backlog=BACKLOG,
    )
    gc.collect()
    gc.freeze()  # what is there by now stays: looking through it again and again costs a tenth of the throughput
    gc.set_threshold(GARBAGE)
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(_run(Server(config), application, section, listener, on_ready, rpc))


async def _run(
    server: Server,
    application: Application,
    section: Serve,
    listener: socket.socket,
    on_ready: Callable[[], None],
    rpc: tuple[str, int] | None,
) -> None:
    stopped, loop = asyncio.Event(), asyncio.get_running_loop()
    told: list[int] = []

    def stop(number: int) -> None:
        told.append(number)
        stopped.set()

    for number in STOPS:
        loop.add_signal_handler(number, stop, number)
    rpc_server = await _rpc(application, *rpc) if rpc else None
    serving = asyncio.create_task(server.serve([listener]))
    sweeping = asyncio.create_task(_close_slow_heads(server, section.body_seconds))
    try:
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        if not serving.done():
            on_ready()
            await _either(stopped, serving)
            application.draining = True
            if told and told[0] == signal.SIGTERM:
                stopped.clear()
                with suppress(TimeoutError):
                    await asyncio.wait_for(stopped.wait(), section.drain_seconds)
        server.should_exit = True
        await serving
        if rpc_server:
            await rpc_server.stop(section.request_seconds)
    finally:
        sweeping.cancel()
        for number in STOPS:
            loop.remove_signal_handler(number)


async def _rpc(application: Application, host: str, port: int) -> Any:
    """The same app over gRPC; Python's library for it takes a while to load, and only who wants it waits. Raises DloptError."""
    from dlopt.serve.protocols.inference import rpc

    server = rpc.server_of(application, host, port)
    await server.start()
    return server


async def _either(stopped: asyncio.Event, serving: asyncio.Task[None]) -> None:
    waiting = asyncio.create_task(stopped.wait())
    await asyncio.wait([waiting, serving], return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()


async def _close_slow_heads(server: Server, seconds: float) -> None:
    """End connections whose client takes longer than that with the head of a request."""
    loop = asyncio.get_running_loop()
    while True:
        await asyncio.sleep(min(SWEEP_SECONDS, seconds / 2))
        for connection in list(server.server_state.connections):
            if isinstance(connection, Connection) and connection.began and loop.time() - connection.began > seconds:
                connection.refuse(408, "Request Timeout", f"the request did not arrive within {seconds:g} seconds")
