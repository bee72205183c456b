"""`dlopt ui`: one local page that lists the runs of a home with their curves, and leads to their reports and to comparisons. All of it is
read from the home whenever it is asked for; nothing needs the cluster that has made it."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlsplit

from markupsafe import Markup

from dlopt import remote, runs
from dlopt.part import DloptError
from dlopt.report import page, words
from dlopt.train.watch import metrics_log

WIDTH, HEIGHT = 160, 36
"""Of a curve, in pixels."""
MOST = 200
"""Runs that are listed, the newest ones."""
HEADLINES = ("accuracy", "roc_auc", "r2", "mae", "loss")
"""Metrics of which the first that a run has is shown."""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'self'"


class Row(NamedTuple):
    """A run."""

    folder: str
    """Its name within the home."""
    name: str
    created: str
    metrics: dict[str, str]
    """Split to its headline, as people read it."""
    curve: Markup


def listed(home: Path) -> list[Row]:
    """The runs of a home, newest first; a damaged one has no curve."""
    return [_row(Path(record["run"]), record) for record in runs.listing(home)[:MOST]]


def _row(folder: Path, record: dict[str, Any]) -> Row:
    metrics = {split: _headline(found) for split, found in record.get("metrics", {}).items() if split != "train"}
    lines = list(metrics_log.read(_model(folder, record) / metrics_log.NAME))
    losses = [line["validation"]["loss"] for line in lines if "train" in line and line["validation"]]
    losses = losses if len(losses) > 1 else [line["loss"] for line in lines if "train" not in line]
    return Row(folder.name, str(record.get("name")), str(record.get("created", ""))[:16].replace("T", " "), metrics, curve(losses))


def _model(folder: Path, record: dict[str, Any]) -> Path:
    path = (folder / str(record.get("artifacts", {}).get("model", "."))).resolve()
    remote.take(path / metrics_log.NAME)
    return path


def _headline(metrics: dict[str, float | None]) -> str:
    name = next((name for name in HEADLINES if metrics.get(name) is not None), None)
    return f"{words.metric_name(name)} {words.metric(name, metrics[name])}" if name else ""


def curve(values: Sequence[float | None]) -> Markup:
    """A small line, from the first value to the last, whatever their scale; nothing for fewer than two."""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    if len(finite) < 2:
        return Markup("")
    low, high = min(finite), max(finite)
    across, up = (WIDTH - 2) / (len(finite) - 1), (HEIGHT - 4) / ((high - low) or 1)
    points = " ".join(f"{1 + place * across:.1f},{HEIGHT - 2 - (value - low) * up:.1f}" for place, value in enumerate(finite))
    said = f"loss from {finite[0]:.3g} to {finite[-1]:.3g}"
    return Markup(
        f'<svg width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{said}"><title>{said}</title>'
        f'<polyline points="{points}" fill="none" stroke="currentColor" stroke-width="1.5"/></svg>'
    )


def index(home: Path) -> str:
    """The page."""
    return page.template("board.html").render(home=remote.said(home.resolve()), rows=listed(home), quote=quote, policy=POLICY)


def compared(home: Path, names: Sequence[str]) -> str:
    """The page of `dlopt compare`. Raises DloptError."""
    from dlopt.report import compare

    with tempfile.TemporaryDirectory() as folder:
        compare.write(Path(folder) / "page.html", [_folder(home, name) for name in names])
        return (Path(folder) / "page.html").read_text()


def report(home: Path, name: str) -> str:
    """A run's own. Raises DloptError."""
    folder = _folder(home, name)
    remote.take(folder / runs.REPORT)
    return (folder / runs.REPORT).read_text()


def _folder(home: Path, name: str) -> Path:
    """Of a run, by its name as it is listed: no other path leads anywhere. Raises DloptError."""
    for record in runs.listing(home):
        if Path(record["run"]).name == name:
            return Path(record["run"])
    raise DloptError(f"{name}: there is no such run in {remote.said(home.resolve())}")


class Handler(BaseHTTPRequestHandler):
    """Of one home, for browsers on this machine."""

    def __init__(self, home: Path, *given: Any) -> None:
        self.home = home
        super().__init__(*given)

    def do_GET(self) -> None:
        place = urlsplit(self.path)
        if self.headers.get("Host", "").rpartition(":")[0] not in ("127.0.0.1", "localhost"):
            self._answer(HTTPStatus.FORBIDDEN, "this page is for 127.0.0.1")  # another site's name that leads here
        elif place.path == "/":
            self._page(partial(index, self.home))
        elif place.path == "/compare":
            self._page(partial(compared, self.home, parse_qs(place.query).get("run", [])))
        elif place.path.startswith("/run/"):
            self._page(partial(report, self.home, unquote(place.path.removeprefix("/run/"))))
        else:
            self._answer(HTTPStatus.NOT_FOUND, "there is no such page")

    def _page(self, make: Callable[[], str]) -> None:
        try:
            self._answer(HTTPStatus.OK, make())
        except (DloptError, OSError) as error:
            self._answer(HTTPStatus.NOT_FOUND, str(error))

    def _answer(self, status: HTTPStatus, text: str) -> None:
        content = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", f"text/{'html' if status == HTTPStatus.OK else 'plain'}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *given: object) -> None:
        pass


def server(home: Path, port: int) -> ThreadingHTTPServer:
    """Listens on this machine alone. Raises DloptError when the port is taken."""
    try:
        return ThreadingHTTPServer(("127.0.0.1", port), partial(Handler, home))
    except OSError as error:
        raise DloptError(f"--port: cannot listen on {port}: {error.strerror}: give another one") from None
