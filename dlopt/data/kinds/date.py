"""Dates and times, as the numbers that a model can learn from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, date, datetime, time, timedelta
from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator

from dlopt.data.kinds.base import Bound, Cells, Matrix, RawColumns, lists_of, no_column_twice, texts_of
from dlopt.data.kinds.category import MISSING
from dlopt.data.kinds.number import NumberInput, in_units
from dlopt.data.stats import column as profile
from dlopt.data.stats import moments
from dlopt.data.stats.moments import Moments
from dlopt.data.types.arrow import pa
from dlopt.data.types.dates import TIME, are_times, date_parts, dates, known_form, parse_dates
from dlopt.data.types.exact import exact_column, values_of
from dlopt.data.types.tensors import part_column
from dlopt.data.types.values import Reasons, plain
from dlopt.part import DloptError, Feature, Statistics

DatePart = Literal["year", "quarter", "month", "week", "day", "day_of_year", "weekday", "hour", "minute", "second", "days"]
OF_TIMES: tuple[DatePart, ...] = ("hour", "minute", "second")
"""What there is of a time of day."""
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


class DateInput(Matrix):
    """Columns of dates or times; the model sees parts of each as numbers, missing ones filled with the mean."""

    unit = "seconds since 1970"
    moment = True

    kind: Literal["date"] = "date"
    columns: tuple[str, ...] = Field(min_length=1)
    """The columns: dates, timestamps, or texts such as 2026-11-24 or 2026-11-24T08:30:00Z; times with a zone become UTC. Or times of day,
    such as 08:30, in all of them."""
    name: str = "dates"
    """The name of the model's input."""
    parts: tuple[DatePart, ...] = Field(("year", "month", "day", "weekday"), min_length=1)
    """What the model sees of each date; weekday is 0 on Mondays, days are those since 1970, with fractions. Of times of day hour and
    minute, if nothing else is said."""
    form: str = ""
    """How dates are written, for other texts than ISO 8601, as strptime has it (%d.%m.%Y); `time` for times of day (08:30 or 08:30:15),
    which is seen in the first rows, too."""
    normalize: Literal["min_max", "symmetric", "standard", "max_abs", "none"] = "standard"
    """How the model scales each part, by statistics of the training split."""

    @field_validator("columns")
    @classmethod
    def columns_differ(cls, columns: tuple[str, ...]) -> tuple[str, ...]:
        return no_column_twice(columns)

    @field_validator("form")
    @classmethod
    def form_is_known(cls, form: str) -> str:
        return known_form(form)

    @property
    def tensor(self) -> str:
        """The name of the model's input."""
        return self.name

    def made(self) -> Iterator[tuple[str, str, str]]:
        return ((column, part, part_column(column, part)) for column in self.columns for part in self.parts)

    def feature(self, table: pa.Table) -> Feature:
        form, parts = self.form, self.parts
        if times := [column for column in self.columns if not form and column in table.column_names and are_times(table[column])]:
            form = TIME
            if others := [column for column in self.columns if column not in times and plain(table[column]).null_count < len(table)]:
                raise DloptError(f"inputs: {times[0]!r} holds times of day and {others[0]!r} dates: make two inputs of them")
        if form == TIME and "parts" not in self.model_fields_set:
            parts = OF_TIMES[:2]
        if form == TIME and (foreign := [part for part in parts if part not in OF_TIMES]):
            raise DloptError(
                f"inputs: {self.columns[0]!r} holds times of day, which have no {foreign[0]}: parts may be {', '.join(OF_TIMES)}"
            )
        shape = (len(self.columns) * len(parts),)
        return Feature(name=self.name, kind="date", dtype="float32", shape=shape, columns=self.columns, parts=parts, form=form)

    def read(self, table: pa.Table, feature: Feature) -> tuple[dict[str, pa.Array], Reasons]:
        """The parts as a matrix, and the reason for every row with something else than a date."""
        reasons: Reasons = {}
        found = []
        for column in feature.columns:
            moments_in_time, wrong = dates(table[column], feature.form)
            found.append(date_parts(moments_in_time, feature.parts))
            reasons.update({row: f"{column}: {why}" for row, why in wrong.items() if row not in reasons})
        return {feature.name: exact_column(np.concatenate(found, axis=1))}, reasons

    def observe(self, table: pa.Table, feature: Feature, bounds: Mapping[str, Bound]) -> Moments:
        return moments.of_values(values_of(table[feature.name], feature))

    def fit(
        self, seen: Moments, feature: Feature, features: Mapping[str, Feature], bounds: Mapping[str, Bound] = {}
    ) -> tuple[Feature, Statistics]:
        return feature, in_units(seen.statistics(self.normalize), feature)

    @staticmethod
    def names(feature: Feature) -> tuple[str, ...]:
        return tuple(part_column(column, part) for column in feature.columns for part in feature.parts)

    @classmethod
    def encode(cls, feature: Feature, columns: RawColumns) -> np.ndarray:
        return np.concatenate([_encoded(feature, name, values) for name, values in lists_of(feature, columns).items()], axis=1)

    @staticmethod
    def example(feature: Feature, place: int) -> Any:
        moment = datetime(2026, 11, 30, 8, 30, tzinfo=UTC)
        if feature.form == TIME:
            return f"{moment:%H:%M}"
        return moment.strftime(feature.form) if feature.form else moment.date().isoformat()

    @staticmethod
    def describe(feature: Feature) -> str:
        return f"{', '.join(feature.parts)} of {', '.join(feature.columns)}"

    @classmethod
    def headings(cls, feature: Feature) -> Sequence[str]:
        return feature.columns

    @staticmethod
    def cells(feature: Feature, values: np.ndarray) -> Cells:
        """A date each, where the parts make one, 2026-11-24 08:30, else each part by its name."""
        values = values + np.array(feature.offsets) if feature.offsets else values
        rows = values.reshape(len(values), len(feature.columns), len(feature.parts)).tolist()
        return [[_said(dict(zip(feature.parts, parts, strict=True))) for parts in row] for row in rows]

    @staticmethod
    def widgets(feature: Feature) -> list[dict[str, Any]]:
        if feature.form:
            return [
                {"column": column, "widget": "line", "hint": "08:30" if feature.form == TIME else feature.form}
                for column in feature.columns
            ]
        timed = not {"hour", "minute", "second"}.isdisjoint(feature.parts)
        return [{"column": column, "widget": "date", "timed": timed} for column in feature.columns]

    @staticmethod
    def summary(column: Any, step: int, points: int) -> profile.Column:
        seconds, unreadable = _as_seconds(column)
        return replace(NumberInput.summary(seconds, step, points), kind="date", unreadable=unreadable)

    @staticmethod
    def typical(figures: Mapping[str, Any]) -> str:
        return profile.moment(figures["quantiles"]["0.5"]) if figures["quantiles"] else ""

    @staticmethod
    def sampled(column: Any) -> np.ndarray:
        return _as_seconds(column)[0]


def _encoded(feature: Feature, name: str, values: list[Any]) -> np.ndarray:
    if any(isinstance(value, (date, time)) for value in values):
        return _parts(feature, name, pa.array(values))
    for index, value in enumerate(values):
        if value is not None and not isinstance(value, str):
            raise DloptError(f"row {index}: {name}: {value!r:.40} is not a date")
    return _parts(feature, name, pa.array([value or None for value in texts_of(feature, name, values)], pa.string()))


def _parts(feature: Feature, name: str, written: pa.Array) -> np.ndarray:
    try:
        found = parse_dates(written, feature.form)
    except DloptError:
        for index in range(len(written)):
            try:
                parse_dates(written.slice(index, 1), feature.form)
            except DloptError as error:
                raise DloptError(f"row {index}: {name}: {error}") from None
        raise
    return date_parts(found, feature.parts).astype(feature.dtype)


def _said(parts: Mapping[str, float]) -> str:
    if any(value != value for value in parts.values()):
        return MISSING
    if "days" in parts:
        return f"{datetime(1970, 1, 1, tzinfo=UTC) + timedelta(days=parts['days']):%Y-%m-%d %H:%M}".removesuffix(" 00:00")
    whole = {name: round(value) for name, value in parts.items()}
    if {"year", "month", "day"} <= set(whole):
        day = f"{whole['year']}-{whole['month']:02}-{whole['day']:02}"
        return f"{day} {whole['hour']:02}:{whole.get('minute', 0):02}" if "hour" in whole else day
    return ", ".join(f"{name} {WEEKDAYS[value] if name == 'weekday' else value}" for name, value in whole.items())


def _as_seconds(column: Any) -> tuple[np.ndarray, int]:
    """Seconds since 1970 with NaN, and how many values are no date."""
    if isinstance(column, np.ndarray) and column.dtype.kind == "f":
        return column, 0
    array = plain(column if isinstance(column, (pa.Array, pa.ChunkedArray)) else pa.array(column))
    if pa.types.is_floating(array.type):
        return array.to_numpy(zero_copy_only=False).astype(np.float64), 0
    found, reasons = dates(array, "")
    micros = found.cast(pa.int64())
    seconds = micros.fill_null(0).to_numpy() / 1e6
    return np.where(micros.is_null().to_numpy(zero_copy_only=False), np.nan, seconds), len(reasons)
