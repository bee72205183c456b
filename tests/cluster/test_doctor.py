"""`dlopt doctor`: each finding from what a machine says of itself, with how to mend it; this machine; and a cluster's nodes."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from dlopt.cluster import doctor, probe
from tests.commands import here

GB = 10**9


def machine(**more: Any) -> dict[str, Any]:
    """One with nothing wrong."""
    versions = {"dlopt": "0.1.0", "ray": "2.60.0", "torch": "2.13.0"}
    disk = {"path": "/tmp", "total": 500 * GB, "free": 200 * GB}
    home = {"error": None, "file": ".doctor-a", "path": "/runs", "total": 500 * GB, "free": 200 * GB}
    found = {"python": "3.11.7", "versions": versions, "disk": disk, "shared_memory": disk, "memory": 16 * GB, "files": 65536, "gpus": []}
    return found | {"home": home} | more


def bad(findings: Any) -> list[tuple[str, str, str]]:
    return [(one.what, one.state, f"{one.says}: {one.mend}") for one in findings if one.state != "ok"]


def test_nothing_is_wrong_with_a_good_machine() -> None:
    assert bad(doctor.of_node(machine(), "a")) == []
    assert bad(doctor.of_versions({"a": machine(), "b": machine()})) == []
    assert bad(doctor.of_home({"a": machine()}, {"a": [".doctor-a"]}, Path("/runs"))) == []
    assert bad(doctor.of_clocks({"a": (0.2, 0.01)})) == [] == bad(doctor.of_clocks({"a": (2.0, 3.0)}))


@pytest.mark.parametrize(
    ("more", "what", "says"),
    [
        ({"disk": {"path": "/tmp", "total": 500 * GB, "free": 4 * GB}}, "disk", "/tmp: 4.0 GB of 500.0 GB are free: free some"),
        ({"disk": {"path": "/tmp", "total": 1000 * GB, "free": 40 * GB}}, "disk", "40.0 GB of 1.0 TB"),
        ({"home": {"error": "Permission denied"}}, "home", "cannot write there: Permission denied: give --home"),
        ({"home": {"error": None, "path": "/runs", "total": GB, "free": GB // 9}}, "home", "dlopt gc frees"),
        ({"shared_memory": {"path": "/dev/shm", "total": 64 * 2**20, "free": 0}}, "shared memory", "/dev/shm has 67.1 MB"),
        ({"files": 1024}, "open files", "at most 1024 open files: ulimit -n 65536"),
    ],
    ids=["disk", "share", "home", "home-full", "shm", "files"],
)
def test_too_little_is_a_finding_with_a_mend(more: dict[str, Any], what: str, says: str) -> None:
    ((found, _, said),) = bad(doctor.of_node(machine(**more), "a"))
    assert found == what and says in said


def test_other_versions_on_a_node_are_found() -> None:
    other = machine(python="3.12.1", versions={"dlopt": None, "ray": "2.59.0", "torch": "2.13.0"})
    said = [said for _, _, said in bad(doctor.of_versions({"a": machine(), "b": other}))]
    assert said == [
        "b has python 3.12.1, and a has 3.11.7: use Python 3.11.7 there",
        "b has no dlopt: pip install dlopt there, in the environment of Ray",
        "b has ray 2.59.0, and a has 2.60.0: pip install ray==2.60.0 there",
    ]


def test_a_home_that_nodes_do_not_share_is_found() -> None:
    found = bad(doctor.of_home({"a": machine(), "b": machine()}, {"a": [".doctor-a"], "b": []}, Path("/runs")))
    assert [said for _, _, said in found] == [
        f"b does not see in /runs what {other} has written there: mount the same disk at /runs on all nodes, or use --home s3://BUCKET/runs"
        for other in "ab"
    ]


def test_clocks_that_differ_are_found() -> None:
    ((_, state, said),) = bad(doctor.of_clocks({"a": (0.1, 0.01), "b": (-42.0, 0.01)}))
    assert state == "warning" and said == "b: its clock is 42.0 s behind: timedatectl set-ntp true there"


def test_packages_in_other_versions_than_dlopt_needs_are_found() -> None:
    there = {name: str(probe._version(name)) for name in doctor_packages()}
    assert bad(doctor.of_packages(there)) == []
    del there["pyarrow"]
    said = [said for _, _, said in bad(doctor.of_packages(there | {"ray": "2.9.3"}))]
    assert len(said) == 2 and said[0].startswith("ray 2.9.3, and dlopt needs ") and "pip install 'ray[" in said[0]
    assert said[1].startswith("pyarrow is not installed, and dlopt needs ")


def doctor_packages() -> list[str]:
    from importlib import metadata

    from packaging.requirements import Requirement

    return [Requirement(line).name for line in metadata.requires("dlopt") or [] if "extra ==" not in line]


def test_a_taken_port_is_found() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert bad(doctor.of_ports({port: "take another"})) == [("ports", "warning", f"port {port} is taken: take another")]


@pytest.mark.parametrize(
    ("environment", "mode", "says"),
    [
        ({}, None, ""),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "x"}, 0o600, ""),
        ({"RAY_AUTH_MODE": "token"}, None, "RAY_AUTH_MODE is token, and there is no token"),
        ({}, 0o600, "Ray's own commands send no token"),
        ({"RAY_AUTH_MODE": "token"}, 0o644, "can be read by other users: chmod 600"),
        ({"RAY_AUTH_MODE": "disabled"}, None, "can run programs there: export RAY_AUTH_MODE=token"),
    ],
    ids=["none", "sent", "missing", "not-sent", "open", "disabled"],
)
def test_how_a_user_is_known_to_a_cluster(environment: dict[str, str], mode: int | None, says: str, tmp_path: Path) -> None:
    file = tmp_path / "auth_token"
    if mode is not None:
        file.write_text("x")
        file.chmod(mode)
    found = bad(doctor.of_token(environment, file))
    assert [says in said for _, _, said in found] == [True] * bool(says)


def test_this_machine_leaves_nothing_in_the_home(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ended = here(capsys, "doctor", "--home", tmp_path / "new", "--json")
    found = json.loads(ended.stdout)
    assert {"disk", "home", "memory", "gpus", "token"} <= {one["what"] for one in found}
    assert ended.returncode == any(one["state"] == "wrong" for one in found)
    assert all(one["mend"] or one["state"] == "ok" for one in found)
    assert list((tmp_path / "new").iterdir()) == []


def test_a_home_that_cannot_be_written_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    ended = here(capsys, "doctor", "--home", tmp_path / "file" / "home")
    assert ended.returncode == 1 and "WRONG    home: this machine: cannot write there: " in ended.stdout
    assert "mend: give --home a folder" in ended.stdout


@pytest.mark.usefixtures("ray_cluster")
def test_each_node_of_a_cluster_is_looked_at(tmp_path: Path) -> None:
    found = doctor.cluster(tmp_path)
    said = {one.what: one.says for one in found}
    assert said["nodes"].startswith("1: ") and said["home"] == f"all nodes see {tmp_path}" and said["clocks"] == "all within a second"
    assert [one for one in found if one.state == "wrong"] == []
    assert os.listdir(tmp_path) == []  # noqa: PTH208
