"""What is for people and for machines that watch: the page to try a model, its description, health, and metrics."""

from __future__ import annotations

from importlib.resources import files
from urllib.parse import parse_qs

from dlopt.serve.exchange import Call, Handler, Json, Refusal, Reply, json_reply
from dlopt.serve.models.model import Model
from dlopt.serve.watch import metrics

NAME = "pages"
OPEN: tuple[str, ...] = ("/healthz", "/readyz")
HEADERS = (
    (b"cache-control", b"no-store"),
    (b"content-security-policy", b"default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
)
HTML = "text/html; charset=utf-8"


def route(method: str, path: str) -> Handler | None:
    """What answers a path. Raises Refusal for another verb than GET."""
    if (handler := PATHS.get(path)) and method != "GET":
        raise Refusal(405, f"Method not allowed: {method[:20]}; use GET")
    return handler


async def _alive(call: Call) -> Reply:
    return json_reply({"status": "alive"})


async def _ready(call: Call) -> Reply:
    await call.check_ready()
    return json_reply({"ready": True})


async def _metrics(call: Call) -> Reply:
    return Reply(200, await call.models.exposition(), metrics.CONTENT_TYPE)


async def _page(call: Call) -> Reply:
    """The page; a key in the URL moves into a cookie, so that it stays neither in the address bar nor in the history."""
    if call.cookie:
        return Reply(303, b"", "text/plain", ((b"location", b"./"), (b"set-cookie", call.cookie.encode())))
    asked = parse_qs(call.query.decode("latin-1"), max_num_fields=64).get("model", call.models.names()[:1])
    if not asked:
        raise Refusal(404, "no model is served", "model")
    name = call.find(asked[0]).name.encode()
    return Reply(200, _file("page.html").replace(b"{{model}}", name), HTML, HEADERS)


async def _openapi(call: Call) -> Reply:
    from dlopt.serve.protocols.openapi import document

    return json_reply(document(call.models))


async def _docs(call: Call) -> Reply:
    return Reply(200, _file("docs.html"), HTML, HEADERS)


def _file(name: str) -> bytes:
    return files("dlopt.serve.protocols").joinpath(name).read_bytes()


PATHS: dict[str, Handler] = {
    "/": _page,
    "/healthz": _alive,
    "/readyz": _ready,
    "/metrics": _metrics,
    "/openapi.json": _openapi,
    "/docs": _docs,
}


def describe(model: Model) -> Json:
    """Paths that are the same whatever is served."""
    texts = {"/healthz": "Liveness", "/readyz": "Readiness", "/metrics": "Metrics for Prometheus", "/": "A page to try the model"}
    said = {"tags": ["Server"], "responses": {"200": {"description": "OK"}}}
    return {path: {"get": {"summary": text} | said} for path, text in texts.items()}
