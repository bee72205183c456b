"""What the fields of a part mean: the docstrings below them, read from the source when somebody asks. Pydantic could keep them in each
class (`use_attribute_docstrings`), at the price of a second of CPU time in every process that can read a job."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core.core_schema import ModelSchema


def descriptions(part: type[BaseModel]) -> dict[str, str]:
    """What the fields say of themselves, by name: a description that was given, else the docstring, also of a base. Without a source file
    there are no docstrings."""
    known: dict[str, str] = {}
    for base in reversed(part.__mro__):
        known |= _of_module(base.__module__).get(base.__qualname__, {})
    texts = {name: info.description or known.get(name) for name, info in part.model_fields.items()}
    return {name: text for name, text in texts.items() if text}


def json_schema(part: type[BaseModel]) -> dict[str, Any]:
    """The JSON Schema of a part, of which every field has its docstring as description."""
    return part.model_json_schema(schema_generator=_Described)


class _Described(GenerateJsonSchema):
    def model_schema(self, schema: ModelSchema) -> JsonSchemaValue:
        made = super().model_schema(schema)
        for name, text in descriptions(schema["cls"]).items():
            if name in made.get("properties", {}):
                made["properties"][name].setdefault("description", text)
        return made


@cache
def _of_module(name: str) -> dict[str, dict[str, str]]:
    """The docstrings of the fields of each class of a module, by its qualified name."""
    try:
        source = inspect.getsource(sys.modules[name])
    except (KeyError, OSError, TypeError):  # typed in, or without a source
        return {}
    return dict(_classes(ast.parse(source), ""))


def _classes(node: ast.AST, prefix: str) -> Iterator[tuple[str, dict[str, str]]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield prefix + child.name, dict(_fields(child))
            yield from _classes(child, f"{prefix}{child.name}.")
        elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _classes(child, f"{prefix}{child.name}.<locals>.")
        else:
            yield from _classes(child, prefix)


def _fields(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for field, text in pairwise(node.body):
        match field, text:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(said))):
                yield name, inspect.cleandoc(said)
