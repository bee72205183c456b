"""What a person types: options before and after overrides, narrow windows, pipes that close, Ctrl-C, mistakes; and what is on the disk."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
import yaml

from dlopt import cli, disk, fields
from dlopt.api.profiles import Profile
from dlopt.cli import completion
from dlopt.data.stats import guard
from dlopt.data.stats.describe import describe
from dlopt.data.stats.summary import summarise
from dlopt.docstrings import json_schema
from dlopt.part import DloptError
from dlopt.runs import Outcome
from dlopt.spec import Job
from dlopt.terminal import Terminal, print_profile, print_runs
from tests.commands import dlopt, environment, here, refused_here, start
from tests.front.test_cli import csv_job, table

COMMANDS = cli.make_parser().commands


@pytest.fixture
def job(tmp_path: Path) -> Path:
    return csv_job(tmp_path, table(40))


def test_overrides_may_stand_before_and_after_options(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = str(job.parent / "home")
    for words in (
        ["plot-schedule", job, "train.epochs=5", "--rows", "80", "--home", home, "train.batch_size=16"],
        ["plot-schedule", "--rows", "80", job, "train.epochs=5", "--home", home, "train.batch_size=16"],
        ["plot-schedule", "--home", home, "--rows", "80", job, "train.epochs=5", "train.batch_size=16"],
    ):
        assert "80 training rows (--rows), 25 steps" in here(capsys, *words).stdout
    options = cli._options(["run", "job.yaml", "a=1", "--json", "b=2", "--home", "h", "c=3"])
    assert (options.overrides, options.json, str(options.home)) == (["a=1", "b=2", "c=3"], True, "h")
    options = cli._options(["compare", "one", "-o", "page.html", "two", "three"])
    assert options.run == ["one", "two", "three"]


WORDLESS = ("runs", "explain", "schema", "docs", "gc", "jobs", "doctor", "ui")


@pytest.mark.parametrize("words", [[name] for name in COMMANDS if name not in WORDLESS])
def test_a_command_without_its_words_says_in_one_line_what_is_missing(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    said = refused_here(capsys, *words)
    assert said.startswith(f"{words[0]}: missing: ") and said.endswith(f"`dlopt {words[0]} --help` has examples")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["rnu", "job.yaml"], "there is no command 'rnu'; did you mean run?"),
        (["run", "job.yaml", "--jsn"], "run: there is no option --jsn; did you mean --json?"),
        (["run", "job.yaml", "--metrics-port", "99999"], "run: --metrics-port: '99999' is no port: give a number from 1 to 65535; "),
        (["serve", "x", "--port", "x"], "serve: --port: 'x' is no port: give a number from 1 to 65535; "),
        (["plot-schedule", "job.yaml", "--rows", "0"], "plot-schedule: --rows: '0' must be a whole number from 1 on; "),
        (["run", "job.yaml", "--home"], "run: --home: needs a value; "),
        (["schema", "more"], "schema: 'more' is one word too many"),
        (["runs", "remove", "x"], "runs: 'remove x': to remove some write `dlopt runs rm RUN ...`"),
        (["completion", "tcsh"], "completion: SHELL: invalid choice: 'tcsh' (choose from "),
        (["explain", "train.epoch"], "explain: train.epoch: no such field; did you mean epochs?"),
        (["explain", "train.epochs.x"], "explain: train.epochs.x: train.epochs is a value, there is nothing below it"),
        (["docs", "strat"], "docs: there is no page 'strat'; there are "),
        (["init", "nowhere.csv", "--target", "y"], "nowhere.csv: no such file in "),
    ],
)
def test_a_wrong_word_is_one_line_without_names_of_functions(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused_here(capsys, *words)
    assert said.startswith(says)
    assert not re.search(r"\b_\w+|\bNone\b|Traceback", said)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_examples_that_its_parser_takes(name: str) -> None:
    text = COMMANDS[name].format_help()
    examples = [line.strip() for line in text.partition("examples:\n")[2].splitlines() if line.strip().startswith("dlopt ")]
    assert examples and max(map(len, text.partition("examples:\n")[2].splitlines())) <= 88
    for line in examples:
        words = re.sub(r"\s{3,}.*|\s[|>].*", "", line).replace("'", "").split()[1:]
        assert cli._options(words).command


@pytest.mark.parametrize("columns", [72, 120])
def test_nothing_is_torn_in_a_narrow_window(columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Words stay whole, and so do a split with its figures and the command to copy."""
    monkeypatch.setenv("COLUMNS", str(columns))
    for name in COMMANDS:
        assert all(len(line) <= max(columns, 88) for line in COMMANDS[name].format_help().splitlines())
    figures = {split: {"accuracy": 0.97451234, "roc_auc": 0.99} for split in ("train", "validation", "test")}
    folder = Path("runs/a-name-of-some-length-77b72eee")
    terminal = Terminal("tiny")
    terminal.console = type(terminal.console)(file=sys.stderr, force_terminal=True, width=columns)
    terminal.summary(Outcome(folder, "tiny", figures, {}, 3.21, ("data",)))
    lines = capsys.readouterr().err.splitlines()
    for piece in ("tiny: done in 3.2 s", "validation accuracy 0.9745, roc_auc 0.9900", f"try it: dlopt serve {folder}"):
        assert sum(piece in line for line in lines) == 1
    assert all(len(line) <= columns for line in lines)


@pytest.mark.parametrize("columns", [72, 120, 200])
def test_no_cell_of_a_table_is_cut_or_folded(columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What does not fit in one line a row has a line for each cell."""
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    name, folder = "digits-of-a-long-name", "/a/place/of/some/length/runs/digits-of-a-long-name-77b72eee"
    figures = {split: {"accuracy": 0.97451234, "roc_auc": 0.99} for split in ("validation", "test")}
    print_runs([{"name": name, "created": "2026-11-30T22:00:00+00:00", "metrics": figures, "run": folder}])
    said = capsys.readouterr().out
    for piece in (name, folder, "2026-11-30T22:00:00+00:00"):
        assert piece in said
    assert said.count("accuracy 0.9745, roc_auc 0.9900") == 2 and len(said.splitlines()) == (2 if columns == 200 else 5)
    wide = {f"a_column_of_a_long_name_{number}": pa.array([f"value {place % 3} of three" for place in range(30)]) for number in range(2)}
    rows = pa.table(wide | {"x": pa.array([10.0**number for number in range(30)])})
    kinds = {column: "category" if column.startswith("a") else "number" for column in rows.column_names}
    facts = describe({guard.WHOLE: summarise(dict(zip(rows.column_names, rows.columns, strict=True)), kinds, ())}, ())
    print_profile(facts, "name: x\n")
    lines = re.sub(r"\x1b\[\d*m", "", capsys.readouterr().out).splitlines()
    found = Profile("rows", facts, "name: x\n")
    assert repr(found) == f"<profile of rows: 30 rows, 3 columns, {len(found.warnings)} warnings>"
    assert [line.split() for line in str(found).splitlines()] == [line.split() for line in lines]
    assert all(any(column in line.split() for line in lines) for column in rows.column_names)


@pytest.mark.slow
def test_a_reader_that_goes_early_is_no_mistake() -> None:
    shell = f"set -o pipefail; {sys.executable} -m dlopt schema | head -n 1"
    ended = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, env=environment())
    assert (ended.stdout, ended.stderr, ended.returncode) == ("{\n", "", 141)


@pytest.mark.parametrize(("name", "says"), [("run", "goes on from here"), ("prepare", "begins it anew"), ("submit", "`dlopt jobs` shows")])
def test_ctrl_c_says_what_is_true_of_the_command(
    name: str, says: str, job: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dlopt.spec.load", interrupted)
    more = ["--address", "http://127.0.0.1:9"] if name == "submit" else []
    ended = here(capsys, name, job, *more)
    assert ended.returncode == 130 and says in ended.stderr and len(ended.stderr.splitlines()) == 1


@pytest.mark.slow
def test_ctrl_c_ends_a_process_with_130(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "job.yaml")  # which the command reads until it is told to stop
    process = start("check", tmp_path / "job.yaml")
    with open(tmp_path / "job.yaml", "w"):
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and said.splitlines() == ["dlopt: stopped"]


def test_version_is_one_line() -> None:
    ended = dlopt("--version")
    assert re.fullmatch(r"dlopt \d+\.\d+\.\d+ \(Python 3[.\d]+, ray [.\d]+, torch .*\)\n", ended.stdout)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["com"], ["compare", "completion", "compress"]),
        (["run", "--me"], ["--metrics-port"]),
        (["runs", ""], ["rm"]),
        (["serve", "ti"], ["tiny", "tiny-1"]),
        (["runs", "rm", "ti"], ["tiny-1"]),
        (["nothing", ""], []),
    ],
)
def test_completion_knows_commands_options_and_runs(
    given: list[str], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny-1").mkdir()
    (tmp_path / "tiny-1" / "run.json").write_text('{"name": "tiny"}')
    monkeypatch.setenv("DLOPT_HOME", str(tmp_path))
    assert list(completion.candidates(given)) == words


def test_completion_in_bash(tmp_path: Path) -> None:
    (tmp_path / "dlopt").write_text(f'#!/bin/sh\nexec {sys.executable} -m dlopt "$@"\n')
    (tmp_path / "dlopt").chmod(0o755)
    script = 'eval "$(dlopt completion bash)"; COMP_WORDS=(dlopt plot-s); COMP_CWORD=1; _dlopt; echo "${COMPREPLY[@]}"'
    path = f"{tmp_path}:{os.environ['PATH']}"
    ended = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=environment(PATH=path))
    assert (ended.stdout, ended.stderr) == ("plot-schedule\n", "")


# What a field means


def test_every_field_of_every_part_can_be_explained() -> None:
    """And each says something."""
    todo, seen = [("", fields.Entry("", "", "", "", (Job,)))], set()
    while todo:
        path, entry = todo.pop()
        for part in entry.parts:
            if (name := part.__name__) in seen:
                continue
            seen.add(name)
            tag = part.model_fields["kind"].default if "kind" in part.model_fields else None
            below = f"{path}.{tag}" if tag and path else path
            assert fields.explain(below)
            for field in fields.entries(part):
                there = f"{below}.{field.path}".lstrip(".")
                text = fields.explain(there)
                assert text.splitlines()[0] == there and " ".join(field.says.split())[:40] in " ".join(text.split()) and field.says
                todo.append((there, field))
    assert {"Job", "Train", "Adam", "Cosine", "ImageInput", "Csv"} <= seen


def test_explain_names_kinds_defaults_and_bounds(capsys: pytest.CaptureFixture[str]) -> None:
    text = here(capsys, "explain", "train.schedule").stdout
    assert "  default  {kind: constant}" in text and "\n  cosine " in text
    text = here(capsys, "explain", "train.optimizer.adamw.lr").stdout
    assert "default  0.001" in text
    text = here(capsys, "explain", "model.mlp").stdout
    assert "hidden: list of whole number >= 1" in text


# The disk


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Two runs of one set of data, an artifact that nobody names, and an unfinished one."""
    home = tmp_path / "home"
    parents = {
        "data/d1": {},
        "data/d2": {},
        "model/m1": {"data": "d1"},
        "model/m2": {"data": "d1"},
        "model/m3": {"data": "d2"},
        "model/m4": None,
    }
    for name, parent in parents.items():
        (home / name).mkdir(parents=True)
        (home / name / "rows").write_bytes(b"x" * 1500)
        if parent is not None:
            (home / name / "manifest.json").write_text(json.dumps({"parents": parent, "section": {}}))
    for number in (1, 2):
        run = home / f"tiny-{number}"
        run.mkdir()
        record = {"name": "tiny", "created": f"2026-01-0{number}", "artifacts": {"data": "../data/d1", "model": f"../model/m{number}"}}
        (run / "run.json").write_text(json.dumps(record))
    return home


def test_gc_says_what_no_run_needs_and_removes_it_when_told(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ended = here(capsys, "gc", "--home", home)
    assert ended.returncode == 2 and "nothing is removed without --yes" in ended.stderr
    lines = [line.split(None, 3) for line in ended.stdout.splitlines()]
    assert [line[2] for line in lines[:-1]] == ["data/d2", "model/m3", "model/m4"] and (home / "data" / "d2").is_dir()
    assert lines[2][3] == "an unfinished model that no run needs" and lines[-1][:2] == ["4.6", "kB"]
    assert here(capsys, "gc", "--home", home, "--yes").returncode == 0
    left = {str(path.relative_to(home)) for path in home.glob("*/*") if path.is_dir()}
    assert left == {"data/d1", "model/m1", "model/m2"}
    assert here(capsys, "gc", "--home", home).stdout == f"{home}: nothing to remove\n"


def test_a_removed_run_takes_what_it_alone_needed(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert [str(item.path.relative_to(home)) for item in disk.of_runs(home, ["tiny-1"])] == ["tiny-1", "model/m1"]
    assert [str(item.path.relative_to(home)) for item in disk.of_runs(home, ["tiny-1", "tiny-2"])] == [
        *("tiny-1", "tiny-2"),
        *("data/d1", "model/m1", "model/m2"),
    ]
    assert here(capsys, "runs", "rm", "tiny-1", "--yes", "--home", home).returncode == 0
    assert not (home / "tiny-1").exists() and not (home / "model" / "m1").exists() and (home / "data" / "d1").is_dir()
    assert "neither a run's folder" in refused_here(capsys, "runs", "rm", "tiny-1", "--yes", "--home", home)


def test_nothing_is_removed_while_something_is_made(home: Path) -> None:
    import fcntl

    with open(home / "model" / ".m9.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DloptError, match=r"a dlopt process makes model/m9 now"):
            disk.unneeded(home)
    assert len(disk.unneeded(home)) == 3


# A job to begin with


def test_init_writes_a_whole_job_with_its_schema_and_keeps_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    csv_job(tmp_path, table(600))
    out = tmp_path / "begun.yaml"
    assert here(capsys, "init", tmp_path / "rows.csv", "--target", "c", "-o", out).stdout == f"{out}\n"
    text = out.read_text()
    assert text.startswith("# yaml-language-server: $schema=dlopt.schema.json\n# From its 600 rows.")
    assert json.loads((tmp_path / "dlopt.schema.json").read_text()) == json_schema(Job)
    found = yaml.safe_load(text)
    assert found["name"] == "rows" and found["data"]["target"] == {"kind": "category", "column": "c"}
    assert "    # a is left out: " in text and found["data"]["inputs"] == [{"kind": "number", "columns": ["b"]}]
    assert yaml.safe_load(here(capsys, "check", out).stdout)["model"]["kind"] == "joint"
    assert refused_here(capsys, "init", tmp_path / "rows.csv", "--target", "c", "-o", out) == (
        f"{out}: is there already: give another name, or --force writes over it"
    )
    assert refused_here(capsys, "init", tmp_path / "rows.csv") == "--target: name the column to predict; the columns are a, b, c"
