"""A job: its sections, and how one is read from YAML with dotted overrides. Every mistake is one line that names the field."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, Field, field_validator, model_validator

from dlopt.compress import Compression
from dlopt.data.augment import Augmentation, fill_of
from dlopt.data.kinds import kinds
from dlopt.data.section import Data
from dlopt.data.table.split import GivenSplit, TimeSplit
from dlopt.export import Format, Onnx
from dlopt.mistakes import is_part, kinds_in, tag_of
from dlopt.models import Model
from dlopt.part import PROBABILITIES, VALUES, DloptError, Part
from dlopt.serve import Serve
from dlopt.train.job import (
    Fit,
    Resources,
    Train,
    needs_validation,
    refuse_balance,
    refuse_loss,
    refuse_monitor,
    refuse_other_workers,
    refuse_threshold,
)
from dlopt.train.parallel.strategies import refuse_parallelism


class Job(Part):
    """Raw data to a served model, in one file."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Names the run's folder and the served model."""
    license: str = ""
    """Under which the model may be used, for its card: an SPDX identifier such as Apache-2.0, or words."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Initial weights, order of rows, augmentation and dropout follow from it."""
    data: Data
    """Where the rows come from, and what their columns mean."""
    augment: tuple[Augmentation, ...] = ()
    """What is done to rows in training, in this order."""
    model: Model
    """What is trained."""
    train: Train = Train()
    """How it is trained."""
    resources: Resources = Resources()
    """What the job runs on; the result does not depend on it."""
    compress: tuple[Compression, ...] = ()
    """What makes the trained model small, one after the other, before it is exported."""
    export: tuple[Format, ...] = (Onnx(),)
    """Formats of the trained model."""
    serve: Serve = Serve()
    """How the exported model is served."""

    @property
    def fit(self) -> Fit:
        """The section of the fit stage."""
        train = self.train.model_copy(update={"folds": 0})  # more models, but the same one
        return Fit(seed=self.seed, model=self.model, augment=self.augment, train=train)

    @model_validator(mode="after")
    def validation_is_there_when_needed(self) -> Self:
        who = needs_validation(self.train)
        if who and self.data.split.validation == 0 and self.data.validation is None and self.data.fold is None:
            raise ValueError(f"{who} looks at the validation split: give data.split.validation a share")
        return self

    @model_validator(mode="after")
    def folds_can_be_cut(self) -> Self:
        if self.train.folds and (isinstance(self.data.split, TimeSplit | GivenSplit) or self.data.validation or self.data.fold):
            raise ValueError("train.folds: folds need data.split of kind random, stratified or group, no data.validation and no data.fold")
        return self

    @model_validator(mode="after")
    def augmentation_has_inputs(self) -> Self:
        held = {part.holds for part in self.data.inputs}
        for place, part in enumerate(self.augment):
            if not held & set(part.of):
                wanted = " or ".join(name for name, kind in kinds.items() if kind.holds in part.of)
                raise ValueError(f"augment.{place}: there is no {wanted} among data.inputs for {part.kind}")
        try:
            fill_of(self.augment)
        except DloptError as error:
            raise ValueError(str(error)) from None
        return self

    @model_validator(mode="after")
    def target_can_be_trained_on(self) -> Self:
        kind = self.data.target.trained_as
        try:
            refuse_monitor(self.train, kind)
            refuse_balance(self.train, kind)
            refuse_loss(self.train, kind)
            refuse_threshold(self.train, kind)
        except DloptError as error:
            raise ValueError(str(error)) from None
        return self

    @model_validator(mode="after")
    def no_input_is_called_as_the_output(self) -> Self:
        for part in self.data.inputs:
            if part.tensor in (PROBABILITIES, VALUES):
                raise ValueError(f"data.inputs: {part.tensor!r} is the name of the model's output: call the input something else")
        return self

    @field_validator("compress", mode="before")
    @classmethod
    def a_budget_is_short_for_a_chain(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and set(given) == {"budget"} and isinstance(given["budget"], Mapping):
            return [{"kind": "budget"} | dict(given["budget"])]
        return given

    @model_validator(mode="after")
    def weights_are_kept_last(self) -> Self:
        for place, (part, after) in enumerate(pairwise(self.compress), start=1):
            if part.last or (part.keeps and not after.fills):
                raise ValueError(f"compress.{place}: {after.kind} after {part.kind}, which decides how weights are kept: put it before")
        return self

    @model_validator(mode="after")
    def exports_differ(self) -> Self:
        formats = [part.name for part in self.export]
        if len(set(formats)) < len(formats):
            raise ValueError("export: one kind is there twice: keep one of them")
        return self

    @model_validator(mode="after")
    def workers_can_share_out_the_state(self) -> Self:
        if self._most_workers > 1:
            try:
                refuse_parallelism(self.resources.parallelism, self.train.optimizer)
            except DloptError as error:
                raise ValueError(str(error)) from None
        return self

    @property
    def _most_workers(self) -> int:
        """That are known before there is a cluster."""
        workers = self.resources.workers
        return 1 if workers == "auto" else workers if isinstance(workers, int) else workers[1]

    @model_validator(mode="after")
    def workers_can_communicate(self) -> Self:
        try:
            refuse_other_workers(self.train, self.resources)
        except DloptError as error:
            raise ValueError(str(error)) from None
        return self

    @model_validator(mode="after")
    def workers_get_rows(self) -> Self:
        most = self._most_workers
        if self.train.batch_size != "full" and self.train.batch_size < most:
            raise ValueError(f"train.batch_size {self.train.batch_size} is less than {most} workers: lower workers or raise batch_size")
        return self


def load(path: Path, overrides: Sequence[str] = ()) -> Job:
    """Read a job file and apply overrides such as `train.optimizer.lr=3e-4`. Raises DloptError, with a line for each mistake."""
    found = read(path)
    for override in overrides:
        name, value = parsed(override)
        put(found, name, value, override)
    job = validated(found, f"{path}: ")
    refuse_beside(job, path)
    return job


def validated(given: Mapping[str, Any], where: str = "") -> Job:
    """A job from nested mappings and lists, as YAML gives them; `where` stands before each mistake. Raises DloptError."""
    try:
        return Job.validated(given, where)
    except RecursionError:
        raise DloptError(f"{where}is nested too deep to be a job") from None


def refuse_beside(job: Job, path: Path) -> None:
    """Relative paths are looked up from the working folder; who means the job's is told so."""
    for name in ("source", "validation", "test"):
        given = getattr(getattr(job.data, name), "path", None) or ()
        for file in (given,) if isinstance(given, str) else given:
            beside = path.parent / file
            if "://" in file or Path(file).is_absolute() or glob.glob(file) or not glob.glob(str(beside)):
                continue
            raise DloptError(
                f"{path}: data.{name}.path: there is no {file} in {Path.cwd()}, from where relative paths go, but there is one beside the "
                f"job: write {beside}, or cd {path.parent} first"
            )


class _Loader(yaml.SafeLoader):
    """YAML in which a key that is given twice is a mistake; the last one would win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        given: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in given:
                raise yaml.constructor.ConstructorError(problem=f"the key {key.value!r} is given twice", problem_mark=key.start_mark)
            given.add(key.value)
        return super().construct_mapping(node, deep)


def read(path: Path) -> dict[str, Any]:
    """What a job file says, not validated. Raises DloptError with the line of a mistake."""
    found = _yaml(path)
    if not isinstance(found, dict):
        raise DloptError(f"{path}: is not a job: it must be a mapping with name, data and model")
    return found


def _yaml(path: Path) -> Any:
    try:
        return yaml.load(path.read_bytes(), _Loader)
    except FileNotFoundError:
        raise DloptError(f"{path}: no such job file") from None
    except OSError as error:
        raise DloptError(f"{path}: cannot be read: {error.strerror}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" line {mark.line + 1}, column {mark.column + 1}:" if mark else ""
        raise DloptError(f"{path}:{where} not YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError) as error:  # bytes that are no text, or 2026-13-45
        raise DloptError(f"{path}: not YAML: {' '.join(str(error).split())}") from None


def parsed(override: str) -> tuple[str, Any]:
    """The dotted path and the value of `a.b=value`. Raises DloptError."""
    path, equals, text = override.partition("=")
    if not equals:
        raise DloptError(f"{override!r}: an override is written a.b=value")
    try:
        return path, yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError):
        raise DloptError(f"{override!r}: {text!r} is not a YAML value") from None


def put(job: dict[str, Any], path: str, value: Any, override: str = "") -> None:
    """Set one value at a dotted path; numbers step into lists. Raises DloptError, which names the override as it was written."""
    override = override or f"{path}={value!r:.40}"
    *parents, last = names = path.split(".")
    if not all(names):
        raise DloptError(f"{override!r}: an override is written a.b=value")
    place: Any = job
    for depth, name in enumerate(parents):
        place = _step(place, name, override, _default_at(job, names[: depth + 1]))
    place[_index(place, last, override) if isinstance(place, list) else last] = value


def _step(place: Any, name: str, override: str, default: Any) -> Any:
    """What is below a name; a section that is not there, or empty, is begun, as the kind that it is by default."""
    key = _index(place, name, override) if isinstance(place, list) else name
    if isinstance(place, dict) and place.get(key) is None:
        place[key] = {"kind": default} if default else {}
    if not isinstance(place[key], (dict, list)):
        raise DloptError(f"{override!r}: {name} is a value, there is nothing below it")
    return place[key]


def _default_at(job: dict[str, Any], names: Sequence[str]) -> Any:
    """The kind of part that stands at a dotted path unless a job says otherwise; None where it would have to."""
    kinds: list[Any] = [Job]
    default: Any = None
    given: Any = job
    for name in names:
        fields = [kind.model_fields[name] for kind in kinds if is_part(kind) and name in kind.model_fields]
        default = next((field.default for field in fields if isinstance(field.default, BaseModel)), None)
        given = given.get(name) if isinstance(given, dict) else None
        tag = given.get("kind") if isinstance(given, dict) else getattr(default, "kind", None)
        kinds = [kind for field in fields for kind in kinds_in(field.annotation) if not is_part(kind) or tag_of(kind) in (None, tag)]
    return getattr(default, "kind", None)


def _index(place: list[Any], name: str, override: str) -> int:
    if not name.isdecimal() or int(name) >= len(place):
        raise DloptError(f"{override!r}: {name} is not a place in a list of {len(place)}")
    return int(name)
