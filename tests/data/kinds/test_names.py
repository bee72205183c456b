"""Names are looked up exactly: no name that is put together of others is taken for another one, or is refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pyarrow as pa
import pytest

from dlopt.data.clean import Outliers
from dlopt.data.kinds import CategoryInput, CategoryTarget, DateInput, NumberInput, NumberTarget, TextInput
from dlopt.data.kinds.number import GroupMedian
from dlopt.data.section import Data
from dlopt.data.table.split import RandomSplit, TimeSplit
from dlopt.export.graph import onnx_file
from dlopt.models import Linear, build_network
from dlopt.part import DloptError
from tests.arranged import arranged, feature_of, quarantine_of, section_of, signature_of, statistics_of

ROWS = 90
ALL = RandomSplit(train=1, validation=0, test=0)
NEEDED = "is a name that dlopt needs itself: give this input another `name`"


def test_a_fill_goes_by_the_column_of_that_very_name(tmp_path: Path) -> None:
    """x is filled by b, and not by `a/b`, whose name ends in it and stands before it."""
    values = [float(row % 3) if row % 2 else None for row in range(ROWS)]
    table = pa.table(
        {"x": values, "a/b": ["same"] * ROWS, "b": [f"g{row % 3}" for row in range(ROWS)], "label": ["y", "n", "n"] * (ROWS // 3)}
    )
    inputs = (NumberInput(columns=("x",), fill=GroupMedian(by="b")), CategoryInput(columns=("a/b", "b")))
    data = arranged(section_of(*inputs, split=ALL), table, tmp_path)
    known = feature_of(data, "categories").vocabularies[1]
    fills = dict(zip(known, [row[0] for row in statistics_of(data).group_fill[1:]], strict=True))
    assert fills == {"g0": 0.0, "g1": 1.0, "g2": 2.0}


def test_inputs_and_columns_whose_names_join_alike_are_two(tmp_path: Path) -> None:
    """`a` with `b/c`, and `a/b` with `c`."""
    table = pa.table({"b/c": ["x", "y"] * (ROWS // 2), "c": ["p", "q", "r"] * (ROWS // 3), "label": ["y", "n"] * (ROWS // 2)})
    data = arranged(
        section_of(CategoryInput(name="a", columns=("b/c",)), CategoryInput(name="a/b", columns=("c",)), split=ALL), table, tmp_path
    )
    assert set(feature_of(data, "a").vocabularies[0]) == {"x", "y"} and set(feature_of(data, "a/b").vocabularies[0]) == {"p", "q", "r"}


def test_a_column_whose_name_begins_as_the_split_does_is_warned_of(tmp_path: Path) -> None:
    """`day.length` is no part of `day`, so its drift is a finding; `day.days` is one."""
    days = np.datetime64("2020-01-01") + np.arange(400)
    table = pa.table({"day": days, "day.length": np.arange(400) % 7 + np.repeat([0.0, 100.0], 200), "label": ["y", "n"] * 200})
    inputs = (NumberInput(columns=("day.length",)), DateInput(columns=("day",), parts=("days",)))
    data = arranged(section_of(*inputs, split=TimeSplit(column="day", train=0.5, validation=0.25, test=0.25)), table, tmp_path)
    drifting = {line.partition(":")[0] for line in data.manifest.info["warnings"] if "drifts" in line}
    assert drifting == {"day.length"}


def test_rows_that_are_set_aside_keep_columns_of_any_name(tmp_path: Path) -> None:
    table = pa.table({"a/b": [1.0] * 50 + [1e6], "c": ["x"] * 51, "label": [*["y", "n"] * 25, "y"]})
    inputs = (NumberInput(name="n", columns=("a/b",)), CategoryInput(name="a", columns=("c",)))
    data = arranged(section_of(*inputs, split=ALL, clean=(Outliers(columns=("a/b",), method="quantile", high=0.9),)), table, tmp_path)
    assert [(row["a/b"], row["c"]) for row in quarantine_of(data)] == [(1e6, "x")]


@pytest.mark.parametrize(
    ("inputs", "target", "said"),
    [
        (
            [TextInput(column="t", name="__high")],
            CategoryTarget(),
            f"inputs: '__high' {NEEDED}",
        ),
        ([TextInput(column="t", name="a\x1fb")], CategoryTarget(), rf"inputs: 'a\x1fb' {NEEDED}"),
        (
            [DateInput(columns=("signup",)), NumberInput(columns=("signup.month",))],
            CategoryTarget(),
            "inputs: the month of 'signup' is called 'signup.month', as another column is: rename that column",
        ),
        ([DateInput(columns=("signup",))], NumberTarget(columns=("signup.year",)), "inputs: the year of 'signup' is called 'signup.year'"),
    ],
)
def test_names_that_collide_are_refused_in_one_line(inputs: list[Any], target: Any, said: str) -> None:
    with pytest.raises(DloptError) as error:
        section_of(*inputs, target=target)
    assert said in str(error.value) and len(str(error.value).splitlines()) == 1


def test_a_part_that_the_model_does_not_see_takes_no_name() -> None:
    section = section_of(DateInput(columns=("signup",), parts=("year",)), NumberInput(columns=("signup.month",)))
    assert isinstance(section, Data)


def test_an_input_may_be_called_as_another_ones_codes_are_in_theonnx_file(tmp_path: Path) -> None:
    table = pa.table({"x": [float(row) for row in range(ROWS)], "c": ["p", "q", "r"] * (ROWS // 3), "label": ["y", "n"] * (ROWS // 2)})
    inputs = (CategoryInput(name="a", columns=("c",)), NumberInput(name="a codes", columns=("x",)))
    data = arranged(section_of(*inputs, split=ALL), table, tmp_path)
    signature = signature_of(data)
    network = build_network(Linear(), signature, {"a codes": statistics_of(data, "a codes")}, 0)
    session = onnxruntime.InferenceSession(onnx_file(network.eval(), signature, ""), providers=["CPUExecutionProvider"])
    assert [given.name for given in session.get_inputs()] == ["a", "a codes"]
    (found,) = session.run(None, {"a": np.array([["p"]], object), "a codes": np.array([[3.0]], np.float32)})
    assert found.shape == (1, 2)
