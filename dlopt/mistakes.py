"""What is wrong with what was given for a part: a line for each mistake, which names the field as it stands in the file, says what is
wanted, and the nearest known name. Pydantic's own messages name types of Python."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails


def lines_of(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """A line for each mistake, `field: what is wrong`. A key that is misspelt is not said to be missing as well."""
    found: dict[str, list[ErrorDetails]] = {}
    for one in error.errors():
        found.setdefault(".".join(str(step) for step in walk(model, one["loc"])[0]), []).append(one)
    mistakes = {where: errors for where, errors in found.items() if not any(other.startswith(f"{where}.") for other in found if where)}
    said = {where: _say(errors, model) for where, errors in mistakes.items()}
    meant = {
        f"{where.rpartition('.')[0]}.{near[1]}".removeprefix(".")
        for where, text in said.items()
        if (near := re.fullmatch(r"unknown key; did you mean '(.*)'\?", text))
    }
    kept = [where for where in said if not (where in meant and mistakes[where][0]["type"] == "missing")]
    first = sorted(kept, key=lambda where: mistakes[where][0]["type"] != "extra_forbidden")
    return [f"{where}: {said[where]}".removeprefix(": ") for where in first]


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
        close = close_to(str(errors[0]["input"]), choices)
        there = f"one of {len(choices)} names" if close and len(choices) > MOST_NAMED else _either(choices)
        return f"must be {there}{_given(errors[0])}{close}"
    error = errors[wanted.index([])]
    context = error.get("ctx", {})
    match error["type"]:
        case "extra_forbidden":
            known = sorted({name for part in walk(model, error["loc"][:-1])[1] for name in part.model_fields})
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
    return close_to(name, known) or f"; there are {', '.join(known)}"


def close_to(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def walk(model: type[BaseModel], location: Sequence[int | str]) -> tuple[list[int | str], list[type[BaseModel]]]:
    """A location of pydantic's as it stands in the file, and the parts that can stand there: pydantic puts the kind of a part,
    and the type that was tried, among the keys."""
    kept: list[int | str] = []
    kinds: list[Any] = [model]
    for step in location:
        fields = [kind.model_fields[str(step)].annotation for kind in kinds if is_part(kind) and step in kind.model_fields]
        tried = [kind for kind in kinds if is_part(kind) and (step == tag_of(kind) or re.search(rf"\b{kind.__name__}\]*$", str(step)))]
        if not tried and (fields or isinstance(step, int) or all(is_part(kind) for kind in kinds)):
            kept.append(step)
        kinds = [kind for field in fields for kind in kinds_in(field)] or tried or kinds
    return kept, [kind for kind in kinds if is_part(kind)]


def _tags_at(model: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    """The kinds of part that can stand at a location of pydantic's."""
    return [str(tag) for kind in walk(model, location)[1] if (tag := tag_of(kind))]


def kinds_in(annotation: Any) -> list[Any]:
    """The types that an annotation is made of: members of unions, items of tuples."""
    if is_part(annotation):
        return [annotation]
    inner = [kind for argument in get_args(annotation) if argument not in (type(None), ...) for kind in kinds_in(argument)]
    return inner or [annotation]


def is_part(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def tag_of(kind: type[BaseModel]) -> Any:
    return kind.model_fields["kind"].default if "kind" in kind.model_fields else None
