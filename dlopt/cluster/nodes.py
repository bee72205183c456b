"""A Ray cluster of several nodes on this machine, to try things on: each node is a raylet of its own. The dashboard listens on loopback
alone; the rest, which Ray puts on the machine's own address, asks for the cluster's token, but for metrics and what Ray Serve serves.

Every process bears the cluster's mark in its environment, which its children inherit, so that `down` ends these and no other.
"""

from __future__ import annotations

import json
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlopt.artifact import write_atomically
from dlopt.part import DloptError
from dlopt.session import QUIET

MARK, NODE = "DLOPT_CLUSTER", "DLOPT_NODE"
"""Environment variables of its processes: the cluster that they belong to, and which of its nodes."""
START_SECONDS, STOP_SECONDS = 120.0, 10.0
STORE_BYTES = 200 * 2**20
"""Of the object store of each node."""
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Cluster:
    """One that was started here; what is known of it lies in a file."""

    mark: str
    token: str
    gcs: int
    dashboard: int
    folder: str
    """Of Ray's sessions, logs and sockets."""
    cpus: tuple[int, ...]
    """Of each node; the first is the head."""

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self.dashboard}"

    @property
    def address(self) -> str:
        """For `dlopt run --address`."""
        return f"{LOOPBACK}:{self.gcs}"

    def exports(self) -> str:
        """A line for a shell, after which commands meet this cluster."""
        found = {"RAY_API_SERVER_ADDRESS": self.url, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}
        return "export " + " ".join(f"{name}={shlex.quote(value)}" for name, value in found.items())


def place() -> Path:
    """The file of what is known of the cluster."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "dlopt" / "cluster.json"


def known() -> Cluster | None:
    """The cluster that was started here and not taken down."""
    try:
        found = json.loads(place().read_bytes())
        return Cluster(**found | {"cpus": tuple(found["cpus"])})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def up(nodes: int, cpus: int) -> Cluster:
    """Start a head and `nodes` - 1 nodes more, each with so many logical CPUs. Raises DloptError."""
    if not Path("/proc/self/environ").exists():
        raise DloptError("cluster up: needs Linux, by whose /proc the processes of a cluster are told from others")
    there = known()
    if there and processes(there.mark):
        raise DloptError(f"cluster up: there is one already, at {there.url}: `dlopt cluster status`, or `dlopt cluster down` first")
    mark = secrets.token_hex(8)
    folder = tempfile.mkdtemp(prefix="dlopt-", dir="/tmp")  # paths of sockets may have no more than 107 letters
    cluster = Cluster(mark, secrets.token_hex(32), _free(6379), _free(8265), folder, (cpus,) * nodes)
    place().parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_atomically(place(), json.dumps(vars(cluster)))
    place().chmod(0o600)
    try:
        for number in range(nodes):
            _start(cluster, number)
    except BaseException:
        down(cluster)
        raise
    return cluster


def _start(cluster: Cluster, number: int) -> None:
    """The head, or a node that joins it; returns when Ray says that it runs."""
    head = [
        "--head",
        f"--port={cluster.gcs}",
        f"--dashboard-host={LOOPBACK}",
        f"--dashboard-port={cluster.dashboard}",
        f"--ray-client-server-port={_free()}",
        f"--temp-dir={cluster.folder}",
    ]
    ports = ("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "metrics-export-port", "runtime-env-agent-port")
    command = [
        str(Path(sys.executable).with_name("ray")),
        "start",
        *([f"--address={cluster.address}"] if number else head),
        f"--node-ip-address={LOOPBACK}",
        f"--num-cpus={cluster.cpus[number]}",
        f"--object-store-memory={STORE_BYTES}",
        "--min-worker-port=0",
        "--max-worker-port=0",
        "--disable-usage-stats",
        *(f"--{name}={_free()}" for name in ports),
    ]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_ADDRESS", "RAY_API_", "RAY_AUTH_", "RAY_JOB_"))}
    environment = (
        QUIET
        | kept
        | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}",  # by which jobs find dlopt
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": cluster.token,
            "RAY_TMPDIR": cluster.folder,
            MARK: cluster.mark,
            NODE: str(number),
        }
    )
    log = Path(cluster.folder) / f"node-{number}.log"
    with open(log, "w") as file:
        try:
            code = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment, timeout=START_SECONDS, start_new_session=True
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
    if code != 0:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        said = f"exit code {code}" if code is not None else f"no answer in {START_SECONDS:.0f} s"
        raise DloptError(f"cluster up: node {number} does not start ({said}): {lines[-1] if lines else 'Ray says nothing'}")


def processes(mark: str) -> dict[int, tuple[str, str]]:
    """Of all that bear a mark: pid to (the number of its node, its command line)."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            try:
                given = dict(pair.partition("=")[::2] for pair in (entry / "environ").read_text(errors="replace").split("\0"))
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            except OSError:  # it has ended, or is another user's
                continue
            if given.get(MARK) == mark and command:
                found[int(entry.name)] = (given.get(NODE, ""), command)
    return found


def status(cluster: Cluster) -> dict[str, Any]:
    """What runs of it, as JSON."""
    there = processes(cluster.mark)
    raylets = {node: pid for pid, (node, command) in there.items() if "/raylet/raylet " in command}
    nodes = [
        {"node": number, "cpus": cpus, "pid": raylets.get(str(number)), "up": str(number) in raylets, "head": number == 0}
        for number, cpus in enumerate(cluster.cpus)
    ]
    return {"address": cluster.address, "dashboard": cluster.url, "nodes": nodes, "processes": len(there), "folder": cluster.folder}


def down(cluster: Cluster) -> int:
    """End all of its processes, politely and then by force, and remove what they have left; how many there were."""
    count = len(processes(cluster.mark))
    for number, seconds in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, STOP_SECONDS)):
        for pid in processes(cluster.mark):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue
        deadline = time.monotonic() + seconds
        while processes(cluster.mark) and time.monotonic() < deadline:
            time.sleep(0.2)
    if left := processes(cluster.mark):
        raise DloptError(f"cluster down: {len(left)} processes do not end: {', '.join(map(str, left))}")
    shutil.rmtree(cluster.folder, ignore_errors=True)
    place().unlink(missing_ok=True)
    return count


def _free(wished: int = 0) -> int:
    """A port that nobody listens on; the one that is wished for, if it is free."""
    for port in (wished, 0):
        try:
            with socket.create_server((LOOPBACK, port)) as probe:
                return int(probe.getsockname()[1])
        except OSError:
            continue
    raise DloptError("cluster up: there is no free port on this machine")
