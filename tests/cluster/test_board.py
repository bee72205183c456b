"""`dlopt ui`: a home's runs in one local page, after whatever made them is gone."""

from __future__ import annotations

import json
import re
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from dlopt.report import board
from tests.conftest import program

LOSSES = enumerate((2.0, 1.0, 0.5), 1)
EPOCHS = [{"epoch": n, "step": 10 * n, "train": {}, "validation": {"loss": loss, "accuracy": 0.9}} for n, loss in LOSSES]
STEPS = [{"epoch": 1, "step": n, "loss": loss} for n, loss in enumerate((3.0, 2.5), 1)]


def add_run(home: Path, name: str, created: str, lines: list[dict[str, object]]) -> None:
    folder, model = home / name, home / "model" / name
    folder.mkdir(parents=True)
    model.mkdir(parents=True)
    (model / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    metrics = {"train": {"accuracy": 1.0}, "validation": {"accuracy": 0.9, "loss": 0.5}, "test": {"mae": 0.25}}
    record = {"name": "tiny", "created": created, "metrics": metrics, "artifacts": {"model": f"../model/{name}"}}
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "report.html").write_text(f"<p>report of {name}</p>")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    home = tmp_path / "runs"
    add_run(home, "tiny-1", "2026-11-30T10:00:00", EPOCHS)
    add_run(home, "tiny-<2>", "2026-11-30T11:00:00", STEPS)
    (tmp_path / "secret.json").write_text("{}")
    return home


@pytest.fixture
def url(home: Path) -> Iterator[str]:
    with board.server(home, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def get(url: str, **headers: str) -> httpx.Response:
    return httpx.get(url, headers=headers, trust_env=False, timeout=10)


def test_runs_are_listed_newest_first_with_metrics_and_curves(url: str) -> None:
    page = get(f"{url}/").text
    assert page.index("tiny-&lt;2&gt;") < page.index("tiny-1") and "<2>" not in page
    assert page.count("<polyline") == 2 and "accuracy 90" in page.lower() and "2026-11-30 10:00" in page
    assert "loss from 2 to 0.5" in page and "loss from 3 to 2.5" in page
    assert "default-src &#39;none&#39;" in page and "http" not in page.replace("http-equiv", "")


def test_each_leads_to_its_report_and_nothing_else_is_served(url: str) -> None:
    links = re.findall(r'href="(/run/[^"]+)"', get(f"{url}/").text)
    assert [get(url + link).text for link in links] == ["<p>report of tiny-<2></p>", "<p>report of tiny-1</p>"]
    for path in ("/run/..%2Fsecret.json", "/run/model", "/run/", "/secret.json", "/run/tiny-1/run.json"):
        assert get(url + path).status_code == 404
    assert get(f"{url}/", Host="evil.example:80").status_code == 403


def test_a_comparison_that_cannot_be_made_says_why(url: str) -> None:
    reply = get(f"{url}/compare?run=tiny-1")
    assert (reply.status_code, reply.text) == (404, "RUN: 1 given, and 2 to 6 can be compared")
    assert "there is no such run" in get(f"{url}/compare?run=tiny-1&run=x").text
    assert "damaged" in get(f"{url}/compare?run=tiny-1&run=tiny-%3C2%3E").text or get(f"{url}/compare").status_code == 404


def test_a_home_without_runs_says_how_to_make_one(tmp_path: Path) -> None:
    assert f"dlopt run job.yaml --home {tmp_path}" in board.index(tmp_path)


@pytest.mark.parametrize(
    ("values", "points"), [([1.0], ""), ([None, float("nan")], ""), ([1.0, 1.0], "1.0,34.0 159.0,34.0"), ([2.0, 1.0], "1.0,2.0 159.0,34.0")]
)
def test_a_curve_goes_from_the_first_value_to_the_last(values: list[float | None], points: str) -> None:
    found = re.search(r'points="([^"]*)"', board.curve(values))
    assert (found.group(1) if found else "") == points


@pytest.mark.slow
def test_a_browser_shows_the_page(url: str, tmp_path: Path) -> None:
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    chromium = program("chromium", "chromium-browser", "google-chrome")
    done = subprocess.run([chromium, *flags, "--enable-logging=stderr", f"{url}/"], capture_output=True, text=True, timeout=120)
    assert done.stdout.count("<polyline") == 2 and 'type="checkbox"' in done.stdout
    assert "Refused" not in done.stderr and "CONSOLE" not in done.stderr
