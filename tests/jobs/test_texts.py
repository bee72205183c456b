"""Texts as a newcomer has them: messages in one file, and projects with a test file of their own, each from raw files to a graph."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from dlopt.artifact import Artifact, once
from dlopt.data.kinds import encode_rows
from dlopt.export.stage import EXPORT
from dlopt.part import Signature
from tests.commands import ROOT, dlopt, printed
from tests.export.test_formats import PLATFORMS

pytestmark = pytest.mark.slow


def artifact(result: dict[str, Any], name: str) -> Artifact:
    record = json.loads((Path(result["run"]) / "run.json").read_text())
    return Artifact.open((Path(result["run"]) / record["artifacts"][name]).resolve())


def test_spam_is_told_from_ham(shared: Path, tmp_path: Path) -> None:
    """Cold, in a process and on a Ray of its own."""
    words = ("run", ROOT / "jobs" / "sms.yaml", f"data.source.path={shared / 'sms' / 'sms.tsv'}", "--home", tmp_path, "--json")
    ended = dlopt(*words, timeout=500)
    assert ended.returncode == 0, ended.stderr
    result = json.loads(ended.stdout)
    assert result["metrics"]["test"]["f1"] >= 0.93
    data, export = artifact(result, "data"), artifact(result, "export.onnx")
    assert data.info["counts"]["read"] == 5574 and data.info["counts"]["bad"] == 0
    signature = Signature.model_validate_json(export.read("signature.json"))
    session = onnxruntime.InferenceSession(export.read("model.onnx"), providers=["CPUExecutionProvider"])
    texts = ["WINNER!! You have won a free prize, call 09061701461 now to claim", "ok see you at home later", ""]
    (together,) = session.run(None, encode_rows(signature, texts))
    spam = signature.target.labels.index("spam")
    assert together[0, spam] > 0.9 and together[1, spam] < 0.1 and np.isfinite(together).all()
    for row, text in enumerate(texts):  # however much padding its neighbours bring
        (alone,) = session.run(None, encode_rows(signature, [text]))
        np.testing.assert_allclose(alone[0], together[row], atol=1e-6)
    for part in PLATFORMS:
        found = once(EXPORT, part, tmp_path, artifact(result, "model"), data).info
        assert found["largest_difference"] <= 1e-5 and found["other_labels"] == 0 and found["rows"] == data.info["counts"]["test"], (
            part.kind
        )


def test_projects_are_tagged_by_title_and_description(shared: Path, ray_cluster: None, tmp_path: Path) -> None:
    folder, job = shared / "projects", ROOT / "jobs" / "projects.yaml"
    result = printed("run", job, "--home", tmp_path, f"data.source.path={folder / 'train.csv'}", f"data.test.path={folder / 'test.csv'}")
    assert result["metrics"]["test"]["macro_f1"] >= 0.72
    counts = artifact(result, "data").info["counts"]
    assert counts["train"] + counts["validation"] == 764 and counts["test"] == 191
