"""Jobs on a cluster, as far as that needs none: what is sent, what comes back with a log, and heads that answer in other ways."""

from __future__ import annotations

import asyncio
import io
import json
import os
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from dlopt import spec
from dlopt.cluster import package, submit
from dlopt.cluster.package import TIMES, arrived, package_of
from dlopt.cluster.submit import Ended, Log, Sending
from dlopt.data.rows import sources
from dlopt.data.sources.places import SENT
from dlopt.part import DloptError
from dlopt.progress import decoded, encoded, seconds_left
from dlopt.runs import Outcome
from dlopt.terminal import Terminal
from dlopt.train.progress.forecast import clock
from tests.commands import here, refused_here

JOB = """
name: tiny
data:
  source: {{kind: csv, path: {path}}}
  inputs: [{{kind: number, columns: [x]}}]
  target: {{kind: category, column: y}}
model: {{kind: linear}}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a job, its data, and much that is none of it."""
    folder = tmp_path / "work"
    for name in ("data/a.csv", "data/b.csv", ".git/objects/1", "runs/tiny-1/run.json", "other.csv", "photos/1.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x,y\n1,a\n2,b\n")
    (folder / "job.yaml").write_text(JOB.format(path="data/*.csv"))
    monkeypatch.chdir(folder)
    monkeypatch.delenv(SENT, raising=False)
    return folder


def named(path: str) -> spec.Job:
    return spec.validated(yaml.safe_load(JOB.format(path=path)))


def test_only_the_job_and_what_it_names_is_sent(folder: Path) -> None:
    job = spec.load(Path("job.yaml"))
    found = package_of(job, Path("job.yaml"), folder)
    assert found.files == ["job.yaml", "data/a.csv", "data/b.csv"]
    with zipfile.ZipFile(io.BytesIO(found.content)) as archive:
        assert sorted(archive.namelist()) == [TIMES, "data/a.csv", "data/b.csv", "job.yaml"]
        assert archive.read("data/a.csv") == (folder / "data/a.csv").read_bytes()
    assert package_of(job, folder / "job.yaml", Path()).content == found.content


@pytest.mark.parametrize("path", ["/shared/data/*.csv", "s3://bucket/data/", "~/data.csv"])
def test_what_lies_where_all_nodes_see_it_is_not_sent(path: str, folder: Path) -> None:
    assert package_of(named(path), Path("job.yaml"), folder).files == ["job.yaml"]


def test_what_cannot_be_sent_is_one_line_that_says_what_is_large(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "data/large").mkdir()
    (folder / "data/large/c.csv").write_bytes(b"1" * 5_000)
    monkeypatch.setattr(package, "MOST", 4_000)
    with pytest.raises(DloptError, match=r"3 files of 5.0 kB are too large.*at most 4.0 kB: data/large/ \(5.0 kB\), data/ \(24 B\): put"):
        package_of(named("data"), Path("job.yaml"), folder)
    with pytest.raises(DloptError, match=r"not below the working folder .*: give --working-dir"):
        package_of(named("data"), Path("job.yaml"), folder / "data")
    with pytest.raises(DloptError, match=r"data.source.path: there is no nothing.csv in"):
        package_of(named("nothing.csv"), Path("job.yaml"), folder)
    with pytest.raises(DloptError, match=r"data.source.path: ../secret.csv leads out of the working folder"):
        (folder.parent / "secret.csv").write_text("x\n")
        package_of(named("../secret.csv"), Path("job.yaml"), folder)


def test_the_same_files_are_the_same_data_wherever_they_are_unpacked(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray unpacks without times, into a folder that the package's hash and the session name."""
    job = spec.load(Path("job.yaml"))
    content = package_of(job, Path("job.yaml"), folder).content
    states = []
    for name in ("one", "other"):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            archive.extractall(tmp_path / name)
        monkeypatch.chdir(tmp_path / name)
        arrived(Path.cwd())
        states.append(json.dumps({key: source.found() for key, source in sources(job.data).items()}))
    assert states[0] == states[1]
    os.utime("data/a.csv", ns=(1, 1))
    assert json.dumps({key: source.found() for key, source in sources(job.data).items()}) != states[1]


def test_another_dlopt_there_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(package.SENDER, "9.9")
    with pytest.raises(DloptError, match=r"dlopt 9.9 has sent this job, and .*: pip install dlopt==9.9 on every node"):
        arrived(tmp_path)


def test_a_log_is_lines_for_people_and_what_is_meant_for_programs() -> None:
    work = encoded(stage="fit", share=0.5, text="epoch 1/2  1:05 left", seconds_left=65.0)
    result = encoded(run="/runs/tiny-1", name="tiny", metrics={"test": {"accuracy": 1.0}}, seconds=3.0, made=["data"])
    text = f"hello\n{work}\n! a warning\n@dlopt {{broken\n{result}\nlast"
    log, lines = Log(), list[str]()
    for start in range(0, len(text), 7):
        lines += log.add(text[start : start + 7])
    assert (lines, log.rest, log.taken) == (["hello", "! a warning", "@dlopt {broken"], "last", len(text))
    assert log.said["share"] == 0.5 and log.result["run"] == "/runs/tiny-1"
    assert Log.of(text) == Log(log.said, log.result, len(text) + 1, "")


@pytest.mark.parametrize("seconds", [0, 59, 60, 3599, 3600, 86_399, 86_400 * 2 + 11_045])
def test_the_time_left_is_read_back_from_the_text(seconds: int) -> None:
    assert seconds_left(f"epoch 1/3  loss 0.1234  12,300 rows/s  {clock(seconds)} left") == seconds
    assert seconds_left("writing: 3 of 4 parts") is None


def test_a_run_on_a_cluster_says_its_progress_in_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("DLOPT_PROGRESS", "json")
    terminal = Terminal("tiny")
    terminal.progress("fit", 0.25, "epoch 1/2  0:30 left")
    terminal.progress("fit", 0.26, "epoch 1/2  0:29 left")  # within a second
    terminal.progress("fit", None, "warning: slow")
    terminal.summary(Outcome(Path("/runs/tiny-1"), "tiny", {"test": {"accuracy": 1.0}}, {}, 3.0, ("data",)))
    first, warning, last = capsys.readouterr().err.splitlines()
    assert decoded(first) == {"stage": "fit", "share": 0.25, "text": "epoch 1/2  0:30 left", "seconds_left": 30.0}
    assert warning == "! tiny: fit  warning: slow" and decoded(last)["run"] == "/runs/tiny-1"  # type: ignore[index]


def answering(replies: dict[str, tuple[int, str]], asked: list[tuple[str, str]]) -> type[BaseHTTPRequestHandler]:
    """A server's answers, by path; 404 for others."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.path, self.headers.get("Authorization", "")))
            code, text = replies.get(self.path, (404, "Job x does not exist"))
            self.send_response(code)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: Any) -> None: ...

    return Handler


@contextmanager
def answers(replies: dict[str, tuple[int, str]], asked: list[tuple[str, str]] | None = None) -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), answering(replies, [] if asked is None else asked))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


VERSION = (200, json.dumps({"version": "4", "ray_version": ray.__version__, "ray_commit": "x", "session_name": "s"}))


@pytest.mark.parametrize(
    ("replies", "says"),
    [
        ({"/api/version": (401, "no token")}, "asks for a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"),
        ({"/api/version": (403, "wrong")}, "does not accept your token"),
        ({"/api/version": (200, '{"ray_version": "2.9.3"}')}, f"runs Ray 2.9.3, and this is Ray {ray.__version__}"),
        ({"/api/version": (200, "<html>")}, "answers, but not as a Ray dashboard does"),
        ({"/api/version": (500, "")}, "answers, but not as a Ray dashboard does"),
        ({"/api/version": VERSION}, "Job x does not exist: `dlopt jobs` lists those that there are"),
    ],
    ids=["no-token", "wrong-token", "old", "no-ray", "broken", "unknown-job"],
)
def test_a_head_that_answers_otherwise_is_one_line(
    replies: dict[str, tuple[int, str]], says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")  # which Ray would take, whatever it is given
    with answers(replies) as address:
        assert says in refused_here(capsys, "jobs", "status", "x", "--address", address)


@pytest.mark.parametrize("address", ["ray://head:10001", "head:6379", "http://"])
def test_an_address_that_is_no_dashboard_is_one_line(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "give the address of the head's dashboard" in refused_here(capsys, "jobs", "--address", address)


def test_words_that_are_no_request_are_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    assert "write list, status JOB, logs JOB or stop JOB" in refused_here(capsys, "jobs", "stop", "--address", "http://127.0.0.1:9")
    assert "--address: which cluster?" in refused_here(capsys, "jobs")


def details(status: str, code: int | None = None, message: str = "", **more: Any) -> dict[str, Any]:
    """What a head says of a job."""
    found = {"type": "SUBMISSION", "submission_id": "tiny-1", "status": status, "entrypoint": "dlopt run job.yaml", "start_time": 1_000}
    return found | {"message": message, "driver_exit_code": code} | more


def test_jobs_as_json_and_as_a_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    log = encoded(stage="fit", share=0.5, text="epoch 1/2", seconds_left=65.0)
    replies = {
        "/api/version": VERSION,
        "/api/jobs/": (200, json.dumps([details("RUNNING"), details("FAILED", 127, submission_id="tiny-0", end_time=3_000)])),
        "/api/jobs/tiny-1": (200, json.dumps(details("RUNNING"))),
        "/api/jobs/tiny-1/logs": (200, json.dumps({"logs": f"! a warning\n{log}\n"})),
    }
    with answers(replies) as address:
        one = json.loads(here(capsys, "jobs", "status", "tiny-1", "--json", "--address", address).stdout)
        assert (one["status"], one["share"], one["seconds_left"], one["started"], one["run"]) == ("RUNNING", 0.5, 65.0, 1.0, None)
        both = json.loads(here(capsys, "jobs", "--json", "--address", address).stdout)
        assert both[0] == one and "dlopt is not installed on the cluster's head" in both[1]["message"]
        assert "fit 50%  epoch 1/2" in here(capsys, "jobs", "--address", address).stdout
        assert here(capsys, "jobs", "logs", "tiny-1", "--address", address).stdout == "! a warning\nfit  epoch 1/2\n"


@pytest.mark.parametrize(
    ("status", "code", "expected"), [("SUCCEEDED", 0, 0), ("FAILED", 2, 2), ("FAILED", None, 1), ("FAILED", -9, 1), ("STOPPED", None, 143)]
)
def test_the_exit_code_is_the_jobs(status: str, code: int | None, expected: int) -> None:
    assert Ended({"status": status, "exit_code": code}).exit_code == expected


class Restarted:
    """A head whose log breaks off, which does not answer twice, and has then forgotten the job; what is sent again comes to its end."""

    def __init__(self) -> None:
        self.asked = 0
        self.sent: list[str] = []

    def job(self, name: str) -> Any:
        from ray.job_submission import JobDetails

        from dlopt.cluster.head import NoSuchJob, Unreachable

        self.asked += 1
        if name == "tiny-2":
            return JobDetails(**details("SUCCEEDED", 0, submission_id=name))
        if self.asked in (2, 3):
            raise Unreachable("nobody answers")
        if self.asked > 3:
            raise NoSuchJob("forgotten")
        return JobDetails(**details("RUNNING"))

    async def tail_job_logs(self, name: str) -> Any:
        await asyncio.sleep(0)
        yield f"of {name}\n"
        if name == "tiny-1":
            raise RuntimeError("WebSocket connection closed unexpectedly")
        yield encoded(run="/runs/tiny", name="tiny", metrics={}, seconds=1.0, made=[]) + "\n"


def test_a_head_that_was_restarted_gets_the_job_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit.time, "sleep", lambda _: None)
    monkeypatch.setattr(Sending, "send", lambda self, head: "tiny-2")
    head, said, lines = Restarted(), list[str](), list[str]()
    sending = Sending("tiny", "dlopt run job.yaml", b"", "d")
    ended = submit.follow(head, "tiny-1", lambda _, __, text: said.append(text), lines.append, sending, 1)  # type: ignore[arg-type]
    assert ended.exit_code == 0 and ended.state["run"] == "/runs/tiny"
    assert lines == ["of tiny-1", "of tiny-2"]
    assert "the head does not answer" in said[0] and "no longer knows tiny-1; sent again as tiny-2" in said[1]
    with pytest.raises(DloptError, match="no longer knows tiny-1: submit it again"):
        submit.follow(Restarted(), "tiny-1", lambda *_: None, lines.append)  # type: ignore[arg-type]


def test_a_job_that_cannot_be_sent_is_one_line(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    assert "not below the working folder" in refused_here(
        capsys, "submit", "job.yaml", "--working-dir", "data", "--address", "http://127.0.0.1:9"
    )
    assert "nobody answers at http://127.0.0.1:9 (Connection refused)" in refused_here(
        capsys, "submit", "job.yaml", "--address", "http://127.0.0.1:9"
    )
