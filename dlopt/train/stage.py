"""The fit stage: resolves what the job runs on, waits for room, hands the work to Ray Train, and goes on when workers are lost."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dlopt import remote
from dlopt.artifact import Artifact, Stage
from dlopt.data.feed.order import LANES
from dlopt.data.prepared import Split
from dlopt.models.custom import Custom, factory_of
from dlopt.optim.schedules import refuse_too_long
from dlopt.part import DloptError, Target
from dlopt.progress import WARNING, Progress, silent
from dlopt.train.checkpoint.checkpoints import glance
from dlopt.train.checkpoint.stores import CHECKPOINTS, Store, said, store_of
from dlopt.train.cluster import stopping
from dlopt.train.cluster.stopping import RESIZE, STOP, GaveUp, Stopped
from dlopt.train.job import (
    Fit,
    Resources,
    Train,
    course_of,
    needs_validation,
    refuse_balance,
    refuse_labels,
    refuse_loss,
    refuse_monitor,
    refuse_other_workers,
    refuse_threshold,
)
from dlopt.train.parallel.strategies import refuse_parallelism
from dlopt.train.progress.follow import counted, followed
from dlopt.train.watch.metrics_log import STARTS, WRITTEN
from dlopt.train.watch.profile import say

if TYPE_CHECKING:
    from dlopt.train.cluster.room import Need, Node

OVERSUBSCRIBED = 4
"""The most workers for each core of a machine that a local cluster is started on."""
STOP_SECONDS = 30
"""How long workers have to save, after a SIGTERM to the run."""

Work = Callable[[dict[str, Any]], dict[str, Any] | None]


def local_cpus(resources: Resources) -> int:
    """Logical CPUs of a cluster of our own: room for the workers and for Ray Data beside them."""
    cores = os.cpu_count() or 1
    most = _range(resources)[1] if resources.workers != "auto" else 0
    if most > OVERSUBSCRIBED * cores:
        raise DloptError(f"resources.workers: {most} workers on {cores} cores: at most {OVERSUBSCRIBED * cores} here, or give --address")
    return max(cores, int(most * (resources.cpus_per_worker + 1)))


def needs_ray(resources: Resources, data: Artifact) -> bool:
    """Whether training needs a cluster, if there is none yet: for workers, or for a stream."""
    return _range(resources, torch.cuda.device_count())[1] > 0 or _feed(resources, Split.open(data, "train")) == "stream"


def fit(section: Fit, out: Path, data: Artifact, *, resources: Resources, progress: Progress = silent) -> dict[str, Any]:
    """Train on Ray Train until the last epoch or early stopping; returns the info of the model's manifest. Raises DloptError, Stopped when
    it is told to end, and GaveUp when too many workers are lost or there is no room for them."""
    from dlopt.train.cluster import room

    refuse_other_workers(section.train, resources)
    _refuse_no_validation(section, data)
    train = Split.open(data, "train")
    _refuse_other_target(section.train, train.signature.target)
    refuse_too_long(section.train.schedule, course_of(section, len(train)))
    nodes = room.nodes()
    feed = _feed(resources, train)
    need = need_of(resources, nodes, feed, section.train.rows_of_batch(len(train)))
    if resources.workers == "auto" and (gpus := gpus_of(nodes)) > need.most:
        progress("fit", None, f"{WARNING}{counted(need.most)} for {gpus} GPUs, the others idle: a batch cannot be shared out to more")
    if need.most > 1:
        refuse_parallelism(resources.parallelism, section.train.optimizer)
    room.refuse_never(need, nodes)
    for asked in (STOP, RESIZE):
        stopping.take_back(out, asked)
    store = store_of(out.resolve(), resources.checkpoint)
    progress("fit", 0.0, f"starting {_say(need)}, {feed} feed{_going_on(store)}")
    config = {
        "fit": section.model_dump(mode="json"),
        "resources": resources.model_dump(mode="json"),
        "data": str(data.path.resolve()),
        "out": str(out.resolve()),
        "feed": feed,
        "threads": max(1, int(resources.cpus_per_worker)) if need.most else None,
    }
    run = _Run(_work(section, store), config, out.resolve(), need, resources, store, progress)
    with (
        remote.exchanged(out.resolve(), gives=(STOP, RESIZE), takes=WRITTEN),
        followed(out, section, train, resources, progress, run.waiting),
        _interruptible(),
        told_by_sigterm(out),
    ):
        info = run.to_the_end()
    remote.take_from(out.resolve(), info.pop("given", None))
    if resources.profile:
        say(out, progress)
    return info


FIT = Stage("model", fit, scratch=CHECKPOINTS)


def _work(section: Fit, store: Store) -> Work:
    """What each worker runs."""
    from dlopt.train.worker import train_worker

    factory = factory_of(section.model) if isinstance(section.model, Custom) else None

    def work(config: dict[str, Any]) -> dict[str, Any] | None:
        from dlopt.train.watch.mistakes import mistake_of

        with stopping.training():
            try:
                return train_worker(config, factory, store)
            except Exception as error:
                if mistake := mistake_of(error):
                    raise mistake from error
                raise

    return work


@dataclass
class _Run:
    """Training as one group of workers after another, until one comes to the end.

    Not by Ray Train's own elasticity and FailureConfig (2.60): it ends a group to resize it without asking it to save first, so that steps
    are redone; it counts parts of a CPU wrong, as a TODO there says; and it starts again after a mistake of the user's, too.

    What it takes to notice, on an idle machine: half a second that the process of a worker, or of Ray Train's controller, is gone; what
    Ray's health checks take (20 seconds) that a node is; RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S (60 seconds) that a worker's process does
    not answer; `resources.hang_seconds` that a worker answers but makes no step.
    """

    work: Work
    config: dict[str, Any]
    out: Path
    need: Need
    resources: Resources
    store: Store
    progress: Progress
    losses: int = 0
    waits: bool = False
    """Whether there is no room."""
    promised: int = 0
    """For how many workers there was room when the last group was asked to end for more of them."""
    since: float = 0.0
    """When the group was started, by time.time()."""

    def to_the_end(self) -> dict[str, Any]:
        """The info of the model's manifest."""
        while True:
            workers = self._room() if self.need.most else 0
            self.since = time.time()
            try:
                info = self._group(workers)
            except Exception as error:
                self._judge(error)
                continue
            if info["stopped"] == "asked":
                raise Stopped(f"stopped at step {info['steps']}: the same command goes on from there")
            return info

    def waiting(self) -> str | None:
        """Why nothing comes, if that is known."""
        from dlopt.train.cluster.room import waiting_for

        if self.waits:
            return waiting_for(self.need)
        return None if self._set_out() or not self.need.most else f"starting {_say(self.need)}"

    def _set_out(self) -> bool:
        """Whether the group that was started is complete and trains."""
        starts = self.out / STARTS
        return starts.exists() and starts.stat().st_mtime >= self.since

    def _room(self) -> int:
        """How many workers there is room for now; waits for it. Raises GaveUp and Stopped."""
        from dlopt.train.cluster.room import Room, waiting_for

        began, asked = time.monotonic(), Room.ask(self.need, self.need.most - self.need.least)
        try:
            while not asked.enough():
                time.sleep(0.05)
                waited = time.monotonic() - began
                self.waits = waited >= 1
                if stopping.reason(self.out) == "stop":
                    raise Stopped("stopped before there was room for workers: the same command goes on from here")
                if waited >= self.resources.wait_seconds:
                    raise GaveUp(f"{waiting_for(self.need)}, for {waited:.0f} s (resources.wait_seconds): {self._where()}")
            return self.need.least + asked.settled(self.promised - self.need.least)
        finally:
            self.waits, self.promised = False, 0
            asked.leave()

    def _group(self, workers: int) -> dict[str, Any]:
        """Train with so many workers until they end."""
        from dlopt.train.cluster import group

        with self._growing(workers):
            return group.train(self.work, self.config, workers, self.need, self.out / "ray", self.resources.hang_seconds)

    @contextmanager
    def _growing(self, workers: int) -> Iterator[None]:
        """Within it, workers are asked to save and to end once there is room for more of them."""
        done = threading.Event()
        thread = threading.Thread(target=self._grow, args=(workers, done), name="dlopt-grow", daemon=True)
        if 0 < workers < self.need.most:
            thread.start()
        try:
            yield
        finally:
            done.set()
            if thread.ident:
                thread.join()
            stopping.take_back(self.out, RESIZE)

    def _grow(self, workers: int, done: threading.Event) -> None:
        from dlopt.train.cluster.room import Room

        while not self._set_out():  # until then, places that are free are its own
            if done.wait(0.25):
                return
        if done.wait(self.resources.resize_seconds):
            return
        asked = Room.ask(self.need, self.need.most - workers, least=False)
        try:
            while not done.wait(1.0):
                if asked.more():
                    self.promised = workers + asked.settled()
                    stopping.ask(self.out, RESIZE)
                    done.wait()
        finally:
            asked.leave()

    def _judge(self, error: Exception) -> None:
        """Say why a group has ended, if another one can follow it. Raises what it ended with, DloptError or GaveUp if not. What a worker
        raises may come of another's being gone."""
        from dlopt.train.cluster import group

        mistake = group.mistake_in(error)
        if mistake and not group.lost(error):
            raise mistake from error
        loss = group.loss_of(error, self.out, self.since) if self.need.most else None
        if loss is None:
            raise error
        if not loss.counts:
            return
        self.losses += 1
        if self.losses > self.resources.max_failures:
            borne = f"it is loss {self.losses}, and resources.max_failures is {self.resources.max_failures}"
            raise GaveUp(f"{loss.why}; {borne}: {self._where()}") from error
        self.progress("fit", None, f"{WARNING}{loss.why} (loss {self.losses} of {self.resources.max_failures})")

    def _where(self) -> str:
        newest = glance(self.store)
        return f"the same command goes on from {f'step {newest[1].step}' if newest else 'the start'}"


@contextmanager
def told_by_sigterm(out: Path) -> Iterator[None]:
    """Within it, SIGTERM asks the workers to save and to end; a second one, or STOP_SECONDS, ends the run at once. Raises Stopped then."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    told: list[threading.Timer] = []
    main = threading.main_thread().ident or 0

    def hear(number: int, frame: Any) -> None:
        if told:
            raise KeyboardInterrupt  # the only exception that Ray lets out of what it waits in
        stopping.ask(out)
        told.append(threading.Timer(STOP_SECONDS, signal.pthread_kill, (main, signal.SIGTERM)))
        told[0].daemon = True
        told[0].start()

    before = signal.signal(signal.SIGTERM, hear)
    try:
        yield
        if told:
            raise Stopped("stopped after the last step: the same command measures the model and goes on from there")
    except KeyboardInterrupt:
        if told:
            raise Stopped("stopped at once: the same command goes on from the newest checkpoint") from None
        raise
    finally:
        for timer in told:
            timer.cancel()
        signal.signal(signal.SIGTERM, before)


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


def _range(resources: Resources, gpus: int = 0) -> tuple[int, int]:
    """The least and the most workers that are asked for. gpus: of the cluster."""
    asked = gpus if resources.workers == "auto" else resources.workers
    return (asked, asked) if isinstance(asked, int) else asked


def need_of(resources: Resources, nodes: list[Node], feed: str, batch: int = LANES) -> Need:
    """What `workers` means on a cluster of these nodes, for batches of so many rows: workers have a GPU each where there are any.

    Raises DloptError where workers would have no rows, or more of them are asked for than there are GPUs, which would be idle.
    """
    from dlopt.train.cluster.room import Need

    gpus = gpus_of(nodes)
    least, most = _range(resources, min(gpus, LANES, batch))
    if least > batch:
        raise DloptError(
            f"resources.workers: {least} workers cannot share out a batch of {batch} rows: lower workers or raise train.batch_size"
        )
    if 0 < gpus < least:
        raise DloptError(
            f"resources.workers: {least} workers and the cluster has {gpus} GPU{'s' * (gpus > 1)}, of which each worker takes one: "
            f"lower workers to {gpus}, or hide the GPUs (CUDA_VISIBLE_DEVICES=) to train on CPUs"
        )
    worker = {"CPU": resources.cpus_per_worker} | ({"GPU": 1.0} if least and gpus else {})
    return Need(least, min(most, batch), worker, stream=feed == "stream")


def gpus_of(nodes: list[Node]) -> int:
    return int(sum(node.get("GPU", 0) for node in nodes))


def _feed(resources: Resources, train: Split) -> str:
    fits = len(train) * train.row_bytes <= resources.resident_bytes
    return ("resident" if fits else "stream") if resources.feed == "auto" else resources.feed


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


def _going_on(store: Store) -> str:
    """Where an interrupted run goes on, as far as can be told without its weights. Of damaged ones worker 0 tells."""
    newest = glance(store)
    return f", going on {said(newest[0])}" if newest else ""


def _say(need: Need) -> str:
    if need.most == 0:
        return "in this process"
    return counted(need.least) if need.least == need.most else f"{need.least} to {need.most} workers"
