"""The command line, as a user has it: exit codes, what goes to stdout and to stderr, and one line for each mistake."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pytest
import yaml

from dlopt.cli import main
from dlopt.train import metrics_log
from tests.commands import ROOT, dlopt, environment, refused, start
from tests.served import alive, descendants

MNIST = ROOT / "jobs" / "mnist.yaml"
CSV_JOB = """
name: tiny
data:
  source: {{kind: csv, path: {path}}}
  inputs: [{{kind: number, columns: [a, b]}}]
  target: {{kind: category, column: c}}
  split: {{kind: {split}, train: 0.6, validation: 0.2, test: 0.2}}
model: {{kind: mlp, hidden: [4]}}
train: {{epochs: 2, batch_size: 8}}
"""


def csv_job(folder: Path, rows: dict[str, list[object]], split: str = "random") -> Path:
    """A job on a table of two numbers and a class."""
    pyarrow.csv.write_csv(pa.table(rows), folder / "rows.csv")
    job = folder / "job.yaml"
    job.write_text(CSV_JOB.format(path=folder / "rows.csv", split=split))
    return job


def table(rows: int) -> dict[str, list[object]]:
    return {"a": list(range(rows)), "b": [row * row % 17 for row in range(rows)], "c": ["yn"[row % 2] for row in range(rows)]}


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys\nfrom dlopt.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print([n for n in ('torch', 'ray', 'numpy', 'pydantic', 'rich') if n in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "[]"
    assert all(f"\n    {command} " in ended.stdout for command in ("run", "check", "schema", "serve", "submit", "runs"))


def test_check_prints_the_resolved_job_and_starts_no_ray(tmp_path: Path) -> None:
    job = csv_job(tmp_path, table(40))
    script = "import sys\nfrom dlopt.cli import main\ncode = main(['check', *sys.argv[1:]])\nprint(code, 'ray' in sys.modules)"
    words = [sys.executable, "-c", script, str(job), "train.optimizer.lr=3e-4"]
    ended = subprocess.run(words, capture_output=True, text=True, check=True)
    *lines, last = ended.stdout.splitlines()
    resolved = yaml.safe_load("\n".join(lines))
    assert last == "0 False"
    assert resolved["train"]["optimizer"] == {"kind": "adam", "lr": 3e-4, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}
    again = tmp_path / "again.yaml"
    again.write_text("\n".join(lines))
    assert yaml.safe_load(dlopt("check", again).stdout) == resolved


def test_schema_is_json_schema_with_a_text_for_every_field() -> None:
    schema = json.loads(dlopt("schema").stdout)
    assert schema["properties"]["seed"]["description"].startswith("Initial weights")
    assert "Sgd" in schema["$defs"]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.epoch=3", "train.epoch: unknown key; did you mean 'epochs'?"),
        ("train.epochs=many", "train.epochs: "),
        ("model.kind=mpl", "model: no kind 'mpl'; did you mean 'mlp'?"),
        ("data.inputs.0.columns=[a,zzz]", "data.source: has no column 'zzz'; its columns are a, b, c"),
        ("data.source.path=nowhere.csv", "data.source: nowhere.csv: no such file"),
        ("train.batch_size=2 resources.workers=3", "train.batch_size 2 is less than 3 workers"),
        ("augment=[{kind: random_crop}]", "augment.0: there is no image among data.inputs for random_crop"),
        ("export=[{kind: onnx},{kind: onnx}]", "export: one kind is there twice"),
        ("train", "'train': an override is written a.b=value"),
    ],
)
def test_a_mistake_in_a_job_is_one_line_that_names_the_field(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, says: str
) -> None:
    job = csv_job(tmp_path, table(40))
    overrides = [override] if "{" in override else override.split(" ")
    assert main(["check", str(job), *overrides]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1 and err.startswith("dlopt: ")
    assert says in err


def test_missing_and_broken_job_files(tmp_path: Path) -> None:
    assert refused("check", tmp_path / "none.yaml") == f"{tmp_path / 'none.yaml'}: no such job file"
    (tmp_path / "broken.yaml").write_text("name: [\n")
    assert "line 2" in refused("run", tmp_path / "broken.yaml", "--home", tmp_path / "home")
    assert not (tmp_path / "home").exists()


def test_a_home_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert refused("run", csv_job(tmp_path, table(40)), "--home", tmp_path / "file" / "home").startswith("--home: cannot write to")


def test_an_unknown_run_is_one_line(tmp_path: Path) -> None:
    assert "neither a run's folder nor the name of a job" in refused("serve", "nothing", "--home", tmp_path)
    assert dlopt("runs", "--home", tmp_path).stdout == f"no runs in {tmp_path}\n"
    assert json.loads(dlopt("runs", "--home", tmp_path, "--json").stdout) == []


@pytest.mark.ray
def test_a_cluster_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    job = csv_job(tmp_path, table(40))
    for address in ("127.0.0.1:9", "ray://127.0.0.1:9"):
        said = refused("run", job, "--home", tmp_path / "home", "--address", address, timeout=60)
        assert said == f"--address: nobody answers at {address} (Connection refused): is the cluster up?"
    assert "--address" in refused("submit", job, "--working-dir", tmp_path, "--address", "http://127.0.0.1:9", cwd=tmp_path)
    assert "not below the working folder" in refused("submit", MNIST, "--working-dir", tmp_path, "--address", "http://127.0.0.1:9")


@pytest.mark.slow
def test_a_run_on_numbers_from_csv_and_what_runs_says_of_it(tmp_path: Path) -> None:
    job = csv_job(tmp_path, table(200), split="stratified")
    home = tmp_path / "home"
    ended = dlopt("run", job, "--home", home)
    assert ended.returncode == 0, ended.stderr
    folder = Path(ended.stdout.strip())
    assert (folder / "report.html").is_file()
    (record,) = json.loads(dlopt("runs", "--home", home, "--json").stdout)
    assert (record["name"], record["run"]) == ("tiny", str(folder))
    _, line = dlopt("runs", "--home", home).stdout.splitlines()
    told = [
        f"accuracy {found['accuracy']:.4f}, roc_auc {found['roc_auc']:.4f}" for found in map(record["metrics"].get, ("validation", "test"))
    ]
    assert line.split() == ["tiny", record["created"], *" ".join(told).split(), str(folder)]


@pytest.mark.slow
def test_bad_rows_stop_a_run_in_one_line_and_nothing_is_lost(tmp_path: Path) -> None:
    home = tmp_path / "home"
    rows = table(40)
    rows["c"][3] = "alone"
    job = csv_job(tmp_path, rows, split="stratified")
    assert "class 'alone' has 1 row(s), too few for 3 stratified splits" in refused("run", job, "--home", home)
    workers = refused("run", job, "data.split.kind=random", "resources.workers=40", "train.batch_size=64", "--home", home)
    assert workers.startswith("resources.workers: 40 workers on ")
    rows["c"][3] = "n"
    assert dlopt("run", csv_job(tmp_path, rows, split="stratified"), "--home", home).returncode == 0


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_last_checkpoint(mnist: None, tmp_path: Path) -> None:
    words = ("run", MNIST, "train.epochs=12", "train.log_every=1", "--json", "--home")
    killed = start(*words, tmp_path / "killed")
    deadline = time.monotonic() + 120
    while not any("train" in line and line["epoch"] >= 3 for path in _logs(tmp_path / "killed") for line in metrics_log.read(path)):
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    below = descendants(killed.pid)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert alive(below, 120) == {}  # the last of Ray's processes take a minute to notice
    again, whole = dlopt(*words, tmp_path / "killed"), dlopt(*words, tmp_path / "whole")
    assert "going on after epoch" in again.stderr
    (log,), (undisturbed,) = _logs(tmp_path / "killed"), _logs(tmp_path / "whole")
    keys = ("step", "epoch", "rows", "loss", "rate", "gradient_norm", "train", "validation")
    assert [[line.get(key) for key in keys] for line in metrics_log.read(log)] == [
        [line.get(key) for key in keys] for line in metrics_log.read(undisturbed)
    ]
    weights = [path.with_name("weights.safetensors").read_bytes() for path in (log, undisturbed)]
    assert weights[0] == weights[1]
    assert json.loads(again.stdout)["metrics"] == json.loads(whole.stdout)["metrics"]


def _logs(home: Path) -> list[Path]:
    return sorted(home.glob(f"model/*/{metrics_log.NAME}"))


@pytest.mark.slow
def test_ctrl_c_stops_a_run_in_one_line_and_leaves_nothing_running(mnist: None, tmp_path: Path) -> None:
    process = start("run", MNIST, "train.epochs=500", "resources.workers=1", "--home", tmp_path)
    deadline = time.monotonic() + 120
    while not any(True for path in _logs(tmp_path) for _ in metrics_log.read(path)):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    below = descendants(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert said.splitlines()[-1] == "dlopt: stopped; the same command goes on from here"
    assert "Traceback" not in said
    assert alive(below, 30) == {}


def test_serve_refuses_a_port_in_use_in_one_line(tmp_path: Path) -> None:
    from tests.served import make_export

    export = make_export(tmp_path)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"name": "m", "artifacts": {"export.onnx": os.path.relpath(export.path, folder)}}))
    (folder / "job.yaml").write_text("serve: {}\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refused("serve", folder, "--host", "127.0.0.1", "--port", port, env=environment())
    assert said == f"--port: {port} is in use: stop what listens there or give another"
