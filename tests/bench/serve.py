"""Serving against the least that could serve: requests/s and latency of `dlopt serve` with one replica, and of a bare uvicorn app
with the same onnxruntime session, parsing and replying the same JSON. 16 connections, one 28x28 image as nested numbers.

    python -m tests.bench.serve --json

The two are measured in turn, A B A B, each time with the other one idle; the ratio is the median over the pairs. The load comes
from wrk where it is installed, else from asyncio in this process (slower than both servers: look at the ratio with care then).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.served import Server, free_port, make_export

CONNECTIONS = 16
BARE = """
import json, sys
import numpy as np, onnxruntime, uvicorn

options = onnxruntime.SessionOptions()
options.intra_op_num_threads, options.inter_op_num_threads = 1, 1
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])


async def app(scope, receive, send):
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    images = np.array(json.loads(body)["instances"], dtype=np.uint8).reshape(-1, 28, 28, 1)
    (probabilities,) = session.run(None, {"image": images})
    rows = zip(probabilities.argmax(axis=1).tolist(), probabilities.tolist())
    reply = json.dumps({"predictions": [{"label": label, "probabilities": row} for label, row in rows]}, separators=(",", ":")).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(reply)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": reply})


uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), log_level="error", access_log=False, lifespan="off")
"""
LUA = """
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
wrk.headers["Authorization"] = "Bearer KEY"
wrk.body = io.open("BODY"):read("*a")
done = function(summary, latency, requests)
  io.write(string.format("RESULT %d %f %f %f %d\\n", summary.requests, summary.duration / 1e6,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.status + summary.errors.timeout))
end
"""


@dataclass(frozen=True)
class Load:
    """What one stretch of load measured."""

    rate: float
    p50_ms: float
    p99_ms: float


def with_wrk(url: str, key: str, body: bytes, seconds: float, folder: Path) -> Load:
    """Load from wrk, one thread; raises RuntimeError when a request failed."""
    (folder / "body.json").write_bytes(body)
    script = folder / "load.lua"
    script.write_text(LUA.replace("KEY", key).replace("BODY", str(folder / "body.json")))
    command = ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{seconds:g}s", "-s", str(script), url]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=seconds + 30).stdout
    found = re.search(r"RESULT (\d+) ([\d.]+) ([\d.]+) ([\d.]+) (\d+)", said)
    if not found or int(found[5]):
        raise RuntimeError(f"wrk: {said}")
    return Load(int(found[1]) / float(found[2]), float(found[3]), float(found[4]))


async def with_asyncio(url: str, key: str, body: bytes, seconds: float) -> Load:
    """Load from this process: each connection sends its next request when the last was answered."""
    host, port, path = re.fullmatch(r"http://([^:/]+):(\d+)(/.*)", url).groups()  # type: ignore[union-attr]
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {key}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    times: list[float] = []
    end = time.perf_counter() + seconds

    async def one() -> None:
        reader, writer = await asyncio.open_connection(host, int(port))
        while (start := time.perf_counter()) < end:
            writer.write(head + body)
            reply = (await reader.readuntil(b"\r\n\r\n")).lower()
            if b" 200 " not in reply.split(b"\r\n")[0]:
                raise RuntimeError(reply.decode())
            await reader.readexactly(int(re.search(rb"content-length: (\d+)", reply)[1]))  # type: ignore[index]
            times.append(time.perf_counter() - start)
        writer.close()

    await asyncio.gather(*(one() for _ in range(CONNECTIONS)))
    times.sort()
    return Load(len(times) / seconds, 1e3 * times[len(times) // 2], 1e3 * times[int(len(times) * 0.99)])


def load(url: str, key: str, body: bytes, seconds: float, folder: Path) -> Load:
    """The load that this machine can make."""
    if shutil.which("wrk"):
        return with_wrk(url, key, body, seconds, folder)
    return asyncio.run(with_asyncio(url, key, body, seconds))


def wait_for(url: str, body: bytes, key: str) -> list[dict[str, object]]:
    """Until a server predicts; its predictions."""
    deadline = time.monotonic() + 60
    while True:
        try:
            reply = httpx.post(url, content=body, headers={"Authorization": f"Bearer {key}"}, trust_env=False)
            return list(reply.raise_for_status().json()["predictions"])
        except httpx.TransportError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def measure(seconds: float, pairs: int, host: str) -> dict[str, object]:
    """Both servers at once on this machine, loaded in turn."""
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir="/tmp"))
    export = make_export(folder)
    body = json.dumps({"instances": [[[random.Random(row).randrange(256) for _ in range(28)] for row in range(28)]]}).encode()
    port = free_port()
    bare = subprocess.Popen([sys.executable, "-c", BARE, str(export.check("model.onnx")), str(port)])
    server = Server(export, host=host)
    try:
        server.wait()
        key = server.key if any(line.startswith("API key: ") for line in server.said) else "none"
        ours, theirs = f"{server.url}/v1/models/digits:predict", f"http://127.0.0.1:{port}/"
        if wait_for(ours, body, key) != wait_for(theirs, body, key):
            raise RuntimeError("the two servers do not say the same")
        for url in (ours, theirs):
            load(url, key, body, min(2.0, seconds), folder)
        loads = [(load(ours, key, body, seconds, folder), load(theirs, key, body, seconds, folder)) for _ in range(pairs)]
    finally:
        if server.process.poll() is None:
            server.stop(signal.SIGTERM)
        bare.terminate()
        bare.wait(10)
        shutil.rmtree(folder, ignore_errors=True)
    served, plain = zip(*loads, strict=True)
    return {
        "load": "wrk" if shutil.which("wrk") else "asyncio",
        "served_per_s": round(statistics.median(one.rate for one in served), 1),
        "bare_per_s": round(statistics.median(one.rate for one in plain), 1),
        "ratio": round(statistics.median(a.rate / b.rate for a, b in loads), 3),
        "ratios": [round(a.rate / b.rate, 3) for a, b in loads],
        "served_p50_ms": round(statistics.median(one.p50_ms for one in served), 2),
        "served_p99_ms": round(statistics.median(one.p99_ms for one in served), 2),
        "bare_p50_ms": round(statistics.median(one.p50_ms for one in plain), 2),
        "bare_p99_ms": round(statistics.median(one.p99_ms for one in plain), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--seconds", type=float, default=6, help="of each stretch of load")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--host", default="", help="as `dlopt serve --host`")
    options = parser.parse_args()
    found = measure(options.seconds, options.pairs, options.host)
    print(json.dumps(found) if options.json else "\n".join(f"{name:>14}  {value}" for name, value in found.items()))


if __name__ == "__main__":
    main()
