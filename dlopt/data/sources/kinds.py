"""What a column seems to be, from its first rows: a suggestion for the user, who has the last word in the job."""

from __future__ import annotations

from datetime import datetime
from itertools import pairwise
from typing import Any

import pyarrow as pa

from dlopt.data.kinds import kinds

WORDS, LETTERS = 3, 40
"""A column of strings is text when they have more words or more letters than this on average."""
ENOUGH = 20
"""An identifier is one whose values all differ; with fewer rows than this, that says nothing."""


def infer_kind(table: pa.Table, column: str) -> str:
    """A kind of input, or identifier.

    image: encoded images, or nested numbers. vector: lists of as many numbers each. date: dates, or strings in ISO 8601. number:
    numbers, or strings that are. category: true or false, two numbers, short strings. text: long strings. identifier: whole numbers
    that count up by one, or short strings, that differ in every row.
    """
    values = [value for value in table[column].to_pylist() if not _is_missing(value)]
    kind = table.schema.field(column).type
    if pa.types.is_temporal(kind):
        return "date"
    if any(isinstance(value, (bytes, list, dict)) for value in values):
        return next((name for name, kind in kinds.items() if kind.recognises(values)), "category")
    if not values or all(isinstance(value, bool) for value in values):
        return "category"
    numbers = [_number(value) for value in values]
    if all(number is not None for number in numbers):
        return _kind_of_numbers([number for number in numbers if number is not None])
    return _kind_of_strings([str(value) for value in values])


def _kind_of_numbers(numbers: list[float]) -> str:
    if len(numbers) >= ENOUGH and all(after - before == 1 for before, after in pairwise(numbers)):
        return "identifier"
    return "category" if len(numbers) >= ENOUGH and len(set(numbers)) <= 2 else "number"


def _kind_of_strings(values: list[str]) -> str:
    if all(_is_date(value) for value in values):
        return "date"
    words = sum(len(value.split()) for value in values) / len(values)
    if words > WORDS or (words > 1.5 and sum(map(len, values)) / len(values) > LETTERS):
        return "text"
    different = len(set(values)) == len(values) >= ENOUGH
    return "identifier" if different and all(" " not in value and any(map(str.isdigit, value)) for value in values) else "category"


def _is_missing(value: Any) -> bool:
    return value is None or value != value or value == ""


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _is_date(value: str) -> bool:
    try:
        datetime.fromisoformat(value)
    except ValueError:
        return False
    return len(value) >= 8
