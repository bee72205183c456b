"""`dlopt cluster`: it ends what it has started and nothing else; and the page on clusters, run as it stands."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pyarrow.fs as fs
import pytest

from dlopt import docs
from dlopt.cluster import nodes
from dlopt.cluster.nodes import MARK, NODE, Cluster, down, known, place, processes, status
from dlopt.part import DloptError
from tests.commands import ROOT, environment, here, refused_here
from tests.packages import package
from tests.served import free_port


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A cluster of two sleeping programs, one of which is deaf to SIGTERM, as `up` would have noted it."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    folder = tmp_path / "session"
    folder.mkdir()
    cluster = Cluster(os.urandom(8).hex(), "secret", 6379, 8265, str(folder), (1, 2))
    place().parent.mkdir(parents=True)
    place().write_text(json.dumps(vars(cluster)))
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    marks = os.environ | {MARK: cluster.mark}
    started = [
        subprocess.Popen([sys.executable, "-c", deaf], env=marks | {NODE: "0"}),
        subprocess.Popen(["sleep", "600"], env=marks | {NODE: "1"}, start_new_session=True),
    ]
    while len(processes(cluster.mark)) < 2:
        time.sleep(0.01)
    yield cluster
    for process in started:
        process.kill()
        process.wait()


def test_down_ends_the_clusters_processes_and_no_other(made: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "STOP_SECONDS", 0.5)
    other = subprocess.Popen(["sleep", "600"], env=os.environ | {MARK: "another's"})
    try:
        assert {node for node, _ in processes(made.mark).values()} == {"0", "1"}
        assert known() == made
        assert down(made) == 2
        assert processes(made.mark) == {} and other.poll() is None
        assert known() is None and not Path(made.folder).exists()
    finally:
        other.kill()
        other.wait()


def test_a_second_cluster_and_none_are_one_line(made: Cluster, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "there is one already, at http://127.0.0.1:8265" in refused_here(capsys, "cluster", "up", "--nodes", 1)
    ended = here(capsys, "cluster", "status")
    assert ended.returncode == 1 and "node 0 (head): is gone, 1 CPU\nnode 1: is gone, 2 CPUs\n" in ended.stdout
    assert [node["up"] for node in status(made)["nodes"]] == [False, False]
    monkeypatch.setenv("XDG_STATE_HOME", made.folder)
    assert "none was started here: `dlopt cluster up` starts one" in refused_here(capsys, "cluster", "down")
    assert "invalid choice: 'upp'" in refused_here(capsys, "cluster", "upp")


def test_a_node_that_does_not_start_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    (tmp_path / "ray").write_text("#!/bin/sh\necho no room >&2\nexit 3\n")
    (tmp_path / "ray").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(DloptError, match=r"cluster up: node 0 does not start \(exit code 3\): no room"):
        nodes.up(2, 1)
    assert known() is None


def blocks() -> list[str]:
    """The commands of the page on clusters."""
    return re.findall(r"^```sh cluster\n(.*?)^```", (docs.PAGES / "cluster.md").read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.slow
@pytest.mark.usefixtures("mnist")
def test_the_page_on_clusters_runs_as_it_stands(tmp_path: Path) -> None:
    """Three nodes; a run on a disk; the same in an object store, twice; a model served from there; and nothing left."""
    store = package("moto.server", "test").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    store.start()
    host, port = store.get_host_and_port()
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_ENDPOINT_URL": f"http://{host}:{port}"}
    bucket = fs.S3FileSystem(
        endpoint_override=f"{host}:{port}", scheme="http", access_key="test", secret_key="test", allow_bucket_creation=True
    )
    bucket.create_dir("bucket")
    first, second = blocks()
    served = free_port()
    lines = [line for line in first.splitlines() if "cluster down" not in line]
    lines += [line for line in second.splitlines() if not line.startswith("dlopt serve")]
    lines += [next(line for line in lines if "--home s3" in line), "dlopt cluster status"]
    lines += [f"exec {line} --port {served}" for line in second.splitlines() if line.startswith("dlopt serve")]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    outside = environment(PATH=path, HOME=str(tmp_path), XDG_STATE_HOME=str(tmp_path / "state"), **keys)
    script = tmp_path / "page.sh"
    script.write_text("set -ex\n" + "\n".join(lines))
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(["bash", str(script)], cwd=ROOT, env=outside, stdout=log, stderr=log, start_new_session=True)
        try:
            deadline = time.monotonic() + 540
            while "Ctrl-C" not in (said := (tmp_path / "log").read_text()):
                assert process.poll() is None and time.monotonic() < deadline, said
                time.sleep(1)
            assert httpx.get(f"http://127.0.0.1:{served}/readyz", trust_env=False).status_code == 200
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGINT)
                process.wait(60)
            ended = subprocess.run(["dlopt", "cluster", "down"], env=outside, cwd=ROOT, capture_output=True, text=True, timeout=120)
            store.stop()
    said = (tmp_path / "log").read_text()
    assert "nodes: 3: " in said and "0 wrong" in said and said.count(": SUCCEEDED") >= 3, said
    assert said.count("all is done already") == 1, said
    assert str(tmp_path / "dlopt-runs" / "mnist-") in said and "s3://bucket/runs/mnist-" in said
    assert "node 2: runs" in said
    assert re.fullmatch(r"ended \d+ processes\n", ended.stdout), ended.stdout + ended.stderr
    assert not [line for _, line in processes_of("DLOPT_CLUSTER") if "raylet" in line and str(tmp_path) in line]


def processes_of(variable: str) -> Iterator[tuple[int, str]]:
    """Of all that have a variable in their environment."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                if f"{variable}=".encode() in (entry / "environ").read_bytes():
                    yield int(entry.name), (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
