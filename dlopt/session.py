"""Where Ray is started, joined and left. Importing this module imports no Ray."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dlopt import remote
from dlopt.part import DloptError

QUIET = {
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "60",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "3",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SCHEDULER_EVENTS": "0",
    "RAY_worker_niceness": "0",
    "RAY_ENABLE_AUTO_CONNECT": "0",
    "GOMP_SPINCOUNT": "2000",
}
"""Settings for a quiet terminal, for failures that show within a minute, for workers at an ordinary priority (Ray's own is 15, so that
anything else on the machine starves a training run), and for threads that soon give way while they wait for each other: with other work on
the machine, steps of two threads that spin took 20 times as long, and with a short spin 3 times; without any spin (OMP_WAIT_POLICY=passive)
they took 1.3 times as long on a quiet one. And Ray is joined here or not at all: of itself, a thread that asks for something when its
cluster has just been left would start or join another one, and wait there for ever. What the user has set wins."""

PRIVATE = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
"""Of a cluster of our own. What Ray does by itself on macOS and Windows: a cluster of one machine, whose processes talk over loopback and
listen nowhere else; and no process that watches for nodes that are about to be taken away."""

CONNECT_SECONDS = 10.0
"""How long a cluster's head may take to answer."""

RAY_BLOCK_BYTES = 128 * 2**20
"""Ray Data's own default for the size of a block."""


def set_environment(address: str | None) -> None:
    """Set Ray's environment variables that must stand before `import ray`; RAY_AUTH_MODE always ends up explicit.

    A cluster of our own stays on loopback and gets a fresh token; another's is met with the user's token.
    """
    for name, value in (QUIET if address else QUIET | PRIVATE).items():
        os.environ.setdefault(name, value)
    if "RAY_AUTH_MODE" in os.environ:
        return
    if address is None:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    else:
        has_token = "RAY_AUTH_TOKEN" in os.environ or _token_path().is_file()
        os.environ["RAY_AUTH_MODE"] = "token" if has_token else "disabled"


def address_of(address: str | None) -> str | None:
    """The cluster to join: what was asked for, else RAY_ADDRESS (which `ray job submit` sets), else None for one of our own."""
    return address or os.environ.get("RAY_ADDRESS") or None


def started_here() -> bool:
    """Whether this process has started its cluster, which then nobody else uses."""
    from ray._private import worker

    return bool(worker._global_node and worker._global_node.head)


@contextmanager
def connected(address: str | None = None, cpus: int | None = None, idle: bool = True, **options: Any) -> Iterator[None]:
    """Join the cluster at `address`, or start one here with `cpus` logical CPUs and stop it again on the way out.

    idle: whether a cluster of our own starts a process for each CPU ahead of the first task; workers of Ray Train cannot make use of them.
    A process that is connected already stays as it is. Raises DloptError when the cluster cannot be reached.
    """
    address = address_of(address)
    set_environment(address)
    os.environ.setdefault("RAY_prestart_worker_first_driver", str(int(idle)))
    import ray

    if ray.is_initialized():
        yield
        return
    _refuse_unreachable(address)
    logging.getLogger("ray").setLevel(logging.WARNING)
    options = {"logging_level": logging.WARNING, "log_to_driver": False} | options  # what workers have to say reaches us as errors
    try:
        if address is None:
            ray.init(address="local", num_cpus=cpus or os.cpu_count(), include_dashboard=False, **options)
        else:
            if variables := remote.spread():
                options["runtime_env"] = {"env_vars": variables}
            ray.init(address=address, **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        where = address or "here"
        raise DloptError(f"--address: cannot start or join Ray at {where}: {str(error).strip().splitlines()[0]}") from error
    _take_over()
    try:
        yield
    finally:
        ray.shutdown()


def _take_over() -> None:
    """What Ray does in the process of a driver that is ours to do: SIGTERM ends it with the exit code that a shell gives, 143; and the
    deaths of workers, which Ray prints on stdout, where results go, are told by who started them."""
    from ray._private import worker

    worker.print_to_stdstream = lambda *_, **__: None
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def _refuse_unreachable(address: str | None) -> None:
    """Ray itself tries for minutes before it says that nobody listens there."""
    _, _, place = (address or "").rpartition("://")
    host, _, port = place.rpartition(":")
    if not host or not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise DloptError(
            f"--address: nobody answers at {address} ({getattr(error, 'strerror', None) or error}): is the cluster up?"
        ) from None


def data_context(*, preserve_order: bool = False, block_bytes: int | None = None, reserve: bool = True) -> None:
    """Settings of this process's Ray Data, for the datasets made from now on; our own progress says what its bars would.

    reserve: whether Ray Data keeps CPUs and memory back for each step of a dataset. It bounds what is read ahead of a slow reader, as
    training can be; but then a step alone gets half of the CPUs, which a pass that hands over next to nothing would lose for no gain.
    """
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = preserve_order
    context.raise_original_map_exception = True  # so that a DloptError of a worker can be told from a failure
    context.op_resource_reservation_enabled = reserve
    context.target_max_block_size = block_bytes or RAY_BLOCK_BYTES
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # an error is raised as well, and some are the user's, to be said in one line


def _token_path() -> Path:
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
