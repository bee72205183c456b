"""Deploying to a running server: canaries, shadows, labels, rolling back by hand and by itself, and the log of it. Without Ray."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from dlopt.cli import main
from dlopt.part import DloptError
from dlopt.serve import Serve
from dlopt.serve.exchange import Call
from dlopt.serve.front.application import FOLLOW_SECONDS, Answered, Application, application_for
from dlopt.serve.front.auth import Guard, Key, digest
from dlopt.serve.models.lineup import Canary, Entry, Limits, Version, begun, deployed, rolled_back, version_of
from dlopt.serve.models.model import Model
from tests.serve.test_client import listening
from tests.serve.test_protocols import BLACK, ask, error_of
from tests.serve.test_serve_models import run
from tests.served import NUMBERS, make_export

PREDICT = "/v1/models/digits:predict"
IMAGES = np.random.default_rng(5).integers(0, 256, (40, 28, 28), dtype=np.uint8)
BODIES = [json.dumps({"instances": [image.tolist()]}).encode() for image in IMAGES]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    for name, export in (
        ("digits", make_export(home)),
        ("larger", make_export(home, hidden=200)),
        ("largest", make_export(home, hidden=300)),
        ("late", make_export(home, NUMBERS)),
    ):
        run(home, name, export)
    return home


def application(home: Path, board: Path | None = None, keys: tuple[Key, ...] = ()) -> Application:
    return application_for([Entry.of(make_export(home), "digits", Serve())], Serve(), Guard(keys), board=board)


def digest_of(home: Path, hidden: int = 128) -> str:
    return make_export(home, hidden=hidden).manifest.digest


def deploy(app: Application, home: Path, folder: str, **given: Any) -> httpx.Response:
    return ask(app, "POST", "/admin/deploy", json={"run": str(home / folder), "name": "digits"} | given)


def answered(app: Application, count: int = 1, path: str = PREDICT) -> Counter[str]:
    """How many requests each model has answered, all of them well."""

    async def body(call: Call) -> bytes:
        return BODIES[number % len(BODIES)]

    async def all_of_them() -> list[Answered]:
        nonlocal number
        found = []
        for number in range(count):  # noqa: B007
            found.append(await app.answer(app.call("POST", path, b"", {}, body)))
        while app.models._beside:
            await asyncio.sleep(0.01)
        return found

    number = 0
    replies = asyncio.run(all_of_them())
    assert {reply.status for reply in replies} == {200}
    return Counter(dict(reply.headers)[b"x-model-digest"].decode() for reply in replies)


def roles(app: Application) -> dict[str, Any]:
    found = ask(app, "GET", "/admin/models").json()["models"]["digits"]
    return {name: found[name] for name in ("default", "labels", "canary", "shadow")}


def counted(app: Application, start: str) -> float:
    lines = app.counts.exposition().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(start))


def test_a_deployed_run_answers_at_once_and_the_one_before_after_a_rollback(home: Path) -> None:
    app = application(home)
    small, large = digest_of(home), digest_of(home, 200)
    assert answered(app) == {small: 1}
    reply = deploy(app, home, "larger", labels=["champion"])
    assert reply.json() == {"model": "digits", "version": "2", "digest": large, "labels": ["champion"]}
    assert answered(app) == answered(app, path="/v1/models/digits/labels/champion:predict") == {large: 1}
    assert answered(app, path="/v1/models/digits/versions/1:predict") == {small: 1}
    assert ask(app, "POST", "/admin/rollback", json={}).json() == {"model": "digits", "default": "1"}
    assert answered(app) == {small: 1}
    assert "there is nothing to go back to" in error_of(ask(app, "POST", "/admin/rollback", json={}))
    assert deploy(app, home, "larger").json()["version"] == "2"  # the number that it has
    assert deploy(app, home, "largest").json()["version"] == "3"
    assert roles(app) == {"default": "3", "labels": {"champion": "2"}, "canary": None, "shadow": None}
    log = ask(app, "GET", "/admin/log").json()["log"]
    assert [(line["who"], line["what"], line.get("version")) for line in log] == [
        ("dlopt", "start", None),
        ("", "deploy", "2"),
        ("", "rollback", None),
        ("", "deploy", "2"),
        ("", "deploy", "3"),
    ]


def test_another_name_is_another_model(home: Path) -> None:
    app = application(home)
    assert deploy(app, home, "late", name="flights").json()["version"] == "1"
    assert ask(app, "GET", "/v1/models").json() == {"models": ["digits", "flights"]}
    row = {"month": 1, "day": 2, "distance": 3}
    assert ask(app, "POST", "/v1/models/flights:predict", json={"instances": [row]}).status_code == 200
    assert "say which model: digits, flights" in error_of(ask(app, "POST", "/admin/rollback", json={}))


def test_a_canary_gets_its_share_and_then_all(home: Path) -> None:
    app = application(home)
    assert deploy(app, home, "larger", canary=10, limits={"latency": 1e6}).json()["canary"] == 10
    found = Counter(app.models.find("digits", predicting=True).version for _ in range(10_000))
    assert found["2"] == pytest.approx(1000, abs=20)
    small, large = digest_of(home), digest_of(home, 200)
    assert answered(app, 100) == {small: 90, large: 10}
    assert ask(app, "GET", "/v1/models/digits").headers["x-model-digest"] == small
    assert counted(app, 'dlopt_trial_total{kind="canary",model="digits",outcome="answered",version="2"}') == 10
    assert counted(app, 'dlopt_canary_share{model="digits",version="2"}') == 10
    compared = sum(counted(app, f'dlopt_trial_total{{kind="canary",model="digits",outcome="{what}"') for what in ("agreed", "disagreed"))
    assert compared == 10
    assert "version 1 of digits answers already" in error_of(deploy(app, home, "digits", canary=5))
    deploy(app, home, "larger", canary=50, limits={"latency": 1e6})
    assert answered(app, 40)[large] == pytest.approx(20, abs=2)
    deploy(app, home, "larger")
    assert answered(app, 10) == {large: 10} and roles(app)["canary"] is None
    assert counted(app, "dlopt_canary_share") == 0


def spoilt(app: Application, how: Callable[[Model], Any]) -> None:
    """The canary does something else with tensors from now on."""
    canary = app.models.find("digits", "2")
    canary.predictor = how(canary)  # type: ignore[assignment]


def fails(model: Model) -> Any:
    def never(tensors: Any) -> np.ndarray:
        raise RuntimeError("out of order")

    return never


def dawdles(model: Model) -> Any:
    whole = model.predictor

    def slow(tensors: Any) -> np.ndarray:
        time.sleep(0.03)
        return whole(tensors)

    return slow


def lost(model: Model) -> Any:
    return lambda tensors: np.full((len(tensors["image"]), 10), np.nan, np.float32)


@pytest.mark.parametrize(
    ("how", "limits", "why"),
    [
        (fails, {}, "errors: 100.0% of its requests failed, 0.0% of the others"),
        (lost, {}, "errors: 100.0% of its requests failed"),
        (dawdles, {"latency": 2}, "latency: nine of ten requests took"),
        (lambda model: model.predictor, {"disagreement": 0.3}, "disagreement: "),
        (lambda model: model.predictor, {}, ""),
    ],
)
def test_a_bad_canary_is_taken_back_by_itself_and_no_request_fails(home: Path, how: Any, limits: dict[str, float], why: str) -> None:
    app = application(home)
    deploy(app, home, "larger", canary=25, limits={"requests": 5, "latency": 1e6, **limits})  # a busy machine is slow as well
    spoilt(app, how)
    answered(app, 30)
    asyncio.run(app.models.follow())
    log = ask(app, "GET", "/admin/log").json()["log"]
    if not why:
        assert roles(app)["canary"] is not None and log[-1]["what"] == "deploy"
        return
    assert roles(app)["canary"] is None
    assert (log[-1]["who"], log[-1]["what"]) == ("dlopt", "rollback") and log[-1]["why"].startswith(why)
    assert counted(app, f'dlopt_rollbacks_total{{model="digits",version="2",why="{why.partition(":")[0]}"}}') == 1
    assert answered(app, 10) == {digest_of(home): 10}


def test_a_canary_of_another_signature_refuses_what_the_other_version_takes_and_is_taken_back(home: Path) -> None:
    app = application(home)
    deploy(app, home, "late", canary=50, limits={"requests": 5, "latency": 1e6})
    assert answered(app, 20) == {digest_of(home): 20}
    wrong = ask(app, "POST", PREDICT, json={"instances": [{"picture": 1}]})
    assert (wrong.status_code, error_of(wrong)) == (400, "row 0: has no column 'image'")
    asyncio.run(app.models.follow())
    assert roles(app)["canary"] is None


def test_mistakes_of_clients_say_nothing_of_a_canary(home: Path) -> None:
    app = application(home)
    deploy(app, home, "larger", canary=50, limits={"requests": 5, "latency": 1e6})
    for _ in range(12):
        assert ask(app, "POST", PREDICT, json={"instances": [{"picture": 1}]}).status_code == 400
    asyncio.run(app.models.follow())
    assert roles(app)["canary"] is not None
    trial = app.models.trial_of("digits")
    assert trial and not trial.canary.done and not trial.canary.waiting


def test_a_failing_canary_is_no_reason_to_be_called_not_ready(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dlopt.serve.models.model.FRESH_SECONDS", -1.0)
    app = application(home)
    deploy(app, home, "larger", canary=1)
    spoilt(app, fails)
    assert ask(app, "GET", "/readyz").status_code == 200
    deploy(app, home, "larger")
    assert ask(app, "GET", "/readyz").status_code == 503


def test_a_shadow_is_asked_and_never_heard(home: Path) -> None:
    app = application(home)
    deploy(app, home, "larger", shadow=True)
    small = digest_of(home)
    assert answered(app, 40) == {small: 40} and roles(app)["shadow"] == "2"
    one, other = (app.models.find("digits", version) for version in ("1", "2"))
    pairs = [(one.predictor({"image": image[None, ..., None]}), other.predictor({"image": image[None, ..., None]})) for image in IMAGES]
    agreed = sum(int(mine.argmax() == yours.argmax()) for mine, yours in pairs)
    start = 'dlopt_trial_total{kind="shadow",model="digits",outcome='
    assert (counted(app, f'{start}"agreed"'), counted(app, f'{start}"disagreed"')) == (agreed, 40 - agreed)
    spoilt(app, fails)
    assert answered(app, 5) == {small: 5} and counted(app, f'{start}"failed"') == 5
    ask(app, "POST", "/admin/rollback", json={})
    assert roles(app)["shadow"] is None


def test_what_cannot_be_loaded_changes_nothing(home: Path, tmp_path: Path) -> None:
    app = application(home)
    damaged = make_export(tmp_path, hidden=7)
    run(tmp_path, "damaged", damaged)
    (damaged.path / "model.onnx").write_bytes(b"x" * (damaged.path / "model.onnx").stat().st_size)
    assert "content differs from its seal" in error_of(deploy(app, tmp_path, "damaged"))
    assert "neither a run's folder nor the name of a job" in error_of(deploy(app, tmp_path, "none"))
    assert "share: unknown key" in error_of(ask(app, "POST", "/admin/deploy", json={"run": "x", "share": 3}))
    assert error_of(ask(app, "POST", "/admin/deploy", json={"run": "x", "canary": 101})).startswith("canary: ")
    assert "version 1 of digits is another model" in error_of(deploy(app, home, "larger", version=1))
    assert ask(app, "POST", "/admin/deploy", content="{}").status_code == 415
    assert (ask(app, "GET", "/admin/deploy").status_code, ask(app, "GET", "/admin/x").status_code) == (405, 404)
    assert len(ask(app, "GET", "/admin/log").json()["log"]) == 1 and answered(app) == {digest_of(home): 1}


def test_only_an_admin_changes_what_is_served_and_the_log_says_who(home: Path) -> None:
    keys = (Key.of("an-admins-key"), Key(digest("a-named-key"), name="ann"), Key(digest("a-users-key"), "predict"))
    app = application(home, keys=keys)
    for path in ("models", "log"):
        assert ask(app, "GET", f"/admin/{path}", headers={"X-API-Key": "a-users-key"}).status_code == 403
    for path in ("deploy", "rollback"):
        assert ask(app, "POST", f"/admin/{path}", headers={"X-API-Key": "a-users-key"}, json={}).status_code == 403
        assert ask(app, "POST", f"/admin/{path}", json={}).status_code == 401
    body = {"run": str(home / "larger"), "name": "digits"}
    for key in ("an-admins-key", "a-named-key"):
        assert ask(app, "POST", "/admin/deploy", headers={"X-API-Key": key}, json=body).status_code == 200
    log = ask(app, "GET", "/admin/log", headers={"X-API-Key": "a-named-key"}).json()["log"]
    assert [line["who"] for line in log] == ["dlopt", digest("an-admins-key")[:8], "ann"]


def test_replicas_follow_each_other_and_a_later_start_goes_on(home: Path, tmp_path: Path) -> None:
    one, other = (application(home, tmp_path / "board") for _ in range(2))
    deploy(one, home, "larger")
    large = digest_of(home, 200)
    assert answered(one) == {large: 1}
    asyncio.run(other.models.follow())
    assert answered(other) == {large: 1}
    assert ask(other, "POST", "/v2/repository/models/digits/unload").status_code == 200
    asyncio.run(one.models.follow())
    assert ask(one, "POST", PREDICT, json={"instances": [BLACK]}).status_code == 404
    before = one.models.find("digits", "2") if "digits" in one.models.names() else None
    assert before is None and ask(one, "POST", "/v2/repository/models/digits/load").status_code == 200
    asyncio.run(other.models.follow())
    assert answered(application(home, tmp_path / "board")) == answered(other) == {large: 1}
    lines = [json.loads(line)["what"] for line in (tmp_path / "board" / "log.jsonl").read_text().splitlines()]
    assert lines == ["start", "deploy", "unload", "load"]
    fresh = application_for([Entry.of(make_export(home, hidden=300), "digits", Serve())], Serve(), board=tmp_path / "board")
    assert answered(fresh) == {digest_of(home, 300): 1}  # started with another model: what was deployed before is over


def test_an_app_follows_by_itself(home: Path, tmp_path: Path) -> None:
    one, other = (application(home, tmp_path / "board") for _ in range(2))

    async def follow() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(other), base_url="http://test") as client:
            await client.get("/healthz")
            body = {"run": str(home / "larger"), "name": "digits"}
            async with httpx.AsyncClient(transport=httpx.ASGITransport(one), base_url="http://test") as first:
                assert (await first.post("/admin/deploy", json=body)).status_code == 200
            deadline = time.monotonic() + 20 * FOLLOW_SECONDS
            while (await client.get("/v1/models/digits")).json()["model_version_status"][-1]["version"] != "2":
                assert time.monotonic() < deadline
                await asyncio.sleep(0.05)

    asyncio.run(follow())


def test_versions_are_kept_as_long_as_something_stands_for_them(home: Path) -> None:
    entry = Entry.of(make_export(home), "m", Serve())
    state = begun([entry])
    for number in range(2, 6):
        state = deployed(state, "m", str(number), Version(path="/x", digest=str(number)), ["latest"])
    lineup = state.models["m"]
    assert (lineup.default, list(lineup.versions), lineup.labels) == ("5", ["1", "4", "5"], {"latest": "5"})
    state = deployed(state, "m", "6", Version(path="/x", digest="6"), canary=Canary(version="6", share=5, limits=Limits()))
    assert "6" in state.models["m"].versions and "6" not in rolled_back(state, "m").models["m"].versions
    assert rolled_back(rolled_back(state, "m"), "m").models["m"].default == "4"
    assert (
        version_of(state, "m", "4", None) == "4" and version_of(state, "m", "new", None) == "7" and version_of(state, "n", "x", None) == "1"
    )
    with pytest.raises(DloptError, match="there is no model 'x'; there is m"):
        rolled_back(state, "x")


def test_replicas_that_see_the_same_take_a_canary_back_once(home: Path, tmp_path: Path) -> None:
    apps = [application(home, tmp_path / "board") for _ in range(2)]
    deploy(apps[0], home, "larger")
    deploy(apps[0], home, "largest", canary=50, limits={"requests": 5})
    asyncio.run(apps[1].models.follow())
    for app in apps:
        canary = app.models.find("digits", "3")
        canary.predictor = fails(canary)  # type: ignore[assignment]
        task_free(app)
    for app in apps:
        asyncio.run(app.models.follow())
    asyncio.run(apps[0].models.follow())
    assert [roles(app)["default"] for app in apps] == ["2", "2"] and roles(apps[0])["canary"] is None
    lines = [json.loads(line)["what"] for line in (tmp_path / "board" / "log.jsonl").read_text().splitlines()]
    assert lines.count("rollback") == 1


def task_free(app: Application) -> None:
    """Twenty requests, before the app has looked at what came of them."""
    follow, app.models.follow = app.models.follow, _nothing  # type: ignore[method-assign]
    answered(app, 20)
    app.models.follow = follow  # type: ignore[method-assign]


async def _nothing() -> None:
    pass


def test_a_rate_holds_over_all_replicas(tmp_path: Path) -> None:
    key = Key(digest("a-key-with-a-rate"), rate=5.0)
    guards = [Guard((key, Key.of("another-key")), rate=2.0, shared=tmp_path / "rates") for _ in range(2)]
    let_in = 0
    for number in range(40):
        try:
            guards[number % 2].admit({b"x-api-key": b"a-key-with-a-rate"}, b"")
            let_in += 1
        except Exception as error:
            assert "this key may send 5 requests a second" in str(error)
    assert 5 <= let_in <= 7
    assert guards[0].admit({b"x-api-key": b"another-key"}, b"") is not None


def test_the_commands_say_what_became_of_it(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    app = application(home)
    small, large = digest_of(home), digest_of(home, 200)

    def said(*words: str) -> str:
        assert main([*words]) == 0
        return capsys.readouterr().out

    with listening(app) as url:
        words = ("deploy", "larger", url, "--home", str(home), "--name", "digits")
        assert said(*words, "--canary", "10", "--most-latency", "3") == f"digits: version 2 ({large}) gets 10 % of the requests\n"
        shown = said("models", url).splitlines()
        assert shown[:2] == [f"digits 1  {small}  answers", f"digits 2  {large}  canary, 10 %"]
        assert shown[2].startswith("digits: canary 0 requests, 0.0% failed")
        assert json.loads(said("models", url, "--json"))["models"]["digits"]["canary"]["limits"]["latency"] == 3
        assert said(*words, "--label", "champion") == f"digits: version 2 ({large}) answers now\n"
        assert said("models", url).splitlines() == [f"digits 1  {small}  -", f"digits 2  {large}  answers, champion"]
        assert said("rollback", url) == "digits: version 1 answers\n"
        assert said("models", url, "--log").splitlines()[-1].endswith("  -  rollback  model digits")
        assert main(["rollback", url]) == 2
        assert "there is nothing to go back to" in capsys.readouterr().err
