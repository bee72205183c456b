"""`dlopt serve` with all that may be said of it at once: TLS, gRPC, a log of requests, a state that outlives it. One process, one start."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import onnxruntime
import pytest

from dlopt.cli import main
from dlopt.client import Client, ServerError
from dlopt.part import Signature
from dlopt.serve import Serve
from dlopt.serve.front.access import request_id
from dlopt.serve.models.model import Predictor
from tests.serve.test_protocols import ask
from tests.serve.test_releases import application
from tests.serve.test_rpc import LET_IN, SERVICE, fields, image_request
from tests.serve.test_serve_models import run
from tests.served import certificate, free_port, make_export

KEY = "a-key-of-the-tests"
IMAGES = np.random.default_rng(3).integers(0, 256, (4, 28, 28), dtype=np.uint8)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    run(home, "m", make_export(home))
    run(home, "larger", make_export(home, hidden=200))
    for name in ("m", "larger"):
        (home / name / "job.yaml").write_text("serve: {drain_seconds: 0}")
    (home / "keys.txt").write_text(f"{KEY} name=ann\n")
    certificate(home)
    return home


@contextmanager
def serving(home: Path, port: int, *words: str) -> Iterator[list[str]]:
    """What it prints, while it runs."""
    command = [sys.executable, "-m", "dlopt", "serve", str(home / "m"), "--port", str(port), "--keys", str(home / "keys.txt"), *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "RAY_ADDRESS": ""})
    said: list[str] = []
    try:
        for line in process.stdout or ():
            said.append(line.rstrip())
            if line.startswith("Ctrl-C"):
                break
        else:
            raise RuntimeError("\n".join(said))
        yield said
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)


def test_a_server_with_everything(home: Path) -> None:
    port, rpc_port, log = free_port(), free_port(), home / "access.jsonl"
    tls = ("--tls-cert", str(home / "cert.pem"), "--tls-key", str(home / "key.pem"))
    words = (*tls, "--grpc-port", str(rpc_port), "--access-log", str(log), "--state", str(home / "state"))
    (wanted,) = onnxruntime.InferenceSession(make_export(home).path / "model.onnx").run(None, {"image": IMAGES[..., None]})
    url, trusted = f"https://127.0.0.1:{port}", str(home / "cert.pem")
    with serving(home, port, *words) as said:
        assert f"gRPC (Open Inference Protocol v2) is at 127.0.0.1:{rpc_port}" in said
        line = next(one for one in said if one.startswith("curl ")).replace("KEY", KEY)
        curled = subprocess.run(
            ["sh", "-c", f"{line} --silent --noproxy '*'"], capture_output=True, text=True, check=True, timeout=60
        ).stdout
        assert "predictions" in json.loads(curled)
        client = Client(url, KEY, verify=trusted)
        np.testing.assert_allclose(client.predict(IMAGES)["probability"], wanted.max(axis=1), atol=1e-6)
        with pytest.raises(ServerError, match=r"CERTIFICATE_VERIFY_FAILED|certificate verify failed"):
            Client(url, KEY, retries=0).models()
        reply = client.send("GET", "/v1/models", headers={"X-Request-Id": "from-a-client"})
        assert reply.headers["x-request-id"] == "from-a-client"
        credentials = grpc.ssl_channel_credentials((home / "cert.pem").read_bytes())
        with grpc.secure_channel(f"127.0.0.1:{rpc_port}", credentials, options=[("grpc.enable_http_proxy", 0)]) as channel:
            answer = channel.unary_unary(f"{SERVICE}ModelInfer")(image_request(), metadata=tuple(LET_IN.items()), timeout=20)
        assert fields(answer)[1] == [b"m"]
        body = {"run": str(home / "larger"), "name": "m"}
        client.send("POST", "/admin/deploy", json.dumps(body).encode(), {"Content-Type": "application/json"})
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    told = {(one["method"], one["path"], one["status"], one["key"], one["model"], one["version"], one["protocol"]) for one in lines}
    assert ("POST", "/v2/models/m/infer", 200, "ann", "m", "1", "v2") in told
    assert ("ModelInfer", f"{SERVICE}ModelInfer", 200, "ann", "m", "1", "grpc") in told
    assert [one["id"] for one in lines].count("from-a-client") == 1 and len({one["id"] for one in lines}) == len(lines)
    assert all(0 < one["seconds"] < 10 for one in lines) and KEY not in log.read_text()
    assert json.loads((home / "state" / "state.json").read_text())["models"]["m"]["default"] == "2"
    assert oct(log.stat().st_mode & 0o777) == "0o640"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--tls-cert", "cert.pem", "--tls-key", "cert.pem"), "dlopt: --tls-cert: "),
        (("--tls-cert", "none.pem"), "No such file or directory"),
        (("--grpc-port", "8000"), "dlopt: --grpc-port: 8000: it is --port: give another"),
        (("--grpc-port", "8001", "--ray"), "dlopt: --grpc-port: 8001: Ray Serve has no port for it"),
        (("--state", "x", "--ray"), "dlopt: --state: Ray Serve keeps it among its replicas"),
        (("--access-log", "none/x"), "dlopt: --access-log: none/x: No such file or directory"),
    ],
)
def test_a_mistake_is_one_line(
    home: Path, words: tuple[str, ...], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(home)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    port = () if "8000" in words else ("--port", str(free_port()))
    assert main(["serve", "m", "--home", ".", *port, *words]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1


def test_requests_have_names_of_their_own_or_of_their_clients(home: Path) -> None:
    assert request_id(b"abc-1.2:3") == b"abc-1.2:3"
    made = {request_id(given) for given in (None, b"", b"a b", b"x\r\nset-cookie: y", b"x" * 129, "ü".encode())}
    assert len(made) == 6 and all(b" " not in one and len(one) < 40 for one in made)
    app = application(home)
    for path, status in (("/healthz", 200), ("/none", 404)):
        reply = ask(app, "GET", path, headers={"X-Request-Id": "mine"})
        assert (reply.status_code, reply.headers["x-request-id"]) == (status, "mine")


def test_a_device_that_is_not_there_is_one_line_and_the_cpu_answers(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    export = make_export(home)
    signature = Signature.model_validate_json(export.read("signature.json"))
    tensors = {"image": IMAGES[..., None]}
    wanted = Predictor(export.read("model.onnx"), signature)(tensors)
    assert caplog.messages == []
    for provider in ("cuda", "tensorrt", "openvino"):
        if any(provider in name.lower() for name in onnxruntime.get_available_providers()):
            continue
        with caplog.at_level(logging.WARNING):
            found = Predictor.load(export, Serve(provider=provider))(tensors)  # type: ignore[arg-type]
        assert caplog.messages.pop() == f"serve.provider: {provider}: this onnxruntime has none, or no device for it: the CPU computes"
        np.testing.assert_array_equal(found, wanted)
