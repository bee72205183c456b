"""What the fields of a job mean, from the parts themselves: for `dlopt explain` and the pages of the documentation."""

from __future__ import annotations

import difflib
import inspect
import json
import re
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined, to_jsonable_python

from dlopt.docstrings import descriptions
from dlopt.mistakes import is_part, kinds_in, tag_of
from dlopt.part import DloptError
from dlopt.spec import Job

WIDTH = 88
BOUNDS = {"gt": "> {}", "ge": ">= {}", "lt": "< {}", "le": "<= {}", "min_length": "at least {} of them", "pattern": "like {}"}


@dataclass(frozen=True)
class Entry:
    """A place in a job: what stands there, and what is below it."""

    path: str
    takes: str
    """What values it takes, in words."""
    default: str
    """As JSON; "" where the job has to say."""
    says: str
    parts: tuple[type[BaseModel], ...] = field(default=())
    """What parts can stand there."""


def entry_of(name: str, info: FieldInfo, says: str) -> Entry:
    """A field of a part."""
    parts = tuple(kind for kind in kinds_in(info.annotation) if is_part(kind))
    return Entry(name, takes(info), default_of(info), " ".join(says.split()), parts)


def entries(part: type[BaseModel], prefix: str = "") -> Iterator[Entry]:
    """The fields of a part, but for its kind."""
    says = descriptions(part)
    for name, info in part.model_fields.items():
        if name != "kind":
            yield entry_of(f"{prefix}{name}", info, says.get(name, ""))


def default_of(info: FieldInfo) -> str:
    """What stands there unless a job says otherwise, as JSON: of a part its kind alone, or {}; "" where there is none."""
    if info.default is PydanticUndefined:
        return ""
    value = info.default
    if isinstance(value, BaseModel):
        return f"{{kind: {value.kind}}}" if hasattr(value, "kind") else "{}"
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(f"{{kind: {one.kind}}}" if hasattr(one, "kind") else _json(one) for one in value) + "]"
    return _json(value)


def _json(value: Any) -> str:
    return json.dumps(to_jsonable_python(value), ensure_ascii=False)


def takes(info: FieldInfo) -> str:
    """What a field takes, in words, with its bounds."""
    return " ".join([_words(info.annotation), *_bounds(info.metadata)])


def _bounds(metadata: Iterable[Any]) -> list[str]:
    """Bounds in words, of annotations and of fields within them."""
    inner = [deeper for one in metadata for deeper in (one.metadata if isinstance(one, FieldInfo) else [one])]
    return [BOUNDS[name].format(value) for one in inner for name in BOUNDS if (value := getattr(one, name, None)) is not None]


def _words(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    plain = {int: "whole number", float: "number", str: "text", bool: "true or false", type(None): "null", Any: "anything"}
    if annotation in plain:
        return plain[annotation]
    if origin is Annotated:
        return " ".join([_words(inner[0]), *_bounds(inner[1:])])
    if origin is Literal:
        return " | ".join(str(choice) for choice in inner)
    if is_part(annotation):
        return f"{{kind: {tag_of(annotation)}, ...}}" if tag_of(annotation) else "{...}"
    if origin is tuple:
        if len(inner) == 2 and inner[1] is Ellipsis:
            return f"list of {_words(inner[0])}"
        return f"[{', '.join(_words(one) for one in inner)}]"
    if origin is dict:
        return f"mapping of {_words(inner[0])} to {_words(inner[1])}"
    if origin in (list, frozenset, set):
        return f"list of {_words(inner[0])}"
    if origin is Union or inner:
        said = list(dict.fromkeys(_words(one) for one in inner))
        kinds = [one for one in said if one.startswith("{kind:")]
        return " | ".join([one for one in said if one not in kinds] + (kinds if len(kinds) < 2 else [f"one of {len(kinds)} kinds"]))
    return getattr(annotation, "__name__", str(annotation))


def explain(path: str) -> str:
    """What there is to say of a dotted place in a job, `train.schedule`, with kinds among the names: `train.optimizer.adam.lr`.
    Raises DloptError naming what is near."""
    parts: tuple[type[BaseModel], ...] = (Job,)
    entry = Entry("job", "{...}", "", " ".join((Job.__doc__ or "").split()), parts)
    given = [name for name in re.split(r"[.\[\]]+", path) if name and not name.isdecimal()]
    for depth, name in enumerate(given):
        entry, parts = _below(parts, name, ".".join(given[: depth + 1]))
    return _written(entry, parts)


def _below(parts: tuple[type[BaseModel], ...], name: str, path: str) -> tuple[Entry, tuple[type[BaseModel], ...]]:
    """What is called so below some parts: one of them by its kind, else a field of one."""
    of_kind = tuple(part for part in parts if tag_of(part) == name)
    if of_kind:
        return Entry(path, f"{{kind: {name}, ...}}", "", inspect.cleandoc(of_kind[0].__doc__ or ""), of_kind), of_kind
    found = [(part, part.model_fields[name]) for part in parts if name in part.model_fields]
    if not found:
        known = [str(tag) for part in parts if (tag := tag_of(part))] + [name for part in parts for name in part.model_fields]
        known = sorted(set(known) - {"kind"})
        if not known:
            raise DloptError(f"explain: {path}: {path.rpartition('.')[0]} is a value, there is nothing below it")
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        which = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        raise DloptError(f"explain: {path}: no such field; {which}")
    first, info = found[0]
    entry = entry_of(path, info, descriptions(first).get(name, ""))
    below = tuple(dict.fromkeys(part for _, info in found for part in kinds_in(info.annotation) if is_part(part)))
    return entry, below


def _written(entry: Entry, parts: tuple[type[BaseModel], ...]) -> str:
    lines = [entry.path, *textwrap.wrap(f"  takes    {entry.takes}", WIDTH, subsequent_indent="           ")]
    if entry.default:
        lines.append(f"  default  {entry.default}")
    lines += ["", *textwrap.wrap(" ".join(entry.says.split()), WIDTH)]
    if len(parts) == 1:
        lines += ["", "fields", *_fields(parts[0])]
    elif parts:
        kinds = [(str(tag_of(part) or part.__name__), _first_sentence(part.__doc__)) for part in parts]
        width = max(len(name) for name, _ in kinds)
        lines += [
            "",
            "kinds",
            *(f"  {name:{width}}  {textwrap.shorten(says, WIDTH - width - 4, placeholder=' ...')}" for name, says in kinds),
        ]
        lines += ["", f"dlopt explain {entry.path}.{kinds[0][0]} says more of one"]
    return "\n".join(lines)


def _fields(part: type[BaseModel]) -> Iterator[str]:
    for entry in entries(part):
        default = f"  (default {entry.default})" if entry.default else "  (must be given)"
        yield from textwrap.wrap(f"{entry.path}: {entry.takes}{default}", WIDTH, initial_indent="  ", subsequent_indent="    ")
        yield from textwrap.wrap(entry.says, WIDTH - 6, initial_indent="      ", subsequent_indent="      ")


def _first_sentence(text: str | None) -> str:
    return " ".join((text or "").split()).partition(". ")[0].removesuffix(".")
