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
from dlopt.docstrings import json_schema
from dlopt.spec import Job
from dlopt.train.watch import metrics_log
from tests.commands import ROOT, environment, here, refused, refused_here, start
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
    assert all(
        f"\n    {command} " in ended.stdout for command in ("init", "run", "check", "explain", "schema", "serve", "submit", "runs", "gc")
    )


def test_check_prints_the_resolved_job_and_loads_neither_ray_nor_the_exporter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = csv_job(tmp_path, table(40))
    script = (
        "import sys\nfrom dlopt.cli import main\ncode = main(['check', *sys.argv[1:]])\n"
        "print(code, [n for n in ('ray', 'onnx', 'onnxruntime', 'matplotlib') if n in sys.modules])"
    )
    words = [sys.executable, "-c", script, str(job), "train.optimizer.lr=3e-4"]
    ended = subprocess.run(words, capture_output=True, text=True, check=True)
    *lines, last = ended.stdout.splitlines()
    resolved = yaml.safe_load("\n".join(lines))
    assert last == "0 []"
    assert resolved["train"]["optimizer"] == {
        "kind": "adam",
        "lr": 3e-4,
        "betas": [0.9, 0.999],
        "eps": 1e-8,
        "weight_decay": 0.0,
        "amsgrad": False,
    }
    again = tmp_path / "again.yaml"
    again.write_text("\n".join(lines))
    assert yaml.safe_load(here(capsys, "check", again).stdout) == resolved


def test_schema_is_json_schema_with_a_text_for_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    schema = json.loads(here(capsys, "schema").stdout)
    assert schema["properties"]["seed"]["description"].startswith("Initial weights")
    assert schema == json_schema(Job)  # of which every field has one: see test_spec


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.epoch=3", "train.epoch: unknown key; did you mean 'epochs'?"),
        ("train.epochs=many", 'train.epochs: must be a whole number, not "many"'),
        ("model.kind=mpl", "model: no kind 'mpl'; did you mean 'mlp'?"),
        ("data.inputs.0.columns=[a,zzz]", "data.source: has no column 'zzz'; its columns are a, b, c"),
        ("data.source.path=nowhere.csv", f"data.source: nowhere.csv: no such file in {Path.cwd()}, from where relative paths go"),
        ("train.batch_size=2 resources.workers=3", "train.batch_size 2 is less than 3 workers"),
        ("augment=[{kind: random_crop}]", "augment.0: there is no image among data.inputs for random_crop"),
        ("export=[{kind: onnx},{kind: onnx}]", "export: one kind is there twice"),
        ("train", "'train': an override is written a.b=value"),
        ("train.=3", "'train.=3': an override is written a.b=value"),
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
    assert len(err.splitlines()) == 1
    assert err.startswith((f"dlopt: {job}: {says}", f"dlopt: {says}"))


def test_missing_and_broken_job_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused_here(capsys, "check", tmp_path / "none.yaml") == f"{tmp_path / 'none.yaml'}: no such job file"
    (tmp_path / "broken.yaml").write_text("name: [\n")
    assert refused_here(capsys, "run", tmp_path / "broken.yaml", "--home", tmp_path / "home") == (
        f"{tmp_path / 'broken.yaml'}: line 2, column 1: not YAML: expected the node content, but found '<stream end>'"
    )
    assert not (tmp_path / "home").exists()


def test_a_home_that_cannot_be_written_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    home = tmp_path / "file" / "home"
    assert refused_here(capsys, "run", csv_job(tmp_path, table(40)), "--home", home).startswith("--home: cannot write to")


def test_an_unknown_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "neither a run's folder nor the name of a job" in refused_here(capsys, "serve", "nothing", "--home", tmp_path)
    assert here(capsys, "runs", "--home", tmp_path).stdout == f"no runs in {tmp_path}\n"
    assert json.loads(here(capsys, "runs", "--home", tmp_path, "--json").stdout) == []


@pytest.mark.ray
def test_a_cluster_that_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before the shared cluster starts: a process that is connected already would stay with it."""
    job = csv_job(tmp_path, table(40))
    for address in ("127.0.0.1:9", "ray://127.0.0.1:9"):
        said = refused_here(capsys, "run", job, "--home", tmp_path / "home", "--address", address)
        assert said == f"--address: nobody answers at {address} (Connection refused): is the cluster up?"
    nowhere = ("--working-dir", tmp_path, "--address", "http://127.0.0.1:9")
    assert "--address" in refused_here(capsys, "submit", job, *nowhere)
    assert "not below the working folder" in refused_here(capsys, "submit", MNIST, *nowhere)


@pytest.mark.usefixtures("ray_cluster")
def test_a_run_on_numbers_from_csv_and_what_runs_says_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = csv_job(tmp_path, table(200), split="stratified")
    home = tmp_path / "home"
    ended = here(capsys, "run", job, "--home", home)
    assert ended.returncode == 0, ended.stderr
    folder = Path(ended.stdout.strip())
    assert (folder / "report.html").is_file()
    (record,) = json.loads(here(capsys, "runs", "--home", home, "--json").stdout)
    assert (record["name"], record["run"]) == ("tiny", str(folder))
    _, line = here(capsys, "runs", "--home", home).stdout.splitlines()
    told = [
        f"accuracy {found['accuracy']:.4f}, roc_auc {found['roc_auc']:.4f}" for found in map(record["metrics"].get, ("validation", "test"))
    ]
    assert line.split() == ["tiny", record["created"], *" ".join(told).split(), str(folder)]


@pytest.mark.usefixtures("ray_cluster")
def test_bad_rows_stop_a_run_in_one_line_and_nothing_is_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = tmp_path / "home"
    rows = table(40)
    rows["c"][3] = "alone"
    job = csv_job(tmp_path, rows, split="stratified")
    assert "class 'alone' has 1 row(s), too few for 3 stratified splits" in refused_here(capsys, "run", job, "--home", home)
    workers = refused_here(capsys, "run", job, "data.split.kind=random", "resources.workers=40", "train.batch_size=64", "--home", home)
    assert workers.startswith("resources.workers: 40 workers on ")
    rows["c"][3] = "n"
    assert here(capsys, "run", csv_job(tmp_path, rows, split="stratified"), "--home", home).returncode == 0


@pytest.mark.slow
def test_a_bad_row_is_one_line_where_ray_starts_and_ends_around_it(tmp_path: Path) -> None:
    rows = table(40)
    rows["c"][3] = "alone"
    job = csv_job(tmp_path, rows, split="stratified")
    assert "class 'alone' has 1 row(s), too few for 3 stratified splits" in refused("run", job, "--home", tmp_path / "home")


TWELVE = ("run", MNIST, "train.epochs=12", "train.log_every=1", "--json", "--home")


@pytest.fixture(scope="module")
def killed(mnist: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, str]]:
    """The home of a run that was killed after its third epoch, and the processes that were below it."""
    home = tmp_path_factory.mktemp("killed")
    process = start(*TWELVE, home)
    deadline = time.monotonic() + 300
    while not any("train" in line and line["epoch"] >= 3 for path in _logs(home) for line in metrics_log.read(path)):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    below = descendants(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    return home, below


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_last_checkpoint(killed: tuple[Path, dict[int, str]], tmp_path: Path) -> None:
    """At once, while Ray's processes of the killed one are still there."""
    home, _ = killed
    processes = [start(*TWELVE, folder) for folder in (home, tmp_path)]
    (again, said), (whole, _) = (process.communicate(timeout=300) for process in processes)
    assert "going on after epoch" in said
    (log,), (undisturbed,) = _logs(home), _logs(tmp_path)
    keys = ("step", "epoch", "rows", "loss", "rate", "gradient_norm", "train", "validation")
    assert [[line.get(key) for key in keys] for line in metrics_log.read(log)] == [
        [line.get(key) for key in keys] for line in metrics_log.read(undisturbed)
    ]
    weights = [path.with_name("weights.safetensors").read_bytes() for path in (log, undisturbed)]
    assert weights[0] == weights[1]
    assert json.loads(again)["metrics"] == json.loads(whole)["metrics"]


def _logs(home: Path) -> list[Path]:
    return sorted(home.glob(f"model/*/{metrics_log.NAME}"))


@pytest.mark.slow
def test_ctrl_c_stops_a_run_in_one_line_and_leaves_nothing_running(mnist: None, tmp_path: Path) -> None:
    process = start("run", MNIST, "train.epochs=500", "resources.workers=1", "--home", tmp_path)
    deadline = time.monotonic() + 300
    while not any(True for path in _logs(tmp_path) for _ in metrics_log.read(path)):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    below = descendants(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.splitlines()[-1] == "dlopt: stopped; finished stages stay, and the same command goes on from here"
    assert "Traceback" not in said
    assert alive(below, 30) == {}


@pytest.mark.slow
def test_nothing_of_a_killed_run_stays(killed: tuple[Path, dict[int, str]]) -> None:
    """The last of Ray's processes take a minute to notice, in which the tests above have run."""
    _, below = killed
    assert len(below) > 3
    assert alive(below, 120) == {}


def test_plot_schedule_draws_the_rate_in_letters_or_into_a_file_before_anything_is_prepared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = csv_job(tmp_path, table(200))
    words = ("plot-schedule", job, "train.schedule={kind: cosine, warmup: 0.5}", "--home", tmp_path / "home")
    *plot, last = here(capsys, *words).stdout.splitlines()
    assert plot[0].strip() == "learning rate" and plot[-1].split() == ["epoch", "0", "1", "2"]
    assert last == "120 training rows (about, before cleaning), 30 steps; -o FILE.svg draws a figure."
    assert here(capsys, *words, "--rows", 800).stdout.splitlines()[-1].startswith("800 training rows (--rows), 200 steps")
    assert here(capsys, *words, "-o", tmp_path / "rate.svg").stdout == f"{tmp_path / 'rate.svg'}\n"
    assert (tmp_path / "rate.svg").read_text().startswith("<?xml")
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.schedule={kind: cosine}", "--output: rate.gif: the ending must be one of .svg, .png, .html"),
        (
            "train.schedule={kind: multi_step, milestones: [1, {steps: 40}]}",
            "train.schedule.milestones.1: 40 steps is more than the 30 steps that there are: make it shorter or raise train.epochs",
        ),
        (
            "data.split={kind: given, column: b, names: {'1': train, '2': test}}",
            "--rows: the data are not prepared, and their rows cannot be counted without reading them all: say how many there are",
        ),
        (
            "train.schedule={kind: cosine, warmup: [1]}",
            "train.schedule.warmup: must be a number of epochs, or one of {steps: 100}, {epochs: 0.5}, {rows: 10000} and {share: 0.05}",
        ),
    ],
)
def test_plot_schedule_says_in_one_line_what_it_cannot_draw(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, says: str
) -> None:
    job = csv_job(tmp_path, table(200))
    assert refused_here(capsys, "plot-schedule", job, override, "-o", "rate.gif", "--home", tmp_path).removeprefix(f"{job}: ") == says


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.slow
def test_find_batch_and_plot_schedule_take_prepared_data_and_start_no_ray(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job, home = csv_job(tmp_path, table(200)), tmp_path / "home"
    here(capsys, "prepare", job, "--home", home)
    commands: list[tuple[object, ...]] = [
        ("find-batch", job, "train.optimizer={kind: sgd, lr: 0.1}", "--memory", 500),
        ("find-batch", job, "--json"),
        ("find-batch", job, "train.scale_lr={base: 8}", "train.optimizer.lr=0.1", "--memory", 500),
        ("plot-schedule", job),
    ]
    script = (
        "import json, sys\nfrom dlopt.cli import main\n"
        "for words in json.loads(sys.argv[1]): print('code', main(words))\nprint('ray' in sys.modules)"
    )
    words = json.dumps([[*map(str, command), "--home", str(home)] for command in commands])
    ended = subprocess.run([sys.executable, "-c", script, words], capture_output=True, text=True, check=True, env=environment())
    *parts, last = ended.stdout.split("code 0\n")
    assert (last, len(parts)) == ("False\n", 4)
    (first, *rates), (found,), (_, scaled), drawn = (part.splitlines() for part in parts)
    rows = json.loads(found)["rows"]
    assert first.startswith(f"train.batch_size={rows} ") and first.endswith(f"of 500 MiB; there are {rows} training rows")
    assert rates[0] == f"train.optimizer.lr={0.1 * rows / 8:.3g}   by the linear rule"
    assert rates[1] == f"train.optimizer.lr={0.1 * (rows / 8) ** 0.5:.3g}   by the sqrt rule"
    assert scaled == f"scale_lr (linear) makes its rate {0.1 * rows / 8:.3g}"
    assert f"{rows} training rows (as prepared)" in drawn[-1]


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


def test_a_mistake_is_one_line_and_its_traceback_comes_before_it_where_that_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = refused_here(capsys, "check", tmp_path / "none.yaml")
    monkeypatch.setenv("DLOPT_TRACEBACK", "1")
    ended = here(capsys, "check", tmp_path / "none.yaml")
    first, *_, last = ended.stderr.splitlines()
    assert (ended.returncode, last) == (2, f"dlopt: {line}")
    assert first.startswith("Traceback") and "in load" in ended.stderr
