"""Machines that see each other by network alone: network namespaces on this one, joined by a bridge, each with disks of its own for Ray and
for caches. For root on Linux, with Debian's iproute2."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.commands import ROOT, environment
from tests.conftest import missing, program
from tests.nodes import HEALTH

NET = "10.77.0."
SWITCH = NET + "254"
"""Where what all machines reach listens, such as an object store."""
BIN = Path(sys.executable).parent
TOKEN = uuid.uuid4().hex * 2


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=30).stdout


class Network:
    """Namespaces `switch` and one for each machine, numbered from 1."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.mark = folder, uuid.uuid4().hex[:6]
        self.names: list[str] = []
        self.processes: list[subprocess.Popen[Any]] = []
        self.switch = self._namespace("sw")
        _ip("-n", self.switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", self.switch, "addr", "add", f"{SWITCH}/24", "dev", "br0")
        _ip("-n", self.switch, "link", "set", "br0", "up")

    def _namespace(self, name: str) -> str:
        full = f"dl{self.mark}{name}"
        _ip("netns", "add", full)
        self.names.append(full)
        _ip("-n", full, "link", "set", "lo", "up")
        return full

    def join(self, number: int) -> str:
        """A machine more; its namespace."""
        name, port = self._namespace(str(number)), f"p{number}"
        _ip("-n", self.switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("-n", self.switch, "link", "set", port, "master", "br0", "up")
        _ip("-n", name, "addr", "add", f"{NET}{number}/24", "dev", "eth0")
        _ip("-n", name, "link", "set", "eth0", "up")
        return name

    def plug(self, number: int, there: bool) -> None:
        """Put the cable of a machine in, or pull it out."""
        _ip("-n", self.switch, "link", "set", f"p{number}", "up" if there else "down")

    def start(self, name: str, words: Sequence[object], log: str, host: str = "", **more: str) -> subprocess.Popen[Any]:
        """A program in a namespace; it and what it starts is ended with the network. host: of a machine, with disks of its own."""
        setup = ""
        if host:
            for path in (self.folder / "cache", self.folder / "ray"):
                path.mkdir(exist_ok=True)
                setup += f"mount -t tmpfs none {path}; "
            setup += f"hostname {host}; "
        command = ["ip", "netns", "exec", name, "unshare", "-m", "-u", "sh", "-c", f"{setup}exec {shlex.join(map(str, words))}"]
        with open(self.folder / log, "a") as file:
            process = subprocess.Popen(command, stdout=file, stderr=file, env=self.environment(**more), cwd=ROOT, start_new_session=True)
        self.processes.append(process)
        return process

    def environment(self, **more: str) -> dict[str, str]:
        """Of all machines: a token, quick health checks, and where the object store is."""
        given = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_USAGE_STATS_ENABLED": "0", "PATH": f"{BIN}:{os.environ['PATH']}"}
        given |= {"XDG_CACHE_HOME": str(self.folder / "cache"), "RAY_TMPDIR": str(self.folder / "ray"), "GLOO_SOCKET_IFNAME": "eth0"}
        given |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_ENDPOINT_URL": f"http://{SWITCH}:5000"}
        return environment(**(HEALTH | given | more))

    def pids(self, name: str) -> list[int]:
        return [int(pid) for pid in _ip("netns", "pids", name).split()]

    def kill(self, name: str) -> None:
        """All that runs in a namespace, at once."""
        while pids := self.pids(name):
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)

    def close(self) -> None:
        for name in self.names:
            self.kill(name)
        for process in self.processes:
            process.wait(30)
        for name in self.names:
            _ip("netns", "del", name)


@contextmanager
def network(folder: Path) -> Iterator[Network]:
    """One whose namespaces and processes are gone afterwards."""
    program("ip")
    if os.geteuid():
        missing("only root may make network namespaces")
    made = Network(folder)
    try:
        yield made
    finally:
        made.close()
