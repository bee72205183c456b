"""What is in deploy/serving, against the real thing: promtool, and a Prometheus that has scraped an app; and drift, against its formula."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml

from dlopt.data.stats.describe import describe
from dlopt.data.stats.summary import summarise
from dlopt.serve import Serve
from dlopt.serve.front.application import Application, application_for
from dlopt.serve.models.board import Board
from dlopt.serve.models.lineup import Entry, begun
from dlopt.serve.watch.drift import FEWEST, Column, Drift, merged, psi
from tests.conftest import program
from tests.serve.test_client import listening
from tests.serve.test_protocols import BLACK, ask
from tests.serve.test_serve_models import run
from tests.served import FLIGHTS, free_port, make_export

SERVING = Path(__file__).parents[2] / "deploy" / "serving"


def test_promtool_takes_the_configuration_and_the_alerts_fire_when_they_should() -> None:
    promtool = program("promtool")
    for words in (("check", "config", "prometheus.yml"), ("check", "rules", "rules.yml"), ("test", "rules", "rules_test.yml")):
        ended = subprocess.run([promtool, *words], cwd=SERVING, capture_output=True, text=True, timeout=60)
        assert ended.returncode == 0, ended.stdout + ended.stderr
    alerts = {rule["alert"] for rule in yaml.safe_load((SERVING / "rules.yml").read_text())["groups"][0]["rules"] if "alert" in rule}
    tested = [one for test in yaml.safe_load((SERVING / "rules_test.yml").read_text())["tests"] for one in test["alert_rule_test"]]
    assert {one["alertname"] for one in tested} == {one["alertname"] for one in tested if one.get("exp_alerts")} == alerts


def test_the_index_is_that_of_its_formula() -> None:
    counts, expected = np.array([50, 30, 20]), np.array([0.2, 0.3, 0.5])
    wanted = 0.3 * np.log(0.5 / 0.2) + 0.0 - 0.3 * np.log(0.2 / 0.5)
    assert psi(counts, expected) == pytest.approx(wanted)
    assert psi(np.array([200, 300, 500]), expected) == pytest.approx(0, abs=1e-12)
    assert psi(np.array([0, 0, 10]), expected) > 1  # finite, though bins are empty
    edges, shares = merged(np.linspace(0, 1, 41), np.full(40, 1 / 40))
    np.testing.assert_allclose(edges, np.arange(1, 10) / 10)
    np.testing.assert_allclose(shares, np.full(10, 0.1))


def rows_of(count: int, seed: int, shift: float = 0.0, missing: float = 0.1) -> dict[str, np.ndarray]:
    """Tensors of FLIGHTS."""
    random = np.random.default_rng(seed)
    numbers = random.normal(shift, 1, (count, 2))
    numbers[random.random(count) < missing, 0] = np.nan
    categories = np.stack([random.choice(["AA", "UA", ""], count, p=[0.6, 0.3, 0.1]), random.choice(["A001", "A002"], count)], axis=1)
    dates = np.stack([random.integers(1, 13, count), random.integers(0, 7, count)], axis=1)
    return {"numbers": numbers.astype(np.float32), "categories": categories.astype(object), "dates": dates.astype(np.float32)}


def profile(rows: int = 4000) -> dict[str, Any]:
    """As `prepare` writes it."""
    import pyarrow as pa

    found = rows_of(rows, 1)
    columns: dict[str, Any] = {"delay": found["numbers"][:, 0], "distance": found["numbers"][:, 1]}
    columns |= {"day.month": found["dates"][:, 0], "day.weekday": found["dates"][:, 1]}
    kinds = dict.fromkeys(columns, "number")
    for place, name in enumerate(("carrier", "airport")):
        columns[name], kinds[name] = pa.chunked_array([pa.array(found["categories"][:, place].tolist())]), "category"
    columns["minutes"], kinds["minutes"] = np.random.default_rng(2).normal(0, 1, rows), "number"
    return json.loads(json.dumps(describe({"train": summarise(columns, kinds, ())})))


def drift_of(tensors: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], float]:
    clock = [1000.0]
    monkeypatch.setattr("dlopt.serve.watch.drift.time.monotonic", lambda: clock[0])
    drift, rows = Drift(FLIGHTS, profile()), len(tensors["dates"])
    for start in range(0, rows, 50):
        some = {name: values[start : start + 50] for name, values in tensors.items()}
        drift.note(some, np.random.default_rng(start).normal(0, 1, (50, 1)), [[]] * 50)
        clock[0] += 1
    found = drift.figures()
    assert found is not None and drift.figures() is None and drift.rows == rows
    return found


def test_rows_like_those_of_training_do_not_drift_and_others_do(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [("input", name) for name in ("delay", "distance", "carrier", "airport", "day.month", "day.weekday")]
    same = drift_of(rows_of(2000, 3), monkeypatch)
    assert list(same) == [*names, ("prediction", "minutes")]
    assert max(same.values()) < 0.05
    other = drift_of(rows_of(2000, 3, shift=1.0), monkeypatch)
    assert {key for key, value in other.items() if value > 0.25} == {("input", "delay"), ("input", "distance")}
    lost = drift_of(rows_of(2000, 3, missing=0.5), monkeypatch)
    assert {key for key, value in lost.items() if value > 0.25} == {("input", "delay")}
    strange = rows_of(2000, 3)
    strange["categories"][:, 0] = "XX"
    assert drift_of(strange, monkeypatch)["input", "carrier"] > 1
    few = drift_of(rows_of(FEWEST - 50, 3, shift=9.0), monkeypatch)
    assert set(few.values()) == {0.0}


def test_a_column_counts_what_numpy_counts() -> None:
    told = profile()["columns"]["distance"]
    column, values = Column(told, "train"), rows_of(500, 9)["numbers"][:, 1].astype(np.float64)
    edges = np.concatenate([[-np.inf], column.edges, [np.inf]])  # type: ignore[list-item]
    assert column.count(values)[:-1].tolist() == np.histogram(values, edges)[0].tolist()
    assert column.expected.sum() == pytest.approx(1) and len(column.expected) <= 12


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    run(home, "late", make_export(home, FLIGHTS, hidden=64))
    (home / "profile.json").write_text(json.dumps(profile()))
    return home


def application(home: Path) -> Application:
    entry = Entry(make_export(home, FLIGHTS).path, "flights", Serve(), profile=home / "profile.json")
    return application_for([entry, Entry.of(make_export(home), "digits", Serve())], Serve())


def instances(count: int, seed: int, shift: float = 0.0) -> list[dict[str, Any]]:
    found = rows_of(count, seed, shift)
    pairs = zip(found["numbers"].tolist(), found["categories"].tolist(), strict=True)
    return [
        {"delay": None if delay != delay else delay, "distance": distance, "carrier": carrier, "airport": airport, "day": "2013-05-31"}
        for (delay, distance), (carrier, airport) in pairs
    ]


def test_an_app_tells_the_drift_of_what_it_is_asked(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dlopt.serve.watch.drift.ROWS_A_SECOND", 10_000)
    monkeypatch.setattr("dlopt.serve.watch.drift.EVERY_SECONDS", 0.0)
    app = application(home)
    assert ask(app, "POST", "/v1/models/flights:predict", json={"instances": instances(1000, 5, shift=2.0)}).status_code == 200
    asyncio.run(app.models.follow())
    text = ask(app, "GET", "/metrics").text
    told = {found[1]: float(found[2]) for found in re.finditer(r'dlopt_drift{column="([\w.]+)".*} (\S+)', text)}
    assert told["delay"] > 1 and told["day.month"] > 1 and told["carrier"] < 0.1
    assert 'dlopt_drift_rows{model="flights",version="1"} 1000.0' in text


def queries() -> list[str]:
    board = json.loads((SERVING / "grafana.json").read_text())
    return [target["expr"] for panel in board["panels"] for target in panel["targets"]]


@pytest.mark.slow
def test_every_query_of_the_dashboard_has_an_answer(home: Path, tmp_path: Path) -> None:
    """A real app with every kind of trouble, scraped by a real Prometheus, asked as Grafana asks."""
    port = free_port()
    app = application(home)
    with listening(app) as url:
        config = yaml.safe_load((SERVING / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["scrape_configs"][0]["static_configs"][0]["targets"] = [url.removeprefix("http://")]
        (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
        (tmp_path / "rules.yml").write_text((SERVING / "rules.yml").read_text())
        words = [program("prometheus"), f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data"]
        process = subprocess.Popen([*words, f"--web.listen-address=127.0.0.1:{port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            with httpx.Client(trust_env=False, timeout=20) as client:
                _trouble(client, url, home, app)
                found = _answers(client, f"http://127.0.0.1:{port}/api/v1")
                counted = _counted(app)
                scraped = _scraped(client, f"http://127.0.0.1:{port}/api/v1", counted)
        finally:
            process.terminate()
            process.wait(20)
    assert {query: bool(answers) for query, answers in found.items()} == dict.fromkeys(found, True)
    assert scraped == counted > 100


def _counted(app: Application) -> float:
    """Requests by the app's own account."""
    lines = app.counts.exposition().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith("dlopt_requests_total{"))


def _scraped(client: httpx.Client, api: str, wanted: float) -> float:
    """Requests by Prometheus's, whose last look may be a second old; asked until it is what is wanted, for some seconds."""
    deadline = time.monotonic() + 10
    while True:
        reply = client.get(f"{api}/query", params={"query": "sum(dlopt_requests_total)"}).json()
        found = float(reply["data"]["result"][0]["value"][1])
        if found == wanted or time.monotonic() > deadline:
            return found
        time.sleep(0.2)


def _trouble(client: httpx.Client, url: str, home: Path, app: Application) -> None:
    """Requests for some seconds, of which some fail; a canary that is taken back, and another; a shadow."""
    predict, deploy = f"{url}/v1/models/flights:predict", f"{url}/admin/deploy"
    bad = {"run": str(home / "late"), "name": "flights", "canary": 50, "limits": {"requests": 5}}
    assert client.post(deploy, json=bad).status_code == 200
    canary = app.models.find("flights", "2")
    whole, failing = canary.predictor, _failing
    canary.predictor = failing  # type: ignore[assignment]
    deadline = time.monotonic() + 8
    while time.monotonic() < deadline:
        assert client.post(predict, json={"instances": instances(20, 4)}).status_code == 200
        client.post(predict, json={"instances": [{"delay": "x"}]})
        client.post(f"{url}/v1/models/digits:predict", json={"instances": [BLACK]})
        if app.models.trial_of("flights") is None:
            canary.predictor = whole
            client.post(deploy, json=bad | {"canary": 20, "shadow": True})
        stable = app.models.find("flights", "1")
        kept, stable.predictor = stable.predictor, failing  # type: ignore[assignment]
        client.post(f"{url}/v1/models/flights/versions/1:predict", json={"instances": instances(1, 4)})
        stable.predictor = kept
        time.sleep(0.05)


def _failing(tensors: Any) -> np.ndarray:
    raise RuntimeError("out of order")


def _answers(client: httpx.Client, api: str) -> dict[str, list[Any]]:
    found = {}
    for query in queries():
        asked = query.replace("$model", ".*").replace("$__rate_interval", "10s")
        reply = client.get(f"{api}/query", params={"query": asked}).json()
        assert reply["status"] == "success", reply
        found[query] = [one for one in reply["data"]["result"] if one["value"][1] != "NaN"]
    return found


class Far(Board):
    """As the actor that hosts share, in this process."""

    far = True


def test_what_several_hosts_have_counted_adds_up_and_never_falls(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Application, "_begin_to_watch", lambda app: None)  # each follows when it is told to
    entries = [Entry.of(make_export(home), "digits", Serve())]
    board = Far(begun(entries))
    apps = [application_for(entries, Serve(), board=board) for _ in range(3)]

    def asked(app: Application, times: int) -> None:
        for _ in range(times):
            assert ask(app, "POST", "/v1/models/digits:predict", json={"instances": [BLACK] * 2}).status_code == 200

    def sums(app: Application) -> dict[str, float]:
        lines = [line.rpartition(" ") for line in ask(app, "GET", "/metrics").text.splitlines() if not line.startswith("#")]
        wanted = ("dlopt_rows_total", "dlopt_request_seconds_count", "dlopt_model_info", "dlopt_in_flight")
        return {name: sum(float(value) for line, _, value in lines if line.startswith(name)) for name in wanted}

    for app, times in zip(apps, (1, 2, 3), strict=True):
        asked(app, times)
    asyncio.run(apps[1].models.follow())
    assert sums(apps[0])["dlopt_rows_total"] == 2 * (1 + 2)  # the third has said nothing yet
    asked(apps[1], 1)
    seen = [sums(app)["dlopt_rows_total"] for app in (apps[1], apps[0], apps[2], apps[0])]
    assert seen == [2 * (1 + 3), 2 * (1 + 3), 2 * (1 + 3 + 3), 2 * (1 + 3 + 3)]
    for gauge in (app.counts.in_flight.labels("digits", "1") for app in apps):
        gauge.set(4)
    for app in apps:
        asyncio.run(app.models.follow())
    found = sums(apps[0])
    assert (found["dlopt_request_seconds_count"], found["dlopt_model_info"], found["dlopt_in_flight"]) == (7, 1, 12)
    monkeypatch.setattr("dlopt.serve.models.board.SILENT_SECONDS", 0.0)  # all are silent but who asks
    late = board.told
    monkeypatch.setattr(board, "heard", {apps[0].counts.host: float("inf")})
    found = sums(apps[0])
    assert found["dlopt_rows_total"] == 14 and found["dlopt_in_flight"] <= 4 and len(late) == 3
    host, moment, families = apps[1].counts.told()
    board.tell(host, moment - 100, [])  # what came late changes nothing
    assert sums(apps[0])["dlopt_rows_total"] == 14 and families
