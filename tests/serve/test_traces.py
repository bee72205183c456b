"""Spans of OpenTelemetry: what a collector is sent, whose trace they belong to, and that nobody pays for what nobody asked for."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from dlopt.part import DloptError
from dlopt.serve.watch.traces import DISABLED, ENDPOINTS, EXPORTER, Traces, exporter
from tests.packages import package
from tests.serve.test_protocols import BLACK, PREDICT, application, ask

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture(autouse=True)
def nothing_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*ENDPOINTS, EXPORTER, DISABLED, "OTEL_TRACES_SAMPLER"):
        monkeypatch.delenv(name, raising=False)


@contextmanager
def collector() -> Iterator[tuple[str, list[bytes]]]:
    """An address that takes spans over HTTP, and the bodies that came."""
    bodies: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            bodies.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", bodies
        finally:
            server.shutdown()
            thread.join()


def value_of(one: Any) -> Any:
    return getattr(one.value, one.value.WhichOneof("value"))


def test_a_collector_gets_a_span_for_each_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package("opentelemetry.exporter.otlp.proto.http.trace_exporter", "traces")
    service = package("opentelemetry.proto.collector.trace.v1.trace_service_pb2", "traces")
    with collector() as (url, bodies):
        monkeypatch.setenv(ENDPOINTS[0], url)
        app = application(tmp_path, keys=("a-key-of-the-tests",))
        let_in = {"authorization": "Bearer a-key-of-the-tests"}
        assert ask(app, "POST", PREDICT, json={"instances": [BLACK]}, headers=let_in | {"traceparent": PARENT}).status_code == 200
        assert ask(app, "GET", "/v1/models", headers={"traceparent": "junk"}).status_code == 401
        traces = next(one for one in app.notes if isinstance(one, Traces))
        traces.provider.shutdown()
    sent = [service.ExportTraceServiceRequest.FromString(body) for body in bodies]
    resource = [one for request in sent for one in request.resource_spans]
    assert {value_of(one) for part in resource for one in part.resource.attributes if one.key == "service.name"} == {"dlopt"}
    first, second = [span for part in resource for scope in part.scope_spans for span in scope.spans]
    about = {one.key: value_of(one) for one in first.attributes}
    assert first.name == "predict m" and first.trace_id.hex() in PARENT and first.parent_span_id.hex() in PARENT
    assert (about["dlopt.model"], about["dlopt.version"], about["dlopt.protocol"]) == ("m", "1", "tensorflow")
    assert (about["http.response.status_code"], about["url.path"]) == (200, PREDICT)
    assert 0 < first.end_time_unix_nano - first.start_time_unix_nano < 10e9
    assert {one.key: value_of(one) for one in second.attributes}["http.response.status_code"] == 401
    assert second.parent_span_id == b"" and second.trace_id != first.trace_id
    assert "a-key-of-the-tests" not in str(sent)


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({}, ""),
        ({ENDPOINTS[1]: "http://x"}, "otlp"),
        ({ENDPOINTS[0]: "http://x", EXPORTER: "none"}, ""),
        ({EXPORTER: "console"}, "console"),
        ({EXPORTER: "otlp", DISABLED: "TRUE"}, ""),
    ],
)
def test_they_are_where_the_environment_wants_them(variables: dict[str, str], wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert exporter() == wanted


def test_a_mistake_is_one_line_and_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(EXPORTER, "zipkin")
    with pytest.raises(DloptError, match=r"^OTEL_TRACES_EXPORTER: 'zipkin': give otlp, console or none$"):
        Traces.from_environment()
    monkeypatch.setenv(EXPORTER, "otlp")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(DloptError, match=r"^traces need other packages: pip install 'dlopt\[traces\]'"):
        Traces.from_environment()


def test_who_asks_for_none_imports_nothing() -> None:
    program = "import sys; import dlopt.serve.front.application; sys.exit('opentelemetry' in str(list(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
