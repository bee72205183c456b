"""Dates and times: texts, timestamps and parts of them. A request's and a file's go the same way."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache

import numpy as np

from dlopt.data.types.arrow import pa, pc
from dlopt.data.types.values import Reasons, in_micros, is_text, plain, without_empty
from dlopt.part import DloptError

ZONED = r"\d(Z|[+-]\d\d:?\d\d)$|:\d\d(\.\d+)?[+-]\d\d$"
"""A date and time in ISO 8601 that says its zone: Z, +05:30, +0530, +05."""
FINE = r"(:\d\d\.\d{6})\d+(Z|[+-][\d:]+)?$"
"""One of more than microseconds, which the rest is cut from."""
TIME = "time"
"""The form of times of day in ISO 8601, 08:30 or 08:30:15.25, which become moments of the first day of 1970."""
LOOK = 1000
"""Rows that tell whether texts repeat: then each is read once."""
OF_DAY = r"^\d\d:\d\d(:\d\d(\.\d+)?)?$"


def dates(column: pa.ChunkedArray | pa.Array, form: str) -> tuple[pa.Array, Reasons]:
    """Values as timestamps of microseconds, null where missing, and the reason for each row that is no date.

    form: how dates are written, as strptime has it; "" for ISO 8601.
    """
    array = without_empty(plain(column))
    try:
        return parse_dates(array, form), {}
    except DloptError:
        pass
    codes = array.dictionary_encode()
    found: list[object] = []
    wrong: dict[int, str] = {}
    for index in range(len(codes.dictionary)):
        try:
            found.append(parse_dates(codes.dictionary.slice(index, 1), form)[0].as_py())
        except DloptError as error:
            found.append(None)
            wrong[index] = str(error)
    parsed = pa.array([*found, None], pa.timestamp("us"))
    indices = codes.indices.fill_null(len(found))
    rows = indices.to_numpy()
    return parsed.take(indices), {int(row): wrong[int(rows[row])] for row in np.flatnonzero(np.isin(rows, list(wrong)))}


def parse_dates(values: pa.Array, form: str) -> pa.Array:
    """Dates, times of day, timestamps or texts as timestamps of microseconds in UTC. Raises DloptError naming the first value that is none.

    form: how texts are written, as strptime has it; "" for ISO 8601, with or without a time and a zone; TIME for times of day.
    """
    kind = values.type
    if pa.types.is_null(kind):
        return values.cast(pa.timestamp("us"))
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        return in_micros(values)
    if pa.types.is_time(kind):
        return pc.cast(values, pa.time64("us"), safe=False).cast(pa.int64()).cast(pa.timestamp("us"))
    if not is_text(kind):
        raise DloptError(f"{kind} is not a date")
    if len(values) > 2 * LOOK and pc.count_distinct(values[:LOOK]).as_py() < LOOK / 2:
        codes = values.dictionary_encode()
        return parse_dates(codes.dictionary, form).take(codes.indices)
    try:
        if form == TIME:
            return _of_day(values)
        if form:
            return _of_form(values, form)
        zoned = pc.match_substring_regex(values, ZONED)
        if pc.any(pc.match_substring_regex(values, FINE)).as_py():
            values = pc.replace_substring_regex(values, FINE, r"\1\2")
        if not pc.any(zoned).as_py():
            return values.cast(pa.timestamp("us"))
        day = pc.equal(pc.utf8_length(values), len("2026-11-24"))  # which takes no zone without a time
        local = pc.if_else(zoned, values, pc.binary_join_element_wise(values, pc.if_else(day, "T00:00:00Z", "Z"), ""))
        return local.cast(pa.timestamp("us", "UTC")).cast(pa.timestamp("us"))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        first = next((value for value in values.to_pylist() if value is not None), "")
        like = f"date such as {form}" if form else "date such as 2026-11-24 or 2026-11-24T08:30:00Z"
        raise DloptError(f"{first!r:.40} is not a {'time such as 08:30 or 08:30:00' if form == TIME else like}") from None


def are_times(column: pa.ChunkedArray | pa.Array) -> bool:
    """Whether all values that are there are times of day."""
    values = without_empty(plain(column))
    if not is_text(values.type):
        return bool(pa.types.is_time(values.type))
    return values.null_count < len(values) and bool(pc.all(pc.match_substring_regex(values, OF_DAY)).as_py())


def _of_day(values: pa.Array) -> pa.Array:
    """Raises pyarrow.ArrowInvalid."""
    if not pc.all(pc.match_substring_regex(values, OF_DAY)).as_py():
        raise pa.ArrowInvalid("not a time")
    return pc.binary_join_element_wise("1970-01-01T", pc.replace_substring_regex(values, FINE, r"\1\2"), "").cast(pa.timestamp("us"))


def _of_form(values: pa.Array, form: str) -> pa.Array:
    """Arrow takes 31.2. for 3.3., so whatever may be such a day is looked at again; some forms, such as %f, Python alone can read.
    Raises pyarrow.ArrowInvalid."""
    if not _arrow_reads(form):
        codes = values.dictionary_encode()
        moments = [_strptime(text, form) for text in codes.dictionary.to_pylist()]
        return pa.array(moments, pa.timestamp("us")).take(codes.indices)
    found = pc.strptime(values, format=form, unit="us").cast(pa.timestamp("us"))
    for text in pc.unique(values if "%z" in form else values.filter(pc.less_equal(pc.day(found), 3))).drop_null().to_pylist():
        _strptime(text, form)
    return found


def _strptime(text: str, form: str) -> datetime:
    """A moment in UTC. Raises pyarrow.ArrowInvalid."""
    try:
        found = datetime.strptime(text.strip(), form)
    except ValueError as error:
        raise pa.ArrowInvalid(str(error)) from None
    return found.astimezone(UTC).replace(tzinfo=None) if found.tzinfo else found


@cache
def _arrow_reads(form: str) -> bool:
    """Whether Arrow makes of a moment in this form what Python does."""
    text = datetime(2026, 11, 24, 20, 31, 42, 250_000, UTC).strftime(form)
    try:
        found = pc.strptime(pa.array([text]), format=form, unit="us")[0].as_py()
    except pa.ArrowInvalid:
        return False
    return bool(found.replace(tzinfo=None) == _strptime(text, form))


def known_form(form: str) -> str:
    """The form, if it is one that dates can be written in and read again. Raises ValueError, as a pydantic validator does."""
    try:
        datetime.strptime(datetime(2026, 11, 24, 8, 30, tzinfo=UTC).strftime(form), form)
    except ValueError as error:
        raise ValueError(f"{form!r} is no form of dates: {error}") from None
    return form


def date_parts(values: pa.Array, parts: Sequence[str]) -> np.ndarray:
    """Parts of timestamps, float64 (rows, parts), NaN where missing."""

    def part(name: str) -> pa.Array:
        match name:
            case "days":
                return pc.divide(values.cast(pa.int64()).cast(pa.float64()), 86_400e6)
            case "weekday":
                return pc.day_of_week(values)
            case "week":
                return pc.iso_week(values)
        return getattr(pc, name)(values)  # one of DatePart's names

    columns = [part(name).cast(pa.float64()).to_numpy(zero_copy_only=False) for name in parts]
    return np.stack(columns, axis=1)
