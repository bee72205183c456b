"""Several models and versions in one app, from a serve.yaml. Without Ray: the ASGI app is called directly."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from dlopt.artifact import Artifact
from dlopt.part import DloptError
from dlopt.serve import Serve
from dlopt.serve.front.application import Application, application_for
from dlopt.serve.models.plan import entries_of
from tests.serve.test_protocols import BLACK, ask, error_of
from tests.served import NUMBERS, make_export

ROW = {"month": 1, "day": 2, "distance": 3}
PLAN = """
models:
  - {run: digits}
  - {run: digits-large, name: digits, version: 2, labels: [champion], default: false}
  - {run: late, name: flights}
serve: {max_bytes: 100000}
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs, and a serve.yaml beside them."""
    home = tmp_path_factory.mktemp("home")
    for name, export in (
        ("digits", make_export(home)),
        ("digits-large", make_export(home, hidden=200)),
        ("late", make_export(home, NUMBERS)),
    ):
        run(home, name, export)
    (home / "serve.yaml").write_text(PLAN)
    return home


def run(home: Path, name: str, export: Artifact) -> None:
    folder = home / name
    folder.mkdir()
    record = {"name": name, "created": "2026", "artifacts": {"export.onnx": os.path.relpath(export.path, folder)}}
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "job.yaml").write_text("serve: {max_rows: 3}")


def planned(home: Path, path: Path | None = None) -> Application:
    entries, section = entries_of(str(path or home / "serve.yaml"), Path("nowhere"))
    return application_for(entries, section)


def predicted(app: Application, path: str, row: Any = BLACK) -> httpx.Response:
    reply = ask(app, "POST", f"/v1/models/{path}:predict", json={"instances": [row]})
    assert reply.status_code == 200, reply.text
    return reply


def test_models_and_versions_are_told_apart(home: Path) -> None:
    app = planned(home)
    small, large = (make_export(home, hidden=hidden).manifest.digest for hidden in (128, 200))
    said = {path: predicted(app, path) for path in ("digits", "digits/versions/1", "digits/versions/2", "digits/labels/champion")}
    assert [reply.headers["x-model-digest"] for reply in said.values()] == [small, small, large, large]
    assert said["digits"].json() == said["digits/versions/1"].json() != said["digits/versions/2"].json()
    assert predicted(app, "flights", ROW).headers["x-model-digest"] == make_export(home, NUMBERS).manifest.digest
    assert ask(app, "GET", "/v1/models").json() == {"models": ["digits", "flights"]}
    assert [one["version"] for one in ask(app, "GET", "/v1/models/digits").json()["model_version_status"]] == ["1", "2"]
    assert ask(app, "GET", "/v2/models/digits/versions/2").json()["versions"] == ["1", "2"]
    assert "x-model-digest" not in ask(app, "GET", "/v1/models").headers
    for path, status in (("digits/versions/3", 404), ("digits/labels/none", 400), ("other", 404)):
        assert ask(app, "GET", f"/v1/models/{path}").status_code == status
    text = ask(app, "GET", "/metrics").text
    for version, count in (("1", 2), ("2", 2)):
        assert f'dlopt_requests_total{{code="200",model="digits",protocol="tensorflow",version="{version}"}} {count}.0' in text
    assert {"/v1/models/digits:predict", "/v2/models/flights/infer"} <= set(ask(app, "GET", "/openapi.json").json()["paths"])


def test_limits_are_those_of_the_job_and_of_the_file(home: Path) -> None:
    app = planned(home)
    assert "at most 3 are taken" in error_of(ask(app, "POST", "/v1/models/flights:predict", json={"instances": [ROW] * 4}))
    assert app.section == Serve(max_bytes=100_000)


def test_a_switch_drops_no_request(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model is loaded anew while a request of the old one is in its run: both answers come, and nobody hears a 404."""
    app = planned(home)
    old = app.models.find("digits", "2")
    running, go = threading.Event(), threading.Event()
    whole = old.predictor

    def slow(tensors: dict[str, np.ndarray]) -> np.ndarray:
        running.set()
        assert go.wait(60)
        return whole(tensors)

    monkeypatch.setattr(old, "predictor", slow)
    old.batcher.seconds_per_row = 1.0
    path = "/v1/models/digits/versions/2:predict"

    async def main() -> list[int]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            first = asyncio.create_task(client.post(path, json={"instances": [BLACK]}))
            assert await asyncio.to_thread(running.wait, 60)
            statuses = [(await client.post("/v2/repository/models/digits/load")).status_code]
            assert app.models.find("digits", "2") is not old
            statuses.append((await client.post(path, json={"instances": [BLACK]})).status_code)
            statuses.append((await client.post("/v2/repository/models/digits/unload")).status_code)
            statuses.append((await client.post(path, json={"instances": [BLACK]})).status_code)
            go.set()
            return [*statuses, (await first).status_code]

    assert asyncio.run(main()) == [200, 200, 200, 404, 200]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("models: []", "models: "),
        ("modles: [{run: digits}]", "modles: unknown key; did you mean 'models'?"),
        ("models: [{runs: digits}]", "models.0.runs: unknown key; did you mean 'run'?"),
        ("models: [{run: digits, version: 0}]", "models.0.version: must be greater than or equal to 1, not 0"),
        ("models: [{run: digits, name: a/b}]", "models.0.name: "),
        ("models: [{run: digits}]\nserve: {max_row: 3}", "serve.max_row: unknown key; did you mean 'max_rows'?"),
        ("models: [{run: digits}, {run: digits}]", "models.1: version 1 of digits is there twice: give it another version"),
        ("- 1", "must be a mapping"),
        ("models: [", "while parsing a flow"),
    ],
)
def test_a_mistake_in_the_file_is_one_line(home: Path, text: str, said: str) -> None:
    path = home / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(DloptError) as error:
        entries_of(str(path), home)
    assert str(error.value).startswith(f"{path}: {said}") and "\n" not in str(error.value)


def test_a_run_that_is_not_there_is_one_line(home: Path) -> None:
    with pytest.raises(DloptError, match="there are runs of digits, digits-large, late"):
        entries_of("x", home)
    with pytest.raises(DloptError, match=r"x.yaml: No such file"):
        entries_of("x.yaml", home)
