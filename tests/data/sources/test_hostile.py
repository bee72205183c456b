"""Two hundred hostile files (see tests/hostile.py): each is read with the rows and values that pandas, json or pyarrow find, or refused in
one clear line that names it; and what is read goes through the profile and the first pass of prepare, where no row is lost."""

from __future__ import annotations

import json
import math
import uuid
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from dlopt.data.count import most_rows
from dlopt.data.kinds import CategoryInput, CategoryTarget, DateInput, NumberInput, TextInput
from dlopt.data.stats import begin, guard, guess
from dlopt.data.stats.describe import describe
from dlopt.data.stats.summary import summarise
from dlopt.data.table.spill import Spill, from_json
from dlopt.data.types.canonical import MISSING, as_text
from dlopt.data.types.dates import are_times
from dlopt.data.types.values import doubles
from dlopt.part import DloptError
from tests.arranged import section_of
from tests.hostile import LABEL, Hostile, arrow_file, csv_file, json_file, parquet_file
from tests.packages import package

MADE = {"csv": (csv_file, 60), "json": (json_file, 50), "parquet": (parquet_file, 50), "arrow": (arrow_file, 40)}


CASES = [(kind, seed) for kind, (_, count) in MADE.items() for seed in range(count)]


@pytest.mark.parametrize(
    ("kind", "seed"), [pytest.param(*case, marks=() if place % 3 == 0 else pytest.mark.slow) for place, case in enumerate(CASES)]
)
def test_a_hostile_file_is_read_as_others_do_or_refused_in_a_line(kind: str, seed: int, tmp_path: Path) -> None:
    case = MADE[kind][0](seed, tmp_path)
    try:
        tables = list(case.source.tables())
    except DloptError as error:
        refused(case, str(error))
        return
    expected = case.columns()
    found = {name: [value for table in tables for value in table[name].to_pylist()] for name in tables[0].column_names}
    rows = len(next(iter(expected.values()), []))
    assert rows <= (most_rows(case.source) or rows)
    assert {name for name in expected if name or kind != "csv"} == set(found)
    for name, values in found.items():
        assert len(values) == rows
        same(kind, name, values, expected[name])
    if rows:
        goes_on(case, tables, tmp_path / "spill")


def refused(case: Hostile, said: str) -> None:
    assert case.fault, said
    assert "\n" not in said and case.source.path in said and 20 < len(said) < len(case.source.path) + 400
    assert "Traceback" not in said and "Error" not in said


def same(kind: str, name: str, values: list[Any], expected: list[Any]) -> None:
    """What a source gives against what is there: of typed files the same values, of text files their texts."""
    if kind == "csv":
        assert [value or None for value in values] == [value or None for value in expected], name
    elif kind == "json":
        assert list(map(of_json, values)) == list(map(json_text, expected)) or list(map(nested, values)) == list(map(nested, expected)), (
            name
        )
    else:
        assert list(map(nested, values)) == list(map(nested, expected)), name


def json_text(value: Any) -> Any:
    """A value of JSON as the text that stands for it; of what is in lists and objects, what JSON says."""
    if isinstance(value, (list, dict)):
        return nested(value)
    return None if value is None or value != value else as_text(well_formed(value)) or None


def of_json(text: Any) -> Any:
    """The way back of lists and objects that became texts."""
    if isinstance(text, str) and text[:1] in ("[", "{"):
        try:
            return nested(json.loads(text))
        except ValueError:
            pass
    return nested(text) if isinstance(text, (list, dict)) else text or None


def well_formed(value: Any) -> Any:
    return "".join("\ufffd" if "\ud800" <= letter <= "\udfff" else letter for letter in value) if isinstance(value, str) else value


def nested(value: Any) -> Any:
    """Values that can be compared: a NaN equals another one, a key that is not there is null, a map is a list of pairs, and what parquet
    has no type for is text."""
    if isinstance(value, dict):
        return {key: nested(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, pa.MonthDayNano):
        return json.dumps(value)
    if isinstance(value, (list, tuple)):
        return [nested(inner) for inner in value]
    if isinstance(value, uuid.UUID):
        return str(value)
    return "nan" if isinstance(value, (float, Decimal)) and math.isnan(value) else well_formed(value)


def goes_on(case: Hostile, tables: list[pa.Table], folder: Path) -> None:
    """The profile and the first pass take whatever was read, and lose no row."""
    kinds = guess.kinds_of(case.source, [LABEL])
    meaning = case.source.meaning()
    table = pa.concat_tables(tables).combine_chunks()
    said = meaning.canonical(table, [name for name, kind in kinds.items() if kind in ("category", "text")])
    summary = summarise({name: said[name] for name in kinds}, kinds, [LABEL])
    described = describe({guard.WHOLE: summary}, [LABEL])
    json.dumps(described, allow_nan=False)
    assert summary.rows == len(table) and set(described["columns"]) == set(kinds)
    begun = begin.job_of(case.source, summary, [LABEL], guard.findings({guard.WHOLE: summary}, [LABEL])).text
    assert "\ndata:\n" in f"\n{begun}"
    of = {kind: [name for name, its in kinds.items() if its == kind and name != LABEL] for kind in ("number", "category", "date", "text")}
    together = {"number": NumberInput, "category": CategoryInput, "date": DateInput}
    times = [name for name in of["date"] if are_times(said[name])]
    of["date"] = [name for name in of["date"] if name not in times]
    parts = [together[kind](columns=of[kind]) for kind in together if of[kind]]
    parts += [DateInput(columns=times, name="times")] if times else []
    parts += [TextInput(column=name, name=f"text{number}") for number, name in enumerate(of["text"])]
    if not parts:
        return
    section = section_of(*parts, target=CategoryTarget(column=LABEL))
    features = tuple(part.meant(part.feature(case.source.peek(64)), meaning) for part in section.inputs)
    first_pass = Spill(section, features, False, str(folder), meaning)
    pieces = [from_json(text) for said in first_pass(table) for text in said["piece"]]
    assert sum(piece.read for piece in pieces) == len(table)
    assert sum(piece.rows + piece.reasons.total() for piece in pieces) == len(table)
    assert all("\n" not in reason for piece in pieces for reason in piece.reasons)


@pytest.mark.parametrize("seed", range(20))
def test_what_is_missing_and_what_is_a_number_is_what_pandas_says(seed: int, tmp_path: Path) -> None:
    pandas = package("pandas", "test")
    case = next(case for number in range(1000) if not (case := csv_file(seed + 100 * (1 + number), tmp_path)).fault)
    meaning = case.source.meaning()
    table = pa.concat_tables(case.source.tables())
    for name, expected in case.columns(na_values=list(MISSING)).items():
        canonical = meaning.canonical(table, [name])
        assert [value is None for value in canonical[name].to_pylist()] == [value is None for value in expected], name
        if meaning.type_of(name) == "number":
            values, wrong = doubles(canonical[name])
            numbers = pandas.to_numeric(pandas.Series(expected, dtype=object), errors="coerce").to_numpy(float)
            assert [repr(float(value)) for row, value in enumerate(values) if row not in wrong] == [
                repr(float(value)) for row, value in enumerate(numbers) if row not in wrong
            ], name
