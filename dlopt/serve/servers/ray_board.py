"""The state of a server whose replicas are on several machines: an actor of Ray holds it, and the log of who changed what."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from dlopt.serve.models.board import Board, Line
from dlopt.serve.models.lineup import State
from dlopt.serve.watch.metrics import Family, Told

NAMESPACE = "dlopt"


class RayBoard(Board):
    """In an actor, which lives as long as its cluster, or until `close`; when its machine is lost, whoever asks next starts another with
    what it knows."""

    far = True

    def __init__(self, name: str, state: State) -> None:
        """name: of the application, of which a cluster has one."""
        self.name, self.last = f"board of {name}", state
        self.told: Told = {}

    def read(self, seen: int) -> State | None:
        """The state, unless it is the one of this revision."""
        found: State | None = self._asked("read", seen)
        self.last = found or self.last
        return found

    def now(self) -> State:
        """The state as it is."""
        self.last = self._asked("now")
        return self.last

    def change(self, how: Callable[[State], State], who: str, what: str, **about: Any) -> State:
        """Make the next state of the one that is there, and note it. Raises what `how` does; then nothing has changed."""
        self.last = self._asked("change", how, who, what, **about)
        return self.last

    def lines(self) -> list[Line]:
        """The last ones of the log."""
        return list(self._asked("lines"))

    def tell(self, host: str, moment: float, found: list[Family]) -> Told:
        """Note what a host has counted, and what all hosts have."""
        self.told = self._asked("tell", host, moment, found)
        return self.told

    def close(self) -> None:
        """End the actor."""
        ray.kill(self._actor())

    def _asked(self, method: str, *words: Any, **about: Any) -> Any:
        for tries_left in (1, 0):
            try:
                return ray.get(getattr(self._actor(), method).remote(*words, **about))
            except RayTaskError as error:
                raise error.cause from None
            except RayActorError:
                if not tries_left:
                    raise
        raise AssertionError

    def _actor(self) -> Any:
        options = {"name": self.name, "namespace": NAMESPACE, "lifetime": "detached", "get_if_exists": True, "num_cpus": 0}
        return ray.remote(Board).options(**options).remote(self.last, self.told)
