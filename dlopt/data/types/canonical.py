"""The one text of a value, whatever way it came: a csv file, JSON, parquet, `data.test` of another format, a program, or a request.

Vocabularies, hash buckets, groups, rules, labels and `fill.by` compare these texts, so a value that was trained on is known when it
is served. Only text leaves it open what a value is: `1.0` is a number in a column of numbers and a name in a column of versions. So
a column has a type, stated in the job (`source.types`) or decided from the first rows of the source (see `dlopt.data.types.columns`):

| type | text |
|---|---|
| string | as it is; of other values as the types below have it |
| number | 7, 7.0, "7.0" and " 7 " are "7"; others are the shortest text of their float64, as Python's repr; true is "1" |
| boolean | true, "True", "TRUE", 1 and "1" are "true" |
| date | ISO 8601 in UTC: midnight is its day alone, "2026-11-24"; a time follows a T, "2026-11-24T08:30:00" |

A text that is not of its column's type stays as it is, as 007 and +7 do, which only look like numbers.
"" stands for what is missing. Imports neither torch nor Ray nor pyarrow: the
server's replica uses it as well.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any, Literal

ColumnType = Literal["string", "number", "boolean", "date"]
MISSING = (
    "",
    *("NA", "N/A", "n/a", "#N/A", "#NA", "<NA>", "#N/A N/A"),
    *("NaN", "nan", "-NaN", "-nan", "1.#IND", "-1.#IND", "1.#QNAN", "-1.#QNAN"),
    *("NULL", "null", "None"),
)
"""Texts that say that a value is missing, unless a job says otherwise: those of pandas' `read_csv`."""
INTEGER = re.compile(r"-?(?:0|[1-9][0-9]*)")
NUMBER = re.compile(r"-?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
"""Numbers as programs write them: zeros in front and a plus are of codes, as in 01234 and +49."""
DAY = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}(?:[T ].+)?")
TRUTH = {"true": "1", "false": "0"}
BOOLEANS = {"true": "true", "false": "false", "1": "true", "0": "false"}


def as_text(value: Any, kind: ColumnType = "string", missing: Collection[str] = ()) -> str:
    """The text that stands for a value of a column of this type; "" where it is missing.

    missing: texts that say so, beside "", None and NaN.
    """
    if value is None or value != value:
        return ""
    if isinstance(value, str):
        return "" if value in missing else SPELLINGS[kind](value)
    plain = _plain(value)
    return plain if kind == "string" else SPELLINGS[kind](plain)


def as_number(value: Any) -> float:
    """A value of a column of numbers: texts of numbers are numbers, and true is 1. Raises ValueError."""
    text = str(value)
    if "_" in text:  # 1_000 is Python's own
        raise ValueError(text)
    try:
        return float(TRUTH.get(text.lower(), value))
    except OverflowError:
        return math.inf
    except TypeError:
        raise ValueError(text) from None


def _plain(value: Any) -> str:
    """Of a value that is no text."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return _of_float(value)
    if isinstance(value, Decimal):
        return f"{value.normalize():f}" if value else "0"
    if isinstance(value, datetime):
        return _of_moment(value)
    return value.isoformat() if isinstance(value, date) else str(value)


def _of_float(value: float) -> str:
    return str(int(value)) if value.is_integer() else repr(value)


def _of_moment(value: datetime) -> str:
    moment = value.astimezone(UTC).replace(tzinfo=None) if value.tzinfo else value
    return moment.date().isoformat() if moment.time() == moment.time().min else moment.isoformat()


def _number(text: str) -> str:
    found = text.strip()
    if not NUMBER.fullmatch(found):
        return TRUTH.get(found.lower(), text)
    if INTEGER.fullmatch(found):
        return found if found != "-0" else "0"
    value = float(found)
    return _of_float(value) if math.isfinite(value) else text


def _boolean(text: str) -> str:
    return BOOLEANS.get(_number(text.strip().lower()), text)


def _date(text: str) -> str:
    moment = moment_of(text)
    return text if moment is None else _of_moment(moment)


def moment_of(text: str) -> datetime | None:
    """The moment that a text in ISO 8601 names, to the microsecond; None for another text."""
    found = text.strip()
    try:
        return datetime.fromisoformat(found) if DAY.fullmatch(found) else None
    except ValueError:
        return None


SPELLINGS: dict[ColumnType, Callable[[str], str]] = {"string": lambda text: text, "number": _number, "boolean": _boolean, "date": _date}
"""type of a column: a text in it to the one that stands for its value."""
