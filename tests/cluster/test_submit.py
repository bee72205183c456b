"""Jobs on a cluster: a head with token authentication, `ray job submit` and `dlopt submit`, both to their end."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from dlopt import runs
from tests.commands import ROOT, dlopt, environment, start
from tests.served import descendants, free_port

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("mnist")]
RAY = str(Path(sys.executable).with_name("ray"))


@dataclass
class Head:
    """A Ray head on this machine that asks for a token."""

    url: str
    token: str
    folder: Path

    def environment(self, **more: str) -> dict[str, str]:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return environment(PATH=path, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=self.token, RAY_USAGE_STATS_ENABLED="0", **more)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    folder = tmp_path_factory.mktemp("head")
    port, dashboard, client, agent, agent_grpc = (free_port() for _ in range(5))
    head = Head(f"http://127.0.0.1:{dashboard}", secrets.token_hex(16), folder)
    command = [
        RAY, "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={port}", "--num-cpus=4", "--disable-usage-stats",
        f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}",
        f"--dashboard-agent-grpc-port={agent_grpc}", f"--object-store-memory={300 * 2**20}",
    ]  # fmt: skip
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=head.environment(HOME=str(folder)), start_new_session=True)
    try:
        wait_until_up(head, process)
        yield head
    finally:
        for pid in [*descendants(process.pid), process.pid]:  # Ray's own end would take half a minute, and is not the matter here
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait(60)


def wait_until_up(head: Head, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 90
    while True:
        assert process.poll() is None and time.monotonic() < deadline, (head.folder / "log").read_text()
        try:
            reply = httpx.get(f"{head.url}/api/jobs/", headers={"Authorization": f"Bearer {head.token}"}, timeout=5, trust_env=False)
            if reply.status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)


def the_run(home: Path) -> dict[str, object]:
    (record,) = runs.listing(home)
    assert (Path(record["run"]) / "report.html").is_file()
    return dict(record)


def test_the_head_lets_nobody_in_without_its_token(head: Head) -> None:
    assert httpx.get(f"{head.url}/api/jobs/", trust_env=False).status_code == 401


def test_ray_job_submit_ends_succeeded(head: Head, tmp_path: Path) -> None:
    """As the README says it: results go to DLOPT_HOME, here a folder of the test."""
    settings = json.dumps({"env_vars": {"DLOPT_HOME": str(tmp_path)}})
    command = [RAY, "job", "submit", "--address", head.url, "--working-dir", ".", "--runtime-env-json", settings]
    command += ["--", "dlopt", "run", "jobs/mnist.yaml", "train.epochs=1"]
    ended = subprocess.run(command, cwd=ROOT, env=head.environment(), capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "succeeded" in ended.stdout
    assert "mnist: fit" in ended.stdout  # the log was followed
    assert the_run(tmp_path)["name"] == "mnist"


def submitted(head: Head, home: Path, *words: str, **options: object) -> subprocess.CompletedProcess[str]:
    job = ("jobs/mnist.yaml", "train.epochs=1", "resources.workers=2")
    return dlopt("submit", *job, *words, "--address", head.url, "--home", home, env=head.environment(), **options)


def asked(head: Head, *words: str) -> str:
    ended = dlopt("jobs", *words, "--address", head.url, env=head.environment())
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_dlopt_submit_ends_succeeded_and_a_second_one_is_all_cache(head: Head, tmp_path: Path) -> None:
    ended = submitted(head, tmp_path)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    run = str(the_run(tmp_path)["run"])
    assert ended.stdout == f"{run}\n"
    assert "SUCCEEDED" in ended.stderr and "mnist: fit" in ended.stderr and "test accuracy" in ended.stderr
    assert "@dlopt" not in ended.stderr
    again = submitted(head, tmp_path, "--json")
    found = json.loads(again.stdout)
    assert (found["status"], found["exit_code"], found["run"], found["made"]) == ("SUCCEEDED", 0, run, [])
    assert found["metrics"] == the_run(tmp_path)["metrics"]
    listed = json.loads(asked(head, "--json"))
    assert listed[0]["job"] == found["job"] and len({one["job"] for one in listed}) == len(listed)
    assert "mnist: fit" not in asked(head, "logs", found["job"])


def test_a_job_goes_on_without_us_is_found_again_and_stops_where_it_can_go_on(head: Head, tmp_path: Path) -> None:
    """--no-wait; progress as JSON; the same command follows what runs already, until Ctrl-C; stop saves a checkpoint; again it goes on."""
    name = submitted(head, tmp_path, "train.epochs=2000", "--no-wait").stdout.strip()
    deadline = time.monotonic() + 120
    while not (found := json.loads(asked(head, "status", name, "--json")))["share"] or not found["seconds_left"]:
        assert time.monotonic() < deadline and found["status"] in ("PENDING", "RUNNING"), found
        time.sleep(2)
    assert found["stage"] == "fit" and 0 < found["share"] < 1
    job = ("jobs/mnist.yaml", "train.epochs=1", "resources.workers=2", "train.epochs=2000")
    process = start("submit", *job, "--address", head.url, "--home", tmp_path, env=head.environment())
    assert process.stderr
    said = process.stderr.readline()
    assert said == f"{name}: is there already, and is followed\n"
    while "fit" not in said:
        said = process.stderr.readline()
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and f"{name}: no longer followed, and the job goes on there" in said
    assert asked(head, "stop", name) == f"{name}: STOPPED\n"
    log = asked(head, "logs", name)
    assert "stopped at step" in log
    step = int(log.partition("stopped at step ")[2].partition(":")[0])
    name = submitted(head, tmp_path, "train.epochs=2000", "--no-wait").stdout.strip()
    deadline = time.monotonic() + 120
    (starts,) = tmp_path.glob("model/*/starts.jsonl")
    while len(lines := starts.read_text().splitlines()) < 2:
        assert time.monotonic() < deadline, asked(head, "logs", name)
        time.sleep(1)
    assert json.loads(lines[1])["step"] == step > 0
    asked(head, "stop", name)


def test_a_job_that_fails_there_fails_here_with_its_exit_code(head: Head, tmp_path: Path) -> None:
    ended = submitted(head, tmp_path, "resources.workers=5")
    assert ended.returncode == 2 and not ended.stdout
    assert "resources.workers: 5 workers need 5 CPUs and the cluster has 4: lower workers or cpus_per_worker" in ended.stderr
    assert "FAILED  dlopt run ended with exit code 2" in ended.stderr


def test_a_cluster_without_dlopt_is_one_line(head: Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [RAY, "job", "submit", "--address", head.url, "--no-wait", "--submission-id", "bare", "--", "dlopt-of-another-world run"]
    subprocess.run(command, env=head.environment(), check=True, capture_output=True, timeout=120)
    deadline = time.monotonic() + 60
    while (found := json.loads(asked(head, "status", "bare", "--json")))["status"] != "FAILED":
        assert time.monotonic() < deadline
        time.sleep(1)
    assert found["exit_code"] == 127 and found["message"].startswith("dlopt is not installed on the cluster's head")


def test_a_wrong_token_and_none_are_one_line(head: Head, tmp_path: Path) -> None:
    for words, says in (
        ({"RAY_AUTH_TOKEN": "wrong" * 8}, "does not accept your token"),
        ({"RAY_AUTH_MODE": "disabled"}, "asks for a token"),
    ):
        ended = dlopt("submit", "jobs/mnist.yaml", "--address", head.url, "--home", tmp_path, env=head.environment() | words)
        assert ended.returncode == 2
        assert ended.stderr.startswith("dlopt: --address: ") and says in ended.stderr
        assert len(ended.stderr.splitlines()) == 1
