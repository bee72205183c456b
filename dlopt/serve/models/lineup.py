"""What is served under each name: versions, the one that answers, labels, a canary, a shadow. All of it is one value, which replicas
follow; each change makes another of it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from dlopt.artifact import Artifact
from dlopt.part import DloptError, Part
from dlopt.serve import Serve


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
    profile: Path | None = None
    """What training rows look like, which drift is measured against."""

    @classmethod
    def of(cls, export: Artifact, name: str, section: Serve) -> Entry:
        """The only version."""
        return cls(export.path.resolve(), name, section)


class Limits(Part):
    """When a canary is taken back by itself."""

    requests: int = Field(50, ge=1)
    """Requests that a canary has had before it is judged."""
    errors: float = Field(0.02, ge=0, le=1)
    """Share of its requests that may fail, beyond those of the version that serves."""
    latency: float = Field(2.0, gt=1)
    """How many times as long as the version that serves it may take, for nine of ten requests."""
    disagreement: float = Field(1.0, ge=0, le=1)
    """Share of its answers that may differ from those of the version that serves; 1 is any."""


class Version(Part):
    """Where a model's files are."""

    path: str
    """Of the export."""
    digest: str
    section: Serve = Serve()
    profile: str | None = None
    """The file of the profile of the training rows, if there is one."""
    loads: int = 0
    """How often it was to be loaded anew."""
    pinned: bool = False
    """Whether it is served until somebody unloads it, though no name, label or trial needs it."""


class Canary(Part):
    """A version that gets a part of the requests of its name."""

    version: str
    share: float = Field(gt=0, le=100)
    """Per cent of the requests."""
    limits: Limits = Limits()


class Lineup(Part):
    """What is served under a name."""

    versions: dict[str, Version]
    default: str
    """The version that answers for the name alone."""
    before: tuple[str, ...] = ()
    """Those that did so before, the last one last."""
    labels: dict[str, str] = {}
    """Label to version."""
    canary: Canary | None = None
    shadow: str | None = None
    """A version that is asked as well, and whose answers nobody gets."""
    loaded: bool = True

    def needed(self) -> set[str]:
        """Versions that something stands for."""
        found = {self.default, *self.labels.values(), *self.before[-1:]}
        found |= {version for version, one in self.versions.items() if one.pinned}
        return found | ({self.canary.version} if self.canary else set()) | ({self.shadow} if self.shadow else set())

    def trimmed(self) -> Lineup:
        """Without versions that nothing stands for."""
        kept = {version: one for version, one in self.versions.items() if version in self.needed()}
        return self.model_copy(update={"versions": kept})


class State(Part):
    """All names; a change has the next revision."""

    revision: int = 0
    begun: str = ""
    """A digest of what the server was started with."""
    models: dict[str, Lineup] = {}

    def with_lineup(self, name: str, lineup: Lineup) -> State:
        """The same with another line-up of a name."""
        return self.model_copy(update={"models": self.models | {name: lineup.trimmed()}})

    def lineup(self, name: str) -> Lineup:
        """Of a name. Raises DloptError."""
        if name not in self.models:
            raise DloptError(f"there is no model {name!r}; there is {', '.join(self.models) or 'none'}")
        return self.models[name]


def version_from(entry: Entry, export: Artifact) -> Version:
    """What is to be loaded."""
    profile = str(entry.profile) if entry.profile else None
    return Version(path=str(entry.path), digest=export.manifest.digest, section=entry.section, profile=profile)


def begun(entries: Sequence[Entry]) -> State:
    """What a server starts with."""
    models: dict[str, Lineup] = {}
    for entry in entries:
        export = Artifact.open(entry.path)
        version = version_from(entry, export).model_copy(update={"pinned": True})
        there = models.get(entry.name)
        labels = dict.fromkeys(entry.labels, entry.version)
        if there is None:
            models[entry.name] = Lineup(versions={entry.version: version}, default=entry.version, labels=labels)
            continue
        default = entry.version if entry.default else there.default
        changed = {"versions": there.versions | {entry.version: version}, "default": default, "labels": there.labels | labels}
        models[entry.name] = there.model_copy(update=changed)
    state = State(models=models)
    return state.model_copy(update={"begun": hashlib.sha256(state.model_dump_json().encode()).hexdigest()[:16]})


def deployed(
    state: State, name: str, version: str, made: Version, labels: Sequence[str] = (), canary: Canary | None = None, shadow: bool = False
) -> State:
    """A version that answers from now on, or is tried as a canary or a shadow."""
    there = state.models.get(name)
    if there is None:
        return state.with_lineup(name, Lineup(versions={version: made}, default=version, labels=dict.fromkeys(labels, version)))
    changed = {"versions": there.versions | {version: made}, "labels": there.labels | dict.fromkeys(labels, version), "loaded": True}
    if canary is not None or shadow:
        if version == there.default:
            raise DloptError(f"version {version} of {name} answers already: nothing is left to try")
        changed |= {"canary": canary or there.canary, "shadow": version if shadow else there.shadow}
    else:
        before = there.before if there.default == version else (*there.before, there.default)[-8:]
        changed |= {"default": version, "before": before, "canary": None, "shadow": None if there.shadow == version else there.shadow}
    return state.with_lineup(name, there.model_copy(update=changed))


def rolled_back(state: State, name: str) -> State:
    """Without the canary that is being tried, or else with the version that answered before. Raises DloptError when there is neither."""
    there = state.lineup(name)
    if there.canary is not None:
        return state.with_lineup(name, there.model_copy(update={"canary": None}))
    if there.shadow is not None:
        return state.with_lineup(name, there.model_copy(update={"shadow": None}))
    left = [version for version in there.before if version in there.versions]
    if not left:
        raise DloptError(f"{name}: there is nothing to go back to: version {there.default} is the first")
    return state.with_lineup(name, there.model_copy(update={"default": left[-1], "before": tuple(left[:-1])}))


def taken_back(state: State, name: str, canary: Canary) -> State:
    """Without this canary. Raises DloptError when it is not there any more: another replica has seen the same."""
    there = state.lineup(name)
    if there.canary != canary:
        raise DloptError(f"{name}: version {canary.version} is no canary any more")
    return state.with_lineup(name, there.model_copy(update={"canary": None}))


def version_of(state: State, name: str, digest: str, version: int | None) -> str:
    """The number for an export: what was asked for, what it has already, or the next one. Raises DloptError when it is taken."""
    there = state.models.get(name)
    versions = there.versions if there else {}
    if version is not None:
        if str(version) in versions and versions[str(version)].digest != digest:
            raise DloptError(f"version {version} of {name} is another model: give another number, or none")
        return str(version)
    same = [number for number, one in versions.items() if one.digest == digest]
    return same[-1] if same else str(max(map(int, versions), default=0) + 1)
