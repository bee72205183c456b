"""What is served, and changing it meanwhile: deploy, canary, shadow, labels, roll back; and the log of who did what. For admin keys."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from pydantic import Field
from pydantic_core import from_json

from dlopt.artifact import Artifact
from dlopt.docstrings import descriptions
from dlopt.part import DloptError, Part
from dlopt.serve.exchange import Call, Handler, Json, Refusal, Reply, json_reply
from dlopt.serve.models.lineup import Canary, Limits, State, deployed, rolled_back, version_from, version_of
from dlopt.serve.models.model import Model
from dlopt.serve.models.plan import entries_of

NAME = "admin"
OPEN: tuple[str, ...] = ()


class Deploy(Part):
    """What is to be served."""

    run: str
    """A run's folder as the server sees it, or a job's name for its newest run."""
    home: str = "runs"
    """Where a job's runs are."""
    name: str | None = Field(None, pattern=r"^[A-Za-z0-9._-]+$")
    """What clients call the model; the job's name without it."""
    version: int | None = Field(None, ge=1)
    """Its number; the next one without it, or the one that it has."""
    labels: tuple[str, ...] = ()
    """Names of this version, taken from others that have them."""
    canary: float | None = Field(None, gt=0, le=100)
    """Per cent of the requests that it gets, until it is deployed without this, or taken back; without it, it answers all."""
    limits: Limits = Limits()
    """When a canary is taken back by itself."""
    shadow: bool = False
    """Whether it is asked as well, and nobody gets its answers."""


class RollBack(Part):
    """What is to be taken back."""

    name: str | None = None
    """The model, where there are several."""


def route(method: str, path: str) -> Handler | None:
    """What answers /admin/... Raises Refusal."""
    if not path.startswith("/admin/"):
        return None
    wanted, handler = PATHS.get(path, ("", None))
    if handler is None:
        raise Refusal(404, f"Not found: {path[:200]}", "path")
    if method != wanted:
        raise Refusal(405, f"Method not allowed: {method[:20]}; use {wanted}")

    async def answer(call: Call) -> Reply:
        call.needs_admin()
        return await handler(call)

    return answer


async def _models(call: Call) -> Reply:
    """Every version, what it is there for, and how a trial stands, which this replica may be yet to begin."""
    state = await call.models.ask_board(call.models.board.now)
    return json_reply({"revision": state.revision, "models": {name: _told(call, state, name) for name in state.models}})


def _told(call: Call, state: State, name: str) -> Json:
    there = state.models[name]
    trial = call.models.trial_of(name)
    found: Json = {
        "loaded": there.loaded,
        "default": there.default,
        "before": list(there.before),
        "labels": there.labels,
        "shadow": there.shadow,
        "canary": there.canary.model_dump() if there.canary else None,
        "versions": {version: {"digest": one.digest, "path": one.path} for version, one in there.versions.items()},
    }
    if trial is not None:
        pairs = (("canary", trial.canary), ("others", trial.stable))
        found["trial"] = {
            which: {"requests": len(some.done), "errors": round(some.errors, 4), "p90_ms": round(1e3 * some.seconds(), 3)}
            for which, some in pairs
        } | {"compared": len(trial.agreed), "disagreed": trial.agreed.count(False)}
    return found


async def _log(call: Call) -> Reply:
    return json_reply({"log": await call.models.ask_board(call.models.board.lines)})


async def _deploy(call: Call) -> Reply:
    given = await _given(call, Deploy)
    state = call.models.state
    entries, _ = await asyncio.to_thread(entries_of, given.run, Path(given.home))
    if len(entries) != 1:
        raise DloptError(f"{given.run}: holds {len(entries)} models: deploy one run at a time")
    export, name = Artifact.open(entries[0].path), given.name or entries[0].name
    made = version_from(entries[0], export)
    number = version_of(state, name, made.digest, given.version)
    canary = Canary(version=number, share=given.canary, limits=given.limits) if given.canary is not None else None

    def how(state: State) -> State:
        there = state.models.get(name)
        kept = there.versions[number] if there and number in there.versions else made
        return deployed(state, name, number, kept, given.labels, canary, given.shadow)

    about: dict[str, Any] = {"model": name, "version": number, "digest": made.digest}
    about |= {"canary": given.canary} if canary else {}
    about |= {"shadow": True} if given.shadow else {}
    about |= {"labels": list(given.labels)} if given.labels else {}
    await call.models.change(how, call.who, "deploy", **about)
    return json_reply(about)


async def _roll_back(call: Call) -> Reply:
    given = await _given(call, RollBack)
    state = call.models.state
    name = given.name or (next(iter(state.models)) if len(state.models) == 1 else None)
    if name is None:
        raise DloptError(f"name: say which model: {', '.join(state.models)}")
    changed = await call.models.change(lambda state: rolled_back(state, name), call.who, "rollback", model=name)
    return json_reply({"model": name, "default": changed.models[name].default})


PATHS: dict[str, tuple[str, Handler]] = {
    "/admin/models": ("GET", _models),
    "/admin/log": ("GET", _log),
    "/admin/deploy": ("POST", _deploy),
    "/admin/rollback": ("POST", _roll_back),
}


async def _given(call: Call, kind: type[Any]) -> Any:
    """What the body says. A page of another site could send any other type of content without asking. Raises Refusal or DloptError."""
    if call.content_type != "application/json":
        raise Refusal(415, "Content-Type: send application/json")
    try:
        found = from_json(await call.read())
    except ValueError as error:
        raise Refusal(400, f"JSON Parse error: {str(error)[:200]}") from None
    return kind.validated(found)


def describe(model: Model) -> Json:
    """The paths, which are the same whatever is served."""
    said = {"tags": ["Administration"], "responses": {"200": {"description": "OK"}, "default": {"$ref": "#/components/responses/Error"}}}
    gets = {"/admin/models": "What is served, and how trials stand", "/admin/log": "Who changed what"}
    posts: dict[str, tuple[str, type[Part]]] = {
        "/admin/deploy": ("Serve a run", Deploy),
        "/admin/rollback": ("Take back the last change", RollBack),
    }
    found: Json = {path: {"get": {"summary": text} | said} for path, text in gets.items()}
    for path, (text, kind) in posts.items():
        fields = {field: {"description": text} for field, text in descriptions(kind).items()}
        body = {"required": True, "content": {"application/json": {"schema": {"type": "object", "properties": fields}}}}
        found[path] = {"post": {"summary": text, "requestBody": body} | said}
    return found
