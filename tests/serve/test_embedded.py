"""`dlopt serve` of one replica as a user runs it: one process without Ray, asked over HTTP."""

from __future__ import annotations

import asyncio
import gc
import json
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import onnxruntime
import pytest
import uvicorn
from uvicorn.server import ServerState

from dlopt.artifact import Artifact
from dlopt.serve import Serve
from dlopt.serve.front.application import application_of
from dlopt.serve.servers.connection import Connection
from tests.bench.microseconds import Wire
from tests.served import Server, descendants, listening, make_export

PREDICT = "/v1/models/digits:predict"
BLACK = {"instances": [[[0] * 28] * 28]}
SECTION = Serve(max_bytes=1_000_000, body_seconds=1, drain_seconds=1).model_dump_json()
CLIENT = httpx.Client(trust_env=False, timeout=30)


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_export(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def server(export: Artifact) -> Iterator[Server]:
    made = Server(export, SECTION, host="", ray=False)
    try:
        yield made.wait()
    finally:
        if made.process.poll() is None:
            made.stop(signal.SIGINT)


def raw(server: Server, *parts: bytes, shut: bool = False) -> bytes:
    """What the server says to these bytes until it closes the connection. shut: close our half of it after them."""
    reply = b""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        for part in parts:
            connection.sendall(part)
        if shut:
            connection.shutdown(socket.SHUT_WR)
        while piece := connection.recv(65536):
            reply += piece
    return reply


def head(*lines: str) -> bytes:
    return "\r\n".join([f"POST {PREDICT} HTTP/1.1", "Host: test", *lines, "", ""]).encode()


def test_it_is_one_process_that_listens_on_loopback_and_says_what_onnxruntime_says(server: Server, export: Artifact) -> None:
    assert descendants(server.process.pid) == {}
    assert {(address, port) for _, address, port in listening([server.process.pid])} == {("127.0.0.1", server.port)}
    images = np.random.default_rng(5).integers(0, 256, (70, 28, 28), dtype=np.uint8)
    (expected,) = onnxruntime.InferenceSession(export.path / "model.onnx").run(None, {"image": images[..., None]})
    reply = CLIENT.post(server.url + PREDICT, json={"instances": images.tolist()})
    np.testing.assert_allclose([row["probabilities"] for row in reply.json()["predictions"]], expected, atol=1e-6)


def test_the_line_for_curl_that_it_prints_works(server: Server) -> None:
    line = next(line for line in server.said if line.startswith("curl "))
    said = subprocess.run(["sh", "-c", f"{line} --silent"], capture_output=True, text=True, check=True, timeout=60).stdout
    assert set(json.loads(said)["predictions"][0]) == {"label", "probabilities"}


@pytest.mark.parametrize(
    ("parts", "status", "says"),
    [
        ((b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",), b"400", "Invalid HTTP request received."),
        ((head("Content-Length: minus one"),), b"400", "Invalid HTTP request received."),
        ((head("X-Long: " + "x" * 70_000)[:-2],), b"431", "the request's head has more than 64 KiB"),
        ((head("Connection: close", f"Content-Length: {2**30}"),), b"413", "the body has more than 1,000,000 bytes (serve.max_bytes)"),
        ((head("Connection: close", "Content-Length: 100"), b"{"), b"408", "the body did not arrive within 1 seconds"),
        ((b"POST / HTTP/1.1\r\nHost: test\r\n",), b"408", "the request did not arrive within 1 seconds"),
        ((b"",), b"408", "the request did not arrive within 1 seconds"),
    ],
)
def test_what_is_no_request_or_a_slow_one_is_refused_in_json(server: Server, parts: Any, status: bytes, says: str) -> None:
    reply = raw(server, *parts)
    assert reply.split(b" ")[1] == status
    assert json.loads(reply.partition(b"\r\n\r\n")[2]) == {"error": says}


def test_a_client_that_has_said_all_and_closes_its_half_gets_its_answer(server: Server) -> None:
    body = json.dumps(BLACK).encode()
    reply = raw(server, head("Connection: close", f"Content-Length: {len(body)}"), body, shut=True)
    assert reply.startswith(b"HTTP/1.1 200 "), reply


def answers(reply: bytes) -> list[tuple[int, bytes]]:
    """Status and body of each of them."""
    found = []
    while reply:
        top, _, reply = reply.partition(b"\r\n\r\n")
        length = int(top.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
        found.append((int(top[9:12]), reply[:length]))
        reply = reply[length:]
    return found


def test_requests_in_a_row_are_answered_in_their_order(server: Server) -> None:
    rows = [np.full((28, 28), shade, np.uint8).tolist() for shade in (0, 90, 255)]
    bodies = [json.dumps({"instances": [row]}).encode() for row in rows]
    whole = [head(f"Content-Length: {len(body)}") + body for body in bodies]
    last = head("Content-Length: 2", "Connection: close") + b"{}"
    alone = [CLIENT.post(server.url + PREDICT, content=body).content for body in bodies]
    assert answers(raw(server, b"".join(whole) + last))[:3] == [(200, one) for one in alone]
    text = b"".join(whole)
    assert answers(raw(server, *(text[at : at + 700] for at in range(0, len(text), 700)), last))[:3] == [(200, one) for one in alone]
    assert answers(raw(server, whole[0] + b"\0\1nonsense\r\n\r\n"))[0] == (200, alone[0])


def test_a_body_may_come_in_pieces_and_on_demand(server: Server) -> None:
    body = json.dumps(BLACK).encode()
    alone = CLIENT.post(server.url + PREDICT, content=body).content
    pieces = b"".join(b"%x\r\n%s\r\n" % (len(body[at : at + 99]), body[at : at + 99]) for at in range(0, len(body), 99))
    closing = "Connection: close"
    for trailer in (b"0\r\n\r\n", b"0\r\nContent-Encoding: gzip\r\n\r\n"):
        assert answers(raw(server, head("Transfer-Encoding: chunked", closing), pieces, trailer)) == [(200, alone)]
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(head(f"Content-Length: {len(body)}", "Expect: 100-continue", closing))
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body)
        reply = b""
        while piece := connection.recv(65536):
            reply += piece
    assert answers(reply) == [(200, alone)]
    refused = raw(server, head("Content-Length: 9000000", "Expect: 100-continue"))
    assert refused.startswith(b"HTTP/1.1 413 ") and b"connection: close" in refused
    switched = raw(server, b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n")
    assert answers(switched) == [(200, b'{"status": "alive"}')]


def test_head_says_how_long_the_body_would_be(server: Server) -> None:
    reply = CLIENT.head(f"{server.url}/docs")
    assert (reply.status_code, reply.content) == (200, b"") and int(reply.headers["content-length"]) > 500


def test_a_client_that_reads_nothing_holds_up_nobody_and_gets_all_in_the_end(server: Server) -> None:
    count = 300
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        ask = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n"
        last = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        sender = threading.Thread(target=connection.sendall, args=(ask * (count - 1) + last,))
        sender.start()
        time.sleep(0.3)
        assert CLIENT.get(f"{server.url}/healthz").status_code == 200
        reply = b""
        while piece := connection.recv(1 << 20):
            reply += piece
        sender.join()
    assert [status for status, _ in answers(reply)] == [200] * count


@pytest.mark.parametrize(
    ("lines", "body"),
    [
        (("Content-Length: 2", "Transfer-Encoding: chunked"), b"0\r\n\r\n"),
        (("Content-Length: 2", "Content-Length: 3"), b"{}"),
        (("Content-Length: 2, 2",), b"{}"),
        (("Content-Length: +2",), b"{}"),
        (("Content-Length : 2",), b"{}"),
        (("Transfer-Encoding: chunked, identity",), b"0\r\n\r\n"),
        (("Transfer-Encoding: chunked",), b"-1\r\n\r\n"),
        (("Transfer-Encoding: chunked",), b"ffffffffffffffffff\r\n"),
        (("X: a\0b", "Content-Length: 2"), b"{}"),
        (("X: a\rContent-Length: 2",), b"{}"),
        (("bad name: 1", "Content-Length: 2"), b"{}"),
    ],
)
def test_what_two_servers_could_read_in_two_ways_is_refused(server: Server, lines: tuple[str, ...], body: bytes) -> None:
    """Else a proxy in front and this server would disagree about where the next request begins."""
    said = answers(raw(server, head(*lines) + body + b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"))
    assert [status for status, _ in said] == [400] and set(json.loads(said[0][1])) == {"error"}


def test_requests_leave_no_garbage_behind(export: Artifact) -> None:
    """Each look for it would hold up all requests for some milliseconds: a circle a request was what made p99 twice the bare app's."""
    app = application_of(export, "digits", Serve())
    config = uvicorn.Config(app, http=Connection, lifespan="off")
    body = json.dumps(BLACK).encode()
    asked = (head(f"Content-Length: {len(body)}") + body, b"GET /v1/models HTTP/1.1\r\n\r\n", head("Content-Length: 2") + b"{}")

    async def drive(connection: Connection, wire: Wire) -> None:
        for request in asked * 50:
            wire.said = b""
            wire.done.clear()
            connection.data_received(request)
            await wire.done.wait()

    async def garbage() -> int:
        wire = Wire()
        connection = Connection(config, ServerState(), {})
        connection.connection_made(wire)
        await drive(connection, wire)
        gc.collect()
        await drive(connection, wire)
        return gc.collect()

    assert asyncio.run(garbage()) < 50  # of 150 requests


def test_a_second_server_on_its_port_is_one_line(server: Server, export: Artifact) -> None:
    second = Server(export, port=server.port, ray=False)
    said, _ = second.process.communicate(timeout=60)
    assert said == f"dlopt: --port: {server.port} is in use: stop what listens there or give another\n"


def test_sigterm_lets_clients_notice_and_answers_what_is_in_hand(server: Server) -> None:
    """The last to use the server: /readyz says 503 while it goes on; a request that is half sent is answered."""
    body = json.dumps(BLACK).encode()
    statuses: list[tuple[int, int]] = []

    def load() -> None:
        while True:
            try:
                statuses.append((CLIENT.post(server.url + PREDICT, json=BLACK).status_code, CLIENT.get(server.url + "/readyz").status_code))
            except httpx.TransportError:
                return
            time.sleep(0.02)

    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(head("Connection: close", f"Content-Length: {len(body)}") + body[:100])
        thread = threading.Thread(target=load)
        thread.start()
        time.sleep(0.3)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.4)
        connection.sendall(body[100:])
        reply = b"".join(iter(lambda: connection.recv(65536), b""))
        thread.join()
    assert reply.startswith(b"HTTP/1.1 200 "), reply
    assert server.process.wait(timeout=30) == 0
    assert {predicted for predicted, _ in statuses} == {200}
    ready = [ready for _, ready in statuses]
    assert set(ready) == {200, 503} and ready == sorted(ready)
    assert ready.count(503) >= 5
