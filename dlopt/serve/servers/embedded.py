"""The server for one machine: the app under uvicorn in this process, without Ray."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import uvicorn

from dlopt.part import DloptError
from dlopt.serve import Serve
from dlopt.serve.front.application import Application, settle
from dlopt.serve.servers.connection import Connection
from dlopt.serve.servers.stopping import STOPS

SWEEP_SECONDS = 1.0
BACKLOG = 2048


class Server(uvicorn.Server):
    """uvicorn's, whose signals are the caller's."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Nothing: who runs the server knows when it ends."""
        yield


def serve(
    application: Application,
    section: Serve,
    listener: socket.socket,
    on_ready: Callable[[], None],
    rpc: tuple[str, int] | None = None,
    tls: tuple[Path, Path] | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM; then say that the server is not ready, go on for serve.drain_seconds after SIGTERM, and end when all
    that was asked is answered. on_ready: is called when the server answers. rpc: host and port for gRPC. tls: files of a
    certificate and of its key. Raises DloptError."""
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
        timeout_graceful_shutdown=round(section.request_seconds) + 1,
        backlog=BACKLOG,
        **({"ssl_certfile": str(tls[0]), "ssl_keyfile": str(tls[1])} if tls else {}),  # type: ignore[arg-type]
    )
    settle()
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(_run(Server(config), application, section, listener, on_ready, rpc, tls))


async def _run(
    server: Server,
    application: Application,
    section: Serve,
    listener: socket.socket,
    on_ready: Callable[[], None],
    rpc: tuple[str, int] | None,
    tls: tuple[Path, Path] | None,
) -> None:
    stopped, loop = asyncio.Event(), asyncio.get_running_loop()
    told: list[int] = []

    def stop(number: int) -> None:
        told.append(number)
        stopped.set()

    for number in STOPS:
        loop.add_signal_handler(number, stop, number)
    rpc_server = await _rpc(application, *rpc, tls) if rpc else None
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


async def _rpc(application: Application, host: str, port: int, tls: tuple[Path, Path] | None) -> Any:
    """The same app over gRPC; Python's library for it takes a while to load, and only who wants it waits. Raises DloptError."""
    try:
        from dlopt.serve.protocols.inference import rpc
    except ImportError as error:
        raise DloptError(f"--grpc-port: needs other packages: pip install grpcio protobuf ({error})") from None
    server = rpc.server_of(application, host, port, rpc.credentials_of(*tls) if tls else None)
    await server.start()
    return server


async def _either(stopped: asyncio.Event, serving: asyncio.Task[None]) -> None:
    waiting = asyncio.create_task(stopped.wait())
    await asyncio.wait([waiting, serving], return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()


async def _close_slow_heads(server: Server, seconds: float) -> None:
    """End connections whose client takes longer than that with the head of a request, and those that nobody uses."""
    loop = asyncio.get_running_loop()
    while True:
        await asyncio.sleep(min(SWEEP_SECONDS, seconds / 2))
        for connection in list(server.server_state.connections):
            if isinstance(connection, Connection):
                connection.sweep(loop.time(), seconds)
