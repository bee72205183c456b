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
from tests.commands import ROOT, dlopt, environment
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


def test_dlopt_submit_ends_succeeded(head: Head, tmp_path: Path) -> None:
    ended = dlopt(
        "submit", "jobs/mnist.yaml", "train.epochs=1", "resources.workers=2", "--address", head.url, "--home", tmp_path,
        env=head.environment(),
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "SUCCEEDED" in ended.stderr
    assert "mnist: fit" in ended.stdout
    assert str(the_run(tmp_path)["run"]) in ended.stdout


def test_a_job_that_fails_there_fails_here(head: Head, tmp_path: Path) -> None:
    ended = dlopt("submit", "jobs/mnist.yaml", "resources.workers=5", "--address", head.url, "--home", tmp_path, env=head.environment())
    assert ended.returncode == 1
    assert "resources.workers: 5 workers need 5 CPUs and the cluster has 4: lower workers or cpus_per_worker" in ended.stdout
    assert "FAILED" in ended.stderr


def test_a_wrong_token_is_one_line(head: Head, tmp_path: Path) -> None:
    wrong = head.environment() | {"RAY_AUTH_TOKEN": "wrong" * 8}
    ended = dlopt("submit", "jobs/mnist.yaml", "--address", head.url, "--home", tmp_path, env=wrong)
    assert ended.returncode == 2
    assert ended.stderr.startswith("dlopt: --address: ")
    assert len(ended.stderr.splitlines()) == 1
