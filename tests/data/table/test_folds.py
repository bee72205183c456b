"""Cross-validation, and the command that prepares and does no more."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from dlopt import pipeline, spec
from dlopt.artifact import Artifact
from dlopt.data import rows as rows_of
from dlopt.data.prepared import Split
from dlopt.progress import silent
from dlopt.report import words

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job on a small table."""
    folder = tmp_path_factory.mktemp("folds")
    random = np.random.default_rng(1)
    x = random.normal(size=(400, 2))
    table = pa.table({"a": x[:, 0], "b": x[:, 1], "city": random.choice(["Rome", "Oslo"], 400), "label": (x.sum(axis=1) > 0).astype(int)})
    pq.write_table(table, folder / "rows.parquet")
    text: dict[str, Any] = {
        "name": "small",
        "data": {
            "source": {"kind": "parquet", "path": str(folder / "rows.parquet")},
            "inputs": [{"kind": "number", "columns": ["a", "b"]}, {"kind": "category", "columns": ["city"]}],
            "target": {"kind": "category", "column": "label"},
            "split": {"kind": "stratified"},
        },
        "model": {"kind": "mlp", "hidden": [8]},
        "train": {"epochs": 3, "batch_size": 32, "optimizer": {"kind": "adam", "lr": 0.02}},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(text))
    return folder / "job.yaml"


def accuracies(report: Path) -> dict[str, str]:
    """What the report's table of folds says of each line's accuracy."""
    (table,) = re.findall(r'<table class="wide" id="folds">(.*?)</table>', report.read_text(), re.DOTALL)
    heads, *lines = ([cell.strip() for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line)] for line in table.split("</tr>")[:-1])
    return {cells[0]: cells[heads.index("accuracy")] for cells in lines}


def rows(data: Artifact, name: str) -> set[bytes]:
    split = Split.open(data, name).read()
    return {row.tobytes() for row in split["numbers"]}


@pytest.mark.slow
def test_folds_are_all_trained_and_their_spread_is_told(job: Path, tmp_path: Path) -> None:
    done = pipeline.run(spec.load(job, ["train.folds=4"]), tmp_path)
    record = json.loads((done.folder / "run.json").read_text())
    assert len(record["folds"]) == 4
    values = [fold["metrics"]["validation"]["accuracy"] for fold in record["folds"]]
    assert done.spread["validation"]["accuracy"] == {"mean": statistics.mean(values), "std": statistics.stdev(values)}
    assert min(values) > 0.7
    spread = done.spread["validation"]["accuracy"]
    shown = [words.percent(value, 2) for value in (*values, spread["mean"], spread["std"])]
    assert accuracies(done.folder / "report.html") == dict(zip(("1", "2", "3", "4", "mean", "spread"), shown, strict=True))


@pytest.mark.slow
def test_the_job_s_own_model_is_the_same_with_and_without_folds(job: Path, tmp_path: Path) -> None:
    with_folds = pipeline.run(spec.load(job, ["train.folds=2"]), tmp_path)
    without = pipeline.run(spec.load(job), tmp_path)
    assert without.metrics == with_folds.metrics and without.made == () and without.folder != with_folds.folder


def test_each_row_that_is_not_for_testing_is_validated_once(job: Path, tmp_path: Path) -> None:
    done = pipeline.run(spec.load(job, ["train.folds=4"]), tmp_path)
    record = json.loads((done.folder / "run.json").read_text())
    models = [Artifact.open((done.folder / fold["model"]).resolve()) for fold in record["folds"]]
    datas = [Artifact.open(tmp_path / "data" / model.manifest.parents["data"]) for model in models]
    held_out = [rows(data, "validation") for data in datas]
    assert len(set.union(*held_out)) == sum(map(len, held_out)) == 360
    assert len({frozenset(rows(data, "test")) for data in datas}) == 1
    assert all(not found & rows(data, "train") for found, data in zip(held_out, datas, strict=True))


def test_folds_read_the_sources_once(job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And each is what it would be by itself: the same files under the same name."""
    read = []
    whole = rows_of.read_sources
    monkeypatch.setattr(rows_of, "read_sources", lambda *given: read.append(1) or whole(*given))
    section = spec.load(job, ["train.folds=3"])
    with pipeline._steps(section, tmp_path / "folds", None, silent) as steps:
        together = pipeline._all_prepared(section, steps)
        assert len(read) == 1 and len(together) == 4 and not list((tmp_path / "folds" / "rows").glob("[!.]*"))
        assert pipeline._all_prepared(section, steps) == together and len(read) == 1
    alone = pipeline.prepare(spec.load(job, ["data.fold.index=1", "data.fold.of=3"]), tmp_path / "alone")
    assert alone.manifest.digest == together[2].manifest.digest and alone.manifest.files == together[2].manifest.files


def test_prepare_stops_after_the_first_stage(job: Path, tmp_path: Path) -> None:
    data = pipeline.prepare(spec.load(job), tmp_path)
    assert data.info["counts"]["train"] == 320 and not (tmp_path / "model").exists()
    assert json.loads(data.read("profile.json"))["rows"] == {"train": 320, "validation": 40, "test": 40}
    assert pipeline.run(spec.load(job), tmp_path).made[0] == "model"
