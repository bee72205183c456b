"""`dlopt doctor`: what is wrong with a machine or a cluster, before a run finds it out, and how to mend it."""

from __future__ import annotations

import os
import secrets
import socket
import stat
import time
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

from packaging.requirements import Requirement

from dlopt.cluster import probe
from dlopt.disk import written
from dlopt.part import DloptError

LEAST_DISK, LEAST_SHARE, LEAST_SHM, LEAST_FILES = 5 * 10**9, 0.05, 2**30, 4096
"""Bytes and share of a disk that must be free, since Ray stops at 95 %; bytes of shared memory; open files."""
MOST_SKEW = 1.0
"""Seconds between clocks, by which the order of log lines and what is newest would go wrong."""
PORTS = {8000: "dlopt serve --port takes another", 8265: "ray start --dashboard-port takes another"}
NODE_SECONDS = 60.0
"""How long a node may take to answer."""
DECIDING = ("dlopt", "ray", "torch")
"""Packages whose versions must be the same everywhere."""

Probe = Mapping[str, Any]


class Finding(NamedTuple):
    """One thing that was looked at."""

    what: str
    state: Literal["ok", "warning", "wrong"]
    says: str
    mend: str = ""


def machine(home: Path) -> list[Finding]:
    """This machine, for a run on it."""
    mark = secrets.token_hex(4)
    found = probe.look(str(home), mark)
    _sweep(home, mark)
    return [*of_packages(), *of_node(found, "this machine"), *of_ports(), *of_token(dict(os.environ), _token_file()), of_torch(found)]


def cluster(home: Path) -> list[Finding]:
    """All nodes of the cluster that this process has joined, from here. Raises DloptError when they do not answer."""
    import ray
    from ray import cloudpickle
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

    cloudpickle.register_pickle_by_value(probe)  # so that nodes need no dlopt
    mark = secrets.token_hex(4)
    alive = [node for node in ray.nodes() if node["Alive"]]

    def on_each(function: Any, *given: Any) -> dict[str, Any]:
        task = ray.remote(num_cpus=0, max_retries=0)(function)
        waiting = {node["NodeID"]: task.options(scheduling_strategy=On(node["NodeID"], soft=False)).remote(*given) for node in alive}
        _, late = ray.wait([*waiting.values()], num_returns=len(waiting), timeout=NODE_SECONDS)
        if late:
            names = [f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})" for node in alive if waiting[node["NodeID"]] in late]
            raise DloptError(f"doctor: no answer in {NODE_SECONDS:.0f} s from {', '.join(names)}: is there memory for one more process?")
        return {name: ray.get(reference) for name, reference in waiting.items()}

    looks = on_each(probe.look, str(home), mark)
    saw = on_each(probe.seen, str(home), mark)
    _sweep(home, mark)
    names = {node["NodeID"]: f"{looks[node['NodeID']]['host']} ({node['NodeManagerAddress']})" for node in alive}
    skews = {}
    for node in alive:  # one after another: what a clock says is as exact as the answer is quick
        task = ray.remote(num_cpus=0)(probe.now).options(scheduling_strategy=On(node["NodeID"], soft=False))
        before = time.time()
        skews[names[node["NodeID"]]] = (ray.get(task.remote(), timeout=NODE_SECONDS) - (before + time.time()) / 2, time.time() - before)
    return [
        Finding("nodes", "ok", f"{len(alive)}: {', '.join(names.values())}"),
        *of_versions({names[node]: found for node, found in looks.items()}),
        *(finding for node, found in looks.items() for finding in of_node(found, names[node])),
        *of_home({names[node]: found for node, found in looks.items()}, {names[node]: found for node, found in saw.items()}, home),
        *of_clocks(skews),
    ]


def _sweep(home: Path, mark: str) -> None:
    for left in home.glob(f".doctor-*{mark}*"):
        left.unlink(missing_ok=True)


def of_packages(installed: Mapping[str, str] | None = None) -> Iterator[Finding]:
    """Whether what dlopt needs is there, in versions that it can use. installed: by package; what there is without it."""
    for line in metadata.requires("dlopt") or []:
        needs = Requirement(line)
        if needs.marker and not needs.marker.evaluate({"extra": ""}):
            continue
        there = installed.get(needs.name) if installed is not None else probe._version(needs.name)
        if there is None or not needs.specifier.contains(there, prereleases=True):
            said = f"{needs.name} {there}" if there else f"{needs.name} is not installed"
            yield Finding("packages", "wrong", f"{said}, and dlopt needs {needs.specifier}", f"pip install '{needs}'")


def of_node(found: Probe, name: str) -> Iterator[Finding]:
    """What one machine has, and too little of what."""
    for what in ("disk", "home"):
        disk = found.get(what) or {}
        if disk.get("error"):
            yield Finding(what, "wrong", f"{name}: cannot write there: {disk['error']}", "give --home a folder that this user can write to")
        elif disk and (disk["free"] < LEAST_DISK or disk["free"] < LEAST_SHARE * disk["total"]):
            said = f"{name}: {disk['path']}: {written(disk['free'])} of {written(disk['total'])} are free"
            mend = "dlopt gc frees what no run needs" if what == "home" else "free some, or start Ray with --temp-dir on a larger disk"
            yield Finding(what, "warning", said, mend)
        elif disk:
            yield Finding(what, "ok", f"{name}: {disk['path']}: {written(disk['free'])} free")
    shared = found["shared_memory"]
    if shared and shared["total"] < LEAST_SHM:
        mend = "docker run --shm-size=4g, or in Kubernetes a volume of medium Memory at /dev/shm"
        yield Finding("shared memory", "warning", f"{name}: /dev/shm has {written(shared['total'])}, so Ray keeps objects on disk", mend)
    if found["files"] < LEAST_FILES:
        yield Finding("open files", "warning", f"{name}: at most {found['files']} open files", "ulimit -n 65536 before Ray starts")
    yield Finding("memory", "ok", f"{name}: {written(found['memory'])}, {len(found['gpus'])} GPUs")


def of_versions(looks: Mapping[str, Probe]) -> Iterator[Finding]:
    """Whether all nodes have the same; the first is what the others are held against."""
    first, *others = looks
    for package in ("python", *DECIDING):
        said = {name: found["python"] if package == "python" else found["versions"][package] for name, found in looks.items()}
        mend = f"pip install {package}=={said[first]} there" if package != "python" else f"use Python {said[first]} there"
        for name, there in said.items():
            if there is None:
                yield Finding("versions", "wrong", f"{name} has no {package}", f"pip install {package} there, in the environment of Ray")
            elif name in others and said[first] and there != said[first]:
                yield Finding("versions", "wrong", f"{name} has {package} {there}, and {first} has {said[first]}", mend)
        if len(set(said.values())) == 1 and said[first]:
            yield Finding("versions", "ok", f"{package} {said[first]}")


def of_home(looks: Mapping[str, Probe], saw: Mapping[str, list[str]], home: Path) -> Iterator[Finding]:
    """Whether each node sees what each other writes."""
    files = {name: found["home"].get("file") for name, found in looks.items() if not found["home"]["error"]}
    blind = [(name, other) for name in saw for other, file in files.items() if file not in saw[name]]
    for name, other in blind:
        mend = f"mount the same disk at {home} on all nodes, or use --home s3://BUCKET/runs"
        yield Finding("home", "wrong", f"{name} does not see in {home} what {other} has written there", mend)
    if not blind and len(files) == len(looks):
        yield Finding("home", "ok", f"all nodes see {home}")


def of_clocks(skews: Mapping[str, tuple[float, float]]) -> Iterator[Finding]:
    """skews: by node, seconds that its clock is ahead of this one, and how long the answer took."""
    for name, (skew, took) in skews.items():
        if abs(skew) > MOST_SKEW + took / 2:
            way = "ahead" if skew > 0 else "behind"
            yield Finding("clocks", "warning", f"{name}: its clock is {abs(skew):.1f} s {way}", "timedatectl set-ntp true there")
    if all(abs(skew) <= MOST_SKEW + took / 2 for skew, took in skews.values()):
        yield Finding("clocks", "ok", "all within a second")


def of_ports(ports: Mapping[int, str] = PORTS) -> Iterator[Finding]:
    """Of this machine, those that commands take unless they are told otherwise."""
    for port, mend in ports.items():
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            yield Finding("ports", "warning", f"port {port} is taken", mend)


def _token_file() -> Path:
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()


def of_token(environment: Mapping[str, str], file: Path) -> Iterator[Finding]:
    """How this user is known to a cluster."""
    mode, given = environment.get("RAY_AUTH_MODE"), environment.get("RAY_AUTH_TOKEN")
    if file.is_file() and stat.S_IMODE(file.stat().st_mode) & 0o077:
        yield Finding("token", "wrong", f"{file} can be read by other users", f"chmod 600 {file}")
    if mode == "token" and not given and not file.is_file():
        yield Finding("token", "wrong", "RAY_AUTH_MODE is token, and there is no token", f"put the cluster's into RAY_AUTH_TOKEN or {file}")
    elif mode is None and (given or file.is_file()):
        said = "RAY_AUTH_MODE is not set, so Ray's own commands send no token (dlopt does)"
        yield Finding("token", "warning", said, "export RAY_AUTH_MODE=token")
    elif mode == "disabled":
        mend = "export RAY_AUTH_MODE=token, and give all nodes one token"
        yield Finding("token", "warning", "RAY_AUTH_MODE is disabled: whoever reaches a cluster's ports can run programs there", mend)
    else:
        yield Finding("token", "ok", "a token is sent" if given or file.is_file() else "none here: a cluster of our own makes one")


def of_torch(found: Probe) -> Finding:
    """Whether torch can use the GPUs that the driver knows."""
    import torch

    gpus, seen = len(found["gpus"]), torch.cuda.device_count()
    if gpus > seen:
        mend = "install torch for CUDA: https://pytorch.org/get-started; and look at CUDA_VISIBLE_DEVICES"
        return Finding("gpus", "wrong", f"{gpus} GPUs ({found['gpus'][0]}), of which torch {torch.__version__} sees {seen}", mend)
    return Finding("gpus", "ok", f"{seen} for torch {torch.__version__}")
