"""A job: its sections, and how one is read from YAML with dotted overrides. Every mistake is one line that names the field."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from dlopt.data.augment import Augmentation, fill_of
from dlopt.data.kinds import kinds
from dlopt.data.section import Data
from dlopt.data.table.split import GivenSplit, TimeSplit
from dlopt.export import Format, Onnx
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

    @model_validator(mode="after")
    def exports_differ(self) -> Self:
        formats = [part.kind for part in self.export]
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
    """Read a job file and apply overrides such as `train.optimizer.lr=3e-4`. Raises DloptError."""
    found = _read(path)
    if not isinstance(found, dict):
        raise DloptError(f"{path}: is not a job: it must be a mapping with name, data and model")
    for override in overrides:
        _override(found, override)
    try:
        return Job.model_validate(found)
    except ValidationError as error:
        raise DloptError(f"{path}: {explain(error, Job)}") from None


class _Loader(yaml.SafeLoader):
    """YAML in which a key that is given twice is a mistake; the last one would win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        given: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in given:
                raise yaml.constructor.ConstructorError(problem=f"the key {key.value!r} is given twice", problem_mark=key.start_mark)
            given.add(key.value)
        return super().construct_mapping(node, deep)


def _read(path: Path) -> Any:
    """What a YAML file says. Raises DloptError with the line of a mistake."""
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


def _override(job: dict[str, Any], override: str) -> None:
    """Set one value at a dotted path; numbers step into lists."""
    path, equals, text = override.partition("=")
    *parents, last = names = path.split(".")
    if not equals or not all(names):
        raise DloptError(f"{override!r}: an override is written a.b=value")
    try:
        value = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError):
        raise DloptError(f"{override!r}: {text!r} is not a YAML value") from None
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
        fields = [kind.model_fields[name] for kind in kinds if _is_part(kind) and name in kind.model_fields]
        default = next((field.default for field in fields if isinstance(field.default, BaseModel)), None)
        given = given.get(name) if isinstance(given, dict) else None
        tag = given.get("kind") if isinstance(given, dict) else getattr(default, "kind", None)
        kinds = [kind for field in fields for kind in _kinds(field.annotation) if not _is_part(kind) or _tag(kind) in (None, tag)]
    return getattr(default, "kind", None)


def _index(place: list[Any], name: str, override: str) -> int:
    if not name.isdecimal() or int(name) >= len(place):
        raise DloptError(f"{override!r}: {name} is not a place in a list of {len(place)}")
    return int(name)


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """One line for a validation error: the field as it stands in the file, what is wrong, and the nearest known name."""
    found: dict[str, list[ErrorDetails]] = {}
    for one in error.errors():
        found.setdefault(".".join(str(step) for step in _walk(model, one["loc"])[0]), []).append(one)
    mistakes = {where: errors for where, errors in found.items() if not any(other.startswith(f"{where}.") for other in found if where)}
    where = min(mistakes, key=lambda where: mistakes[where][0]["type"] != "extra_forbidden")  # a misspelt key is missing, too
    more = f" (and {len(mistakes) - 1} more)" if len(mistakes) > 1 else ""
    return f"{where}: {_say(mistakes[where], model)}{more}".removeprefix(": ")


WANTED = {
    "bool": "true or false",
    "float": "a number",
    "int": "a whole number",
    "model": "a mapping",
    "string": "a text",
    "tuple": "a list",
}
"""What the first word of the name of a pydantic error about a type asks for."""
MOST_NAMED = 12
"""Choices that are all named even if one of them is nearly what was given."""


def _say(errors: Sequence[ErrorDetails], model: type[BaseModel]) -> str:
    """What is wrong with one field, which has an error for each type that was tried."""
    wanted = [_wanted(error, model) for error in errors]
    if all(wanted):
        choices = list(dict.fromkeys(choice for some in wanted for choice in some))
        close = _close(str(errors[0]["input"]), choices)
        there = f"one of {len(choices)} names" if close and len(choices) > MOST_NAMED else _either(choices)
        return f"must be {there}{_given(errors[0])}{close}"
    error = errors[wanted.index([])]
    context = error.get("ctx", {})
    match error["type"]:
        case "extra_forbidden":
            known = sorted({name for part in _walk(model, error["loc"][:-1])[1] for name in part.model_fields})
            return f"unknown key{_nearest(str(error['loc'][-1]), known)}"
        case "missing":
            return "is missing"
        case "union_tag_invalid":
            return f"no kind {context['tag']!r}{_nearest(context['tag'], _tags_at(model, error['loc']))}"
        case "union_tag_not_found":
            return f"needs a kind: {_either(_tags_at(model, error['loc']))}"
        case "value_error":
            return str(context["error"])
    given = "" if isinstance(error["input"], (dict, list)) else _given(error)  # of a list, the message has what matters
    return f"must {error['msg'].partition(' should ')[2] or error['msg']}{given}".replace(" after validation", "")


def _wanted(error: ErrorDetails, model: type[BaseModel]) -> list[str]:
    """What should stand there, if the error is that something else does."""
    if error["type"] == "literal_error":
        return re.findall(r"'([^']*)'", error["ctx"]["expected"])
    word, _, rest = error["type"].partition("_")
    if word not in WANTED or rest not in ("type", "parsing", "from_float", "attributes_type"):
        return []
    tags = _tags_at(model, error["loc"])
    return [f"a mapping such as {{kind: {tags[0]}}}" if word == "model" and tags else WANTED[word]]


def _given(error: ErrorDetails) -> str:
    """What stands there, as YAML has it."""
    value = error["input"]
    if isinstance(value, (dict, list)):
        return f", not a {'mapping' if isinstance(value, dict) else 'list'}"
    return f", not {json.dumps(value, default=str, ensure_ascii=False)[:60]}"


def _either(choices: Sequence[str]) -> str:
    return " or ".join(filter(None, [", ".join(choices[:-1]), choices[-1]]))


def _nearest(name: str, known: Sequence[str]) -> str:
    return _close(name, known) or f"; there are {', '.join(known)}"


def _close(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def _walk(model: type[BaseModel], location: Sequence[int | str]) -> tuple[list[int | str], list[type[BaseModel]]]:
    """A location of pydantic's as it stands in the file, and the parts that can stand there: pydantic puts the kind of a part,
    and the type that was tried, among the keys."""
    kept: list[int | str] = []
    kinds: list[Any] = [model]
    for step in location:
        fields = [kind.model_fields[str(step)].annotation for kind in kinds if _is_part(kind) and step in kind.model_fields]
        tried = [kind for kind in kinds if _is_part(kind) and (step == _tag(kind) or re.search(rf"\b{kind.__name__}\]*$", str(step)))]
        if not tried and (fields or isinstance(step, int) or all(_is_part(kind) for kind in kinds)):
            kept.append(step)
        kinds = [kind for field in fields for kind in _kinds(field)] or tried or kinds
    return kept, [kind for kind in kinds if _is_part(kind)]


def _tags_at(model: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    """The kinds of part that can stand at a location of pydantic's."""
    return [str(tag) for kind in _walk(model, location)[1] if (tag := _tag(kind))]


def _kinds(annotation: Any) -> list[Any]:
    """The types that an annotation is made of: members of unions, items of tuples."""
    if _is_part(annotation):
        return [annotation]
    inner = [kind for argument in get_args(annotation) if argument is not type(None) for kind in _kinds(argument)]
    return inner or [annotation]


def _is_part(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _tag(kind: type[BaseModel]) -> Any:
    return kind.model_fields["kind"].default if "kind" in kind.model_fields else None
