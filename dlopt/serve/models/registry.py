"""The models that one app serves, by name and version, as the state says that all replicas follow. A model that is replaced or unloaded
goes on with the requests it has."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from dlopt.artifact import Artifact
from dlopt.part import DloptError, Signature
from dlopt.serve.exchange import Answer, Call, Refusal, Request
from dlopt.serve.models.board import Board
from dlopt.serve.models.lineup import Canary, Lineup, State, Version, taken_back
from dlopt.serve.models.model import Model
from dlopt.serve.models.trial import Trial, agree
from dlopt.serve.watch.metrics import Registry, summed

GOLDEN = 0.6180339887498949
"""Steps of this size, around a circle, are spread as evenly as can be: a canary gets its share of any stretch of requests."""
MOST_BESIDE = 16
"""Requests that are asked of a second version at a time; more are passed over."""
logger = logging.getLogger(__name__)
Kept = TypeVar("Kept")
Parse = Callable[[bytes, Signature], tuple[Request, Kept]]
Key = tuple[str, str]


class Models:
    """Names to versions to models; a name alone is its default version, or for a share of the requests its canary."""

    def __init__(self, board: Board, counts: Registry) -> None:
        """Loads all of them. Raises DloptError."""
        self.board, self.counts = board, counts
        self.state = State(revision=-1)
        self._live: dict[Key, tuple[Version, Model]] = {}
        self._turns: dict[str, float] = {}
        self._trials: dict[str, Trial] = {}
        self._beside: set[asyncio.Task[None]] = set()
        self.only: Model | None = None
        """The one that is served, when it is one."""
        if (state := board.read(-1)) is not None:
            self._take(state, self._loaded(state))

    def __iter__(self) -> Iterator[Model]:
        return (model for _, model in list(self._live.values()))

    async def follow(self) -> None:
        """Take over what another replica has changed; and a canary back that fails. Raises nothing: what serves goes on."""
        try:
            if (state := await self.ask_board(self.board.read, self.state.revision)) is not None:
                found = await asyncio.to_thread(self._loaded, state)
                if state.revision > self.state.revision:  # nobody has changed more meanwhile
                    self._take(state, found)
            for model in self:
                model.tell_drift()
            if self.board.far:
                await self.ask_board(self.board.tell, *self.counts.told())
            for name, trial in list(self._trials.items()):
                canary = self.state.models[name].canary
                if canary is not None and (why := trial.verdict()):
                    await self._take_back(name, canary, why)
        except Exception:
            logger.exception("the state of the models could not be followed")

    async def _take_back(self, name: str, canary: Canary, why: str) -> None:
        with suppress(DloptError):  # another replica has done so
            await self.change(
                partial(taken_back, name=name, canary=canary), "dlopt", "rollback", model=name, version=canary.version, why=why
            )
            self.counts.rollbacks.labels(name, canary.version, why.partition(":")[0]).inc()
            logger.warning("%s: its canary was taken back: %s", name, why)

    async def change(self, how: Callable[[State], State], who: str, what: str, **about: Any) -> State:
        """Change what is served, here at once and elsewhere soon. What cannot be loaded changes nothing. Raises DloptError or Refusal."""
        tried = how(await self.ask_board(self.board.now))
        found = await asyncio.to_thread(self._loaded, tried)
        state = await self.ask_board(partial(self.board.change, how, who, what, **about))
        self._take(state, found if state.models == tried.models else await asyncio.to_thread(self._loaded, state))
        return state

    async def exposition(self) -> bytes:
        """The text that Prometheus reads: what all replicas have counted, of all machines."""
        if not self.board.far:
            return self.counts.exposition()
        return summed(await self.ask_board(self.board.tell, *self.counts.told()))

    async def ask_board(self, function: Callable[..., Any], *words: Any) -> Any:
        """One of the board's methods, in a thread where that takes long."""
        return await asyncio.to_thread(function, *words) if self.board.far else function(*words)

    def _loaded(self, state: State) -> dict[Key, tuple[Version, Model]]:
        """The models that a state needs and that are not here. Raises DloptError."""
        return {key: (version, self._load(key, version)) for key, version in _versions(state).items() if self._lacks(key, version)}

    def _lacks(self, key: Key, version: Version) -> bool:
        return key not in self._live or self._live[key][0] != version

    def _load(self, key: Key, version: Version) -> Model:
        profile = Path(version.profile) if version.profile else None
        return Model(Artifact.open(Path(version.path)), key[0], version.section, self.counts, key[1], profile)

    def _take(self, state: State, found: dict[Key, tuple[Version, Model]]) -> None:
        """From now on, all at once."""
        before, wanted = self._live, _versions(state)
        self._live = {key: found.get(key) or before[key] for key in wanted}
        for key, (_, model) in before.items():
            if self._live.get(key, (None, None))[1] is not model:
                model.close()
        for name in {*self._trials, *state.models}:
            canary = state.models[name].canary if name in state.models else None
            old = self.state.models[name].canary if name in self.state.models else None
            if canary is None:
                self._trials.pop(name, None)
            elif old != canary or name not in self._trials:
                self._trials[name] = Trial(canary.limits)
            for one in (old, canary):
                if one is not None:
                    self.counts.canary_share.labels(name, one.version).set(one.share if one is canary else 0)
        self.state = state
        models = list(self)
        self.only = models[0] if len(models) == 1 else None

    async def load(self, name: str, who: str = "") -> None:
        """Load a model anew, and switch to what was loaded when it answers: nobody waits for it. Raises Refusal, or what loading does."""
        self._known(name)

        def how(state: State) -> State:
            there = state.lineup(name)
            again = {version: one.model_copy(update={"loads": one.loads + 1}) for version, one in there.versions.items()}
            return state.with_lineup(name, there.model_copy(update={"loaded": True, "versions": again}))

        await self.change(how, who, "load", model=name)

    async def unload(self, name: str, who: str = "") -> None:
        """Answer for a model no longer; requests that it has go on to their end. Raises Refusal."""
        self._lineup(name)
        await self.change(
            lambda state: state.with_lineup(name, state.lineup(name).model_copy(update={"loaded": False})), who, "unload", model=name
        )

    def unloaded(self) -> list[str]:
        """Names of models that could be loaded."""
        return [name for name, lineup in self.state.models.items() if not lineup.loaded]

    def find(self, name: str, version: str | None = None, label: str | None = None, predicting: bool = False) -> Model:
        """The model that a client asks for. predicting: whether it may be the canary. Raises Refusal in TensorFlow Serving's words."""
        if label is not None and (version := self.state.models[name].labels.get(label) if name in self.state.models else None) is None:
            raise Refusal(400, f"Unrecognized servable version label: {label[:100]}", "model")
        lineup = self._lineup(name)
        if version is None:
            version = lineup.default
            if predicting and lineup.canary is not None:
                turn = self._turns[name] = (self._turns.get(name, 0.0) + GOLDEN) % 1.0
                version = lineup.canary.version if turn < lineup.canary.share / 100 else version
        try:
            return self._live[name, version][1]
        except KeyError:
            raise not_there(name, version) from None

    def answering(self) -> list[Model]:
        """All but those on trial, whose failing is no reason to send requests elsewhere."""
        found = []
        for name in self.names():
            lineup = self.state.models[name]
            trials = {lineup.shadow, lineup.canary.version if lineup.canary else None} - {lineup.default}
            found += [self._live[name, version][1] for version in lineup.versions if version not in trials]
        return found

    def names(self) -> list[str]:
        """Of the models, in the order in which they came."""
        return [name for name, lineup in self.state.models.items() if lineup.loaded]

    def versions(self, name: str) -> list[Model]:
        """All versions of a model. Raises Refusal."""
        return [self._live[name, version][1] for version in self._lineup(name).versions]

    def trial_of(self, name: str) -> Trial | None:
        """The one that a canary is on."""
        return self._trials.get(name)

    def predict(self, call: Call, model: Model, body: bytes, parse: Parse[Kept], images: int) -> Coroutine[Any, Any, tuple[Answer, Kept]]:
        """What a model says to a body (see `Model.predict`); where a version is on trial, what comes of that is noted."""
        lineup = self.state.models.get(model.name)
        if lineup is None or (lineup.canary is None and lineup.shadow is None):
            return model.predict(body, parse, images)
        return self._tried(call, model, lineup, body, parse, images)

    async def _tried(self, call: Call, model: Model, lineup: Lineup, body: bytes, parse: Parse[Kept], images: int) -> tuple[Answer, Kept]:
        trial, stable = self._trials.get(model.name), self._live[model.name, lineup.default][1]
        if trial and lineup.canary and model.version == lineup.canary.version:
            return await self._by_canary(call, trial, model, stable, body, parse, images)
        number = trial.stable.begin() if trial else 0
        try:
            found = await model.predict(body, parse, images)
        except BaseException as error:
            if trial:
                _judged(trial.stable, number, error)
            raise
        if trial:
            trial.stable.end(number, False)
        if lineup.shadow is not None and model is stable:
            self._compare(self._live[model.name, lineup.shadow][1], found[0], body, parse, images, "shadow")
        return found

    async def _by_canary(
        self, call: Call, trial: Trial, canary: Model, stable: Model, body: bytes, parse: Parse[Kept], images: int
    ) -> tuple[Answer, Kept]:
        """Where the canary fails, the version that serves answers instead, unless it refuses the request, too."""
        number = trial.canary.begin()
        try:
            found = await canary.predict(body, parse, images)
        except Exception as error:
            call.model = stable
            try:
                found = await stable.predict(body, parse, images)
            except Exception:
                _judged(trial.canary, number, error)
                raise
            if not isinstance(error, (Refusal, DloptError)):
                logger.warning("%s %s failed, and %s answered", canary.name, canary.version, stable.version, exc_info=error)
            trial.canary.end(number, True)
            self.counts.trials.labels(canary.name, canary.version, "canary", "failed").inc()
            return found
        except BaseException:
            trial.canary.drop(number)
            raise
        trial.canary.end(number, False)
        self.counts.trials.labels(canary.name, canary.version, "canary", "answered").inc()
        self._compare(stable, found[0], body, parse, images, "canary", trial, canary.version)
        return found

    def _compare(
        self, other: Model, answer: Answer, body: bytes, parse: Parse[Any], images: int, kind: str, trial: Trial | None = None, of: str = ""
    ) -> None:
        """Ask another version the same, after the client has its answer, and count whether it says so, too."""
        version = of or other.version
        if len(self._beside) >= MOST_BESIDE:
            self.counts.trials.labels(other.name, version, kind, "dropped").inc()
            return

        async def ask() -> None:
            try:
                said, _ = await other.predict(body, parse, images)
                same = agree(answer, said)
            except Exception:
                self.counts.trials.labels(other.name, version, kind, "failed").inc()
                return
            if trial is not None:
                trial.agreed.append(same)
            self.counts.trials.labels(other.name, version, kind, "agreed" if same else "disagreed").inc()

        task = asyncio.get_running_loop().create_task(ask())
        self._beside.add(task)
        task.add_done_callback(self._beside.discard)

    def _lineup(self, name: str) -> Lineup:
        lineup = self.state.models.get(name)
        if lineup is None or not lineup.loaded:
            raise not_there(name, None)
        return lineup

    def _known(self, name: str) -> None:
        if name not in self.state.models:
            raise not_there(name, None)


def _versions(state: State) -> dict[Key, Version]:
    pairs = state.models.items()
    return {(name, version): one for name, lineup in pairs if lineup.loaded for version, one in lineup.versions.items()}


def _judged(requests: Any, number: int, error: BaseException) -> None:
    """Of a request that was not answered: whether that says something of the model."""
    if isinstance(error, (DloptError, asyncio.CancelledError)) or (isinstance(error, Refusal) and error.status < 500):
        requests.drop(number)
    else:
        requests.end(number, True)


def not_there(name: str, version: str | None) -> Refusal:
    """What a client hears of a model that is not served."""
    which = f"Latest({name[:100]})" if version is None else f"Specific({name[:100]}, {version[:20]})"
    return Refusal(404, f"Servable not found for request: {which}", "model")
