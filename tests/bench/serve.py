"""Serving against the least that could serve: requests/s and latency of `dlopt serve` with one replica, and of a bare uvicorn app
with the same onnxruntime session, parsing and replying JSON. One 28x28 image: as nested numbers, as a binary tensor of the Open Inference
Protocol v2, and as a PNG; 16 connections, and one.

    python -m tests.bench.serve --json          # the embedded server; --ray: Ray Serve behind HAProxy as well

All are measured in turn, round after round, each time with the others idle; a ratio is the median over the rounds. The load comes
from wrk where it is installed, else from asyncio in this process (slower than the servers: look at the ratios with care then).
"""

from __future__ import annotations

import argparse
import asyncio
import io
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
import numpy as np
from PIL import Image

from dlopt.client.load import Ask
from dlopt.client.load import load as from_here
from tests.served import Server, free_port, make_export

CONNECTIONS = 16
ROWS, OWN = 64, "onnxruntime"
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


if len(sys.argv) > 2:
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), log_level="error", access_log=False, lifespan="off")
"""
LUA = """
wrk.method = "POST"
HEADERS
wrk.body = io.open("BODY", "rb"):read("*a")
done = function(summary, latency, requests)
  io.write(string.format("RESULT %d %f %f %f %d\\n", summary.requests, summary.duration / 1e6,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.status + summary.errors.timeout))
end
"""


@dataclass(frozen=True)
class Asked:
    """What a client asks, over and over."""

    url: str
    body: bytes
    headers: dict[str, str]
    connections: int = CONNECTIONS


@dataclass(frozen=True)
class Load:
    """What one stretch of load measured."""

    rate: float
    p50_ms: float
    p99_ms: float


def with_wrk(asked: Asked, seconds: float, folder: Path) -> Load:
    """Load from wrk, one thread; raises RuntimeError when a request failed."""
    (folder / "body").write_bytes(asked.body)
    script = folder / "load.lua"
    headers = "\n".join(f'wrk.headers["{name}"] = "{value}"' for name, value in asked.headers.items())
    script.write_text(LUA.replace("HEADERS", headers).replace("BODY", str(folder / "body")))
    command = ["wrk", "-t1", f"-c{asked.connections}", f"-d{seconds:g}s", "-s", str(script), asked.url]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=seconds + 30).stdout
    found = re.search(r"RESULT (\d+) ([\d.]+) ([\d.]+) ([\d.]+) (\d+)", said)
    if not found or int(found[5]):
        raise RuntimeError(f"wrk: {said}")
    return Load(int(found[1]) / float(found[2]), float(found[3]), float(found[4]))


def load(asked: Asked, seconds: float, folder: Path) -> Load:
    """The load that this machine can make. Raises RuntimeError when a request failed."""
    if shutil.which("wrk"):
        return with_wrk(asked, seconds, folder)
    report = asyncio.run(from_here(Ask(asked.url, asked.body, asked.headers), connections=asked.connections, seconds=seconds))
    if report.errors:
        raise RuntimeError(str(report.errors))
    return Load(report.rate, report.percentile(50), report.percentile(99))


def answer(asked: Asked) -> httpx.Response:
    """One reply, as soon as the server gives any."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return httpx.post(asked.url, content=asked.body, headers=asked.headers, trust_env=False).raise_for_status()
        except httpx.TransportError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def questions(url: str, pixels: np.ndarray) -> dict[str, Asked]:
    """The same image in three dialects, and over one connection."""
    text = {"Content-Type": "application/json"}
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    tensor = {"name": "image", "shape": [1, 28, 28, 1], "datatype": "UINT8", "parameters": {"binary_data_size": 784}}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    binary = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(head))}
    body = json.dumps({"instances": [pixels.tolist()]}).encode()
    predict = f"{url}/v1/models/digits:predict"
    return {
        "json": Asked(predict, body, text),
        "binary": Asked(f"{url}/v2/models/digits/infer", head + pixels.tobytes(), binary),
        "png": Asked(predict, file.getvalue(), {"Content-Type": "image/png"}),
        "json_one_connection": Asked(predict, body, text, 1),
        "binary_of_64": of_many(f"{url}/v2/models/digits/infer", np.repeat(pixels[None, :, :, None], ROWS, axis=0)),
    }


def of_many(url: str, images: np.ndarray) -> Asked:
    """A batch in one request."""
    tensor = {"name": "image", "shape": list(images.shape), "datatype": "UINT8", "parameters": {"binary_data_size": images.nbytes}}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(head))}
    return Asked(url, head + images.tobytes(), headers, 4)


def own_rate(model: Path, seconds: float) -> float:
    """Batches a second of onnxruntime in a loop, with one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = 1, 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    images, count, start = np.repeat(image()[None, :, :, None], ROWS, axis=0), 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        session.run(None, {"image": images})
        count += 1
    return count / (time.perf_counter() - start)


def measure(seconds: float, rounds: int, ray: bool) -> dict[str, object]:
    """All servers at once on this machine, loaded in turn."""
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir="/tmp"))
    export = make_export(folder)
    pixels = image()
    port = free_port()
    bare = subprocess.Popen([sys.executable, "-c", BARE, str(export.check("model.onnx")), str(port)])
    servers = {"embedded": Server(export, '{"drain_seconds": 0}', ray=False)}
    try:
        if ray:
            servers["ray"] = Server(export, '{"drain_seconds": 0}')
        body = json.dumps({"instances": [pixels.tolist()]}).encode()
        plain = Asked(f"http://127.0.0.1:{port}/", body, {"Content-Type": "application/json"})
        asked = {"bare json": plain, "bare json_one_connection": Asked(plain.url, body, plain.headers, 1)}
        for name, server in servers.items():
            asked |= {f"{name} {kind}": one for kind, one in questions(server.wait().url, pixels).items()}
        said = answer(plain).json()
        if any(answer(asked[f"{name} json"]).json() != said or answer(asked[f"{name} png"]).json() != said for name in servers):
            raise RuntimeError("the servers do not say the same")
        for one in asked.values():
            load(one, min(1.0, seconds), folder)
        loads = []
        for _ in range(rounds):
            own = Load(own_rate(export.check("model.onnx"), min(1.0, seconds)), 0, 0)
            loads.append({name: load(one, seconds, folder) for name, one in asked.items()} | {OWN: own})
    finally:
        for server in servers.values():
            if server.process.poll() is None:
                server.stop(signal.SIGTERM)
        bare.terminate()
        bare.wait(10)
        shutil.rmtree(folder, ignore_errors=True)
    return {"load": "wrk" if shutil.which("wrk") else "asyncio"} | {name: _summary(name, loads) for name in asked}


def _summary(name: str, loads: list[dict[str, Load]]) -> dict[str, object]:
    """Medians over the rounds; a ratio to the bare app's JSON over as many connections, of batches to onnxruntime's own rows in a loop."""
    other = "bare json_one_connection" if name.endswith("one_connection") else OWN if name.endswith("of_64") else "bare json"
    ratios = [one[name].rate / one[other].rate for one in loads]
    return {
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "per_s": round(statistics.median(one[name].rate for one in loads), 1),
        "p50_ms": round(statistics.median(one[name].p50_ms for one in loads), 2),
        "p99_ms": round(statistics.median(one[name].p99_ms for one in loads), 2),
    }


def where() -> str:
    """Where the microseconds of a request go, as a table."""
    from tests.bench import microseconds

    with tempfile.TemporaryDirectory() as folder:
        export = make_export(Path(folder))
        names: dict[str, object] = {"__name__": "bare"}
        words, sys.argv = sys.argv, ["bare", str(export.check("model.onnx"))]
        exec(BARE, names)
        sys.argv = words
        asked = questions("", image())
        kinds = {name: (asked[name].url, asked[name].body, asked[name].headers) for name in ("json", "binary", "png")}
        return microseconds.table(microseconds.where(export, names["app"], kinds))


def image() -> np.ndarray:
    """28x28 pixels, the same in every run."""
    return np.array([[random.Random(row).randrange(256) for _ in range(28)] for row in range(28)], np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--seconds", type=float, default=3, help="of each stretch of load")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ray", action="store_true", help="Ray Serve behind HAProxy as well")
    parser.add_argument("--where", action="store_true", help="only where the microseconds of a request go, without any socket")
    options = parser.parse_args()
    if options.where:
        print(where())
        return
    found = measure(options.seconds, options.rounds, options.ray)
    print(json.dumps(found) if options.json else "\n".join(f"{name:>28}  {value}" for name, value in found.items()))


if __name__ == "__main__":
    main()
