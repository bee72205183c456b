"""Where the microseconds of one request go: the whole server in this process, its connections fed with bytes and no socket below, against
a bare uvicorn app; and each step by itself.

    python -m tests.bench.serve --where
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import uvicorn
import uvloop
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from dlopt.artifact import Artifact
from dlopt.data.kinds import encode_columns
from dlopt.data.kinds.pixels import decode_image
from dlopt.serve import Serve
from dlopt.serve.exchange import Answer, decisions
from dlopt.serve.front.application import application_of, settle
from dlopt.serve.protocols import files, tensorflow
from dlopt.serve.protocols.inference import rest
from dlopt.serve.servers.connection import Connection

ROUNDS = 15
"""The shortest of so many rounds counts: what a step takes when nothing else gets in between."""


class Wire(asyncio.Transport):
    """A connection's other side: takes what is written, and says when an answer is whole."""

    def __init__(self) -> None:
        super().__init__()
        self.done = asyncio.Event()
        self.said = b""

    def write(self, data: Any) -> None:
        self.said += bytes(data)
        head, there, body = self.said.partition(b"\r\n\r\n")
        if there and len(body) == int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0]):
            self.done.set()

    def is_closing(self) -> bool:
        return False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def abort(self) -> None:
        pass

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def close(self) -> None:
        pass


def whole(app: Any, protocol: type[Any], request: bytes, connections: int) -> float:
    """Microseconds of a request from its bytes to the answer's, when so many come at once."""
    config = uvicorn.Config(
        app, http=protocol, access_log=False, log_config=None, lifespan="off", ws="none", server_header=False, proxy_headers=False
    )
    config.load()
    settle()

    async def drive() -> float:
        state, best = ServerState(), float("inf")
        pairs = [(protocol(config, state, {}), Wire()) for _ in range(connections)]
        for connection, wire in pairs:
            connection.connection_made(wire)
        count = max(1, 160 // connections)
        for _ in range(ROUNDS):
            start = time.perf_counter()
            for _ in range(count):
                for connection, wire in pairs:
                    wire.said = b""
                    wire.done.clear()
                    connection.data_received(request)
                for _, wire in pairs:
                    await wire.done.wait()
            best = min(best, (time.perf_counter() - start) / count / connections)
        if b" 200 " not in pairs[0][1].said[:20]:
            raise RuntimeError(pairs[0][1].said.decode(errors="replace"))
        return best

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(drive()) * 1e6


def step(function: Callable[[], object]) -> float:
    """Microseconds of one call."""
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(100):
            function()
        best = min(best, (time.perf_counter() - start) / 100)
    return best * 1e6


def raw(path: str, body: bytes, headers: dict[str, str]) -> bytes:
    """A request as it stands on the wire."""
    lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1:8000", *(f"{name}: {value}" for name, value in headers.items())]
    return ("\r\n".join([*lines, f"Content-Length: {len(body)}"]) + "\r\n\r\n").encode() + body


def where(export: Artifact, bare: Any, asked: dict[str, tuple[str, bytes, dict[str, str]]]) -> dict[str, dict[str, float]]:
    """Microseconds by what is sent and by step.

    bare: the least ASGI app that answers JSON. asked: json, binary and png: their path, body and headers.
    """
    requests = {name: raw(*one) for name, one in asked.items()}
    found = {"a bare app": {f"{count} at once": whole(bare, HttpToolsProtocol, requests["json"], count) for count in (1, 16)}}
    app = application_of(export, "digits", Serve())
    model = app.models.only
    assert model
    signature, target = model.signature, model.signature.target
    parsers: dict[str, Callable[[bytes], Any]] = {
        "json": lambda body: tensorflow.parse(body, signature),
        "binary": lambda body: rest.parsed(body, int(asked["binary"][2]["Inference-Header-Content-Length"]), model),
        "png": lambda body: files.parse_image(body, signature),
    }
    wanted, pixels = rest.Wanted(None, None, True), json.loads(asked["json"][1])["instances"]
    blank = {"image": np.zeros((1, 28, 28, 1), np.uint8)}
    outputs = model.predictor(blank)
    decided = decisions(target, outputs)
    answer = Answer(target, outputs, decided)
    requests_total, seconds = app.counts.request("digits", "1", "tensorflow", 200)
    shared = {
        "onnxruntime, one row": step(lambda: model.predictor(blank)),
        "labels and whether all is finite": step(lambda: Answer(target, outputs, decisions(target, outputs))),
        "metrics of a row and of a run": step(lambda: (model.metrics.count(outputs, decided), model.metrics.observe_run(1, 1e-4, [1e-4]))),
        "metrics of a request": step(lambda: (requests_total.inc(), seconds.observe(1e-3))),
    }
    for name, (_, body, _) in asked.items():
        parse = parsers[name]
        columns = parse(body)[0].columns
        rows: dict[str, float] = {
            "body to columns": step(lambda parse=parse, body=body: parse(body)),  # type: ignore[misc]
            "columns to tensors": step(lambda columns=columns: encode_columns(signature, columns)),  # type: ignore[misc]
            **shared,
            "answer to bytes": step(
                (lambda: rest.reply_of(answer, model, wanted)) if name == "binary" else (lambda: tensorflow.predictions(answer, False))
            ),
        }
        alone = whole(app, Connection, requests[name], 1)
        left = alone - sum(rows.values())
        found[name] = rows | {"HTTP, limits, turns": left, "1 at once": alone, "16 at once": whole(app, Connection, requests[name], 16)}
    found["png"]["of that the image"] = step(lambda: decode_image(asked["png"][1], 1, only=(28, 28)))
    found["a bare app"] |= {
        "body to columns": step(lambda: json.loads(asked["json"][1])),
        "columns to tensors": step(lambda: np.array(pixels, dtype=np.uint8).reshape(-1, 28, 28, 1)),
        "onnxruntime, one row": shared["onnxruntime, one row"],
    }
    return {name: {what: round(value, 1) for what, value in rows.items()} for name, rows in found.items()}


def table(found: dict[str, dict[str, float]]) -> str:
    """It as lines of text."""
    rows = list(dict.fromkeys(what for name in ("png", "json", "a bare app") for what in found[name]))
    lines = [f"{'microseconds':>34}" + "".join(f"{name:>12}" for name in found)]
    return "\n".join(lines + [f"{what:>34}" + "".join(f"{found[name].get(what, ''):>12}" for name in found) for what in rows])
