"""The models that one app serves, by name and version. A model that is replaced or unloaded goes on with the requests it has."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dlopt.artifact import Artifact
from dlopt.serve import Serve
from dlopt.serve.exchange import Refusal
from dlopt.serve.models.model import Model
from dlopt.serve.watch.metrics import Registry


@dataclass(frozen=True)
class Entry:
    """One version of a model, to be loaded wherever it is served."""

    path: Path
    """Of the export."""
    name: str
    section: Serve
    version: str = "1"
    labels: tuple[str, ...] = ()
    default: bool = True
    """Whether it answers for its name alone; the last one that does."""

    @classmethod
    def of(cls, export: Artifact, name: str, section: Serve) -> Entry:
        """The only version."""
        return cls(export.path.resolve(), name, section)

    def load(self, counts: Registry) -> Model:
        """Its files checked against their seal. Raises DloptError."""
        return Model(Artifact.open(self.path), self.name, self.section, counts, self.version)


class Models:
    """Names to versions to models; a name alone is its newest version, unless another is the default."""

    def __init__(self, *models: Model) -> None:
        self._versions: dict[str, dict[str, Model]] = {}
        self._defaults: dict[str, str] = {}
        self._labels: dict[str, dict[str, str]] = {}
        self.sources: dict[str, Callable[[], list[tuple[Entry, Model]]]] = {}
        """What loads a model's versions again, by its name; takes its time, and is called in a thread."""
        self.only: Model | None = None
        """The one that is served, when it is one."""
        for model in models:
            self.add(model)

    def __iter__(self) -> Iterator[Model]:
        for versions in self._versions.values():
            yield from versions.values()

    def add(self, model: Model, labels: tuple[str, ...] = (), default: bool = True) -> None:
        """Serve a model from now on, in place of one of the same name and version."""
        versions = self._versions.setdefault(model.name, {})
        if (before := versions.get(model.version)) and before is not model:
            before.close()
        versions[model.version] = model
        if default or model.name not in self._defaults:
            self._defaults[model.name] = model.version
        for label in labels:
            self._labels.setdefault(model.name, {})[label] = model.version
        self._count()

    def remove(self, name: str, version: str | None = None) -> list[Model]:
        """Serve a model, or one version of it, no longer; what it was. Raises Refusal."""
        versions = self._versions.get(name, {})
        gone = [model for model in versions.values() if version in (None, model.version)]
        if not gone:
            raise not_there(name, version)
        for model in gone:
            del versions[model.version]
        if not versions:
            del self._versions[name], self._defaults[name]
        elif self._defaults[name] not in versions:
            self._defaults[name] = max(versions, key=int)
        self._labels[name] = {label: its for label, its in self._labels.get(name, {}).items() if its in versions}
        self._count()
        return gone

    async def load(self, name: str) -> None:
        """Load a model anew, and switch to what was loaded when it answers: nobody waits for it. Raises Refusal, or what loading does."""
        if name not in self.sources:
            raise not_there(name, None)
        for entry, model in await asyncio.to_thread(self.sources[name]):
            self.add(model, entry.labels, entry.default)

    def unload(self, name: str) -> None:
        """Answer for a model no longer; requests that it has go on to their end. Raises Refusal."""
        for model in self.remove(name):
            model.close()

    def unloaded(self) -> list[str]:
        """Names of models that could be loaded."""
        return [name for name in self.sources if name not in self._versions]

    def find(self, name: str, version: str | None = None, label: str | None = None) -> Model:
        """The model that a client asks for. Raises Refusal in TensorFlow Serving's words."""
        if label is not None and (version := self._labels.get(name, {}).get(label)) is None:
            raise Refusal(400, f"Unrecognized servable version label: {label[:100]}", "model")
        try:
            return self._versions[name][version or self._defaults[name]]
        except KeyError:
            raise not_there(name, version) from None

    def names(self) -> list[str]:
        """Of the models, in the order in which they came."""
        return list(self._versions)

    def versions(self, name: str) -> list[Model]:
        """All versions of a model. Raises Refusal."""
        if name not in self._versions:
            raise not_there(name, None)
        return list(self._versions[name].values())

    def _count(self) -> None:
        models = list(self)
        self.only = models[0] if len(models) == 1 else None


def loaded(entries: Sequence[Entry], counts: Registry) -> Models:
    """All of them, each of which may be unloaded and loaded again by its name. Raises DloptError."""
    models = Models()
    for entry in entries:
        models.add(entry.load(counts), entry.labels, entry.default)
    for name in models.names():
        mine = [entry for entry in entries if entry.name == name]
        models.sources[name] = lambda mine=mine: [(entry, entry.load(counts)) for entry in mine]  # type: ignore[misc]
    return models


def not_there(name: str, version: str | None) -> Refusal:
    """What a client hears of a model that is not served."""
    which = f"Latest({name[:100]})" if version is None else f"Specific({name[:100]}, {version[:20]})"
    return Refusal(404, f"Servable not found for request: {which}", "model")
