"""The main job, as a newcomer runs it: raw digits to a served model, and the same again."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from dlopt.artifact import Artifact
from dlopt.data.prepared import Split
from dlopt.train.measure.evaluate import predict
from dlopt.train.start import trained_network
from dlopt.train.watch import metrics_log
from tests.commands import ROOT, dlopt, here, printed, start
from tests.served import alive, descendants, free_port

MNIST = ROOT / "jobs" / "mnist.yaml"
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("mnist")]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def result(home: Path, mnist: None) -> dict[str, Any]:
    """What the main job prints with --json, its test split widened to 1,000 digits; and what it said on the way."""
    ended = dlopt("run", MNIST, "data.split.train=0.7", "data.split.test=0.2", "--home", home, "--json")
    assert ended.returncode == 0, ended.stderr
    assert len(ended.stdout.splitlines()) == 1
    return dict(json.loads(ended.stdout)) | {"said": ended.stderr}


def artifacts(result: dict[str, Any]) -> dict[str, Artifact]:
    folder = Path(result["run"])
    record = json.loads((folder / "run.json").read_text())
    return {name: Artifact.open((folder / path).resolve()) for name, path in record["artifacts"].items()}


def test_the_main_job_learns(result: dict[str, Any]) -> None:
    assert set(result) == {"run", "name", "metrics", "seconds", "said"}
    assert result["metrics"]["test"]["accuracy"] >= 0.92
    assert result["metrics"]["validation"]["accuracy"] >= 0.92
    assert all(f"mnist: {stage}" in result["said"] for stage in ("ray", "prepare", "fit", "export", "report"))


def test_its_artifacts_are_whole_and_say_what_made_them(result: dict[str, Any]) -> None:
    found = artifacts(result)
    assert set(found) == {"data", "model", "export.onnx"}
    assert found["model"].manifest.parents == {"data": found["data"].manifest.digest}
    assert found["export.onnx"].manifest.parents == {name: found[name].manifest.digest for name in ("model", "data")}
    assert found["data"].info["counts"] | {"duplicates": 0} == {
        "read": 5000, "bad": 0, "dropped": 0, "duplicates": 0, "train": 3500, "validation": 500, "test": 1000,
    }  # fmt: skip
    assert found["export.onnx"].info["largest_difference"] <= 1e-5
    assert found["export.onnx"].info["rows"] == 1000
    lines = list(metrics_log.read(found["model"].path / metrics_log.NAME))
    steps, epochs = [line for line in lines if "loss" in line], [line for line in lines if "train" in line]
    assert all({"step", "epoch", "rows", "loss", "rate", "gradient_norm"} <= set(line) for line in steps)
    assert [line["epoch"] for line in epochs] == list(range(1, 16))
    assert pq.read_table(found["model"].path / "predictions.parquet").num_rows == 1000
    assert (Path(result["run"]) / "report.html").stat().st_size < 2**20


def test_the_same_command_again_starts_no_ray(result: dict[str, Any], home: Path) -> None:
    words = ["run", str(MNIST), "data.split.train=0.7", "data.split.test=0.2", "--home", str(home), "--json"]
    script = "import sys, json\nfrom dlopt.cli import main\ncode = main(sys.argv[1:])\nprint(code, 'ray' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=True)
    again, last = ended.stdout.splitlines()
    assert last == "0 False"
    assert "all is done already" in ended.stderr
    assert {key: json.loads(again)[key] for key in ("run", "metrics")} == {key: result[key] for key in ("run", "metrics")}


def test_another_section_of_serving_is_taken_up_without_training_again(
    result: dict[str, Any], home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = here(capsys, "run", MNIST, "data.split.train=0.7", "data.split.test=0.2", "serve.max_rows=2000", "--home", home)
    assert "all is done already" in ended.stderr
    assert "max_rows: 2000" in (Path(result["run"]) / "job.yaml").read_text()


def test_what_is_served_is_what_was_trained(result: dict[str, Any], home: Path) -> None:
    """1,000 test digits over HTTP, as numbers and as PNG, against torch."""
    found = artifacts(result)
    split = Split.open(found["data"], "test")
    images = split.read()["image"][..., 0]
    expected, _ = predict(trained_network(found["model"], found["data"]), split, torch.device("cpu"))
    port = free_port()
    process = start("serve", "mnist", "--home", home, "--host", "127.0.0.1", "--port", port)
    try:
        said = []
        assert process.stdout
        for line in process.stdout:
            said.append(line)
            if line.startswith("Ctrl-C"):
                break
        assert found["export.onnx"].manifest.digest in said[0], said
        url = f"http://127.0.0.1:{port}/v1/models/mnist:predict"
        replies: list[dict[str, Any]] = []
        for start_row in range(0, 1000, 100):
            part = images[start_row : start_row + 100]
            rows = part.tolist() if start_row < 500 else [{"image": {"b64": png(image)}} for image in part]
            reply = httpx.post(url, json={"instances": rows}, timeout=60, trust_env=False)
            assert reply.headers["x-model-digest"] == found["export.onnx"].manifest.digest
            replies += reply.raise_for_status().json()["predictions"]
        below = descendants(process.pid)
    finally:
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=60)
    assert [row["label"] for row in replies] == expected.argmax(dim=1).tolist()
    assert np.abs(np.array([row["probabilities"] for row in replies]) - expected.numpy()).max() <= 1e-5
    assert alive(below) == {}


def png(image: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize(("job", "least"), [("mnist_full", 0.976), ("mnist_cnn", 0.990)])
def test_all_of_mnist(job: str, least: float, shared: Path, home: Path, ray_cluster: None) -> None:
    paths = [f"data.source.path={shared}/mnist/train.parquet", f"data.test.path={shared}/mnist/test.parquet"]
    assert printed("run", ROOT / "jobs" / f"{job}.yaml", *paths, "--home", home)["metrics"]["test"]["accuracy"] >= least
