"""One group of workers on Ray Train, from its start to its end, and why it ended. What comes of that is decided by who started it."""

from __future__ import annotations

import logging
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ray.exceptions import RayActorError
from ray.train import ControllerError, FailureConfig, LoggingConfig, PreemptionError, RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer

from dlopt import remote
from dlopt.part import DloptError
from dlopt.session import started_here
from dlopt.train.cluster import room, stopping
from dlopt.train.cluster.ray_internals import (
    DatasetsCallback,
    FixedScalingPolicy,
    PlacementGroupCleanerCallback,
    WorkerCallback,
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
    get_train_context,
)
from dlopt.train.cluster.stopping import Preempted
from dlopt.train.watch.metrics_log import STARTS, read
from dlopt.train.watch.watchdog import HUNG

MARGIN = 30
"""Seconds that workers wait for a hung one, in an exchange, after it should have been found to hang."""


class Listening(WorkerCallback):
    """In the main thread of each worker: SIGTERM, and Ray's word that its node goes away, are notices."""

    def after_init_train_context(self) -> None:
        preempted = get_train_context().preemption_context
        stopping.listen(lambda: preempted.preemption_info is not None)


class Unannounced(FixedScalingPolicy):
    """Does not tell Ray Data's coordinator which CPUs are taken: on a cluster of our own without a stream nobody asks, and its process
    takes two seconds to start."""

    def after_controller_start(self, train_run_context: Any) -> None: ...

    def _maybe_send_resource_request(self) -> None: ...


SUPERFLUOUS = (PlacementGroupCleanerCallback, DatasetsCallback)
"""Of Ray Train's parts, each with a process. The first gives placement groups back, as `train` does: it asks the dashboard, and where there
is none, training waits 12 seconds for it to end. The second hands datasets to workers, which are given none."""


class Trainer(TorchTrainer):
    """Without what is superfluous."""

    announced = True
    """Whether others have to know of the CPUs that workers take."""

    def _create_default_callbacks(self) -> list[Any]:
        return [one for one in super()._create_default_callbacks() if not isinstance(one, SUPERFLUOUS)]

    def _initialize_and_run_controller(self, **given: Any) -> Any:
        if not self.announced:
            given["scaling_policy"] = Unannounced(self.scaling_config)
        return super()._initialize_and_run_controller(**given)


def train(
    work: Callable[[dict[str, Any]], dict[str, Any] | None],
    config: dict[str, Any],
    workers: int,
    need: room.Need,
    storage: Path,
    hang_seconds: float,
) -> dict[str, Any]:
    """What worker 0 returns of `work(config)`, which so many workers run. With none of them, this thread does.

    storage: a folder for what Ray Train has to write. hang_seconds: how long an exchange among workers may take, but for a margin.
    """
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    before, home = room.places() if workers else None, remote.remote_of(storage)
    home = home if home and home.spread else None
    trainer = Trainer(
        work,
        train_loop_config=config,
        torch_config=TorchConfig(timeout_s=int(hang_seconds) + MARGIN),
        scaling_config=ScalingConfig(num_workers=workers, use_gpu="GPU" in need.worker, resources_per_worker=need.worker),
        run_config=RunConfig(
            name=uuid.uuid4().hex,  # Ray's own resuming is tied to its version; our checkpoints are not
            storage_path=home.key(storage) if home else str(storage),
            storage_filesystem=home.filesystem if home else None,
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
            logging_config=LoggingConfig(log_level="ERROR"),
            callbacks=[Listening()],
        ),
    )
    trainer.announced = need.stream or not started_here()
    try:
        returned = trainer.fit().return_value
    finally:
        shutil.rmtree(storage, ignore_errors=True)
        if home:
            remote.drop(storage)
        if before is not None:
            room.sweep(before)
    if not isinstance(returned, dict):
        raise RuntimeError("Ray Train ended without the result of worker 0")
    return returned


class Loss(NamedTuple):
    """What ended a group of workers that another one can follow."""

    why: str
    """In a line."""
    counts: bool = True
    """Against the budget of losses: not when it was told to end, or had no room."""


def loss_of(error: BaseException, out: Path, since: float) -> Loss | None:
    """Why a group of workers that trained into `out` has ended; None for what another group would meet as well. since: by time.time(), when
    it was started."""
    if isinstance(error, RayActorError):
        return Loss("the controller of Ray Train was lost")
    if isinstance(error, PreemptionError):
        return Loss("the node of a worker goes away", counts=False)
    if isinstance(error, ControllerError):
        return _of_controller(error.controller_failure)
    if not isinstance(error, WorkerGroupError):
        return None
    failures = error.worker_failures
    if any(isinstance(one, Preempted) for one in failures.values()):
        return Loss("a worker was told to end", counts=False)
    hung = [line for line in read(out / HUNG) if line["time"] >= since]
    return Loss(_hung(hung) if hung else _lost(failures, _hosts(out, since)))


def _of_controller(error: BaseException) -> Loss | None:
    if isinstance(error, WorkerGroupStartupTimeoutError):
        return Loss("there is no longer room for its workers", counts=False)
    return Loss("a worker was lost as it started") if isinstance(error, (WorkerGroupStartupFailedError, RayActorError)) else None


def _hung(lines: list[dict[str, Any]]) -> str:
    said = [f"worker {line['rank']} on {line['host']} at {line['where']}" for line in lines]
    return f"no step for {lines[0]['seconds']:.0f} s: {'; '.join(said)}"


def _hosts(out: Path, since: float) -> list[str]:
    """Of the workers that have set out since."""
    hosts = [line["hosts"] for line in read(out / STARTS) if line["time"] >= since]
    return hosts[-1] if hosts else []


def _lost(failures: dict[int, Exception], hosts: list[str]) -> str:
    """Those whose process is gone; only where there are none, those that have failed: which they do when others are gone, too."""
    gone = {rank: said for rank, error in failures.items() if (said := _gone(error))}
    if not gone:
        rank, error = next(iter(failures.items()))
        gone = {rank: f"has failed: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"}
    return "; ".join(f"worker {rank}{f' on {hosts[rank]}' if rank < len(hosts) else ''} {said}" for rank, said in sorted(gone.items()))


def lost(error: BaseException) -> bool:
    """Whether the process of a worker is gone."""
    return any(_gone(one) for one in getattr(error, "worker_failures", {}).values())


def _gone(error: Exception) -> str | None:
    if isinstance(error, WorkerHealthCheckTimeoutError):
        return "no longer answers"
    if not isinstance(error, WorkerHealthCheckFailedError):
        return None
    text = str(error.health_check_failure)
    if "OutOfMemory" in text or "running low on memory" in text:
        return "was ended by Ray, since its node has no memory left"
    return "was lost with its node" if "node" in text and ("died" in text and "The node" in text) else "was lost: its process has ended"


def mistake_in(error: BaseException) -> DloptError | None:
    """The DloptError that a worker raised, out of what Ray wrapped around it."""
    seen: list[BaseException] = [error]
    for one in seen:
        if isinstance(one, DloptError):
            return DloptError(str(one))
        inner = [
            one.__cause__,
            getattr(one, "cause", None),
            getattr(one, "controller_failure", None),
            *getattr(one, "worker_failures", {}).values(),
            getattr(one, "_base_exc", None),
        ]
        seen += [inside for inside in inner if isinstance(inside, BaseException) and all(inside is not known for known in seen)]
    return None
