"""The fit stage: resolves what the job runs on, hands the work to Ray Train, and watches it."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dlopt.artifact import Artifact, Stage
from dlopt.data.prepared import Split
from dlopt.models.own import Own, factory_of
from dlopt.optim.schedules import refuse_too_long
from dlopt.part import DloptError, Target
from dlopt.progress import Progress, silent
from dlopt.train.checkpoints import CHECKPOINTS, Store, newest, said, store_of
from dlopt.train.follow import followed
from dlopt.train.section import (
    Fit,
    Resources,
    Train,
    course_of,
    needs_validation,
    refuse_balance,
    refuse_labels,
    refuse_loss,
    refuse_monitor,
    refuse_threshold,
)

COLLECTIVE_SECONDS = 300
"""How long a worker waits for the others in one exchange before the run counts it as a failure; torch's own limit is half an hour."""
OVERSUBSCRIBED = 4
"""The most workers for each core of a machine that a local cluster is started on."""

Workers = int | tuple[int, int]


def local_cpus(resources: Resources) -> int:
    """Logical CPUs of a cluster of our own: room for the workers and for Ray Data beside them."""
    cores = os.cpu_count() or 1
    most = _most(resources.workers) if resources.workers != "auto" else 0
    if most > OVERSUBSCRIBED * cores:
        raise DloptError(f"resources.workers: {most} workers on {cores} cores: at most {OVERSUBSCRIBED * cores} here, or give --address")
    return max(cores, int(most * (resources.cpus_per_worker + 1)))


def fit(section: Fit, out: Path, data: Artifact, *, resources: Resources, progress: Progress = silent) -> dict[str, Any]:
    """Train on Ray Train until the last epoch or early stopping; returns the info of the model's manifest."""
    _refuse_no_validation(section, data)
    train = Split.open(data, "train")
    _refuse_other_target(section.train, train.signature.target)
    refuse_too_long(section.train.schedule, course_of(section, len(train)))
    cluster = _cluster()
    workers = _workers(resources, cluster)
    feed = _feed(resources, train, workers, cluster)
    if feed == "stream":
        workers = _leaving_room(workers, resources, cluster)
    store = store_of(out.resolve(), resources.checkpoint)
    progress("fit", 0.0, f"starting {_say(workers)}, {feed} feed{_going_on(store)}")
    config = {
        "fit": section.model_dump(mode="json"),
        "resources": resources.model_dump(mode="json"),
        "data": str(data.path.resolve()),
        "out": str(out.resolve()),
        "feed": feed,
        "threads": max(1, int(resources.cpus_per_worker)) if workers else None,
    }
    with followed(out, section, train, resources, progress):
        return _run(config, section, workers, resources, cluster, out, store)


FIT = Stage("model", fit, scratch=CHECKPOINTS)


def _run(
    config: dict[str, Any], section: Fit, workers: Workers, resources: Resources, cluster: dict[str, float], out: Path, store: Store
) -> dict[str, Any]:
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from dlopt.train.worker import train_worker

    factory = factory_of(section.model) if isinstance(section.model, Own) else None

    def work(config: dict[str, Any]) -> dict[str, Any] | None:
        return train_worker(config, factory, store)

    logging.getLogger("ray.train").setLevel(logging.ERROR)
    use_gpu = bool(workers) and cluster.get("GPU", 0) >= _most(workers)
    storage = out.resolve() / "ray"
    trainer = TorchTrainer(
        work,
        train_loop_config=config,
        torch_config=TorchConfig(timeout_s=COLLECTIVE_SECONDS),
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": resources.cpus_per_worker} | ({"GPU": 1} if use_gpu else {}),
        ),
        run_config=RunConfig(
            name=uuid.uuid4().hex,  # Ray's own resuming is tied to its version; our checkpoints are not
            storage_path=str(storage),
            failure_config=FailureConfig(max_failures=resources.max_failures, controller_failure_limit=2),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    try:
        with _interruptible():
            result = trainer.fit()
    except Exception as error:
        raise _said_by_worker(error) or error from error
    finally:
        shutil.rmtree(storage, ignore_errors=True)
    if not isinstance(result.return_value, dict):
        raise RuntimeError("Ray Train ended without the result of worker 0")
    return result.return_value


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C is KeyboardInterrupt as everywhere: Ray Train takes the signal for itself, for good, and calls sys.exit."""
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if main:
            signal.signal(signal.SIGINT, before)


def _said_by_worker(error: BaseException) -> DloptError | None:
    """The DloptError that a worker raised, out of what Ray wrapped around it."""
    seen: list[BaseException] = [error]
    for one in seen:
        if isinstance(one, DloptError):
            return DloptError(str(one))
        inner = [one.__cause__, getattr(one, "cause", None), *getattr(one, "worker_failures", {}).values(), getattr(one, "_base_exc", None)]
        seen += [found for found in inner if isinstance(found, BaseException) and all(found is not known for known in seen)]
    return None


def _cluster() -> dict[str, float]:
    import ray

    return dict(ray.cluster_resources())


def _workers(resources: Resources, cluster: dict[str, float]) -> Workers:
    """What `workers` means on this cluster. Raises DloptError when the cluster can never give it."""
    if resources.workers == "auto":
        return int(cluster.get("GPU", 0))
    least = resources.workers if isinstance(resources.workers, int) else resources.workers[0]
    needed, there = least * resources.cpus_per_worker, cluster.get("CPU", 0)
    if needed > there:
        raise DloptError(
            f"resources.workers: {least} workers need {needed:g} CPUs and the cluster has {there:g}: lower workers or cpus_per_worker"
        )
    return resources.workers


def _feed(resources: Resources, train: Split, workers: Workers, cluster: dict[str, float]) -> str:
    fits = len(train) * train.row_bytes <= resources.resident_bytes
    feed = ("resident" if fits else "stream") if resources.feed == "auto" else resources.feed
    least, there = (workers if isinstance(workers, int) else workers[0]), cluster.get("CPU", 0)
    if feed == "stream" and least * (resources.cpus_per_worker + 1) > there:
        raise DloptError(
            f"resources.feed: a stream needs a CPU for each of {least} workers beside their own, and the cluster has {there:g}: "
            "lower workers or cpus_per_worker, or use feed: resident"
        )
    return feed


def _leaving_room(workers: Workers, resources: Resources, cluster: dict[str, float]) -> Workers:
    """Elastic workers that take every CPU would wait for ever for the stream that feeds them: each needs one beside its own."""
    if isinstance(workers, int):
        return workers
    return workers[0], max(workers[0], min(workers[1], int(cluster.get("CPU", 0) // (resources.cpus_per_worker + 1))))


def _refuse_other_target(train: Train, target: Target) -> None:
    """Raises DloptError when the section asks for what the target has not."""
    refuse_monitor(train, target.kind, target.size)
    refuse_balance(train, target.kind)
    refuse_labels(train, target)
    refuse_loss(train, target.kind)
    refuse_threshold(train, target.kind, target.size)


def _refuse_no_validation(section: Fit, data: Artifact) -> None:
    who = needs_validation(section.train)
    if who and not data.info["counts"]["validation"]:
        raise DloptError(f"{who}: looks at the validation split, which is empty: give data.split.validation a share")


def _most(workers: Workers) -> int:
    return workers if isinstance(workers, int) else workers[1]


def _going_on(store: Store) -> str:
    """Where an interrupted run goes on; raises DloptError when all its checkpoints are damaged."""
    found, damaged = newest(store)
    after = f", going on {said(found.name)}" if found else ""
    return after + "".join(f"; {line}" for line in damaged)


def _say(workers: Workers) -> str:
    if workers == 0:
        return "in this process"
    return f"{workers} workers" if isinstance(workers, int) else f"{workers[0]} to {workers[1]} workers"
