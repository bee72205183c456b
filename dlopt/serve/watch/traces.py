"""A span of OpenTelemetry for each request, where its own environment variables ask for them (`OTEL_EXPORTER_OTLP_ENDPOINT`,
`OTEL_TRACES_EXPORTER`); else nothing of it is imported."""

from __future__ import annotations

import os
import time
from typing import Any

from dlopt.part import DloptError
from dlopt.serve.exchange import Call, product_version

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
EXPORTER, DISABLED = "OTEL_TRACES_EXPORTER", "OTEL_SDK_DISABLED"


class Traces:
    """Spans of requests, within the trace that their clients name (`traceparent`, as W3C has it)."""

    def __init__(self, provider: Any) -> None:
        """provider: of the SDK; it decides what is sampled, and where spans go."""
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self.provider, self.tracer = provider, provider.get_tracer("dlopt", product_version())
        self.propagator = TraceContextTextMapPropagator()

    @classmethod
    def from_environment(cls) -> Traces | None:
        """None where nobody asks for them. Raises DloptError."""
        if not (wanted := exporter()):
            return None
        try:
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter

            spans: Any
            if wanted == "otlp":
                from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

                spans = OTLPSpanExporter()
            elif wanted == "console":
                spans = ConsoleSpanExporter()
            else:
                raise DloptError(f"{EXPORTER}: {wanted[:40]!r}: give otlp, console or none")
        except ImportError as error:
            raise DloptError(f"traces need other packages: pip install 'dlopt[traces]' ({error})") from None
        named = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": "dlopt"}
        provider = TracerProvider(resource=Resource.create(named))
        provider.add_span_processor(BatchSpanProcessor(spans))
        return cls(provider)

    def note(self, call: Call, protocol: str, status: int, seconds: float, size: int) -> None:
        """One request, which has just ended."""
        from opentelemetry.context import Context
        from opentelemetry.trace import SpanKind, StatusCode

        end = time.time_ns()
        named = ((name, call.headers.get(name.encode())) for name in ("traceparent", "tracestate"))
        carrier = {name: value.decode("latin-1") for name, value in named if value is not None}
        about = {
            "http.request.method": call.method,
            "http.response.status_code": status,
            "http.response.body.size": size,
            "url.path": call.path[:500],
            "dlopt.request": call.id.decode(),
            "dlopt.protocol": protocol,
            "dlopt.key": call.who,
        }
        if call.model:
            about |= {"dlopt.model": call.model.name, "dlopt.version": call.model.version, "dlopt.digest": call.model.digest}
        span = self.tracer.start_span(
            f"predict {call.model.name}" if call.counted and call.model else f"{call.method} {protocol}".strip(),
            context=self.propagator.extract(carrier, Context()),
            kind=SpanKind.SERVER,
            attributes=about,
            start_time=end - round(seconds * 1e9),
        )
        if status >= 500:
            span.set_status(StatusCode.ERROR)
        span.end(end)


def exporter() -> str:
    """Where spans are to go, "" for nowhere."""
    if os.environ.get(DISABLED, "").strip().lower() == "true":
        return ""
    named = os.environ.get(EXPORTER, "").strip().lower()
    return ("" if named == "none" else named) or ("otlp" if not named and any(map(os.environ.get, ENDPOINTS)) else "")
