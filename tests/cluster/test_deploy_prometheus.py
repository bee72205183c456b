"""A real Prometheus with the files of deploy/: it finds a cluster's nodes, and what dashboards and alerts ask for has data."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.cluster.test_deploy import DEPLOY, queries
from tests.commands import ROOT, environment
from tests.conftest import program
from tests.served import free_port

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("mnist")]
ONLY_THEN = ("GPUs", "Bytes that spilled", "DataSpills", "DataTasksFail", "Tasks that failed", "ObjectsSpill")
"""What has no series before it happens, or without the hardware."""


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a shell in which `dlopt cluster up` was evaluated."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    found = environment(PATH=path, HOME=str(tmp_path), XDG_STATE_HOME=str(tmp_path / "state"), RAY_metrics_report_interval_ms="2000")
    try:
        up = subprocess.run(
            ["dlopt", "cluster", "up", "--nodes", "2", "--cpus", "2"], env=found, capture_output=True, text=True, timeout=300
        )
        assert up.returncode == 0, up.stderr
        yield found | dict(re.findall(r"(\w+)=(\S+)", up.stdout))
    finally:
        subprocess.run(["dlopt", "cluster", "down"], env=found, capture_output=True, timeout=120)


def configured(folder: Path, outside: dict[str, str], training: int) -> Path:
    """deploy/prometheus as it stands, with the places of this machine, and asked more often."""
    found = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    found["global"] = {"scrape_interval": "2s", "evaluation_interval": "2s"}
    found["rule_files"] = [str(DEPLOY / "prometheus" / name) for name in found["rule_files"]]
    ray, trains, _ = found["scrape_configs"]
    ray["http_sd_configs"][0]["url"] = f"{outside['RAY_API_SERVER_ADDRESS']}/api/prometheus/sd"
    ray["http_sd_configs"][0]["refresh_interval"] = "5s"
    trains["static_configs"] = [{"targets": [f"127.0.0.1:{training}"]}]
    found["scrape_configs"] = [ray, trains]
    (folder / "ray-token").write_text(outside["RAY_AUTH_TOKEN"])
    (folder / "prometheus.yml").write_text(yaml.safe_dump(found))
    return folder / "prometheus.yml"


def test_what_dashboards_and_alerts_ask_for_has_data(outside: dict[str, str], tmp_path: Path, record_property: Any) -> None:
    training, port = free_port(), free_port()
    track = f"resources.track=[{{kind: prometheus, port: {training}}}]"
    job = ["jobs/mnist.yaml", "train.epochs=1000", "resources.workers=1", track]
    command = ["dlopt", "submit", *job, "--no-wait", "--home", str(tmp_path / "runs")]
    name = subprocess.run(command, env=outside, cwd=ROOT, capture_output=True, text=True, timeout=120).stdout.strip()
    words = [f"--config.file={configured(tmp_path, outside, training)}", f"--storage.tsdb.path={tmp_path / 'tsdb'}"]
    with open(tmp_path / "prometheus.log", "w") as log:
        server = subprocess.Popen(
            [program("prometheus"), *words, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log, start_new_session=True
        )
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 240
        asked = {where: plain(query) for where, query in queries().items() if not any(word in where for word in ONLY_THEN)}
        empty = dict(asked)
        while empty and time.monotonic() < deadline:
            time.sleep(5)
            empty = {where: query for where, query in empty.items() if not result(url, query)}
        job_state = subprocess.run(
            ["dlopt", "jobs", "status", name, "--json"], env=outside, capture_output=True, text=True, timeout=60
        ).stdout
        assert empty == {}, job_state
        record_property("queries of dashboards and alerts with data", len(asked))
        targets = httpx.get(f"{url}/api/v1/targets", trust_env=False).json()["data"]["activeTargets"]
        assert len([one for one in targets if one["labels"]["job"] == "ray" and one["health"] == "up"]) >= 2
    finally:
        server.terminate()
        server.wait(30)


def plain(query: str) -> str:
    """Of all runs and nodes; of an alert what it compares."""
    return re.split(r" (?:>|<|==|!=) ", re.sub(r'=~"\$\w+"', '=~".*"', query))[0]


def result(url: str, query: str) -> Any:
    reply = httpx.get(f"{url}/api/v1/query", params={"query": query}, trust_env=False, timeout=10)
    return reply.status_code == 200 and json.loads(reply.text)["data"]["result"]
