"""A job: its sections, and how one is read from YAML with dotted overrides. Every mistake is one line that names the field."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from dlopt.data.augment import Augmentation
from dlopt.data.section import Data
from dlopt.export import Format, Onnx
from dlopt.models import Model
from dlopt.part import DloptError, Part
from dlopt.serve import Serve
from dlopt.train.section import Fit, Resources, Train, needs_validation


class Job(Part):
    """Raw data to a served model, in one file."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Names the run's folder and the served model."""
    seed: int = Field(0, ge=0)
    """Initial weights, order of rows, augmentation and dropout follow from it."""
    data: Data
    augment: tuple[Augmentation, ...] = ()
    """What is done to images in training, in this order."""
    model: Model
    train: Train = Train()
    resources: Resources = Resources()
    export: tuple[Format, ...] = (Onnx(),)
    """Formats of the trained model."""
    serve: Serve = Serve()

    @property
    def fit(self) -> Fit:
        """The section of the fit stage."""
        return Fit(seed=self.seed, model=self.model, augment=self.augment, train=self.train)

    @model_validator(mode="after")
    def validation_is_there_when_needed(self) -> Self:
        who = needs_validation(self.train)
        if who and self.data.split.validation == 0:
            raise ValueError(f"{who} looks at the validation split: give data.split.validation a share")
        return self

    @model_validator(mode="after")
    def augmentation_has_images(self) -> Self:
        if self.augment and all(part.kind != "image" for part in self.data.inputs):
            raise ValueError("augment: there is no image among data.inputs to augment")
        return self

    @model_validator(mode="after")
    def workers_get_rows(self) -> Self:
        workers = self.resources.workers
        most = 1 if workers == "auto" else workers if isinstance(workers, int) else workers[1]
        if self.train.batch_size < most:
            raise ValueError(f"train.batch_size {self.train.batch_size} is less than {most} workers: lower workers or raise batch_size")
        return self


def load(path: Path, overrides: Sequence[str] = ()) -> Job:
    """Read a job file and apply overrides such as `train.optimizer.lr=3e-4`. Raises DloptError."""
    try:
        found = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise DloptError(f"{path}: no such job file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DloptError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise DloptError(f"{path}:{where} is not YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(found, dict):
        raise DloptError(f"{path}: is not a job: it must be a mapping with name, data and model")
    for override in overrides:
        _override(found, override)
    try:
        return Job.model_validate(found)
    except ValidationError as error:
        raise DloptError(f"{path}: {explain(error, Job)}") from None


def _override(job: dict[str, Any], override: str) -> None:
    """Set one value at a dotted path; numbers step into lists."""
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise DloptError(f"{override!r}: an override is written a.b=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise DloptError(f"{override!r}: {text!r} is not a YAML value") from None
    *parents, last = path.split(".")
    place: Any = job
    for name in parents:
        place = _step(place, name, override)
    if isinstance(place, list):
        place[_index(place, last, override)] = value
    else:
        place[last] = value


def _step(place: Any, name: str, override: str) -> Any:
    place = place[_index(place, name, override)] if isinstance(place, list) else place.setdefault(name, {})
    if not isinstance(place, (dict, list)):
        raise DloptError(f"{override!r}: {name} is a value, there is nothing below it")
    return place


def _index(place: list[Any], name: str, override: str) -> int:
    if not name.isdecimal() or int(name) >= len(place):
        raise DloptError(f"{override!r}: {name} is not a place in a list of {len(place)}")
    return int(name)


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """One line for a validation error: the field as it stands in the file, what is wrong, and the nearest known name."""
    errors = error.errors()
    places = [".".join(str(step) for step in _without_tags(model, one["loc"])) for one in errors]
    first, where = errors[0], places[0]
    others = len(set(places)) - 1  # one field may have an error for each type that was tried
    more = f" (and {others} more)" if others else ""
    return f"{where}: {_say(first, model)}{more}" if where else f"{_say(first, model)}{more}"


def _say(error: Mapping[str, Any], model: type[BaseModel]) -> str:
    context = error.get("ctx", {})
    match error["type"]:
        case "extra_forbidden":
            known = _fields_at(model, error["loc"][:-1])
            return f"unknown key{_nearest(str(error['loc'][-1]), known)}"
        case "missing":
            return "is missing"
        case "union_tag_invalid":
            known = [tag.strip().strip("'") for tag in context["expected_tags"].split(",")]
            return f"no kind {context['tag']!r}{_nearest(context['tag'], known)}"
        case "union_tag_not_found":
            return "needs a kind"
        case "value_error":
            return str(context["error"])
    value = error.get("input")
    given = "" if isinstance(value, (dict, list, tuple)) else f", not {value!r}"
    return f"{error['msg'][:1].lower()}{error['msg'][1:]}{given}"


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(known)}"


def _without_tags(model: type[BaseModel], location: Sequence[int | str]) -> list[int | str]:
    """The path as it stands in the file: pydantic puts the kind of a part, and the type tried, into its own."""
    kept: list[int | str] = []
    kinds: list[Any] = [model]
    for step in location:
        fields = [kind.model_fields[step].annotation for kind in kinds if _is_part(kind) and step in kind.model_fields]
        if fields:
            kept.append(step)
            kinds = [kind for field in fields for kind in _kinds(field)]
        elif isinstance(step, int):
            kept.append(step)
        elif tagged := [kind for kind in kinds if _is_part(kind) and _tag(kind) == step]:
            kinds = tagged
        elif kinds and all(_is_part(kind) for kind in kinds):
            kept.append(step)
    return kept


def _fields_at(model: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    """The keys that the part at a location of pydantic's knows."""
    kinds: list[Any] = [model]
    for step in location:
        fields = [kind.model_fields[step].annotation for kind in kinds if _is_part(kind) and step in kind.model_fields]
        if fields:
            kinds = [kind for field in fields for kind in _kinds(field)]
        else:
            kinds = [kind for kind in kinds if not _is_part(kind) or _tag(kind) == step] if isinstance(step, str) else kinds
    return sorted({name for kind in kinds if _is_part(kind) for name in kind.model_fields})


def _kinds(annotation: Any) -> list[Any]:
    """The types that an annotation is made of: members of unions, items of tuples."""
    if _is_part(annotation):
        return [annotation]
    inner = [kind for argument in get_args(annotation) for kind in _kinds(argument)]
    return inner or [annotation]


def _is_part(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _tag(kind: type[BaseModel]) -> Any:
    return kind.model_fields["kind"].default if "kind" in kind.model_fields else None
