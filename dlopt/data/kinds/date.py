"""Dates and times, as the numbers that a model can learn from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, field_validator

from dlopt.data.encode import date_parts, known_form
from dlopt.data.kinds.number import Bound, in_units, no_column_twice
from dlopt.data.stats import moments
from dlopt.data.stats.moments import Moments
from dlopt.data.types.exact import exact_column, values_of
from dlopt.data.types.values import Reasons, dates
from dlopt.part import Feature, Part, Statistics

DatePart = Literal["year", "quarter", "month", "week", "day", "day_of_year", "weekday", "hour", "minute", "second", "days"]


class DateInput(Part):
    """Columns of dates or times; the model sees parts of each as numbers, missing ones filled with the mean."""

    kind: Literal["date"] = "date"
    columns: tuple[str, ...] = Field(min_length=1)
    """The columns: dates, timestamps, or texts such as 2026-11-24 or 2026-11-24T08:30:00Z; times with a zone become UTC."""
    name: str = "dates"
    """The name of the model's input."""
    parts: tuple[DatePart, ...] = Field(("year", "month", "day", "weekday"), min_length=1)
    """What the model sees of each date; weekday is 0 on Mondays, days are those since 1970, with fractions."""
    form: str = ""
    """How dates are written, for other texts than ISO 8601, as strptime has it (%d.%m.%Y)."""
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

    @property
    def shifts(self) -> bool:
        """Whether an offset may be subtracted before: not where the size of a number itself is what the model is to see."""
        return self.normalize not in ("max_abs", "none")

    def feature(self, table: pa.Table) -> Feature:
        shape = (len(self.columns) * len(self.parts),)
        return Feature(name=self.name, kind="date", dtype="float32", shape=shape, columns=self.columns, parts=self.parts, form=self.form)

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

    def fit(self, seen: Moments, feature: Feature, features: dict[str, Feature]) -> tuple[Feature, Statistics]:
        return feature, in_units(seen.statistics(self.normalize), feature)

    def finish(self, table: pa.Table, feature: Feature) -> np.ndarray:
        """Parts of the dates, float32 (rows, columns x parts)."""
        return values_of(table[feature.name], feature)
